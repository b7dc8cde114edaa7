"""What attention asks of the host: launches, no wait, and nothing at all in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import ConstexprFunction

from nsa_dist import BlockCompressor, NSAConfig, native_sparse_attention
from nsa_kernels.triton import combine
from nsa_kernels.triton.selected.blocks import own_and_fetched, with_rows
from nsa_kernels.triton.shared import launch, shapes
from nsa_kernels.triton.shared.hopper import host_part_width, part_width
from tests.ops.backends import DEVICE, INTERPRETED
from tests.ops.op_cases import same_bits

CONFIG = NSAConfig(64, 4, 128, compress="mean")
SIZES = (512, 1024, 4096, 16384, 65536)
"""Bytes of tensors that take the place of freed tables."""
MOST_LAUNCHES = {"forward": 15, "backward": 30}


class Problem:
    """One layer's attention over a document, forward and backward.

    values: whether tensors have any; without, they are memory that nobody wrote.
    """

    def __init__(self, length: int, device: str = "cuda", values: bool = True) -> None:
        torch.manual_seed(0)
        draw: Callable[..., Tensor] = torch.randn if values else torch.empty
        draw_gates: Callable[..., Tensor] = torch.rand if values else torch.empty
        self.compressors = [BlockCompressor(CONFIG, 128).to(device) for _ in range(2)]
        shapes = [(64, 128), *[(4, 128)] * 6]
        q, *kv = (draw(1, length, *x, device=device, dtype=torch.bfloat16) for x in shapes)
        gates = draw_gates(1, length, 64, 3, device=device)
        self.leaves = [x.requires_grad_() for x in (q, gates, *kv)]
        self.do = torch.randn_like(q) if values else torch.empty_like(q)

    def forward(self) -> Tensor:
        q, gates, *kv = self.leaves
        k = dict(zip(CONFIG.key_branches, kv[:3], strict=True))
        v = dict(zip(CONFIG.branches, kv[3:], strict=True))
        out = native_sparse_attention(
            q, k, v, gates, *self.compressors, config=CONFIG, backend="triton"
        )
        assert isinstance(out, Tensor)
        return out

    def backward(self, out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, self.leaves, self.do))

    def both(self) -> list[Tensor]:
        out = self.forward()
        return [out, *self.backward(out)]


def launches(run: Callable[[], object]) -> list[str]:
    """What the GPU was given to do, kernels, copies and fills."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in found.events() if event.device_type == cuda]


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 32768])
def test_launches(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    problem = Problem(length)
    problem.both()
    out: list[Tensor] = []
    forward = launches(lambda: out.append(problem.forward()))
    backward = launches(lambda: problem.backward(out[0]))
    if length == 4096:  # Longer ones are scored in chunks.
        assert len(forward) <= MOST_LAUNCHES["forward"], forward
    assert len(backward) <= MOST_LAUNCHES["backward"], backward


# What torch gives a GPU to do, and what does so for several tensors in one launch.
OF_TORCH = {"aten::fill_", "aten::copy_", "aten::cat", "aten::add", "aten::mul", "aten::sum"}
FOR_SEVERAL = "aten::_foreach_zero_"


def launches_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a Hopper GPU would get from now on; none runs."""
    found: list[str] = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(
        launch, "_launch", lambda kernel, *_, **__: found.append(kernel.fn.__name__)
    )
    monkeypatch.setattr(shapes, "gpu_of", lambda _: shapes.HOPPER)
    monkeypatch.setattr(shapes, "capability", lambda _: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return found


not_run = pytest.mark.skipif(not INTERPRETED, reason="launches of a GPU are counted there")


@not_run
@pytest.mark.parametrize("length", [4096, 16384, 32768])
def test_launches_of_backward_on_hopper(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not run, over memory that nobody wrote."""
    found = launches_on_hopper(monkeypatch)
    problem = Problem(length, "cpu", values=False)
    out = problem.forward()
    problem.backward(out)  # Tables are made once.
    out = problem.forward()
    found.clear()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        problem.backward(out)
    assert {"_hopper_dkv_kernel", "_hopper_block_dkv_kernel"} <= set(found)
    for event in seen.events():
        around = event.cpu_parent
        while around is not None and around.name != FOR_SEVERAL:
            around = around.cpu_parent
        if event.name == FOR_SEVERAL or (event.name in OF_TORCH and around is None):
            found.append(event.name)
    assert len(found) <= MOST_LAUNCHES["backward"], found


@not_run
@pytest.mark.parametrize("hopper", [True, False])
def test_the_host_runs_no_function_of_kernels(
    hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton made callable in kernels takes the host microseconds a call."""
    found = launches_on_hopper(monkeypatch)
    if not hopper:
        monkeypatch.setattr(shapes, "gpu_of", lambda _: shapes.AMPERE)
    problem = Problem(512, "cpu", values=False)
    problem.both()  # Layouts and tables are made once.
    found.clear()
    called: list[str] = []
    run = ConstexprFunction.__call__

    def noted(self: ConstexprFunction, *args: Any, **named: Any) -> Any:
        called.append(self.fn.__name__)
        return run(self, *args, **named)

    monkeypatch.setattr(ConstexprFunction, "__call__", noted)
    problem.both()
    assert len(found) > 20 and not called


def test_whole_numbers_are_tritons() -> None:
    numbers = [*range(1, 1030), *(1 << i for i in range(10, 41)), (1 << 40) + 1]
    assert [shapes.power_of_two(x) for x in numbers] == [triton.next_power_of_2(x) for x in numbers]
    assert {x: shapes.cdiv(x, 48) for x in [0, *numbers]} == {
        x: triton.cdiv(x, 48) for x in [0, *numbers]
    }
    widths = (16, 64, 128, 192, 256)
    assert [host_part_width(x) for x in widths] == [part_width(x) for x in widths]


@pytest.mark.parametrize("rows", [(3, 0), (0, 2), (3, 2)])
def test_sources_without_rows_are_the_others(rows: tuple[int, int]) -> None:
    """A descriptor has rows, also where nothing is own or nothing was fetched."""
    names = ["k_own", "v_own", "k_fetched", "v_fetched"]
    tensors = [torch.empty(rows[i // 2], 1, 16) for i in range(4)]
    kept = [names[i] for x in with_rows(tensors) for i in range(4) if x is tensors[i]]
    expected = [name if rows[i // 2] else names[i - 2] for i, name in enumerate(names)]
    assert own_and_fetched(kept) == expected


@pytest.mark.gpu
def test_the_host_waits_for_nothing() -> None:
    problem = Problem(1000)
    problem.both()
    with no_waits():
        problem.both()


@pytest.mark.gpu
def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the inputs, forward and backward: the formula of docs/performance.md, within 10%."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    length = 16384
    problem = Problem(length)
    problem.both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    _, _, k, *_ = problem.leaves
    formula = 5 * problem.do.nbytes + 4 * k.nbytes + (200 << 20) + length * 64 * 32
    assert abs(formula / peak - 1) < 0.1


def captured_by(problem: Problem) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of forward and backward, and what it writes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            problem.both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = problem.both()
    return graph, captured


@pytest.mark.gpu
def test_a_graph_gives_the_bits_of_eager_calls() -> None:
    """Forward and backward captured once, and replayed on other values."""
    problem = Problem(1500)
    graph, captured = captured_by(problem)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in problem.leaves:
                x.copy_(torch.rand_like(x) if x.dtype == torch.float32 else torch.randn_like(x))
        graph.replay()
        found = [x.clone() for x in captured]
        expected = problem.both()
        assert [same_bits(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 9


@pytest.mark.gpu
def test_a_graph_keeps_what_it_reads() -> None:
    """The tables of its documents stay when the caches have forgotten them."""
    problem = Problem(1500)
    graph, captured = captured_by(problem)
    expected = [x.clone() for x in problem.both()]
    for length in range(200, 200 + 16 * 20, 16):
        Problem(length).both()
    gc.collect()
    torch.cuda.synchronize()
    filled = [torch.full((size,), 127, dtype=torch.int8, device="cuda") for size in SIZES * 200]
    graph.replay()
    found = [same_bits(x, y) for x, y in zip(captured, expected, strict=True)]
    assert found == [True] * 9 and len(filled) == 200 * len(SIZES)


@pytest.mark.gpu
def test_a_graph_of_new_documents_is_refused() -> None:
    problem = Problem(1511)
    refused = pytest.raises(ValueError, match="must have run with these documents")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        problem.forward()


class Seen(TorchDispatchMode):
    """Notes which of our operators torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "nsa_kernels":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_every_operator() -> None:
    """Modes get torch's operators, of the same bits as what eager calls run without them."""
    outputs = [torch.randn(5, 2, 16, device=DEVICE).requires_grad_() for _ in range(2)]
    gates = torch.rand(5, 2, 2, device=DEVICE).requires_grad_()
    leaves = [*outputs, gates]

    def run() -> list[Tensor]:
        out = combine(outputs, gates)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    straight = run()
    assert "GeneratedBackward" not in str(combine(outputs, gates).grad_fn)
    with Seen() as seen:
        watched = run()
    assert seen.names == ["nsa_kernels::combine", "nsa_kernels::combine_backward"]
    assert [same_bits(x, y) for x, y in zip(straight, watched, strict=True)] == [True] * 4
    fewer = combine([outputs[0], outputs[1].detach()], gates.detach())
    assert torch.equal(
        torch.autograd.grad(fewer.sum(), outputs[0])[0], gates[..., :1].expand(5, 2, 16)
    )
    assert not combine([x.detach() for x in outputs], gates.detach()).requires_grad
