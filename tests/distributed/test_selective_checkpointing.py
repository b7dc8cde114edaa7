"""Checkpointing that keeps the results of some operators gives the gradients of none at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nsa_dist import NativeSparseAttention, NSABlock, NSAConfig
from nsa_dist.attention import plan_cache
from nsa_kernels.compressors import COMPRESSORS

HIDDEN = 16
BRANCHES = [("compressed",), ("selected",), ("window",), ("compressed", "selected", "window")]


class Recorder(TorchDispatchMode):
    """The operators that run inside it: those that make new tensors, and those that change one."""

    def __init__(self) -> None:
        super().__init__()
        self.new: set[Any] = set()
        self.change: set[Any] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [x.alias_info for x in (*op._schema.arguments, *op._schema.returns)]
        if any(alias is not None and alias.is_write for alias in aliases):
            self.change.add(op)
        elif all(x.alias_info is None for x in op._schema.returns):
            self.new.add(op)
        return op(*args, **(kwargs or {}))


def make(alone: bool = False, **options: Any) -> tuple[nn.Module, Tensor]:
    """A block or the attention alone, with a choice of blocks to make, and its input."""
    torch.manual_seed(0)
    config = NSAConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        compress_block=4,
        compress_stride=2,
        select_block=4,
        num_selected=4,
        window=9,
        **options,
    )
    x = torch.randn(1, 70, HIDDEN)
    if alone:
        return NativeSparseAttention(HIDDEN, config, backend="pytorch"), x
    return NSABlock(HIDDEN, config, mlp_hidden=HIDDEN, backend="pytorch"), x


def gradients(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    return list(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))


def assert_same_gradients(block: nn.Module, x: Tensor, saved: set[Any]) -> None:
    """Whether an operator is named by its overload or by its packet, the gradients stay."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = op in saved or op.overloadpacket in saved
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    expected = gradients(block, block, x)
    found = gradients(
        lambda x: checkpoint(block, x, use_reentrant=False, context_fn=context), block, x
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), sorted(map(str, saved))


def recorded(block: nn.Module, x: Tensor) -> Recorder:
    block(x)  # The plan is made once, and not again when a layer is computed anew.
    with Recorder() as recorder:
        block(x)
    return recorder


@pytest.mark.parametrize("branches", BRANCHES, ids=lambda x: "+".join(x))
def test_keeping_products(branches: tuple[str, ...]) -> None:
    """By name, as in torch's own list of what takes long to compute."""
    aten = torch.ops.aten
    block, x = make(branches=branches)
    assert_same_gradients(
        block, x, {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten._softmax, aten.exp}
    )


def everything_computed() -> tuple[nn.Module, Tensor, set[Any]]:
    block, x = make(alone=True)
    ops = recorded(block, x)
    assert not ops.change
    assert {torch.ops.aten.bmm.default, torch.ops.aten._softmax.default} < ops.new
    return block, x, ops.new


@pytest.mark.parametrize("compress", list(COMPRESSORS))
def test_nothing_is_changed_in_place(compress: str) -> None:
    assert not recorded(*make(alone=True, compress=compress)).change


def test_keeping_everything_that_is_computed() -> None:
    assert_same_gradients(*everything_computed())


@pytest.mark.parametrize("saves", ["everything", "comparisons"])
def test_plans_are_none_of_what_is_kept(saves: str) -> None:
    """A forward makes its plan, or finds it among others; its recomputation finds it elsewhere."""
    layer, x = make(alone=True)
    first, second = (torch.tensor(b, dtype=torch.int32) for b in ([0, 13, 70], [0, 30, 70]))

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = saves == "everything" or op is torch.ops.aten.equal.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)

    def plain(x: Tensor) -> Tensor:
        return layer(x, cu_seqlens=first)

    def kept(x: Tensor) -> Tensor:
        return checkpoint(plain, x, use_reentrant=False, context_fn=context)

    plan_cache._plans_of_one_rank.clear()
    found = [gradients(kept, layer, x)]
    layer(x, cu_seqlens=second)
    found.append(gradients(kept, layer, x))
    expected = gradients(plain, layer, x)
    for each in found:
        assert all(map(torch.equal, each, expected))


@pytest.mark.slow
def test_keeping_the_results_of_one_operator() -> None:
    block, x, ops = everything_computed()
    for op in sorted(ops, key=str):
        assert_same_gradients(block, x, {op})
