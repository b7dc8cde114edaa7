"""The weights of another run, read into one part of the model: what ``run.start_from`` begins with.

A layer that is dense in the checkpoint and sparse in the run is converted: it keeps its projections
and norms, each branch with keys and values of its own gets a copy of them, gates start as constants
and compressors as the mean of a block. While the window and the selected blocks cover a document,
it computes what the dense layer did.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nsa_dist import NSABlock
from nsa_dist.checkpoints.dcp_metadata import read_metadata
from nsa_dist.checkpoints.safe_load import read_into

SAVED_PREFIX = "model."
"""Stands before a weight's name in checkpoints of engine fsdp2."""
NEW_IN_SPARSE = ("attention.gate.", "attention.k_compressor.", "attention.v_compressor.")
"""What a sparse block has and a dense one has not."""


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in a checkpoint of engine fsdp2, by its name in ``Decoder``."""
    return {
        key.removeprefix(SAVED_PREFIX): tuple(stored.size)
        for key, stored in read_metadata(path).state_dict_metadata.items()
        if key.startswith(SAVED_PREFIX) and isinstance(stored, TensorStorageMetadata)
    }


@torch.no_grad()
def read_part(part: nn.Module, name: str, checkpoint: Path) -> None:
    """Set one of ``Decoder.parts()`` to its weights in a checkpoint of engine fsdp2. No collective.

    Raises:
        ValueError: if a file is missing, damaged or contains more than data.
    """
    shapes = saved_shapes(checkpoint)
    named = dict(part.named_parameters())
    if isinstance(part, NSABlock) and not any(_is_new(key, name, shapes) for key in named):
        start_new(part)
        named = {key: p for key, p in named.items() if not key.startswith(NEW_IN_SPARSE)}
    saved = {
        key: torch.empty(shapes.get(f"{name}.{key}", p.shape), dtype=p.dtype, device="cpu")
        for key, p in named.items()
    }
    read_into({f"{SAVED_PREFIX}{name}.{key}": value for key, value in saved.items()}, checkpoint)
    for key, parameter in named.items():
        parameter.copy_(copies_of(saved[key], parameter))


def _is_new(key: str, name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    return key.startswith(NEW_IN_SPARSE) and f"{name}.{key}" in shapes


def start_new(block: NSABlock) -> None:
    """Set what a dense block has not: gates to ``gate_init``, compressors to a block's mean."""
    attention = block.attention
    attention.gate.start_as_constant()
    for compressor in (attention.k_compressor, attention.v_compressor):
        if compressor is not None:
            compressor.start_as_mean()


def copies_of(value: Tensor, like: Tensor) -> Tensor:
    """A dense block's weight, as often as a sparse block's weight ``like`` has it."""
    copies = like.numel() // value.numel() if value.numel() else 1
    return value.repeat(copies, *[1] * (value.ndim - 1)).view(like.shape)
