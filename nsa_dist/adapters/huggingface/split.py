"""Documents, padding and targets of a sequence whose parts the ranks hold.

Rows of a batch are whole for a tokenizer and a collator, which mark documents by positions and
padding by a mask. Who splits rows afterwards splits both alike. So ranks gather them, once a batch,
and read them as one process would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_dist.adapters.huggingface.batch import Runtime
from nsa_dist.comm import Channel
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.collectives import begin_all_gather
from nsa_dist.plan.layout import Layout, check_lengths, local_indices, make_layout
from nsa_dist.plan.statement import Statement
from nsa_dist.sharding import IGNORED_LABEL


def documents_of_split(
    runtime: Runtime,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    problem: str | None,
) -> Tensor | None:
    """Boundaries of the documents of a batch, of which each rank holds a part. A collective.

    Args:
        shape: rows B and tokens L of each row on this rank.
        position_ids: integer [1 or B, L] or None, this rank's part; they start at 0 in each
            document.
        attention_mask: [B, L] or None, this rank's part; 0 for padding, at the end of whole rows.
        cu_seqlens: boundaries from the caller; then nothing is gathered.
        problem: an error of this rank, raised on every rank.

    Returns:
        int32 boundaries on the CPU, or ``cu_seqlens``; None if each row is one document.

    Raises:
        ValueError: on every rank, if an argument of any rank has a value that is not allowed.
    """
    context, (batch, length) = runtime.context, shape
    statement = Statement(
        {
            "call": "model's forward",
            "layout": repr(runtime.layout),
            "batch size": str(batch),
            "local sequence length": str(length),
            "position_ids": "None" if position_ids is None else "given",
            "attention_mask": "None" if attention_mask is None else "given",
            "cu_seqlens": "None" if cu_seqlens is None else "given",
        }
    )
    agree(statement, problem, context, runtime.communication)
    if cu_seqlens is not None or (position_ids is None and attention_mask is None):
        return cu_seqlens
    # From here on all ranks see the same, and raise the same.
    layout, total = make_layout(runtime.layout, context.size), length * context.size
    problem = check_lengths(layout, batch, total, None)
    if problem is not None:
        raise ValueError(problem)
    parts = torch.ones(2, batch, length, dtype=torch.int64)
    if position_ids is not None:
        parts[0] = position_ids.cpu()
    if attention_mask is not None:
        parts[1] = attention_mask.cpu() != 0
    channel = Channel(context, runtime.communication, statement)
    gathered = begin_all_gather(parts.to(context.device), channel, "documents").finish().cpu()
    whole = torch.empty(2, batch, total, dtype=torch.int64)
    for rank, part in enumerate(gathered.chunk(context.size)):
        whole[..., local_indices(layout, rank, 1, total, None)] = part
    positions, is_token = whole[0], whole[1].bool()
    ends = is_token.sum(1, keepdim=True)
    columns = torch.arange(total)
    holes = ((columns < ends) != is_token).any(1)
    if bool(holes.any()):
        raise ValueError(
            "attention_mask must have padding only at the end of whole rows on a sequence split "
            "over ranks (tokenizer.padding_side='right'), got padding before tokens in row "
            f"{int(holes.nonzero()[0])}"
        )
    if position_ids is None:
        return None
    return _boundaries(positions, is_token, layout)


def targets_per_rank(runtime: Runtime, shift_labels: Tensor) -> Tensor:
    """Targets of a batch over all ranks, divided by their number: float32 []. A collective.

    Divided by it, the mean over ranks of their sums of losses is the mean over all targets. FSDP2
    takes this mean of gradients, and so does who takes each rank's mean loss for a dense model.
    """
    context = runtime.context
    statement = Statement({"call": "labels of a model"})
    agree(statement, None, context, runtime.communication)
    own = (shift_labels != IGNORED_LABEL).sum()[None].to(context.device)
    channel = Channel(context, runtime.communication, statement)
    numbers = begin_all_gather(own, channel, "targets").finish()
    return numbers.sum() / context.size


def _boundaries(positions: Tensor, is_token: Tensor, layout: Layout) -> Tensor | None:
    """Boundaries [documents + 1] of whole rows [B, T]; None if each row is one document.

    Padding belongs to the document before it, of which no token sees it.
    """
    opens = torch.ones_like(is_token)
    opens[:, 1:] = positions.diff(dim=1) != 1
    opens &= is_token
    wrong = opens & (positions != 0)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            "position_ids must be this rank's part, in the layout of the model, of positions that "
            f"start at 0 in each document, got {int(positions[row, column])} after "
            f"{int(positions[row, column - 1]) if column else 'nothing'} at column {column} of row "
            f"{row} with layout {layout.name!r}"
        )
    if not bool(opens[:, 1:].any()):
        return None
    batch, total = positions.shape
    if batch > 1:
        raise ValueError(
            "position_ids must be those of one document per row on a sequence split over ranks "
            "(packed documents need batch size 1: DataCollatorWithFlattening packs a batch into "
            f"one row), got documents that start within rows, with batch size {batch}"
        )
    if layout.per_document:
        raise ValueError(
            "cu_seqlens must be given for packed documents with layout 'zigzag_per_document', got "
            "None with position_ids that start again"
        )
    opens[:, 0] = True
    return torch.cat((opens[0].nonzero().squeeze(1), torch.tensor([total]))).int()
