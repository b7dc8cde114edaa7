"""One layer or a small model: what building it refuses, how it starts, what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from nsa_dist import NativeSparseAttention, NSAConfig, RotaryConfig
from nsa_kernels.reference import ReferenceOptions, layer_reference
from tests.adapters.megatron.small_gpt import (
    HIDDEN,
    SMALL,
    VARIANTS,
    Layout,
    Variant,
    build_model,
    draw_weights,
    megatron,
    own_part,
    transformer_config,
    whole_name,
)

DOCUMENTS = (19, 3, 26)
OF_LATER_RELEASES = ("gtp_weight_remat_size",)
"""Options that the TransformerConfig of 0.16.1 lacks."""


def build_layer(config: Any, nsa: NSAConfig, **options: Any) -> nn.Module:
    from megatron.core.transformer.spec_utils import build_module

    from nsa_dist.adapters.megatron import get_gpt_layer_nsa_spec

    spec = get_gpt_layer_nsa_spec(nsa, **options).submodules.self_attention
    return build_module(spec, config=config, layer_number=1)


def refusal(
    layout: Layout, options: dict[str, Any], nsa: dict[str, Any], spec: dict[str, Any]
) -> str:
    """On every rank: the message with which building the layer is refused; empty when it is not.

    Options are set on a config that Megatron has accepted: some it would itself refuse here.
    """
    with megatron(layout):
        config = transformer_config(Variant(), layout)
        for name, value in options.items():
            assert hasattr(config, name) or name in OF_LATER_RELEASES, name
            setattr(config, name, value)
        try:
            build_layer(config, replace(SMALL, **nsa), **spec)
        except ValueError as error:
            return str(error)
        return ""


def refusal_of_modules(name: str) -> str:
    """The message for a spec with a module of TransformerEngine's."""
    with megatron(Layout()):
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

        from nsa_dist.adapters.megatron import get_gpt_layer_nsa_spec

        foreign = type("TELinear", (nn.Linear,), {})
        foreign.__module__ = "megatron.core.extensions.transformer_engine"
        layer = get_gpt_layer_nsa_spec(SMALL).submodules
        assert isinstance(layer, TransformerLayerSubmodules)
        spec = layer.self_attention
        setattr(spec.submodules, name, foreign)
        try:
            build_module(spec, config=transformer_config(Variant()), layer_number=1)
        except ValueError as error:
            return str(error)
        return ""


def refusal_of_call(option: str) -> str:
    """The message with which a call of a built layer is refused."""
    with megatron(Layout()):
        from megatron.core.packed_seq_params import PackedSeqParams

        mtp = 1 if option == "mtp_num_layers" else None
        layer = build_layer(transformer_config(Variant(mtp=mtp)), SMALL)
        packed: dict[str, Any] = {
            "qkv_format": {"qkv_format": "bshd"},
            "local_cp_size": {"qkv_format": "thd", "local_cp_size": 2},
            "cu_seqlens_q": {"qkv_format": "thd"},
            "cu_seqlens_q of two rows": {"qkv_format": "thd", "cu_seqlens_q": torch.zeros(2, 2)},
            "mtp_num_layers": {"qkv_format": "thd", "cu_seqlens_q": torch.tensor([[0, 8]])},
        }
        given: dict[str, Any] = {option: torch.zeros(1)}
        if option in packed:
            given = {"packed_seq_params": PackedSeqParams(**packed[option])}
        try:
            layer(torch.zeros(8, 1, HIDDEN, dtype=torch.float64), None, **given)
        except ValueError as error:
            return str(error)
        return ""


def refusals_of_masks(layout: Layout) -> dict[str, str]:
    """Messages with which masks are refused, by name; empty for those that are not.

    Masks are cut as Megatron's ``get_batch_on_this_cp_rank`` cuts them.
    """
    with megatron(layout):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        config = transformer_config(Variant(), layout)
        layer = build_layer(config, SMALL)
        length, cp = 16, layout.cp
        rank = layer.core_attention.context.rank
        causal = torch.ones(2, 1, length, length).tril() < 0.5
        documents = causal.clone()
        # The second row's second document begins at 12, which only some ranks' rows show.
        documents[1, :, 12:, :12] = True
        whole = {
            "causal": causal,
            "one for all rows": causal[:1],
            "documents": documents,
            "hides nothing": torch.zeros_like(causal),
            "float": causal.double(),
            "padding": causal[:, 0],
        }
        x = torch.randn(length // cp // layout.tp, 2, HIDDEN, dtype=torch.float64)
        found = {}
        for name, mask in whole.items():
            axis = mask.ndim - 2
            chunks = mask.chunk(2 * cp, axis)
            mask = torch.cat((chunks[rank], chunks[2 * cp - 1 - rank]), axis)
            for use in ("", ", again"):
                try:
                    layer(x, mask)
                    found[name + use] = ""
                except ValueError as error:
                    found[name + use] = str(error)
        try:
            bounds = torch.tensor([0, length], dtype=torch.int32)
            layer(x[:, :1], causal, packed_seq_params=make_packed_seq_params(bounds))
        except ValueError as error:
            found["packed"] = str(error)
        return found


def refusals_of_experts() -> dict[str, str]:
    """Messages for a model's layers whose MLPs are not the config's, by name."""
    with megatron(Layout()):
        from megatron.core.transformer.spec_utils import build_module

        from nsa_dist.adapters.megatron import (
            get_gpt_decoder_block_nsa_spec,
            get_gpt_layer_nsa_spec,
        )

        def build(layers: Any, **options: Any) -> str:
            config = transformer_config(Variant())
            for name, value in options.items():
                setattr(config, name, value)
            made = layers(config)
            try:
                for number, layer in enumerate(made, 1):
                    spec = layer.submodules.self_attention
                    build_module(spec, config=config, layer_number=number)
            except ValueError as error:
                return str(error)
            return ""

        def of_layer(**given: Any) -> Any:
            return lambda config: [get_gpt_layer_nsa_spec(SMALL, **given)] * config.num_layers

        def of_block(config: Any) -> Any:
            return get_gpt_decoder_block_nsa_spec(config, SMALL).layer_specs

        experts = {"num_experts": 4, "moe_grouped_gemm": False}
        return {
            "dense": build(of_layer()),
            "experts": build(of_layer(**experts), num_moe_experts=4),
            "every second": build(of_block, num_moe_experts=4, moe_layer_freq=2),
            "listed": build(of_block, num_moe_experts=4, moe_layer_freq=[0, 1]),
            "num_moe_experts": build(of_layer(), num_moe_experts=4),
            "num_moe_experts, None": build(of_layer(**experts)),
            "moe_layer_freq": build(of_layer(**experts), num_moe_experts=4, moe_layer_freq=2),
        }


def refusal_of_block(layout: Layout, layers: tuple[int, ...], apart: bool) -> str:
    """The message with which a block of unlike layers is refused."""
    with megatron(layout):
        config = transformer_config(Variant(), layout, hetereogenous_dist_checkpoint=apart)
        try:
            build_model(config, Variant(layers=layers))
        except ValueError as error:
            return str(error)
        return ""


def layer_kinds(layout: Layout, layers: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """Class names of this stage's attentions, and parameters without a gradient."""
    with megatron(layout):
        config = transformer_config(Variant(), layout, hetereogenous_dist_checkpoint=True)
        model = build_model(config, Variant(layers=layers))
        kinds = [type(layer.self_attention).__name__ for layer in model.decoder.layers]
        missing: list[str] = []
        if layout == Layout():
            tokens = torch.arange(24)[None]
            model(tokens, tokens, None).sum().backward()
            missing = [name for name, p in model.named_parameters() if p.grad is None]
        return kinds, missing


def specs_agree() -> bool:
    """Whether a model of the layer spec, the one-line swap, gives the block spec's logits."""
    with megatron(Layout()):
        from megatron.core.models.gpt.gpt_model import GPTModel

        from nsa_dist.adapters.megatron import get_gpt_layer_nsa_spec

        config = transformer_config(Variant())
        expected = build_model(config, Variant())
        swapped = GPTModel(
            config,
            get_gpt_layer_nsa_spec(SMALL, normalization="RMSNorm"),
            vocab_size=expected.vocab_size,
            max_sequence_length=expected.max_sequence_length,
            position_embedding_type="rope",
            parallel_output=False,
        )
        swapped.load_state_dict(expected.state_dict())
        tokens = torch.arange(40)[None]
        return torch.equal(*(model(tokens, tokens, None) for model in (swapped, expected)))


def _start(layout: Layout, variant: str, on_gpu: bool) -> nn.Module:
    """A new model, drawn on the host or where Megatron's GPU is."""
    config = transformer_config(VARIANTS[variant], layout, use_cpu_initialization=not on_gpu)
    if on_gpu:
        # Programs try fused kernels on tensors of the layout's shapes before they build a model.
        torch.rand(7 * layout.cp + 64 // layout.tp, device="cuda")
    return build_model(config, VARIANTS[variant])


def fresh_weights(variant: str, on_gpu: bool) -> dict[str, Tensor]:
    """What a model on one rank starts with."""
    with megatron(Layout()):
        model = _start(Layout(), variant, on_gpu)
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def differing_starts(
    layout: Layout, variant: str, on_gpu: bool, weights: dict[str, Tensor]
) -> list[str]:
    """Parameters that start otherwise on this layout than on one rank."""
    with megatron(layout):
        return [
            name
            for name, p in _start(layout, variant, on_gpu).named_parameters()
            if not torch.equal(p.cpu(), own_part(name, weights[whole_name(name)], p))
        ]


def starts(perform: bool) -> dict[str, tuple[float, float]]:
    """(least, largest) of each parameter of a layer whose weights are drawn as 0.5, of the last
    one as 0.25; with ``perform`` False nothing may draw."""
    with megatron(Layout()):

        def constant(value: float) -> Any:
            def fill(weight: Tensor) -> None:
                assert perform, "drawn though perform_initialization is False"
                nn.init.constant_(weight, value)

            return fill

        config = transformer_config(
            Variant(),
            init_method=constant(0.5),
            output_layer_init_method=constant(0.25),
            perform_initialization=perform,
            add_qkv_bias=True,
        )
        nsa = replace(SMALL, gate="mlp", gate_init=(1.0, 2.0, 3.0))
        layer = build_layer(config, nsa)
        return {n: (float(p.min()), float(p.max())) for n, p in layer.named_parameters()}


def as_ours(tensors: dict[str, Tensor], nsa: NSAConfig) -> dict[str, Tensor]:
    """Tensors of a layer's parameters, under the names and in the layout of our own layer."""
    heads, keys = nsa.heads_per_group, nsa.num_key_sets
    mixed = tensors["linear_qkv.weight"].unflatten(0, (nsa.num_kv_heads, -1, nsa.head_dim))
    q, k, v = mixed.split([heads, keys, nsa.num_value_sets], dim=1)
    ours = {
        "q_proj.weight": q.flatten(0, 2),
        "k_proj.weight": k.transpose(0, 1).flatten(0, 2),
        "v_proj.weight": v.transpose(0, 1).flatten(0, 2),
        "o_proj.weight": tensors["linear_proj.weight"],
    }
    for name, tensor in tensors.items():
        if not name.startswith("linear"):
            name = name.removeprefix("core_attention.").replace("_layernorm", "_norm")
            ours[name] = tensor
    return ours


Results = dict[str, Tensor]


def layer_results(variant: str, dtype: torch.dtype) -> tuple[Results, Results, Results]:
    """Output and every gradient of a layer on a packed batch: ours, the plain code's and the
    float64 oracle's, both of the latter with our choice of blocks."""
    chosen: list[Tensor] = []

    def with_choice(*args: Any, **kwargs: Any) -> Tensor:
        from nsa_dist import native_sparse_attention

        out, details = native_sparse_attention(*args, **kwargs, return_details=True)
        chosen.append(details.selected[0])
        return out

    with megatron(Layout()):
        from nsa_dist.adapters.megatron import attention, make_packed_seq_params

        nsa, qk_norm = VARIANTS[variant].nsa, VARIANTS[variant].qk_layernorm
        config = transformer_config(VARIANTS[variant], params_dtype=dtype, add_bias_linear=False)
        layer = build_layer(config, nsa, qk_layernorm=qk_norm)
        draw_weights(layer)
        torch.manual_seed(5)
        length = sum(DOCUMENTS)
        x = torch.randn(length, 1, HIDDEN).to(dtype).requires_grad_()
        grad = torch.randn(length, HIDDEN).to(dtype)
        bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
        with mock.patch.object(attention, "native_sparse_attention", with_choice):
            out, _ = layer(x, None, packed_seq_params=make_packed_seq_params(bounds))
        out.squeeze(1).backward(grad)
        weights = as_ours({n: p.detach() for n, p in layer.named_parameters()}, nsa)
        ours = as_ours({n: p.grad for n, p in layer.named_parameters()}, nsa)
        ours |= {"output": out.detach().squeeze(1), "input": x.grad.squeeze(1)}

        def reference(of: torch.dtype) -> Results:
            params = {n: p.to(of).requires_grad_() for n, p in weights.items()}
            given = x.detach().squeeze(1).to(of).requires_grad_()
            result = layer_reference(
                given,
                params,
                ReferenceOptions.from_config(nsa),
                norm_eps=config.layernorm_epsilon,
                cu_seqlens=bounds,
                selected=chosen[0],
            )
            result.output.backward(grad.to(of))
            grads = {
                n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()
            }
            return grads | {"output": result.output.detach(), "input": given.grad}

        return ours, reference(dtype), reference(torch.float64)


def padding_changes() -> bool:
    """Whether padding at documents' ends, told by Megatron's padded boundaries, changes any token
    before it."""
    with megatron(Layout()):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        layer = build_layer(transformer_config(Variant()), SMALL)
        draw_weights(layer)
        padding = 5
        lengths = torch.tensor(DOCUMENTS)
        bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
        padded = torch.tensor([0, *(lengths + padding)]).cumsum(0).int()
        real = torch.cat([torch.arange(n) + padded[i] for i, n in enumerate(DOCUMENTS)])
        x = torch.randn(int(padded[-1]), 1, HIDDEN, dtype=torch.float64)
        params = make_packed_seq_params(bounds)
        expected, _ = layer(x[real], None, packed_seq_params=params)
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = padded
        found, _ = layer(x, None, packed_seq_params=params)
        return not torch.allclose(found[real], expected, rtol=0, atol=1e-12)


def rows_of_boundaries(layout: Layout) -> bool:
    """Whether boundaries [1, documents + 1], as Megatron's loaders make them, give the bits of
    those without a batch, also padded ones."""
    with megatron(layout):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        model = build_model(transformer_config(Variant(), layout), Variant())
        draw_weights(model)
        tokens = torch.arange(64 // layout.cp)[None] % 48
        params = make_packed_seq_params(torch.tensor([0, 24, 32, 64], dtype=torch.int32))
        expected = model(tokens, tokens, None, packed_seq_params=params)
        row = params.cu_seqlens_q[None]
        params.cu_seqlens_q = params.cu_seqlens_kv = row
        found = [model(tokens, tokens, None, packed_seq_params=params)]
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = row
        found.append(model(tokens, tokens, None, packed_seq_params=params))
        return all(torch.equal(x, expected) for x in found)


def rotated_like_ours() -> tuple[float, float]:
    """(error, largest element) of a model's attention with Megatron's rotary against our layer with
    its own, on a packed batch in float64."""
    with megatron(Layout()):
        from nsa_dist.adapters.megatron import make_packed_seq_params

        config = transformer_config(Variant())
        model = build_model(config, Variant())
        draw_weights(model)
        layer = model.decoder.layers[0].self_attention
        ours = NativeSparseAttention(
            HIDDEN, SMALL, rotary=RotaryConfig(), backend="pytorch", dtype=torch.float64
        )
        ours.load_state_dict(as_ours({n: p.detach() for n, p in layer.named_parameters()}, SMALL))
        bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
        x = torch.randn(sum(DOCUMENTS), 1, HIDDEN, dtype=torch.float64)
        packed = make_packed_seq_params(bounds)
        angles = model.rotary_pos_emb(packed.max_seqlen_q, packed_seq=True)
        found, _ = layer(x, None, rotary_pos_emb=angles, packed_seq_params=packed)
        expected = ours(x.transpose(0, 1), cu_seqlens=bounds).transpose(0, 1)
        return float((found - expected).abs().max()), float(expected.abs().max())
