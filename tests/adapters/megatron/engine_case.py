"""Layers of TransformerEngine's modules, for which ``fake_engine`` stands, beside Megatron's own.

Functions here run on ranks (``tests.distributed.ranks``) that have imported no Megatron before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.adapters.megatron import fake_engine
from tests.adapters.megatron.layer_case import build_layer
from tests.adapters.megatron.program_case import arguments, build_by_program, model_by_spec
from tests.adapters.megatron.small_gpt import (
    HIDDEN,
    LENGTH,
    SMALL,
    VARIANTS,
    VOCABULARY,
    Case,
    Layout,
    Run,
    Variant,
    build_model,
    draw_weights,
    megatron,
    transformer_config,
    write_weights,
)
from tests.distributed.layer_case import largest

IN_8_BITS = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


@contextmanager
def with_engine(layout: Layout) -> Iterator[None]:
    fake_engine.install()
    with megatron(layout):
        yield


def own_name(name: str) -> str:
    """Megatron's name of a parameter whose norm TransformerEngine fuses with a linear layer."""
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


@torch.no_grad()
def _copy(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[own_name(name)])


def _marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What Megatron reads of each parameter, by Megatron's own name: shape, split, and whether
    its gradient is summed over tensor parallel ranks."""
    return {
        own_name(name): (
            p.shape,
            getattr(p, "tensor_model_parallel", False),
            getattr(p, "partition_dim", -1) if getattr(p, "tensor_model_parallel", False) else -1,
            bool(getattr(p, "sequence_parallel", False)),
        )
        for name, p in model.named_parameters()
    }


def engine_agrees(case: Case, options: dict[str, Any]) -> dict[str, float]:
    """The error of the loss and of every gradient after Megatron's own sums, relative to the
    largest, of a model of TransformerEngine's modules against one of Megatron's.

    Args:
        options: of the TransformerConfig of the former.
    """
    with with_engine(case.layout):
        own = Run(case, None)
        engine = Run(case, None, engine=True, **options)
        _copy(engine.model, {n: p.detach() for n, p in own.model.named_parameters()})
        assert _marks(engine.model) == _marks(own.model)
        fake_engine.State.linears_in_8_bits.clear()
        expected, found = own.step(), engine.step()
        errors = {"loss": float((found - expected).abs() / expected.abs())}
        for name, grad in engine.grads().items():
            whole = own.grads()[own_name(name)]
            errors[name] = largest(grad - whole) / (largest(whole) or 1.0)
        return errors


def kinds_in_8_bits(recompute: bool) -> tuple[set[str], set[str], float]:
    """Of a forward with 8-bit linear layers: names of those that ran in 8 bits, dtypes that the
    attention was given, and the error of the gradients with a recomputed norm."""
    with with_engine(Layout()):
        from nsa_dist.adapters.megatron import attention

        seen: set[str] = set()
        plain = attention.native_sparse_attention

        def watched(q: Tensor, k: Any, v: Any, gates: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.update(str(x.dtype) for x in (q, *k.values(), *v.values()))
            return plain(q, k, v, gates, *args, **kwargs)

        case = Case("independent-mlp")
        options: dict[str, Any] = dict(IN_8_BITS)
        if recompute:
            options |= {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
        fake_engine.State.linears_in_8_bits.clear()
        with mock.patch.object(attention, "native_sparse_attention", watched):
            run = Run(case, None, engine=True, **options)
            run.step()
        named = {id(m): name for name, m in run.model.named_modules()}
        ran = {named[id(m)] for m in fake_engine.State.linears_in_8_bits}
        plainly = Run(case, None, engine=True)
        _copy(plainly.model, {own_name(n): p for n, p in run.model.named_parameters()})
        plainly.step()
        grads = run.grads()
        error = max(largest(g - grads[n]) / largest(g) for n, g in plainly.grads().items())
        for layer in run.model.decoder.layers:
            assert layer.self_attention.linear_qkv.save_original_input is recompute
        return ran, seen, error


def graphs_without_attention(case: Case) -> bool:
    """Whether a layer whose MLP alone is a CUDA graph, for which a function stands, gives the bits
    of one without graphs, with no attention in the graph."""
    with with_engine(case.layout):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        options = {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["mlp"]}
        layer = Run(case, None, engine=True, **options).model.decoder.layers[0]
        attention = layer.self_attention
        x = torch.randn(64 // case.layout.cp, 1, HIDDEN, dtype=torch.float64)
        packed = None
        if case.packed:
            packed = make_packed_seq_params(torch.tensor([0, 24, 64], dtype=torch.int32))
        expected, _ = layer.forward(x, None, packed_seq_params=packed)

        def graph(hidden: Tensor, **_: Any) -> Any:
            with mock.patch.object(attention, "forward", side_effect=AssertionError):
                return layer._te_cuda_graph_capture(hidden)

        layer.cuda_graphs.append(graph)
        found, *_ = layer._te_cuda_graph_replay(x, attention_mask=None, packed_seq_params=packed)
        return torch.equal(found, expected)


def modules_of_a_layer(experts: bool) -> dict[str, str]:
    """Class names of what a layer is made of, and of the last norm."""
    with with_engine(Layout()):
        changes = {"num_moe_experts": 4, "moe_grouped_gemm": False} if experts else {}
        config = transformer_config(Variant(qk_layernorm=True), **changes)
        model: Any = build_model(config, Variant(qk_layernorm=True), engine=True)
        layer = model.decoder.layers[0]
        inner = layer.self_attention
        parts = {
            "input_layernorm": layer.input_layernorm,
            "linear_qkv": inner.linear_qkv,
            "q_layernorm": inner.q_layernorm,
            "k_layernorm": inner.k_layernorm,
            "linear_proj": inner.linear_proj,
            "pre_mlp_layernorm": layer.pre_mlp_layernorm,
            "mlp": layer.mlp,
            "final_layernorm": model.decoder.final_layernorm,
        }
        if not experts:
            parts["linear_fc1"] = layer.mlp.linear_fc1
        return {name: type(part).__name__ for name, part in parts.items()}


def _saved(model: Any) -> dict[str, Any]:
    """What of a model's tensors is saved, and where."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    saved = [x for x in nested_values(model.sharded_state_dict()) if isinstance(x, ShardedTensor)]
    return {x.key: (x.global_shape, x.global_offset, x.replica_id) for x in saved}


def keys_of_kinds(layout: Layout, variant: str) -> tuple[set[str], set[str]]:
    """Keys of checkpoints: those in which a model of TransformerEngine's modules differs from one
    of Megatron's own, and those that a dense model of TransformerEngine's has otherwise or not."""
    with with_engine(layout):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        kind = VARIANTS[variant]
        config = transformer_config(kind, layout)
        own, engine = (_saved(build_model(config, kind, x)) for x in (False, True))
        dense = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=True),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        of_dense = _saved(dense)
        assert of_dense.keys() <= engine.keys()
        return (
            {name for name in own.keys() | engine.keys() if own.get(name) != engine.get(name)},
            {name for name, where in engine.items() if of_dense.get(name) != where},
        )


def save_engine(case: Case, folder: str, engine: bool) -> dict[str, Tensor]:
    """On every rank: write a model; its weights on this rank, by Megatron's own names."""
    with with_engine(case.layout):
        run = Run(case, None, engine=engine)
        write_weights(run.model, folder)
        return {own_name(n): p.detach().clone() for n, p in run.model.named_parameters()}


def load_engine(case: Case, folder: str, engine: bool, saved: list[dict[str, Tensor]]) -> list[str]:
    """On every rank: read them into a model of the other kind; names of the weights that differ.

    Args:
        saved: weights that each rank has written.
    """
    with with_engine(case.layout):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling

        weights = saved[torch.distributed.get_rank()]
        run = Run(case, None, engine=engine)
        for parameter in run.model.parameters():
            parameter.data.fill_(float("nan"))
        # As Megatron reads by default; layers of Megatron's own have no scales to read.
        state = dist_checkpointing.load(
            run.model.sharded_state_dict(), folder, strict=StrictHandling.LOG_ALL
        )
        run.model.load_state_dict(state, strict=False)
        return [
            name
            for name, p in run.model.named_parameters()
            if not torch.equal(p, weights[own_name(name)])
        ]


def programs_agree(by: str) -> bool:
    """Whether ``--transformer-impl transformer_engine`` makes the block spec's model."""
    with with_engine(Layout()):
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nsa_dist.adapters.megatron.program import LayerFromArguments, spec_of_stage

        config = transformer_config(Variant())
        args = arguments(transformer_impl="transformer_engine")
        if by == "builder":
            found = build_by_program(args, config)
        else:
            spec = {"object": ModuleSpec(LayerFromArguments), "function": spec_of_stage}[by]
            found = model_by_spec(config, spec, transformer_impl="transformer_engine")
        expected = build_model(config, Variant(), engine=True)
        draw_weights(expected)
        found.load_state_dict(expected.state_dict())
        tokens = torch.arange(40)[None] % VOCABULARY
        return torch.equal(*(x(tokens, tokens, None) for x in (found, expected)))


def predicting_parts() -> list[str]:
    """Class names of attentions and of norms of layers that predict more tokens."""
    with with_engine(Layout()):
        args = arguments(transformer_impl="transformer_engine")
        mtp = build_by_program(args, transformer_config(Variant(), mtp_num_layers=1)).mtp
        names = [type(m).__name__ for m in mtp.modules()]
        return [n for n in names if n.endswith(("Norm", "SelfAttention"))]


def refusals_with_engine(layout: Layout) -> dict[str, str]:
    """Messages for what TransformerEngine's modules do not go with, by name."""
    with with_engine(layout):
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
        from megatron.core.transformer.spec_utils import build_module

        from nsa_dist.adapters.megatron import (
            get_gpt_decoder_block_nsa_spec,
            get_gpt_layer_nsa_spec,
        )

        def message(call: Any) -> str:
            try:
                call()
            except ValueError as error:
                return str(error)
            return ""

        def fused() -> None:
            spec: Any = get_gpt_layer_nsa_spec(SMALL, use_transformer_engine=True)
            inner = spec.submodules.self_attention
            inner.submodules.linear_qkv = TELayerNormColumnParallelLinear
            build_module(inner, config=config, layer_number=1)

        config = transformer_config(Variant(), layout, hetereogenous_dist_checkpoint=True)
        in_8_bits = replace(config, **IN_8_BITS)

        def with_graphs(scope: list[str]) -> str:
            options: dict[str, Any] = {"cuda_graph_impl": "transformer_engine"}
            graphs = replace(config, **options, cuda_graph_scope=scope)
            return message(lambda: build_layer(graphs, SMALL, use_transformer_engine=True))

        block: dict[str, Any] = {"use_transformer_engine": True, "layers": (1, 0)}
        return {
            "fused": message(fused),
            "fp8 of Megatron's": message(lambda: build_layer(in_8_bits, SMALL)),
            "fp8": message(lambda: build_layer(in_8_bits, SMALL, use_transformer_engine=True)),
            "graphs of all": with_graphs([]),
            "graphs of attention": with_graphs(["attn", "mlp"]),
            "dense": message(lambda: get_gpt_decoder_block_nsa_spec(config, SMALL, **block)),
        }
