"""What a torchtitan run can ask for and this attention cannot do, refused by the option's name."""

from __future__ import annotations

from typing import Any

from torchtitan.config import Configurable
from torchtitan.models.common.attention import FusedQKVLinear, GQAttention, QKVLinear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.dist_gemm import RowParallelLinear
from torchtitan.trainer import Trainer

from nsa_dist.checks import check, type_name
from nsa_dist.config import NSAConfig

LAYOUTS = {"headtail": "zigzag", None: "contiguous"}
"""Our layouts by torchtitan's names of load balancers."""


def layout_of(load_balancer: str | None) -> str:
    """The layout of rows that torchtitan splits by ``context_parallel_load_balancer``."""
    check(
        load_balancer in LAYOUTS,
        "context_parallel_load_balancer",
        load_balancer,
        "'headtail' or None with Native Sparse Attention",
    )
    return LAYOUTS[load_balancer]


def check_run(config: Any, nsa: NSAConfig) -> None:
    """Raise ValueError for an option of a ``Trainer.Config`` that this attention cannot follow.

    Callers other than the trainer have a config with ``parallelism`` alone, and no run to check.
    """
    parallelism = config.parallelism
    layout_of(parallelism.context_parallel_load_balancer)
    check_spmd_backend(parallelism.spmd_backend)
    if not isinstance(config, Trainer.Config):
        return
    check(
        config.training.disable_cuda_graphs,
        "training.disable_cuda_graphs",
        config.training.disable_cuda_graphs,
        "True with Native Sparse Attention, whose plans are made on the host for each batch",
    )
    check(
        not config.debug.spmd_typechecking,
        "debug.spmd_typechecking",
        config.debug.spmd_typechecking,
        "False with Native Sparse Attention, whose messages have no SPMD types",
    )
    # torchtitan writes the folder at the last step, when it is too late to say so.
    for name in ("initial_load_in_hf", "last_save_in_hf"):
        asked = config.checkpoint.enable and getattr(config.checkpoint, name)
        check(
            not (asked and nsa.independent_kv),
            f"checkpoint.{name}",
            asked,
            "False with independent_kv: Hugging Face models have one K and V",
        )


def check_spmd_backend(name: str) -> None:
    """Raise ValueError unless modules get plain local tensors and a mesh with all axes."""
    must = "'spmd_types' with Native Sparse Attention"
    check(name == "spmd_types", "parallelism.spmd_backend", name, must)


def check_model(model: Configurable.Config) -> None:
    """Raise ValueError for a model whose attention cannot be replaced."""
    if not isinstance(model, Decoder.Config):
        raise ValueError(
            "model must be a decoder of torchtitan.models whose layers have GQAttention, got "
            f"{type_name(model)} of {type(model).__module__}"
        )
    for number, layer in enumerate(model.layers):
        check_attention(layer.attention, f"layers.{number}.attention")


def check_attention(attention: Any, name: str = "attention") -> None:
    """Raise ValueError for an attention that is not torchtitan's own with its plain projections."""
    if type(attention) is not GQAttention.Config:
        raise ValueError(f"{name} must be a GQAttention.Config, got {_name(attention)}")
    plain = type(attention.qkv_linear) in (FusedQKVLinear.Config, QKVLinear.Config)
    if not plain or isinstance(attention.wo, RowParallelLinear.Config):
        raise ValueError(
            f"tp_gemm_backend must be 'default' with Native Sparse Attention, got projections "
            f"{_name(attention.qkv_linear)} and {_name(attention.wo)} in {name}"
        )


def check_options(config: NSAConfig) -> None:
    """Raise ValueError for an option of NSAConfig that the layers here do not have."""
    check(
        config.compress != "custom",
        "compress",
        config.compress,
        "one of the built-in kinds under torchtitan, which builds modules from configs",
    )
    check(
        not config.compress_pre_rope,
        "compress_pre_rope",
        config.compress_pre_rope,
        "False under torchtitan, whose rotary embedding compressed keys cannot use",
    )
    check(
        config.value_dim == config.head_dim,
        "v_head_dim",
        config.v_head_dim,
        f"None or head_dim = {config.head_dim} under torchtitan",
    )
    check(config.gate == "linear", "gate", config.gate, "'linear' under torchtitan")


def _name(config: Any) -> str:
    return type(config).__qualname__
