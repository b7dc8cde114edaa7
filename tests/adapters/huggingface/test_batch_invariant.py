"""One token's bits, however its document is computed: whole, over a cache, in a batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

from transformers import DynamicCache

from nsa_dist import NSAConfig
from nsa_dist.adapters.huggingface import convert_to_nsa
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    ON_GPU,
    SMALL,
    dense_model,
    left_padded,
    some_tokens,
    sparse_model,
)

CONFIG = replace(SMALL, **ON_GPU)
INDEPENDENT_ON_GPU = replace(INDEPENDENT, **ON_GPU)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


class _ByElement(TorchFunctionMode):
    """As on a GPU, an element of a function does not depend on where it stands.

    On CPUs the last few are computed by other code than full vectors.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.sigmoid, F.silu, torch.cos, Tensor.cos, torch.sin, Tensor.sin):
            return function(args[0].double()).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """Where an element, or a product's row, stands does not change its bits."""
    if not INTERPRETED:
        yield
        return
    from tests.ops.triton.guard import fixed_order_dot

    with fixed_order_dot(), _ByElement():
        yield


def invariant(family: str, dtype: torch.dtype, **options: Any) -> Any:
    device = "cpu" if INTERPRETED else "cuda"
    model = sparse_model(family, dtype=dtype, **{"config": CONFIG, **options}).to(device)
    model.use_group(None, backend="triton")
    model.use_batch_invariant()
    return model


@torch.no_grad()
def over_a_cache(model: Any, tokens: Tensor, pieces: list[int], **options: Any) -> Tensor:
    """Logits of rows that are computed in pieces, the rest token by token."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for length in [*pieces, *[1] * (tokens.shape[1] - sum(pieces))]:
        end = start + length
        given = {name: mask[:, :end] for name, mask in options.items()}
        logits.append(model(tokens[:, start:end], past_key_values=cache, **given).logits)
        start = end
    return torch.cat(logits, dim=1)


@needs_triton
@pytest.mark.parametrize(
    ("family", "dtype", "config"),
    [("llama", torch.float32, CONFIG), ("qwen3", torch.float16, INDEPENDENT_ON_GPU)],
    ids=["llama-float32", "qwen3-float16-independent"],
)
def test_bits_of_training_and_of_decoding(
    family: str, dtype: torch.dtype, config: NSAConfig, as_on_a_gpu: None
) -> None:
    model = invariant(family, dtype, config=config, num_hidden_layers=1)
    device = next(model.parameters()).device
    rows = [some_tokens(1, length, seed=length)[0].to(device) for length in (29, 21)]
    whole = [model.train()(row[None], use_cache=False).logits.detach()[0] for row in rows]
    model.eval()
    steps = over_a_cache(model, rows[0][None], [20, 7])[0]
    assert torch.equal(steps, whole[0])
    tokens, mask = left_padded(rows)
    batch = over_a_cache(model, tokens, [26], attention_mask=mask.to(device))
    for found, expected in zip(batch, whole, strict=True):
        assert torch.equal(found[-len(expected) :], expected)
    # Without it they differ, or this test would hold of anything.
    model.use_batch_invariant(False)
    assert not torch.equal(over_a_cache(model, rows[0][None], [20, 7])[0], whole[0])


@needs_triton
def test_it_is_the_same_function() -> None:
    """Loss and gradients, to what float32 rounds."""
    plain = sparse_model("qwen3", CONFIG, num_hidden_layers=1)
    plain.use_group(None, backend="triton")
    model = copy.deepcopy(plain)
    model.use_batch_invariant()
    tokens = some_tokens(1, 24)
    for each in (plain, model):
        each.train()(tokens, labels=tokens).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        error = (a.grad - b.grad).norm() / b.grad.norm().clamp_min(1e-30)
        assert error < 1e-4, name


@needs_triton
def test_it_can_be_turned_off_and_leaves_weights_as_they_are() -> None:
    model = sparse_model("qwen3", INDEPENDENT_ON_GPU)
    model.use_group(None, backend="triton")
    kinds = [type(x) for x in model.modules()]
    names = [*model.state_dict()]
    for _ in range(2):
        model.use_batch_invariant()
    assert [*model.state_dict()] == names
    assert isinstance(model.lm_head, nn.Linear)
    changed = [type(x) for x in model.modules()]
    linear = sum(issubclass(kind, nn.Linear) for kind in kinds)
    norms = sum(kind.__name__.endswith(("RMSNorm", "SetNorm")) for kind in kinds)
    assert sum(a is not b for a, b in zip(kinds, changed, strict=True)) == linear + norms
    model.use_group(None, backend="triton")
    assert model.nsa_runtime.batch_invariant
    model.use_batch_invariant(False)
    assert [type(x) for x in model.modules()] == kinds
    assert not model.nsa_runtime.batch_invariant


def _with_experts() -> Any:
    model = sparse_model("llama", CONFIG)
    model.use_group(None, backend="triton")
    model.model.layers[1].mlp = nn.Bilinear(4, 4, 4)
    return model


def _with_dense_layers() -> Any:
    model = convert_to_nsa(dense_model("llama"), CONFIG, layers=(1,))
    model.use_group(None, backend="triton")
    return model


@needs_triton
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_with_experts, r"model must be one of linear layers, .* got .*Bilinear"),
        (_with_dense_layers, r"layers must be all 2 with use_batch_invariant .*, got 1"),
        (lambda: sparse_model("llama"), r"backend must be 'triton', on a GPU, .*, got 'auto'"),
    ],
    ids=["experts", "dense layers", "backend"],
)
def test_what_is_refused(made: Callable[[], Any], message: str) -> None:
    model = made()
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match=message):
        model.use_batch_invariant()
    assert [type(x) for x in model.modules()] == kinds
