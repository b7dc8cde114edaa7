"""How forward and dq of the selected branch walk a tile's blocks on Hopper: what both share.

A program takes tiles of 64 query rows, 64 / R neighbouring tokens with their R heads, and walks the
blocks that any of the tokens chose, as the plain kernels do. Loads bind those: four tokens that
choose by chance bring 32 KB of keys and values for products of 64 x 64 x D. So here a warp of its
own loads, by TMA, and two programs share a multiprocessor, 112 KB each at widths of 128. Keys and
values have a ring each; plain Triton has one number of stages for both.

q comes as the first tile of keys and goes to registers at once, where it costs 64 a thread at a
width of 128. That spares a tile of shared memory, and of its bandwidth, which would bind next, a
read of q for every block. (dq at a width of 192 has no registers for it.) Programs stay, and the
loading warp runs ahead into the next tile of queries while the warpgroup that multiplies ends this
one.

Whole blocks come first, blocks at the causal edge last. What TMA brings of those from behind a
document's end may be anything. Where a key is a column of a product it is masked there; where it is
a row, its zeros must not meet NaN, and it is set to zero in shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from nsa_kernels.triton.selected.blocks import own_and_fetched, with_rows
from nsa_kernels.triton.selected.lists import EDGES, BlockLists, entry_chosen_by, entry_row
from nsa_kernels.triton.shared.hopper import (
    WARPGROUP_ROWS,
    advance,
    channel_parts,
    for_tma,
    head_tiles,
    host_part_width,
    part_width,
    persistent_programs,
    row_tiles,
)
from nsa_kernels.triton.shared.tables import load_query_tile

ROWS = gl.constexpr(WARPGROUP_ROWS)  # of a tile of queries, and keys of a block
NUM_EDGES = gl.constexpr(EDGES)
PROGRAMS = 2  # of a multiprocessor
LAUNCH_REGISTERS = 128  # of a thread: two programs of eight warps fill the registers
LOAD_REGISTERS = gl.constexpr(24)  # of a thread that loads; one that multiplies has 232


class WalkConstants(NamedTuple):
    """What a walk is compiled for.

    G KV heads with R query heads each; widths DK and DV; LENGTH entries of a list. FETCHED: whether
    there are fetched blocks. K_STAGES, V_STAGES: tiles of keys and of values in flight.
    """

    G: int
    R: int
    DK: int
    DV: int
    LENGTH: int
    FETCHED: bool
    K_STAGES: int
    V_STAGES: int


class Source(NamedTuple):
    """In a kernel: descriptors of own and fetched rows, and their columns between two heads."""

    own: Any
    fetched: Any
    column: Any
    fetched_column: Any


class Walk(NamedTuple):
    """In a kernel: a tile of queries of one KV head, and its blocks.

    row: of the first token; tokens, position: how many and of the first. list: its entries, of
    which `whole` from NUM_EDGES on are seen whole, and `edges` from `skip` on are not.
    """

    g: Any
    row: Any
    tokens: Any
    position: Any
    list: Any
    whole: Any
    edges: Any
    skip: Any


@gluon.jit
def load_walk(p, tiles, blocks, num_tiles, C: gl.constexpr):
    """Piece of work p. Each has a block: where nobody chose any, one that is masked for all."""
    g = p // num_tiles
    i_tile = p % num_tiles
    row, tokens, position, _ = load_query_tile(tiles, i_tile)
    at = i_tile * C.G + g
    p_list = blocks.lists + at.to(gl.int64) * C.LENGTH
    whole = gl.load(blocks.counts + at)
    none_0 = (gl.load(p_list) == 0).to(gl.int32)
    none_1 = (gl.load(p_list + 1) == 0).to(gl.int32)
    edges = 2 - none_0 - none_1
    edges = gl.where(whole + edges == 0, 1, edges)
    return Walk(g, row, tokens, position, p_list, whole, edges, none_0)


@gluon.jit
def load_entry(walk, i):
    """The i-th entry of a walk; the last one's behind it."""
    i = gl.minimum(i, walk.whole + walk.edges - 1)
    at = gl.where(i < walk.whole, i + NUM_EDGES, i - walk.whole + walk.skip)
    return gl.load(walk.list + at)


@gluon.jit
def first_seen(walk, i):
    """How many keys of the i-th block, an edge, the first token sees; each later one sees one more.

    May be 0 or below, or beyond the block.
    """
    edge = (walk.position + 1) // ROWS + i - walk.whole + walk.skip
    return walk.position + 1 - edge * ROWS


@gluon.jit
def sees(entry, seen, token, EDGE: gl.constexpr, S_L: gl.constexpr):
    """Which keys of a block the tile's rows see: [64, 1], at an edge [64, 64].

    token [64]: of each row. seen: see `first_seen`, read at an edge.
    """
    b_seen = gl.expand_dims(entry_chosen_by(entry, token), 1)
    if EDGE:
        o_n = gl.arange(0, ROWS, layout=gl.SliceLayout(0, S_L))
        b_seen = b_seen & (gl.expand_dims(o_n, 0) < gl.expand_dims(seen + token, 1))
    return b_seen


@gluon.jit
def ask_for_rows(
    desc, walk, ring, tiles, stage, parity, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """Ask for the tile's rows of q, o or do in a stage of a ring. tiles: its, as [.., TT, R, D]."""
    PARTS: gl.constexpr = channel_parts(WIDTH)
    full = ring.full.index(stage)
    mbarrier.wait(ring.empty.index(stage), parity)
    mbarrier.expect(full, PARTS * desc.block_type.nbytes)
    for part in gl.static_range(PARTS):
        at = [walk.row.to(gl.int32), walk.g * C.R, part * part_width(WIDTH)]
        tma.async_copy_global_to_shared(desc, at, full, tiles.index(stage * PARTS + part))
    return advance(stage, parity, STAGES)


@gluon.jit
def ask_for_block(
    source, entry, g, num_own, ring, stage, parity, STAGES: gl.constexpr, WIDTH: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """Ask for the keys or values of a block in a stage of a ring."""
    PARTS: gl.constexpr = channel_parts(WIDTH)
    row = entry_row(entry).to(gl.int32)
    full = ring.full.index(stage)
    mbarrier.wait(ring.empty.index(stage), parity)
    mbarrier.expect(full, PARTS * source.own.block_type.nbytes)
    for part in gl.static_range(PARTS):
        to = ring.tiles.index(stage * PARTS + part)
        column = part * part_width(WIDTH)
        if C.FETCHED and row >= num_own:
            at = [row - num_own, g * source.fetched_column + column]
            tma.async_copy_global_to_shared(source.fetched, at, full, to)
        else:
            at = [row, g * source.column + column]
            tma.async_copy_global_to_shared(source.own, at, full, to)
    return advance(stage, parity, STAGES)


@gluon.jit
def free_read_stage(empty):
    """Free a stage that threads have loaded from, and whose numbers they have used.

    TMA writes to it next, by another way than loads read: the fence keeps the two in order.
    """
    fence_async_shared()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def store_rows(p_out, b_x, walk, DTYPE: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr):
    """The parts of the tile's rows [64, WIDTH] to out [N, H, WIDTH], as the registers hold them."""
    PARTS: gl.constexpr = channel_parts(WIDTH)
    PART: gl.constexpr = part_width(WIDTH)
    layout: gl.constexpr = b_x[0].type.layout
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    row_head = (walk.row + o_row // C.R) * (C.G * C.R) + walk.g * C.R + o_row % C.R
    p_out += gl.expand_dims(row_head * WIDTH, 1) + gl.expand_dims(o_d, 0)
    m_m = gl.expand_dims(o_row // C.R < walk.tokens, 1)
    for part in gl.static_range(PARTS):
        gl.store(p_out + part * PART, b_x[part].to(DTYPE), mask=m_m)


class WalkLaunch(NamedTuple):
    """What both kernels are launched with.

    sources: descriptors of k_own, v_own, k_fetched and v_fetched, and their columns between two
    heads. num_own: own rows. programs: of the grid.
    """

    sources: tuple[Any, ...]
    num_own: int
    programs: int
    constants: WalkConstants


def walk_launch(
    q_NHD: Tensor,
    tensors: list[Tensor],
    num_tiles: int,
    lists: BlockLists,
    stages: tuple[int, int],
) -> WalkLaunch:
    """tensors: k_own, v_own, k_fetched and v_fetched, of at least one row.

    lists: of num_tiles tiles of 64 / R tokens. stages: of keys and of values.
    """
    k, v = tensors[:2]
    num_own, fetched_rows = k.shape[0], tensors[2].shape[0]
    loaded = [for_tma(x) for x in with_rows(tensors)]
    descriptors = [row_tiles(x, WARPGROUP_ROWS, host_part_width(x.shape[2])) for x in loaded]
    columns = [x.stride(1) for x in loaded]
    groups, length = k.shape[1], lists.lists.shape[-1]
    C = WalkConstants(
        groups, q_NHD.shape[1] // groups, q_NHD.shape[2], v.shape[2], length, fetched_rows > 0,
        *stages,
    )  # fmt: skip
    programs = persistent_programs(q_NHD, num_tiles * groups, PROGRAMS)
    sources = (*own_and_fetched(descriptors), *own_and_fetched(columns))
    return WalkLaunch(sources, num_own, programs, C)


def query_rows(x_NHD: Tensor, ratio: int) -> Any:
    """Tiles of 64 rows of q, o or do, for TMA."""
    width = host_part_width(x_NHD.shape[2])
    return head_tiles(for_tma(x_NHD), WARPGROUP_ROWS // ratio, ratio, width)
