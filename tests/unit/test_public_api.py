"""What users import and what checkpoints hold: changed on purpose or not at all."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import nsa_dist
import nsa_kernels
from nsa_dist import NativeSparseAttention, NSABlock, NSAConfig

PUBLIC = {
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
}
PUBLIC_KERNELS = {"BACKENDS", "Backend", "QuerySegments", "Segment", "get_backend"}

SIGNATURES = {
    "NativeSparseAttention": (
        "hidden_size config bias qk_norm norm_eps rotary dropout k_compressor v_compressor layout "
        "group backend device dtype selector fetch_again recompute_branches fetch ranks_per_node "
        "exact_gradients"
    ),
    "NSABlock": "hidden_size config mlp_hidden norm_eps device dtype attention",
    "NSAConfig": (
        "num_heads num_kv_heads head_dim v_head_dim compress_block compress_stride select_block "
        "num_selected num_init_blocks num_local_blocks window branches compress compress_hidden "
        "compress_per_head compress_pre_rope independent_kv scale gate gate_hidden gate_init"
    ),
    "RotaryConfig": (
        "theta dim scaling factor original_max_positions low_freq_factor high_freq_factor "
        "beta_fast beta_slow attention_factor"
    ),
    "native_sparse_attention": (
        "q k v gates k_compressor v_compressor config cu_seqlens rotary layout group backend plan "
        "communication return_details selector fetch_again recompute_branches fetch ranks_per_node "
        "exact_gradients"
    ),
    "check_parallel": "model run sharding rows",
    "shard_batch": "tokens cu_seqlens labels layout group pad_token exact_gradients",
    "make_sharding": "length cu_seqlens layout group exact_gradients",
    "shard": "x cu_seqlens layout group pad_value exact_gradients",
    "unshard": "x length cu_seqlens layout group exact_gradients",
}

BASE = NSAConfig(4, 2, 8, v_head_dim=6, compress_block=4, compress_stride=2, select_block=8)
HIDDEN = 24
PROJECTIONS = {
    "q_proj.weight": (32, HIDDEN),
    "k_proj.weight": (3 * 2 * 8, HIDDEN),
    "v_proj.weight": (3 * 2 * 6, HIDDEN),
    "o_proj.weight": (HIDDEN, 24),
}
LINEAR_GATE = {"gate.proj.weight": (12, HIDDEN), "gate.proj.bias": (12,)}
MLP = {
    "k_compressor.position": (4, 8),
    "k_compressor.up": (16, 32),
    "k_compressor.down": (8, 16),
    "v_compressor.position": (4, 6),
    "v_compressor.up": (12, 24),
    "v_compressor.down": (6, 12),
}


def without(table: dict[str, tuple[int, ...]], *prefixes: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in table.items() if not name.startswith(prefixes)}


STATE_DICTS = {
    "default": (BASE, {}, PROJECTIONS | LINEAR_GATE | MLP),
    "shared": (
        replace(BASE, independent_kv=False),
        {},
        PROJECTIONS
        | {"k_proj.weight": (16, HIDDEN), "v_proj.weight": (12, HIDDEN)}
        | LINEAR_GATE
        | MLP,
    ),
    "bias-qk-norm": (
        BASE,
        {"bias": True, "qk_norm": True},
        PROJECTIONS
        | {
            "q_proj.bias": (32,),
            "k_proj.bias": (48,),
            "v_proj.bias": (36,),
            "o_proj.bias": (HIDDEN,),
            "q_norm.weight": (8,),
            "k_norm.weight": (3, 8),
        }
        | LINEAR_GATE
        | MLP,
    ),
    "per-head": (
        replace(BASE, compress_per_head=True),
        {},
        PROJECTIONS | LINEAR_GATE | {name: (2, *shape) for name, shape in MLP.items()},
    ),
    "linear-static": (
        replace(BASE, compress="linear", gate="static"),
        {},
        PROJECTIONS
        | {
            "gate.logits": (4, 3),
            "k_compressor.position": (4, 8),
            "k_compressor.weight": (8, 32),
            "v_compressor.position": (4, 6),
            "v_compressor.weight": (6, 24),
        },
    ),
    "conv1d-mlp-gate": (
        replace(BASE, compress="conv1d", gate="mlp"),
        {},
        PROJECTIONS
        | {
            "gate.up.weight": (8, HIDDEN),
            "gate.up.bias": (8,),
            "gate.down.weight": (12, 8),
            "gate.down.bias": (12,),
            "k_compressor.position": (4, 8),
            "k_compressor.weight": (8, 4),
            "v_compressor.position": (4, 6),
            "v_compressor.weight": (6, 4),
        },
    ),
    "attention-pool": (
        replace(BASE, compress="attention_pool"),
        {},
        PROJECTIONS
        | LINEAR_GATE
        | {
            "k_compressor.position": (4, 8),
            "k_compressor.query": (8,),
            "v_compressor.position": (4, 6),
            "v_compressor.query": (6,),
        },
    ),
    "mean": (replace(BASE, compress="mean"), {}, PROJECTIONS | LINEAR_GATE),
    "window-only": (
        replace(BASE, branches=("window",)),
        {},
        PROJECTIONS
        | {
            "k_proj.weight": (16, HIDDEN),
            "v_proj.weight": (12, HIDDEN),
            "gate.proj.weight": (4, HIDDEN),
            "gate.proj.bias": (4,),
        },
    ),
    # The compressed keys score blocks, so keys have one set more than values.
    "selected-only": (
        replace(BASE, branches=("selected",)),
        {},
        PROJECTIONS
        | {
            "k_proj.weight": (32, HIDDEN),
            "v_proj.weight": (12, HIDDEN),
            "gate.proj.weight": (4, HIDDEN),
            "gate.proj.bias": (4,),
        }
        | without(MLP, "v_compressor"),
    ),
    "custom": (
        replace(BASE, compress="custom"),
        {"k_compressor": nn.Linear(8, 8), "v_compressor": nn.Identity()},
        PROJECTIONS | LINEAR_GATE | {"k_compressor.weight": (8, 8), "k_compressor.bias": (8,)},
    ),
}


def test_public_names() -> None:
    assert set(nsa_dist.__all__) == PUBLIC
    assert set(nsa_kernels.__all__) == PUBLIC_KERNELS
    assert all(hasattr(nsa_dist, name) for name in PUBLIC)
    assert set(dir(nsa_dist)) >= PUBLIC
    assert not hasattr(nsa_dist, "no_such_name")


def test_names_are_imported_when_they_are_used() -> None:
    """torch's compiler, which the layers need, takes longer to import than torch."""
    code = (
        "import sys, nsa_dist\n"
        "print('torch' in sys.modules)\n"
        "nsa_dist.NSAConfig\n"
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)\n"
    )
    root = Path(nsa_dist.__file__).parents[1]
    path = f"{root}:{Path(nsa_kernels.__file__).parents[1]}"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments(name: str) -> None:
    assert list(inspect.signature(getattr(nsa_dist, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict(name: str) -> None:
    config, options, expected = STATE_DICTS[name]
    state = NativeSparseAttention(HIDDEN, config, **options).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_block_state_dict() -> None:
    state = NSABlock(HIDDEN, BASE, mlp_hidden=40).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "attention_norm.weight": (HIDDEN,),
        "mlp_norm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (40, HIDDEN),
        "mlp.up_proj.weight": (40, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, 40),
    } | {f"attention.{key}": shape for key, shape in (PROJECTIONS | LINEAR_GATE | MLP).items()}
