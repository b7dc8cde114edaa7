"""A stand-in for CUDA graphs on a CPU: operators of a function, run on the same tensors again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin, StaticCache

from nsa_dist.adapters.huggingface import cuda_graphs

HOST_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique",
}
"""Operators that read a tensor on the host, make one from the host's, or give shapes by values."""


class Recorded(TorchDispatchMode):
    """Records the operators of a function; ``replay`` runs them on the same tensors again.

    What they write to tensors that were there before is undone, as a capture computes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in HOST_READS, f"a step reads a tensor on the host: {name}"
        given = zip(function._schema.arguments, args, strict=False)
        for x in [x for of, x in given if of.is_write] + tree_leaves(kwargs.get("out")):
            if isinstance(x, Tensor):
                self._before.append((x, x.clone()))
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        return found

    def undo(self) -> None:
        for x, values in reversed(self._before):
            x.copy_(values)
        self._before.clear()

    def replay(self) -> None:
        for function, args, kwargs, found in self.calls:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


@contextmanager
def no_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What reads values on the host without an operator fails."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step reads a tensor on the host")

    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, refused)
        yield


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Let ``generate`` replay steps over static caches as on a GPU; the list of graphs it makes."""
    made: list[Recorded] = []

    def capture(function: Callable[[], Any], _: torch.device) -> tuple[Callable[[], None], Any]:
        made.append(Recorded())
        with no_values(monkeypatch), made[-1]:
            found = function()
        made[-1].undo()
        return made[-1].replay, found

    def is_static(_: Any, arguments: dict[str, Any], __: Any) -> bool:
        return isinstance(arguments["past_key_values"], StaticCache)

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", is_static)
    return made
