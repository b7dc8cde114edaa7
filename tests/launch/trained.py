"""Runs with a checkpoint of drawn weights, as if trained, for the programs that take models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch.engines import fsdp2
from launch.engines.base import MOMENTS, WholeState
from launch.loading import alone
from launch.model import Decoder
from launch.settings import Settings
from launch.storage.checkpoint import save_checkpoint
from tests.launch.common import tiny

KINDS: Mapping[str, dict[str, dict[str, Any]]] = {
    "nsa": {},
    "shared": {
        "attention": {"independent_kv": False, "compress": "attention_pool", "gate": "mlp"},
        "model": {"tie_embeddings": True, "qk_norm": True, "bias": True},
        "rotary": {"scaling": "llama3", "factor": 4.0, "original_max_positions": 64},
    },
    "hybrid": {
        "model": {"layers": 3, "dense_every": 2, "qk_norm": True},
        "attention": {"gate": "static", "compress_per_head": True, "num_kv_heads": 1},
        "rotary": {"scaling": "yarn", "factor": 2.0, "original_max_positions": 64},
    },
    "dense": {
        "model": {"attention": "dense", "bias": True, "norm_eps": 1e-3},
        "rotary": {"theta": 500.0, "scaling": "linear", "factor": 2.0},
    },
}
"""Options of a tiny run that together have each option of the model which a folder must keep."""


def drawn(settings: Settings, vocab_size: int = 256, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of ``Decoder``, none at its start: gates, norms and compressors matter."""
    generator = torch.Generator().manual_seed(settings.run.seed)
    weights = {}
    for name, value in Decoder(settings, vocab_size).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            weights[name] = 1 + 0.2 * noise
        else:
            weights[name] = scale * noise / max(value.shape[-1], 1) ** 0.5
    return weights


def write_run(folder: Path, settings: Settings, vocab_size: int = 256, step: int = 3) -> Path:
    """A checkpoint of FSDP2's with drawn weights in a new run's folder."""
    weights = drawn(settings, vocab_size)
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    moments = dict.fromkeys(MOMENTS, zeros)
    state = WholeState(weights, moments, step=step, updates=step, dtype=torch.float32)
    with alone():
        return save_checkpoint(
            lambda path, _: fsdp2.write_whole(path, state, settings), folder, step, settings, "ab"
        )


def settings_of(root: Path, kind: str, **data: Any) -> Settings:
    """A tiny run of one of ``KINDS``, float32."""
    return tiny(root, **KINDS[kind], run={"dtype": "float32"}, data=data)
