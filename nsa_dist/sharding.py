"""Shard a batch over the ranks of a group, and undo it.

Call it once per batch, between the data loader and the model. Every rank has the whole batch and
keeps its own columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nsa_dist.checks import INTEGER_DTYPES, as_int, describe, is_plain
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.channel import Channel
from nsa_dist.comm.collectives import begin_all_gather
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.comm.group import ContextGroup, GroupLike, context_group
from nsa_dist.config import exact_gradients_problem
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan.layout import check_batch_size, check_cu_seqlens, local_indices, make_layout
from nsa_dist.plan.parts import parts_layout
from nsa_dist.plan.statement import Statement, show_boundaries

IGNORED_LABEL = -100
WHOLE_ROW_LAYOUTS = ("contiguous", "zigzag")
"""Layouts that split every row in the same way, whatever its documents are."""


@dataclass(frozen=True, eq=False)
class Sharding:
    """The padding of one batch and the columns of each rank.

    Attributes:
        context: the group.
        layout: the layout's name.
        length: tokens T of an unpadded row.
        padded_length: tokens of a padded row; each rank holds 1/P of them.
        cu_seqlens: int32 document boundaries of the padded stream, on the CPU; None if each row is
            one document.
        source: int64 [padded_length], the unpadded column of each padded column; -1 for padding.
        local_columns: int64 [L], padded columns that this rank holds, in its order.
    """

    context: ContextGroup
    layout: str
    length: int
    padded_length: int
    cu_seqlens: Tensor | None
    source: Tensor
    local_columns: Tensor
    rank_columns: Tensor = field(repr=False)

    def shard(self, x: Tensor, pad_value: float = 0) -> Tensor:
        """[B, T, ...] to this rank's [B, L, ...]; padding is filled with ``pad_value``."""
        problem = self._problem(x, self.length, "the unsharded length")
        if problem is not None:
            raise ValueError(problem)
        source = self.source[self.local_columns].to(x.device)
        local = x[:, source.clamp(min=0)]
        if bool((source < 0).any()):
            local[:, source < 0] = pad_value
        return local

    def unshard(self, x: Tensor) -> Tensor:
        """This rank's [B, L, ...] to whole rows [B, T, ...] on every rank. A collective.

        Removes padding. Gradients do not flow through it.

        Raises:
            ValueError: on every rank, if any rank's x is bad or ranks disagree.
        """
        problem = self._problem(x, self.local_columns.numel(), "the local length")
        values = {
            "call": "unshard",
            "x": describe(x),
            "length": str(self.length),
            "layout": repr(self.layout),
            "cu_seqlens": show_boundaries(self.cu_seqlens),
        }
        counter = CommunicationCounter()
        statement = Statement(values)
        agree(statement, problem, self.context, counter)
        channel = Channel(self.context, counter, statement)
        gathered = begin_all_gather(x.detach(), channel, "unshard").finish()
        rows = gathered.unflatten(0, (self.context.size, -1)).transpose(0, 1).flatten(1, 2)
        padded = torch.empty_like(rows)
        padded[:, self.rank_columns.to(x.device)] = rows
        return padded[:, (self.source >= 0).nonzero().squeeze(1).to(x.device)]

    def _problem(self, x: Tensor, length: int, meaning: str) -> str | None:
        """The error for rows that cannot be sharded or unsharded, or None."""
        if not is_plain(x):
            return f"x must be a plain tensor, got {describe(x)}"
        if x.ndim < 2 or x.shape[1] != length:
            return f"x must be of shape [batch, {length}, ...] ({meaning}), got {describe(x)}"
        if self.cu_seqlens is not None:
            return check_batch_size(x.shape[0])
        return None


def make_sharding(
    length: int,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    exact_gradients: int = 0,
) -> Sharding:
    """Pad rows of ``length`` tokens as ``layout`` needs, and split them over the group.

    ``contiguous`` and ``zigzag`` pad the end of the row, to a multiple of P or 2P. With
    ``cu_seqlens`` the padding is one more document; otherwise it extends the row, whose tokens do
    not see it because attention is causal. ``zigzag_per_document`` pads the end of each document
    to a multiple of 2P.

    Args:
        cu_seqlens: int32 [documents + 1] boundaries of the unpadded stream, with B = 1; None if
            each row is one document.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    context = context_group(group)
    cut = make_layout(layout, context.size)
    problem = exact_gradients_problem(exact_gradients, context.size)
    if problem is not None:
        raise ValueError(problem)
    padded = parts_layout(cut.name, exact_gradients) if exact_gradients else cut
    length = as_int("length", length, 0)
    if cu_seqlens is not None:
        if not is_plain(cu_seqlens) or cu_seqlens.is_meta:
            given = describe(cu_seqlens)
            raise ValueError(f"cu_seqlens must be an int32 tensor or None, got {given}")
        cu_seqlens = cu_seqlens.cpu()
        problem = check_cu_seqlens(cu_seqlens)
        if problem is None and int(cu_seqlens[-1]) != length:
            last = int(cu_seqlens[-1])
            problem = f"cu_seqlens must end at the length {length}, got last boundary {last}"
        if problem is not None:
            raise ValueError(problem)

    with on_cpu():
        multiple = padded.multiple
        if padded.per_document and cu_seqlens is not None:
            lengths = cu_seqlens.long().diff()
            padded_lengths = (lengths + multiple - 1) // multiple * multiple
            padded_length = int(padded_lengths.sum())
            start = torch.repeat_interleave(padded_lengths.cumsum(0) - padded_lengths, lengths)
            column = (
                start
                + torch.arange(length)
                - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
            )
            ends = padded_lengths.cumsum(0)
            cu_seqlens = torch.cat((ends.new_zeros(1), ends)).int()
        else:
            padded_length = (length + multiple - 1) // multiple * multiple
            column = torch.arange(length)
            if cu_seqlens is not None and padded_length > length:
                cu_seqlens = torch.cat((cu_seqlens, cu_seqlens.new_tensor([padded_length])))
        source = torch.full((padded_length,), -1, dtype=torch.int64)
        source[column] = torch.arange(length)
        columns = [
            local_indices(cut, rank, 1, padded_length, cu_seqlens) for rank in range(context.size)
        ]
    return Sharding(
        context=context,
        layout=cut.name,
        length=length,
        padded_length=padded_length,
        cu_seqlens=cu_seqlens,
        source=source,
        local_columns=columns[context.rank],
        rank_columns=torch.cat(columns),
    )


def shard(
    x: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    pad_value: float = 0,
    exact_gradients: int = 0,
) -> Tensor:
    """This rank's part of whole rows: [B, T, ...] to [B, L, ...], padded as ``layout`` needs.

    Args:
        cu_seqlens: int32 boundaries of the unpadded stream, with B = 1; None if each row is one
            document. ``make_sharding(...)`` has the padded boundaries that attention needs.
        exact_gradients: as of ``make_sharding``.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    if not is_plain(x) or x.ndim < 2:
        raise ValueError(f"x must be a tensor [batch, length, ...], got {describe(x)}")
    sharding = make_sharding(
        x.shape[1],
        cu_seqlens=cu_seqlens,
        layout=layout,
        group=group,
        exact_gradients=exact_gradients,
    )
    return sharding.shard(x, pad_value)


def unshard(
    x: Tensor,
    length: int,
    *,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    exact_gradients: int = 0,
) -> Tensor:
    """The inverse of ``shard``: [B, L, ...] on each rank to [B, T, ...] on all. A collective.

    Args:
        length: T, the unpadded length.
        cu_seqlens, exact_gradients: as given to ``shard``.

    Raises:
        ValueError: on every rank, if an argument of any rank has a value that is not allowed.
    """
    context = context_group(group)
    try:
        sharding = make_sharding(
            length,
            cu_seqlens=cu_seqlens,
            layout=layout,
            group=context,
            exact_gradients=exact_gradients,
        )
    except ValueError as error:
        agree(Statement({"call": "unshard"}), str(error), context, CommunicationCounter(), error)
        raise
    return sharding.unshard(x)


@torch.compiler.disable
@_disable_current_modes()  # As in find_plan.
def boundaries_from_positions(
    positions: Tensor,
    *,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
) -> Tensor:
    """The documents of a batch that was packed elsewhere, from its positions. A collective.

    A document starts at each position 0, and at each row's start. A row that begins with another
    position begins within a document whose start it lacks; its first tokens are one document.

    Args:
        positions: integers [B, L], positions in the document of this rank's tokens.
        layout: how rows were split, "contiguous" or "zigzag".
        group: the ranks that share the rows.

    Returns:
        int32 [documents + 1] on the CPU, boundaries of the B rows one after another: the
        ``cu_seqlens`` of the attention.

    Raises:
        ValueError: on every rank of the group, if positions of any rank are not allowed, or neither
            go on nor start at 0 where ``layout`` joins them.
    """
    context = context_group(group)
    problem = None
    if not is_plain(positions) or positions.ndim != 2 or positions.dtype not in INTEGER_DTYPES:
        problem = f"positions must be integers [batch, local tokens], got {describe(positions)}"
    elif layout not in WHOLE_ROW_LAYOUTS:
        names = " or ".join(map(repr, WHOLE_ROW_LAYOUTS))
        problem = f"layout must be {names} to find documents in positions, got {layout!r}"
    elif layout == "zigzag" and context.size > 1 and positions.shape[1] % 2:
        problem = f"local length must be even with layout 'zigzag', got {positions.shape[1]}"
    statement = Statement({"call": "boundaries_from_positions", "layout": repr(layout)})
    agree(statement, problem, context, CommunicationCounter())
    length = positions.shape[1] * context.size
    whole = make_sharding(length, layout=layout, group=context).unshard(positions).cpu().long()
    with on_cpu():
        starts = whole == 0
        starts[:, :1] = True
        goes_on = (whole[:, 1:] == whole[:, :-1] + 1) | starts[:, 1:]
        if not bool(goes_on.all()):
            row, column = ((~goes_on).nonzero()[0]).tolist()
            raise ValueError(
                f"positions must go on by 1 or start again at 0 in rows split as {layout!r} over "
                f"{context.size} ranks, got {int(whole[row, column])} before "
                f"{int(whole[row, column + 1])} (row {row}, column {column})"
            )
        first = starts.flatten().nonzero().flatten()
        return torch.cat((first, first.new_tensor([whole.numel()]))).int()


@dataclass(frozen=True, eq=False)
class ShardedBatch:
    """One rank's part of a language-modelling batch.

    Attributes:
        tokens: int64 [B, L].
        labels: int64 [B, L], the next token of the document; -100 at each document's last token
            and in padding.
        position_ids: int64 [B, L], positions in the document.
        cu_seqlens: int32 boundaries of the whole padded stream, on the CPU; pass them to the
            layer. None if each row is one document.
        num_targets: number of labels other than -100 in the whole batch, over all ranks. Divide
            the sum of all ranks' losses by it.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    num_targets: int
    sharding: Sharding = field(repr=False)

    def unshard(self, x: Tensor) -> Tensor:
        """[B, L, ...] on each rank to [B, T, ...] on all, without padding. A collective."""
        return self.sharding.unshard(x)


def shard_batch(
    tokens: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    labels: Tensor | None = None,
    layout: str = "zigzag",
    group: GroupLike | ContextGroup = None,
    pad_token: int = 0,
    exact_gradients: int = 0,
) -> ShardedBatch:
    """Split a batch of token ids over the ranks of ``group``.

    Labels are shifted per document before the split. Shifting a rank's own tokens instead would
    pair the last token of a chunk with the first token of another chunk.

    Args:
        tokens: integer [B, T], the whole batch, equal on all ranks.
        cu_seqlens: int32 [documents + 1] boundaries of packed documents, with B = 1; None if each
            row is one document.
        labels: integer [B, T], unshifted targets, -100 to ignore a token; default ``tokens``.
        layout, group: as for the attention layers.
        pad_token: token id of the padding.
        exact_gradients: as of ``make_sharding``.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    labels = tokens if labels is None else labels
    for name, ids in (("tokens", tokens), ("labels", labels)):
        if not is_plain(ids) or ids.ndim != 2 or ids.dtype not in INTEGER_DTYPES:
            raise ValueError(f"{name} must be integers [batch, length], got {describe(ids)}")
    if labels.shape != tokens.shape:
        shapes = f"{tuple(tokens.shape)}, got {tuple(labels.shape)}"
        raise ValueError(f"labels must be of the shape of tokens, {shapes}")
    pad_token = as_int("pad_token", pad_token, 0)
    tokens, labels = tokens.long(), labels.long()  # uint8 cannot hold -100.
    problem = None if cu_seqlens is None else check_batch_size(tokens.shape[0])
    if problem is not None:
        raise ValueError(problem)
    length = tokens.shape[1]
    sharding = make_sharding(
        length,
        cu_seqlens=cu_seqlens,
        layout=layout,
        group=group,
        exact_gradients=exact_gradients,
    )

    bounds = torch.tensor([0, length], device="cpu")
    if cu_seqlens is not None:
        bounds = cu_seqlens.cpu().long()
    targets = torch.full_like(labels, IGNORED_LABEL)
    targets[:, :-1] = labels[:, 1:]
    last = (bounds[1:] - 1)[bounds.diff() > 0].to(labels.device)
    targets[:, last] = IGNORED_LABEL

    padded_bounds = sharding.cu_seqlens
    columns = torch.arange(sharding.padded_length, device="cpu")
    if padded_bounds is not None:
        start = padded_bounds.long()
        columns = columns - torch.repeat_interleave(start[:-1], start.diff())
    positions = columns[sharding.local_columns].to(tokens.device)
    return ShardedBatch(
        tokens=sharding.shard(tokens, pad_token),
        labels=sharding.shard(targets, IGNORED_LABEL),
        position_ids=positions.expand(tokens.shape[0], -1),
        cu_seqlens=padded_bounds,
        num_targets=int((targets != IGNORED_LABEL).sum()),
        sharding=sharding,
    )
