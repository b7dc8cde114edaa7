"""Checks of what users give, with the one form that their errors have.

Every message names the option, the value found and the values that work.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_INT = (1 << 31) - 1


def check(ok: bool, option: str, value: Any, works: str) -> None:
    """Raise ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f"{option}: found {value!r}; {works}")


def check_int(option: str, value: Any, minimum: int) -> None:
    """An int (no bool) from ``minimum`` on; positions are int32, so nothing needs to be larger."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    works = f"an integer of at least {minimum} works"
    if is_int and value > LARGEST_INT:
        works = f"an integer of at most {LARGEST_INT} works"
    check(is_int and minimum <= value <= LARGEST_INT, option, value, works)


def check_number(option: str, value: Any, works: str, *, positive: bool = True) -> None:
    """A finite int or float (no bool), above 0 if ``positive``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = is_number and abs(value) <= sys.float_info.max and (value > 0 or not positive)
    check(ok, option, value, works)


def check_bool(option: str, value: Any) -> None:
    """True or False, and not what only counts as such."""
    check(isinstance(value, bool), option, value, "True or False works")


def check_tensor(option: str, value: Any, works: str) -> None:
    """Something that has a shape and a dtype, so that other checks can say more of it."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{option}: found {describe(value)}; {works} works")


def describe(x: Any) -> str:
    """A tensor's dtype, shape and device; the type of anything else."""
    if x is None:
        return "None"
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device.type}"
