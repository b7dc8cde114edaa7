"""A plan's stamp, carried by a message that is sent anyway.

A plan found in the cache is used without asking whether the others found the same one. So one
message of every forward carries the plan's fingerprint in front of what it moves, and ranks whose
plans differ find out there, rather than compute on each other's wrong rows: the request for blocks,
or where none are chosen the gather of compressed tokens, or where there are none the halo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.comm.collectives import all_gather_rows, all_to_all_rows
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.group import ContextGroup
from nsa_dist.plan import Plan

STAMP_BYTES = 8


def stamp_of(plan: Plan, device: torch.device) -> Tensor:
    """uint8 [STAMP_BYTES]."""
    return torch.tensor([plan.fingerprint], device=device).view(torch.uint8)


def check_stamps(stamps: Tensor, plan: Plan, group: ContextGroup) -> None:
    """Compare the int64 stamps [P] of all ranks with this rank's.

    Raises:
        ValueError: on every rank that sees another's differ, so on all or none.
    """
    differing = [p for p, stamp in enumerate(stamps.tolist()) if stamp != plan.fingerprint]
    if differing:
        raise ValueError(
            f"group: rank {group.rank} runs another plan than ranks {differing} (their "
            "cu_seqlens, config, layout, lengths or dtype differ from its own); all the ranks of "
            "a group must be given the same ones"
        )


def all_to_all_stamped(
    rows: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    plan: Plan,
    group: ContextGroup,
    counter: CommunicationCounter,
    kind: str,
) -> Tensor:
    """As ``all_to_all_rows``, with the plan's stamp before each run. Waits for the device."""
    stamp = _stamp_rows(plan, rows)
    size = len(stamp)
    message = torch.cat([x for run in rows.split(list(send_counts)) for x in (stamp, run)])
    answer = all_to_all_rows(
        message,
        [size + count for count in send_counts],
        [size + count for count in recv_counts],
        group,
        counter,
        kind,
    )
    _count_apart(stamp, group, counter, kind)
    runs = answer.split([size + count for count in recv_counts])
    check_stamps(_read(torch.stack([run[:size] for run in runs])), plan, group)
    return torch.cat([run[size:] for run in runs])


def all_gather_stamped(
    rows: Tensor, plan: Plan, group: ContextGroup, counter: CommunicationCounter, kind: str
) -> Tensor:
    """As ``all_gather_rows``, with the plan's stamp before each rank's. Waits for the device."""
    stamp = _stamp_rows(plan, rows)
    size = len(stamp)
    answer = all_gather_rows(torch.cat((stamp, rows)), group, counter, kind)
    _count_apart(stamp, group, counter, kind)
    runs = answer.unflatten(0, (group.size, -1))
    check_stamps(_read(runs[:, :size]), plan, group)
    return runs[:, size:].flatten(0, 1)


def _stamp_rows(plan: Plan, like: Tensor) -> Tensor:
    """As few rows of the shape and dtype of ``like``'s as hold a stamp."""
    row_bytes = like.shape[1:].numel() * like.element_size()
    size = -(-STAMP_BYTES // row_bytes)
    rows = torch.zeros(size * row_bytes, dtype=torch.uint8, device=like.device)
    rows[:STAMP_BYTES] = stamp_of(plan, like.device)
    return rows.view(like.dtype).view(size, *like.shape[1:])


def _read(rows: Tensor) -> Tensor:
    """Stamps int64 [P] of stamp rows [P, ...]."""
    numbers = rows.contiguous().flatten(1).view(torch.uint8)
    return numbers[:, :STAMP_BYTES].contiguous().view(torch.int64).flatten()


def _count_apart(
    stamp: Tensor, group: ContextGroup, counter: CommunicationCounter, kind: str
) -> None:
    moved = stamp.numel() * stamp.element_size() * (group.size - 1)
    counter.add(kind, sent=-moved, received=-moved)
    counter.add("plan", sent=moved, received=moved)
