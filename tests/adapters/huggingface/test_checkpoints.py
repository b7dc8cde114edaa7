"""A checkpoint holds all that a converted model computes, and nothing takes it for a dense one."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from nsa_dist import NSAConfig
from nsa_dist.adapters.huggingface import (
    NSALlamaConfig,
    NSALlamaForCausalLM,
    NSAQwen3Config,
    NSAQwen3ForCausalLM,
    from_pretrained,
)
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    dense_model,
    some_tokens,
    sparse_model,
)

CLASSES = {
    "llama": (NSALlamaForCausalLM, NSALlamaConfig, LlamaForCausalLM),
    "qwen3": (NSAQwen3ForCausalLM, NSAQwen3Config, Qwen3ForCausalLM),
}
MODELS: dict[str, tuple[str, NSAConfig, dict[str, Any]]] = {
    "llama-tied-llama3": ("llama", SMALL, {"tie_word_embeddings": True, "rope": "llama3"}),
    "llama-hybrid-bfloat16": (
        "llama",
        replace(INDEPENDENT, compress="conv1d", gate="mlp", gate_hidden=12),
        {"layers": [1], "dtype": torch.bfloat16, "attention_bias": True},
    ),
    "qwen3-independent-yarn": ("qwen3", INDEPENDENT, {"rope": "yarn"}),
    "qwen3-hybrid-static": (
        "qwen3",
        replace(SMALL, branches=("selected", "window"), gate="static"),
        {"layers": [0], "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    family, config, options = MODELS[name]
    model = sparse_model(family, config, **options)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    tokens = some_tokens(2, 70)
    for load in (from_pretrained, CLASSES[family][0].from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model) is CLASSES[family][0]
        assert type(loaded.config) is CLASSES[family][1]
        assert loaded.nsa_config == model.nsa_config
        assert loaded.nsa_layers == model.nsa_layers
        assert not loaded.training
        assert loaded.dtype == model.dtype
        found, expected = loaded.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        for use_cache in (False, True):
            results = (x(tokens, use_cache=use_cache).logits for x in (loaded, model))
            assert torch.equal(*results)
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("layers", [None, [0]], ids=["all", "hybrid"])
@pytest.mark.parametrize("family", CLASSES)
def test_no_dense_class_loads_it(family: str, layers: Any, tmp_path: Path) -> None:
    """Not even where all the dense model's weights are there, as with shared keys and values."""
    model = sparse_model(family, layers=layers)
    model.save_pretrained(tmp_path)
    dense = CLASSES[family][2]
    for load in (dense, LlamaModel, Qwen3Model, LlamaForSequenceClassification, MistralForCausalLM):
        with pytest.raises(KeyError, match=r"native_sparse_attention .*from_pretrained loads"):
            load.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="native_sparse_attention"):
        dense(dense.config_class(**model.config.to_dict()))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate"):
        dense_model(family).load_state_dict(load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CLASSES[family][0]
    assert torch.equal(loaded(some_tokens(1, 40)).logits, model(some_tokens(1, 40)).logits)


@pytest.mark.parametrize("registered", [True, False], ids=["imported", "not-imported"])
def test_what_reads_config_json_by_the_base_class(
    registered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the adapter's classes in transformers' tables, and as in a process without them."""
    model = sparse_model("qwen3", layers=[1])
    model.save_pretrained(tmp_path)
    if not registered:
        monkeypatch.delitem(CONFIG_MAPPING._extra_content, "nsa_qwen3")
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("b").input_ids == [1]
    for config in (
        PreTrainedConfig.from_pretrained(tmp_path),
        PreTrainedConfig.from_json_file(tmp_path / "config.json"),
    ):
        assert config.nsa_layers == [1]
        assert config.transformers_version is not None
    found = GenerationConfig.from_model_config(model.config)
    expected = GenerationConfig.from_model_config(dense_model("qwen3").config)
    assert found.to_dict() == expected.to_dict()
    if registered:
        assert type(AutoConfig.from_pretrained(tmp_path)) is NSAQwen3Config
        assert AutoProcessor.from_pretrained(tmp_path)("b").input_ids == [1]
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", CLASSES)
def test_folders_of_older_versions_load(family: str, tmp_path: Path) -> None:
    """They have our layers' name in ``layer_types``, and the dense ``hidden_act``."""
    model = sparse_model(family, INDEPENDENT, layers=[1])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = file.read_text(encoding="utf-8")
    old = json.loads(written)
    old["hidden_act"] = "silu"
    old["layer_types"] = ["full_attention", "native_sparse_attention"]
    file.write_text(json.dumps(old), encoding="utf-8")
    tokens = some_tokens(1, 50)
    for load in (from_pretrained, CLASSES[family][0].from_pretrained):
        loaded = load(tmp_path)
        assert loaded.nsa_layers == (1,)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text(encoding="utf-8") == written


def test_sharded_folders(tmp_path: Path) -> None:
    model = sparse_model("llama", INDEPENDENT)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, expected = from_pretrained(tmp_path).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", CLASSES)
def test_classes_build_from_a_config(family: str) -> None:
    model_type, config_type, _ = CLASSES[family]
    dense = dense_model(family).config.to_dict()
    dense.pop("model_type")
    model = model_type(config_type(**dense, nsa=asdict(INDEPENDENT), nsa_layers=[0, 1]))
    assert model.nsa_config == INDEPENDENT
    assert model(some_tokens(1, 40)).logits.isfinite().all()
    other = config_type(**dense, nsa=asdict(replace(SMALL, num_heads=8)), nsa_layers=[0, 1])
    with pytest.raises(ValueError, match=r"NSAConfig\.num_heads must be 4 .*, got 8"):
        model_type(other)
    with pytest.raises(ValueError, match=r"nsa must be set, .*, got None"):
        model_type(config_type(**dense))


def test_dense_checkpoints_are_refused(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type must be .*convert_to_nsa.*, got 'llama'"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing_keys", "unexpected_keys"])
def test_other_weights_are_refused(change: str, tmp_path: Path) -> None:
    sparse_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = "model.layers.1.self_attn.gate.proj.bias"
    if change == "missing_keys":
        del weights[key]
    else:
        key += "_of_old"
        weights[key] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=change) as caught:
        from_pretrained(tmp_path)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tp_plan", "auto"),
        ("distributed_config", "auto"),
        ("layout", "striped"),
        ("backend", "cuda"),
    ],
)
def test_options_are_refused(option: str, value: str, tmp_path: Path) -> None:
    sparse_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{option} must be .*, got '{value}'"):
        from_pretrained(tmp_path, **{option: value})


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "of-old", str(tmp_path / "of-old"), "./of-old", "out/of-old"):
        with pytest.raises(ValueError, match=r"(?s)^folder must be .*, got ") as caught:
            from_pretrained(folder, local_files_only=True)
        assert f", got '{folder}'" in str(caught.value)
    with pytest.raises(ValueError, match=r"folder must be .*, got .* without a config\.json"):
        from_pretrained(tmp_path)


def test_loading_info(tmp_path: Path) -> None:
    sparse_model("llama").save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, output_loading_info=True)
    expected = NSALlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert [type(x) for x in found] == [type(x) for x in expected]
    assert found[1] == expected[1]
    assert type(from_pretrained(tmp_path, output_loading_info=False)) is NSALlamaForCausalLM


def test_config_says_what_the_model_is(tmp_path: Path) -> None:
    model = sparse_model("qwen3", layers=[1])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "nsa_qwen3"
    assert saved["layer_types"] == ["full_attention"] * 2
    assert saved["hidden_act"].startswith("silu with native_sparse_attention")
    assert model.config.hidden_act == "silu"
    assert saved["nsa_layers"] == [1]
    assert NSAConfig(**saved["nsa"]) == model.nsa_config
    assert set(saved["nsa"]) == set(asdict(SMALL))
    assert model.config.layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(copied: Any) -> None:
    model = sparse_model("qwen3", INDEPENDENT)
    tokens = some_tokens(1, 60)
    assert torch.equal(copied(model)(tokens).logits, model(tokens).logits)
