"""Which keys a query sees in the compressed and window branches, on the host and in kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.shared.arguments import load_rows
from nsa_kernels.triton.shared.arithmetic import PIECE, precision
from nsa_kernels.triton.shared.shapes import HopperTile, Tile, padded


class Band(NamedTuple):
    """Query t sees keys j with j*stride + offset <= t and, with a window > 0, j > t - window.

    column: of a segment, what gives the row of key 0.
    """

    offset: int
    stride: int
    window: int
    column: str

    def keys(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [begin, end) that some query at positions first..last sees, for each pair."""
        begin = first - self.window + 1 if self.window else torch.zeros_like(first)
        return begin.clamp(min=0), (last - self.offset + self.stride).clamp(min=0) // self.stride

    def most_keys(self, last: int) -> int:
        """Keys up to the last one that the query at position `last` sees."""
        return max(0, last - self.offset + self.stride) // self.stride


class Constants(NamedTuple):
    """What a kernel is compiled for.

    G KV heads with R query heads each. OFFSET, STRIDE, WINDOW: of the band. A tile has BT tokens,
    whose heads are at most BM rows, and BN keys. DK, DV: widths; PDK, PDV: padded. PRECISION: of
    dots. PIECE: tiles of one running sum.
    """

    G: int
    R: int
    OFFSET: int
    STRIDE: int
    WINDOW: int
    BT: int
    BM: int
    BN: int
    DK: int
    DV: int
    PDK: int
    PDV: int
    PRECISION: str
    PIECE: int


def constants(q: Tensor, v: Tensor, band: Band, tile: Tile | HopperTile) -> Constants:
    """For q [N, H, Dk] and v [E, G, Dv]."""
    (_, heads, dk), (_, groups, dv) = q.shape, v.shape
    ratio = heads // groups
    return Constants(
        groups,
        ratio,
        band.offset,
        band.stride,
        band.window,
        tile.rows // ratio,
        tile.rows,
        tile.keys,
        dk,
        dv,
        padded(dk),
        padded(dv),
        precision(q),
        PIECE,
    )


class TileKeys(NamedTuple):
    """The keys of one KV head that some query of a tile sees.

    p_k, p_v: pointers to row 0 of the buffers; base: the row of key 0; first, limit: the keys.
    """

    p_k: Any
    p_v: Any
    stride_k: Any
    stride_v: Any
    base: Any
    first: Any
    limit: Any


@triton.jit
def num_seen(t, C: tl.constexpr):
    """Keys at the start of the document that end at or before position t."""
    return tl.maximum(t - C.OFFSET + C.STRIDE, 0) // C.STRIDE


@triton.jit
def sees(t, j, C: tl.constexpr):
    """Whether the query at position t sees key j."""
    seen = j * C.STRIDE + C.OFFSET <= t
    if C.WINDOW > 0:
        seen = seen & (j > t - C.WINDOW)
    return seen


@triton.jit
def sees_several(t, C: tl.constexpr):
    """Whether the query at position t sees more than one key."""
    count = num_seen(t, C)
    if C.WINDOW > 0:
        count = tl.minimum(count, C.WINDOW)
    return count > 1


@triton.jit
def key_rows(keys, o_j):
    """Rows of the buffers of the keys o_j [BN], and which of them some query of the tile sees."""
    return keys.base + o_j.to(tl.int64), (o_j >= keys.first) & (o_j < keys.limit)


@triton.jit
def load_k(keys, o_j, C: tl.constexpr):
    """The keys o_j [BN] in a tile [BN, PDK]; zeros where no query of the tile sees them."""
    row, m_j = key_rows(keys, o_j)
    return load_rows(keys.p_k, row * keys.stride_k, tl.arange(0, C.PDK), m_j, C.DK, C.PDK)


@triton.jit
def load_v(keys, o_j, C: tl.constexpr):
    """Their values, [BN, PDV]."""
    row, m_j = key_rows(keys, o_j)
    return load_rows(keys.p_v, row * keys.stride_v, tl.arange(0, C.PDV), m_j, C.DV, C.PDV)
