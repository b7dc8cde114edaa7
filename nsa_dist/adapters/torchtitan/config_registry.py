"""Configs for ``--module nsa_dist.adapters.torchtitan``: torchtitan's own, with this attention.

Hyperparameters are the defaults of ``NSAConfig``. For others write such a function of your own.
"""

from __future__ import annotations

from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3
from torchtitan.trainer import Trainer

from nsa_dist.adapters.torchtitan.convert import use_nsa


def llama3_debugmodel_nsa() -> Trainer.Config:
    """torchtitan's small model, with blocks and windows that suit short sequences."""
    return use_nsa(
        llama3.llama3_debugmodel(),
        compress_block=16,
        compress_stride=8,
        select_block=16,
        num_selected=4,
        num_local_blocks=1,
        window=64,
    )


def llama3_8b_nsa() -> Trainer.Config:
    """Llama 3.1 8B."""
    return use_nsa(llama3.llama3_8b())


def llama3_70b_nsa() -> Trainer.Config:
    """Llama 3.1 70B."""
    return use_nsa(llama3.llama3_70b())


def qwen3_14b_nsa() -> Trainer.Config:
    """Qwen3 14B."""
    return use_nsa(qwen3.qwen3_14b())


def qwen3_32b_nsa() -> Trainer.Config:
    """Qwen3 32B."""
    return use_nsa(qwen3.qwen3_32b())
