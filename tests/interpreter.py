"""Triton's interpreter, as every process of the tests has it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any


def quicken() -> None:
    """Where kernels are interpreted, do without what costs time there: the same bits."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        _combine_by_xor_in_numpy()
        _keep_types()
        _shorten_calls()


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
    operators, check_size = type(semantic), handle.__post_init__
    broadcast, check_types = operators.broadcast_impl_value, operators.binary_op_type_checking_impl

    def patch_attr(place: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
        # What `builtin` adds to an operation sees that it is given the semantics.
        operation = getattr(member, "__wrapped__", member)

        def run(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return operation(*args, **kwargs)

        scope.set_attr(place, name, run)

    def make_handle(self: Any, data: Any, dtype: Any, attr: dict[str, Any] | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if type(dtype) is not core.dtype or data.itemsize > max(1, dtype.itemsize):
            check_size(self)

    def alike(a: Any, b: Any) -> bool:
        return a is b or (type(a) is type(b) is core.block_type and a.shape is b.shape)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if alike(lhs.type, rhs.type) else broadcast(self, lhs, rhs)

    def check_operand_types(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        # Numbers of one dtype and shape stay as they are, but for a quotient of float16.
        if type(lhs) is type(rhs) is core.tensor and not div_or_mod:
            scalar = lhs.dtype
            if scalar is rhs.dtype and type(scalar) is core.dtype and alike(lhs.type, rhs.type):
                return lhs, rhs
        allowed = allow_lhs_ptr, allow_rhs_ptr
        return check_types(self, lhs, rhs, *allowed, arithmetic_check, div_or_mod)

    interpreter._patch_attr = patch_attr
    handle.__init__ = make_handle
    operators.broadcast_impl_value = broadcast_impl_value
    operators.binary_op_type_checking_impl = check_operand_types
