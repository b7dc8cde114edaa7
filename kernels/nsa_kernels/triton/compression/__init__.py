"""Compression: one token for each block of keys or values."""

from nsa_kernels.triton.compression.operator import compress, gather_blocks

__all__ = ["compress", "gather_blocks"]
