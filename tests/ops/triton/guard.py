"""What Triton's interpreter hides and a GPU does not forgive, as errors.

The interpreter runs programs one after another over plain memory. With `guarded()` around it, these
raise at the access or operation that does them:

- a load or store outside the elements of the tensor argument that its pointer came from, also in
  the gaps of a view with strides;
- two programs of a launch that write one element, or a program that reads what another one writes;
  also two lanes of one store that share an element, and floats that programs add atomically;
- an int32 addition, subtraction, product or shift that overflows.

Lanes that a load masks off without `other` hold NaN, or a far-off integer, in the place of zeros.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    BlockPointerHandle,
    GridExecutor,
    InterpreterBuilder,
    TensorDescHandle,
    TensorHandle,
)

NOBODY, MANY = -1, -2  # in the place of a program's number
GARBAGE = -(1 << 20)  # an integer that was never loaded
LANGUAGE = interpreter.tl.core
HANDLES = (BlockPointerHandle, TensorDescHandle)
WRAPPING = (np.add, np.subtract, np.multiply, np.left_shift)
# What a pointer goes through between an argument and an access.
POINTER_OPERATIONS = (
    "addptr splat unsplat broadcast expand_dims reshape trans select bitcast join cat".split()
)


class GuardError(AssertionError):
    pass


def _others(programs: np.ndarray, program: int) -> bool:
    return bool(((programs != NOBODY) & (programs != program)).any())


def _offsets(tensor: torch.Tensor) -> np.ndarray:
    """Of the elements, ascending."""
    offsets = np.zeros((), dtype=np.int64)
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(length, dtype=np.int64) * stride
    return np.unique(offsets)


class Memory:
    """The elements of one argument, and which program of the launch wrote or read each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.start, self.size = tensor.data_ptr(), tensor.element_size()
        self.label = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        self.dense = tensor.is_contiguous()
        self.offsets = np.arange(tensor.numel()) if self.dense else _offsets(tensor)
        self.writer = np.full(len(self.offsets), NOBODY, dtype=np.int64)
        self.reader = self.writer.copy()
        self.lane = self.writer.copy()

    def find(self, addresses: np.ndarray, what: str) -> np.ndarray:
        """The number of the element at each address."""
        places, rest = np.divmod(addresses.astype(np.int64) - self.start, self.size)
        index = places if self.dense else np.searchsorted(self.offsets, places)
        inside = (index >= 0) & (index < len(self.offsets)) & (rest == 0)
        if not self.dense:
            inside &= self.offsets[np.minimum(index, len(self.offsets) - 1)] == places
        if not inside.all():
            raise GuardError(f"out of bounds: {what} at {places[~inside][:4]} of {self.label}")
        return index

    def read(self, index: np.ndarray, program: int) -> None:
        if _others(self.writer[index], program):
            raise GuardError(f"race: reads what another program writes in {self.label}")
        before = self.reader[index]
        self.reader[index] = np.where((before == NOBODY) | (before == program), program, MANY)

    def write(self, index: np.ndarray, program: int) -> None:
        lanes = np.arange(len(index))
        self.lane[index] = lanes
        if not np.array_equal(self.lane[index], lanes):
            raise GuardError(f"race: two lanes of a store share an element of {self.label}")
        for other, what in ((self.writer, "writes"), (self.reader, "reads")):
            if _others(other[index], program):
                raise GuardError(f"race: writes what another program {what} in {self.label}")
        self.writer[index] = program


class Guard:
    """The state of the launch that runs; its methods stand in for the interpreter's."""

    def __init__(self) -> None:
        self.memories: dict[tuple[Any, ...], Memory] = {}
        self.patched: set[tuple[int, ...]] = set()

    def memory_of(self, tensor: torch.Tensor) -> Memory:
        assert tensor.device.type == "cpu", tensor.device
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self.memories:
            self.memories[key] = Memory(tensor)
        return self.memories[key]

    def access(
        self, builder: InterpreterBuilder, pointers: TensorHandle, mask: Any, what: str
    ) -> None:
        """Checks the lanes of `mask` that access the elements at `pointers`."""
        memory = pointers.attr.get("memory")
        if memory is None:
            raise GuardError(f"out of bounds: {what} through a pointer that is no argument's")
        lanes, shape = mask.data, pointers.data.shape
        lanes = lanes if lanes.shape == shape else np.broadcast_to(lanes, shape)
        index = memory.find(pointers.data[lanes], what)
        (x, y, _), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        program = (x * ny + y) * nz + builder.grid_idx[2]
        if what == "load":
            memory.read(index, program)
        elif what == "store":
            memory.write(index, program)


def _poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if np.issubdtype(dtype, np.floating):
        return np.full(shape, np.nan, dtype=dtype)
    if np.issubdtype(dtype, np.signedinteger):
        return np.full(shape, max(GARBAGE, np.iinfo(dtype).min), dtype=dtype)
    return np.zeros(shape, dtype=dtype)


@contextmanager
def guarded() -> Iterator[None]:
    """Launches inside are checked; they run on CPU tensors, and somewhat faster than without."""
    guard = Guard()
    builder = InterpreterBuilder
    original = {name: getattr(builder, name) for name in vars(builder) if name[:2] != "__"}
    convert, patch_language = interpreter._implicit_cvt, interpreter._patch_lang
    call = GridExecutor.__call__
    languages: dict[Any, tuple[int, ...]] = {}

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        guard.memories.clear()
        guard.patched.clear()
        return call(self, *args, **kwargs)

    def implicit_cvt(argument: Any) -> Any:
        result = convert(argument)
        if hasattr(argument, "data_ptr"):
            result.handle.attr["memory"] = guard.memory_of(argument)
        return result

    def patch_lang(function: Any) -> Any:
        # Every call of a jitted function patches triton.language anew; once a launch is enough.
        found = languages.get(function)
        if found is None:
            names = function.__globals__.values()
            found = tuple(id(x) for x in names if x is interpreter.tl or x is LANGUAGE)
            languages[function] = found
        if found in guard.patched:
            return interpreter._LangPatchScope()
        guard.patched.add(found)
        return patch_language(function)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        guard.access(self, ptrs, mask, "load")
        if other is None and not mask.data.all():
            dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
            other = TensorHandle(_poison(ptrs.data.shape, dtype), ptrs.get_element_ty())
        return original["create_masked_load"](self, ptrs, mask, other, *rest, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.access(self, ptrs, mask, "store")
        return original["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        # Programs that add floats to one element do so in any order.
        of_floats = np.issubdtype(val.data.dtype, np.floating)
        guard.access(self, ptr, mask, "store" if of_floats else "atomic operation")
        return original["create_atomic_rmw"](self, operation, ptr, val, mask, *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = original["binary_op"](self, lhs, rhs, op)
        if op in WRAPPING and result.data.dtype == np.int32:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            if not np.array_equal(exact, result.data):
                raise GuardError(f"int32 overflow: {op.__name__} gives {exact.flat[0]}")
        return result

    def carrying(name: str) -> Any:
        def run(self: Any, *args: Any) -> Any:
            result = original[name](self, *args)
            for x in args:
                if isinstance(x, TensorHandle) and "memory" in x.attr:
                    result.attr["memory"] = x.attr["memory"]
                    break
            return result

        return run

    def materialize(method: Any) -> Any:
        def run(self: Any, *args: Any) -> Any:
            pointers, masks = method(self, *args)
            pointers.attr["memory"] = self.base.attr.get("memory")
            return pointers, masks

        return run

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
        # As the interpreter's, but float16 in float32 is a BLAS call.
        dtype = d.data.dtype
        product = np.matmul(a.data.astype(dtype), b.data.astype(dtype))
        return TensorHandle(product + d.data, d.dtype.scalar)

    patches: list[tuple[Any, str, Any]] = [
        (GridExecutor, "__call__", launch),
        # The arguments are in host memory as they are: nothing to copy back.
        (GridExecutor, "_restore_args_dev", lambda *_: None),
        (interpreter, "_implicit_cvt", implicit_cvt),
        (interpreter, "_patch_lang", patch_lang),
        (builder, "create_masked_load", masked_load),
        (builder, "create_masked_store", masked_store),
        (builder, "create_atomic_rmw", atomic_rmw),
        (builder, "binary_op", binary_op),
        (builder, "create_dot", dot),
        *((builder, f"create_{name}", carrying(f"create_{name}")) for name in POINTER_OPERATIONS),
        *((x, "materialize_pointers", materialize(x.materialize_pointers)) for x in HANDLES),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in patches]
    try:
        for where, name, value in patches:
            setattr(where, name, value)
        with warnings.catch_warnings():
            # What is masked may overflow or be NaN.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def far_apart(x: torch.Tensor, *strides: int) -> torch.Tensor:
    """The same values at these strides, so that offsets pass 2^31 elements.

    Only the pages that hold values exist, on a machine of any size.
    """
    span = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python names it since 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, span * x.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@contextmanager
def fixed_order_dot() -> Iterator[None]:
    """Dots whose every element is summed over k in ascending order.

    The interpreter's is a BLAS call, in which a row's bits depend on where it stands in the tile;
    the matrix units' do not. Slow: for tests that compare bits.
    """

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
        dtype = d.data.dtype
        left, right = a.data.astype(dtype), b.data.astype(dtype)
        total = d.data.copy()
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., None, k, :]
        return TensorHandle(total, d.dtype.scalar)

    original = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = original
