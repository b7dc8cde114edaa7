"""Every family of models starts as the dense model, trains, saves, loads and generates.

What a family's attention has beyond the table is computed or refused.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from nsa_dist.adapters.huggingface import convert_to_nsa, from_pretrained
from nsa_dist.adapters.huggingface.families import DENSE, REASONS
from nsa_dist.adapters.huggingface.heads import HEADS
from nsa_dist.adapters.huggingface.models import FAMILIES
from tests.adapters.huggingface.recorded import record_graphs
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    ON_GPU,
    SMALL,
    left_padded,
    randomised,
    some_tokens,
)
from tests.distributed.layer_case import largest

BY_TYPE = {dense.config_class.model_type: dense for dense in DENSE}
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": SMALL.num_heads,
    "num_key_value_heads": SMALL.num_kv_heads,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MIXED: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED},
    "phi3": {},
    "olmo2": {},
    "olmo3": MIXED,
}
LAYERS = {"gemma3_text": [1], "olmo3": [1]}


def _dense(family: str, dense: Any = None, **options: Any) -> Any:
    dense = BY_TYPE[family] if dense is None else dense
    torch.manual_seed(0)
    values = COMMON | copy.deepcopy(OPTIONS[family]) | options
    return randomised(dense(dense.config_class(**values)).eval())


def _convert(model: Any, family: str, config: Any = SMALL) -> Any:
    return convert_to_nsa(model, config, LAYERS.get(family))


@pytest.mark.parametrize("family", sorted(OPTIONS.keys() - LAYERS.keys()))
def test_steps_of_a_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models whose layers are all sparse: one graph gives what a growing cache gives."""
    made = record_graphs(monkeypatch)
    model = _convert(_dense(family), family)
    prompt, new = some_tokens(2, 13), {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(prompt, cache_implementation="static", **new)
    assert len(made) == 1
    assert torch.equal(found, model.generate(prompt, **new))


def test_the_table_is_whole() -> None:
    assert OPTIONS.keys() == BY_TYPE.keys()
    assert set(FAMILIES) == set(DENSE)
    names = [made.__name__ for classes in FAMILIES.values() for made in classes]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", OPTIONS)
def test_family(family: str, tmp_path: Path) -> None:
    dense = _dense(family)
    covered = min(SMALL.window, SMALL.num_selected * SMALL.select_block)
    tokens = some_tokens(2, covered + 8)
    with torch.no_grad():
        expected = dense(tokens).logits
        model = _convert(dense, family)
        assert type(model) is FAMILIES[BY_TYPE[family]][0]
        error = (model(tokens).logits - expected).abs()
    assert largest(error[:, :covered]) <= 1e-3 * largest(expected)
    assert largest(error[:, covered:]) > 1e-2 * largest(expected)  # It is another attention.

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]

    model.eval().save_pretrained(tmp_path)
    assert model.config.model_type == f"nsa_{family}"
    with pytest.raises(KeyError, match=r"native_sparse_attention .*from_pretrained loads"):
        BY_TYPE[family].from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens).logits
        for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
            loaded = load(tmp_path)
            assert type(loaded) is type(model)
            assert torch.equal(loaded(tokens).logits, expected)
        found = loaded.generate(tokens, max_new_tokens=12, do_sample=False)
        whole = loaded(found[:, :-1], use_cache=False).logits[:, tokens.shape[1] - 1 :].argmax(-1)
    assert torch.equal(found[:, tokens.shape[1] :], whole)


@pytest.mark.parametrize("dense", HEADS, ids=lambda dense: dense.__name__)
def test_classifiers_of_all_families_start_as_the_dense_ones(dense: Any) -> None:
    family = dense.config_class.model_type
    model = _dense(family, dense)
    tokens = some_tokens(2, SMALL.window)
    with torch.no_grad():
        expected = model(tokens).logits
        found = _convert(model, family)(tokens).logits
    assert type(model) is HEADS[dense][0]
    assert largest(found - expected) <= 1e-3 * largest(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", OPTIONS)
def test_family_on_a_gpu(family: str) -> None:
    dense = _dense(family).cuda()
    tokens = some_tokens(2, SMALL.window).cuda()
    with torch.no_grad():
        expected = dense(tokens).logits
    model = _convert(dense, family, replace(SMALL, **ON_GPU)).train()
    out = model(tokens, labels=tokens)
    assert largest(out.logits.detach() - expected) <= 1e-3 * largest(expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", ["qwen2", "glm4_moe", "gemma3_text", "phi3", "olmo2"])
def test_independent_keys_start_as_the_dense_ones(family: str) -> None:
    """Of each kind of projection and norm: with biases, of heads, offset, fused, over heads."""
    dense = _dense(family)
    tokens = some_tokens(2, SMALL.window)
    with torch.no_grad():
        expected = dense(tokens).logits
        found = _convert(dense, family, INDEPENDENT)(tokens).logits
    assert largest(found - expected) <= 1e-3 * largest(expected)


def test_a_scale_of_the_model() -> None:
    dense = _dense("gemma3_text", query_pre_attn_scalar=24)
    tokens = some_tokens(1, SMALL.window)
    config = replace(SMALL, scale=24**-0.5)
    with torch.no_grad():
        expected = dense(tokens).logits
        found = _convert(dense, "gemma3_text", config)(tokens).logits
    assert largest(found - expected) <= 1e-3 * largest(expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_loss_that_balances_experts(family: str) -> None:
    """It leaves out padding, as in the dense model."""
    dense = _dense(family)
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (SMALL.window, 7)])
    options = {"attention_mask": mask, "labels": tokens, "output_router_logits": True}
    with torch.no_grad():
        expected = dense(tokens, **options)
        found = _convert(dense, family)(tokens, **options)
    assert abs(float(found.aux_loss - expected.aux_loss)) <= 1e-3 * float(expected.aux_loss)
    assert abs(float(found.loss - expected.loss)) <= 1e-3 * float(expected.loss)


def test_a_fused_projection_is_split_into_copies() -> None:
    dense = _dense("phi3")
    fused = dense.model.layers[0].self_attn.qkv_proj
    fused.weight.requires_grad_(False)
    expected = fused.weight.clone()
    attention = _convert(dense, "phi3").model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(torch.cat([part.weight for part in parts]), expected)
    assert not any(part.weight.requires_grad or part.training for part in parts)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    assert torch.equal(fused.weight, expected)


GUARDS: dict[str, tuple[str, dict[str, Any], Any]] = {
    r"sliding_window must be None .*, got 8": ("mistral", {"sliding_window": 8}, None),
    r"sliding_window must be None .*, got 9": ("mixtral", {"sliding_window": 9}, None),
    r"sliding_window must be None .*, got 7": ("phi3", {"sliding_window": 7}, None),
    r"sliding_window must be None .*, got 6": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 6},
        None,
    ),
    r"layer_types\[0\] must be 'full_attention' .*, got 'sliding_attention'": (
        "olmo3",
        {},
        None,
    ),
    r"residual_dropout must be 0\.0 .*, got 0\.1": ("seed_oss", {"residual_dropout": 0.1}, None),
    r"attention_dropout must be 0\.0 .*, got 0\.1": ("seed_oss", {"attention_dropout": 0.1}, None),
    r"attn_logit_softcapping must be None .*, got 30\.0": (
        "gemma3_text",
        {"attn_logit_softcapping": 30.0},
        [1],
    ),
    r"use_bidirectional_attention must be False .*, got True": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        [1],
    ),
    r"scale must be the model's, 0\.204\d+, got None": (
        "gemma3_text",
        {"query_pre_attn_scalar": 24},
        [1],
    ),
    r"rope_type must be one of .*, got 'dynamic'": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        [1],
    ),
    r"rope_type must be one of .*, got 'longrope'": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            }
        },
        None,
    ),
}


@pytest.mark.parametrize("message", GUARDS)
def test_what_the_table_cannot_say_is_refused(message: str) -> None:
    family, options, layers = GUARDS[message]
    model = _dense(family, **options)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"^{message}"):
        convert_to_nsa(model, SMALL, layers)
    assert [type(module) for module in model.modules()] == kinds


def test_weights_that_nobody_would_read_are_refused() -> None:
    """Such as sinks, should a later transformers give them to one of these families."""
    model = _dense("qwen2")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"^layers\[1\]\.self_attn must be .*, got 'weights sinks"):
        _convert(model, "qwen2")


@pytest.mark.parametrize(
    ("dense", "config"),
    [(GptOssForCausalLM, GptOssConfig), (Gemma2ForCausalLM, Gemma2Config)],
    ids=["sinks", "softcap"],
)
def test_other_families_say_why(dense: Any, config: Any) -> None:
    with torch.device("meta"):
        model = dense(config(**COMMON, head_dim=16))
    reason = re.escape(REASONS[dense.__name__])
    with pytest.raises(ValueError, match=rf"^model must be .*{reason}.*, got '{dense.__name__}'"):
        convert_to_nsa(model, SMALL)
