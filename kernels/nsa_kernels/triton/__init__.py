"""The backend in Triton, for NVIDIA GPUs: forward and backward of every function as kernels.

The forward output is the same, bit for bit, however the sequence is split over ranks, and gradients
repeat bit for bit: tile sizes follow from config, dtype and GPU alone, key tiles start at multiples
of their size from the document's start, and no float is added atomically.
"""

from __future__ import annotations

import torch

from nsa_kernels.triton.banded import compressed_attention, window_attention
from nsa_kernels.triton.combine import combine
from nsa_kernels.triton.compression import compress, gather_blocks
from nsa_kernels.triton.selected import selected_attention
from nsa_kernels.triton.selection import select_blocks

__all__ = [
    "combine",
    "compress",
    "compressed_attention",
    "gather_blocks",
    "name",
    "refuses",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

name = "triton"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WIDTH = 256
# (smallest, largest) of the lengths that are powers of two, and of the others.
POWERS_OF_TWO = {"compress_block": (4, 64), "compress_stride": (2, 64), "select_block": (16, 128)}
COUNTS = {"num_selected": (2, 64), "window": (1, 4096)}


def refuses(dtype: torch.dtype | None, options: dict[str, int]) -> str | None:
    """See `Backend.refuses`."""
    if dtype is not None and dtype not in DTYPES:
        return f"dtype: found {dtype} with backend 'triton'; {DTYPES} work (or backend='pytorch')"
    for option in ("head_dim", "v_head_dim"):
        width = options[option]
        if width % 16 or not 16 <= width <= LARGEST_WIDTH:
            works = f"multiples of 16 up to {LARGEST_WIDTH} work"
            return f"{option}: found {width} with backend 'triton'; {works}"
    for option, (low, high) in POWERS_OF_TWO.items():
        length = options[option]
        if length & (length - 1) or not low <= length <= high:
            works = f"powers of two from {low} to {high} work"
            return f"{option}: found {length} with backend 'triton'; {works}"
    for option, (low, high) in COUNTS.items():
        if not low <= options[option] <= high:
            works = f"{low} to {high} work"
            return f"{option}: found {options[option]} with backend 'triton'; {works}"
    return None
