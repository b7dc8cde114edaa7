"""The choice of blocks as an operator of torch, in chunks of rows: see scores.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.selection import choose
from nsa_kernels.triton.selection.choose import choose_blocks
from nsa_kernels.triton.selection.chunks import chunks
from nsa_kernels.triton.selection.hopper_scores import hopper_score_blocks
from nsa_kernels.triton.selection.scores import pitch, score_blocks, score_parts
from nsa_kernels.triton.shared.cache import segments_of
from nsa_kernels.triton.shared.custom_ops import register
from nsa_kernels.triton.shared.hopper import for_tma
from nsa_kernels.triton.shared.shapes import (
    cdiv,
    hopper_score_tile,
    power_of_two,
    score_tile,
)
from nsa_kernels.triton.shared.tables import positions, query_tiles

# Most bytes of the scores and candidates between kernels. Bits do not depend on it.
WORKSPACE_BYTES = 256 << 20


def _row_bytes(blocks: int, groups: int, score_parts: int, num_selected: int) -> int:
    """Workspace of a query row: scores and, where they are ranked in parts, what these hand on."""
    parts = cdiv(blocks, choose.MOST_COLUMNS)
    # 4 bytes for each block found; what later launches find of these is less than as much again.
    found = 8 * parts * num_selected if parts > 1 else 0
    return groups * (4 * score_parts * pitch(blocks) + found)


def _chunk_rows(blocks: int, groups: int, score_parts: int, num_selected: int) -> int:
    size = WORKSPACE_BYTES // _row_bytes(blocks, groups, score_parts, num_selected)
    # Whole tiles where that is possible: one that is cut by a chunk's end is computed twice.
    return max(1, size // 64 * 64 if size > 64 else size)


@register(
    "select_blocks(Tensor q, Tensor k, Tensor lse, Tensor segments, int block, int stride, "
    "int select_block, int num_selected, int num_init_blocks, int num_local_blocks, float scale)"
    " -> Tensor"
)
def _select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: Tensor,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Tensor:
    groups, at = k.shape[1], segments_of(segments, q.device)
    selected_NGn = torch.empty(
        (q.shape[0], groups, num_selected), dtype=torch.int32, device=q.device
    )
    if not selected_NGn.numel():
        return selected_NGn
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse = lse.contiguous()
    parts = score_parts(block, stride)
    head_columns = power_of_two(q.shape[1] // groups)
    hopper = hopper_score_tile(q, k, block, stride, select_block)
    if not k.shape[0]:
        hopper = None  # Nothing is visible, and a descriptor has at least one row.
    if hopper is not None:
        q, k = for_tma(q), for_tma(k)
        tokens = hopper.rows // head_columns
    else:
        plain = score_tile(q, head_columns, select_block // stride)
        tokens = plain.columns // head_columns
    tiles = query_tiles(at, tokens, "compressed_base")
    blocks = tiles.last // select_block + 1
    size = min(_chunk_rows(blocks, groups, parts, num_selected), q.shape[0])
    workspace = torch.empty(
        size * groups * parts * pitch(blocks), dtype=torch.float32, device=q.device
    )
    blocks_of_keys: dict[str, Any] = {
        "block": block, "stride": stride, "select_block": select_block, "scale": scale,
    }  # fmt: skip
    for chunk in chunks(at, size, tokens, "compressed_base"):
        if hopper is not None:
            hopper_score_blocks(q, k, lse, workspace, at, tiles, chunk, hopper, **blocks_of_keys)
        else:
            score_blocks(q, k, lse, workspace, tiles, chunk, plain, **blocks_of_keys)
        choose_blocks(
            workspace,
            selected_NGn,
            positions(at),
            chunk,
            parts,
            select_block,
            num_init_blocks,
            num_local_blocks,
        )
    return selected_NGn


@_select_blocks.register_fake
def _(q: Tensor, k: Tensor, *arguments: Any) -> Tensor:
    num_selected = arguments[5]
    return q.new_empty(q.shape[0], k.shape[1], num_selected, dtype=torch.int32)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segments: QuerySegments,
    *,
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    scale: float,
) -> Tensor:
    """See `Backend.select_blocks`.

    Its workspace is rows x G x (4 p ceil64(B) + 8 ceil(B / 4096) n) bytes, the second term only
    where B > 4096. B are the blocks up to the last query's, p is 1 where l = d and else 2, and rows
    are as many as make at most WORKSPACE_BYTES, and at least one.
    """
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    options = (block, stride, select_block, num_selected, num_init_blocks, num_local_blocks)
    return _select_blocks(q, k, lse, segments.host, *options, scale)
