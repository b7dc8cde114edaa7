"""Statements: text that says what a rank is about to do. Ranks compare it and errors print it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch

MOST_BOUNDARIES_SHOWN = 8
_SHOWN = ("layout", "batch size", "local sequence length", "cu_seqlens", "length")


class Statement:
    """Names and printed values that must be equal on all ranks of a group.

    The value of ``call`` names the operation, so that ranks in different operations notice it
    before they read each other's messages.
    """

    # Not a dataclass: torch.compile would guard on its fields and recompile for every batch.
    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    @cached_property
    def fingerprint(self) -> int:
        """A 63-bit hash of names and values, independent of their order; never 0."""
        text = "\n".join(f"{name}={value}" for name, value in sorted(self.values.items()))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 1) | 1

    def also(self, **values: str) -> Statement:
        """A copy with more values."""
        return Statement({**self.values, **values})

    def __str__(self) -> str:
        """The call, the fingerprint, and the values that identify a batch to a reader."""
        shown = [f"{name} {self.values[name]}" for name in _SHOWN if name in self.values]
        call, batch = self.values.get("call", "call"), ", ".join(shown) or "no values"
        return f"{call} by plan {self.fingerprint:016x} ({batch})"


def show_boundaries(cu_seqlens: torch.Tensor | None) -> str:
    """Document boundaries as short text, which differs whenever the boundaries differ."""
    if cu_seqlens is None:
        return "None"
    values = cu_seqlens.tolist()
    dtype = "" if cu_seqlens.dtype == torch.int32 else f"{cu_seqlens.dtype} "
    if not isinstance(values, list) or len(values) <= MOST_BOUNDARIES_SHOWN:
        return f"{dtype}{values}"
    digest = hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()
    shown = ", ".join(map(str, values[: MOST_BOUNDARIES_SHOWN - 1]))
    return f"{dtype}[{shown}, ..., {values[-1]}] ({len(values)} boundaries, hash {digest})"
