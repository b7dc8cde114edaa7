"""Who meets whom in the selected branch: a tile's blocks, and a block's queries.

Forward and dq take a tile of neighbouring tokens of one segment and walk the blocks that any of
them chose, in ascending order: `block_lists`. dk and dv take a block and walk the queries that
chose it, in the order of their rows: `query_lists`. Both are made on the device from the choice,
with sizes that follow from shapes alone, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.shared.arguments import head_rows
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.tables import load_query_tile, positions, selected_bases

# Choices that a program sorts, of one tile or several.
LIST_CHOICES = 1024
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
    which the first EDGES are edges; BL lists of a program; BT tokens of a tile, with BC >= BT*NUM
    choices.
    """

    G: int
    NUM: int
    BLOCK: int
    LENGTH: int
    EDGES: int
    BL: int
    BT: int
    BC: int


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
    selected, block_rows, stride_group, block_lengths, tiles, blocks, num_lists, C: tl.constexpr
):
    """The lists of BL neighbours among all pairs of a tile and a KV head, to `blocks`.

    A list's choices are sorted by block, then token. The first of each run of one block writes the
    entry, with the bits of all tokens of the run, which are all different.
    """
    NONE: tl.constexpr = 134217727  # 2**27 - 1: with 4 bits for the token the largest int32.
    o_list = tl.program_id(0).to(tl.int64) * C.BL + tl.arange(0, C.BL)
    m_list = o_list < num_lists
    i_list = tl.minimum(o_list, num_lists - 1)
    i_g = i_list % C.G
    first_row, num_tokens, position, base = load_query_tile(tiles, i_list // C.G)  # [BL]
    last = position + num_tokens - 1
    first_edge = (position + 1) // C.BLOCK  # Blocks before are seen whole by all.
    p_selected = selected.p + first_row * selected.stride_row + i_g * selected.stride_head
    p_rows = block_rows + i_g * stride_group + base
    p_list = blocks.lists + i_list * C.LENGTH

    o_c = tl.arange(0, C.BC)
    token = o_c // C.NUM
    p_c = p_selected[:, None] + (token.to(tl.int64) * selected.stride_row + o_c % C.NUM)[None, :]
    b_j = tl.load(p_c, mask=token[None, :] < num_tokens[:, None], other=-1).to(tl.int32)  # [BL, BC]
    token = token & 15  # Places behind BT*NUM hold no choice.

    EDGES: tl.constexpr = C.EDGES
    for i in tl.static_range(EDGES):
        j = first_edge + i
        choosers = tl.sum(tl.where(b_j == j[:, None], (1 << token)[None, :], 0), 1)
        chosen = choosers > 0
        length = tl.load(block_lengths + base + j, mask=chosen, other=0).to(tl.int32)
        length = tl.minimum(length, last + 1 - j * C.BLOCK)
        entry = make_entry(tl.load(p_rows + j, mask=chosen, other=0), length, choosers)
        tl.store(p_list + i, tl.where(chosen, entry, 0), mask=m_list)

    inner = (b_j >= 0) & (b_j < first_edge[:, None])
    choice = tl.sort(tl.where(inner, b_j, NONE) * 16 + token[None, :], 1)
    b_j = choice >> 4
    o_before = tl.broadcast_to(tl.maximum(o_c - 1, 0)[None, :], [C.BL, C.BC])
    first = (b_j != NONE) & ((o_c == 0)[None, :] | (b_j != tl.gather(b_j, o_before, 1)))
    run = tl.cumsum(first.to(tl.int32), 1)
    # Bits are collected over 1, 2, 4, .. places of a run, whose number stands above them.
    run_bits = run * 65536 + tl.where(b_j != NONE, 1 << (choice & 15), 0)
    for i in tl.static_range(4):
        if (1 << i) < C.BT:
            o_other = tl.broadcast_to(tl.minimum(o_c + (1 << i), C.BC - 1)[None, :], [C.BL, C.BC])
            other = tl.gather(run_bits, o_other, 1)
            run_bits |= tl.where((other >> 16) == (run_bits >> 16), other, 0)
    row = tl.load(p_rows[:, None] + b_j, mask=first, other=0)
    entry = make_entry(row, C.BLOCK, run_bits & 65535)
    p_entry = p_list[:, None] + C.EDGES - 1 + run
    tl.store(p_entry, entry, mask=first & m_list[:, None])
    tl.store(blocks.counts + o_list, tl.sum(first.to(tl.int32), 1), mask=m_list)


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
    at_once = max(1, LIST_CHOICES // candidates)
    warps = min(4, max(1, at_once * candidates // 256))
    shape, device = (len(tiles), groups), selected_NGn.device
    blocks = BlockLists(
        torch.empty(*shape, length, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )
    lists = len(tiles) * groups
    launcher(_block_lists_kernel, (triton.cdiv(lists, at_once),))(
        head_rows(selected_NGn), block_rows_GB, block_rows_GB.stride(0), block_lengths_B, tiles,
        blocks, lists,
        C=ListConstants(
            groups, num, select_block, length, EDGES, at_once, tokens, candidates
        ),
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


class QueryConstants(NamedTuple):
    """What the lists of queries are compiled for.

    G KV heads; NUM chosen blocks of a token, padded to PN, of BLOCK tokens each. At most PC chunks
    of rows, BB blocks at a time. Where choices are counted BR rows at a time; where they are listed
    SR, with BC choices, compared with BK at a time.
    """

    G: int
    NUM: int
    PN: int
    BLOCK: int
    PC: int
    BB: int
    BR: int
    SR: int
    BC: int
    BK: int


class Counted(NamedTuple):
    """Choices of each chunk of rows.

    counts: int32 [G, chunks, B], how many rows of the chunk chose a block; later how many rows
    chose it before those of the chunk that are still to be listed. sums: int32 [G, tiles, chunks],
    the first over tiles of BB blocks. chunks: how many.
    """

    counts: Any
    sums: Any
    chunks: Any


@triton.jit(do_not_specialize=["num_rows", "rows", "num_blocks"])
def _count_choices_kernel(selected, bases, counted, num_rows, rows, num_blocks, C: tl.constexpr):
    """How often each block was chosen in a chunk of `rows` rows, and these numbers by tile."""
    i_c = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    p_counts = counted.counts + (i_g * counted.chunks + i_c) * num_blocks
    BB: tl.constexpr = C.BB
    o_b = tl.arange(0, BB)
    for first in tl.range(0, num_blocks, BB):
        zero = tl.zeros([BB], dtype=tl.int32)
        tl.store(p_counts + first + o_b, zero, mask=first + o_b < num_blocks)
    tl.debug_barrier()
    begin = i_c * rows
    end = tl.minimum(begin + rows, num_rows)
    o_n = tl.arange(0, C.PN)
    for first in tl.range(begin, end, C.BR):
        row = first + tl.arange(0, C.BR)
        m_row = row < end
        mask = m_row[:, None] & (o_n < C.NUM)[None, :]
        p_j = selected.p + (row * selected.stride_row + i_g * selected.stride_head)[:, None]
        b_j = tl.load(p_j + o_n[None, :], mask=mask, other=-1)  # [BR, PN]
        base = tl.load(bases + row, mask=m_row, other=0)
        # Which of them comes first does not matter to a sum.
        p_count = p_counts + base[:, None] + b_j
        tl.atomic_add(p_count, tl.full(b_j.shape, 1, tl.int32), mask=b_j >= 0, sem="relaxed")
    tl.debug_barrier()
    tiles = tl.cdiv(num_blocks, C.BB)
    for i_tile in tl.range(0, tiles):
        o = i_tile * C.BB + o_b
        b_count = tl.load(p_counts + o, mask=o < num_blocks, other=0, cache_modifier=".cg")
        tl.store(counted.sums + (i_g * tiles + i_tile) * counted.chunks + i_c, tl.sum(b_count, 0))


@triton.jit(do_not_specialize=["num_blocks"])
def _starts_kernel(counted, starts, num_blocks, C: tl.constexpr):
    """Where the queries of BB blocks begin, and of each chunk's how many are before."""
    i_tile = tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(num_blocks, C.BB)
    earlier = (i_g * tiles + i_tile) * counted.chunks
    o_sum = tl.arange(0, 1024)
    b_sum = tl.zeros([1024], dtype=tl.int64)
    for first in tl.range(0, earlier, 1024):
        b_sum += tl.load(counted.sums + first + o_sum, mask=first + o_sum < earlier, other=0)
    start = tl.sum(b_sum, 0)

    o_c = tl.arange(0, C.PC)
    o_b = i_tile * C.BB + tl.arange(0, C.BB)
    p_counts = counted.counts + (i_g * counted.chunks + o_c[:, None]) * num_blocks + o_b[None, :]
    mask = (o_c < counted.chunks)[:, None] & (o_b < num_blocks)[None, :]
    b_count = tl.load(p_counts, mask=mask, other=0)  # [PC, BB]
    b_before = tl.cumsum(b_count, 0) - b_count
    tl.store(p_counts, b_before, mask=mask)
    b_all = tl.sum(b_count, 0).to(tl.int64)
    b_end = start + tl.cumsum(b_all, 0)
    p_starts = starts + i_g * num_blocks + o_b
    tl.store(p_starts, b_end - b_all, mask=o_b < num_blocks)
    if i_g == C.G - 1:
        tl.store(p_starts + 1, b_end, mask=o_b == num_blocks - 1)


@triton.jit
def _count_programs(starts, ends, none, most, SIZE: tl.constexpr):
    """`QueryLists.ends` of all blocks."""
    before = tl.cast(0, tl.int64)
    for first in tl.range(0, none, SIZE):
        o = first + tl.arange(0, SIZE)
        mask = o < none
        b_start = tl.load(starts + o, mask=mask, other=0)
        b_end = tl.load(starts + o + 1, mask=mask, other=0)
        b_programs = (b_end - b_start + most - 1) // most
        tl.store(ends + o, before + tl.cumsum(b_programs, 0), mask=mask)
        before += tl.sum(b_programs, 0)


@triton.jit(do_not_specialize=["num_rows", "rows", "num_blocks"])
def _list_queries_kernel(
    selected, row_positions, bases, block_lengths, counted, queries, num_rows, rows, num_blocks,
    most, C: tl.constexpr,
):  # fmt: skip
    """Rows and `seen` of a chunk's choices, in the order of rows; and by one program `ends`."""
    if tl.program_id(0) == 0:
        if tl.program_id(1) == 0:
            _count_programs(queries.starts, queries.ends, num_blocks * C.G, most, 1024)
        return
    i_c = (tl.program_id(0) - 1).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    p_starts = queries.starts + i_g * num_blocks
    p_counts = counted.counts + (i_g * counted.chunks + i_c) * num_blocks
    begin = i_c * rows
    end = tl.minimum(begin + rows, num_rows)
    SR: tl.constexpr = C.SR
    PN: tl.constexpr = C.PN
    BC: tl.constexpr = C.BC
    o_c = tl.arange(0, BC)
    for first in tl.range(begin, end, SR):
        row = first + o_c // C.PN
        place = o_c % C.PN
        m_c = (row < end) & (place < C.NUM)
        p_row = selected.p + i_g * selected.stride_head + row * selected.stride_row
        b_j = tl.load(p_row + place, mask=m_c, other=-1)
        chosen = b_j >= 0
        b_id = b_j + tl.load(bases + row, mask=m_c, other=0)
        b_id = tl.where(chosen, b_id, -1)
        rank = tl.zeros_like(b_j)  # How many choices of the same block come before, of these,
        total = tl.zeros_like(b_j)  # and how many there are.
        for start in tl.range(0, C.BC, C.BK):
            o_k = start + tl.arange(0, C.BK)
            row_k = first + o_k // C.PN
            m_k = (row_k < end) & (o_k % C.PN < C.NUM)
            p_k = selected.p + i_g * selected.stride_head + row_k * selected.stride_row
            b_k = tl.load(p_k + o_k % C.PN, mask=m_k, other=-1)
            k_id = b_k + tl.load(bases + row_k, mask=m_k, other=0)
            k_id = tl.where(b_k >= 0, k_id, -2)
            same = b_id[:, None] == k_id[None, :]  # [BC, BK]
            total += tl.sum(same.to(tl.int32), 1)
            rank += tl.sum((same & (o_k[None, :] < o_c[:, None])).to(tl.int32), 1)
        before = tl.load(p_counts + b_id, mask=chosen, other=0, cache_modifier=".cg")
        at = tl.load(p_starts + b_id, mask=chosen, other=0) + before + rank
        b_length = tl.load(block_lengths + b_id, mask=chosen, other=0)
        b_seen = tl.load(row_positions + row, mask=m_c, other=0) + 1 - b_j * C.BLOCK
        b_seen = tl.where(chosen, tl.minimum(tl.maximum(b_seen, 0), b_length), 0)
        b_sums = tl.sum(tl.reshape(b_seen, [SR, PN]), 1)[:, None]  # of a row
        b_sums = tl.reshape(tl.broadcast_to(b_sums, [SR, PN]), [BC])
        b_seen += tl.where(b_sums > 1, 256, 0)
        tl.store(queries.rows + at, row.to(tl.int32), mask=chosen)
        tl.store(queries.seen + at, b_seen.to(tl.int16), mask=chosen)
        # All have read what one of them changes.
        tl.debug_barrier()
        tl.store(p_counts + b_id, before + total, mask=chosen & (rank == total - 1))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_programs", "none", "num_blocks", "num_entries", "num_rows"])
def _programs_kernel(
    queries, place, num_programs, none, num_blocks, num_entries, num_rows, most,
    STEPS: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The block of each of SIZE programs, and what sorts those of a launch: KV head, first query.

    none: how many blocks there are, < 2**STEPS. Programs too many come after all others.
    """
    i_program = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i_program < num_programs
    low = tl.zeros([SIZE], dtype=tl.int32)  # How many blocks end at or before this program.
    for step in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - step))
        end = tl.load(queries.ends + middle - 1, mask=middle <= none, other=9223372036854775807)
        low = tl.where(end <= i_program, middle, low)
    last = tl.minimum(low, none - 1)
    before = tl.load(queries.ends + last - 1, mask=last > 0, other=0)
    entry = tl.load(queries.starts + last) + (i_program - before) * most
    first = tl.load(queries.rows + tl.minimum(entry, num_entries - 1), mask=low < none, other=0)
    first = tl.where(low < none, first, num_rows).to(tl.int64)
    tl.store(queries.owner + i_program, low.to(tl.int64), mask=mask)
    group = tl.where(low < none, last // num_blocks, G).to(tl.int64)
    tl.store(place + i_program, group * (num_rows + 1) + first, mask=mask)


@triton.jit(do_not_specialize=["num_programs", "per_launch"])
def _order_kernel(place, order, num_programs, per_launch, SIZE: tl.constexpr, BK: tl.constexpr):
    """Where SIZE programs come in their launch, by `place`, then by number."""
    first = tl.program_id(1).to(tl.int64) * per_launch
    end = tl.minimum(first + per_launch, num_programs)
    i_program = first + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i_program < end
    b_place = tl.load(place + i_program, mask=mask, other=0)
    rank = tl.zeros([SIZE], dtype=tl.int32)
    for start in tl.range(first, end, BK):
        i_k = start + tl.arange(0, BK)
        b_k = tl.load(place + i_k, mask=i_k < end, other=9223372036854775807)
        less = b_k[None, :] < b_place[:, None]  # [SIZE, BK]
        earlier = (b_k[None, :] == b_place[:, None]) & (i_k[None, :] < i_program[:, None])
        rank += tl.sum((less | earlier).to(tl.int32), 1)
    tl.store(order + first + rank, i_program, mask=mask)


# Programs that count and list choices, each a chunk of rows of a KV head.
CHUNK_PROGRAMS = 512


def query_lists(
    selected_NGn: Tensor,
    block_lengths_B: Tensor,
    segments: QuerySegments,
    select_block: int,
    most: int,
    per_launch: int,
) -> QueryLists:
    """For programs that walk over at most `most` queries of a block each, `per_launch` at a time.

    A counting sort: choices of chunks of rows are counted by block, summed up over blocks and
    chunks, and written to their places by programs that each take a chunk in the order of its rows.
    """
    num_rows, groups, num = selected_NGn.shape
    num_blocks, device = block_lengths_B.shape[0], selected_NGn.device
    none, entries = groups * num_blocks, selected_NGn.numel()
    width = triton.next_power_of_2(num)
    most_chunks, listed = max(1, CHUNK_PROGRAMS // groups), max(1, 256 // width)
    padded_chunks = triton.next_power_of_2(most_chunks)
    C = QueryConstants(
        groups, num, width, select_block, padded_chunks, max(16, 8192 // padded_chunks),
        max(1, 1024 // width), listed, listed * width, 16,
    )  # fmt: skip
    rows = listed * triton.cdiv(num_rows, listed * most_chunks)
    chunks, tiles = triton.cdiv(num_rows, rows), triton.cdiv(num_blocks, C.BB)
    programs = min(none, entries) + entries // most

    def empty(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    counts, sums, listed_rows = (
        empty(x, torch.int32) for x in (none * chunks, groups * tiles * chunks, entries)
    )
    counted = Counted(counts, sums, chunks)
    starts, ends, owner, order, place = map(empty, (none + 1, none, *[programs] * 3))
    queries = QueryLists(listed_rows, empty(entries, torch.int16), starts, ends, owner, order)
    selected, bases = head_rows(selected_NGn), selected_bases(segments)
    launcher(_count_choices_kernel, (chunks, groups))(
        selected, bases, counted, num_rows, rows, num_blocks, C=C
    )
    launcher(_starts_kernel, (tiles, groups))(counted, starts, num_blocks, C=C, num_warps=8)
    launcher(_list_queries_kernel, (chunks + 1, groups))(
        selected, positions(segments), bases, block_lengths_B, counted, queries, num_rows, rows,
        num_blocks, most, C=C,
    )  # fmt: skip
    launcher(_programs_kernel, (triton.cdiv(programs, 256),))(
        queries, place, programs, none, num_blocks, entries, num_rows, most,
        STEPS=none.bit_length(), G=groups, SIZE=256,
    )  # fmt: skip
    in_launch = min(programs, per_launch)
    launcher(_order_kernel, (triton.cdiv(in_launch, 32), triton.cdiv(programs, per_launch)))(
        place, order, programs, per_launch, SIZE=32, BK=256
    )
    return queries
