"""The choice of blocks from the probabilities of compressed attention."""

from nsa_kernels.triton.selection.operator import select_blocks

__all__ = ["select_blocks"]
