"""The attention of few queries over caches: what a step of decoding launches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.decoding.attend import add_branches, attend_selected_and_window
from nsa_kernels.triton.decoding.compressed import attend_compressed
from nsa_kernels.triton.decoding.constants import Options, Partial, constants, query_rows
from nsa_kernels.triton.selection.choose import choose_blocks
from nsa_kernels.triton.selection.chunks import Chunk
from nsa_kernels.triton.selection.scores import score_parts
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.arithmetic import logit_scale
from nsa_kernels.triton.shared.launch import on_its_device
from nsa_kernels.triton.shared.shapes import cdiv, decoding_tile
from nsa_kernels.triton.shared.tables import positions


@torch.no_grad()
@on_its_device
def attend_few(
    q: Tensor,
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    gates: Tensor,
    segments: QuerySegments,
    block_rows: Tensor,
    *,
    compressed_rows: Tensor | None = None,
    compressed_page: int = 0,
    branches: tuple[str, ...],
    block: int,
    stride: int,
    select_block: int,
    num_selected: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `nsa_kernels.backend.AttendFew`.

    Workspace, in float32: N H (p (Dv + 2) + 2 C / (l'/d)) of p parts of keys, one for each SPLIT of
    the compressed tokens, PART of the chosen ones and PART of the window, which may begin within.
    """
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    options = Options(block, stride, select_block, num_selected, window)
    q = last_dim_contiguous(q)
    block_rows = block_rows.contiguous()
    pages = None if compressed_rows is None else compressed_rows.contiguous()
    keys, values = (
        {name: last_dim_contiguous(x) for name, x in given.items()} for given in (keys, values)
    )
    C, tile = constants(q, values["selected"], options), decoding_tile(q, values["selected"])
    num_queries, heads, _ = q.shape
    out_NHD = q.new_empty(num_queries, heads, C.DV)
    blocks_NGn = torch.empty((num_queries, C.G, num_selected), dtype=torch.int32, device=q.device)
    if not num_queries:
        return out_NHD, blocks_NGn
    last, rows_N4 = segments.newest, query_rows(segments)
    visible = max(0, (last - block + 1) // stride + 1)
    splits = cdiv(visible, C.SPLIT)
    parts = splits + C.PARTS_SELECTED + C.PARTS_WINDOW

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    shape = (num_queries, heads, parts)
    partial = Partial(empty(*shape, C.DV), empty(*shape), empty(*shape))
    in_logits = logit_scale(q, scale)
    scores = attend_compressed(
        q, keys["compressed"], values["compressed"] if "compressed" in branches else None, partial,
        rows_N4, pages, compressed_page if pages is not None else 0, splits,
        last // select_block + 1, in_logits, tile, C,
    )  # fmt: skip
    assert scores is not None
    choose_blocks(
        scores, blocks_NGn, positions(segments), Chunk(0, num_queries, 0, 0, last),
        score_parts(block, stride), select_block, num_init_blocks, num_local_blocks,
    )  # fmt: skip
    attend_selected_and_window(
        q, (keys["selected"], values["selected"]), blocks_NGn, block_rows,
        (keys["window"], values["window"]), partial, rows_N4, splits, in_logits, tile, C,
    )  # fmt: skip
    add_branches(partial, gates, branches, out_NHD, rows_N4, splits, tile, C)
    return out_NHD, blocks_NGn
