"""Megatron-core as an engine: what it can run and what its checkpoints look like.

Imported whether or not Megatron is installed. ``megatron_training.py`` trains by it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from launch.engines.base import Engine, EngineSpec, grid
from launch.processes.ranks import Ranks
from launch.settings import Settings
from launch.storage.checkpoint import Checkpoint
from nsa_dist.checks import check

# The one value of an option that Megatron can run here, and why.
_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("model.attention", "nsa", "Megatron's own dense attention takes no packed documents here"),
    ("model.dense_every", 0, "Megatron's own dense attention takes no packed documents here"),
    ("model.bias", False, "Megatron's biases are those of the MLP too"),
    ("model.dropout", 0.0, "its draws would depend on the ranks"),
    ("rotary.dim", None, "Megatron rotates whole heads here"),
    ("rotary.scaling", "none", "Megatron scales frequencies otherwise"),
    ("attention.compress_pre_rope", False, "Megatron hands over rotated keys"),
    ("parallel.layout", "zigzag_per_document", "so Megatron splits packed documents"),
    ("parallel.fetch", "chosen", "its layers take no other"),
    ("parallel.fetch_again", "auto", "its layers decide"),
    ("parallel.recompute_branches", (), "see model.recompute_part"),
    ("parallel.ranks_per_node", 0, "its layers ask the hosts"),
    ("parallel.exact_gradients", 0, "its layers take no other"),
)


def check_settings(settings: Settings) -> None:
    """Refuse what Megatron cannot do."""
    for option, value, why in _ONLY:
        section, name = option.split(".")
        given = getattr(getattr(settings, section), name)
        check(given == value, option, given, f"{value!r} with parallel.engine = 'megatron' ({why})")
    attention, model, parallel = settings.attention, settings.model, settings.parallel
    width, value_width = attention.head_dim, attention.value_dim
    must = f"{width}, as attention.head_dim, with parallel.engine = 'megatron'"
    check(value_width == width, "attention.v_head_dim", value_width, must)
    must = "'auto', 'bfloat16' or 'float32' with parallel.engine = 'megatron'"
    check(settings.run.dtype != "float64", "run.dtype", settings.run.dtype, must)
    for name, size in (
        ("attention.num_kv_heads", attention.num_kv_heads),
        ("model.mlp_hidden", model.mlp_hidden),
    ):
        check(size % parallel.tp == 0, "parallel.tp", parallel.tp, f"a divisor of {name} = {size}")
    must = f"a divisor of model.layers = {model.layers}"
    check(model.layers % parallel.pp == 0, "parallel.pp", parallel.pp, must)
    must = "'block' or 'attention' with parallel.engine = 'megatron' (only 'fsdp2' has 'mlp')"
    check(model.recompute_part != "mlp", "model.recompute_part", model.recompute_part, must)
    works = parallel.tp > 1 or not parallel.sequence_parallel
    check(works, "parallel.sequence_parallel", True, "False with parallel.tp = 1")


def check_machine(settings: Settings, device: str) -> None:
    """Refuse a machine without Megatron or without the GPU that it needs."""
    there = importlib.util.find_spec("megatron") is not None
    must = "'fsdp2' where megatron-core is not installed (pip install nsa-dist[megatron])"
    check(there, "parallel.engine", settings.parallel.engine, must)
    must = "'cuda' with parallel.engine = 'megatron' ('fsdp2' runs on the CPU)"
    try:
        current = torch.device(torch.cuda.current_device())
    except (AssertionError, RuntimeError):
        current = None
    check(current is not None and current.type == device, "run.device", device, must)


def describe(settings: Settings, ranks: Ranks) -> str:
    with_sp = " with sequence parallel" if settings.parallel.sequence_parallel else ""
    return f"Megatron, pp {ranks.pp} x {grid(settings, ranks)} x tp {ranks.tp}{with_sp}"


def build(settings: Settings, vocab_size: int, ranks: Ranks) -> Engine:
    from launch.engines.megatron_training import MegatronEngine

    return MegatronEngine(settings, vocab_size, ranks)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """``EngineSpec.read_weights``; needs no Megatron."""
    from launch.engines import megatron_checkpoint

    return megatron_checkpoint.read_weights(checkpoint)


SPEC = EngineSpec(
    name="megatron",
    build=build,
    check_settings=check_settings,
    check_machine=check_machine,
    describe=describe,
    options=("parallel.tp", "parallel.pp", "parallel.sequence_parallel", "model.recompute_part"),
    file_suffixes=(".pt", ".distcp", ".metadata"),
    last_files=("metadata.json", ".metadata"),
    read_weights=read_weights,
)
