"""One recorded attention once more, on one rank.

The whole stream's inputs are gathered, and the attention runs as a packed stream of one rank, with
the blocks that the ranks chose: a single score that rounds otherwise would move a whole block. What
it would have chosen itself is kept beside.

Letters: as in ``recording.py``; T tokens of the whole stream, S queries that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist.attention.call import Call
from nsa_dist.attention.functional import attend
from nsa_dist.attention.plan_cache import get_plan
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import begin_all_gather
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import SINGLE, ContextGroup
from nsa_dist.plan import Plan
from nsa_dist.self_check.recording import Record
from nsa_dist.sharding import Sharding
from nsa_kernels import QuerySegments


@dataclass(frozen=True, eq=False)
class Places:
    """Where this rank's tokens stand in the whole stream of one call.

    Attributes:
        own: int64 [N], column of each local token in the stream.
        all: int64 [T], the same of all ranks, in rank order.
        boundaries: int64 [documents + 1].
        group: the ranks.
    """

    own: Tensor
    all: Tensor
    boundaries: Tensor
    group: ContextGroup

    def gather(self, rows: Tensor) -> Tensor:
        """[N, ...] of each rank to [T, ...] in stream order, on every rank. A collective."""
        gathered = gather_rows(rows, self.group)
        whole = torch.empty_like(gathered)
        whole[self.all.to(rows.device)] = gathered
        return whole

    def positions(self) -> tuple[Tensor, Tensor]:
        """Document and position in it of each local token."""
        document = torch.searchsorted(self.boundaries, self.own, right=True) - 1
        return document, self.own - self.boundaries[document]


def gather_rows(rows: Tensor, group: ContextGroup) -> Tensor:
    """Rows of all ranks, [N, ...] to [P * N, ...]. A collective."""
    if group.size == 1:
        return rows
    # As bytes: not every backend gathers bool and 16-bit dtypes.
    flat = rows.contiguous().view(torch.uint8) if rows.dtype != torch.bool else rows.byte()
    on_device = flat.to(group.device)
    channel = Channel(group, CommunicationCounter(), "self-check")
    gathered = begin_all_gather(on_device, channel, "self-check").finish().to(rows.device)
    return gathered.bool() if rows.dtype == torch.bool else gathered.view(rows.dtype)


def find_places(record: Record, sharding: Sharding | None) -> Places:
    """The places of a call's tokens, by ``sharding``, or by the call's own plan. A collective."""
    plan, group = record.call.plan, record.call.channel.group
    if sharding is not None:
        columns = sharding.local_columns
        rows = torch.arange(plan.batch)[:, None] * sharding.padded_length
        own = (rows + columns).flatten()
        boundaries = torch.arange(plan.batch + 1) * sharding.padded_length
        if sharding.cu_seqlens is not None:
            boundaries = sharding.cu_seqlens.long()
    else:
        documents, positions = plan.documents.cpu(), plan.positions.cpu()
        every = gather_rows(documents, group)
        lengths = torch.bincount(every)
        boundaries = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        own = boundaries[documents] + positions
    return Places(own, gather_rows(own, group), boundaries, group)


@dataclass(frozen=True, eq=False)
class Reference:
    """What one rank computes.

    Attributes:
        out: [S, H, Dv].
        blocks: int32 [S, G, n], its own choice; None without the selected branch.
        grads: of q and gates [S, ...], of k and v [T, ...], of weights; by the record's names.
        rows: int64 [S], columns in the stream of the queries that are compared.
    """

    out: Tensor
    blocks: Tensor | None
    grads: dict[str, Tensor]
    rows: Tensor


class _WithBlocks:
    """A backend whose selected branch attends to given blocks, and keeps those it was told to."""

    def __init__(self, backend: Any, blocks_NGn: Tensor) -> None:
        self._backend, self._blocks = backend, blocks_NGn
        self.chosen: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def selected_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *given: Any, **options: Any
    ) -> Any:
        k_fetched, v_fetched, chosen, *rest = given
        first = sum(blocks.shape[1] for blocks in self.chosen)
        self.chosen.append(chosen)
        used = self._blocks[:, first : first + chosen.shape[1]]
        return self._backend.selected_attention(
            q, k, v, k_fetched, v_fetched, used, *rest, **options
        )


def run_on_one_rank(record: Record, places: Places) -> Reference:
    """The record's attention and, if it has a gradient, its backward, on one rank. A collective."""
    call, device = record.call, record.device

    def whole(x: Tensor) -> Tensor:
        return places.gather(x).to(device)

    rows = torch.arange(int(places.boundaries[-1]))
    if record.sampled is not None:
        rows = places.gather(record.sampled).nonzero().squeeze(1)
    inputs = {name: whole(x) for name, x in record.inputs.items()}
    for name in ("q", "gates"):
        inputs[name] = inputs[name][rows.to(device)]
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    backend: Any = call.backend
    if record.blocks is not None:
        backend = _WithBlocks(backend, whole(record.blocks)[rows.to(device)])
    plan = _plan_of_rows(record, places, rows)
    channel = Channel(SINGLE, CommunicationCounter(), plan)
    selector = record.whole_selector()
    cast = record.autocast
    with torch.autocast(device.type, dtype=cast or torch.bfloat16, enabled=cast is not None):
        attended = attend(
            Call(call.config, backend, plan, channel, call.rotary),
            inputs["q"][None],
            _given(inputs, "k"),
            _given(inputs, "v"),
            inputs["gates"][None],
            selector,
        )
    grads: dict[str, Tensor] = {}
    if "out" in record.grads:
        wanted = inputs | _weights(record, selector)
        wanted = {name: x for name, x in wanted.items() if name in record.grads}
        grad_out = whole(record.grads["out"])[rows.to(device)]
        made = torch.autograd.grad(
            attended.out_NHD, list(wanted.values()), grad_out, allow_unused=True
        )
        grads = {
            name: torch.zeros_like(x) if grad is None else grad
            for (name, x), grad in zip(wanted.items(), made, strict=True)
        }
    blocks = None if record.blocks is None else torch.cat(backend.chosen, dim=1)
    return Reference(attended.out_NHD.detach(), blocks, grads, rows)


def _given(inputs: dict[str, Tensor], name: str) -> Any:
    """Keys or values as ``attend`` takes them."""
    if name in inputs:
        return inputs[name][None]
    start = f"{name}, "
    return {key.removeprefix(start): x[None] for key, x in inputs.items() if key.startswith(start)}


def _weights(record: Record, selector: Any) -> dict[str, Tensor]:
    """Weights of the copied selector by the record's names."""
    found: dict[str, Tensor] = {}
    for name in record.modules:
        module = selector if name == "selector" else getattr(selector, name)
        assert isinstance(module, nn.Module)
        found |= {f"{name}.{key}": x for key, x in module.named_parameters()}
    return found


def _plan_of_rows(record: Record, places: Places, rows: Tensor) -> Plan:
    """A plan of one rank whose queries are ``rows`` of the stream, and whose keys are all."""
    config, total = record.call.config, int(places.boundaries[-1])
    plan = get_plan(
        config,
        "contiguous",
        None,
        batch=1,
        local_length=total,
        cu_seqlens=places.boundaries.int(),
        dtype=record.inputs["q"].dtype,
        device=torch.device("cpu"),
        selector_grids=record.selector.grids(config),
    )
    if len(rows) < total:
        # Positions and documents stay those of the keys.
        table = plan.segments.host
        bases = table[:, 3:].repeat_interleave(table[:, 1], dim=0)[rows]
        head = torch.stack((torch.arange(len(rows)), torch.ones_like(rows), plan.positions[rows]))
        plan = replace(
            plan,
            segments=QuerySegments.from_table(torch.cat((head.T, bases), dim=1)),
            grids={name: replace(g, bases=g.bases[rows]) for name, g in plan.grids.items()},
        )
    return plan.to(record.device)


def add_over_ranks(x: Tensor, group: ContextGroup) -> Tensor:
    """The sum of all ranks' tensors, in float32 at least. A collective."""
    total = x.to(torch.promote_types(x.dtype, torch.float32)).to(group.device)
    if group.size > 1:
        dist.all_reduce(total, group=group.process_group)
    return total.to(x.device)
