"""Wrappers of torch, which keep weights elsewhere or compile, give what the model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

pytest.importorskip("transformers")

from tests.adapters.huggingface.small_models import INDEPENDENT, SMALL, some_tokens, sparse_model
from tests.distributed.ranks import Ranks

CONFIGS = {
    "shared": SMALL,
    "independent": INDEPENDENT,
    "static-gate-pool": replace(SMALL, gate="static", compress="attention_pool"),
}


def _replica(model: nn.Module) -> Any:
    """What DataParallel makes for each GPU: modules that hold weights, but no parameters.

    torch's ``replicate`` does the same, on GPUs alone.
    """
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return replicas[model]


@pytest.mark.parametrize("config", CONFIGS)
def test_replicas_of_data_parallel(config: str) -> None:
    """The Trainer makes them where a script is started as one process beside several GPUs."""
    model, tokens = sparse_model("qwen3", CONFIGS[config]).train(), some_tokens(2, 50)
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    found = _replica(model)(tokens, labels=tokens).loss
    found.backward()
    assert torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def losses_of_fsdp1(config: str, keeps_parameters: bool) -> list[float]:
    """Of two steps of SGD, alone and by FSDP1 with one flat parameter a layer."""
    model, tokens = sparse_model("llama", CONFIGS[config]).train(), some_tokens(2, 50)
    policy = partial(
        transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])}
    )
    found = []
    for wrapped in (
        copy.deepcopy(model),
        FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            use_orig_params=keeps_parameters,
            device_id=torch.device("cpu"),
        ),
    ):
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = wrapped(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("keeps_parameters", [False, True], ids=["flat", "use_orig_params"])
def test_fsdp1(keeps_parameters: bool, ranks_of: Callable[[int], Ranks]) -> None:
    for rank in ranks_of(2).run(losses_of_fsdp1, "shared", keeps_parameters):
        first, second, *found = rank
        assert second < first
        # Float32 gradients in another order of sums, and losses of a few nats.
        assert torch.allclose(torch.tensor(found), torch.tensor([first, second]), rtol=1e-5)


@pytest.mark.slow
def test_compiled(ranks_of: Callable[[int], Ranks]) -> None:
    """Padded batches of many lengths: the attention and its tables are not compiled for each."""
    ((found, expected, graphs),) = ranks_of(1).run(losses_of_compiled)
    assert found == expected
    # The second length makes sizes dynamic; later ones find their graphs.
    assert graphs[0] <= 8, graphs
    assert graphs[1:] == [graphs[1]] * (len(graphs) - 1), graphs


def losses_of_compiled() -> tuple[list[float], list[float], list[int]]:
    """Of a compiled model and of the model, and the graphs made up to each batch."""
    model, graphs = sparse_model("llama").train(), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, made = torch.compile(model, backend=count), []
    losses: tuple[list[float], list[float]] = ([], [])
    for length in (40, 33, 29):
        tokens = some_tokens(2, length)
        mask = (torch.arange(length) < torch.tensor([[length], [length // 2]])).long()
        for run, into in zip((compiled, model), losses, strict=True):
            loss = run(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
            loss.backward()
            into.append(float(loss.detach()))
        made.append(len(graphs))
    return (*losses, made)
