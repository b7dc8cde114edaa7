"""Initial weights of gates and compressors where transformers makes a model, not a conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nsa_dist import NSAConfig
from nsa_dist.adapters.huggingface import convert_to_nsa
from tests.adapters.huggingface.small_models import INDEPENDENT, SMALL, dense_model, some_tokens

MLP_GATE = replace(SMALL, gate="mlp", compress="linear")
STATIC_GATE = replace(SMALL, gate="static", compress="attention_pool")


@pytest.mark.parametrize("config", [SMALL, MLP_GATE, STATIC_GATE], ids=["linear", "mlp", "static"])
def test_what_a_dense_folder_lacks_starts_as_in_a_conversion(
    config: NSAConfig, tmp_path: Path
) -> None:
    """Not as what the memory held, which transformers leaves in parameters that it does not know.

    Where a dense model is loaded with the config of a converted one.
    """
    dense = dense_model("qwen3")
    dense.save_pretrained(tmp_path)
    converted = convert_to_nsa(dense, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=converted.config)
    expected = converted.state_dict()
    if config.gate == "mlp":  # Its first layer is drawn; the second, of zeros, hides it.
        expected = {name: x for name, x in expected.items() if "gate.up" not in name}
    assert {x for x in loaded.state_dict() if "gate.up" not in x} == set(expected)
    for name, weight in expected.items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    tokens = some_tokens(2, 60)
    assert torch.equal(loaded(tokens).logits, converted(tokens).logits)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_model_that_is_all_new_has_the_gates_of_its_config(auto: Any) -> None:
    """The config of a conversion with other gates; a classifier is initialised by transformers."""
    gates = (-3.0, 0.5, 1.0)
    config = convert_to_nsa(dense_model("qwen3"), INDEPENDENT, gate_init=gates).config
    for name, weight in auto.from_config(config).named_parameters():
        if name.endswith("gate.proj.bias"):
            assert torch.equal(weight, torch.tensor(gates).repeat(SMALL.num_heads)), name
        assert bool(weight.isfinite().all()), name
