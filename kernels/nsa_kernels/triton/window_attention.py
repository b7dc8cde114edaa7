"""The window branch: attention to the last w tokens (arXiv 2502.11089, section 3.3.3)."""

from __future__ import annotations

from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.band import Band
from nsa_kernels.triton.banded_attention import banded_attention


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments, *, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `Backend.window_attention`."""
    band = Band(offset=0, stride=1, window=window, column="window_base")
    return banded_attention(q, k, v, segments, band, scale)
