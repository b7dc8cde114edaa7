"""Attention masks that Megatron hands its layers: this attention is causal, and reads none.

Megatron's data loaders make a mask of s x s for every sample unless told not to, so that most masks
say no more than "causal". One that says more, such as documents' bounds after
``--reset-attention-mask``, is refused.
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
"""Rows that are compared at a time."""

ALLOWED = (
    "None or the causal mask of Megatron's data loaders (give packed documents as "
    "packed_seq_params; --no-create-attention-mask-in-dataloader makes no mask)"
)


def check_mask(
    mask: Tensor, length: int, context: ContextGroup, counter: CommunicationCounter
) -> None:
    """Raise ValueError, on every context parallel rank, for a mask that is more than causal.

    Looks once at each mask, which waits for the device; a collective then, where sequences are
    split.

    Args:
        mask: what hides a key from a query, [1 or b, 1, s/cp, s], True where it does.
        length: s/cp, tokens of this rank.
        context: the context parallel ranks, which hold the rows in Megatron's order.
    """
    if getattr(mask, "nsa_version_checked", None) == mask._version:
        return
    problem = None
    if not _is_causal(mask, length, context):
        problem = f"attention_mask must be {ALLOWED}, got {describe(mask)} that hides other keys"
    agree(Statement({"call": "mask of a layer"}), problem, context, counter)
    # On the tensor, which all layers of a forward are given.
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
