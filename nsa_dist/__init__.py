"""Native Sparse Attention for training on sequences split over many GPUs.

    from nsa_dist import NativeSparseAttention, NSAConfig, shard_batch

``docs/algorithm.md`` explains the algorithm and the flow of data.

Each name is imported when it is first used: what runs layers needs torch's compiler, whose import
takes longer than torch's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_dist.attention.functional import NSADetails, native_sparse_attention
    from nsa_dist.attention.plan_cache import get_plan
    from nsa_dist.block import NSABlock
    from nsa_dist.comm.counter import CommunicationCounter
    from nsa_dist.comm.group import ContextGroup, context_group
    from nsa_dist.config import BRANCHES, NSAConfig, RotaryConfig
    from nsa_dist.distillation import DenseDistillation, LayerDistillation, distill_dense
    from nsa_dist.layer import NativeSparseAttention
    from nsa_dist.nn.compressor import BlockCompressor
    from nsa_dist.nn.gates import gates_from_logits, initial_gate_logits
    from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
    from nsa_dist.self_check import ParallelReport, check_parallel
    from nsa_dist.sharding import (
        ShardedBatch,
        Sharding,
        boundaries_from_positions,
        make_sharding,
        shard,
        shard_batch,
        unshard,
    )

__all__ = [
    "BRANCHES",
    "BlockCompressor",
    "CommunicationCounter",
    "ContextGroup",
    "DenseDistillation",
    "LayerDistillation",
    "NSABlock",
    "NSAConfig",
    "NSADetails",
    "NativeSparseAttention",
    "ParallelReport",
    "RotaryConfig",
    "ShardedBatch",
    "Sharding",
    "apply_rotary",
    "boundaries_from_positions",
    "check_parallel",
    "context_group",
    "distill_dense",
    "gates_from_logits",
    "get_plan",
    "initial_gate_logits",
    "make_sharding",
    "native_sparse_attention",
    "rotary_cos_sin",
    "shard",
    "shard_batch",
    "unshard",
]

_MODULES = {
    "attention.functional": ("NSADetails", "native_sparse_attention"),
    "attention.plan_cache": ("get_plan",),
    "block": ("NSABlock",),
    "comm.counter": ("CommunicationCounter",),
    "comm.group": ("ContextGroup", "context_group"),
    "config": ("BRANCHES", "NSAConfig", "RotaryConfig"),
    "distillation": ("DenseDistillation", "LayerDistillation", "distill_dense"),
    "layer": ("NativeSparseAttention",),
    "nn.compressor": ("BlockCompressor",),
    "nn.gates": ("gates_from_logits", "initial_gate_logits"),
    "nn.rotary": ("apply_rotary", "rotary_cos_sin"),
    "self_check": ("ParallelReport", "check_parallel"),
    "sharding": (
        "ShardedBatch",
        "Sharding",
        "boundaries_from_positions",
        "make_sharding",
        "shard",
        "shard_batch",
        "unshard",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
