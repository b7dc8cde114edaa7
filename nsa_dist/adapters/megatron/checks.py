"""Checks of Megatron options and arguments that this attention does not support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nsa_dist.adapters.megatron.arguments import program_arguments
from nsa_dist.adapters.megatron.modules import parameter_device
from nsa_dist.adapters.megatron.packed import layout_of_program
from nsa_dist.checks import check, describe
from nsa_dist.config import NSAConfig
from nsa_kernels import get_backend

UNTRIED = "anything else is untested with this attention"

# Options of TransformerConfig, the one value allowed, and why. Versions of Megatron lack some.
ONLY: tuple[tuple[str, Any, str], ...] = (
    ("attention_dropout", 0.0, "there is no dropout of probabilities; --attention-dropout 0"),
    ("softmax_type", "vanilla", "a softmax with an offset is a different function"),
    ("window_size", None, "NSAConfig sets the window"),
    ("window_attn_skip_freq", None, "layers= of the block spec says which layers are dense"),
    ("attention_output_gate", False, "NSAConfig sets the gates"),
    ("apply_query_key_layer_scaling", False, "NSAConfig sets the scale"),
    ("qk_clip", False, "the largest logits are not kept"),
    ("log_max_attention_logit", False, "the largest logits are not kept"),
    ("multi_latent_attention", False, "latent attention is a different layer"),
    ("experimental_attention_variant", None, "each variant is a layer of its own"),
    ("fp4", None, "the attention needs 16 bits or more"),
    ("fp8_dot_product_attention", False, "the attention needs 16 bits or more"),
    ("fp8_multi_head_attention", False, "the attention needs 16 bits or more"),
    ("apply_rope_fusion", False, "TransformerEngine's kernel is untested here; --no-rope-fusion"),
    ("fused_single_qkv_rope", False, "it expects one key and one value per KV head"),
    ("mrope_section", None, UNTRIED),
    ("is_hybrid_model", False, "untested beside Mamba layers; layers= of the block spec mixes"),
    ("hybrid_context_parallel", False, "there is one context parallel group"),
    ("hierarchical_context_parallel_sizes", None, "there is one context parallel group"),
    ("flash_decode", False, "this attention is for training only"),
    ("enable_cuda_graph", False, "cuda_graph_impl takes its place"),
    ("external_cuda_graph", False, "cuda_graph_impl takes its place"),
    ("fine_grained_activation_offloading", False, UNTRIED),
    ("cpu_offloading", False, UNTRIED),
    ("delay_wgrad_compute", False, UNTRIED),
    ("overlap_moe_expert_parallel_comm", False, UNTRIED),
    ("tp_comm_overlap", False, "it is TransformerEngine's and untested here"),
    ("gtp_weight_remat_size", 1, "--tensor-parallel-num-weight-shards is untested here"),
    ("batch_invariant_mode", False, UNTRIED),
    ("test_mode", False, "it compares layers that this attention lacks"),
    ("use_kitchen", False, UNTRIED),
    ("init_model_with_meta_device", False, UNTRIED),
    ("enable_autocast", False, "Megatron's own mixed precision casts parameters"),
)

# Arguments of Megatron-LM's programs that must be off, and why.
ARGUMENTS_OFF: tuple[tuple[str, str], ...] = (
    ("reset_attention_mask", "masks are not read; give packed documents as packed_seq_params"),
    ("use_torch_fsdp2", "weights that FSDP shards are untested with this attention"),
    ("use_megatron_fsdp", "weights that FSDP shards are untested with this attention"),
)

GRAPHS = ("mlp", "moe", "moe_router", "moe_preprocess")
"""Parts of a layer that CUDA graphs may capture."""

# Modules of TransformerEngine's that the layer may be made of.
OF_TRANSFORMER_ENGINE: dict[str, str | None] = {
    "linear_qkv": "TEColumnParallelLinear",
    "linear_proj": "TERowParallelLinear",
    "q_layernorm": None,
    "k_layernorm": None,
}


def check_build(
    config: TransformerConfig,
    nsa_config: NSAConfig,
    submodules: SelfAttentionSubmodules,
    attn_mask_type: AttnMaskType,
    pg_collection: ProcessGroupCollection,
    backend: str,
) -> None:
    """Raise ValueError for options that the layer does not support, before it is built."""
    check(isinstance(nsa_config, NSAConfig), "nsa_config", nsa_config, "an NSAConfig")
    for option, value, why in ONLY:
        given = getattr(config, option, value)
        # Some versions turn an option off by None, others by False.
        off = not value and isinstance(value, (bool, type(None))) and given in (False, None)
        check(given == value or off, option, given, f"{value!r} ({why})")
    _check_cuda_graphs(config)
    _check_arguments(config)
    _check_shapes(config, nsa_config)
    _check_groups(config, pg_collection)
    check_comm_type(config)
    check(
        attn_mask_type == AttnMaskType.causal,
        "attn_mask_type",
        attn_mask_type,
        "AttnMaskType.causal, for packed batches too",
    )
    _check_submodules(config, submodules)
    # A layer made on the host may be moved to a GPU.
    device = None if config.use_cpu_initialization else parameter_device(config)
    refused = get_backend(backend, device).refuses(config.params_dtype, nsa_config.kernel_options)
    if refused is not None:
        raise ValueError(refused)


def _check_cuda_graphs(config: TransformerConfig) -> None:
    """Raise ValueError for CUDA graphs that have the attention in them."""
    kind = config.cuda_graph_impl
    # "local" captures whole layers, whatever the scope names.
    check(
        kind in (None, "none", "transformer_engine"),
        "cuda_graph_impl",
        kind,
        "'none', or 'transformer_engine' with a scope of MLPs and experts alone (the host makes "
        "this attention's plans while the model runs)",
    )
    if kind != "transformer_engine":
        return
    option = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"
    scope = getattr(config, option)
    names = [getattr(x, "name", x) for x in (scope if isinstance(scope, list) else [scope])]
    check(
        bool(names) and set(names) <= set(GRAPHS),
        option,
        scope,
        f"one or more of {GRAPHS} (an empty one is the whole layer; the host makes this "
        "attention's plans while the model runs)",
    )


def _check_arguments(config: TransformerConfig) -> None:
    """Raise ValueError for arguments of Megatron-LM's programs that its layers do not see."""
    arguments = program_arguments()
    for option, why in ARGUMENTS_OFF:
        check(not getattr(arguments, option, False), option, True, f"False ({why})")
    optimizer = getattr(arguments, "optimizer", "adam")
    check(
        "muon" not in optimizer,
        "optimizer",
        optimizer,
        "one that is not Muon's kind (it would cut linear_qkv as if each group had one key and one "
        "value, and take norms of several keys and position embeddings for matrices)",
    )
    is_shifted_wrong = config.context_parallel_size > 1 and layout_of_program() == "zigzag"
    check(
        config.mtp_num_layers is None or not is_shifted_wrong,
        "mtp_num_layers",
        config.mtp_num_layers,
        "None with dataloader_inter_document_masking and context_parallel_size > 1 (Megatron "
        "shifts labels as if each document were split on its own)",
    )


def has_experts(config: TransformerConfig, layer_number: int) -> bool:
    """Whether the config makes the MLP of a layer, counted from 1, a mixture of experts."""
    every, at = config.moe_layer_freq, layer_number - 1
    wanted = every[at] if isinstance(every, list) else at % every == 0
    return config.num_moe_experts is not None and bool(wanted)


def check_experts(config: TransformerConfig, layer_number: int, experts: bool | None) -> None:
    """Raise ValueError for a layer whose MLP differs from the config.

    Args:
        layer_number: counts from 1, over all pipeline stages.
        experts: whether the layer's MLP is a mixture of experts; None if unknown.
    """
    if experts is None:
        return
    count, every = config.num_moe_experts, config.moe_layer_freq
    wanted = has_experts(config, layer_number)
    if wanted and not experts:
        raise ValueError(
            f"num_moe_experts must be None with a dense MLP in the spec of layer {layer_number}, "
            f"got {count}; get_gpt_layer_nsa_spec(num_experts={count}) and "
            "get_gpt_decoder_block_nsa_spec make specs with experts"
        )
    if experts and not wanted:
        option, value = ("num_moe_experts", None) if count is None else ("moe_layer_freq", every)
        raise ValueError(
            f"{option} must be one that gives layer {layer_number} experts as its spec does, got "
            f"{value!r}; get_gpt_decoder_block_nsa_spec makes specs that follow the config"
        )


def check_from_dense(nsa_config: NSAConfig, from_dense: bool) -> None:
    """Raise ValueError for an attention that a dense layer's weights do not fit."""
    check(
        not (from_dense and nsa_config.independent_kv),
        "independent_kv",
        nsa_config.independent_kv,
        "False with from_dense (a dense layer has one key and one value per head)",
    )


def check_comm_type(config: TransformerConfig) -> None:
    """Raise ValueError if each layer has its own way of communication."""
    check(
        not isinstance(config.cp_comm_type, list),
        "cp_comm_type",
        config.cp_comm_type,
        "None or one string (which is not read: blocks are fetched, not gathered)",
    )


def _check_shapes(config: TransformerConfig, nsa_config: NSAConfig) -> None:
    check(
        nsa_config.compress != "custom",
        "compress",
        nsa_config.compress,
        "one of the built-in kinds with Megatron",
    )
    check(
        not nsa_config.compress_pre_rope,
        "compress_pre_rope",
        nsa_config.compress_pre_rope,
        "False (Megatron passes rotated keys)",
    )
    for option, megatron_option, value in (
        ("num_heads", "num_attention_heads", nsa_config.num_heads),
        ("num_kv_heads", "num_query_groups", nsa_config.num_kv_heads),
        ("head_dim", "kv_channels", nsa_config.head_dim),
        ("v_head_dim", "kv_channels", nsa_config.value_dim),
    ):
        wanted = getattr(config, megatron_option)
        must = f"{wanted} as the TransformerConfig's {megatron_option}"
        check(value == wanted, f"NSAConfig.{option}", value, must)
    if config.softmax_scale is not None:
        check(
            config.softmax_scale == nsa_config.softmax_scale,
            "softmax_scale",
            config.softmax_scale,
            f"None or the NSAConfig's {nsa_config.softmax_scale}",
        )


def _check_groups(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
    tp_size, groups = pg_collection.tp.size(), config.num_query_groups
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    check(
        groups % tp_size == 0,
        "tensor_model_parallel_size",
        tp_size,
        f"a divisor of num_query_groups = {groups}: {divisors} (a rank holds whole groups)",
    )
    for option, size in (
        ("tensor_model_parallel_size", tp_size),
        ("context_parallel_size", pg_collection.cp.size()),
    ):
        value = getattr(config, option)
        check(value == size, option, value, f"{size}, the size of the process group")


def _check_submodules(config: TransformerConfig, submodules: SelfAttentionSubmodules) -> None:
    engine = True
    for name, allowed in OF_TRANSFORMER_ENGINE.items():
        module = _module(getattr(submodules, name))
        found = getattr(module, "__qualname__", module)
        is_engines = module is not None and "transformer_engine" in module.__module__
        fine = "" if allowed is None else f" or TransformerEngine's {allowed}"
        check(
            found == allowed or not is_engines,
            name,
            found,
            f"Megatron's own module{fine} (the gates need the normed input, and each set of keys "
            "its norm; use_transformer_engine=True of the specs takes what fits)",
        )
        engine = engine and (is_engines or allowed is None)
    check(
        engine or config.fp8 in (None, False),
        "fp8",
        config.fp8,
        "None with Megatron's own linear layers (TransformerEngine's multiply in 8 bits; the "
        "attention itself needs 16 bits or more)",
    )
    for name in ("q_layernorm", "k_layernorm"):
        module = _module(getattr(submodules, name))
        has_weight = module not in (None, IdentityOp, L2Norm)
        # Only with qk_layernorm does Megatron sum the gradients of these weights over TP ranks.
        for option, found in (("qk_layernorm", has_weight), ("qk_l2_norm", module is L2Norm)):
            given = getattr(config, option)
            must = f"{found} in the TransformerConfig, as when the spec was made"
            check(given == found, option, given, must)


def _module(spec: Any) -> Any:
    return spec.module if isinstance(spec, ModuleSpec) else spec


def check_call(given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of ``Attention.forward`` that must be None."""
    training = "None (this attention is for training only and has no KV cache)"
    for option, must in (
        ("inference_context", training),
        ("inference_params", training),
        ("key_value_states", "None (this is self-attention)"),
        ("attention_bias", "None"),
    ):
        if given.get(option) is not None:
            raise ValueError(f"{option} must be {must}, got {describe(given[option])}")


def check_no_mask(mask: Tensor, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a mask with a packed batch."""
    if given.get("packed_seq_params") is not None:
        raise ValueError(
            "attention_mask must be None with packed_seq_params, whose boundaries separate the "
            f"documents, got {describe(mask)}"
        )
