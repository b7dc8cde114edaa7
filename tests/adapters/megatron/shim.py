"""Lets Megatron-core run on the CPU: its calls of torch.cuda answered by the CPU.

For test processes of their own, and nowhere else: it changes torch for the whole process.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

FACTORIES = "zeros empty tensor ones full arange rand randn zeros_like empty_like".split()


class Stream:
    """A stream or an event whose work is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def nothing(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = wait_stream = wait_event = record_event = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def install() -> None:
    """Once in a process."""
    if getattr(torch.cuda, "answered_by_cpu", False):
        return
    cpu = torch.device("cpu")

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    class Generators:
        def __getitem__(self, _: Any) -> torch.Generator:
            return torch.default_generator

    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    own_type = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return own_type(self, *args, **kwargs)
        # Optimizers and clipping ask for "torch.cuda.FloatTensor".
        return own_type(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    answers = {
        "current_device": lambda: cpu,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: Stream(),
        "get_rng_state": get_rng_state,
        "default_generators": Generators(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "answered_by_cpu": True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = get_rng_state

    from megatron.core.tensor_parallel import random

    random._lazy_call = lambda call, **_: call()  # Else put off until CUDA is there.
