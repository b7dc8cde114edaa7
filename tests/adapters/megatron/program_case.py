"""What ``pretrain_gpt.py`` calls, called as it calls it: flags, the model builder, specs by name.

Functions here run on ranks (``tests.distributed.ranks``).
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from nsa_dist import NSAConfig
from tests.adapters.megatron.small_gpt import (
    LENGTH,
    SMALL,
    VOCABULARY,
    Layout,
    Variant,
    build_model,
    draw_weights,
    megatron,
    transformer_config,
)

SMALL_FLAGS = (
    "--nsa-compress-block 4 --nsa-compress-stride 2 --nsa-select-block 4 --nsa-num-selected 4 "
    "--nsa-window 5"
)
"""``SMALL`` on a command line."""


def parse(flags: str) -> Namespace:
    """As Megatron-LM parses: it takes back the parser that it hands out."""
    from nsa_dist.adapters.megatron import add_nsa_args

    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--spec", nargs="*")
    return add_nsa_args(parser).parse_args(shlex.split(flags))


def arguments(flags: str = SMALL_FLAGS, **changes: Any) -> Namespace:
    """Arguments of Megatron-LM that a model builder reads, and those of ``flags``."""
    given = {
        "transformer_impl": "local",
        "heterogeneous_layers_config_path": None,
        "yaml_cfg": None,
        "reset_attention_mask": False,
        "padded_vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "fp16_lm_cross_entropy": False,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": 10000,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
    }
    return Namespace(**(given | vars(parse(flags)) | changes))


@contextmanager
def program(args: Namespace) -> Iterator[None]:
    """A process in which Megatron-LM's program runs with these arguments."""
    variables: Any = ModuleType("megatron.training.global_vars")
    variables._GLOBAL_ARGS = args
    with mock.patch.dict("sys.modules", {"megatron.training.global_vars": variables}):
        yield


def parsed_config(flags: str) -> NSAConfig | str:
    """The attention that flags describe, or why they are refused."""
    with megatron(Layout()):
        from nsa_dist.adapters.megatron import nsa_config_from_args

        try:
            return nsa_config_from_args(parse(flags), transformer_config(Variant()))
        except ValueError as error:
            return str(error)


def options_without_a_flag() -> set[str]:
    """Options of ``NSAConfig`` that neither a flag nor Megatron's config sets."""
    with megatron(Layout()):
        from nsa_dist.adapters.megatron.arguments import FLAGS

        of_megatron = {"num_heads", "num_kv_heads", "head_dim", "scale"}
        with_flags = {flag.option for flag in FLAGS} | {"independent_kv"}
        return {field.name for field in fields(NSAConfig)} - with_flags - of_megatron


def build_by_program(args: Namespace, config: Any, vp_stage: int | None = None) -> Any:
    """As Megatron-LM's ``model_provider`` calls the builder that it is given."""
    from megatron.core import parallel_state as state

    from nsa_dist.adapters.megatron import nsa_gpt_builder

    def model_provider(
        model_builder: Any,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        return model_builder(
            args, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection
        )

    options = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    return partial(model_provider, nsa_gpt_builder)(
        pre_process=state.is_pipeline_first_stage(**options),
        post_process=state.is_pipeline_last_stage(**options),
        vp_stage=vp_stage,
        config=config,
    )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _logits(model: Any, expected: nn.Module) -> Tensor:
    """Of the weights of ``expected``, over the whole vocabulary."""
    model.load_state_dict(expected.state_dict())
    tokens = torch.arange(40)[None] % VOCABULARY
    return model(tokens, tokens, None, runtime_gather_output=True)


def builder_agrees(layout: Layout, qk_layernorm: bool) -> bool:
    """Whether the builder makes the model that the block spec makes: the same parameters, and on
    one pipeline stage the same logits."""
    with megatron(layout):
        variant = Variant(qk_layernorm=qk_layernorm)
        config = transformer_config(variant, layout)
        expected = build_model(config, variant)
        draw_weights(expected)
        found = build_by_program(arguments(), config)
        if _shapes(found) != _shapes(expected):
            return False
        if layout.pp > 1:
            return True
        return torch.equal(_logits(found, expected), _logits(expected, expected))


def layer_numbers() -> list[int]:
    """Of both chunks of a rank's interleaved pipeline, four layers on two ranks."""
    with megatron(Layout(pp=2)):
        from megatron.core import parallel_state as state

        config = transformer_config(
            Variant(),
            Layout(pp=2),
            num_layers=4,
            virtual_pipeline_model_parallel_size=2,
        )
        state.set_virtual_pipeline_model_parallel_world_size(2)
        chunks = [build_by_program(arguments(), config, stage) for stage in range(2)]
        return [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]


def kinds_of_mlps(by: str) -> list[str]:
    """Class names of the MLPs of a model whose second of two layers has experts."""
    with megatron(Layout()):
        config = transformer_config(Variant(), num_moe_experts=4, moe_layer_freq=[0, 1])
        model = model_by_spec(config) if by == "spec" else build_by_program(arguments(), config)
        return [type(layer.mlp).__name__ for layer in model.decoder.layers]


def prediction_layers() -> tuple[list[str], list[str], int]:
    """Class names of attentions and norms of layers of multi-token prediction, and how many."""
    with megatron(Layout()):
        config = transformer_config(
            Variant(), mtp_num_layers=2, num_moe_experts=4, moe_layer_freq=[0, 1]
        )
        mtp = build_by_program(arguments(), config).mtp
        names = [type(m).__name__ for m in mtp.modules()]
        attentions = [n for n in names if n.endswith("SelfAttention")]
        return attentions, [n for n in names if n.endswith("Norm")], len(mtp.layers)


def model_by_spec(config: Any, spec: Any = None, **changes: Any) -> Any:
    """A model of ``--spec nsa_dist.adapters.megatron nsa_spec``, found as Megatron finds it."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    args = arguments(**changes)
    with program(args):
        if spec is None:
            spec = import_module(args.spec)
        # As from 0.19 on.
        if not isinstance(spec, ModuleSpec) and callable(spec):
            spec = spec(SimpleNamespace(transformer=config), vp_stage=None)
        return GPTModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            parallel_output=False,
        )


def rotary_frequencies(given: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of the builder's model with these arguments, and of Megatron's with the same options."""
    with megatron(Layout()):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        config = transformer_config(Variant())
        dense = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            rope_scaling=given["use_rope_scaling"],
            rope_scaling_factor=given["rope_scaling_factor"],
        )
        models: Any = (build_by_program(arguments(**given), config), dense)
        found, expected = (model.rotary_pos_emb.inv_freq.tolist() for model in models)
        return found, expected


def specs_agree(
    kind: str, layout: Layout, given: Mapping[str, Any] = MappingProxyType({})
) -> bool | str:
    """Whether a spec of either kind of release gives the logits of the block spec, or why it is
    refused.

    Args:
        given: more arguments of the program.
    """
    with megatron(layout):
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nsa_dist.adapters.megatron.program import LayerFromArguments, spec_of_stage

        spec = {"object": ModuleSpec(LayerFromArguments), "function": spec_of_stage}[kind]
        config = transformer_config(Variant(), layout)
        expected = build_model(config, Variant())
        draw_weights(expected)
        # Megatron's own last norm, that of a layer's spec, is float32.
        expected.decoder.final_layernorm.weight.data.fill_(1.0)
        try:
            found = model_by_spec(config, spec, **given)
        except ValueError as error:
            return str(error)
        return torch.equal(_logits(found, expected), _logits(expected, expected))


def refusal_in_a_stack() -> str:
    """The message with which a model of Mamba layers that is given the layer's spec is refused."""
    with megatron(Layout()):
        from megatron.core.models.mamba import MambaModel
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nsa_dist.adapters.megatron.program import LayerFromArguments

        try:
            with program(arguments()):
                MambaModel(
                    transformer_config(Variant()),
                    ModuleSpec(LayerFromArguments),
                    vocab_size=VOCABULARY,
                    max_sequence_length=LENGTH,
                )
        except ValueError as error:
            return str(error)
        return ""


def named_spec() -> tuple[bool, bool]:
    """Whether this release calls a spec, and whether what ``--spec`` names is called."""
    with megatron(Layout()):
        from megatron.core.package_info import MAJOR, MINOR
        from megatron.core.transformer.spec_utils import ModuleSpec, import_module

        spec = import_module(("nsa_dist.adapters.megatron", "nsa_spec"))
        return (MAJOR, MINOR) >= (0, 19), not isinstance(spec, ModuleSpec)


def layouts_by_arguments(layout: Layout) -> dict[str, bool]:
    """Whether a packed batch without a note of its layout is taken to be split as the program's
    arguments say, by the option that is on."""
    with megatron(layout):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        model = build_model(transformer_config(Variant(), layout), Variant())
        draw_weights(model)
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (1, LENGTH // layout.cp))
        bounds = torch.tensor([0, 24, 32, 64], dtype=torch.int32)  # They fit both layouts.

        def logits(packed: Any) -> Tensor:
            return model(tokens, tokens, None, packed_seq_params=packed)

        by_document = logits(make_packed_seq_params(bounds))
        as_stream = logits(make_packed_seq_params(bounds, layout="zigzag"))
        assert not torch.equal(by_document, as_stream)
        agree = {}
        for option, expected in (
            ("", by_document),
            ("sft", by_document),
            ("dataloader_inter_document_masking", as_stream),
        ):
            packed: Any = make_packed_seq_params(bounds)
            del packed.nsa_layout
            with program(arguments(**({option: True} if option else {}))):
                agree[option] = torch.equal(logits(packed), expected)
        return agree


def refusal_of_program(
    by: str, args: dict[str, Any], options: dict[str, Any], layout: Layout
) -> str:
    """The message with which a program with these arguments is refused."""
    with megatron(layout):
        from nsa_dist.adapters.megatron.program import spec_of_stage

        config = transformer_config(Variant(), layout)
        for name, value in options.items():
            setattr(config, name, value)
        given = arguments(**args)
        try:
            with program(given):
                if by == "builder":
                    build_by_program(given, config)
                else:
                    spec_of_stage(SimpleNamespace(transformer=config))
        except ValueError as error:
            return str(error)
        return ""


def undecayed(nsa: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names of parameters, and of those that Megatron's optimizer does not decay."""
    with megatron(Layout()):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from nsa_dist.adapters.megatron import nsa_config_overrides

        variant = Variant(replace(SMALL, **nsa), qk_layernorm=True, bias=True)
        config = transformer_config(variant)
        model = build_model(config, variant)
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        options = OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=0.0, params_dtype=torch.float64
        )
        adam = get_megatron_optimizer(
            options,
            [ddp],
            config_overrides=nsa_config_overrides(options),
            use_gloo_process_groups=False,
        )
        kept = {id(p) for g in adam.param_groups if g["wd_mult"] == 0 for p in g["params"]}
        named = dict(model.named_parameters())
        return set(named), {name for name, p in named.items() if id(p) in kept}
