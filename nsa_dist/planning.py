"""From what a call is given to the plan it runs by: checked, agreed on, cached.

The cache holds plans of the last few batches by value: config, layout, group, sizes, dtype, device
and the document boundaries themselves. All layers of a model that are given the same batch share
one plan, and a forward that finds its plan here communicates nothing for it. Ranks that make the
same calls hit and miss alike.
"""

from __future__ import annotations

import weakref
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist.agreement import agree, show_boundaries
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.config import NSAConfig
from nsa_dist.group import ContextGroup, GroupLike, context_group
from nsa_dist.layout import check_lengths, make_layout
from nsa_dist.plan import Plan, build_plan

CACHED_PLANS = 8


@dataclass(frozen=True)
class _Entry:
    key: tuple[Any, ...]
    cu_seqlens: Tensor | None
    plan: Plan


_plans: list[_Entry] = []
_host_copies: list[tuple[weakref.ref[Tensor], int, Tensor]] = []


def _on_host(cu_seqlens: Tensor) -> Tensor:
    """A CPU copy of device boundaries, made once a batch however many layers ask."""
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens
    for source, version, copy in _host_copies:
        if source() is cu_seqlens and version == cu_seqlens._version:
            return copy
    copy = cu_seqlens.cpu()
    _host_copies.append((weakref.ref(cu_seqlens), cu_seqlens._version, copy))
    del _host_copies[:-CACHED_PLANS]
    return copy


def _same_documents(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def get_plan(
    config: NSAConfig,
    layout: str,
    group: GroupLike | ContextGroup,
    *,
    batch: int,
    local_length: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    communication: CommunicationCounter | None = None,
    problem: str | None = None,
) -> Plan:
    """The plan for one call, from the cache or new. Making a new one is a collective.

    Args:
        batch, local_length: rows, and tokens a row on this rank.
        cu_seqlens: int32 [documents + 1] of the whole padded stream, or None for one document a
            row.
        problem: what the caller found wrong with its input; raised here, on every rank.

    Raises:
        ValueError: on every rank of the group, naming the option, when any rank's input is bad or
            ranks disagree.
    """
    group = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        problem = problem or f"cu_seqlens: found {cu_seqlens!r}; an int32 tensor or None works"
        cu_seqlens = None
    if cu_seqlens is not None:
        cu_seqlens = _on_host(cu_seqlens)
    key = (
        config,
        layout,
        id(group.process_group),
        group.rank,
        group.size,
        batch,
        local_length,
        dtype,
        device,
    )
    if problem is None:
        for at, entry in enumerate(_plans):
            if entry.key == key and _same_documents(entry.cu_seqlens, cu_seqlens):
                _plans.append(_plans.pop(at))
                return entry.plan

    values = {
        "layout": repr(layout),
        "group size": str(group.size),
        "batch size": str(batch),
        "local sequence length": str(local_length),
        "cu_seqlens": show_boundaries(cu_seqlens),
        "dtype": str(dtype),
        "device": device.type,
    }
    values |= {f.name: repr(x) for f, x in zip(fields(config), astuple(config), strict=True)}
    length = local_length * group.size
    cut = None
    try:
        cut = make_layout(layout, group.size)
        problem = problem or check_lengths(cut, batch, length, cu_seqlens)
    except ValueError as error:
        problem = problem or str(error)
    stamp = agree(values, problem, group, counter)
    assert cut is not None
    own = None if cu_seqlens is None else cu_seqlens.clone()
    plan = build_plan(config, cut, group.rank, group.size, batch, length, own)
    plan = replace(plan.to(device), fingerprint=stamp)
    _plans.append(_Entry(key, own, plan))
    del _plans[:-CACHED_PLANS]
    return plan
