"""A warning, once per process, where dense attention would be faster."""

from __future__ import annotations

import warnings
from functools import cache

import torch

# By GPU: document length in tokens from which forward and backward are as fast as cuDNN's dense
# attention, at SHAPES. launch/bench/operators.py measures it. On an H200 they are level at the
# shortest length that was measured, 8192.
CROSSOVER = {"NVIDIA H200": 8_000}
SHAPES = "bfloat16, 64 query heads, 4 KV heads, width 128"

_warned_on: set[str] = set()


def hint_at_crossover(longest: int, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Warn when the longest document is shorter than the crossover measured on this GPU.

    Args:
        longest: tokens of the longest document of the batch.
        device: where the attention runs; GPUs that were not measured get no warning.
        backend, dtype: only the Triton backend in 16 bits was measured.
    """
    if backend != "triton" or dtype not in (torch.bfloat16, torch.float16):
        return
    # Before any use of the length, so that no compiled graph depends on it.
    if torch.compiler.is_compiling() or device.type != "cuda":
        return
    if longest < max(CROSSOVER.values()) and not _warned_on:
        _hint(longest, _name(device))


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _hint(longest: int, gpu: str) -> None:
    crossover = CROSSOVER.get(gpu, 0)
    if longest < crossover:
        _warned_on.add(gpu)
        warnings.warn(
            f"the longest document has {longest} tokens; on {gpu} dense attention is faster up to "
            f"about {crossover} ({SHAPES}; see docs/benchmarks.md)",
            stacklevel=4,
        )
