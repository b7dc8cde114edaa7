"""Names the operators of a pass in traces of torch's profiler, forward and backward.

Messages have names of their own (``comm.collectives.MARK``). Without a running profiler nothing is
wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nsa_kernels import Backend

MARK = "nsa_kernels."
"""What the names of operators begin with in a trace; that of the backend's function follows."""
BACKWARD = " backward"
"""What they end with in backward."""
OPERATORS = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "combine",
)
"""Functions of a backend that have ranges."""


def profiled() -> bool:
    """Whether torch's profiler runs, of code that is not being compiled."""
    # In this order: the compiler cannot trace the question to the profiler.
    return not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled()


class RangedBackend:
    """A backend whose operators have ranges; it computes the same."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return ranged(value, name) if name in OPERATORS else value


def ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``, whose call and whose node in backward are ranges of a trace."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with torch.profiler.record_function(MARK + name):
            found = function(*args, **options)
        results = [found] if isinstance(found, Tensor) else found
        # Several results are of one node.
        nodes = {x.grad_fn for x in results if x.grad_fn is not None}
        for node in nodes:
            _mark(node, MARK + name + BACKWARD)
        return found

    return call


def _mark(node: Any, name: str) -> None:
    """Make a range of a node's backward."""
    opened: list[AbstractContextManager[Any]] = []

    def before(grads: Any) -> None:
        if profiled():
            opened.append(torch.profiler.record_function(name))
            opened[-1].__enter__()

    def after(to_inputs: Any, grads: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    node.register_prehook(before)
    node.register_hook(after)
