"""The data of a batch that attention layers share, computed once per forward.

transformers passes attention modules a mask of queries x keys, which this attention does not use.
Instead the decoder's ``forward`` reads padding, documents and the cache, and passes a ``Batch``
with the keyword arguments.

Letters: B rows, T tokens per row (with cached ones), N new tokens without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist.attention.plan_cache import find_plan
from nsa_dist.checks import INTEGER_DTYPES, describe, is_plain
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import ContextGroup
from nsa_dist.config import NSAConfig
from nsa_dist.decoding.static import StaticTables
from nsa_dist.decoding.step import Step, plan_step
from nsa_dist.plan import Plan
from nsa_dist.plan.statement import Statement


@dataclass(frozen=True, eq=False)
class Runtime:
    """How a model runs, which does not change what it computes.

    Attributes:
        group_is_set: whether the user has set the group, even to None.
        batch_invariant: whether a token's bits are to depend on its document alone.
    """

    context: ContextGroup
    layout: str
    backend: str
    communication: CommunicationCounter
    group_is_set: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one forward.

    Attributes:
        runtime: group, layout and backend.
        rows: int64 [N], the indices of tokens among the B * new columns; None if all columns are
            tokens and rows stay separate.
        plan: plan of the stream of tokens; None with a cache.
        step: positions with a cache, else None.
    """

    runtime: Runtime
    rows: Tensor | None
    plan: Plan | None
    step: Step | None

    @property
    def device(self) -> torch.device:
        """Of the tables."""
        plan = self.plan if self.step is None else self.step.plan
        assert plan is not None
        return plan.positions.device


def read_mask(mask: Tensor | None, batch: int, length: int) -> list[tuple[int, int]] | None:
    """The [start, end) columns of each row's tokens; None if all columns are tokens.

    Args:
        mask: [B, T], 0 for padding and any other value for tokens, or None.

    Raises:
        ValueError: for a mask of another shape, or padding between the tokens of a row.
    """
    if mask is None:
        return None
    must = f"None or a padding mask [batch, cached and new tokens] of shape {(batch, length)}"
    if not isinstance(mask, Tensor) or mask.ndim != 2 or tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask must be {must}, got {describe(mask)}")
    shown = mask.bool().cpu()
    if bool(shown.all()):
        return None
    tokens = shown.sum(1)
    first = shown.int().argmax(1)
    columns = torch.arange(length)
    run = (columns >= first[:, None]) & (columns < (first + tokens)[:, None])
    holes = (run != shown).any(1)
    if bool(holes.any()):
        raise ValueError(
            "attention_mask must be one with padding before or after a row's tokens only, got "
            f"padding between tokens (row {int(holes.nonzero()[0])})"
        )
    first = torch.where(tokens > 0, first, length)
    return list(zip(first.tolist(), (first + tokens).tolist(), strict=True))


def starts_of_step(
    mask: Tensor | None, starts: tuple[int, ...], past: int
) -> tuple[int, ...] | None:
    """The start of each row in a step of one new token, without waiting for the device.

    They are those of the cache, which a device compares the mask with by itself: where they differ
    it fails as it does for an index out of range.

    Args:
        starts: of the rows of the cache.
        past: cached tokens of each row.

    Returns:
        None where the mask has to be read: on the host, or if a row was all padding so far.
    """
    if not isinstance(mask, Tensor) or mask.device.type == "cpu" or max(starts, default=0) >= past:
        return None
    if tuple(mask.shape) != (len(starts), past + 1):
        return None
    assert_starts(mask, starts)
    return starts


def assert_starts(mask: Tensor, starts: tuple[int, ...]) -> None:
    """Make the device fail unless each row of a mask is padding, tokens from its start, padding."""
    shown = mask.bool()
    opens = shown & ~F.pad(shown, (1, 0))[:, :-1]
    columns = torch.arange(shown.shape[1], device=mask.device)
    first = torch.tensor(starts).to(mask.device, non_blocking=True)[:, None]
    torch._assert_async(
        (opens == (columns == first)).all(),
        "attention_mask must be one whose rows start as in the cache, without holes",
    )


def packed_boundaries(position_ids: Tensor, batch: int) -> Tensor | None:
    """Boundaries of packed documents: a document starts where positions do not increase by 1.

    Args:
        position_ids: integer [1 or B, T].

    Returns:
        int32 boundaries of the concatenated rows, on the CPU; None if each row is one document.
    """
    positions = position_ids.cpu().expand(batch, -1)
    opens = torch.ones_like(positions, dtype=torch.bool)
    opens[:, 1:] = positions.diff(dim=1) != 1
    if int(opens[:, 1:].sum()) == 0:
        return None
    end = torch.tensor([positions.numel()])
    return torch.cat((opens.flatten().nonzero().squeeze(1), end)).int()


def check_positions_count_on(
    position_ids: Tensor, batch: int, ranges: list[tuple[int, int]] | None, past: int
) -> None:
    """Raise ValueError if positions start again within a row that has padding or a cache.

    A single new token is not checked, because that would wait for the device at each step.

    Args:
        position_ids: integer [1 or B, new].
        ranges: from ``read_mask``, for all B x T columns.
        past: cached tokens of each row.
    """
    new = position_ids.shape[1]
    if new == 1:
        return
    positions = position_ids.cpu().long().expand(batch, -1)
    first, end = torch.tensor(ranges or [(0, past + new)] * batch).unsqueeze(-1).unbind(1)
    columns = torch.arange(past, past + new)
    token = (columns >= first) & (columns < end)
    restarts = torch.zeros_like(token)
    restarts[:, 1:] = token[:, 1:] & token[:, :-1] & (positions.diff(dim=1) != 1)
    # A row may start at any position, but has counted its cached tokens since.
    restarts[:, :1] = token[:, :1] & (positions[:, :1] < past - first)
    if bool(restarts.any()):
        row, column = restarts.nonzero()[0].tolist()
        given = "padding in attention_mask" if ranges is not None else "past_key_values"
        raise ValueError(
            f"position_ids must be those of one document per row with {given} (packed documents "
            "need neither padding nor a cache), got positions that start again at row "
            f"{row}, new token {column}"
        )


def plan_stream(
    config: NSAConfig,
    runtime: Runtime,
    tokens: Tensor,
    ranges: list[tuple[int, int]] | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    *,
    exact_positions: bool,
    dtype: torch.dtype,
) -> tuple[Batch, Tensor]:
    """The batch of a forward without a cache, and its positions.

    A collective if the sequence is split, after ``documents_of_split``.

    Args:
        tokens: [B, L] or [B, L, hidden]; only shape and device are used.
        ranges: from ``read_mask``.
        cu_seqlens: int32 boundaries of packed documents, of the whole padded stream.
        position_ids: positions from the caller.
        exact_positions: whether these must be the positions within the documents of
            ``cu_seqlens``.
        dtype: dtype of the model.

    Returns:
        The batch, and integer positions [B, L].
    """
    rows_given, length = tokens.shape[:2]
    device = tokens.device
    communication = runtime.communication
    rows, batch = None, rows_given
    if ranges is not None:
        lengths = torch.tensor([0] + [end - start for start, end in ranges])
        cu_seqlens = lengths.cumsum(0).int()
        columns = [torch.arange(a, b) + i * length for i, (a, b) in enumerate(ranges)]
        rows, batch, length = torch.cat(columns).to(device), 1, int(cu_seqlens[-1])
    elif cu_seqlens is not None and rows_given > 1 and runtime.context.size == 1:
        # Packed documents in several rows, from position_ids.
        batch, length = 1, rows_given * length
        rows = torch.arange(length, device=device)
    plan = find_plan(
        config,
        runtime.layout,
        runtime.context,
        batch=batch,
        local_length=length,
        cu_seqlens=cu_seqlens,
        dtype=dtype,
        device=device,
        counter=communication,
        inputs={"backend": runtime.backend, "model": "transformers"},
    )
    shape = tokens.shape[:2]
    positions = plan.positions
    if rows is not None:
        positions = positions.new_zeros(shape.numel()).index_copy(0, rows, positions)
    positions = positions.view(shape)
    if position_ids is not None:
        if exact_positions:
            _check_positions(position_ids, positions, runtime.context, communication)
        positions = position_ids.expand(shape)
    return Batch(runtime, rows, plan, None), positions


def _check_positions(
    given: Tensor, expected: Tensor, context: ContextGroup, communication: CommunicationCounter
) -> None:
    """Raise ValueError, on every rank, where positions are not those within documents."""
    problem = None
    if not torch.equal(given.expand(expected.shape).to(expected), expected):
        problem = (
            "position_ids must be None or the positions of nsa_dist.shard_batch, within the "
            "documents of cu_seqlens and in this layout, got different positions"
        )
    agree(Statement({"call": "positions of a model"}), problem, context, communication)


def check_position_ids(position_ids: Tensor | None, shape: tuple[int, ...]) -> str | None:
    """The error for positions of a wrong type or shape, or None."""
    if position_ids is None:
        return None
    must = f"None or integers of shape {shape}"
    if (
        not is_plain(position_ids)
        or position_ids.ndim != 2
        or position_ids.dtype not in INTEGER_DTYPES
        or tuple(position_ids.shape) not in (shape, (1, shape[1]))
    ):
        return f"position_ids must be {must}, got {describe(position_ids)}"
    return None


def plan_cached(
    config: NSAConfig,
    runtime: Runtime,
    tokens: Tensor,
    starts: tuple[int, ...],
    past: int,
    capacity: int,
) -> tuple[Batch, Tensor]:
    """The batch of a forward with a cache, and its positions.

    Args:
        tokens: [B, new] or [B, new, hidden]; only shape and device are used.
        starts: column of the first token of each row.
        past: cached tokens of each row.
        capacity: tokens that the caches have room for.

    Returns:
        The batch, and integer positions [B, new], 0 in padding.
    """
    new, device = tokens.shape[1], tokens.device
    step = plan_step(config, starts, past, new, capacity, device)
    if max(starts, default=0) <= past:  # No padding among the new columns.
        return Batch(runtime, None, None, step), step.plan.positions.view(tokens.shape[:2])
    columns = torch.arange(past, past + new) - torch.tensor(starts)[:, None]
    rows = (columns >= 0).flatten().nonzero().squeeze(1).to(device)
    return Batch(runtime, rows, None, step), columns.clamp(min=0).to(device)


def plan_static(runtime: Runtime, tables: StaticTables, past: int) -> tuple[Batch, Tensor]:
    """The batch of a step of one token that ``tables.begin`` announced, and its positions [B, 1].

    The host reads nothing, and no shape depends on what is cached.
    """
    step = tables.step(past)
    return Batch(runtime, None, None, step), step.plan.positions.unsqueeze(1)
