"""The compression branch: causal attention to the compressed tokens (Eq. 7, arXiv 2502.11089)."""

from __future__ import annotations

from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.band import Band
from nsa_kernels.triton.banded_attention import banded_attention


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `Backend.compressed_attention`."""
    band = Band(offset=block - 1, stride=stride, window=0, column="compressed_base")
    return banded_attention(q, k, v, segments, band, scale)
