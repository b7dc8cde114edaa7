"""The backend in Triton, for NVIDIA GPUs: forward and backward of every function as kernels.

The forward output is the same, bit for bit, however the sequence is split over ranks, and gradients
repeat bit for bit: tile sizes follow from config, dtype and GPU alone, key tiles start at multiples
of their size from the document's start, and no float is added atomically. What `attend_few` gives
is of other kernels, and the same for every batch and every number of queries.
"""

from __future__ import annotations

import torch

from nsa_kernels.triton.banded import (
    compressed_attention,
    compressed_passes,
    window_attention,
    window_passes,
)
from nsa_kernels.triton.combine import add_gradients, combine
from nsa_kernels.triton.compression import compress, gather_blocks
from nsa_kernels.triton.decoding import attend_few
from nsa_kernels.triton.rows import multiply_rows
from nsa_kernels.triton.selected import selected_attention, selected_passes
from nsa_kernels.triton.selection import select_blocks

__all__ = [
    "add_gradients",
    "attend_few",
    "branch_passes",
    "combine",
    "compress",
    "compressed_attention",
    "gated_branches",
    "gather_blocks",
    "multiply_rows",
    "name",
    "refuses",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

name = "triton"
gated_branches = ("compressed", "selected", "window")
branch_passes = {
    "compressed": compressed_passes,
    "selected": selected_passes,
    "window": window_passes,
}

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WIDTH = 256
# (smallest, largest) of the lengths that are powers of two, and of the others.
POWERS_OF_TWO = {"compress_block": (4, 64), "compress_stride": (2, 64), "select_block": (16, 128)}
COUNTS = {"num_selected": (2, 64), "window": (1, 4096)}


def refuses(dtype: torch.dtype | None, options: dict[str, int]) -> str | None:
    """See `Backend.refuses`."""
    if dtype is not None and dtype not in DTYPES:
        must = f"dtype must be one of {', '.join(map(str, DTYPES))}"
        return f"{must} with backend='triton', got {dtype}"
    for option in ("head_dim", "v_head_dim"):
        width = options[option]
        if width % 16 or not 16 <= width <= LARGEST_WIDTH:
            must = f"{option} must be a multiple of 16 up to {LARGEST_WIDTH}"
            return f"{must} with backend='triton', got {width}"
    for option, (low, high) in POWERS_OF_TWO.items():
        length = options[option]
        if length & (length - 1) or not low <= length <= high:
            must = f"{option} must be a power of two from {low} to {high}"
            return f"{must} with backend='triton', got {length}"
    for option, (low, high) in COUNTS.items():
        if not low <= options[option] <= high:
            must = f"{option} must be from {low} to {high}"
            return f"{must} with backend='triton', got {options[option]}"
    return None
