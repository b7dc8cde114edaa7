"""Watching calls: what the self-check sees of every attention, in whichever module it runs.

Every layer, function and adapter attends through ``functional.attend``, which hands its inputs and
results to the watcher of the process, if there is one. A watcher is there within ``watched`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nsa_dist.attention.call import Call
from nsa_dist.attention.selectors import Selector


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of one call: q [B, L, H, Dk], gates [B, L, H, nb], k and v [B, L, G, D] or such
    tensors by set."""

    q: Tensor
    k: Tensor | Mapping[str, Tensor]
    v: Tensor | Mapping[str, Tensor]
    gates: Tensor


class Watcher(Protocol):
    """Sees every call between its inputs and its output."""

    def begin(self, call: Call, inputs: Inputs, selector: Selector) -> Inputs:
        """Before a call; returns the inputs to use, of equal values."""

    def end(self, out_NHD: Tensor, blocks_NGn: Tensor | None) -> Tensor:
        """After the call; returns the output to use, of equal values."""


_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it, every call of this process is shown to ``watcher``.

    Raises:
        RuntimeError: if there is a watcher already.
    """
    if _watchers:
        raise RuntimeError("calls must be watched once at a time, got a second watcher")
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.clear()


def is_watched() -> bool:
    """Whether there is a watcher."""
    return bool(_watchers)


@torch.compiler.disable
def show_inputs(call: Call, inputs: Inputs, selector: Selector) -> Inputs:
    """What the watcher makes of a call's inputs."""
    return _watchers[0].begin(call, inputs, selector)


@torch.compiler.disable
def show_output(out_NHD: Tensor, blocks_NGn: Tensor | None) -> Tensor:
    """What the watcher makes of a call's output."""
    return _watchers[0].end(out_NHD, blocks_NGn)
