"""Launches past Triton's Python layer: what they are known by, and that they do the same."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nsa_kernels.triton import attend_few, combine
from nsa_kernels.triton.shared import launch
from nsa_kernels.triton.shared.custom_ops import Operator
from nsa_kernels.triton.shared.launch import on_its_device
from tests.ops.backends import INTERPRETED


class Rows(NamedTuple):
    p: Any
    stride: Any


def _add_kernel(x, rows, y, num, step, SIZE: tl.constexpr, TIMES: tl.constexpr):
    o = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b = tl.load(x + o * step, mask=o < num, other=0.0)
    if y is not None:
        b += tl.load(y + o, mask=o < num, other=0.0)
    tl.store(rows.p + o * rows.stride, b * TIMES, mask=o < num)


def new_kernel() -> JITFunction:
    """As `triton.jit` makes it where there is no interpreter."""
    return JITFunction(_add_kernel, do_not_specialize=["num"])


NUMBERS = (1, 2, 15, 16, 48, 1 << 31, (1 << 31) + 16, (1 << 31) - 1)


def test_launches_of_one_name_are_one_to_triton() -> None:
    """Whatever Triton tells apart has another name."""
    kernel = new_kernel()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    memory = torch.zeros(64, dtype=torch.float32)
    tensors = [memory, memory[1:], memory[4:], memory.half(), memory.half()[1:]]
    assert [x.data_ptr() % 16 for x in tensors] == [0, 4, 0, 0, 2]
    found: dict[Any, Any] = {}
    several = [
        (x, Rows(out, stride), num, step, size)
        for x, out, stride, num, step, size in product(
            tensors[:4], tensors[1:3], NUMBERS[:4], NUMBERS[:1] + NUMBERS[5:], NUMBERS, (32, 64)
        )
    ]
    for x, rows, num, step, size in several:
        for y in (None, memory):
            args = (x, rows, y, num, step, size)
            reader = launch._reader(kernel, args)
            assert reader is not None
            name = (type(y), reader(None, 0, *args))
            _, specialised, _ = binder(*args, TIMES=2)
            assert found.setdefault(name, str(specialised)) == str(specialised)
    assert len(set(found.values())) > 50


def test_values_are_those_of_the_arguments() -> None:
    kernel = new_kernel()
    x, y = torch.zeros(8), torch.zeros(8)
    args = (x, Rows(y, 3), None, 8, 1, 32)
    reader = launch._reader(kernel, args)
    assert reader is not None
    known = launch.Known(lambda *_: None, 0, None, (), ())
    by_name = {reader(None, 0, *args): known}
    values = (x.data_ptr(), (y.data_ptr(), 3), None, 8, 1, None)
    assert reader(by_name, 0, *args) == (known, values)
    assert reader(by_name, 1, *args) == (None, None)
    other = (x, Rows(x, 5), None, 9, 1, 32)
    assert reader(by_name, 0, *other)[1] == (x.data_ptr(), (x.data_ptr(), 5), None, 9, 1, None)


def test_a_known_launch_gets_grid_stream_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = new_kernel(), []
    x, y = torch.zeros(8), torch.zeros(8)
    args = (x, Rows(y, 3), None, 8, 1, 32)
    launcher = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
    made = SimpleNamespace(run=Run(calls, launcher), function=7, packed_metadata="packed")
    monkeypatch.setattr(launch, "_read", {})
    monkeypatch.setattr(launch, "_current_device", lambda: 0)
    monkeypatch.setattr(launch, "_current_stream", lambda device: 5)
    monkeypatch.setattr(launch, "CompiledKernel", SimpleNamespace)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **named: made)
    for _ in range(2):
        launch.launcher(kernel, (2, 3))(*args, TIMES=2, num_warps=4)
    values = (x.data_ptr(), (y.data_ptr(), 3), None, 8, 1, None)
    assert calls == [(2, 3, 1, 5, 7, "packed", None, None, None, *values, None)]
    monkeypatch.setattr(launch.knobs.runtime.launch_enter_hook, "calls", [print])
    launch.launcher(kernel, (2, 3))(*args, TIMES=2, num_warps=4)
    assert len(calls) == 1  # A profiler's hook hears of Triton's own launches.


def test_a_kernel_that_is_known_stays() -> None:
    """It is known by its identity, which another one would get if it went."""
    kernel = new_kernel()
    gone = weakref.ref(kernel)
    x, y = torch.zeros(8), torch.zeros(8)
    run = Run([], SimpleNamespace(global_scratch_size=0, profile_scratch_size=0))
    made: Any = SimpleNamespace(run=run, function=7, packed_metadata="packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_read", {})
        patch.setattr(launch, "_current_device", lambda: 0)
        args = (x, Rows(y, 3), None, 8, 1, 32)
        launch._keep(made, kernel, (id(kernel),), args, {"TIMES": 2})
        del kernel
        new_kernel()  # Triton itself keeps the latest of a name.
        gc.collect()
        assert gone() is not None and len(launch._read) == 1


def test_a_tensor_given_twice_is_encoded_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda x, how: how, raising=False)
    known = launch.Known(lambda *_: None, 7, None, ("rows", "columns"), ())
    x = SimpleNamespace(encoded={})
    for _ in range(2):
        assert [launch._encoded(x, known, number) for number in (0, 1)] == ["rows", "columns"]


class Second:
    """Stands for a tensor, or several, on the second of two GPUs."""

    device = torch.device("cuda", 1)


@pytest.mark.parametrize("first", [Second(), [Second()]], ids=["tensor", "list"])
def test_operators_run_on_the_device_of_their_tensors(
    first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device and its stream, whatever memory it is given."""
    current = [0]

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "_current_device", lambda: current[0])
    run = on_its_device(lambda x, y: (current[0], y))
    assert run(first, 5) == (1, 5) and current == [0]
    current[0] = 1
    assert run(first, 5) == (1, 5)


def test_every_operator_and_decoding_run_on_their_device() -> None:
    wrapped = on_its_device(lambda x: x).__code__
    module = importlib.import_module("nsa_kernels.triton.combine")
    operators = [x for x in vars(module).values() if isinstance(x, Operator)]
    assert len(operators) == 3
    assert all(x._function.__code__ is wrapped for x in operators)
    assert attend_few.__wrapped__.__code__ is wrapped


@pytest.mark.multi_gpu
def test_another_gpu_than_the_current_gives_the_same_bits() -> None:
    """Its stream is busy when the kernels are launched: they must wait for it."""
    torch.cuda.set_device(0)
    x = torch.randn(4096, 4, 64)
    found = []
    for device in ("cuda:0", "cuda:1"):
        outputs = [torch.full_like(x, 7.0, device=device) for _ in range(2)]
        busy = torch.randn(4096, 4096, device=device)
        torch.cuda.synchronize(device)
        for _ in range(50):
            busy = busy @ busy
        for y in outputs:
            y.copy_(x.to(device), non_blocking=True)
        gates = torch.full((4096, 4, 2), 0.5, device=device)
        found.append(combine(outputs, gates).cpu())
    assert torch.equal(found[0], x) and torch.equal(found[1], x)


class Run:
    """Stands for the launcher of a compiled kernel."""

    def __init__(self, calls: list[Any], sizes: Any) -> None:
        self.calls = calls
        self.global_scratch_size = sizes.global_scratch_size
        self.profile_scratch_size = sizes.profile_scratch_size

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


def test_descriptors_are_made_once_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_descriptors", {})
    monkeypatch.setattr(Tensor, "is_cuda", True)
    x = torch.zeros(64, 32)
    made = [launch.descriptor(x, (64, 32), (32, 1), (16, 32)) for _ in range(2)]
    others = [
        launch.descriptor(x[4:], (60, 32), (32, 1), (16, 32)),
        launch.descriptor(x, (32, 32), (64, 1), (16, 32)),
        launch.descriptor(x, (64, 32), (32, 1), (32, 32)),
    ]
    assert made[0].encoded is made[1].encoded and made[0] == made[1]
    assert all(a.encoded is not b.encoded for a, b in combinations([made[0], *others], 2))
    monkeypatch.setattr(launch, "MOST_DESCRIPTORS", 4)
    launch.descriptor(x[8:], (56, 32), (32, 1), (16, 32))
    assert len(launch._descriptors) == 1


def test_a_descriptor_keeps_its_memory_and_the_table_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that was made for TMA lives until the kernel is launched, and no longer."""
    monkeypatch.setattr(launch, "_descriptors", {})
    monkeypatch.setattr(Tensor, "is_cuda", True)
    x = torch.zeros(64, 32)
    memory = weakref.ref(x)
    for _ in range(2):  # Made, and found again.
        made = launch.descriptor(x, (64, 32), (32, 1), (16, 32))
        assert made.base is x
    del x
    assert memory() is not None
    del made
    assert memory() is None and len(launch._descriptors) == 1


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_bits_are_those_of_triton() -> None:
    kernel = triton.jit(_add_kernel)
    memory = torch.randn(4096, device="cuda")
    for _ in range(3):
        for first, num, step, stride in product((0, 1, 4), (1, 100, 128), (1, 2, 16), (1, 3, 16)):
            for y in (None, memory[first:]):
                outs = [torch.zeros(4096, device="cuda") for _ in range(2)]
                args = [(memory[first:], Rows(out, stride), y, num, step, 64) for out in outs]
                kernel[(2,)](*args[0], TIMES=3)
                launch.launcher(kernel, (2,))(*args[1], TIMES=3)
                assert torch.equal(*outs)
