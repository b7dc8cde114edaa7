"""Distillation from dense attention over ranks: wrapped models, and sequences that are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nsa_dist import NativeSparseAttention, NSAConfig, distill_dense
from tests.distributed.ranks import Ranks

CONFIG = NSAConfig(2, 1, 8, compress_block=4, compress_stride=2, select_block=4, window=8)


def refusal() -> str:
    layer = NativeSparseAttention(16, CONFIG, group=dist.group.WORLD, backend="pytorch")
    x, found = torch.randn(1, 32, 16), ""
    try:
        with distill_dense():
            layer(x)
    except ValueError as error:
        found = str(error)
    layer(x)  # And the next good call works.
    return found


def test_a_split_sequence_is_refused(ranks_of: Callable[[int], Ranks]) -> None:
    message = "group must have one rank in distill_dense (its dense attention has), got 2"
    assert ranks_of(2).run(refusal) == [message] * 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = NativeSparseAttention(16, CONFIG, backend="pytorch")
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + torch.tanh(self.mlp(x))


class Stack(nn.Module):
    """A decoder of which gates and compressors are trained."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("gate" in name or "compressor" in name)
        self.begins_graph = "checkpoint" in kind  # As the Trainer lets embeddings do then.
        if self.begins_graph:
            for i, block in enumerate(self.blocks):
                self.blocks[i] = checkpoint_wrapper(block)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_(self.begins_graph)
        for block in self.blocks:
            x = block(x)
        return {"x": x}


def wrap(model: Stack, kind: str) -> nn.Module:
    if kind.startswith("DDP"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in kind)
    if not kind.startswith("FSDP2"):
        return model
    policy = MixedPrecisionPolicy()
    if "float16" in kind:
        policy = MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float16)
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy}
    for block in model.blocks:
        block = getattr(block, "_checkpoint_wrapped_module", block)
        if "attention" in kind:
            fully_shard(block.attention, **options)
        if "whole" not in kind:
            fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=True, **options)
    return model


def gradients(kind: str, every_rank: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank's batch, and gradients of the mean over ranks, by name; of a model by
    itself that has all batches for ``every_rank``. Twice, as gradients add up."""
    made = Stack(kind)
    model = wrap(made, kind)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    scale = 2.0**16  # float16 does not hold it.
    for seed in range(4) if every_rank else (dist.get_rank(), dist.get_rank() + 2):
        x = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(seed))
        with distill_dense(model) as distilled:
            model(x)
        (distilled.loss * scale).backward()
    found = {}
    for name, p in made.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            name = name.replace("_checkpoint_wrapped_module.", "")
            found[name] = grad / scale / (dist.get_world_size() if every_rank else 1)
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any("forward" in m.__dict__ for m in model.modules())
    return distilled.loss.detach(), found


@pytest.mark.parametrize(
    "kind",
    [
        "FSDP2",
        "FSDP2, whole",
        "FSDP2, attention",
        "FSDP2, checkpoint",
        "FSDP2, float16",
        "DDP",
        "DDP, unused",
        "DDP, unused, checkpoint",
    ],
)
def test_gradients_of_wrapped_models(kind: str, ranks_of: Callable[[int], Ranks]) -> None:
    """Are those of the model by itself."""
    ranks = ranks_of(2)
    loss, expected = ranks.run(gradients, "alone", True)[0]
    answers = ranks.run(gradients, kind)
    near = {"rtol": 3e-2, "atol": 3e-4} if "float16" in kind else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(answers[1][0], loss, rtol=near["rtol"], atol=0.0)
    for _, found in answers:
        torch.testing.assert_close(found, expected, **near)


def sharded_in_backward() -> tuple[list[bool], list[bool]]:
    """Which blocks are sharded in the backward of the first one, and after all."""
    model, seen = Stack("FSDP2"), list[list[bool]]()

    def look(_: Tensor | None = None) -> None:
        weights = [block.mlp.weight for block in model.blocks]
        seen.append([isinstance(weight, DTensor) for weight in weights])

    def watch(_: nn.Module, __: Any, gates: Tensor) -> None:
        gates.register_hook(look)

    wrap(model, "FSDP2")
    model.blocks[0].attention.gate.register_forward_hook(watch)
    with distill_dense(model) as distilled:
        model(torch.randn(1, 32, 16))
    distilled.loss.backward()
    look()
    return seen[0], seen[1]


def test_fsdp2_frees_a_block_after_its_backward(ranks_of: Callable[[int], Ranks]) -> None:
    for first, after in ranks_of(2).run(sharded_in_backward):
        assert first == [False, True, True]
        assert after == [True] * 3


def wrong(kind: str) -> str:
    model: Any = Stack(kind)
    if kind == "FSDP1":
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    else:
        wrap(model, kind)
    given = () if kind == "FSDP2" else (model,)
    try:
        with distill_dense(*given) as distilled:
            model(torch.randn(1, 32, 16))
        distilled.loss.backward()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "kind, message",
    [
        ("FSDP2", "model must be passed to distill_dense where FSDP2 shards it, got None"),
        ("FSDP1", "model must be sharded by FSDP2 in distill_dense"),
    ],
)
def test_wrapped_models_that_are_refused(
    kind: str, message: str, ranks_of: Callable[[int], Ranks]
) -> None:
    assert all(answer.startswith(message) for answer in ranks_of(2).run(wrong, kind))
