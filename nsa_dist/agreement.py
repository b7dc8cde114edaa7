"""Ranks compare what they are about to do before the first collective that depends on it.

One eight-byte hash a rank is compared for every new plan. Only where hashes differ, or a rank has
found its own input bad, is more exchanged: each rank's values, so that every rank raises the same
error and none waits for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from nsa_dist.comm.collectives import all_reduce_max
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.group import ContextGroup

MOST_BOUNDARIES_SHOWN = 8


def fingerprint(values: Mapping[str, str]) -> int:
    """A 63-bit hash of option names and values; never 0."""
    text = "\n".join(f"{name}={value}" for name, value in values.items())
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) | 1


def agree(
    values: Mapping[str, str],
    problem: str | None,
    group: ContextGroup,
    counter: CommunicationCounter,
) -> int:
    """Return the common fingerprint of ``values``, or raise on every rank. A collective.

    Args:
        values: option names and printed values that must be equal on all ranks.
        problem: what this rank found wrong with its own input, if anything.

    Raises:
        ValueError: on every rank, naming each option that differs and each rank's value of it, or
            each rank's problem.
    """
    own = fingerprint(values)
    if group.size == 1:
        if problem is not None:
            raise ValueError(problem)
        return own
    stamp = 0 if problem is not None else own
    # The largest and the smallest stamp, by a collective that no forward uses: should the others be
    # in a forward already, with a plan that this rank lacks, no message is taken for another and
    # all time out.
    extremes = torch.tensor([stamp, -stamp], device=group.device)
    largest, smallest = all_reduce_max(extremes, group, counter, "plan").tolist()
    if largest == -smallest != 0:
        return own
    reports: list[tuple[dict[str, str], str | None]] = [({}, None)] * group.size
    dist.all_gather_object(reports, (dict(values), problem), group=group.process_group)
    raise ValueError(_explain(reports))


def _explain(reports: list[tuple[dict[str, str], str | None]]) -> str:
    lines = [f"rank {p}: {problem}" for p, (_, problem) in enumerate(reports) if problem]
    if lines and len(lines) < len(reports):
        fine = [p for p, (_, problem) in enumerate(reports) if problem is None]
        lines.append(f"ranks {fine} found nothing wrong with theirs")
    for name in reports[0][0]:
        found = [values.get(name, "nothing") for values, _ in reports]
        if len(set(found)) > 1:
            shown = ", ".join(f"rank {p}: {value}" for p, value in enumerate(found))
            lines.append(f"{name}: found {shown}; one value on all the ranks of the group works")
    return "; ".join(lines)


def show_boundaries(cu_seqlens: torch.Tensor | None) -> str:
    """Document boundaries as text that differs whenever they differ, short for long ones."""
    if cu_seqlens is None:
        return "None"
    values = cu_seqlens.tolist()
    dtype = "" if cu_seqlens.dtype == torch.int32 else f"{cu_seqlens.dtype} "
    if not isinstance(values, list) or len(values) <= MOST_BOUNDARIES_SHOWN:
        return f"{dtype}{values}"
    digest = hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()
    shown = ", ".join(map(str, values[: MOST_BOUNDARIES_SHOWN - 1]))
    return f"{dtype}[{shown}, ..., {values[-1]}] ({len(values)} boundaries, hash {digest})"
