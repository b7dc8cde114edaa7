"""``check_parallel``: compares every attention of a model over P ranks with one rank's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist.attention.selectors import CompressedSelector
from nsa_dist.checks import as_int, check
from nsa_dist.comm.group import ContextGroup
from nsa_dist.self_check.recording import Record, Recorder
from nsa_dist.self_check.reference import (
    Places,
    Reference,
    add_over_ranks,
    find_places,
    run_on_one_rank,
)
from nsa_dist.self_check.report import ParallelReport, TensorDifference
from nsa_dist.sharding import ShardedBatch, Sharding


def check_parallel(
    model: nn.Module,
    run: Callable[[], Any],
    sharding: Sharding | ShardedBatch | None = None,
    *,
    rows: int | None = None,
) -> ParallelReport:
    """Run a model once over its ranks, and each of its attentions once more on one rank. A
    collective.

        batch = shard_batch(tokens, cu_seqlens=cu_seqlens, layout="zigzag", group=mesh["cp"])
        report = check_parallel(model, lambda: loss_of(model, batch).backward(), batch)
        print(report)
        report.raise_if_different()

    ``run`` is watched as it is, with its FSDP, recomputation and streams. What every attention got
    (queries, keys, values, gates), gave and received as gradient is then gathered, layer by layer,
    and each rank computes the layer's attention on the whole stream and compares its own part:
    output, chosen blocks, and the gradients of inputs and of the compressors' weights. So an error
    is told at the layer that makes it, and not at those after it.

    It works for the layers of this package and of the adapters. It compares attentions, not what
    lies between them: projections, norms and losses act on each token alone.

    Memory: each rank keeps inputs, outputs and their gradients of its tokens in host memory for all
    layers; on the device, one layer's attention of the whole stream, or with ``rows`` its keys and
    values and that many queries.

    Args:
        model: the whole model, or this rank's stage of it.
        run: one forward and backward of the model on this rank's part of a batch, which calls each
            attention once. A forward alone checks no gradients.
        sharding: how the batch was cut; then tokens that stand elsewhere than a layer believes are
            found too. None: the layers' own plans say where tokens stand.
        rows: compare about this many queries, spread over the stream; the gradients that ``run``
            makes are then of these alone. None: all, as with a selector of your own.

    Returns:
        The differences, equal on all ranks of the attention's group.

    Raises:
        ValueError: if an argument has a value that is not allowed, or ``run`` calls no attention,
            or one twice.
    """
    check(isinstance(model, nn.Module), "model", type(model), "an nn.Module")
    check(callable(run), "run", run, "a function without arguments")
    rows = None if rows is None else as_int("rows", rows, 1)
    given = sharding.sharding if isinstance(sharding, ShardedBatch) else sharding
    must = "a ShardedBatch, a Sharding or None"
    check(given is None or isinstance(given, Sharding), "sharding", type(sharding), must)
    recorder = Recorder(model, rows)
    with recorder.recording():
        run()
    records = list(recorder.records.values())
    if not records:
        raise ValueError("run must call the model's attention layers, got a run without any")
    groups = {id(record.call.channel.group.process_group) for record in records}
    if len(groups) > 1:
        raise ValueError(f"model must have its layers in one group, got {len(groups)} groups")
    group = records[0].call.channel.group
    others = [r.selector.name for r in records if not isinstance(r.selector, CompressedSelector)]
    if rows is not None and others:
        # It may look up positions and documents of all tokens.
        raise ValueError(f"rows must be None with selector {others[0]!r}, got {rows}")
    own = [(record.layer, sorted(record.grads)) for record in records]
    for rank, found in enumerate(_from_all(own, group)):
        if found != own:
            got = f"{own} here, {found} on rank {rank}"
            raise ValueError(f"run must call the same layers on all ranks, got {got}")
    problem = None if given is None else _sharding_problem(records, given)
    for rank, told in enumerate(_from_all(problem, group)):
        if told is not None:
            raise ValueError(f"{told} on rank {rank}")
    differences: list[TensorDifference] = []
    queries = (0, 0)
    for record in records:
        places = find_places(record, given)
        reference = run_on_one_rank(record, places)
        queries = (len(reference.rows), len(places.all))
        local = list(_differences(record, places, reference, checks_places=given is not None))
        # A list a rank, and in it a number a tensor.
        of_ranks = _from_all([value for _, value, _ in local], group)
        for (tensor, _, limit), values in zip(local, zip(*of_ranks, strict=True), strict=True):
            worst = max(values)
            where = values.index(worst)
            differences.append(TensorDifference(record.layer, tensor, worst, limit, where))
    return ParallelReport(group.size, queries, tuple(differences))


def _from_all(value: Any, group: ContextGroup) -> list[Any]:
    """Every rank's value, in rank order. A collective."""
    found: list[Any] = [value] * group.size
    if group.size > 1:
        dist.all_gather_object(found, value, group=group.process_group)
    return found


def _sharding_problem(records: list[Record], sharding: Sharding) -> str | None:
    """The error if the sharding is not that of the calls' batch, or None."""
    local = sharding.local_columns.numel()
    for record in records:
        plan, size = record.call.plan, record.call.channel.group.size
        found = (size, plan.local_length)
        if found != (sharding.context.size, local):
            return (
                f"sharding must be of the batch that {record.layer} gets, {found[1]} tokens a row "
                f"on each of {found[0]} ranks, got one of {local} on {sharding.context.size}"
            )
    return None


def _differences(
    record: Record, places: Places, reference: Reference, *, checks_places: bool
) -> Iterator[tuple[str, float, float]]:
    """This rank's difference and the limit of each tensor, by name. A collective."""
    plan, dtype = record.call.plan, record.inputs["q"].dtype
    group = record.call.channel.group
    limit = rounding(dtype, group.size)
    own = places.own
    if checks_places:
        documents, positions = places.positions()
        wrong = (documents != plan.documents.cpu()) | (positions != plan.positions.cpu())
        yield "positions", float(wrong.double().mean()) if len(wrong) else 0.0, 0.0
    kept = torch.ones(len(own), dtype=torch.bool) if record.sampled is None else record.sampled
    at = torch.searchsorted(reference.rows, own[kept])
    if record.blocks is not None and reference.blocks is not None:
        others = (record.blocks[kept] != reference.blocks.cpu()[at]).any(-1)
        share = float(others.double().mean()) if others.numel() else 0.0
        yield "blocks", share, _limit_of_blocks(record)
    yield "out", _relative(record.out[kept], reference.out.cpu(), at), limit
    for name, whole in reference.grads.items():
        grad = record.grads[name]
        label = f"grad of {name}"
        if name in ("q", "gates"):
            yield label, _relative(grad[kept], whole.cpu(), at), limit
        elif name in record.inputs:
            yield label, _relative(grad, whole.cpu(), own), limit
        else:
            # A gradient that is zero but for rounding is judged by the others of its module.
            module = name.partition(".")[0]
            siblings = [x for key, x in reference.grads.items() if key.partition(".")[0] == module]
            scale = max(_largest(x) for x in siblings)
            total = add_over_ranks(grad, group)
            yield label, _ratio(_largest(total.double() - whole.cpu().double()), scale), limit


def rounding(dtype: torch.dtype, size: int) -> float:
    """What rounding explains of a difference, relative to the largest value of a tensor.

    Gradients of keys and values are sums over ranks: in 16 bits each rank's share is rounded once.
    """
    if dtype == torch.float64:
        return 1e-12
    eps = torch.finfo(dtype).eps
    return 64 * eps if dtype == torch.float32 else (4 + size / 2) * eps


def _limit_of_blocks(record: Record) -> float:
    """The share of choices that rounding may change: compressed keys of plain PyTorch round
    otherwise where a block stands elsewhere, and then the last of a query's blocks may differ."""
    exact = record.inputs["q"].dtype == torch.float64 or record.call.backend.name == "triton"
    return 0.0 if exact else 0.01


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _relative(found: Tensor, whole: Tensor, at: Tensor) -> float:
    """The largest difference from ``whole[at]``, over the largest value of ``whole``."""
    if not found.numel():
        return 0.0
    return _ratio(_largest(found.double() - whole[at].double()), _largest(whole.double()))


def _ratio(difference: float, scale: float) -> float:
    if math.isnan(difference) or math.isnan(scale):
        return math.inf
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf
