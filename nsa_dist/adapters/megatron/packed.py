"""Packed batches as Megatron's loaders hand them over: shapes of boundaries, and how ranks split.

With context parallelism a packed stream is cut in one of two ways, and nothing in Megatron's
``PackedSeqParams`` says which:

    zigzag_per_document  each document of its own, as Megatron's SFT data and TransformerEngine do
    zigzag               the whole stream, as ``--dataloader-inter-document-masking`` does

``make_packed_seq_params`` notes the layout. Without a note it is that of Megatron-LM's arguments.
"""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.adapters.megatron.arguments import program_arguments
from nsa_dist.checks import as_choice, check, describe

LAYOUTS = ("zigzag_per_document", "zigzag")

ROTATES_ON_DEVICE = "max_seqlen" in signature(apply_rotary_pos_emb).parameters
"""Whether Megatron reads boundaries where the queries are (from 0.20 on), not on the host."""


def make_packed_seq_params(
    cu_seqlens: Tensor, *, layout: str = "zigzag_per_document"
) -> PackedSeqParams:
    """Megatron's arguments for a packed batch.

    Args:
        cu_seqlens: int32 [documents + 1], boundaries of the whole padded stream over all context
            parallel ranks, such as ``shard_batch(..., layout=layout).cu_seqlens``. Boundaries on
            the CPU avoid a copy from the device.
        layout: how the stream is split, "zigzag_per_document" or "zigzag".

    Raises:
        ValueError: if ``layout`` is another.
    """
    longest = int(cu_seqlens.diff().max())
    packed: Any = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    packed.nsa_layout = as_choice("layout", layout, LAYOUTS)
    return packed


def layout_of(packed: PackedSeqParams) -> str:
    """How the stream of a packed batch is split over context parallel ranks."""
    noted: str | None = getattr(packed, "nsa_layout", None)
    return layout_of_program() if noted is None else noted


def layout_of_program() -> str:
    """How Megatron-LM's own loaders split packed streams under the arguments of this program."""
    arguments = program_arguments()
    whole = getattr(arguments, "dataloader_inter_document_masking", False)
    return "zigzag" if whole and not getattr(arguments, "sft", False) else "zigzag_per_document"


def check_packed(packed: PackedSeqParams, *, predicts_more: bool) -> None:
    """Raise ValueError unless it is a packed batch over the layer's own context parallel group.

    Args:
        predicts_more: whether the model has layers of multi-token prediction.
    """
    check(packed.qkv_format == "thd", "qkv_format", packed.qkv_format, "'thd'")
    for option in ("local_cp_size", "cp_group"):
        value = getattr(packed, option, None)
        must = "None (a batch is split over the layer's context parallel group)"
        check(value is None, f"packed_seq_params.{option}", value, must)
    cu_seqlens = _boundaries(packed)
    shapes = "int32 boundaries, [documents + 1] or [1, documents + 1]"
    is_row = isinstance(cu_seqlens, Tensor) and cu_seqlens.ndim == 2 and cu_seqlens.shape[0] == 1
    if not is_row and not (isinstance(cu_seqlens, Tensor) and cu_seqlens.ndim == 1):
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q must be {shapes}, got {describe(cu_seqlens)}"
        )
    if is_row and predicts_more:
        raise ValueError(
            "packed_seq_params.cu_seqlens_q must be int32 [documents + 1] with mtp_num_layers "
            "(Megatron shifts no labels by [1, documents + 1], which other models may have), "
            f"got {describe(cu_seqlens)}"
        )


def _boundaries(packed: PackedSeqParams) -> Any:
    """Document boundaries of the padded stream."""
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded


def for_layer(
    packed: PackedSeqParams, layout: str, length: int, device: torch.device
) -> PackedSeqParams:
    """What a layer takes of a checked packed batch: boundaries without a batch dimension.

    With the layout "zigzag" Megatron is told of one document, the stream: it then cuts tables of
    angles as the stream is cut. ``stream_angles`` makes such tables.

    Args:
        length: tokens of the stream.
        device: of the layer's input.
    """
    own: Any = copy.copy(packed)
    own.nsa_cu_seqlens, own.nsa_layout = _boundaries(packed).flatten(), layout
    bounds = own.nsa_cu_seqlens
    if layout == "zigzag":
        bounds = torch.tensor([0, length], dtype=torch.int32)
        own.max_seqlen_q = own.max_seqlen_kv = length
    if ROTATES_ON_DEVICE:
        bounds = bounds.to(device)
    own.cu_seqlens_q = own.cu_seqlens_kv = bounds
    own.cu_seqlens_q_padded = own.cu_seqlens_kv_padded = None
    return own


def stream_angles(angles: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Rotary angles of every token of a packed stream, by its position in its document.

    Args:
        angles: [longest document or more, 1, 1, d], of positions.
        cu_seqlens: int32 [documents + 1].
        length: tokens of the stream, which is ``cu_seqlens[-1]``.

    Returns:
        [length, 1, 1, d].
    """
    tokens = torch.arange(length, device=angles.device)
    bounds = cu_seqlens.to(angles.device).long()
    document = torch.searchsorted(bounds, tokens, right=True) - 1
    return angles[tokens - bounds[document]]
