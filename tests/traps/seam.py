"""What the trap tests share: a small config, one backend, and probes that show what a query sees.

A probe's values are an identity matrix: the output of a query is then its row of probabilities,
positive exactly at the keys that it sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_kernels import QuerySegments, get_backend

BLOCK, STRIDE, SELECT, WINDOW = 4, 2, 8, 5
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=6,
    compress_block=BLOCK,
    compress_stride=STRIDE,
    select_block=SELECT,
    num_selected=4,
    window=9,
)
BACKEND = get_backend("pytorch")


def one_document(length: int, position: int = 0) -> QuerySegments:
    """``length`` queries of one document from ``position`` on; all bases 0."""
    return QuerySegments.from_rows([(0, length, position, 0, 0, 0)])


def num_blocks(length: int) -> tuple[int, int]:
    """Compression and selection blocks of a document, by the definition."""
    return max(0, (length - BLOCK) // STRIDE + 1), -(-length // SELECT)


def attend_compressed(q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments) -> Any:
    return BACKEND.compressed_attention(
        q, k, v, segments, block=BLOCK, stride=STRIDE, scale=q.shape[-1] ** -0.5
    )


def attend_window(q: Tensor, k: Tensor, v: Tensor, segments: QuerySegments) -> Any:
    return BACKEND.window_attention(q, k, v, segments, window=WINDOW, scale=q.shape[-1] ** -0.5)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: QuerySegments, length: int
) -> Any:
    """Over one document of ``length`` tokens whose blocks all stand in k and v."""
    blocks = torch.arange(0, length, SELECT)
    nothing = k.new_zeros(0, k.shape[1], k.shape[2]), v.new_zeros(0, v.shape[1], v.shape[2])
    return BACKEND.selected_attention(
        q,
        k,
        v,
        *nothing,
        selected,
        blocks.expand(k.shape[1], -1),
        (length - blocks).clamp(max=SELECT),
        segments,
        select_block=SELECT,
        scale=q.shape[-1] ** -0.5,
    )


def choose(
    q: Tensor, k: Tensor, segments: QuerySegments, *, n: int, init: int = 1, local: int = 1
) -> Tensor:
    """The blocks chosen from compressed keys, int32 [N, G, n]."""
    _, lse = attend_compressed(q, k, k, segments)
    return BACKEND.select_blocks(
        q,
        k,
        lse,
        segments,
        block=BLOCK,
        stride=STRIDE,
        select_block=SELECT,
        num_selected=n,
        num_init_blocks=init,
        num_local_blocks=local,
        scale=q.shape[-1] ** -0.5,
    )


def all_blocks(positions: Tensor, groups: int, n: int) -> Tensor:
    """A choice of every block up to the query's own: int32 [N, groups, n], ascending, then -1."""
    block = torch.arange(n, dtype=torch.int32)
    chosen = torch.where(block <= positions[:, None] // SELECT, block, -1)
    return chosen[:, None].expand(-1, groups, -1).contiguous()


def identity_values(rows: int, groups: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows, groups, rows]"""
    return torch.eye(rows, dtype=dtype)[:, None].expand(-1, groups, -1)


def assert_sees(o: Tensor, visible: Tensor) -> None:
    """A probe's output [N, H, keys] is positive exactly where visible bool [N, keys] says."""
    for head in range(o.shape[1]):
        assert torch.equal(o[:, head] > 0, visible)
