"""All branches for few queries of each document over caches: a step of decoding.

Queries of all documents are computed at once, each with the keys that it sees gathered, so that a
step has few operations however many rows a batch has. What does not depend on the layer is kept
with the segments. What a query does not see of its gathered keys is a copy of a row that it sees:
rows that nobody may see may hold NaN, and a value is multiplied by 0.

Letters: N queries, H query heads, G KV heads, R = H/G, D widths, K gathered keys of a query, s
tokens of a selection block (l'), n chosen blocks, m queries at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.pytorch._common import accumulation_dtype, exact, scaled_product, tile_rows
from nsa_kernels.pytorch.block_selection import best_blocks
from nsa_kernels.pytorch.compressed_attention import num_visible
from nsa_kernels.segments import QueriesOnDevice, QuerySegments
from nsa_kernels.unchanged import Seen


class _Gathered:
    """Which rows of keys each of m queries reads: rows int64 [m, K], and hidden bool [m, 1, 1, K].

    all_seen: whether nothing is hidden, as far as the host knows.
    """

    def __init__(self, rows_mK: Tensor, hidden_mK: Tensor, on_device: bool) -> None:
        self.rows_mK = rows_mK
        self.hidden = hidden_mK[:, None, None]
        self.all_seen = not on_device and not hidden_mK.any()
        self._of_heads: dict[tuple[int, int], Tensor] = {}

    def of_heads(self, apart: int, num_groups: int) -> Tensor:
        """As `_index_of_heads`, once for all layers."""
        key = (apart, num_groups)
        if key not in self._of_heads:
            self._of_heads[key] = _index_of_heads(self.rows_mK.unsqueeze(1), apart, num_groups)
        return self._of_heads[key]


class _Queries:
    """What all layers need to know of m queries, the rows [start, stop) of a call."""

    def __init__(
        self,
        segments: QuerySegments,
        block_rows_B: Tensor,
        pages: Tensor | None,
        page: int,
        start: int,
        stop: int,
        block: int,
        stride: int,
        select_block: int,
        window: int,
    ) -> None:
        on_device = isinstance(segments, QueriesOnDevice)
        # Kept, as `_queries_of` knows them by their identity.
        self._tables = [
            (table, None if on_device else Seen(table, name))
            for name, table in (("block_rows", block_rows_B), ("compressed_rows", pages))
            if table is not None
        ]
        rows = slice(start, stop)
        self.position_m = segments.positions[rows]
        of_query = segments.table[:, 3:]
        if not on_device:  # whose segments have a query each
            of_query = of_query.repeat_interleave(segments.table[:, 1], dim=0)
        compressed_base, selected_base, _ = of_query[rows].unbind(1)
        compressed_base, selected_base = compressed_base[:, None], selected_base[:, None]
        self.selected_base_m11 = selected_base.unsqueeze(1)
        newest, oldest = segments.newest, 0
        if not on_device:
            newest, oldest = int(self.position_m.max()), int(self.position_m.min())
        self.newest, self.some_blind = newest, oldest < block - 1
        self.num_visible = num_visible(newest, block, stride)

        device, t_m1 = self.position_m.device, self.position_m.unsqueeze(1)
        column = torch.arange(self.num_visible, device=device)
        hidden = column * stride + (block - 1) > t_m1
        column = column.where(~hidden, 0)
        of_keys = compressed_base + column
        if pages is not None:
            of_keys = pages[compressed_base + column // page] + column % page
        self.compressed = _Gathered(of_keys, hidden, on_device)
        width = min(window, newest + 1)
        key = t_m1 - torch.arange(width - 1, -1, -1, device=device)
        hidden = key < 0
        key = key.where(~hidden, t_m1)
        of_keys = block_rows_B[selected_base + key // select_block] + key % select_block
        self.window = _Gathered(of_keys, hidden, on_device)

    def tables_are_the_same(self) -> bool:
        """Whether nothing was written to the tables since; those of a step on the device stay."""
        return all(seen is None or seen.again(table) for table, seen in self._tables)


_queries: weakref.WeakKeyDictionary[QuerySegments, dict[Any, _Queries]] = (
    weakref.WeakKeyDictionary()
)


def _queries_of(
    segments: QuerySegments, block_rows_B: Tensor, pages: Tensor | None, *arguments: int
) -> _Queries:
    known = _queries.setdefault(segments, {})
    key = (id(block_rows_B), id(pages), *arguments)
    found = known.get(key)
    if found is None or not found.tables_are_the_same():
        found = known[key] = _Queries(segments, block_rows_B, pages, *arguments)
    return found


def _index_of_heads(rows: Tensor, apart: int, num_groups: int) -> Tensor:
    """Of rows [m, 1 or G, K] of [E, G, D]: where they are among rows of one head, flat."""
    return (rows * apart + torch.arange(num_groups, device=rows.device).unsqueeze(1)).flatten()


def _by_heads(x_EGD: Tensor) -> tuple[Tensor, int]:
    """x as rows [.., D] of one head each, and how many of them a row of x is apart.

    torch gathers along the first dimension four times as fast as along two.
    """
    row, head, channel = x_EGD.stride()
    if channel != 1 or head == 0 or row % head:
        x_EGD = x_EGD.contiguous()
        row, head, _ = x_EGD.stride()
    num_rows, num_groups, width = x_EGD.shape
    apart = row // head
    shape = ((num_rows - 1) * apart + num_groups, width)
    return x_EGD.as_strided(shape, (head, 1), x_EGD.storage_offset()), apart


def _gather(x_EGD: Tensor, keys: _Gathered | Tensor, dtype: torch.dtype) -> Tensor:
    """[m * G, K, D] of the rows of all KV heads, or int64 [m, G, K] of each."""
    num_groups, width = x_EGD.shape[1:]
    rows, apart = _by_heads(x_EGD)
    if isinstance(keys, _Gathered):
        index, count = keys.of_heads(apart, num_groups), keys.rows_mK.shape[-1]
    else:
        index, count = _index_of_heads(keys, apart, num_groups), keys.shape[-1]
    return rows.index_select(0, index).view(-1, count, width).to(dtype)


def _softmax(
    query_PRD: Tensor, keys_PKD: Tensor, hidden: Tensor | None, scale: float, num_groups: int
) -> Tensor:
    """Probabilities [m * G, R, K]; hidden: bool [m, 1 or G, 1, K]."""
    logits_PRK = scaled_product(query_PRD, keys_PKD.mT, scale)
    if hidden is not None:
        by_query = logits_PRK.unflatten(0, (-1, num_groups))
        logits_PRK = by_query.masked_fill_(hidden, -math.inf).flatten(0, 1)
    return logits_PRK.softmax(dim=-1)


@torch.no_grad()
@exact
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
    """See `nsa_kernels.backend.AttendFew`."""
    assert q.shape[0] == segments.num_queries, (q.shape, segments.num_queries)
    dtype, device = accumulation_dtype(q), q.device
    num_queries, num_heads, _ = q.shape
    num_groups, width = values["selected"].shape[1:]
    out_NHD = q.new_empty(num_queries, num_heads, width)
    blocks_NGn = q.new_empty((num_queries, num_groups, num_selected), dtype=torch.int32)
    offset_s = torch.arange(select_block, device=device)
    most_keys = max(num_selected * select_block, window)
    size = tile_rows(num_groups * most_keys * max(q.shape[-1], width), 4)
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        at = _queries_of(
            *(segments, block_rows, compressed_rows, compressed_page),
            *(start, stop, block, stride, select_block, window),
        )
        query_PRD = q[start:stop].to(dtype).reshape(-1, num_heads // num_groups, q.shape[-1])
        outputs = {}

        # Compressed branch and choice. Blocks are only ranked where a query has a choice.
        own_m1 = at.position_m.unsqueeze(1) // select_block
        num_blocks = at.newest // select_block + 1
        ranks, probs_PRC = num_blocks > num_selected, None
        if at.num_visible and (ranks or "compressed" in branches):
            hidden = None if at.compressed.all_seen else at.compressed.hidden
            keys_PCD = _gather(keys["compressed"], at.compressed, dtype)
            probs_PRC = _softmax(query_PRD, keys_PCD, hidden, scale, num_groups)
        if "compressed" in branches:
            if probs_PRC is None:
                outputs["compressed"] = query_PRD.new_zeros(*query_PRD.shape[:2], width)
            else:
                values_PCD = _gather(values["compressed"], at.compressed, dtype)
                o_PRD = torch.bmm(probs_PRC, values_PCD)
                if at.some_blind:  # NaN where a query sees nothing.
                    blind_m = at.position_m < block - 1
                    blind_P = blind_m.repeat_interleave(num_groups, output_size=len(o_PRD))
                    o_PRD = o_PRD.masked_fill(blind_P[:, None, None], 0.0)
                outputs["compressed"] = o_PRD
        if ranks:
            assert probs_PRC is not None
            probs_GmRC = probs_PRC.unflatten(0, (-1, num_groups)).transpose(0, 1)
            total_GmC = probs_GmRC[:, :, 0]
            for r in range(1, probs_GmRC.shape[2]):
                total_GmC = total_GmC + probs_GmRC[:, :, r]
            best_Gmn = best_blocks(
                total_GmC,
                own_m1,
                num_blocks,
                per_block=select_block // stride,
                overlap=block // stride,
                num_selected=num_selected,
                num_init_blocks=num_init_blocks,
                num_local_blocks=num_local_blocks,
                on_device=isinstance(segments, QueriesOnDevice),
            )
        else:
            best = torch.arange(num_blocks, device=device)
            best_Gmn = best.expand(num_groups, stop - start, num_blocks)
        best_mGn = best_Gmn.transpose(0, 1)
        chosen_mGn = best_mGn <= own_m1.unsqueeze(1)
        best = best_mGn.masked_fill(~chosen_mGn, -1)
        blocks_NGn[start:stop] = F.pad(best, (0, num_selected - best.shape[-1]), value=-1)

        # Selected branch: the first chosen block begins with a key that the query sees.
        ids_mGn = (best_mGn + at.selected_base_m11).where(chosen_mGn, at.selected_base_m11)
        starts_mGn = block_rows[ids_mGn]
        positions_mGns = (best_mGn * select_block).unsqueeze(-1) + offset_s
        hidden_mGK = (positions_mGns > at.position_m[:, None, None, None]).flatten(2)
        rows_mGK = (starts_mGn.unsqueeze(-1) + offset_s).flatten(2)
        rows_mGK = rows_mGK.where(~hidden_mGK, rows_mGK[..., :1])
        hidden = hidden_mGK.unsqueeze(2)
        keys_PKD = _gather(keys["selected"], rows_mGK, dtype)
        probs_PRK = _softmax(query_PRD, keys_PKD, hidden, scale, num_groups)
        outputs["selected"] = torch.bmm(probs_PRK, _gather(values["selected"], rows_mGK, dtype))

        hidden = None if at.window.all_seen else at.window.hidden
        keys_PKD = _gather(keys["window"], at.window, dtype)
        probs_PRK = _softmax(query_PRD, keys_PKD, hidden, scale, num_groups)
        outputs["window"] = torch.bmm(probs_PRK, _gather(values["window"], at.window, dtype))

        weights = gates[start:stop].to(dtype).reshape(*query_PRD.shape[:2], -1)
        total_PRD = outputs[branches[0]] * weights[..., :1]
        for i, name in enumerate(branches[1:], 1):
            total_PRD.addcmul_(outputs[name], weights[..., i : i + 1])
        out_NHD[start:stop] = total_PRD.view(-1, num_heads, width)
    return out_NHD, blocks_NGn
