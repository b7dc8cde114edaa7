"""What a user puts into Megatron-LM's ``pretrain_gpt.py``: a model builder and a spec by name.

    from nsa_dist.adapters.megatron import add_nsa_args, nsa_gpt_builder as gpt_builder

Up to 0.18 the script hands a builder to Megatron, which calls it for each pipeline stage. From 0.19
on Megatron makes the model itself, of the spec that ``--spec nsa_dist.adapters.megatron nsa_spec``
names, and calls that for each stage. In older releases the name stands for the spec of each layer,
before any argument is known: a layer that reads the arguments when it is built.
"""

from __future__ import annotations

from argparse import Namespace
from inspect import signature
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.package_info import MAJOR, MINOR
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from nsa_dist.adapters.megatron.arguments import (
    SPEC,
    backend_of,
    nsa_config_from_args,
    program_arguments,
    starts_from_dense,
    uses_transformer_engine,
)
from nsa_dist.adapters.megatron.checks import has_experts
from nsa_dist.adapters.megatron.spec import (
    get_gpt_decoder_block_nsa_spec,
    get_gpt_layer_nsa_spec,
    get_gpt_mtp_block_nsa_spec,
)
from nsa_dist.checks import check

# Arguments of the program that choose another layer, the value of each that is allowed, and why.
ONLY: tuple[tuple[str, Any, str], ...] = (
    ("heterogeneous_layers_config_path", None, "it describes attentions of its own"),
    ("use_legacy_models", False, "legacy models have no layer specs"),
    ("modelopt_enabled", False, "it builds layers of its own"),
    ("hybrid_layer_pattern", None, "untested beside Mamba layers"),
    ("hybrid_override_pattern", None, "untested beside Mamba layers"),
    ("is_hybrid_model", False, "untested beside Mamba layers"),
)

LLAMA_FACTOR = 8.0
NOT_PASSED = "with --spec (Megatron hands the model another one; nsa_gpt_builder does not)"


def check_program(args: Namespace) -> None:
    """Raise ValueError for arguments of the program that choose another layer."""
    kind = getattr(args, "transformer_impl", "local")
    must = "'local' or 'transformer_engine' with this attention"
    if not HAVE_TE:
        must = "'local' without TransformerEngine, which is not installed"
    check(
        kind == "local" or (HAVE_TE and uses_transformer_engine(args)),
        "transformer_impl",
        kind,
        must,
    )
    for option, value, why in ONLY:
        given = getattr(args, option, value)
        off = not value and not given
        check(given == value or off, option, given, f"{value!r} with this attention ({why})")


def nsa_gpt_builder(
    args: Namespace,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """A GPT model with Native Sparse Attention, to use instead of Megatron-LM's ``gpt_builder``.

    Args:
        args: the program's arguments, with those of ``add_nsa_args``.
        pre_process, post_process: whether this stage has the embedding, and the output layer.
        vp_stage: the stage's number on its rank in interleaved pipelines.
        config: default ``core_transformer_config_from_args(args)``.
        pg_collection: process groups; default Megatron's global ones.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    check_program(args)
    spec = getattr(args, "spec", None)
    must = f"None or {SPEC} with nsa_gpt_builder, which makes the spec"
    check(spec in (None, SPEC), "spec", spec, must)
    if config is None:
        config = _config_from_args(args)
    block = _block_of(args, config, vp_stage)
    mtp = None
    if config.mtp_num_layers is not None:
        layer = block if block.layer_specs else _layer_of(args, config, config.num_layers)
        mtp = get_gpt_mtp_block_nsa_spec(config, layer, vp_stage=vp_stage)
    options = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "fp16_lm_cross_entropy": args.fp16_lm_cross_entropy,
        "logit_dtype": getattr(args, "logit_dtype", None),
        "parallel_output": True,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "rope_scaling": args.use_rope_scaling,
        "rope_scaling_factor": getattr(args, "rope_scaling_factor", LLAMA_FACTOR),
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
        "mtp_block_spec": mtp,
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
    }
    if "logit_dtype" not in signature(GPTModel).parameters:
        del options["logit_dtype"]
    return GPTModel(config, block, **options)


def nsa_config_overrides(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's overrides of parameter groups, and no weight decay for three of our parameters.

    To use instead of ``get_standard_config_overrides``. Megatron decays no vectors and biases;
    position embeddings of compressors, key norms with a row for each branch and static gates are
    neither, but have the same part.
    """
    names: tuple[str, ...] = ("*_compressor.position", "*.gate.logits")
    if not config.apply_wd_to_qk_layernorm:
        names += ("*.k_layernorm.weight",)
    overrides: dict[ParamKey, ParamGroupOverride] = get_standard_config_overrides(config)
    return overrides | {ParamKey(name=names): ParamGroupOverride(wd_mult=0.0)}


def _config_from_args(args: Namespace) -> TransformerConfig:
    # Megatron-LM's programs, which are not in the package megatron-core.
    if getattr(args, "yaml_cfg", None) is not None:
        from megatron.training.yaml_arguments import core_transformer_config_from_yaml

        return core_transformer_config_from_yaml(args, "language_model")
    from megatron.training.arguments import core_transformer_config_from_args

    return core_transformer_config_from_args(args)


def _block_of(
    args: Namespace, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    return get_gpt_decoder_block_nsa_spec(
        config,
        nsa_config_from_args(args, config),
        backend=backend_of(args),
        from_dense=starts_from_dense(args),
        use_transformer_engine=uses_transformer_engine(args),
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )


def _layer_of(args: Namespace, config: TransformerConfig, layer_number: int) -> ModuleSpec:
    """One layer, counted from 1 over all stages."""
    experts: dict[str, Any] = {}
    if has_experts(config, layer_number):
        experts = {
            "num_experts": config.num_moe_experts,
            "moe_grouped_gemm": config.moe_grouped_gemm,
        }
    return get_gpt_layer_nsa_spec(
        nsa_config_from_args(args, config),
        backend=backend_of(args),
        from_dense=starts_from_dense(args),
        use_transformer_engine=uses_transformer_engine(args),
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        **experts,
    )


def _arguments() -> Namespace:
    """The arguments of the program."""
    args = program_arguments()
    if args is None:
        raise ValueError(
            "nsa_spec must be built in a program that has set Megatron-LM's arguments, got none; "
            "get_gpt_layer_nsa_spec needs no arguments"
        )
    check_program(args)
    factor = getattr(args, "rope_scaling_factor", LLAMA_FACTOR)
    must = f"{LLAMA_FACTOR} {NOT_PASSED}"
    scaled = getattr(args, "use_rope_scaling", False)
    check(not scaled or factor == LLAMA_FACTOR, "rope_scaling_factor", factor, must)
    return args


class LayerFromArguments(TransformerLayer):
    """A layer with Native Sparse Attention that the program's arguments describe."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **options: Any,
    ) -> None:
        # What models of Mamba layers build of a spec is their whole stack.
        is_stack = "pre_process" in options
        must = f"that of a stack of layers in a model with Mamba layers (not {' '.join(SPEC)})"
        check(not is_stack, "spec", type(self).__name__, must)
        args = _arguments()
        factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
        must = f"None {NOT_PASSED}"
        check(factor is None, "rotary_seq_len_interpolation_factor", factor, must)
        lacks_norm = transformer_block.LayerNormImpl is WrappedTorchNorm
        check(
            not (config.sequence_parallel and lacks_norm),
            "sequence_parallel",
            True,
            "False with --spec and no TransformerEngine or apex (nsa_gpt_builder has a final norm "
            "for it)",
        )
        pp_rank = None if pg_collection is None else pg_collection.pp.rank()
        offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
        layer = _layer_of(args, config, layer_number + offset)
        super().__init__(
            config,
            layer.submodules,
            layer_number,
            hidden_dropout,
            pg_collection,
            vp_stage,
            **options,
        )


def spec_of_stage(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage that the program's arguments describe.

    Args:
        config: Megatron-LM's ``GPTModelConfig``.
        vp_stage: the stage's number on its rank in interleaved pipelines.

    Raises:
        ValueError: if an argument has a value that is not allowed.
    """
    args = _arguments()
    transformer: TransformerConfig = config.transformer
    layers = transformer.mtp_num_layers
    must = "None with --spec (Megatron would predict by dense layers; nsa_gpt_builder does not)"
    check(layers is None, "mtp_num_layers", layers, must)
    return _block_of(args, transformer, vp_stage)


nsa_spec: Any = spec_of_stage if (MAJOR, MINOR) >= (0, 19) else ModuleSpec(LayerFromArguments)
"""For ``--spec nsa_dist.adapters.megatron nsa_spec``."""
