"""Tensor parallel plans over a layer's modules: they give its results, or are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nsa_dist import NativeSparseAttention, NSABlock
from tests.distributed.bad_call import LOCAL, Outcome, attempt
from tests.distributed.layer_case import HIDDEN, SMALL
from tests.distributed.ranks import Ranks

RanksOf = Callable[[int], Ranks]


def column() -> ColwiseParallel:
    return ColwiseParallel()


def dtensor_column() -> ColwiseParallel:
    return ColwiseParallel(use_local_output=False)


def row() -> RowwiseParallel:
    return RowwiseParallel()


def whole_column() -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Replicate())


def whole_row() -> RowwiseParallel:
    return RowwiseParallel(input_layouts=Replicate())


def layer(block: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"qk_norm": True, "dtype": torch.float64}
    if block:
        return NSABlock(HIDDEN, SMALL, mlp_hidden=32, **options)
    return NativeSparseAttention(HIDDEN, SMALL, **options)


Plan = dict[str, Callable[[], Any]]
ALL = ("q_proj", "k_proj", "v_proj")
REFUSED: dict[str, tuple[bool, Plan, str]] = {
    "heads": (False, {**dict.fromkeys(ALL, column), "o_proj": row}, "q_proj"),
    "queries": (False, {"q_proj": column}, "q_proj"),
    "keys": (False, {"k_proj": column}, "k_proj"),
    "values": (False, {"v_proj": column}, "v_proj"),
    "output-rows": (False, {"o_proj": row}, "o_proj"),
    "output-columns": (False, {"o_proj": column}, "o_proj"),
    "input-rows": (False, {"q_proj": row}, "q_proj"),
    "left-as-dtensor": (
        False,
        {"q_proj": dtensor_column},
        "q_proj",
    ),
    "gate": (False, {"gate.proj": column}, "gate"),
    "norm": (False, {"q_norm": SequenceParallel}, "q_norm"),
    "block": (True, {"attention.q_proj": column, "attention.o_proj": row}, "q_proj"),
    "block-norm": (True, {"attention_norm": SequenceParallel}, "x"),
}
WORKING: dict[str, tuple[bool, Plan]] = {
    "whole-outputs": (False, {**dict.fromkeys(ALL, whole_column), "o_proj": whole_row}),
    "mlp": (True, {"mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row}),
}


def mesh() -> DeviceMesh:
    return DeviceMesh("cpu", list(range(dist.get_world_size())), mesh_dim_names=("tp",))


def apply(name: str, table: dict[str, Any]) -> nn.Module:
    block, plan = table[name][:2]
    return parallelize_module(layer(block), mesh(), {key: make() for key, make in plan.items()})


def refused(name: str) -> list[Outcome]:
    """The first and the second forward."""
    cut = apply(name, REFUSED)
    return [
        attempt(lambda: cut(torch.ones(1, LOCAL, HIDDEN, dtype=torch.float64))) for _ in range(2)
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cuts_heads_is_refused_by_name(name: str, ranks_of: RanksOf) -> None:
    for outcomes in ranks_of(2).run(refused, name):
        for outcome in outcomes:
            assert outcome.error == "ValueError", outcome
            assert re.match(f"{REFUSED[name][2]} must .*, got ", outcome.message)
            assert "nsa_dist.adapters.megatron" in outcome.message


def refused_dtensors() -> list[Outcome]:
    """Weights that are all replicated DTensors, and input that is one."""
    spread, x = mesh(), torch.ones(1, LOCAL, HIDDEN, dtype=torch.float64)
    whole = distribute_module(layer(), spread)
    return [
        attempt(lambda: whole(x)),
        attempt(lambda: layer()(distribute_tensor(x, spread, [Replicate()]))),
    ]


def test_dtensors_beside_plain_tensors_are_refused_by_name(ranks_of: RanksOf) -> None:
    for weights, x in ranks_of(2).run(refused_dtensors):
        assert weights.error == x.error == "ValueError"
        assert "_norm must have plain weights, got DTensors" in weights.message
        assert x.message.startswith(
            "x must be a plain tensor (x.to_local() gives one), got a DTensor"
        )


def results(module: nn.Module) -> list[Tensor]:
    """Output, the input's gradient and every parameter's."""
    x = torch.randn(1, LOCAL, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    x.requires_grad_()
    out = module(x)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in module.parameters())]
    return [
        out.detach(),
        *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads if g is not None),
    ]


def differences(name: str) -> list[float]:
    """Of a plan's results from the plain layer's, relative to each one's largest value."""
    if name in WORKING:
        module = apply(name, WORKING)
        plain = layer(WORKING[name][0])
    else:
        module, plain = layer(), layer()
        if name == "fsdp-of-projections":
            for child in module.children():
                fully_shard(child, mesh=mesh())
        fully_shard(module, mesh=mesh())
    pairs = zip(results(module), results(plain), strict=True)
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs]


@pytest.mark.parametrize("name", [*WORKING, "fsdp", "fsdp-of-projections"])
def test_a_plan_of_whole_outputs_changes_nothing(name: str, ranks_of: RanksOf) -> None:
    for found in ranks_of(2).run(differences, name):
        assert max(found) < 1e-12
