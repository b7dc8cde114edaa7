"""Triton's interpreter, as every process of the tests has it."""

from __future__ import annotations

import dataclasses
import inspect
import os
from importlib.util import find_spec
from typing import Any


def quicken() -> None:
    """Where kernels are interpreted, do without what costs time there: the same bits."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        _leave_overflow_alone()
        _combine_by_xor_in_numpy()
        _keep_types()
        _shorten_calls()
        _match_operands_once()


def _leave_overflow_alone() -> None:
    """Triton computes integers anew in 64 bits, compares both, and says nothing unless it debugs.

    The guard of `ops/triton/guard.py` says what overflows, at less cost.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _combine_by_xor_in_numpy() -> None:
    """`tl.sort` does so a few dozen times, and the interpreter an element at a time, in Python."""
    import numpy as np
    from triton.language import standard
    from triton.runtime.interpreter import ReduceOps

    apply = ReduceOps.apply_impl

    def apply_impl(self: ReduceOps, values: Any) -> Any:
        if self.combine_fn != standard._xor_combine:
            return apply(self, values)
        (x,) = values
        found = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, x.dtype)

    ReduceOps.apply_impl = apply_impl


def _keep_types() -> None:
    """What follows from a shape or a dtype is worked out once, not for every result.

    Every operation makes a tensor and its type, and their shape is a dozen objects. Nothing changes
    a shape, so that tensors can share it.
    """
    from triton.language import core
    from triton.runtime import interpreter

    constexpr, block_type, dtype = core.constexpr, core.block_type, core.dtype
    make_type, make_tensor = block_type.__init__, core.tensor.__init__
    unwrap, same, np_dtype = core._unwrap_if_constexpr, dtype.__eq__, interpreter._get_np_dtype
    plain = {bool, int, float, str, type(None), core.tensor, dtype, block_type}
    # What a type of these sizes has; what a tensor of such a shape has, and the shape itself.
    blocks: dict[tuple[Any, ...], tuple[Any, int, str]] = {}
    tensors: dict[int, tuple[Any, Any, Any]] = {}
    np_dtypes: dict[str, Any] = {}

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [x.value if type(x) is constexpr else x for x in shape]
        key = (*sizes, *map(type, sizes))  # 4.0 equals 4 and is no size.
        if key not in blocks:
            make_type(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, f"<{self.shape}, "
            return
        self.element_ty = element_ty
        self.shape, self.numel, name = blocks[key]
        self.name = f"{name}{element_ty}>"

    def make_any_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in tensors:
            make_tensor(self, handle, type)
            tensors[id(shape)] = self.numel, self.shape, shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape, _ = tensors[id(shape)]

    def is_same(self: Any, other: Any) -> bool:
        return self is other or same(self, other)

    def get_np_dtype(tt_dtype: Any) -> Any:
        name = (tt_dtype.element_ty if type(tt_dtype) is block_type else tt_dtype).name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(tt_dtype)
        return np_dtypes[name]

    core._unwrap_if_constexpr = unwrap_if_constexpr
    block_type.__init__ = make_block_type
    core.tensor.__init__ = make_any_tensor
    dtype.__eq__ = is_same
    interpreter._get_np_dtype = get_np_dtype


def _shorten_calls() -> None:
    """What is done for every operation, with fewer calls."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic, handle = interpreter.interpreter_semantic, interpreter.TensorHandle
    check_size = handle.__post_init__

    # Operations of a module or class, each given the semantics, which is found once: every launch
    # puts them in and takes them out again.
    operations: dict[Any, dict[str, Any]] = {}

    def with_semantic(member: Any) -> Any:
        # What `builtin` adds to an operation sees that it is given the semantics.
        operation = getattr(member, "__wrapped__", member)

        def run(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return operation(*args, **kwargs)

        return run

    def patch_builtin(place: Any, _builder: Any, scope: Any) -> None:
        if place not in operations:
            members = inspect.getmembers(place, core.is_builtin)
            operations[place] = {name: with_semantic(member) for name, member in members}
        for name, run in operations[place].items():
            scope.set_attr(place, name, run)

    def make_handle(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not core.dtype or data.itemsize > max(1, dtype.itemsize):
            check_size(self)

    interpreter._patch_builtin = patch_builtin
    handle.__init__ = make_handle


def _match_operands_once() -> None:
    """How two operands get one dtype and shape is worked out once for operands of their kinds."""
    from triton.language import core
    from triton.runtime import interpreter

    operators, make_handle = type(interpreter.interpreter_semantic), interpreter.TensorHandle
    check_types, broadcast = operators.binary_op_type_checking_impl, operators.broadcast_impl_value
    cast, with_element = operators.cast, core.block_type.with_element_ty
    tensor, block_type, plain = core.tensor, core.block_type, core.dtype
    # From one of these to another the interpreter has NumPy do it.
    by_numpy = {"int32", "int64", "fp32", "fp64"}
    # Shapes that stay alive, by whose identity the others find them.
    kept: list[Any] = []
    types: dict[tuple[int, str], Any] = {}
    dtypes: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    constants: dict[tuple[Any, ...], Any] = {}
    shapes: dict[tuple[int, int], list[int]] = {}

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        if type(scalar_ty) is not plain:
            return with_element(self, scalar_ty)
        key = id(self.shape), scalar_ty.name
        if key not in types:
            types[key] = with_element(self, scalar_ty)
            kept.append(self.shape)
        return types[key]

    def cast_plain(self: Any, x: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        source, to = x.dtype, dst_ty.scalar
        if source is to:
            return x
        if (
            fp_downcast_rounding is None
            and type(source) is type(to) is plain
            and to.name in by_numpy
            and (source.name in by_numpy or source.name == "int1")
        ):
            data = x.handle.data.astype(interpreter._get_np_dtype(to))
            return tensor(make_handle(data, to), x.type.with_element_ty(to))
        return cast(self, x, dst_ty, fp_downcast_rounding)

    def widened(self: Any, x: Any, shape: list[int]) -> Any:
        kind = block_type(x.dtype, shape)
        if kind.shape is x.type.shape:
            return x
        return tensor(self.builder.create_broadcast(x.handle, shape), kind)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type, rhs.type
        if type(left) is not block_type:
            if type(right) is not block_type:
                return lhs, rhs
            whole = right.with_element_ty(left)
            return tensor(self.builder.create_splat(whole, lhs.handle), whole), rhs
        if type(right) is not block_type:
            whole = left.with_element_ty(right)
            return lhs, tensor(self.builder.create_splat(whole, rhs.handle), whole)
        if left.shape is right.shape:
            return lhs, rhs
        key = id(left.shape), id(right.shape)
        if key not in shapes:
            found = broadcast(self, lhs, rhs)
            if len(left.shape) == len(right.shape):
                shapes[key] = list(found[0].type.shape)
                kept.extend((left.shape, right.shape))
            return found
        return widened(self, lhs, shapes[key]), widened(self, rhs, shapes[key])

    def check_operand_types(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        how = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        if type(lhs) is type(rhs) is tensor:
            left, right = lhs.dtype, rhs.dtype
            if type(left) is not plain and type(right) is not plain:
                return check_types(self, lhs, rhs, *how)
            kinds = left.name, right.name, how
            if kinds not in dtypes:
                found = check_types(self, lhs, rhs, *how)
                dtypes[kinds] = found[0].dtype, found[1].dtype
                return found
            to_left, to_right = dtypes[kinds]
            if type(left) is plain:
                lhs = self.cast(lhs, to_left)
            if type(right) is plain:
                rhs = self.cast(rhs, to_right)
            return self.broadcast_impl_value(lhs, rhs)
        # A number is the same tensor beside all others of a dtype and shape.
        is_left = type(rhs) is tensor
        x, number = (rhs, lhs) if is_left else (lhs, rhs)
        if type(x) is not tensor or type(number) not in (int, float) or x.dtype.name[0] == "u":
            return check_types(self, lhs, rhs, *how)
        shape = x.type.shape if type(x.type) is block_type else None
        # That 0.0 equals -0.0 changes nothing: Triton makes the same of both.
        key = number, type(number), is_left, x.dtype.name, id(shape), how
        if key not in constants:
            found = check_types(self, lhs, rhs, *how)
            number, other = found if is_left else found[::-1]
            if other is x:  # Else x had a narrower dtype.
                number.handle.data.flags.writeable = False
                constants[key] = number
                kept.append(shape)
            return found
        return (constants[key], rhs) if is_left else (lhs, constants[key])

    core.block_type.with_element_ty = with_element_ty
    operators.cast = cast_plain
    operators.broadcast_impl_value = broadcast_impl_value
    operators.binary_op_type_checking_impl = check_operand_types
