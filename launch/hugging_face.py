"""The decoder of training as a model of transformers, and back: names, configs, tokenizers.

Layers with Native Sparse Attention become those of ``nsa_dist.adapters.huggingface``, dense ones
transformers' own. The family is Llama, or Qwen3 with norms of queries and keys.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from launch.data.tokenizer import Tokenizer
from launch.settings import ModelSettings, Settings
from nsa_dist import NSAConfig, RotaryConfig
from nsa_dist.adapters.huggingface import FAMILIES
from nsa_dist.checks import check

# Ours and theirs. Modules end in a dot.
_BLOCK = (
    ("attention_norm.", "input_layernorm."),
    ("attention.", "self_attn."),
    ("mlp_norm.", "post_attention_layernorm."),
    ("mlp.", "mlp."),
)
_REST = (
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)
_ROPE = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor"),
}
"""The fields of ``RotaryConfig`` that each scaling reads."""
_LONGEST = ("original_max_positions", "original_max_position_embeddings")


def make_config(settings: Settings, vocab_size: int) -> Any:
    """The config of the same model in transformers.

    Raises:
        ValueError: if transformers has no such model.
    """
    attention, model, rotary = settings.attention, settings.model, settings.rotary
    width = attention.head_dim
    only = "in transformers' models"
    for option, value, must in (
        ("attention.v_head_dim", attention.value_dim, width),
        ("attention.scale", attention.softmax_scale, width**-0.5),
        ("rotary.dim", rotary.rotary_dim(width), width),
    ):
        check(value == must, option, value, f"{must} {only} of attention.head_dim = {width}")
    dense, (_, sparse_config) = _family(model.qk_norm)
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=width,
        max_position_embeddings=settings.data.length,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        attention_bias=model.bias,
        rope_parameters=_rope(rotary),
        # The stream of training has no tokens between documents.
        bos_token_id=None,
        eos_token_id=None,
    )
    sparse = [layer for layer in range(model.layers) if not model.is_dense(layer)]
    if not sparse:
        return dense.config_class(**fields)
    nsa = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(attention).items()}
    return sparse_config(**fields, nsa=nsa, nsa_layers=sparse)


def _family(qk_norm: bool) -> tuple[Any, tuple[Any, Any]]:
    """The dense model class, and the model and config classes of its sparse form."""
    dense = transformers.Qwen3ForCausalLM if qk_norm else transformers.LlamaForCausalLM
    return dense, FAMILIES[dense]


def _rope(rotary: RotaryConfig) -> dict[str, Any]:
    kind = "default" if rotary.scaling == "none" else rotary.scaling
    values = {name: getattr(rotary, name) for name in _ROPE[rotary.scaling]}
    renamed = {_LONGEST[1] if k == _LONGEST[0] else k: v for k, v in values.items()}
    given = {name: value for name, value in renamed.items() if value is not None}
    return {"rope_type": kind, "rope_theta": rotary.theta, **given}


def build_transformers(
    settings: Settings, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Any:
    """The model of transformers with these weights of ``Decoder``, in eval mode.

    Raises:
        ValueError: as ``make_config``, and as the adapter says of the attention.
    """
    config = make_config(settings, weights["embedding.weight"].shape[0])
    dense, (sparse, _) = _family(settings.model.qk_norm)
    kind = (
        dense if isinstance(config, dense.config_class) and not hasattr(config, "nsa") else sparse
    )
    with torch.device(device):
        model = kind(config)
    model.to(dtype).load_state_dict(to_transformers(weights, settings))
    model.generation_config = _generation(settings)
    return model.requires_grad_(False).eval()


def _generation(settings: Settings) -> Any:
    return transformers.GenerationConfig(
        do_sample=True, temperature=settings.run.temperature, max_new_tokens=200
    )


def to_transformers(weights: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """Weights of ``Decoder`` by the names of transformers."""
    named = {}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            name = f"model.layers.{layer}.{_renamed(rest, _BLOCK)}"
        else:
            name = _renamed(name, _REST)
        if name.endswith("k_norm.weight") and value.shape[0] == 1:
            value = value[0]  # The norm of one set of keys.
        named[name] = value
    if settings.model.tie_embeddings:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    return named


def from_transformers(named: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The inverse of ``to_transformers``."""
    block = tuple((theirs, ours) for ours, theirs in _BLOCK)
    rest = tuple((theirs, ours) for ours, theirs in _REST)
    weights = {}
    for name, value in named.items():
        if name == "lm_head.weight" and settings.model.tie_embeddings:
            continue
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            name = f"blocks.{layer}.{_renamed(inner, block)}"
            of_sets = not settings.model.is_dense(int(layer))
            if name.endswith("k_norm.weight") and of_sets and value.ndim == 1:
                value = value[None]
        else:
            name = _renamed(name, rest)
        weights[name] = value
    return weights


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def read_settings(config: Any, base: Settings) -> Settings:
    """Settings of a run whose model is that of a config of transformers.

    Args:
        base: gives everything but the model: data, optimizer, ranks, run; and of a dense model the
            options of the attention that are not its heads and widths.

    Raises:
        ValueError: if ``launch/train.py`` has no such model.
    """
    kinds: dict[Any, bool] = {}
    for qk_norm in (False, True):
        dense, (_, sparse_config) = _family(qk_norm)
        kinds |= {dense.config_class: qk_norm, sparse_config: qk_norm}
    names = ", ".join(kind.model_type for kind in kinds)
    check(type(config) in kinds, "model_type", config.model_type, f"one of {names}")
    for field, value in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("attention_dropout", 0.0),
        ("use_sliding_window", False),
    ):
        found = getattr(config, field, value)
        check(found == value, field, found, f"{value!r}, as in launch/train.py's decoder")
    heads = dict(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
    sparse = getattr(config, "nsa_layers", None)
    if sparse is None:
        attention = replace(base.attention, **heads, v_head_dim=None, scale=None)
    else:
        attention = NSAConfig(**config.nsa)
    model = replace(
        base.model,
        **_kinds(sparse, config.num_hidden_layers),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        mlp_hidden=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        bias=config.attention_bias,
        qk_norm=kinds[type(config)],
    )
    return replace(base, attention=attention, rotary=_rotary(config.rope_parameters), model=model)


def _kinds(sparse: list[int] | None, layers: int) -> dict[str, Any]:
    """The options of ``ModelSettings`` that make these layers sparse."""
    if sparse is None:
        return {"attention": "dense", "dense_every": 0}
    for every in (0, *range(2, layers + 1)):
        options: dict[str, Any] = {"attention": "nsa", "dense_every": every}
        model = ModelSettings(layers=layers, **options)
        if sparse == [layer for layer in range(layers) if not model.is_dense(layer)]:
            return options
    must = "all layers, or all but every n-th (model.dense_every)"
    raise ValueError(f"nsa_layers must be {must}, got {sparse} of {layers} layers")


def _rotary(rope: Mapping[str, Any]) -> RotaryConfig:
    kind = rope["rope_type"]
    scaling: Any = "none" if kind == "default" else kind
    check(scaling in _ROPE, "rope_type", kind, "one of default, linear, llama3, yarn")
    values = {_LONGEST[0] if name == _LONGEST[1] else name: value for name, value in rope.items()}
    read = {"rope_type", "rope_theta", *_ROPE[scaling]}
    others = sorted(name for name in values if name not in read and values[name] is not None)
    check(not others, "rope_parameters", others, f"only those that {kind} has in launch/train.py")
    given = {name: values[name] for name in _ROPE[scaling] if values.get(name) is not None}
    return RotaryConfig(theta=rope["rope_theta"], scaling=scaling, **given)


def make_tokenizer(tokenizer: Tokenizer) -> Any:
    """A tokenizer of transformers that gives the tokens of training, with nothing before or after
    a text.

    Raises:
        ValueError: if it does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = tokenizer.save(Path(folder))
        if saved == "bytes":
            return transformers.PreTrainedTokenizerFast(tokenizer_object=_bytes())
        if saved.endswith(".json"):
            inner = Fast.from_file(str(Path(folder) / saved))
            inner.no_truncation()
            inner.no_padding()
            made = transformers.PreTrainedTokenizerFast(tokenizer_object=_bare(inner))
        else:
            made = transformers.AutoTokenizer.from_pretrained(str(Path(folder) / saved))
            if made.is_fast:
                specials = {k: v for k, v in made.special_tokens_map.items() if isinstance(v, str)}
                inner = _bare(made.backend_tokenizer)
                made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **specials)
    probe = "def f(x):\n    return [x, 'ä', 12345]\n"
    found, expected = made(probe)["input_ids"], tokenizer.encode(probe.encode(), "a probe").tolist()
    must = "one that transformers reads to the same tokens"
    check(found == expected, "tokenizer", found, f"{must}, {expected}")
    return made


def _bare(inner: Any) -> Any:
    """The same tokenizer without the tokens that a template puts around a text."""
    table = json.loads(inner.to_str())
    return Fast.from_str(json.dumps(table | {"post_processor": None}))


def _bytes() -> Any:
    """A tokenizer whose tokens are bytes."""
    letters = {letter: code for code, letter in _letters().items()}
    inner = Fast(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _letters() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte: itself where it prints, else one
    from 256 on, in order."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printed]
    letters = {code: chr(code) for code in printed}
    return letters | {code: chr(256 + place) for place, code in enumerate(others)}
