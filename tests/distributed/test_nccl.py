"""The layer on real GPUs over NCCL against one GPU and against the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import BRANCHES, NativeSparseAttention, RotaryConfig
from nsa_dist.comm import collectives, fetch, gather, halo
from tests.distributed.layer_case import (
    HIDDEN,
    SMALL,
    LayerCase,
    LayerResult,
    assert_results_close,
    run_layer,
    run_on_rank,
    variants,
)
from tests.distributed.ranks import Ranks

PACKED = (1, 60, 3, 97, 0, 45, 11)
CASES = {
    f"{layout}-{name}": LayerCase(layout=layout, lengths=lengths)
    for layout in ("contiguous", "zigzag", "zigzag_per_document")
    for name, lengths in (("one-document", None), ("packed", PACKED))
} | {
    "shared-kv-pre-rope": variants(
        LayerCase(lengths=PACKED, rotary=RotaryConfig(dim=4)),
        independent_kv=False,
        compress_pre_rope=True,
    ),
    "selected-only": variants(LayerCase(lengths=PACKED), branches=("selected",)),
    "recomputation": LayerCase(lengths=PACKED, checkpoint=True),
    "long-window": variants(LayerCase(lengths=PACKED), window=60),
}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    size = torch.cuda.device_count()
    ranks = Ranks(size, timedelta(seconds=120), "nccl")
    yield ranks
    ranks.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_one_gpu_equals_cpu(name: str) -> None:
    case = CASES[name]
    found = run_layer(replace(case, device="cuda")).cpu()
    assert_results_close(found, run_layer(case), 1e-12)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", CASES)
def test_gpus_equal_one_rank(name: str, gpus: Ranks) -> None:
    case = CASES[name]
    found = gpus.run(run_on_rank, replace(case, device="cuda"))[0]
    assert_results_close(found, run_layer(replace(case, checkpoint=False)), 1e-12)


def repeated(case: LayerCase) -> bool:
    first, second = (run_layer(case, dist.group.WORLD) for _ in range(2))
    return all(torch.equal(first.grads[name], second.grads[name]) for name in first.grads) and (
        torch.equal(first.output, second.output)
        and torch.equal(first.grad_input, second.grad_input)
    )


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_repeat_bitwise(dtype: torch.dtype, gpus: Ranks) -> None:
    assert all(gpus.run(repeated, LayerCase(lengths=PACKED, dtype=dtype, device="cuda")))


# --- the schedule, on streams of its own ----------------------------------------------------------

MANY = replace(
    variants(LayerCase(lengths=PACKED), num_heads=8, num_kv_heads=4),
    dtype=torch.float32,
    device="cuda",
)
MEMORY: list[dict[str, Any]] = [
    {"fetch_again": True},
    {"fetch_again": False, "recompute_branches": BRANCHES},
    {"fetch_again": True, "recompute_branches": BRANCHES},
]


def bits(result: LayerResult) -> list[Tensor]:
    return [result.output, result.grad_input, *result.grads.values()]


def with_less_memory(case: LayerCase) -> list[bool]:
    expected = bits(run_layer(case, dist.group.WORLD, fetch_again=False))
    found = [bits(run_layer(case, dist.group.WORLD, **options)) for options in MEMORY]
    return [all(map(torch.equal, one, expected)) for one in found]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputation"])
def test_options_for_memory_change_no_bit(checkpoint: bool, gpus: Ranks) -> None:
    for found in gpus.run(with_less_memory, replace(MANY, checkpoint=checkpoint)):
        assert found == [True] * len(MEMORY)


CYCLES = 20_000_000
"""About ten milliseconds, longer than anything that a small case computes."""


def delayed_bits(case: LayerCase) -> list[bool]:
    """Whether bits stay where one rank's device is late at its messages, in all of its streams."""
    layers = [{"fetch_again": again} for again in (False, True)]
    expected = [bits(run_layer(case, dist.group.WORLD, **options)) for options in layers]
    modules = (halo, gather, fetch)
    original = collectives.begin_all_to_all

    def late(*args: Any, **options: Any) -> Any:
        turn = len(counted) % dist.get_world_size()
        counted.append(args[-1])
        if turn == dist.get_rank():
            torch.cuda._sleep(CYCLES)
        work = original(*args, **options)
        # What was sent and received must stay as it is while the memory of both is given away.
        torch.cuda._sleep(CYCLES // 10)
        for _ in range(3):
            torch.full((args[0].numel() + 64,), float("nan"), device="cuda")
        return work

    found = []
    for module in modules:
        module.begin_all_to_all = late
    try:
        for options, wanted in zip(layers, expected, strict=True):
            counted: list[str] = []
            got = bits(run_layer(case, dist.group.WORLD, **options))
            found.append(all(map(torch.equal, got, wanted)) and "fetch_grad" in counted)
    finally:
        for module in modules:
            module.begin_all_to_all = original
    return found


@pytest.mark.multi_gpu
def test_late_devices_change_no_bit(gpus: Ranks) -> None:
    for found in gpus.run(delayed_bits, MANY):
        assert found == [True, True]


def late_rank(case: LayerCase) -> bool:
    """A rank's host is two seconds late in the middle of a forward and of a backward."""
    expected = bits(run_layer(case, dist.group.WORLD))
    original = fetch.begin_all_to_all

    def late(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == 0 and args[-1] in ("request", "fetch_grad"):
            time.sleep(0.5)
        return original(*args, **options)

    fetch.begin_all_to_all = late
    try:
        return all(map(torch.equal, bits(run_layer(case, dist.group.WORLD)), expected))
    finally:
        fetch.begin_all_to_all = original


@pytest.mark.multi_gpu
def test_a_late_host_changes_no_bit(gpus: Ranks) -> None:
    assert all(gpus.run(late_rank, MANY))


def two_groups(case: LayerCase) -> bool:
    """Layers of two groups of the same ranks in flight at once."""
    groups = [dist.group.WORLD, dist.new_group()]
    expected = bits(run_layer(case, groups[0]))
    x, grad = case.inputs()
    sharding = case.sharding(groups[0])
    runs = []
    for group in groups:
        layer = case.layer(group)
        local = sharding.shard(x).requires_grad_()
        runs.append((layer, local, layer(local, cu_seqlens=sharding.cu_seqlens)))
    same = []
    for _, local, out in runs:
        out.backward(sharding.shard(grad))
        assert local.grad is not None
        same += [torch.equal(sharding.unshard(out), expected[0])]
        same += [torch.equal(sharding.unshard(local.grad), expected[1])]
    return all(same)


@pytest.mark.multi_gpu
def test_two_groups_at_once(gpus: Ranks) -> None:
    assert all(gpus.run(two_groups, MANY))


@pytest.mark.multi_gpu
def test_one_hardware_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron runs: no message waits in the queue for what stands behind it."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ranks = Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl")
    try:
        assert all(all(found) for found in ranks.run(with_less_memory, MANY))
    finally:
        ranks.close()


def error_on_one_rank(case: LayerCase) -> str:
    # Windows that no rank has a plan for, else that rank would ask nobody.
    bad = variants(case, window=21 + dist.get_rank())
    try:
        run_layer(bad, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


CUT, OTHER_CUT = (0, 8, 24), (0, 16, 24)
TOKENS = 32
ENOUGH_SECONDS = 30.0


def parted_call(name: str) -> tuple[str, float, bool]:
    """A call in which the last rank parts: its error, its seconds, whether the group goes on."""
    group, last = dist.group.WORLD, dist.get_rank() == dist.get_world_size() - 1
    total = TOKENS * dist.get_world_size()
    torch.manual_seed(0)
    options = {"layout": "contiguous", "group": group, "device": "cuda", "backend": "pytorch"}
    layers = {w: NativeSparseAttention(HIDDEN, replace(SMALL, window=w), **options) for w in (5, 9)}
    x = torch.ones(1, TOKENS, HIDDEN, device="cuda")

    def call(cut: tuple[int, ...], window: int = 9, width: int = HIDDEN) -> Tensor:
        bounds = torch.tensor([*cut, total], dtype=torch.int32)
        out = layers[window](x[..., :width], cu_seqlens=bounds)
        assert isinstance(out, Tensor)
        return out

    # All ranks have all plans.
    first, second = call(CUT), call(OTHER_CUT)
    call(CUT, 5)
    start = time.monotonic()
    try:
        if name == "documents":
            call(CUT if last else OTHER_CUT)
        elif name == "halo":  # The messages have other sizes.
            call(CUT, 5 if last else 9)
        elif name == "input":
            call(CUT, width=HIDDEN - last)
        else:
            (first if last else second).sum().backward()
        message = "no error"
    except ValueError as error:
        message = str(error)
    seconds = time.monotonic() - start
    return message, seconds, bool(call(CUT).isfinite().all())


PARTED = {
    "documents": ("cu_seqlens must be equal on all ranks, got rank 0: [0, 16, 24, ", "[0, 8, 24, "),
    "halo": ("window must be equal on all ranks, got rank 0: 9", "5"),
    "input": ("ranks [0", f"x must have shape [batch, local tokens, hidden_size={HIDDEN}], got "),
    "backward": ("cu_seqlens must be equal on all ranks, got rank 0: [0, 16, 24, ", "[0, 8, 24, "),
}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", PARTED)
def test_a_rank_that_parts_is_told_on_every_rank(name: str, gpus: Ranks) -> None:
    others, found = PARTED[name]
    messages = set()
    for message, seconds, goes_on in gpus.run(parted_call, name):
        assert seconds < ENOUGH_SECONDS
        assert goes_on
        messages.add(message)
    (message,) = messages
    assert others in message
    assert f"rank {gpus.size - 1}: {found}" in message


def wait_for_the_last_rank() -> str:
    """The error of a call that the last rank does not make."""
    group = dist.new_group(timeout=timedelta(seconds=10))
    layer = NativeSparseAttention(HIDDEN, SMALL, group=group, device="cuda", backend="pytorch")
    x = torch.ones(1, TOKENS, HIDDEN, device="cuda")
    layer(x)
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(12)
        return "none"
    try:
        layer(x)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.multi_gpu
def test_a_wait_for_a_rank_is_named_before_the_watchdog_ends_it() -> None:
    # Processes of its own: what waits in a stream is there until they end.
    ranks = Ranks(torch.cuda.device_count(), timedelta(seconds=120), "nccl")
    try:
        for pipe in ranks._pipes:
            pipe.send((wait_for_the_last_rank, ()))
        assert ranks._pipes[0].poll(60), "a hang"
        ok, message = ranks._pipes[0].recv()
        assert ok and message.startswith("plan: failed after 9."), message
        assert "on rank 0 of the group of global ranks [0, " in message
    finally:
        ranks.close()


@pytest.mark.multi_gpu
def test_disagreement_is_an_error_on_every_rank(gpus: Ranks) -> None:
    case = LayerCase(lengths=PACKED, device="cuda")
    for message in gpus.run(error_on_one_rank, case):
        assert "window" in message
        assert "rank 1" in message
    result: LayerResult = gpus.run(run_on_rank, case)[0]
    assert_results_close(result, run_layer(replace(case, device="cpu")), 1e-12)
