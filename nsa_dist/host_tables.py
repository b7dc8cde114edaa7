"""Where tables of a plan are made: on the host, whatever device new tensors go to by default."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_cpu() -> AbstractContextManager[object]:
    """A context in which new tensors are on the CPU.

    It does nothing where they are anyway: ``torch.device`` as a context puts a function in Python
    before every operator, and a plan is hundreds of small ones.
    """
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
