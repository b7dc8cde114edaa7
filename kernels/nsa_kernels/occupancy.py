"""How much of a GPU kernels leave to what runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SPARED: ContextVar[int] = ContextVar("multiprocessors that are left free", default=0)


@contextmanager
def spare(multiprocessors: int) -> Iterator[None]:
    """Let forward kernels that are started on this thread leave some multiprocessors free.

    A kernel whose programs stay on all multiprocessors lets nothing begin beside it, not even the
    small kernels of a message. Results do not depend on this, bit for bit.
    """
    token = _SPARED.set(multiprocessors)
    try:
        yield
    finally:
        _SPARED.reset(token)


def spared() -> int:
    """Of the innermost ``spare`` around; 0 without one."""
    return _SPARED.get()
