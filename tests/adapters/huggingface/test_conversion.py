"""A converted model is the dense one up to the length that its branches cover, and a batch is read
as transformers reads it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_kernels import get_backend
from nsa_kernels.compressors import COMPRESSORS, parameter_names

pytest.importorskip("transformers")

import itertools

from nsa_dist.adapters.huggingface import NSAAttention, convert_to_nsa
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    cast,
    dense_model,
    left_padded,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Rewritten, catches

CASES: dict[str, tuple[str, NSAConfig, dict[str, Any]]] = {
    "llama-llama3-tied": ("llama", SMALL, {"rope": "llama3", "tie_word_embeddings": True}),
    "llama-yarn-bias": ("llama", INDEPENDENT, {"rope": "yarn", "attention_bias": True}),
    "llama-linear-mha-like": (
        "llama",
        replace(SMALL, num_kv_heads=1, compress="linear", gate="mlp"),
        {"rope": "linear", "num_key_value_heads": 1},
    ),
    "qwen3-yarn-tied": ("qwen3", INDEPENDENT, {"rope": "yarn", "tie_word_embeddings": True}),
    "qwen3-bias-static": (
        "qwen3",
        replace(SMALL, gate="static", compress="conv1d", compress_per_head=True),
        {"attention_bias": True},
    ),
    "qwen3-without-compressed": (
        "qwen3",
        replace(INDEPENDENT, branches=("selected", "window"), compress="attention_pool"),
        {"rope": "llama3"},
    ),
    # In those above the window covers less than the chosen blocks do.
    "llama-blocks-before-window": ("llama", replace(SMALL, window=32), {}),
    "qwen3-blocks-before-window": ("qwen3", replace(INDEPENDENT, window=32), {}),
}


def _logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@catches(
    "a conversion that does not start as the dense model",
    "the compressed branch's gate starts open",
    Rewritten(
        "nsa_dist.adapters.huggingface:GATE_INIT",
        "GATE_INIT = $VALUE",
        "GATE_INIT = (0.0, 0.0, 0.0)",
    ),
    case="qwen3-yarn-tied",
)
@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_dense_model(case: str) -> None:
    family, config, options = CASES[case]
    covered = min(config.window, config.num_selected * config.select_block)
    dense = dense_model(family, **options)
    converted = convert_to_nsa(copy.deepcopy(dense), config)
    for length in (covered - 1, covered, covered + 1):
        tokens = some_tokens(2, length)
        expected = _logits(dense, tokens)
        for use_cache in (False, True):
            error = (_logits(converted, tokens, use_cache=use_cache) - expected).abs()
            assert largest(error[:, :covered]) <= 1e-3 * largest(expected)
            # The first token past that length misses a key, in its window or of a whole block.
            assert (error[:, covered:] > 1e-2 * largest(expected)).any(-1).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_weights_are_kept(family: str) -> None:
    dense = dense_model(family, tie_word_embeddings=True, attention_bias=True)
    kept = {name: (x, x.clone()) for name, x in dense.named_parameters()}
    config = dense.config
    layers, rotary = list(dense.model.layers), dense.model.rotary_emb
    converted = convert_to_nsa(dense, SMALL)
    assert converted is dense
    assert type(config).__name__ in ("LlamaConfig", "Qwen3Config")
    assert not hasattr(config, "nsa")
    assert list(converted.model.layers) == layers
    assert converted.model.rotary_emb is rotary
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    found = dict(converted.named_parameters())
    for name, (parameter, value) in kept.items():
        assert found[name] is parameter, name
        assert torch.equal(parameter, value), name
    new = set(found) - set(kept)
    assert new == {x for x in found if ".gate." in x or "_compressor." in x}
    assert len(new) > 0


def test_independent_sets_start_alike() -> None:
    dense = dense_model("qwen3", attention_bias=True)
    expected = copy.deepcopy(dense.model.layers[1].self_attn)
    attention = convert_to_nsa(dense, INDEPENDENT).model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            sets = getattr(getattr(attention, name), kind).chunk(3)
            assert all(torch.equal(x, getattr(getattr(expected, name), kind)) for x in sets)
    assert attention.k_norm.weight.shape == (3, SMALL.head_dim)
    assert all(torch.equal(row, expected.k_norm.weight) for row in attention.k_norm.weight)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if parameter_names(kind)])
def test_compressors_start_as_means(kind: Any, per_head: bool) -> None:
    config = replace(SMALL, compress=kind, compress_per_head=per_head)
    if kind == "mlp":
        config = replace(config, compress_hidden=2 * SMALL.head_dim + 3)
    model = convert_to_nsa(dense_model("llama", dtype=torch.float64), config)
    attention = model.model.layers[0].self_attn
    x = torch.randn(20, SMALL.num_kv_heads, SMALL.head_dim, dtype=torch.float64)
    rows = torch.tensor([0, 2, 16])
    for compressor in (attention.k_compressor, attention.v_compressor):
        found = compressor(x, rows, get_backend("pytorch")).detach()
        expected = torch.stack([x[i : i + SMALL.compress_block].mean(0) for i in rows])
        assert largest(found - expected) <= 1e-14 * largest(expected)


def test_gates_start_as_constants() -> None:
    for gate in ("linear", "mlp", "static"):
        config = replace(SMALL, gate=gate)
        model = convert_to_nsa(dense_model("llama"), config)
        gates = model.model.layers[0].self_attn.gate(torch.randn(2, 5, 48))
        expected = torch.tensor([-10.0, 0.0, 0.0]).sigmoid().expand_as(gates)
        assert torch.equal(gates, expected)
        assert model.nsa_config.gate_init == (-10.0, 0.0, 0.0)


def test_chosen_layers_only() -> None:
    model = sparse_model("qwen3", layers=[1])
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert kinds[1] is NSAAttention
    assert kinds[0].__name__ == "Qwen3Attention"
    assert model.config.nsa_layers == [1]


@pytest.mark.parametrize("layers", [None, [0]], ids=["all", "hybrid"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["whole", "cache"])
def test_padding_changes_nothing(layers: Any, use_cache: bool) -> None:
    """Each row alone, and among others with padding before or behind it."""
    model = sparse_model("llama", layers=layers, dtype=torch.float64)
    rows = [some_tokens(1, n, seed=n)[0] for n in (3, 41, 29, 1)]
    tokens, mask = left_padded(rows)
    found = _logits(model, tokens, attention_mask=mask, use_cache=use_cache)
    behind = _logits(model, tokens.flip(1), attention_mask=mask.flip(1), use_cache=use_cache)
    backward = left_padded([x.flip(0) for x in rows])[0]
    for b, row in enumerate(rows):
        alone = _logits(model, row[None], use_cache=False)[0]
        assert largest(found[b, -len(row) :] - alone) <= 1e-12 * largest(alone)
        flipped = _logits(model, backward[b, -len(row) :][None], use_cache=False)[0]
        assert largest(behind[b, : len(row)] - flipped) <= 1e-12 * largest(flipped)


@pytest.mark.parametrize("layers", [None, [0]], ids=["all", "hybrid"])
@pytest.mark.parametrize(
    "told_by", ["cu_seqlens", "cu_seq_lens_q", "both", "position_ids", "position_ids-and-ones"]
)
def test_packed_documents(told_by: str, layers: Any) -> None:
    model = sparse_model("qwen3", layers=layers, dtype=torch.float64)
    lengths = (37, 1, 20)
    tokens = some_tokens(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options: dict[str, Any] = {
        "cu_seqlens": {"cu_seqlens": bounds},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone()},
        "both": {
            "cu_seqlens": bounds,
            "cu_seq_lens_q": bounds.long(),
            "cu_seq_lens_k": bounds.clone(),
        },
        "position_ids": {"position_ids": positions},
        "position_ids-and-ones": {
            "position_ids": positions,
            "attention_mask": torch.ones_like(positions),
        },
    }[told_by]
    found = _logits(model, tokens, **options)[0]
    for start, end in itertools.pairwise(bounds):
        alone = _logits(model, tokens[:, start:end])[0]
        assert largest(found[start:end] - alone) <= 1e-12 * largest(alone)


def test_packed_rows_of_a_batch() -> None:
    """Positions tell the documents of several rows, as for the dense model."""
    model = sparse_model("llama", dtype=torch.float64)
    tokens = some_tokens(2, 50)
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((20, 30), (50,))]
    )
    found = _logits(model, tokens, position_ids=positions)
    for row, start, end in ((0, 0, 20), (0, 20, 50), (1, 0, 50)):
        alone = _logits(model, tokens[row : row + 1, start:end])[0]
        assert largest(found[row, start:end] - alone) <= 1e-12 * largest(alone)


def _results(dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """Loss, logits and gradients of bfloat16 weights, on tokens whose blocks are all chosen."""
    model = sparse_model("qwen3", dtype=torch.float64).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    cast(model, dtype)
    tokens = some_tokens(2, SMALL.num_selected * SMALL.select_block)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(tokens, labels=tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    # A linear function of the logits: its gradient rounds nothing in the dtype under test.
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.logits.shape, generator=generator).bfloat16()
    out.logits.backward(weight.to(out.logits))
    # transformers takes its logits to float32 for the loss, whatever they are.
    loss = out.loss[None].to(torch.float64 if dtype == torch.float64 else torch.float32)
    results = {"loss": loss, "logits": out.logits.flatten(0, 1)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
        results[name] = parameter.grad
    return results


def test_autocast_and_hidden_states() -> None:
    """float32 weights under autocast, beside the same weights and all else in bfloat16."""
    ours = _results(torch.float32, True)
    plain, x64 = _results(torch.bfloat16, False), _results(torch.float64, False)
    assert ours["logits"].dtype == torch.bfloat16
    for name in x64:
        assert_2x(ours[name], plain[name], x64[name], torch.bfloat16, name)


def test_embeddings_instead_of_tokens() -> None:
    model = sparse_model("llama")
    tokens = some_tokens(2, 30)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(_logits(model, None, inputs_embeds=embeddings), _logits(model, tokens))
