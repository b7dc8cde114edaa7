"""What transformers can ask for and the attention cannot do is refused by name."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    CompileConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForQuestionAnswering,
    StaticCache,
)

from nsa_dist import NSAConfig
from nsa_dist.adapters.huggingface import checks, convert, convert_to_nsa, models
from nsa_dist.adapters.huggingface.attention import ROTARY
from nsa_dist.adapters.huggingface.batch import check_positions_count_on
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    dense_model,
    some_tokens,
    sparse_model,
)

TINY = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def _refusal(call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert " must " in message and ", got " in message, message
    return message


CONFIGS: dict[str, dict[str, Any]] = {
    "NSAConfig.num_heads must be 4 .*, got 8": {"num_heads": 8},
    "NSAConfig.num_kv_heads must be 2 .*, got 4": {"num_kv_heads": 4},
    "NSAConfig.head_dim must be 16 .*, got 8": {"head_dim": 8},
    "NSAConfig.v_head_dim must be 16 .*, got 8": {"v_head_dim": 8},
    "scale must be None, .*, got 0.5": {"scale": 0.5},
    "compress must be .*built-in.*, got 'custom'": {"compress": "custom"},
    "compress_pre_rope must be False .*, got True": {"compress_pre_rope": True},
    r"branches must be .*'window'.*, got \('selected',\)": {"branches": ("selected",)},
    r"branches must be .*'selected'.*, got \('compressed', 'window'\)": {
        "branches": ("compressed", "window")
    },
    "compress_hidden must be None or at least .*, got 31": {"compress_hidden": 31},
    r"NSAConfig.gate_init must be .*, got \(1.0, 0.0, 0.0\)": {"gate_init": (1.0, 0.0, 0.0)},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_configs(message: str) -> None:
    model = dense_model("llama")
    config = replace(SMALL, **CONFIGS[message])
    assert re.match(message, _refusal(lambda: convert_to_nsa(model, config)))
    # And the model is as it was.
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers", []),
        ("layers", [0, 2]),
        ("layers", [0, 0]),
        ("layers", [-1]),
        ("layers", [True]),
        ("layers", 1),
        ("gate_init", None),
        ("gate_init", 0.0),
        ("gate_init", (0.0, 0.0)),
        ("gate_init", "123"),
        ("layout", "striped"),
        ("group", "cp"),
        ("backend", "cuda"),
    ],
)
def test_options(option: str, value: Any) -> None:
    message = _refusal(lambda: convert_to_nsa(dense_model("qwen3"), SMALL, **{option: value}))
    assert message.startswith(f"{option} must be "), message
    assert message.endswith(f", got {value!r}"), message


MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "attention_dropout must be 0.0 .*, got 0.1": ("llama", {"attention_dropout": 0.1}, None),
    "rope_type must be one of .*, got 'dynamic'": (
        "llama",
        {},
        lambda config: config.rope_parameters.update(rope_type="dynamic", factor=2.0),
    ),
    "quantization_config must be None .*, got {'quant_method': 'gptq'}": (
        "llama",
        {},
        lambda config: setattr(config, "quantization_config", {"quant_method": "gptq"}),
    ),
    "output_attentions must be False .*, got True": (
        "llama",
        {"attn_implementation": "eager", "output_attentions": True},
        None,
    ),
    r"layer_types\[1\] must be 'full_attention' .*, got 'sliding_attention'": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        None,
    ),
}


@pytest.mark.parametrize("message", MODELS)
def test_models(message: str) -> None:
    family, options, change = MODELS[message]
    model = dense_model(family, **options)
    if change is not None:
        change(model.config)
    assert re.match(message, _refusal(lambda: convert_to_nsa(model, SMALL)))


def test_full_attention_layers_beside_sliding_ones() -> None:
    options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = sparse_model("qwen3", layers=[0], dtype=torch.float64, **options)
    tokens = some_tokens(1, 40)
    with torch.no_grad():
        found = model.generate(tokens, max_new_tokens=20, do_sample=False)
        whole = model(found[:, :-1], use_cache=False).logits[:, 39:].argmax(-1)
    assert torch.equal(found[:, 40:], whole)


def test_other_models() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    answers = LlamaForQuestionAnswering(LlamaConfig(**TINY))
    for model, name in (
        (gpt2, "GPT2LMHeadModel"),
        (answers, "LlamaForQuestionAnswering"),
        (sparse_model("llama"), "NSALlamaForCausalLM"),
        (nn.Linear(2, 2), "Linear"),
    ):
        message = _refusal(lambda model=model: convert_to_nsa(model, SMALL))
        assert message.startswith("model must be ") and message.endswith(f", got '{name}'")
        assert "LlamaForCausalLM, Qwen3ForCausalLM" in message
    config: Any = {"num_heads": 4}
    assert "config must be an NSAConfig, got" in _refusal(
        lambda: convert_to_nsa(dense_model("llama"), config)
    )


class _Wrapped(nn.Linear):
    """As of an adapter or a quantiser."""


def test_modules_that_were_replaced() -> None:
    model = dense_model("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = _Wrapped(48, 32, bias=False)
    message = _refusal(lambda: convert_to_nsa(model, SMALL))
    assert re.search(r"layers\[1\]\.self_attn\.v_proj must be .*, got '_Wrapped'", message)
    model = dense_model("llama")
    model.model.layers[0].self_attn = nn.Identity()
    message = _refusal(lambda: convert_to_nsa(model, SMALL))
    assert re.search(r"layers\[0\]\.self_attn must be one of .*, got 'Identity'", message)
    with torch.device("meta"):
        model = type(model)(copy.deepcopy(model.config))
    message = _refusal(lambda: convert_to_nsa(model, SMALL))
    assert re.search(r"device must be .*, got \['meta'\]", message)


def test_rotary_functions_that_were_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Liger before the adapter is imported, whose function takes heads in another place."""
    model = dense_model("llama")
    table = {**ROTARY, type(model.model.layers[0].self_attn): _refusal}
    monkeypatch.setattr("nsa_dist.adapters.huggingface.attention.ROTARY", table)
    seen = _state(model)
    message = _refusal(lambda: convert_to_nsa(model, SMALL))
    assert message.startswith("apply_rotary_pos_emb must be transformers' own"), message
    assert message.endswith(f", got one of {__name__}")
    assert _state(model) == seen


class _Quantised(torch.Tensor):
    """As torchao's weights, which keep torch.nn.Linear and call themselves floating."""


def _set_weight(make: Any) -> Any:
    def change(model: Any, index: int, name: str) -> None:
        *path, leaf = name.split(".")
        module = model.model.layers[index].self_attn.get_submodule(".".join(path))
        weight = getattr(module, leaf).detach().clone()
        delattr(module, leaf)
        setattr(module, leaf, make(weight))

    return change


WEIGHTS: dict[str, tuple[str, Any]] = {
    "a _Quantised": ("k_proj.weight", lambda x: nn.Parameter(x.as_subclass(_Quantised))),
    "an? _Quantised": ("v_proj.bias", lambda x: nn.Parameter(x.as_subclass(_Quantised))),
    "a Tensor": ("o_proj.weight", lambda x: x),  # As pruning and FlatParameters leave it.
    "torch.float8_e4m3fn": (
        "q_proj.weight",
        lambda x: nn.Parameter(x.to(torch.float8_e4m3fn), requires_grad=False),
    ),
    "torch.int8": (
        "q_proj.weight",
        lambda x: nn.Parameter(x.to(torch.int8), requires_grad=False),
    ),
    r"shape \(0,\)": ("q_norm.weight", lambda x: nn.Parameter(x[:0])),
    r"shape \(1536,\)": ("k_proj.weight", lambda x: nn.Parameter(x.flatten())),
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_are_cut_or_subclassed(message: str) -> None:
    """In the last layer, and with independent K, V, where weights are copied."""
    name, make = WEIGHTS[message]
    model = dense_model("qwen3", attention_bias=True)
    _set_weight(make)(model, 1, name)
    seen = _state(model)
    found = _refusal(lambda: convert_to_nsa(model, INDEPENDENT))
    option = re.escape(f"layers[1].self_attn.{name}")
    assert re.match(rf"{option} must be .*, got {message}$", found), found
    assert _state(model) == seen


def _state(model: Any) -> dict[str, Any]:
    """What a conversion could change of a model."""
    return {
        "class": type(model),
        "config": (id(model.config), repr(model.config)),
        "modules": [(name, id(x), x.training) for name, x in model.named_modules()],
        "configs": [id(getattr(x, "config", None)) for x in model.modules()],
        "parameters": [(n, id(x), x.requires_grad) for n, x in model.named_parameters()],
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("where", ["NSAAttention", "start_from_dense", "write_config"])
def test_a_failure_in_the_last_layer_changes_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = models if where == "NSAAttention" else convert
    real, calls = getattr(module, where), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if where == "write_config" or len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(module, where, failing)
    model = dense_model("qwen3", attention_bias=True).train()
    tokens, seen = some_tokens(1, 40), _state(model)
    expected = model(tokens).logits
    with pytest.raises(RuntimeError, match="out of memory"):
        convert_to_nsa(model, INDEPENDENT)
    assert calls
    assert _state(model) == seen
    assert torch.equal(model(tokens).logits, expected)
    monkeypatch.undo()
    assert convert_to_nsa(model, INDEPENDENT)(tokens).logits.isfinite().all()


def test_calls() -> None:
    model = sparse_model("llama")
    tokens = some_tokens(2, 12)
    full = DynamicCache()
    dense_model("llama")(tokens, past_key_values=full)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    one = {"input_ids": tokens[:1]}
    hole = torch.ones(2, 12, dtype=torch.int64)
    hole[1, 4] = 0
    ours = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=ours)
    static = StaticCache(config=model.config, max_cache_len=32)
    others = torch.tensor([0, 7, 12], dtype=torch.int32)
    anew = torch.cat([torch.arange(n) for n in (5, 7)])[None]
    # Row 1 has four columns of padding, and starts anew at the last of them too.
    padding = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    padded = torch.cat([torch.arange(n) for n in (12, 3, 5, 4)]).view(2, 12)
    calls: dict[str, dict[str, Any]] = {
        r"attention_mask must be .*, got padding between tokens \(row 1\)": {
            "attention_mask": hole
        },
        r"attention_mask must be .*, got torch.float32 of shape \(2, 1, 12, 12\)": {
            "attention_mask": torch.zeros(2, 1, 12, 12)
        },
        r"attention_mask must be .*, got torch.int64 of shape \(2, 12\)": {
            "attention_mask": hole,
            "past_key_values": copy.deepcopy(ours),
        },
        r"attention_mask must be .*, got rows that start at \[3, 0\]": {
            "attention_mask": (torch.arange(24) >= torch.tensor([[3], [0]])).long(),
            "past_key_values": copy.deepcopy(ours),
        },
        "attention_mask must be .*, got a dict": {"attention_mask": {"full_attention": None}},
        r"attention_mask must be None or all ones with packed .*, got zeros in torch.int64 of": {
            **one,
            "attention_mask": hole[1:],
            "cu_seqlens": bounds,
        },
        r"attention_mask must be None or of shape \(1, 12\) with packed .*, got torch.bool of": {
            **one,
            "attention_mask": torch.ones(1, 11, dtype=torch.bool),
            "cu_seqlens": bounds,
        },
        "cu_seqlens must come with batch size 1, got batch size 2": {"cu_seqlens": bounds},
        "cu_seqlens.* last boundary 12": {"input_ids": tokens[:1, :9], "cu_seqlens": bounds},
        "cu_seq_lens_k must be equal to": {
            **one,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds + 1,
        },
        "cu_seq_lens_q must be None or equal to cu_seqlens": {
            **one,
            "cu_seqlens": bounds,
            "cu_seq_lens_q": others,
            "cu_seq_lens_k": others,
        },
        "cu_seq_lens_k must be equal to cu_seq_lens_q, got different boundaries": {
            **one,
            "cu_seqlens": bounds,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": others,
        },
        "position_ids must be None or .*, got different positions": {
            **one,
            "cu_seqlens": bounds,
            "position_ids": torch.arange(12)[None],
        },
        "position_ids must be .* with padding .*, got .* row 1, new token 8": {
            "attention_mask": padding,
            "position_ids": padded,
        },
        "position_ids must be .* with past_key_values .*, got .* row 0, new token 5": {
            "attention_mask": torch.ones_like(padding),
            "position_ids": anew,
            "past_key_values": DynamicCache(),
        },
        "position_ids must be .* with past_key_values .*, got .* row 0, new token 0": {
            "position_ids": torch.arange(12)[None],
            "past_key_values": copy.deepcopy(ours),
        },
        "position_ids must be .*, got torch.float32": {"position_ids": torch.zeros(1, 12)},
        "use_cache must be None or False with packed .*, got True": {
            **one,
            "cu_seqlens": bounds,
            "use_cache": True,
        },
        "use_cache must be False with packed documents .*position_ids.*, got True": {
            "attention_mask": torch.ones_like(padding),
            "position_ids": anew,
            "use_cache": True,
        },
        "past_key_values must be None with packed .*, got a DynamicCache": {
            **one,
            "cu_seqlens": bounds,
            "past_key_values": DynamicCache(),
        },
        "past_key_values must be a DynamicCache .*, got a StaticCache": {"past_key_values": static},
        "past_key_values must be .*, got a DynamicLayer with 12 tokens": {"past_key_values": full},
        "past_key_values must be empty or of 3 rows, .*, got tokens of 2 rows": {
            "input_ids": some_tokens(3, 12),
            "past_key_values": copy.deepcopy(ours),
        },
        "past_key_values must be a cache of .*, got NSAConfig": {
            "past_key_values": _cache_of_another()
        },
        "output_attentions must be False .*, got True": {"output_attentions": True},
        "input_ids must be .*, got None": {"input_ids": None},
    }
    for message, options in calls.items():
        found = _refusal(lambda options=options: model(**{"input_ids": tokens, **options}))
        assert re.match(message, found), found
    hidden, rotary = torch.zeros(2, 12, 48), (torch.zeros(2, 12, 16), torch.zeros(2, 12, 16))
    layer = model.model.layers[0]
    found = _refusal(lambda: layer(hidden, position_embeddings=rotary))
    assert re.match("nsa_batch must be .*, got None", found)
    model.train()
    model.gradient_checkpointing_enable()
    found = _refusal(lambda: model(tokens, use_cache=True))
    assert found.startswith("use_cache must be False with gradient checkpointing")
    assert "call eval()" in found


def test_positions_of_a_single_token_are_not_read() -> None:
    """Which would wait for the device at every step: what is on meta cannot be read."""
    positions = torch.empty(2, 1, dtype=torch.int64, device="meta")
    check_positions_count_on(positions, 2, None, 7)


def _cache_of_another() -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        sparse_model("llama", replace(SMALL, window=17))(some_tokens(2, 5), past_key_values=cache)
    return cache


def test_static_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hybrid = sparse_model("llama"), sparse_model("llama", layers=[0])
    static: dict[str, Any] = {"cache_implementation": "static", "max_new_tokens": 3}
    must, got = "past_key_values must be a DynamicCache", "got a StaticCache"
    prompt = some_tokens(1, 5)
    message = _refusal(lambda: hybrid.generate(prompt, **static))
    assert re.match(f"{must} with layers that stay dense .*, {got}", message), message
    cache = StaticCache(config=model.config, max_cache_len=8)
    message = _refusal(lambda: model(prompt, past_key_values=cache))
    assert re.match(f"{must} in grad mode .*, {got}", message), message
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        message = _refusal(lambda: model(some_tokens(1, 4), past_key_values=cache))
        assert re.match("max_cache_len .* must be at least 9, .*, got 8", message), message
        message = _refusal(lambda: cache.batch_repeat_interleave(2))
        assert re.match("rows of past_key_values must stay 1 .*, got 2", message), message
    monkeypatch.setattr(checks, "attend_few", lambda _: None)
    message = _refusal(lambda: model.generate(prompt, **static))
    assert re.match(f"{must} with backend 'pytorch', which has no .*, {got}", message), message
    model.model.nsa_runtime = replace(model.nsa_runtime, batch_invariant=True)
    message = _refusal(lambda: model.generate(prompt, **static))
    assert re.match(f"{must} with use_batch_invariant .*, {got}", message), message


def test_graphs_of_steps() -> None:
    """What ``generate`` asks for on a GPU."""
    model = sparse_model("llama")
    message = _refusal(lambda: model.get_compiled_call(CompileConfig()))
    assert re.match("compile_config must be None with cache_implementation=", message), message
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    message = _refusal(lambda: model.get_compiled_call(None))
    assert re.match("model.layers.1.mlp must be without hooks .*disable_compile=True", message)
    handle.remove()
    model.get_compiled_call(None)


@pytest.mark.parametrize("option", ["layout", "backend"])
def test_runtimes(option: str) -> None:
    model = sparse_model("llama")
    runtime = model.nsa_runtime
    message = _refusal(lambda: model.use_group(**{option: "other"}))
    assert re.match(f"{option} must be .*, got 'other'", message), message
    assert model.nsa_runtime is runtime


def test_settings_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot compute the config refuses it at conversion."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = NSAConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, num_selected=10**6, independent_kv=False
    )
    assert "num_selected" in _refusal(
        lambda: convert_to_nsa(dense_model("llama"), config, backend="triton")
    )


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_projections_that_were_cut(name: str) -> None:
    """As a tensor parallel plan leaves them: half of the output's columns."""
    model = sparse_model("llama")
    attention = model.model.layers[0].self_attn
    whole = getattr(attention, name)
    setattr(attention, name, nn.Linear(whole.in_features, whole.out_features // 2, bias=False))
    with pytest.raises(ValueError, match=rf"^{name} must return a plain tensor of width .*, got "):
        model(some_tokens(1, 8))


@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_on_several_devices(use_cache: bool) -> None:
    """As transformers places them by device_map, and accelerate moves a layer's inputs."""
    model = sparse_model("llama")

    def move(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to("meta")}

    model.model.layers[1].self_attn.register_forward_pre_hook(move, with_kwargs=True)
    message = "^device_map must place all layers on one device, got layer 1 on meta and .* on cpu$"
    with pytest.raises(ValueError, match=message):
        model(some_tokens(1, 8), use_cache=use_cache)


def test_ways_to_generate_that_do_not_fit() -> None:
    model = sparse_model("llama")
    tokens = some_tokens(1, 9)
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    early = copy.deepcopy(model.generation_config)
    early.assistant_early_exit = 1
    for options in ({"assistant_early_exit": 1}, {"generation_config": early}):
        message = _refusal(lambda options=options: model.generate(tokens, **options))
        assert re.match(r"assistant_early_exit must be None .*assistant_model.*, got 1$", message)
    found = _refusal(lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=2))
    assert re.match("generation must be by generate, .*, got continuous batching", found)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_torch_export(strict: bool) -> None:
    model = sparse_model("llama")
    with pytest.raises(Exception, match=r"must be run or compiled .*, got torch\.export") as caught:
        torch.export.export(model, (some_tokens(1, 20),), strict=strict)
    assert strict or isinstance(caught.value, ValueError)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_torch_jit() -> None:
    model = sparse_model("llama")
    with pytest.raises(ValueError, match=r"must be run or compiled .*, got torch\.jit\.trace"):
        torch.jit.trace(model, (some_tokens(1, 20),), check_trace=False, strict=False)
