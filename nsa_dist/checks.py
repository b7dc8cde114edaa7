"""Checks of what users give, and the one form of their errors: "option must be X, got Y"."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_INT = (1 << 31) - 1


def check(ok: bool, option: str, value: Any, must: str) -> None:
    """Raise ValueError unless ``ok``. ``must`` says what the value must be: "an even number"."""
    if not ok:
        try:
            got = repr(value)
        except ValueError:  # Python prints no integer of thousands of digits.
            got = f"{type_name(value)} that is too long to print"
        raise ValueError(f"{option} must be {must}, got {got}")


def as_int(option: str, value: Any, minimum: int) -> int:
    """Return an integer of any type (NumPy's too, but no bool) as an int.

    The type that an option came as must not show in what is printed, hashed or written.
    The maximum is that of int32, the dtype of positions.
    """
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    must = f"an integer of at least {minimum}"
    if is_int and value > LARGEST_INT:
        must = f"an integer of at most {LARGEST_INT}"
    check(is_int and minimum <= value <= LARGEST_INT, option, value, must)
    return int(value)


def as_number(option: str, value: Any, must: str, *, positive: bool = True) -> float:
    """Return a finite real number of any type (but no bool) as a float; above 0 if ``positive``."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    too_large = isinstance(value, Integral) and abs(int(value)) > sys.float_info.max
    ok = is_number and not too_large and math.isfinite(value) and (value > 0 or not positive)
    check(ok, option, value, must)
    return float(value)


def as_choice(option: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return one of ``choices`` as a plain str."""
    known = isinstance(value, str) and value in choices
    check(known, option, value, f"one of {', '.join(map(repr, choices))}")
    return choices[choices.index(value)]


def check_bool(option: str, value: Any) -> None:
    """Raise ValueError for anything but True and False."""
    check(isinstance(value, bool), option, value, "True or False")


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a dense tensor: sparse and nested ones have no strides to read."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def check_tensor(option: str, value: Any, must: str) -> None:
    """Raise ValueError for anything but a dense tensor, whose shape and dtype can be read."""
    if not is_plain(value):
        raise ValueError(f"{option} must be {must}, got {describe(value)}")


def type_name(x: Any) -> str:
    """The type of ``x`` with its article: "a list", "an Identity"."""
    name = type(x).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def describe(x: Any) -> str:
    """A tensor's dtype, shape and device; the type or the layout of anything else."""
    if x is None:
        return "None"
    if not isinstance(x, Tensor):
        return type_name(x)
    if not is_plain(x):
        return "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device.type}"
