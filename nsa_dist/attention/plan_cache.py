"""The plan of a call: checked, and cached for the last few batches of each group.

The cache compares by value: config, layout, sizes, dtype, device and document boundaries. So all
layers of a model share the plan of a batch. Each group has its own cache: calls in another group,
or on one rank, do not evict its plans.

Making a plan sends nothing, so some ranks may find theirs here while others make them. Every call
that sends data first agrees on its plan: see ``nsa_dist.comm.agreement``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nsa_dist.checks import as_int, describe, is_plain
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import NSAConfig, exact_gradients_problem
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan import Grid, Plan, build_plan
from nsa_dist.plan.grid import all_grids
from nsa_dist.plan.layout import check_lengths, make_layout
from nsa_dist.plan.parts import parts_problem
from nsa_dist.plan.statement import Statement, show_boundaries
from nsa_kernels.unchanged import Seen

CACHED_PLANS = 8


@dataclass(frozen=True)
class _Entry:
    """A plan of a batch; on a GPU, the event after its tables, and the streams that read them."""

    key: tuple[Any, ...]
    cu_seqlens: Tensor | None
    plan: Plan
    made: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set)

    @classmethod
    def new(cls, key: tuple[Any, ...], cu_seqlens: Tensor | None, plan: Plan) -> _Entry:
        device = plan.positions.device
        if device.type != "cuda":
            return cls(key, cu_seqlens, plan)
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(device))
        return cls(key, cu_seqlens, plan, made, {_current_stream(device)})

    def read_by_current_stream(self) -> None:
        """Have it wait for the tables, and have their memory wait for it when they are dropped.

        A capture cannot wait for what is outside of it; its plan is kept (``_captured``).
        """
        device = self.plan.positions.device
        if self.made is None or torch.cuda.is_current_stream_capturing():
            return
        if (raw := _current_stream(device)) in self.streams:
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.made)
        for x in self.plan.tensors():
            x.record_stream(stream)
        self.streams.add(raw)


def _current_stream(device: torch.device) -> int:
    """The number alone: a Stream takes the host longer than all else of a hit."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


_plans_of_one_rank: list[_Entry] = []
_plans_of_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, list[_Entry]] = (
    weakref.WeakKeyDictionary()
)
_host_copies: list[tuple[weakref.ref[Tensor], Seen, Tensor]] = []
_lock = threading.Lock()
# Plans whose tables a CUDA graph reads. Nothing tells when a graph ends, so they stay.
_captured: dict[int, Plan] = {}


def _plans_of(group: ContextGroup) -> list[_Entry]:
    if group.process_group is None:
        return _plans_of_one_rank
    return _plans_of_groups.setdefault(group.process_group, [])


def on_host(cu_seqlens: Tensor) -> Tensor:
    """A CPU copy of device boundaries, made once per batch and shared by all layers."""
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens
    if cu_seqlens.is_inference():  # To find it again the host would have to wait as well.
        return cu_seqlens.cpu()
    return _copy_of(cu_seqlens)


def _copy_of(cu_seqlens: Tensor) -> Tensor:
    with _lock:
        found = [(seen, copy) for source, seen, copy in _host_copies if source() is cu_seqlens]
    for seen, copy in reversed(found):
        if seen.again(cu_seqlens):
            return copy
    copy = cu_seqlens.to("cpu", copy=True)
    with _lock:
        _host_copies.append((weakref.ref(cu_seqlens), Seen(cu_seqlens, "cu_seqlens"), copy))
        del _host_copies[:-CACHED_PLANS]
    return copy


def _found_in(plans: list[_Entry], key: tuple[Any, ...], cu_seqlens: Tensor | None) -> Plan | None:
    """The plan of these values, which becomes the latest."""
    with _lock:  # Threads that share a model, or that load data.
        for at, entry in enumerate(plans):
            if entry.key == key and _same_documents(entry.cu_seqlens, cu_seqlens):
                plans.append(plans.pop(at))
                break
        else:
            return None
    entry.read_by_current_stream()
    return entry.plan


def _keep_if_captured(plan: Plan | None, device: torch.device) -> None:
    """Keep a plan that is found while a CUDA graph is captured, for as long as the process lives.

    Raises:
        ValueError: if there is none: the host would make it, and its copies would be the graph's.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return
    if plan is None:
        raise ValueError(
            "the attention must have run with these documents before a CUDA graph captures it, "
            "got the first call with them"
        )
    _captured[id(plan)] = plan


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
    inputs: Mapping[str, str] | None = None,
    problem: str | None = None,
    selector_grids: Mapping[str, Grid] | None = None,
    exact_gradients: int = 0,
) -> Plan:
    """The plan for one call, from the cache or new. A collective.

    Args:
        batch, local_length: rows, and tokens per row on this rank.
        cu_seqlens: int32 [documents + 1] boundaries of the whole padded stream, with B > 1 of the
            rows one after another; None if each row is one document.
        inputs: more values, as text by name, that must be equal on all ranks.
        problem: an error in the caller's input, raised here on every rank.
        selector_grids: a selector's ``grids(config)``; None for NSA's own selector.
        exact_gradients: as of the call that the plan is for.

    Raises:
        ValueError: on every rank of the group, if any rank's input is bad or ranks disagree.
    """
    group = context_group(group)
    counter = CommunicationCounter() if communication is None else communication
    try:
        batch = as_int("batch", batch, 0)
        local_length = as_int("local_length", local_length, 0)
    except ValueError as error:
        problem, batch, local_length = problem or str(error), 0, 0
    problem = problem or exact_gradients_problem(exact_gradients, group.size)
    grids = None
    if selector_grids is not None and isinstance(config, NSAConfig):
        grids = all_grids(config, selector_grids)
    plan = find_plan(
        config,
        layout,
        group,
        batch=batch,
        local_length=local_length,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
        device=device,
        counter=counter,
        inputs=inputs or {},
        problem=problem,
        grids=grids,
        exact_gradients=exact_gradients,
    )
    agree(plan.statement.also(call="get_plan"), None, group, counter)
    return plan


# Not compiled: it reads values of tensors, and runs once per batch.
# Hidden from selective checkpointing: a plan is made in the forward but only looked up in its
# recomputation, which would otherwise get saved results of other operations.
@torch.compiler.disable
@_disable_current_modes()
def find_plan(
    config: NSAConfig,
    layout: str,
    group: ContextGroup,
    *,
    batch: int,
    local_length: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    counter: CommunicationCounter,
    inputs: Mapping[str, str],
    problem: str | None = None,
    grids: Mapping[str, Grid] | None = None,
    exact_gradients: int = 0,
) -> Plan:
    """As ``get_plan``, but the ranks must still agree on it before they send data.

    Args:
        grids: all grids of the plan; None for NSA's own.

    Raises:
        ValueError: if this rank's input is bad; the other ranks raise it when they agree.
    """
    if torch._C._are_functorch_transforms_active():
        # Their tensors are only valid during a call, and the plan would keep them.
        problem = problem or (
            "the attention must not run under transforms of torch.func, except functional_call "
            "(use backward() or torch.autograd.grad), got one (grad, vmap, jvp, ...)"
        )
    layout = str(layout) if isinstance(layout, str) else layout
    if cu_seqlens is None:
        boundaries = "None"
    elif is_plain(cu_seqlens) and cu_seqlens.device.type != "meta":
        cu_seqlens = on_host(cu_seqlens)
        boundaries = ""  # Only formatted when a plan is made.
    else:
        boundaries = describe(cu_seqlens)
        must = "cu_seqlens must be None or an int32 tensor that is not on meta"
        problem = problem or f"{must}, got {boundaries}"
        cu_seqlens = None
    if not isinstance(config, NSAConfig):
        problem = problem or f"config must be an NSAConfig, got {config!r}"
    elif grids is None:
        grids = all_grids(config)
    grids = grids or {}
    asked = (tuple(inputs.items()), tuple(grids.items()))
    key = (config, layout, batch, local_length, dtype, device, exact_gradients, *asked)
    plans = _plans_of(group)
    if problem is None:
        found = _found_in(plans, key, cu_seqlens)
        _keep_if_captured(found, device)
        if found is not None:
            return found

    values = {
        "call": "forward",
        "layout": repr(layout),
        "group size": str(group.size),
        "batch size": str(batch),
        "local sequence length": str(local_length),
        "cu_seqlens": boundaries or show_boundaries(cu_seqlens),
        "dtype": str(dtype),
        "device": torch.device(device).type,
        "exact_gradients": repr(exact_gradients),
        **inputs,
    }
    if isinstance(config, NSAConfig):
        values |= {f.name: repr(x) for f, x in zip(fields(config), astuple(config), strict=True)}
    if grids:
        values["blocks"] = ", ".join(f"{name}: {grid}" for name, grid in grids.items())
    length = local_length * group.size
    cut = None
    try:
        cut = make_layout(layout, group.size)
        problem = problem or check_lengths(cut, batch, length, cu_seqlens)
        if problem is None and exact_gradients:
            problem = parts_problem(cut.name, exact_gradients, batch, length, cu_seqlens)
    except ValueError as error:
        problem = problem or str(error)
    statement = Statement(values)
    if problem is not None:
        agree(statement, problem, group, counter)  # Raises the problem on every rank.
    assert cut is not None
    # Plans are made on the host, and outside of inference mode: a training step may use this plan
    # next, and autograd cannot save inference tensors.
    with torch.inference_mode(False), on_cpu():
        own = None if cu_seqlens is None else cu_seqlens.clone()
        plan = build_plan(
            config, cut, group.rank, group.size, batch, length, own, grids, exact_gradients
        )
        plan = replace(plan.to(device), statement=statement)
    with _lock:
        plans.append(_Entry.new(key, own, plan))
        del plans[:-CACHED_PLANS]
    return plan
