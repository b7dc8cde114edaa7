"""Attention to a band of consecutive keys: the compressed branch and the window branch."""

from nsa_kernels.triton.banded.operator import (
    banded_attention,
    compressed_attention,
    compressed_passes,
    window_attention,
    window_passes,
)

__all__ = [
    "banded_attention",
    "compressed_attention",
    "compressed_passes",
    "window_attention",
    "window_passes",
]
