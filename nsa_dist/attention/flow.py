"""The flow of one pass through the attention on one rank: its schedule, and its messages' order.

    halo exchange -> window branch
                  -> compress own blocks -> all-gather -> compressed branch -> choose blocks
                  -> request and fetch the chosen remote blocks -> selected branch
    -> gate and add

Each step is a function of the backend or the selector, or a transfer of ``nsa_dist.comm``. On one
rank the same steps run and nothing is sent. Every rank runs the same steps in the same order, even
if it has no tokens: if one rank skipped a node of the graph, the others would hang in backward.

This file alone writes the schedule, by what stands between the beginning and the end of a transfer:

    while this travels          this computes, forward      and in backward
    halos of other sets         compression                 compression
    gather                      nothing (window branch,     the sums of the first head's fetched
                                if no block is selected)    blocks, and halos
    request, first fetch        window branch               window and compressed branch
    fetch of head g + 1         attention of head g
    gradients of head g                                     attention of head g - 1
    head g - 1, fetched again                               attention of head g

The window branch could hide the gather or the request with the first fetch. It hides these: they
are longer, and the host waits for the sizes in between, while the window's kernels keep the GPU
busy.

Backward has no code here: autograd runs the newest node first among those whose gradients are
there, and a transfer is a node that begins and one that ends (``nsa_dist.comm``). So the order in
which this file makes nodes is, reversed, the schedule of backward.

Messages, in order (``CommunicationCounter`` has the kinds):

    forward     plan; one halo for each separate set of keys and values; gather; request (none if
                all visible blocks are fetched); one fetch per KV head
    backward    plan; one fetch_grad per KV head, last head first; gather_grad; one halo_grad per
                set, last set first. With ``fetch_again`` there is a fetch per KV head too, last
                head first: two before the first fetch_grad, then one after each

The first plan of forward is sent by ``functional.attend``, that of backward by ``AgreeInBackward``.
With ``exact_gradients`` a weight_grad for each compressor with weights comes between gather_grad
and the halo_grad of its keys (``nsa_dist.comm.exact``); in backward a head's parts run where the
head stands.
Code of the user's adds a plan after it ran: custom compressors before gather, a selector before
request.

On CUDA each message runs on the group's own stream, after what the current stream got before it
began; ``finish`` lets the current stream wait, not the host. The host waits for the plan, and once
for the sizes of the fetches. Kernels and messages enter their queues in the order of this file, so
that a single hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) overlaps them as well.

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
from nsa_dist.attention.extended import Extended
from nsa_dist.attention.in_parts import Source, attend_branch
from nsa_dist.attention.selectors import Selection, Selector, cos_sin, run_selector
from nsa_dist.comm import (
    HeadFetch,
    Work,
    begin_request,
    fetch_all_visible,
    heads_per_transfer,
)
from nsa_dist.comm.agreement import AgreeInBackward
from nsa_dist.comm.exact import HeadSums, home
from nsa_dist.comm.fetch import Transfer
from nsa_dist.nn.rotary import apply_rotary
from nsa_kernels import Backend
from nsa_kernels.autograd import first_order
from nsa_kernels.backend import add_gradients, gated_branches

ByName = Mapping[str, Tensor]


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
    branches, group, counter = config.branches, call.channel.group, call.channel.counter
    outputs, lse = {}, {}
    selects = "selected" in branches or selector.branch in branches
    reads = {
        "window": "window" in branches,
        "selector": selects,
        "selected": "selected" in branches,
    }
    readers = [name for name, does in reads.items() if does]
    of_readers, gate_of = _for_readers(q_NHD, len(readers), gates_NHb, branches, ops)
    queries = dict(zip(readers, of_readers, strict=True))
    summands: dict[str, Sequence[Tensor]] = dict.fromkeys(branches, ())

    def attend_window() -> None:
        if "window" in branches:
            outputs["window"], lse["window"], *summands["window"] = attend_branch(
                call,
                "window",
                ops.window_attention,
                queries["window"],
                extended.source("window", "window"),
                gate_of.get("window"),
                window=config.window,
                scale=config.softmax_scale,
            )

    extended = Extended(call, _rotate(call, keys_NGD), values_NGD)
    # NSA's own selector attends to compressed tokens and selects by their probabilities.
    selection = Selection(None)
    if selects:
        gathering = selector.begin(call, extended)
        extended.finish()
        selected = _Selected(call, extended) if "selected" in branches else None
        if selected is None:
            attend_window()
        gathered = gathering.finish()
        gate_NH = None if selector.branch is None else gate_of.get(selector.branch)
        selection = run_selector(selector, call, queries["selector"], gathered, gate_NH)
        if selection.output is not None:
            assert selector.branch is not None and selection.lse is not None
            outputs[selector.branch], lse[selector.branch] = selection.output, selection.lse
            if selection.summand is not None:
                summands[selector.branch] = (selection.summand,)
        if selected is not None:
            assert selection.blocks is not None
            selected.request(selection.blocks)
            attend_window()
            outputs["selected"], lse["selected"], summands["selected"] = selected.attend(
                queries["selected"], gate_of.get("selected")
            )
    else:
        attend_window()
    of_branches = [outputs[branch] for branch in branches]
    if any(map(len, summands.values())):
        out_NHD = ops.combine(of_branches, gates_NHb, [summands[branch] for branch in branches])
    else:
        out_NHD = ops.combine(of_branches, gates_NHb)

    for tensor in selection.unused:
        out_NHD = ZeroGradient.apply(out_NHD, tensor)
    if group.size > 1:
        # Without a need for gradients autograd makes no node, and its message is not sent.
        moved = {name: extended.requires_grad(name) for name in extended}
        moved |= {name: x.requires_grad for name, x in selection.gathered.items()}
        moved["queries"] = q_NHD.requires_grad
        needs = tuple(name for name, needed in moved.items() if needed)
        out_NHD = AgreeInBackward.apply(out_NHD, plan.statement, needs, group, counter)
    return Attended(out_NHD, lse, selection.blocks)


def _for_readers(
    q_NHD: Tensor, count: int, gates_NHb: Tensor, branches: Sequence[str], ops: Backend
) -> tuple[tuple[Tensor, ...], ByName]:
    """q once for each of its ``count`` readers, and the gate [N, H] of branches that take theirs.

    The gates of the others stay with combine. What readers give to q is added in one pass.
    """
    taken = gated_branches(ops)
    columns = len(branches) if taken else 0
    if count + columns > 1:
        given = _ForReaders.apply(q_NHD, gates_NHb, count, columns, ops)
    else:
        given = (q_NHD,) * count
    of_branches = zip(branches, given[count:], strict=False)
    return given[:count], {branch: gate for branch, gate in of_branches if branch in taken}


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


class _Selected:
    """The selected branch: its blocks are fetched and attended to, one transfer after another.

    Args:
        extended: own rows with their halo.
    """

    def __init__(self, call: Call, extended: Extended) -> None:
        self._call = call
        k_EGD, v_EGD = extended["selected"]
        self._sums = extended.sums("selected") if call.plan.parts is not None else None
        self._width = heads_per_transfer(k_EGD.shape[1], call.plan)
        sources = (_split_heads(x, self._width) for x in (k_EGD, v_EGD))
        self._sources = list(zip(*sources, strict=True))
        # The first head's gradients come back last: this node is old, so that in backward the
        # window and the compressed branch run before it waits for them.
        self._sums_of_heads: dict[HeadFetch, tuple[HeadSums, Tensor]] = {}
        self._first = self._fetch(0)

    def request(self, blocks_NGn: Tensor) -> None:
        """Begin to ask other ranks for their blocks, or already to fetch all that are visible."""
        self._blocks = _split_heads(blocks_NGn, self._width)
        plan, channel = self._call.plan, self._call.channel
        if self._call.fetch == "full":
            fetch = fetch_all_visible(blocks_NGn.shape[1], plan)
            self._first.begin(fetch.transfers[0])
            self._asking = Work.done(fetch)
        else:
            self._asking = begin_request(blocks_NGn, plan, channel)

    def attend(
        self, q_NHD: Tensor, gate_NH: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Fetch the requested blocks and attend to them.

        Returns:
            o [N, H, Dv], lse [N, H], and with a gate the summand of each transfer's heads.
        """
        config, plan = self._call.config, self._asking.finish()
        transfers = plan.transfers
        of_heads = self._width * config.heads_per_group
        queries = _split_heads(q_NHD, of_heads)
        gates = (
            [None] * len(transfers) if gate_NH is None else list(_split_heads(gate_NH, of_heads))
        )
        rows = plan.block_rows.split(self._width)
        # What has the gradient: o, or in its place the summand.
        at = 0 if gate_NH is None else 2
        results: list[list[Tensor]] = []
        ahead, before = self._first, None
        if self._call.fetch != "full":
            ahead.begin(transfers[0])
        for g in range(len(transfers)):
            fetch = ahead
            if g + 1 < len(transfers):
                ahead = self._fetch(g + 1)
                ahead.begin(transfers[g + 1])
            results.append(
                self._attend_heads(
                    fetch, transfers[g], queries[g], self._blocks[g], rows[g], gates[g]
                )
            )
            results[g][at] = fetch.drop(results[g][at])
            if before is not None:
                results[g - 1][at] = before.again(results[g - 1][at])
            before = fetch
        results[-1][at] = ahead.again(results[-1][at])
        o_NHD, lse_NH, *summands = zip(*results, strict=True)
        return _join_heads(o_NHD), _join_heads(lse_NH), summands[0] if summands else ()

    def _fetch(self, g: int) -> HeadFetch:
        k, v = self._sources[g]
        again = self._call.fetch_again and torch.is_grad_enabled()
        fetch = HeadFetch(k, v, self._call.channel, again=again)
        if self._sums is not None:
            of_set, ticket = self._sums
            sums = HeadSums(of_set)
            self._sums_of_heads[fetch] = sums, home(sums, ticket)
        return fetch

    def _attend_heads(
        self,
        fetch: HeadFetch,
        transfer: Transfer,
        q_NhD: Tensor,
        blocks_Ngn: Tensor,
        rows_gB: Tensor,
        gate_Nh: Tensor | None,
    ) -> list[Tensor]:
        """[o, lse] of the heads of a transfer, and with a gate their summand."""
        call = self._call
        tensors = fetch.k, fetch.v, *fetch.finish()
        source: Source = tensors
        if self._sums is not None:
            sums, ticket = self._sums_of_heads.pop(fetch)
            source = sums.source(ticket, transfer, *tensors)
        return list(
            attend_branch(
                call,
                "selected",
                call.backend.selected_attention,
                q_NhD,
                source,
                gate_Nh,
                blocks_Ngn,
                (rows_gB, call.plan.grids["selected"].lengths),
                select_block=call.config.select_block,
                scale=call.config.softmax_scale,
            )
        )


def _split_heads(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """x [N, heads, ...] by transfer. A split into one part would make its backward a copy."""
    return (x,) if x.shape[1] == width else x.split(width, dim=1)


def _join_heads(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class _ForReaders(torch.autograd.Function):
    """Return q for each reader and columns of the gates, and add what they give to q in their
    order, rounded once.

    autograd itself would add one after the other, with a pass over memory and a rounding each time,
    and would put the gates' gradients together in another pass.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, gates: Tensor, count: int, columns: int, ops: Backend
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count, ctx.ops = count, ops
        of_readers = (q.view_as(q) for _ in range(count))
        return *of_readers, *(gates.select(-1, i) for i in range(columns))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        to_q = [grad for grad in grads[: ctx.count] if grad is not None]
        to_gates = [grad for grad in grads[ctx.count :] if grad is not None]
        add = add_gradients(ctx.ops)
        if add is not None and len(to_q) > 1 and 0 < len(to_gates) == len(grads) - ctx.count:
            return *add(to_q, to_gates), None, None, None
        dq = to_q[0] if to_q else None
        if len(to_q) > 1:
            weights = to_q[0].new_ones(()).expand(*to_q[0].shape[:2], len(to_q))
            dq = ctx.ops.combine(to_q, weights)
        dgates = None
        if to_gates:  # None is of a branch that did not take its gate.
            nothing = torch.zeros_like(to_gates[0])
            all_gates = [nothing if x is None else x for x in grads[ctx.count :]]
            dgates = torch.stack(all_gates, dim=-1)
        return dq, dgates, None, None, None


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
