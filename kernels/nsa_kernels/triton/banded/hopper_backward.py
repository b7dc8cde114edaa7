"""Gradients of attention to a band of keys on Hopper: the maths of backward.py, in Gluon.

With scores S = scale Q K^T, P = exp(S - lse) and dP = dO V^T:

    delta = rowsum(O dO)     dS = P (dP - delta)
    dQ = scale dS K          dK = scale dS^T Q         dV = P^T dO

A gate g makes g P of P in dS and dV, see shared/gates.py; in dQ, whose rows have one g each, it is
multiplied at the end.

Four kernels, each sum with one owner: `_hopper_prepare_kernel` writes delta and lse in lines of 64,
as TMA reads them; dq (hopper_dq.py) and dk and dv (hopper_dkv.py) recompute P; `_add_parts_kernel`
adds what programs of dk and dv left, in order. The two large ones are persistent and keep wgmma
busy behind exponentials, see their docstrings.

TMA reads boxes of whole tiles, and so rows of the next segment, of another document, or none. They
are masked where they become P, and set to zero where they enter a sum: keys in dQ, queries in dK
and dV.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.backward import (
    WORKSPACE,
    KeySums,
    few_keys,
)
from nsa_kernels.triton.banded.band import Band
from nsa_kernels.triton.banded.hopper_dkv import _hopper_dkv_kernel
from nsa_kernels.triton.banded.hopper_dq import Constants, _hopper_dq_kernel
from nsa_kernels.triton.banded.hopper_tables import KEYS, key_work, query_work
from nsa_kernels.triton.shared.arguments import head_rows, load_head_rows, load_rows
from nsa_kernels.triton.shared.arithmetic import PIECE, logit_scale
from nsa_kernels.triton.shared.custom_ops import empty_as
from nsa_kernels.triton.shared.gates import gate_rows, load_gate
from nsa_kernels.triton.shared.hopper import (
    WARPGROUP_ROWS,
    for_tma,
    head_tiles,
    host_part_width,
    lines,
    persistent_programs,
)
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles

# Keys of a tile of dq, and buffers: of keys in dq, of queries in dk and dv.
_BN, _KV_STAGES, _Q_STAGES = 64, 2, 3
# Of a thread: at the start, and in a warpgroup that multiplies.
_LAUNCH_REGISTERS, _REGISTERS = 168, 240


class Lines(NamedTuple):
    """Float32 numbers of rows by tile, each [G, tiles, 64]: lse log2(e), delta and the gate."""

    lse: Tensor
    delta: Tensor
    gate: Tensor


class RowConstants(NamedTuple):
    """What `_hopper_prepare_kernel` is compiled for; BM rows are BT tokens."""

    G: int
    R: int
    DV: int
    BT: int
    BM: int


@triton.jit(do_not_specialize=["num_tiles"])
def _hopper_prepare_kernel(o, do, lse, gate, delta, rows, tiles, num_tiles, C: tl.constexpr):
    """Lines of a tile of queries, 0 where it has no row, and delta [N, H]."""
    i_tile = tl.program_id(0)
    i_g = tl.program_id(1)
    first_row, num_tokens, _, _ = load_query_tile(tiles, i_tile)
    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, (i_g * C.R + o_m % C.R).to(tl.int64)
    m_m = token < num_tokens
    row = first_row + token
    row_head = row * (C.G * C.R) + head
    b_o = load_rows(o, row_head * C.DV, tl.arange(0, C.DV), m_m, C.DV, C.DV)  # [BM, DV]
    b_do = load_head_rows(do, row, head, m_m, C.DV, C.DV)  # [BM, DV]
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    b_lse = tl.load(lse + row_head, mask=m_m, other=0.0)
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
    to = (i_g.to(tl.int64) * num_tiles + i_tile) * C.BM + o_m
    tl.store(rows.lse + to, b_lse * 1.4426950408889634)
    tl.store(rows.delta + to, b_delta)
    tl.store(delta + row_head, b_delta, mask=m_m)
    if gate is not None:
        tl.store(rows.gate + to, load_gate(gate, row, head, m_m))


def hopper_backward(
    q_NHD: Tensor,
    k_EGD: Tensor,
    v_EGD: Tensor,
    o_NHD: Tensor,
    lse_NH: Tensor,
    do_NHD: Tensor,
    segments: QuerySegments,
    band: Band,
    scale: float,
    gate_NH: Tensor | None = None,
    into_NHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`banded_backward` where `runs_hopper_backward`: of q, k and v and delta [N, H]."""
    dq_NHD = empty_as(q_NHD) if into_NHD is None else into_NHD
    dk_EGD, dv_EGD, delta_NH = (empty_as(x) for x in (k_EGD, v_EGD, lse_NH))
    if not q_NHD.shape[0] or not k_EGD.shape[0]:
        return dq_NHD.zero_(), dk_EGD.zero_(), dv_EGD.zero_(), delta_NH.zero_()
    (_, heads, dk), (_, groups, dv) = q_NHD.shape, v_EGD.shape
    ratio = heads // groups
    C = Constants(
        groups, ratio, band.offset, band.stride, band.window, dk, dv, WARPGROUP_ROWS // ratio, _BN,
        _KV_STAGES, _Q_STAGES, few_keys(q_NHD), gate_NH is not None, _REGISTERS,
    )  # fmt: skip
    programs = persistent_programs(q_NHD, 1 << 30)
    scales = scale, logit_scale(q_NHD, scale)

    q_NHD, k_EGD, v_EGD, do_NHD = (for_tma(x) for x in (q_NHD, k_EGD, v_EGD, do_NHD))
    tiles = query_tiles(segments, C.BT, band.column)
    count = tiles.host.shape[0]
    lse, delta, *gate = lse_NH.new_empty(3 if C.GATED else 2, groups, count, WARPGROUP_ROWS)
    rows = Lines(lse, delta, gate[0] if C.GATED else delta)
    of_rows = RowConstants(groups, ratio, dv, C.BT, WARPGROUP_ROWS)
    launcher(_hopper_prepare_kernel, (count, groups))(
        o_NHD, head_rows(do_NHD), lse_NH, gate_rows(gate_NH), delta_NH, rows, tiles.table, count,
        C=of_rows, num_warps=4,
    )  # fmt: skip

    part = host_part_width(dk)
    q, dq = (head_tiles(x, C.BT, ratio, part) for x in (q_NHD, dq_NHD))
    do = head_tiles(do_NHD, C.BT, ratio, dv)
    k, v = head_tiles(k_EGD, _BN, 1, part), head_tiles(v_EGD, _BN, 1, dv)
    work = query_work(segments, band, C.BT)
    launcher(_hopper_dq_kernel, (min(programs, work.num_programs * groups),))(
        q, do, k, v, dq, dq_NHD, *rows, work.table, work.num_programs * groups, count, *scales, C,
        num_warps=4, maxnreg=_LAUNCH_REGISTERS,
    )  # fmt: skip

    most = max(1, WORKSPACE // (4 * KEYS * groups * (dk + dv)))
    keys = key_work(segments, band, C.BT, groups, programs, most)
    if keys.num_keys < k_EGD.shape[0]:  # Rows that no query sees.
        dk_EGD.zero_()
        dv_EGD.zero_()
    if not keys.launches:
        return dq_NHD, dk_EGD, dv_EGD, delta_NH

    sums = KeySums(dk_EGD, dv_EGD, KEYS, keys.launches[0], keys.parts, keys.sums, PIECE)
    by_line = [lines(x) for x in rows]
    first = 0
    for launch in keys.launches:
        grid = min(programs, launch * groups)
        launcher(_hopper_dkv_kernel, (grid,))(
            q, do, k, v, *by_line, *sums.workspace, keys.table[first:], launch * groups, grid,
            count * WARPGROUP_ROWS, *scales, C, num_warps=4, maxnreg=_LAUNCH_REGISTERS,
        )  # fmt: skip
        sums.add(first, first + launch)
        first += launch
    return dq_NHD, dk_EGD, dv_EGD, delta_NH
