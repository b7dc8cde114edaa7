"""Layer and block specs, to use instead of Megatron's own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nsa_dist.adapters.megatron.attention import NSACoreAttention, NSASelfAttention
from nsa_dist.adapters.megatron.checks import check_comm_type
from nsa_dist.adapters.megatron.modules import Norm
from nsa_dist.checks import check
from nsa_dist.config import NSAConfig


def get_gpt_layer_nsa_spec(
    nsa_config: NSAConfig,
    *args: Any,
    backend: str = "auto",
    from_dense: bool = False,
    use_transformer_engine: bool = False,
    **kwargs: Any,
) -> ModuleSpec:
    """A GPT layer with Native Sparse Attention, to use instead of ``get_gpt_layer_local_spec`` or
    ``get_gpt_layer_with_transformer_engine_spec``.

    Args:
        nsa_config: the attention; heads and widths must be those of the ``TransformerConfig``.
        backend: "auto" (Triton on an NVIDIA GPU, else PyTorch) or a backend's name.
        from_dense: start gates as constants, at ``nsa_config.gate_init``, and compressors as the
            mean of a block, for the weights of a dense model.
        use_transformer_engine: take linear layers, norms and the MLP of TransformerEngine. The
            norm before the attention is not fused with its projection: gates need its output.
        args, kwargs: as for the function of Megatron that this one takes the place of.
            ``normalization`` defaults to the TransformerConfig's.

    Returns:
        The spec of a ``TransformerLayer``. For sequence parallelism use
        ``get_gpt_decoder_block_nsa_spec``: without TransformerEngine and apex, Megatron has no
        final norm that supports it.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    _check_transformer_engine(use_transformer_engine)
    make = (
        get_gpt_layer_with_transformer_engine_spec
        if use_transformer_engine
        else get_gpt_layer_local_spec
    )
    bound = inspect.signature(make).bind(*args, **kwargs)
    given = bound.arguments
    for option in ("multi_latent_attention", "fp8", "use_kitchen"):
        value = given.get(option)
        check(not value, option, value, "None or False with this attention")
    # All norms are replaced below, so Megatron's global choice of norm does not matter.
    normalization = given.pop("normalization", None)
    layer = make(*bound.args, **bound.kwargs)
    layer = _with_nsa(layer, nsa_config, backend=backend, from_dense=from_dense)
    return _with_norms(layer, normalization)


def get_gpt_decoder_block_nsa_spec(
    config: TransformerConfig,
    nsa_config: NSAConfig,
    *,
    layers: Sequence[int | bool] | None = None,
    backend: str = "auto",
    from_dense: bool = False,
    use_transformer_engine: bool = False,
    qk_l2_norm: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """All layers of a pipeline stage and the final norm, to use instead of
    ``get_gpt_decoder_block_spec``.

    Args:
        config: sets the number of layers, which of them are mixtures of experts, and the norm.
        nsa_config, backend, from_dense, use_transformer_engine: as for
            ``get_gpt_layer_nsa_spec``.
        layers: for each layer of the whole model, 1 for Native Sparse Attention or 0 for
            Megatron's dense attention; default 1 for all.
        qk_l2_norm, vp_stage, pp_rank: as for ``get_gpt_decoder_block_spec``.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    _check_transformer_engine(use_transformer_engine)
    check_comm_type(config)  # Before Megatron's layer reads past the end of such a list.
    count = config.num_layers
    if layers is None:
        layers = (1,) * count
    check(
        len(layers) == count and all(x in (0, 1) for x in layers),
        "layers",
        layers,
        f"one 0 or 1 for each of num_layers = {count}",
    )
    if not all(layers):
        size = config.context_parallel_size
        why = "Megatron's local dense attention runs on one rank"
        if use_transformer_engine:
            why = "TransformerEngine's dense attention is untested beside this one"
        must = f"1 with dense layers ({why})"
        check(size == 1, "context_parallel_size", size, must)
        # Otherwise all layers are saved as slices of one tensor, and these differ in shape.
        all_dense = not any(layers)
        saved_apart = config.hetereogenous_dist_checkpoint
        must = "True where only some layers are dense (layers of two kinds are saved apart)"
        check(all_dense or saved_apart, "hetereogenous_dist_checkpoint", saved_apart, must)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        qk_l2_norm=qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    options: dict[str, Any] = {"backend": backend, "from_dense": from_dense}
    specs = [
        _with_norms(_with_nsa(spec, nsa_config, **options) if layers[at] else spec)
        for at, spec in zip(
            _layers_of_stage(config, len(block.layer_specs), vp_stage, pp_rank),
            block.layer_specs,
            strict=True,
        )
    ]
    last = block.layer_norm if use_transformer_engine else Norm
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=last)


def get_gpt_mtp_block_nsa_spec(
    config: TransformerConfig,
    spec: ModuleSpec | TransformerBlockSubmodules,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Layers of multi-token prediction, to use instead of ``get_gpt_mtp_block_spec``.

    Args:
        config: sets the number of layers, ``mtp_num_layers``.
        spec: of ``get_gpt_layer_nsa_spec`` or ``get_gpt_decoder_block_nsa_spec``; of the latter
            the last layer is taken.
        vp_stage, pp_rank: as for ``get_gpt_mtp_block_spec``.

    Returns:
        ``GPTModel``'s ``mtp_block_spec``; None on stages without such layers.
    """
    layer = spec.layer_specs[-1] if isinstance(spec, TransformerBlockSubmodules) else spec
    engine = _is_of_transformer_engine(layer)
    # They are numbered after the decoder's layers, which moe_layer_freq may list.
    layer = _with_params(layer, experts=None)
    block = get_gpt_mtp_block_spec(
        config, layer, use_transformer_engine=engine, vp_stage=vp_stage, pp_rank=pp_rank
    )
    if block is None or engine:
        return block
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), Norm)
    layers = [replace(x, submodules=replace(x.submodules, **norms)) for x in block.layer_specs]
    return replace(block, layer_specs=layers)


def _layers_of_stage(
    config: TransformerConfig, count: int, vp_stage: int | None, pp_rank: int | None
) -> Sequence[int]:
    """Indices, from 0, of the layers that a pipeline stage builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return range(first, first + count)


def _with_nsa(
    layer: ModuleSpec, nsa_config: NSAConfig, *, backend: str, from_dense: bool
) -> ModuleSpec:
    """A layer with its self-attention replaced.

    TransformerEngine fuses the norm before the attention with the projection. Here they are two
    modules, saved under the fused one's names, which are those of layers without
    TransformerEngine, too.
    """
    parts = layer.submodules
    dense = parts.self_attention
    assert dense.module is SelfAttention
    linear_qkv = dense.submodules.linear_qkv
    if linear_qkv is TELayerNormColumnParallelLinear:
        linear_qkv = TEColumnParallelLinear
        parts = replace(
            parts,
            input_layernorm=TENorm,
            sharded_state_dict_keys_map=parts.sharded_state_dict_keys_map
            | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        )
    attention = ModuleSpec(
        module=NSASelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "nsa_config": nsa_config,
            "backend": backend,
            "from_dense": from_dense,
            "experts": _has_experts(parts.mlp),
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=NSACoreAttention,
            linear_proj=dense.submodules.linear_proj,
            q_layernorm=dense.submodules.q_layernorm,
            k_layernorm=dense.submodules.k_layernorm,
        ),
    )
    return replace(layer, submodules=replace(parts, self_attention=attention))


def _with_params(layer: ModuleSpec, **params: Any) -> ModuleSpec:
    """A layer with other arguments of its attention."""
    attention = layer.submodules.self_attention
    attention = replace(attention, params=attention.params | params)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _has_experts(mlp: Any) -> bool:
    module = mlp.module if isinstance(mlp, ModuleSpec) else mlp
    if isinstance(module, partial):  # Megatron's from 0.18 on.
        module = module.func
    return isinstance(module, type) and issubclass(module, MoELayer)


def _with_norms(layer: ModuleSpec, normalization: str | None = None) -> ModuleSpec:
    """A layer whose norms work on split sequences, and on sets of keys.

    TransformerEngine's do the former: with them only those of queries and keys are replaced.
    """
    norm = ModuleSpec(module=Norm, params={"normalization": normalization})
    head_norm = ModuleSpec(module=Norm, params={"normalization": normalization, "per_head": True})
    parts = layer.submodules
    inner = parts.self_attention.submodules
    engine = _is_of_transformer_engine(layer)
    if not engine:
        parts = replace(
            parts,
            input_layernorm=_replaced(parts.input_layernorm, norm),
            pre_mlp_layernorm=_replaced(parts.pre_mlp_layernorm, norm),
        )
    if engine and parts.self_attention.module is SelfAttention:
        return layer
    inner = replace(
        inner,
        q_layernorm=_replaced(inner.q_layernorm, head_norm),
        k_layernorm=_replaced(inner.k_layernorm, head_norm),
    )
    attention = replace(parts.self_attention, submodules=inner)
    return replace(layer, submodules=replace(parts, self_attention=attention))


def _is_of_transformer_engine(layer: ModuleSpec) -> bool:
    linear_qkv = layer.submodules.self_attention.submodules.linear_qkv
    return linear_qkv in (TEColumnParallelLinear, TELayerNormColumnParallelLinear)


def _check_transformer_engine(wanted: bool) -> None:
    must = "False without TransformerEngine, which is not installed"
    check(HAVE_TE or not wanted, "use_transformer_engine", wanted, must)


def _replaced(old: Any, norm: ModuleSpec) -> Any:
    return old if old in (None, IdentityOp, L2Norm) else norm
