"""Run a training script of Megatron-LM on CPUs: python -m ... SCRIPT ARGUMENTS...

A program of its own: it answers for torch.cuda in the whole process, as ``shim`` does.
"""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys
import typing
from types import SimpleNamespace
from typing import Any

import torch

from tests.adapters.megatron import shim


def answer_for_a_program() -> None:
    """What a whole program asks of torch.cuda, beside what layers ask."""
    shim.install()
    gpu = SimpleNamespace(
        name="CPU", major=9, minor=0, total_memory=1 << 34, multi_processor_count=1
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "set_device": lambda *_: None,
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_device_properties": lambda *_: gpu,
        "get_device_capability": lambda *_: (gpu.major, gpu.minor),
        "get_device_name": lambda *_: gpu.name,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (gpu.total_memory, gpu.total_memory),
        "memory_stats": lambda *_: {},
        "Event": shim.Stream,
        "Stream": shim.Stream,
        "default_stream": lambda *_: shim.Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "set_stream": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    for name in ("memory_allocated", "memory_reserved"):
        answers[name] = answers[f"max_{name}"] = lambda *_: 0
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None  # type: ignore[assignment]
    if not hasattr(typing, "override"):  # Of Python 3.12, which releases from 0.17 on ask for.
        typing.override = lambda method: method  # type: ignore[attr-defined]
    with contextlib.suppress(ImportError):  # Of old releases: asks nvcc for its version.
        kernels: Any = importlib.import_module("megatron.legacy.fused_kernels")
        kernels.load = lambda *_: None
    # Tries fused kernels on draws of a GPU's generator, which here is the one of the weights.
    start: Any = importlib.import_module("megatron.training.initialize")
    start._warmup_jit_function = lambda *_, **__: None
    own_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if "cuda" in str(x) and not torch.is_tensor(x) else x for x in args)
        return own_to(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    answer_for_a_program()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
