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
from nsa_kernels.triton.shared.shapes import cdiv, power_of_two
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
    candidates = power_of_two(tokens * num)
    length = EDGES + tokens * num
    at_once = max(1, LIST_CHOICES // candidates)
    warps = min(4, max(1, at_once * candidates // 256))
    shape, device = (tiles.shape[0], groups), selected_NGn.device
    blocks = BlockLists(
        torch.empty(*shape, length, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )
    lists = tiles.shape[0] * groups
    launcher(_block_lists_kernel, (cdiv(lists, at_once),))(
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
    of rows, BB blocks at a time. Choices are counted KG KV heads and BR rows at a time, and listed
    SR rows at a time.
    """

    G: int
    NUM: int
    PN: int
    BLOCK: int
    PC: int
    BB: int
    KG: int
    BR: int
    SR: int


class Counted(NamedTuple):
    """Choices of each chunk of rows.

    counts: int32 [chunks, G, B], how many rows of the chunk chose a block; later how many rows
    chose it in the chunks before. ranks: int32 [N, G, n], how many earlier rows of its chunk chose
    the same block. sums: int32 [G, tiles, chunks], the first counts over tiles of BB blocks.
    chunks: how many.
    """

    counts: Any
    ranks: Any
    sums: Any
    chunks: Any


@triton.jit(do_not_specialize=["num_rows", "rows", "num_blocks"])
def _count_choices_kernel(selected, bases, counted, num_rows, rows, num_blocks, C: tl.constexpr):
    """Counts and ranks of the choices of KG KV heads in a chunk of `rows` rows, and the sums.

    A warp adds the choices of one row after another to the counts, and what was there before is
    their rank. A row chooses a block once, and barriers order the rows, so the ranks follow from
    the choice alone. BR rows are under way at a time.
    """
    i_c = tl.program_id(0).to(tl.int64)
    first_g = tl.program_id(1).to(tl.int64) * C.KG
    groups = tl.minimum(C.G - first_g, C.KG)
    p_counts = counted.counts + (i_c * C.G + first_g) * num_blocks
    o_zero = tl.arange(0, 1024)
    size = groups * num_blocks
    for first in tl.range(0, size, 1024):
        zero = tl.zeros([1024], dtype=tl.int32)
        tl.store(p_counts + first + o_zero, zero, mask=first + o_zero < size)
    tl.debug_barrier()

    BR: tl.constexpr = C.BR
    o_r, o_c = tl.arange(0, BR), tl.arange(0, C.KG * C.PN)
    g, place = (o_c // C.PN).to(tl.int64), o_c % C.PN
    m_c = (g < groups) & (place < C.NUM)
    p_selected = selected.p + (first_g + g) * selected.stride_head + place
    p_ranks = counted.ranks + (first_g + g) * C.NUM + place
    begin = i_c * rows
    end = tl.minimum(begin + rows, num_rows)
    for first in tl.range(begin, end, BR):
        row = first + o_r
        m_row = row < end
        mask = m_row[:, None] & m_c[None, :]
        p_j = p_selected[None, :] + (row * selected.stride_row)[:, None]
        b_j = tl.load(p_j, mask=mask, other=-1)  # [BR, KG*PN]
        chosen = b_j >= 0
        base = tl.load(bases + row, mask=m_row, other=0)
        # What is no choice adds 0 to some count: then a mask hides whole rows, at compile time.
        o_count = tl.where(chosen, (g * num_blocks)[None, :] + base[:, None] + b_j, 0)
        rank = tl.zeros_like(b_j)
        for i in tl.static_range(BR):
            now = tl.broadcast_to((o_r == i)[:, None], b_j.shape)
            before = tl.atomic_add(p_counts + o_count, chosen.to(tl.int32), mask=now, sem="relaxed")
            rank = tl.where(now, before, rank)
            tl.debug_barrier()
        p_rank = p_ranks[None, :] + (row * (C.G * C.NUM))[:, None]
        tl.store(p_rank, rank, mask=chosen)

    tiles = tl.cdiv(num_blocks, C.BB)
    for i_g in tl.range(0, groups):
        p_sums = counted.sums + (first_g + i_g) * tiles * counted.chunks + i_c
        for start in tl.range(0, tiles, 1024 // C.BB):
            i_tile = start + tl.arange(0, 1024 // C.BB)
            o_b = i_tile[:, None] * C.BB + tl.arange(0, C.BB)[None, :]
            p_count = p_counts + i_g * num_blocks + o_b
            b_count = tl.load(p_count, mask=o_b < num_blocks, other=0, cache_modifier=".cg")
            tl.store(p_sums + i_tile * counted.chunks, tl.sum(b_count, 1), mask=i_tile < tiles)


@triton.jit(do_not_specialize=["num_blocks"])
def _starts_kernel(counted, starts, num_blocks, C: tl.constexpr):
    """Where the queries of BB blocks begin, and of each chunk's how many are before."""
    i_tile = tl.program_id(0)
    i_g = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(num_blocks, C.BB)
    earlier = (i_g * tiles + i_tile) * counted.chunks
    o_sum = tl.arange(0, 4096)
    b_sum = tl.zeros([4096], dtype=tl.int64)
    for first in tl.range(0, earlier, 4096):
        b_sum += tl.load(counted.sums + first + o_sum, mask=first + o_sum < earlier, other=0)
    start = tl.sum(b_sum, 0)

    o_c = tl.arange(0, C.PC)
    o_b = i_tile * C.BB + tl.arange(0, C.BB)
    p_chunk = counted.counts + (o_c.to(tl.int64) * C.G + i_g) * num_blocks
    p_counts = p_chunk[:, None] + o_b[None, :]
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
    """Rows and `seen` of the choices of SR rows and a KV head; and by one program `ends`.

    A choice stands behind those of earlier chunks and of earlier rows of its chunk.
    """
    if tl.program_id(0) == 0:
        if tl.program_id(1) == 0:
            _count_programs(queries.starts, queries.ends, num_blocks * C.G, most, 1024)
        return
    i_g = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) - 1).to(tl.int64) * C.SR + tl.arange(0, C.SR)
    o_n = tl.arange(0, C.PN)
    m_row = row < num_rows
    mask = m_row[:, None] & (o_n < C.NUM)[None, :]
    p_row = selected.p + row * selected.stride_row + i_g * selected.stride_head
    b_j = tl.load(p_row[:, None] + o_n[None, :], mask=mask, other=-1)  # [SR, PN]
    chosen = b_j >= 0
    b_id = b_j + tl.load(bases + row, mask=m_row, other=0)[:, None]
    i_c = (row.to(tl.int32) // rows).to(tl.int64)
    p_count = counted.counts + ((i_c * C.G + i_g) * num_blocks)[:, None] + b_id
    p_rank = counted.ranks + ((row * C.G + i_g) * C.NUM)[:, None] + o_n[None, :]
    at = tl.load(queries.starts + i_g * num_blocks + b_id, mask=chosen, other=0)
    at += tl.load(p_count, mask=chosen, other=0) + tl.load(p_rank, mask=chosen, other=0)
    b_length = tl.load(block_lengths + b_id, mask=chosen, other=0)
    b_seen = tl.load(row_positions + row, mask=m_row, other=0)[:, None] + 1 - b_j * C.BLOCK
    b_seen = tl.where(chosen, tl.minimum(tl.maximum(b_seen, 0), b_length), 0)
    several = tl.sum(b_seen, 1) > 1
    b_seen += tl.where(several, 256, 0)[:, None]
    tl.store(queries.rows + at, row.to(tl.int32)[:, None], mask=chosen)
    tl.store(queries.seen + at, b_seen.to(tl.int16), mask=chosen)


@triton.jit(do_not_specialize=["num_programs", "none", "num_blocks", "num_entries", "num_rows"])
def _programs_kernel(
    queries, place, num_programs, none, num_blocks, num_entries, num_rows, most,
    STEPS: tl.constexpr, G: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The block of each of SIZE programs, and what sorts a launch: KV head, first query, number.

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
    first += group * (num_rows + 1)
    tl.store(place + i_program, first * num_programs + i_program, mask=mask)


@triton.jit(do_not_specialize=["num_programs", "per_launch"])
def _order_kernel(place, order, num_programs, per_launch, SIZE: tl.constexpr, BK: tl.constexpr):
    """Where SIZE programs come in their launch, by `place`."""
    first = tl.program_id(1).to(tl.int64) * per_launch
    end = tl.minimum(first + per_launch, num_programs)
    i_program = first + tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = i_program < end
    b_place = tl.load(place + i_program, mask=mask, other=0)
    rank = tl.zeros([SIZE], dtype=tl.int32)
    for start in tl.range(first, end, BK):
        i_k = start + tl.arange(0, BK)
        b_k = tl.load(place + i_k, mask=i_k < end, other=9223372036854775807)
        rank += tl.sum((b_k[None, :] < b_place[:, None]).to(tl.int32), 1)  # [SIZE, BK]
    tl.store(order + first + rank, i_program, mask=mask)


# Chunks of rows of all KV heads. A chunk is counted row after row.
CHUNKS = 512


def query_lists(
    selected_NGn: Tensor,
    block_lengths_B: Tensor,
    segments: QuerySegments,
    select_block: int,
    most: int,
    per_launch: int,
) -> QueryLists:
    """For programs that walk over at most `most` queries of a block each, `per_launch` at a time.

    A counting sort: the choices of chunks of rows are counted by block, which ranks them within
    their chunk, the counts are summed up over blocks and chunks, and each choice goes to its place.
    """
    num_rows, groups, num = selected_NGn.shape
    num_blocks, device = block_lengths_B.shape[0], selected_NGn.device
    none, entries = groups * num_blocks, selected_NGn.numel()
    width = power_of_two(num)
    most_chunks, counted_rows = max(1, CHUNKS // groups), max(1, 512 // max(width, 32))
    padded_chunks = power_of_two(most_chunks)
    together = max(1, 32 // width)  # A warp counts those of a row at once.
    C = QueryConstants(
        groups, num, width, select_block, padded_chunks,
        min(1024, max(16, 8192 // padded_chunks)), together, counted_rows, max(1, 512 // width),
    )  # fmt: skip
    rows = counted_rows * cdiv(num_rows, counted_rows * most_chunks)
    chunks, tiles = cdiv(num_rows, rows), cdiv(num_blocks, C.BB)
    programs = min(none, entries) + entries // most

    def empty(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    counts, ranks, sums, listed_rows = (
        empty(x, torch.int32) for x in (none * chunks, entries, groups * tiles * chunks, entries)
    )
    counted = Counted(counts, ranks, sums, chunks)
    starts, ends, owner, order, place = map(empty, (none + 1, none, *[programs] * 3))
    queries = QueryLists(listed_rows, empty(entries, torch.int16), starts, ends, owner, order)
    selected, bases = head_rows(selected_NGn), selected_bases(segments)
    launcher(_count_choices_kernel, (chunks, cdiv(groups, together)))(
        selected, bases, counted, num_rows, rows, num_blocks, C=C, num_warps=1
    )
    launcher(_starts_kernel, (tiles, groups))(counted, starts, num_blocks, C=C, num_warps=8)
    launcher(_list_queries_kernel, (1 + cdiv(num_rows, C.SR), groups))(
        selected, positions(segments), bases, block_lengths_B, counted, queries, num_rows, rows,
        num_blocks, most, C=C,
    )  # fmt: skip
    launcher(_programs_kernel, (cdiv(programs, 256),))(
        queries, place, programs, none, num_blocks, entries, num_rows, most,
        STEPS=none.bit_length(), G=groups, SIZE=256,
    )  # fmt: skip
    in_launch = min(programs, per_launch)
    launcher(_order_kernel, (cdiv(in_launch, 32), cdiv(programs, per_launch)))(
        place, order, programs, per_launch, SIZE=32, BK=256
    )
    return queries
