"""Time and work by operator and rank: what is timed, and that timing changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.bench import balance
from launch.bench.distributed import DistributedOptions
from launch.bench.over_ranks import local_inputs
from launch.bench.splits import SplitsOptions, rows
from launch.bench.stream import Stream
from nsa_dist import make_sharding
from nsa_dist.attention import call
from nsa_dist.comm.group import context_group
from tests.distributed.layer_case import SMALL, LayerCase, run_layer
from tests.distributed.ranks import Ranks

RanksOf = Callable[[int], Ranks]
SIZES: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 16,
    "num_selected": 4,
    "window": 20,
}


def found_on_rank(layout: str, recompute: tuple[str, ...]) -> dict[str, balance.Balance]:
    options = DistributedOptions(
        lengths=(256,), v_head_dim=16, dtype="float32", backend="pytorch", compress="mean", **SIZES
    )
    torch.manual_seed(0)
    stream, context = Stream(options, 256, "cpu"), context_group(dist.group.WORLD)
    whole = [stream.q, stream.gates, *(stream.draw_keys() for _ in range(3))]
    whole += [stream.draw(256, 2, 16) for _ in range(3)]
    sharding = make_sharding(256, layout=layout, group=context)
    local = local_inputs(whole, sharding, 8)
    return balance.of_ranks(local, stream, layout, context, recompute_branches=recompute)


@pytest.mark.parametrize("recompute", [(), ("window", "selected")], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_rank_times_every_operator(
    layout: str, recompute: tuple[str, ...], ranks_of: RanksOf
) -> None:
    first, *others = ranks_of(4).run(found_on_rank, layout, recompute)
    assert all(found == first for found in others)
    (expected,) = rows(SplitsOptions(documents=(256,), ranks=(4,), layouts=(layout,), **SIZES))
    for branch in ("selected", "window"):
        one = first[f"{branch}_attention"]
        assert min(one.forward_ms) > 0 and min(one.backward_ms) > 0
        assert balance.over_mean(one.work) == pytest.approx(getattr(expected, branch))
    assert balance.over_mean(first["all"].work) == pytest.approx(expected.work)
    assert min(first["compression"].forward_ms) > 0 == max(first["block_selection"].backward_ms)
    lines = balance.markdown(first).splitlines()
    assert len(lines) == 2 + 6 and lines[-1].startswith("| all | ")


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_timed_backend_computes_the_same_bits(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    config = replace(SMALL, select_block=16, num_selected=3, head_dim=16, v_head_dim=16)
    case = LayerCase(config, lengths=(61, 9, 40), backend=backend, dtype=torch.float32)
    expected = run_layer(case)
    clock, original = balance.Clock(torch.device("cpu")), call.get_backend
    with monkeypatch.context() as patch:
        patch.setattr(
            call, "get_backend", lambda *args: balance.TimedBackend(original(*args), clock)
        )
        found = run_layer(case)
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.grad_input, expected.grad_input)
    assert all(torch.equal(found.grads[name], grad) for name, grad in expected.grads.items())
    forward = {name for name, at in clock.spans if at == 0}
    backward = {name for name, at in clock.spans if at == 1}
    assert forward == {*balance.OPERATORS.values()}
    assert backward == forward - {"block_selection"}
