"""Checks of transformers' options and arguments that this attention does not support."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from nsa_dist.adapters.huggingface.families import (
    NORMS_OVER_HEADS,
    REASONS,
    ROTARY,
    full_rope,
    head_dim,
    projection_names,
)
from nsa_dist.adapters.huggingface.parallelism import Split
from nsa_dist.adapters.huggingface.weights import check_parameter
from nsa_dist.checks import check, describe, is_plain
from nsa_dist.config import NSAConfig
from nsa_kernels import Backend, get_backend
from nsa_kernels.backend import attend_few

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies depend only on the config, not on the positions of a call."""

SWITCHED_OFF = (
    ("attention_dropout", "0.0", "Native Sparse Attention has no dropout of probabilities"),
    ("residual_dropout", "0.0", "the converted attention has no dropout behind its projection"),
    ("attn_logit_softcapping", "None", "Native Sparse Attention does not cap logits"),
    ("use_bidirectional_attention", "False", "Native Sparse Attention is causal"),
)
"""Fields of configs that change the attention: name, value without it, reason."""

WEIGHTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
"""Children of attention modules that ``NSAAttention`` computes with."""

DENSE_GATE_INIT = (0.0, 0.0, 0.0)
"""The default of ``NSAConfig``, which a conversion replaces."""


def check_layers(layers: Iterable[int] | None, config: Any) -> tuple[int, ...]:
    """Indices of the layers to convert, ascending; all if None.

    Raises:
        ValueError: unless they are different indices of full attention layers.
    """
    total = config.num_hidden_layers
    if layers is None:
        layers = range(total)
    must = f"one or more different indices from 0 to {total - 1}, or None for all layers"
    check(isinstance(layers, Iterable), "layers", layers, must)
    given = list(layers)
    check(
        all(isinstance(i, Integral) and not isinstance(i, bool) and 0 <= i < total for i in given)
        and 0 < len(given) == len(set(given)),
        "layers",
        given,
        must,
    )
    indices = sorted(map(int, given))
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    check(
        types is not None or not window,
        "sliding_window",
        window,
        "None (it limits every layer; set it in model.config before the conversion if the layers "
        "shall look further back)",
    )
    for index in indices:
        kind = "full_attention" if types is None else types[index]
        check(
            kind == "full_attention",
            f"layer_types[{index}]",
            kind,
            "'full_attention' (leave other layers out of layers=)",
        )
    return tuple(indices)


def check_model(model: Any, families: Mapping[type, Any]) -> None:
    """Raise ValueError unless it is a dense model of ``families`` on one device."""
    kind = type(model).__name__
    names = ", ".join(family.__name__ for family in families)
    reason = f" (not {kind}, {REASONS[kind]})" if kind in REASONS else ""
    check(type(model) in families, "model", kind, f"a model of class {names}{reason}")
    config = model.config
    check(
        getattr(config, "quantization_config", None) is None,
        "quantization_config",
        getattr(config, "quantization_config", None),
        "None (convert first, then quantise)",
    )
    for option, off, why in SWITCHED_OFF:
        value = getattr(config, option, None)
        check(not value, option, value, f"{off} ({why}; set it in model.config before)")
    rope = full_rope(config).get("rope_type", "default")
    check(rope in ROPE_TYPES, "rope_type", rope, f"one of {ROPE_TYPES}")
    check(
        not getattr(config, "output_attentions", False),
        "output_attentions",
        True,
        "False (this attention keeps no probabilities)",
    )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    check(
        len(devices) == 1 and devices != ["meta"],
        "device",
        devices,
        "one device with all the weights (not meta, and no device_map over several)",
    )


def check_modules(model: Any, layers: tuple[int, ...]) -> None:
    """Raise ValueError if something has replaced or wrapped attention modules or weights."""
    for index in layers:
        attention, where = model.model.layers[index].self_attn, f"layers[{index}].self_attn"
        check(
            type(attention) in ROTARY,
            where,
            type(attention).__name__,
            f"one of {', '.join(x.__name__ for x in ROTARY)}",
        )
        others = {name.split(".")[0] for name, _ in attention.named_parameters()} - WEIGHTS
        check(
            not others,
            where,
            f"weights {', '.join(sorted(others))}",
            "one with weights of projections and norms only",
        )
        for name in projection_names(attention):
            linear, option = getattr(attention, name), f"{where}.{name}"
            check(
                type(linear) is nn.Linear,
                option,
                type(linear).__name__,
                "a torch.nn.Linear (merge adapters first, quantise later)",
            )
            check_parameter(
                f"{option}.weight", linear.weight, (linear.out_features, linear.in_features)
            )
            if linear.bias is not None:
                check_parameter(f"{option}.bias", linear.bias, (linear.out_features,))
        for name, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            if hasattr(attention, name):
                weight = getattr(attention, name).weight
                width = attention.head_dim
                if type(attention) in NORMS_OVER_HEADS:
                    width = getattr(attention, projection).out_features
                check_parameter(f"{where}.{name}.weight", weight, (width,))


def check_config(config: Any, hf_config: Any, gate_init: tuple[float, float, float]) -> None:
    """Raise ValueError for an ``NSAConfig`` that does not fit the dense model's weights."""
    check(isinstance(config, NSAConfig), "config", config, "an NSAConfig")
    gate_init = replace(config, gate_init=gate_init).gate_init  # NSAConfig checks it.
    width = head_dim(hf_config)
    for option, theirs, wanted, value in (
        ("num_heads", "num_attention_heads", hf_config.num_attention_heads, config.num_heads),
        ("num_kv_heads", "num_key_value_heads", hf_config.num_key_value_heads, config.num_kv_heads),
        ("head_dim", "head_dim", width, config.head_dim),
        ("v_head_dim", "head_dim", width, config.value_dim),
    ):
        must = f"{wanted} as the model's {theirs}"
        check(value == wanted, f"NSAConfig.{option}", value, must)
    check(
        config.compress != "custom",
        "compress",
        config.compress,
        "one of the built-in kinds, which a checkpoint can hold",
    )
    check(
        not config.compress_pre_rope,
        "compress_pre_rope",
        config.compress_pre_rope,
        "False (the model's rotary embedding gives rotated keys)",
    )
    check(
        {"selected", "window"} <= set(config.branches),
        "branches",
        config.branches,
        "a choice with 'selected' and 'window', which together start as the dense attention",
    )
    hidden = config.compress_hidden
    check(
        hidden is None or hidden >= 2 * config.head_dim,
        "compress_hidden",
        hidden,
        f"None or at least 2 * head_dim = {2 * config.head_dim}, which can start as a mean",
    )
    check(
        config.gate_init in (DENSE_GATE_INIT, gate_init),
        "NSAConfig.gate_init",
        config.gate_init,
        f"its default (gate_init= of the conversion, here {gate_init}, replaces it)",
    )


def check_scale(config: NSAConfig, attention: Any) -> None:
    """Raise ValueError unless the config has the softmax scale of a dense attention module."""
    scale = attention.scaling
    usual = scale == config.head_dim**-0.5
    must = f"None, which gives the model's {scale!r}" if usual else f"the model's, {scale!r}"
    check(config.softmax_scale == scale, "scale", config.scale, must)


def check_attention(config: NSAConfig, backend: str, attention: Any) -> None:
    """Raise ValueError if ``backend`` cannot compute the config with an attention's weights."""
    weight = attention.o_proj.weight
    # A weight on the host may be moved to a GPU later; one on a GPU stays there.
    device = weight.device if weight.is_cuda else None
    refused = get_backend(backend, device).refuses(weight.dtype, config.kernel_options)
    if refused is not None:
        raise ValueError(refused)


def static_problem(
    config: Any, num_sparse: int, backend: Backend, batch_invariant: bool
) -> str | None:
    """The error of a ``StaticCache`` for a model, or None.

    Args:
        num_sparse: layers with this attention.
    """
    must, got = "past_key_values must be a DynamicCache", "got a StaticCache"
    if num_sparse < config.num_hidden_layers:
        why = "with layers that stay dense (their attention over all rows rounds otherwise)"
    elif batch_invariant:
        why = "with use_batch_invariant (training's operators read lengths on the host)"
    elif attend_few(backend) is None:
        why = f"with backend {backend.name!r}, which has no attend_few"
    elif torch.is_grad_enabled():
        why = "in grad mode (a StaticCache is written in place: use torch.no_grad)"
    else:
        return None
    return f"{must} {why}, {got}"


def refuse_export() -> None:
    """Raise ValueError in a program that torch.export or torch.jit traces."""
    found = "torch.export" if torch.compiler.is_exporting() else "torch.jit.trace"
    if found == "torch.export" or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            f"a converted model must be run or compiled with torch.compile, got {found}: the "
            "tables of a batch follow from its lengths and padding, which are read at each call"
        )


def balances_experts(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call adds the loss that balances a mixture of experts."""
    given = kwargs.get("output_router_logits")
    return bool(getattr(config, "output_router_logits", False) if given is None else given)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return bool((one.to(other.device) == other).all())


def check_call(
    config: Any,
    *,
    split: bool,
    rows: int,
    length: int,
    attention_mask: Any,
    past_key_values: Any,
    use_cache: bool | None,
    cu_seqlens: Any,
    kwargs: Mapping[str, Any],
) -> str | None:
    """The error in the arguments of a decoder's ``forward``, or None.

    Args:
        split: whether the sequence is split over ranks.
        rows, length: of the tokens on this rank.
        cu_seqlens: from the caller, or ``cu_seq_lens_q`` of ``kwargs``.
    """
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return "output_attentions must be False (this attention keeps no probabilities), got True"
    keys = kwargs.get("cu_seq_lens_k")
    queries = kwargs.get("cu_seq_lens_q")
    # Dense layers use these arguments, NSA layers use cu_seqlens.
    if queries is not None and not _same(queries, cu_seqlens):
        return "cu_seq_lens_q must be None or equal to cu_seqlens, got different boundaries"
    if keys is not None and not _same(keys, queries):
        return "cu_seq_lens_k must be equal to cu_seq_lens_q, got different boundaries"
    packed = cu_seqlens is not None
    why = "a sequence split over ranks" if split else "packed documents (cu_seqlens)"
    if split or packed:
        if past_key_values is not None:
            must = f"None with {why} (generate needs whole sequences: model.use_group(None))"
            return f"past_key_values must be {must}, got {describe(past_key_values)}"
        if use_cache:
            return f"use_cache must be None or False with {why}, got True"
    if attention_mask is not None and (split or packed):
        given = describe(attention_mask)
        mask_shape = (rows, length)
        if not is_plain(attention_mask) or tuple(attention_mask.shape) != mask_shape:
            return f"attention_mask must be None or of shape {mask_shape} with {why}, got {given}"
        if packed and not bool(attention_mask.bool().all()):
            return (
                "attention_mask must be None or all ones with packed documents (cu_seqlens, of "
                f"which padding is one more), got zeros in {given}"
            )
    if split and balances_experts(config, kwargs):
        return (
            "output_router_logits must be False with a sequence split over ranks (the loss that "
            "balances experts is not one of parts of a sequence), got True"
        )
    if packed and rows != 1:
        return f"cu_seqlens must come with batch size 1, got batch size {rows}"
    return None


def check_labels(by_others: Split | None, labels: Any, kwargs: Mapping[str, Any]) -> str | None:
    """The error in the labels of a split sequence, or None.

    Args:
        by_others: who splits the sequence, if not the caller of ``use_group``.
    """
    shifted = kwargs.get("shift_labels")
    if labels is None:
        if shifted is not None and by_others is not None and not by_others.mean_of_parts:
            # The Trainer takes labels out of the batch for these, and shifts a part of them.
            return (
                "labels must come with shift_labels where context_parallel splits sequences (the "
                "Trainer's label_smoothing_factor must be 0.0 and compute_loss_func None: they "
                "shift a rank's part of the labels), got None"
            )
        return None
    why = "for labels with a sequence split over ranks"
    if shifted is None:
        must = "the labels of nsa_dist.shard_batch, which it shifts before the cut"
        return f"shift_labels must be {must}, {why}, got None"
    if by_others is None and kwargs.get("num_items_in_batch") is None:
        must = "num_targets of nsa_dist.shard_batch, the number of labels of all ranks"
        return f"num_items_in_batch must be {must}, {why}, got None"
    return None
