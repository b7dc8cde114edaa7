"""Gradients of attention to a band of keys: see forward.py.

dq has a program for each query tile, dk and dv one for each key tile and run of query tiles that
see it. Both compute the probabilities P again from the log-sum-exp: dP = do v^T,
dS = P (dP - delta) with delta = sum of o do, dq = scale dS k, dk = scale dS^T q, dv = P^T do. Each
sum has one owner; long lists of query tiles are shared out and their sums added in order.

A gate g makes g P of P, see shared/gates.py. Where queries are rows, it multiplies what is summed;
dk and dv read it from where dq left it: with few keys divided by the sum of P, which is not quite
1, since the log-sum-exp was rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.segments import QuerySegments
from nsa_kernels.triton.banded.band import (
    Band,
    TileKeys,
    constants,
    load_k,
    load_v,
    num_seen,
    sees,
    sees_several,
)
from nsa_kernels.triton.banded.key_tiles import key_tiles
from nsa_kernels.triton.shared.arguments import head_rows, load_head_rows, load_rows
from nsa_kernels.triton.shared.arithmetic import (
    add_dot,
    add_tiles,
    filled,
    logit_scale,
    power,
    zeros,
)
from nsa_kernels.triton.shared.custom_ops import empty_as
from nsa_kernels.triton.shared.gates import gate_rows, load_gate
from nsa_kernels.triton.shared.launch import launcher
from nsa_kernels.triton.shared.shapes import MOST_REGISTERS, banded_tiles, padded
from nsa_kernels.triton.shared.tables import load_query_tile, query_tiles

# Bytes for what programs of dk and dv leave to be added; more programs run in several launches.
WORKSPACE = 256 << 20


class TileQueries(NamedTuple):
    """The query rows of a tile, in a kernel: q [BM, PDK], do [BM, PDV], lse and positions [BM]."""

    b_q: Any
    b_do: Any
    b_lse: Any
    b_t: Any


class PartialSums(NamedTuple):
    """Float32 sums over query tiles for dk or dv, each [.., BN, G, D].

    workspace: of the programs of this launch; carried: of earlier ones of the key tile that is cut
    by its start; carry: for later ones. out: the gradient [E, G, D].
    """

    workspace: Any
    carried: Any
    carry: Any
    out: Any


class SumConstants(NamedTuple):
    """What the sum of partial sums is compiled for: BR rows of BN keys at a time; the rest as in
    band.Constants."""

    G: int
    BN: int
    BR: int
    DK: int
    PDK: int
    DV: int
    PDV: int
    PIECE: int


@triton.jit
def _probabilities(queries, b_k, b_v, o_j, logit_scale, C: tl.constexpr):
    """P, 0 where the query does not see the key, and dP, both [BM, BN]."""
    b_s = tl.dot(queries.b_q, tl.trans(b_k), input_precision=C.PRECISION)  # [BM, BN]
    seen = sees(queries.b_t[:, None], o_j[None, :], C)
    b_p = power(tl.fma(b_s, logit_scale, -queries.b_lse[:, None]), C)
    b_p = tl.where(seen, b_p, 0.0)
    b_dp = tl.dot(queries.b_do, tl.trans(b_v), input_precision=C.PRECISION)  # [BM, BN]
    return b_p, tl.where(seen, b_dp, 0.0)


@triton.jit
def _delta_tiles(b_delta, b_sum, queries, keys, begin, end, logit_scale, C: tl.constexpr):
    """Add P dP and P of each key tile in [begin, end) to delta and sum."""
    for start in tl.range(begin, end, C.BN):
        o_j = start + tl.arange(0, C.BN)
        b_k = load_k(keys, o_j, C)  # [BN, PDK]
        b_v = load_v(keys, o_j, C)  # [BN, PDV]
        b_p, b_dp = _probabilities(queries, b_k, b_v, o_j, logit_scale, C)
        b_delta += tl.sum(b_p * b_dp, 1)
        b_sum += tl.sum(b_p, 1)
    return b_delta, b_sum


@triton.jit
def _dq_tiles(b_dq, b_rest, queries, b_delta, keys, begin, end, logit_scale, C: tl.constexpr):
    """Add dS K of each key tile in [begin, end) to dq, and dS itself to rest."""
    for start in tl.range(begin, end, C.BN):
        o_j = start + tl.arange(0, C.BN)
        b_k = load_k(keys, o_j, C)  # [BN, PDK]
        b_v = load_v(keys, o_j, C)  # [BN, PDV]
        b_p, b_dp = _probabilities(queries, b_k, b_v, o_j, logit_scale, C)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_rest += tl.sum(b_ds, 1)
        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, C)  # [BM, PDK]
    return b_dq, b_rest


@triton.jit
def _load_lse(lse, o, mask, C: tl.constexpr):
    """The log-sum-exp as `power` counts; 0, not -inf, where no key is seen."""
    b_lse = tl.load(lse + o, mask=mask, other=0.0)
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
    return b_lse if C.PRECISION == "ieee" else b_lse * 1.4426950408889634


@triton.jit(do_not_specialize=["num_tiles"])
def _dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    gate,
    tiles,
    num_tiles,
    scale,
    logit_scale,
    FEW_KEYS: tl.constexpr,
    C: tl.constexpr,
):
    """dq of one tile of queries, and for dk and dv the delta, a gate's gradient.

    With at most FEW_KEYS keys delta is the mean of dP under P, in a walk of its own: dP and delta
    may cancel there, and then the rounding of o and of the log-sum-exp would be what is left.
    With more, what the rounding of o leaves of the sum of dS goes into the delta for dk and dv:
    each query's dS then add up to 0, and so does what they give to sums over many keys, such as the
    gradient of a compressor's position embedding, in which it would outgrow the rest.
    """
    i_tile = num_tiles - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    first_row, num_tokens, position, base = load_query_tile(tiles, i_tile)

    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, (i_g * C.R + o_m % C.R).to(tl.int64)
    m_m = (token < num_tokens) & (token < C.BT)
    row = first_row + token
    b_t = position + token
    b_q = load_head_rows(q, row, head, m_m, C.DK, C.PDK)  # [BM, PDK]
    b_do = load_head_rows(do, row, head, m_m, C.DV, C.PDV)  # [BM, PDV]
    row_head = row * (C.G * C.R) + head
    queries = TileQueries(b_q, b_do, _load_lse(lse, row_head, m_m, C), b_t)
    last = position + num_tokens - 1
    limit = num_seen(last, C)
    first = 0
    if C.WINDOW > 0:
        first = tl.maximum(position - C.WINDOW + 1, 0)
    begin = first // C.BN * C.BN
    p_k = k.p + i_g.to(tl.int64) * k.stride_head
    p_v = v.p + i_g.to(tl.int64) * v.stride_head
    keys = TileKeys(p_k, p_v, k.stride_row, v.stride_row, base, first, limit)
    b_o = load_rows(o, row_head * C.DV, tl.arange(0, C.PDV), m_m, C.DV, C.PDV)  # [BM, PDV]
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if limit - begin <= FEW_KEYS:
        b_delta = filled(C.BM, 0.0)
        b_sum = filled(C.BM, 0.0)
        for piece in tl.range(begin, limit, C.PIECE * C.BN):
            stop = tl.minimum(piece + C.PIECE * C.BN, limit)
            b_delta_piece, b_sum_piece = _delta_tiles(
                filled(C.BM, 0.0), filled(C.BM, 0.0), queries, keys, piece, stop, logit_scale, C
            )
            b_delta += b_delta_piece
            b_sum += b_sum_piece
        b_delta /= tl.where(b_sum == 0.0, 1.0, b_sum)
    b_dq = zeros(C.BM, C.PDK)
    b_rest = filled(C.BM, 0.0)
    for piece in tl.range(begin, limit, C.PIECE * C.BN):
        stop = tl.minimum(piece + C.PIECE * C.BN, limit)
        b_dq_piece, b_rest_piece = _dq_tiles(
            zeros(C.BM, C.PDK), filled(C.BM, 0.0), queries, b_delta, keys, piece, stop,
            logit_scale, C,
        )  # fmt: skip
        b_dq += b_dq_piece
        b_rest += b_rest_piece
    tl.store(delta + row_head, b_delta + b_rest, mask=m_m)
    b_dq *= scale
    if gate is not None:
        b_dq *= load_gate(gate, row, head, m_m)[:, None]
    b_dq = tl.where(sees_several(b_t, C)[:, None], b_dq, 0.0)
    o_dk = tl.arange(0, C.PDK)
    p_dq = dq + row_head[:, None] * C.DK + o_dk[None, :]
    tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_m[:, None] & (o_dk < C.DK)[None, :])


@triton.jit(do_not_specialize=["first_program"])
def _dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    gate,
    tiles,
    programs,
    first_program,
    scale,
    logit_scale,
    C: tl.constexpr,
):
    """dK, dV of one key tile from a run of query tiles, at most a piece, to a float32 workspace."""
    i_program = first_program + tl.program_id(0)
    i_g = tl.program_id(1)
    base = tl.load(programs + i_program * 6)
    first_key = tl.load(programs + i_program * 6 + 1).to(tl.int32)
    end_key = tl.load(programs + i_program * 6 + 2).to(tl.int32)
    first_tile = tl.load(programs + i_program * 6 + 3).to(tl.int32)
    end_tile = tl.load(programs + i_program * 6 + 4).to(tl.int32)
    # Every program has a tile. Where the loop may be empty, ptxas makes each wgmma wait for the
    # one before.
    if first_tile >= end_tile:
        return

    o_dk = tl.arange(0, C.PDK)
    o_dv = tl.arange(0, C.PDV)
    o_n = tl.arange(0, C.BN)
    o_j = first_key // C.BN * C.BN + o_n
    m_j = (o_j >= first_key) & (o_j < end_key)
    key_row = base + o_j.to(tl.int64)
    i_g_wide = i_g.to(tl.int64)
    p_k = k.p + i_g_wide * k.stride_head
    p_v = v.p + i_g_wide * v.stride_head
    b_k = load_rows(p_k, key_row * k.stride_row, o_dk, m_j, C.DK, C.PDK)  # [BN, PDK]
    b_v = load_rows(p_v, key_row * v.stride_row, o_dv, m_j, C.DV, C.PDV)  # [BN, PDV]

    o_m = tl.arange(0, C.BM)
    token, head = o_m // C.R, (i_g * C.R + o_m % C.R).to(tl.int64)
    b_dk = zeros(C.BN, C.PDK)
    b_dv = zeros(C.BN, C.PDV)
    for i_tile in tl.range(first_tile, end_tile):
        p_tile = tiles + i_tile * 4
        first_row = tl.load(p_tile)
        num_tokens = tl.load(p_tile + 1).to(tl.int32)
        position = tl.load(p_tile + 2).to(tl.int32)
        m_m = (token < num_tokens) & (token < C.BT)
        row = first_row + token
        b_q = load_head_rows(q, row, head, m_m, C.DK, C.PDK)  # [BM, PDK]
        b_do = load_head_rows(do, row, head, m_m, C.DV, C.PDV)  # [BM, PDV]
        row_head = row * (C.G * C.R) + head
        b_lse = _load_lse(lse, row_head, m_m, C)
        b_delta = tl.load(delta + row_head, mask=m_m, other=0.0)
        b_t = position + token
        seen = sees(b_t[None, :], o_j[:, None], C)
        seen = seen & m_m[None, :] & m_j[:, None]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=C.PRECISION)  # [BN, BM]
        b_p = power(tl.fma(b_s, logit_scale, -b_lse[None, :]), C)
        several = sees_several(b_t, C)[None, :]
        if C.PRECISION == "ieee":
            b_p = tl.where(several, b_p, 1.0)
        b_p = tl.where(seen, b_p, 0.0)
        if gate is not None:
            b_p *= load_gate(gate, row, head, m_m)[None, :]
        b_dv = add_dot(b_dv, b_p.to(b_do.dtype), b_do, C)  # [BN, PDV]
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=C.PRECISION)  # [BN, BM]
        b_ds = tl.where(seen & several, b_p * (b_dp - b_delta[None, :]), 0.0)
        b_dk = add_dot(b_dk, b_ds.to(b_q.dtype), b_q, C)  # [BN, PDK]

    b_dk *= scale
    row = tl.program_id(0).to(tl.int64) * C.BN + o_n
    p_dk = dk + (row * C.G + i_g)[:, None] * C.DK + o_dk[None, :]
    p_dv = dv + (row * C.G + i_g)[:, None] * C.DV + o_dv[None, :]
    tl.store(p_dk, b_dk, mask=m_j[:, None] & (o_dk < C.DK)[None, :])
    tl.store(p_dv, b_dv, mask=m_j[:, None] & (o_dv < C.DV)[None, :])


@triton.jit
def _add_parts(
    parts, sums, programs, i_rows, first_program, end_program, D: tl.constexpr, PD: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Rows i_rows*BR.. of one key tile, of dk or dv: see `_add_parts_kernel`."""
    i_key = tl.program_id(0)
    i_g = tl.program_id(1)
    begin, end = tl.load(parts + i_key), tl.load(parts + i_key + 1)
    low = tl.maximum(begin, first_program)
    high = tl.minimum(end, end_program)
    if low < high:
        base = tl.load(programs + begin * 6)
        first_key = tl.load(programs + begin * 6 + 1).to(tl.int32)
        end_key = tl.load(programs + begin * 6 + 2).to(tl.int32)
        o_n = i_rows * C.BR + tl.arange(0, C.BR)
        o_d = tl.arange(0, PD)
        o_j = first_key // C.BN * C.BN + o_n
        mask = ((o_j >= first_key) & (o_j < end_key))[:, None] & (o_d < D)[None, :]
        o_in = (o_n * C.G + i_g)[:, None] * D + o_d[None, :]  # in the BN rows of a program
        b_sum = zeros(C.BR, PD)
        if begin < low:
            b_sum = tl.load(sums.carried + o_in, mask=mask, other=0.0)
        b_sum = add_tiles(
            b_sum, sums.workspace + o_in, (low - first_program).to(tl.int64),
            (high - first_program).to(tl.int64), C.BN * C.G * D, mask, C.PIECE,
        )  # fmt: skip
        if end > high:
            tl.store(sums.carry + o_in, b_sum, mask=mask)
        else:
            row = base + o_j.to(tl.int64)
            p_out = sums.out + (row * C.G + i_g)[:, None] * D + o_d[None, :]
            tl.store(p_out, b_sum.to(sums.out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_program", "end_program"])
def _add_parts_kernel(
    parts, dk_sums, dv_sums, programs, first_program, end_program, C: tl.constexpr
):
    """Add what programs first_program..end_program-1 of one key tile left, in their order.

    On top of `carried`, what earlier programs of the key tile left; to `carry` when more will come.
    The first BN/BR programs of the last dimension of the grid add dk, as many after them dv.
    """
    i_rows = tl.program_id(2)
    if i_rows < C.BN // C.BR:
        _add_parts(parts, dk_sums, programs, i_rows, first_program, end_program, C.DK, C.PDK, C)
    else:
        i_rows -= C.BN // C.BR
        _add_parts(parts, dv_sums, programs, i_rows, first_program, end_program, C.DV, C.PDV, C)


class KeySums:
    """The workspace of dk and dv, and the launches that add what their programs left in it.

    tile: keys of a program's sums [tile, G, D]. programs: that run in one launch, at most.
    parts, table: where each key tile's programs start, and the programs, as `_add_parts_kernel`
    reads them.
    """

    def __init__(
        self,
        dk_EGD: Tensor,
        dv_EGD: Tensor,
        tile: int,
        programs: int,
        parts: Tensor,
        table: Tensor,
        piece: int,
    ) -> None:
        self._outs, self._tile = (dk_EGD, dv_EGD), tile
        self._tables = parts, table
        (_, groups, dk), dv = dk_EGD.shape, dv_EGD.shape[2]
        self._grid = (parts.shape[0] - 1, groups, 2 * (tile // 8))
        self._constants = SumConstants(groups, tile, 8, dk, padded(dk), dv, padded(dv), piece)
        self.workspace = self._carried = self._carry = self._empty(programs)
        if programs < table.shape[0]:  # More launches than one, from each to the next.
            self._carried, self._carry = self._empty(1), self._empty(1)

    def _empty(self, tiles: int) -> list[Tensor]:
        shapes = [(tiles * self._tile, *x.shape[1:]) for x in self._outs]
        device = self._outs[0].device
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]

    def add(self, first: int, end: int) -> None:
        """Add what programs first..end-1 left."""
        sums = map(PartialSums, self.workspace, self._carried, self._carry, self._outs)
        launcher(_add_parts_kernel, self._grid)(
            self._tables[0], *sums, self._tables[1], first, end, C=self._constants,
            maxnreg=MOST_REGISTERS,
        )  # fmt: skip
        self._carried, self._carry = self._carry, self._carried


def few_keys(q: Tensor) -> int:
    """Up to how many keys the sum that dP cancels with is computed anew: see `_dq_kernel`."""
    return 1 << 30 if q.dtype == torch.float32 else 128


def banded_backward(
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
    """Gradients of q [N, H, Dk], k [E, G, Dk] and v [E, G, Dv] in their dtypes, and delta.

    o and do [N, H, Dv], lse [N, H]; the last dimension of each contiguous. With a gate [N, H], of
    any floating dtype and strides, do is the gradient of the gated sum, and the gradients are those
    of g o: see shared/gates.py. delta, the gate's gradient, is float32 [N, H].
    into: contiguous memory for the gradient of q.
    """
    dq_NHD = empty_as(q_NHD) if into_NHD is None else into_NHD
    dk_EGD, dv_EGD = empty_as(k_EGD), empty_as(v_EGD)
    delta_NH = empty_as(lse_NH)
    if not q_NHD.shape[0]:
        return dq_NHD, dk_EGD.zero_(), dv_EGD.zero_(), delta_NH
    key_tile = banded_tiles(q_NHD, v_EGD).dkv
    C = constants(q_NHD, v_EGD, band, key_tile)
    programs = key_tiles(segments, band, C.BT, C.BN)
    if programs.num_keys < k_EGD.shape[0]:  # Rows that no query sees.
        dk_EGD.zero_()
        dv_EGD.zero_()
    q, k, v, do = (head_rows(x) for x in (q_NHD, k_EGD, v_EGD, do_NHD))
    gate = gate_rows(gate_NH)
    in_logits = logit_scale(q_NHD, scale)
    tile = banded_tiles(q_NHD, v_EGD).dq
    C = constants(q_NHD, v_EGD, band, tile)
    tiles = query_tiles(segments, C.BT, band.column)
    launcher(_dq_kernel, (len(tiles.host), C.G))(
        q, k, v, o_NHD, do, lse_NH, delta_NH, dq_NHD, gate, tiles.table,
        len(tiles.host), scale, in_logits, FEW_KEYS=few_keys(q_NHD), C=C, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip

    C = constants(q_NHD, v_EGD, band, key_tile)
    tiles = query_tiles(segments, C.BT, band.column)
    count = len(programs.table)
    if not count:
        return dq_NHD, dk_EGD, dv_EGD, delta_NH
    launch = max(1, WORKSPACE // (4 * C.BN * C.G * (C.DK + C.DV)))
    sums = KeySums(
        dk_EGD, dv_EGD, C.BN, min(launch, count), programs.parts, programs.table, C.PIECE
    )
    for first in range(0, count, launch):
        end = min(first + launch, count)
        launcher(_dkv_kernel, (end - first, C.G))(
            q, k, v, do, lse_NH, delta_NH, *sums.workspace, gate, tiles.table, programs.table,
            first, scale, in_logits, C=C, num_warps=key_tile.warps, num_stages=key_tile.stages,
            maxnreg=key_tile.registers,
        )  # fmt: skip
        sums.add(first, end)
    return dq_NHD, dk_EGD, dv_EGD, delta_NH
