"""The dense models of transformers that can be converted, and how their attention modules differ.

A family is a row of ``DENSE``; transformers' own naming leads from there to its other classes. What
differs between families stands here, so that ``NSAAttention`` is one for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    SeedOssForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.olmo3.modeling_olmo3 import Olmo3Attention

from nsa_dist.adapters.huggingface.weights import whole

DENSE: tuple[Any, ...] = (
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Qwen2ForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    SmolLM3ForCausalLM,
    SeedOssForCausalLM,
    Gemma3ForCausalLM,
    Phi3ForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
)

REASONS: Mapping[str, str] = {
    "GptOssForCausalLM": "whose attention has sinks",
    "Gemma2ForCausalLM": "whose attention caps its logits",
    "Gemma3ForConditionalGeneration": "of which only the text model, Gemma3ForCausalLM, fits",
}
"""Why some models that look alike cannot be converted."""

NORMS_OVER_HEADS = (Olmo2Attention, Olmo3Attention)
"""Attention modules whose norms of queries and keys are over all heads together."""


def _attention(dense: Any) -> Any:
    """The module of a dense model's classes, and its attention class."""
    module = sys.modules[dense.__module__]
    return module, getattr(module, f"{dense.__name__.removesuffix('ForCausalLM')}Attention")


ROTARY: Mapping[type[nn.Module], Callable[..., Any]] = {
    attention: module.apply_rotary_pos_emb for module, attention in map(_attention, DENSE)
}
"""The attention modules that can be replaced, and the functions that rotate their queries, keys."""


def head_dim(config: Any) -> int:
    """Channels of a head; many configs leave them to be computed."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def activation_field(config: Any) -> str:
    """The field with the name of the MLP's activation, of a config or its class."""
    return "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"


def full_rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of layers with full attention; some configs have several sets."""
    parameters = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def norm_epsilon(norm: Any) -> float:
    """The epsilon of an RMSNorm."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def norm_offset(norm: nn.Module) -> float:
    """What an RMSNorm adds to its weight."""
    return 1.0 if isinstance(norm, Gemma3RMSNorm) else 0.0


def projection_names(attention: nn.Module) -> tuple[str, ...]:
    """Names of an attention module's linear layers."""
    fused = hasattr(attention, "qkv_proj")
    return ("qkv_proj", "o_proj") if fused else ("q_proj", "k_proj", "v_proj", "o_proj")


def split_projections(attention: Any, sizes: tuple[int, int, int]) -> list[nn.Linear]:
    """The layers for queries, keys, values.

    Args:
        attention: a dense module; it does not change.
        sizes: their rows.

    Returns:
        Its own layers, or with a fused ``qkv_proj`` new ones that hold copies of its rows.
    """
    if not hasattr(attention, "qkv_proj"):
        return [attention.q_proj, attention.k_proj, attention.v_proj]
    fused = attention.qkv_proj  # Phi3 has no biases.
    weight = fused.weight
    parts = [
        nn.Linear(fused.in_features, size, bias=False, device=weight.device, dtype=weight.dtype)
        for size in sizes
    ]
    with torch.no_grad(), whole([weight, *(part.weight for part in parts)]):
        for part, rows in zip(parts, weight.split(sizes), strict=True):
            part.weight.copy_(rows)
    for part in parts:
        part.train(fused.training).requires_grad_(weight.requires_grad)
    return parts
