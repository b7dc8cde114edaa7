"""The flow of one pass through the attention on one rank, and the order of its messages.

    halo exchange -> window branch
                  -> compress own blocks -> all-gather -> compressed branch -> choose blocks
                  -> request and fetch the chosen remote blocks -> selected branch
    -> gate and add

Each step is a function of the backend or the selector, or a transfer of ``nsa_dist.comm``. On one
rank the same steps run and nothing is sent. Every rank runs the same steps in the same order, even
if it has no tokens: if one rank skipped a node of the graph, the others would hang in backward.

Messages, in order (``CommunicationCounter`` has the kinds):

    forward     plan; one halo for each separate set of keys and values; gather; request; one fetch
                per KV head
    backward    plan; one fetch_grad per KV head, last head first; gather_grad; one halo_grad per
                set, last set first

The first plan of forward is sent by ``functional.attend``, that of backward by ``AgreeInBackward``.
Code of the user's adds a plan after it ran: custom compressors before gather, a selector before
request. No code here sets the order of backward: autograd runs the newest node first, and each
transfer is a node that sends and one that receives (``nsa_dist.comm``).

Today every transfer is finished right after it begins. In forward only this file decides what runs
between the two.

A branch whose function takes its gate gets the gradient of the gated sum itself, and makes that of
its gate (``Backend``); so combine's backward runs only for branches without one. What the branches
give to q is added in one pass.

Letters: N local queries, H query heads, G KV heads, D widths, b branches, E rows of a buffer with
its halo, n selected blocks per query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.attention.call import Call
from nsa_dist.attention.selectors import Selection, Selector, cos_sin, run_selector
from nsa_dist.comm import begin_fetch, begin_halo, begin_request
from nsa_dist.comm.agreement import AgreeInBackward
from nsa_dist.nn.rotary import apply_rotary
from nsa_kernels import Backend
from nsa_kernels.autograd import first_order
from nsa_kernels.backend import as_gate, gated_branches

ByName = Mapping[str, Tensor]
Extended = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Attended:
    """The results of a pass: out [N, H, Dv], log-sum-exp [N, H] by branch, blocks [N, G, n]."""

    out_NHD: Tensor
    lse_NH: ByName
    blocks_NGn: Tensor | None


def attend_branches(
    call: Call,
    q_NHD: Tensor,
    keys_NGD: ByName,
    values_NGD: ByName,
    gates_NHb: Tensor,
    selector: Selector,
) -> Attended:
    """All branches, gated and summed (Eq. 5).

    Args:
        keys_NGD, values_NGD: by set; a shared tensor is one object.
    """
    ops, config, plan = call.backend, call.config, call.plan
    scale, branches = config.softmax_scale, config.branches
    outputs, lse = {}, {}
    selects = "selected" in branches or selector.branch in branches
    readers = ("window" in branches, selects, "selected" in branches)
    queries = iter(_for_readers(q_NHD, sum(readers), ops))
    summands: dict[str, Sequence[Tensor]] = dict.fromkeys(branches, ())
    gate_of = _gates_of_branches(ops, branches, gates_NHb)

    extended = _exchange_halos(call, _rotate(call, keys_NGD), values_NGD)
    gathered = selector.begin(call, extended).finish() if selects else None
    if "window" in branches:
        outputs["window"], lse["window"], *summands["window"] = ops.window_attention(
            next(queries),
            *extended["window"],
            plan.segments,
            window=config.window,
            scale=scale,
            **as_gate(gate_of.get("window")),
        )
    # NSA's own selector attends to compressed tokens and selects by their probabilities.
    selection = Selection(None)
    if selects:
        gate_NH = None if selector.branch is None else gate_of.get(selector.branch)
        selection = run_selector(selector, call, next(queries), gathered, gate_NH)
    if selection.output is not None:
        assert selector.branch is not None and selection.lse is not None
        outputs[selector.branch], lse[selector.branch] = selection.output, selection.lse
        if selection.summand is not None:
            summands[selector.branch] = (selection.summand,)
    if selection.blocks is not None:
        outputs["selected"], lse["selected"], summands["selected"] = _attend_selected(
            call, next(queries), *extended["selected"], selection.blocks, gate_of.get("selected")
        )
    of_branches = [outputs[branch] for branch in branches]
    if any(map(len, summands.values())):
        out_NHD = ops.combine(of_branches, gates_NHb, [summands[branch] for branch in branches])
    else:
        out_NHD = ops.combine(of_branches, gates_NHb)

    for tensor in selection.unused:
        out_NHD = ZeroGradient.apply(out_NHD, tensor)
    group, counter = call.channel.group, call.channel.counter
    if group.size > 1:
        # Without a need for gradients autograd makes no node, and its message is not sent.
        moved = {name: k.requires_grad for name, (k, _) in extended.items()}
        moved |= {name: x.requires_grad for name, x in selection.gathered.items()}
        needs = tuple(name for name, needed in moved.items() if needed)
        out_NHD = AgreeInBackward.apply(out_NHD, plan.statement, needs, group, counter)
    return Attended(out_NHD, lse, selection.blocks)


def _gates_of_branches(ops: Backend, branches: Sequence[str], gates_NHb: Tensor) -> ByName:
    """The gate [N, H] of each branch whose function takes it; the others' stay with combine."""
    taken = gated_branches(ops)
    if not taken:
        return {}
    gates = zip(branches, gates_NHb.unbind(-1), strict=True)
    return {branch: gate_NH for branch, gate_NH in gates if branch in taken}


def _for_readers(x: Tensor, count: int, ops: Backend) -> tuple[Tensor, ...]:
    """x once for each of its ``count`` readers, whose gradients are added in one pass."""
    return (x,) * count if count < 2 else _ForReaders.apply(x, count, ops)


def _rotate(call: Call, keys_NGD: ByName) -> ByName:
    """Rotate the keys of all sets except ``compressed``, if they are not rotated yet."""
    if call.rotary is None:
        return keys_NGD
    cos, sin = cos_sin(call, call.plan.positions)
    rotated: dict[str, Tensor] = {}
    for name, k in keys_NGD.items():
        if name == "compressed":
            rotated[name] = k
            continue
        same = [other for other in rotated if other != "compressed" and keys_NGD[other] is k]
        rotated[name] = rotated[same[0]] if same else apply_rotary(k, cos, sin)
    return rotated


def _exchange_halos(call: Call, keys_NGD: ByName, values_NGD: ByName) -> Extended:
    """K [E, G, Dk] and V [E, G, Dv] of each set with its halo; shared sets are sent once."""
    extended: dict[str, tuple[Tensor, Tensor]] = {}
    for name, k in keys_NGD.items():
        v = values_NGD.get(name)
        same = [o for o in extended if keys_NGD[o] is k and values_NGD.get(o) is v]
        if same:
            extended[name] = extended[same[0]]
            continue
        if v is None:  # Keys that only select blocks have no values.
            v = k.new_zeros(*k.shape[:2], 0)
        extended[name] = begin_halo(k, v, call.plan.halos[name], call.channel).finish()
    return extended


def _attend_selected(
    call: Call,
    q_NHD: Tensor,
    k_EGD: Tensor,
    v_EGD: Tensor,
    blocks_NGn: Tensor,
    gate_NH: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Fetch selected blocks and attend to them, one transfer of KV heads after another.

    Returns:
        o [N, H, Dv], lse [N, H], and with a gate the summand of each transfer's heads.
    """
    config, plan = call.config, call.plan
    fetch = begin_request(blocks_NGn, plan, call.channel).finish()
    width = fetch.heads_per_transfer
    query_width = width * config.heads_per_group

    def heads(x: Tensor, of_transfer: int) -> tuple[Tensor, ...]:
        # A split into one part would make its backward a copy.
        return (x,) if len(fetch.transfers) == 1 else x.split(of_transfer, dim=1)

    gates = [None] * len(fetch.transfers) if gate_NH is None else heads(gate_NH, query_width)
    outputs, lses, summands = [], [], []
    for transfer, q_g, k_g, v_g, gate_g, blocks_g, rows_g in zip(
        fetch.transfers,
        heads(q_NHD, query_width),
        heads(k_EGD, width),
        heads(v_EGD, width),
        gates,
        heads(blocks_NGn, width),
        fetch.block_rows.split(width),
        strict=True,
    ):
        out_g, lse_g, *summand_g = call.backend.selected_attention(
            q_g,
            *begin_fetch(k_g, v_g, transfer, call.channel).finish(),
            blocks_g,
            rows_g,
            plan.grids["selected"].lengths,
            plan.segments,
            select_block=config.select_block,
            scale=config.softmax_scale,
            **as_gate(gate_g),
        )
        outputs.append(out_g)
        lses.append(lse_g)
        summands += summand_g
    if len(outputs) == 1:
        return outputs[0], lses[0], tuple(summands)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1), tuple(summands)


class _ForReaders(torch.autograd.Function):
    """Return x for each reader, and add their gradients in their order, rounded once.

    autograd itself would add one after the other, with a pass over memory and a rounding each time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, ops: Backend) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ops = ops
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = [grad for grad in grads if grad is not None]
        if len(given) < 2:
            return (given[0] if given else None), None, None
        weights = given[0].new_ones(()).expand(*given[0].shape[:2], len(given))
        return ctx.ops.combine(given, weights), None, None


class ZeroGradient(torch.autograd.Function):
    """Return ``out``, and give ``unused`` a gradient of zeros instead of None.

    So parameters that only select blocks, and their collectives, take part in every backward.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (unused,) = ctx.saved_tensors
        return grad, torch.zeros_like(unused)
