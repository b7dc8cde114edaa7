"""Checks of Megatron's attention masks: only causal ones are allowed, and none is used.

By default Megatron's data loaders make an s x s mask for every sample, usually a plain causal one.
Any other mask, such as one that separates documents after ``--reset-attention-mask``, is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_dist.checks import describe
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.agreement import agree
from nsa_dist.comm.group import ContextGroup
from nsa_dist.plan.statement import Statement

CHUNK = 1024
"""Rows compared at a time."""

ALLOWED = (
    "None or the causal mask of Megatron's data loaders (give packed documents as "
    "packed_seq_params; --no-create-attention-mask-in-dataloader makes no mask)"
)


def check_mask(
    mask: Tensor, length: int, context: ContextGroup, counter: CommunicationCounter
) -> None:
    """Raise ValueError, on every context parallel rank, for a mask that is not plain causal.

    Each mask is checked once, which waits for the device, and is a collective if sequences are
    split.

    Args:
        mask: [1 or b, 1, s/cp, s], True where a key is hidden from a query.
        length: s/cp, tokens of this rank.
        context: the context parallel ranks, which hold rows in Megatron's order.
    """
    # Changes in place of what was made in inference mode are not counted.
    counts = not mask.is_inference()
    if counts and getattr(mask, "nsa_version_checked", None) == mask._version:
        return
    problem = None
    if not _is_causal(mask, length, context):
        problem = f"attention_mask must be {ALLOWED}, got {describe(mask)} that is not causal"
    agree(Statement({"call": "mask of a layer"}), problem, context, counter)
    # Remember it on the tensor, which all layers of a forward share.
    if counts:
        mask.nsa_version_checked = mask._version  # type: ignore[attr-defined]


def _is_causal(mask: Tensor, length: int, context: ContextGroup) -> bool:
    whole = length * context.size
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, length, whole):
        return False
    columns = torch.arange(whole, device=mask.device)
    rows = columns
    if context.size > 1:
        chunks = columns.chunk(2 * context.size)
        rows = torch.cat((chunks[context.rank], chunks[-1 - context.rank]))
    wrong = torch.zeros((), dtype=torch.bool, device=mask.device)
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        wrong |= (mask[:, :, part] != (columns > rows[part, None])).any()
    return not bool(wrong)
