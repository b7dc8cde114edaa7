"""Checks of what users give, with the one form that their errors have.

Every message names the option, the value found and the values that work.
"""

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


def check(ok: bool, option: str, value: Any, works: str) -> None:
    """Raise ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f"{option}: found {value!r}; {works}")


def as_int(option: str, value: Any, minimum: int) -> int:
    """An integer (no bool) from ``minimum`` on, as an int whatever it was, NumPy's among others.

    What is printed, hashed and written of an option must not depend on the type it came as.
    Positions are int32, so nothing needs to be larger than that.
    """
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    works = f"an integer of at least {minimum} works"
    if is_int and value > LARGEST_INT:
        works = f"an integer of at most {LARGEST_INT} works"
    check(is_int and minimum <= value <= LARGEST_INT, option, value, works)
    return int(value)


def as_number(option: str, value: Any, works: str, *, positive: bool = True) -> float:
    """A finite real number (no bool), above 0 if ``positive``, as a float whatever it was."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    too_large = isinstance(value, Integral) and abs(int(value)) > sys.float_info.max
    ok = is_number and not too_large and math.isfinite(value) and (value > 0 or not positive)
    check(ok, option, value, works)
    return float(value)


def as_choice(option: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of ``choices``, as it stands there."""
    check(isinstance(value, str) and value in choices, option, value, f"{choices} work")
    return choices[choices.index(value)]


def check_bool(option: str, value: Any) -> None:
    """True or False, and not what only counts as such."""
    check(isinstance(value, bool), option, value, "True or False works")


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of which shape and values can be asked: not sparse, not nested."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def check_tensor(option: str, value: Any, works: str) -> None:
    """Something that has a shape and a dtype, so that other checks can say more of it."""
    if not is_plain(value):
        raise ValueError(f"{option}: found {describe(value)}; {works} works")


def describe(x: Any) -> str:
    """A tensor's dtype, shape and device; the type or the layout of anything else."""
    if x is None:
        return "None"
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    if not is_plain(x):
        return "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device.type}"
