"""Who meets whom in the selected branch: a tile's blocks, and a block's queries.

Forward and dq take a tile of neighbouring tokens of one segment and walk the blocks that any of
them chose, in ascending order: `block_lists`. dk and dv take a block and walk the queries that
chose it, in the order of their rows: `query_lists`. Both are made on the device from the choice,
with sizes that follow from shapes alone, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.tables import load_query_tile, positions, selected_bases

# Blocks at the start of a list of which not all tokens of the tile may see all.
EDGES = 2


class BlockLists(NamedTuple):
    """The blocks that a tile's tokens chose, for each tile and group.

    lists: int64 [tiles, G, EDGES + BT*n], an entry a block, which `make_entry` packs: the row where
    it starts, how many of its tokens to load, and which tokens of the tile chose it.
    First the EDGES blocks from the first one that not all tokens see whole (0: chosen by none),
    then, ascending, the chosen blocks before those.
    counts: int32 [tiles, G], how many come after the edges.
    """

    lists: Tensor
    counts: Tensor


class ListConstants(NamedTuple):
    """What the lists are compiled for.

    G KV heads; NUM chosen blocks of a token, of BLOCK tokens each; LENGTH entries of a list, of
    which the first EDGES are edges; BT tokens of a tile, with BC >= BT*NUM choices, compared with
    BK at a time.
    """

    G: int
    NUM: int
    BLOCK: int
    LENGTH: int
    EDGES: int
    BC: int
    BK: int


@triton.jit
def make_entry(row, length, choosers):
    """An entry: bits 0 to 15 the choosers, token i of the tile in bit i; 16 to 23 length; then row.

    row: int64. length: tokens to load, at most 128. choosers: at most 16 bits.
    """
    return row * 16777216 + length * 65536 + choosers


@triton.jit
def entry_row(entry):
    """The row where the block starts, int64."""
    return entry >> 24


@triton.jit
def entry_length(entry):
    """How many tokens of the block to load, int32."""
    return ((entry >> 16) & 255).to(tl.int32)


@triton.jit
def entry_chosen_by(entry, token):
    """Whether each `token` of the tile chose the block."""
    return ((entry.to(tl.int32) >> token) & 1) != 0


@triton.jit
def _block_lists_kernel(
    selected, block_rows, stride_group, block_lengths, tiles, blocks, C: tl.constexpr
):
    """The list of one tile and KV head, to `blocks`."""
    i_tile = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1)
    first_row, num_tokens, position, base = load_query_tile(tiles, i_tile)
    last = position + num_tokens - 1
    first_edge = (position + 1) // C.BLOCK  # Blocks before are seen whole by all.
    p_selected = selected.p + first_row * selected.stride_row + i_g * selected.stride_head
    p_rows = block_rows + i_g * stride_group + base
    p_list = blocks.lists + (i_tile * C.G + i_g) * C.LENGTH

    o_c = tl.arange(0, C.BC)
    token = o_c // C.NUM
    p_c = p_selected + token.to(tl.int64) * selected.stride_row + o_c % C.NUM
    b_j = tl.load(p_c, mask=token < num_tokens, other=-1).to(tl.int32)
    bit = 1 << (token & 15)  # Places behind BT*NUM hold no choice.

    EDGES: tl.constexpr = C.EDGES
    for i in tl.static_range(EDGES):
        j = first_edge + i
        choosers = tl.sum(tl.where(b_j == j, bit, 0), 0)
        entry = tl.cast(0, tl.int64)
        if choosers > 0:
            length = tl.load(block_lengths + base + j).to(tl.int32)
            length = tl.minimum(length, last + 1 - j * C.BLOCK)
            entry = make_entry(tl.load(p_rows + j), length, choosers)
        tl.store(p_list + i, entry)

    inner = (b_j >= 0) & (b_j < first_edge)
    b_j = tl.where(inner, b_j, 2147483647)
    choosers = tl.zeros_like(b_j)
    place = tl.zeros_like(b_j)  # How many of the tile's blocks come before.
    for start in tl.range(0, C.BC, C.BK):
        o_k = start + tl.arange(0, C.BK)
        token_k = o_k // C.NUM
        p_k = p_selected + token_k.to(tl.int64) * selected.stride_row + o_k % C.NUM
        b_k = tl.load(p_k, mask=token_k < num_tokens, other=-1).to(tl.int32)
        b_k = tl.where((b_k >= 0) & (b_k < first_edge), b_k, 2147483647)
        same = b_j[:, None] == b_k[None, :]  # [BC, BK]
        choosers += tl.sum(tl.where(same, (1 << (token_k & 15))[None, :], 0), 1)
        # A block counts where the first token that chose it names it.
        again = tl.max(tl.where(same & (o_c[:, None] < o_k[None, :]), 1, 0), 0)
        counts_once = (again == 0) & (b_k != 2147483647)
        before = counts_once[None, :] & (b_k[None, :] < b_j[:, None])
        place += tl.sum(tl.where(before, 1, 0), 1)
    first = inner & ((choosers & (bit - 1)) == 0)
    row = tl.load(p_rows + b_j, mask=first, other=0)
    entry = make_entry(row, C.BLOCK, choosers)
    tl.store(p_list + C.EDGES + place, entry, mask=first)
    tl.store(blocks.counts + i_tile * C.G + i_g, tl.sum(tl.where(first, 1, 0), 0))


def block_lists(
    selected_NGn: Tensor,
    block_rows_GB: Tensor,
    block_lengths_B: Tensor,
    tiles: Tensor,
    tokens: int,
    select_block: int,
) -> BlockLists:
    """The lists of tiles of at most `tokens` rows."""
    _, groups, num = selected_NGn.shape
    candidates = triton.next_power_of_2(tokens * num)
    length = EDGES + tokens * num
    warps = max(1, min(8, candidates // 64))
    at_once = min(candidates, max(2, 1024 * warps // candidates))
    shape, device = (len(tiles), groups), selected_NGn.device
    blocks = BlockLists(
        torch.empty(*shape, length, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )
    launcher(_block_lists_kernel, shape)(
        head_rows(selected_NGn), block_rows_GB, block_rows_GB.stride(0), block_lengths_B, tiles,
        blocks, C=ListConstants(groups, num, select_block, length, EDGES, candidates, at_once),
        num_warps=warps,
    )  # fmt: skip
    return blocks


class QueryLists(NamedTuple):
    """The queries that chose a block, for each group and block, and who walks which of them.

    rows: int32 [N*G*n], a block's queries one after another, ascending. seen: int16 [N*G*n], how
    many of the block's tokens each of them sees, and 256 more when it sees more than one key.
    starts: int64 [G*B + 1], where those of (group, block) g*B + b begin.
    ends: int64 [G*B], how many programs the blocks up to this one have.
    owner: int64 [programs], the g*B + b of a program; G*B for one too many.
    order: int64 [programs], in which order to start them: of one launch those first whose queries
    are first, since programs that run together then read the same queries.
    """

    rows: Tensor
    seen: Tensor
    starts: Tensor
    ends: Tensor
    owner: Tensor
    order: Tensor


class EntryConstants(NamedTuple):
    """BR rows of a program; NUM chosen blocks of a token, padded to PN, of BLOCK tokens each."""

    G: int
    NUM: int
    PN: int
    BLOCK: int
    BR: int


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _entries_kernel(
    selected, row_positions, bases, block_lengths, keys, seen, num_rows, num_blocks, C: tl.constexpr
):
    """For each choice of BR rows and a KV head: g*B + b, G*B without one, and `QueryLists.seen`."""
    i_g = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * C.BR + tl.arange(0, C.BR)
    o_n = tl.arange(0, C.PN)
    m_row = row < num_rows
    mask = m_row[:, None] & (o_n < C.NUM)[None, :]
    p_j = selected.p + (row * selected.stride_row + i_g * selected.stride_head)[:, None]
    b_j = tl.load(p_j + o_n[None, :], mask=mask, other=-1).to(tl.int64)  # [BR, PN]
    chosen = b_j >= 0
    b_id = b_j + tl.load(bases + row, mask=m_row, other=0)[:, None]
    b_length = tl.load(block_lengths + b_id, mask=chosen, other=0)
    b_seen = tl.load(row_positions + row, mask=m_row, other=0)[:, None] + 1 - b_j * C.BLOCK
    b_seen = tl.where(chosen, tl.minimum(tl.maximum(b_seen, 0), b_length), 0)
    several = tl.sum(b_seen, 1) > 1
    b_seen += tl.where(several, 256, 0)[:, None]
    b_key = tl.where(chosen, b_id + i_g * num_blocks, num_blocks * C.G)
    o_out = ((row * C.G + i_g) * C.NUM)[:, None] + o_n[None, :]
    tl.store(keys + o_out, b_key.to(tl.int32), mask=mask)
    tl.store(seen + o_out, b_seen.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["num", "num_choices"])
def _sorted_entries_kernel(by_block, entry_seen, rows, seen, num, num_choices, SIZE: tl.constexpr):
    """Row and `seen` of SIZE choices in the order of their blocks; num_choices: of a row."""
    o = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = o < num
    entry = tl.load(by_block + o, mask=mask, other=0)
    tl.store(rows + o, (entry // num_choices).to(tl.int32), mask=mask)
    tl.store(seen + o, tl.load(entry_seen + entry, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["num_programs", "none", "num_blocks", "num_entries", "num_rows"])
def _programs_kernel(
    rows, starts, ends, owner, place, num_programs, none, num_blocks, num_entries, num_rows, launch,
    most, STEPS: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The block of each of SIZE programs, and what sorts them: launch, KV head, first query.

    none: how many blocks there are, < 2**STEPS. Programs too many come after all others.
    """
    i_program = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i_program < num_programs
    low = tl.zeros([SIZE], dtype=tl.int32)  # How many blocks end at or before this program.
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        end = tl.load(ends + middle - 1, mask=middle <= none, other=9223372036854775807)
        low = tl.where(end <= i_program, middle, low)
    last = tl.minimum(low, none - 1)
    before = tl.load(ends + last - 1, mask=last > 0, other=0)
    entry = tl.load(starts + last) + (i_program - before) * most
    first = tl.load(rows + tl.minimum(entry, num_entries - 1)).to(tl.int64)
    first = tl.where(low < none, first, num_rows)
    group = (i_program // launch).to(tl.int64) * G + last // num_blocks
    tl.store(owner + i_program, low.to(tl.int64), mask=mask)
    tl.store(place + i_program, group * (num_rows + 1) + first, mask=mask)


def query_lists(
    selected_NGn: Tensor,
    block_lengths_B: Tensor,
    segments: QuerySegments,
    select_block: int,
    most: int,
    launch: int,
) -> QueryLists:
    """For programs that walk over at most `most` queries of a block each, `launch` at a time."""
    num_rows, groups, num = selected_NGn.shape
    num_blocks, device = block_lengths_B.shape[0], selected_NGn.device
    none, entries = groups * num_blocks, selected_NGn.numel()
    keys = torch.empty(entries, dtype=torch.int32, device=device)
    entry_seen = torch.empty(entries, dtype=torch.int16, device=device)
    width = triton.next_power_of_2(num)
    at_once = max(1, 1024 // width)
    launcher(_entries_kernel, (triton.cdiv(num_rows, at_once), groups))(
        head_rows(selected_NGn), positions(segments), selected_bases(segments), block_lengths_B,
        keys, entry_seen, num_rows, num_blocks,
        C=EntryConstants(groups, num, width, select_block, at_once),
    )  # fmt: skip
    # Equal keys stay in the order of rows.
    keys, by_block = keys.sort(stable=True)
    rows = torch.empty_like(keys)
    seen = torch.empty_like(entry_seen)
    launcher(_sorted_entries_kernel, (triton.cdiv(entries, 1024),))(
        by_block, entry_seen, rows, seen, entries, groups * num, SIZE=1024
    )
    bounds = torch.arange(none + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(keys, bounds)
    ends = ((starts.diff() + most - 1) // most).cumsum(0)

    programs = min(none, entries) + entries // most
    owner, place = (torch.empty(programs, dtype=torch.int64, device=device) for _ in range(2))
    launcher(_programs_kernel, (triton.cdiv(programs, 256),))(
        rows, starts, ends, owner, place, programs, none, num_blocks, entries, num_rows, launch,
        most, STEPS=none.bit_length(), G=groups, SIZE=256,
    )  # fmt: skip
    return QueryLists(rows, seen, starts, ends, owner, place.argsort())
