"""What sparse layers do inside a forward: their choices and gates, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from nsa_dist import NativeSparseAttention
from nsa_dist.attention.functional import NSADetails

T = TypeVar("T")


@contextmanager
def recorded(model: nn.Module, take: Callable[[NSADetails], T]) -> Iterator[list[T]]:
    """Within it, each forward of the model adds what ``take`` keeps of each sparse layer."""
    kept: list[T] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"return_details": True}

    def keep(_: nn.Module, __: Any, result: Any) -> Tensor:
        out, details = result
        kept.append(take(details))
        return out

    layers = [m for m in model.modules() if isinstance(m, NativeSparseAttention)]
    handles = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
