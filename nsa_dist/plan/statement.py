"""What a rank is about to do, as text that ranks compare and that errors print."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch

MOST_BOUNDARIES_SHOWN = 8
_SHOWN = ("layout", "batch size", "local sequence length", "cu_seqlens", "length")


class Statement:
    """Names and printed values that must be equal on all ranks of a group.

    ``call`` among them says what is done with the others: two ranks that do different things must
    not take each other's messages for their own.
    """

    # No dataclass: torch.compile looks into those, and would compile anew for each batch's values.
    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    @cached_property
    def fingerprint(self) -> int:
        """A 63-bit hash of names and values, whatever their order; never 0."""
        text = "\n".join(f"{name}={value}" for name, value in sorted(self.values.items()))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 1) | 1

    def also(self, **values: str) -> Statement:
        """The same, and these."""
        return Statement({**self.values, **values})

    def __str__(self) -> str:
        """The call, the fingerprint, and the values by which a person knows a batch again."""
        shown = [f"{name} {self.values[name]}" for name in _SHOWN if name in self.values]
        call, batch = self.values.get("call", "call"), ", ".join(shown) or "no values"
        return f"{call} by plan {self.fingerprint:016x} ({batch})"


def show_boundaries(cu_seqlens: torch.Tensor | None) -> str:
    """Document boundaries as text that differs whenever they differ, short for long ones."""
    if cu_seqlens is None:
        return "None"
    values = cu_seqlens.tolist()
    dtype = "" if cu_seqlens.dtype == torch.int32 else f"{cu_seqlens.dtype} "
    if not isinstance(values, list) or len(values) <= MOST_BOUNDARIES_SHOWN:
        return f"{dtype}{values}"
    digest = hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()
    shown = ", ".join(map(str, values[: MOST_BOUNDARIES_SHOWN - 1]))
    return f"{dtype}[{shown}, ..., {values[-1]}] ({len(values)} boundaries, hash {digest})"
