"""PEFT on a converted model: LoRA beside the new weights, which are trained whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from nsa_dist import NSAConfig
from nsa_dist.adapters.huggingface import from_pretrained
from nsa_dist.nn.compressor import BlockCompressor, is_built_in
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest

NEW_MODULES = ["self_attn.gate", "k_compressor", "v_compressor"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


class Wrapper(nn.Module):
    """As PEFT's for modules_to_save: passes calls and attributes on to the copy that it trains."""

    def __init__(self, module: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        self.original_module, self.copy = module, copy

    def forward(self, *args: Any) -> Tensor:
        out: Tensor = self.copy(*args)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("copy"), name)


@pytest.mark.parametrize("config", [SMALL, INDEPENDENT], ids=["shared", "independent"])
def test_wrapped_modules_compute_what_they_wrap(config: NSAConfig) -> None:
    model = sparse_model("qwen3", config)
    plain = sparse_model("qwen3", config)
    attention = model.model.layers[1].self_attn
    other = plain.model.layers[0].self_attn
    for name in ("gate", "k_compressor", "v_compressor"):
        setattr(attention, name, Wrapper(getattr(attention, name), getattr(other, name)))
        setattr(plain.model.layers[1].self_attn, name, getattr(other, name))
    tokens = some_tokens(2, 60)
    for use_cache in (False, True):
        found, expected = (x(tokens, use_cache=use_cache).logits for x in (model, plain))
        assert torch.equal(found, expected)


def test_a_wrapper_of_anything_else_is_not_built_in() -> None:
    compressor = BlockCompressor(SMALL, SMALL.head_dim)
    assert is_built_in(compressor) and is_built_in(Wrapper(compressor, compressor))
    linear = nn.Linear(2, 2)
    assert not is_built_in(linear) and not is_built_in(Wrapper(linear, compressor))
    assert not is_built_in(None)


def lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "r": 4,
        "target_modules": PROJECTIONS,
        "modules_to_save": NEW_MODULES,
        "task_type": "CAUSAL_LM",
    }
    return get_peft_model(model, LoraConfig(**(values | options)))


def train(model: Any, steps: int = 3) -> list[float]:
    tokens, losses = some_tokens(2, 60), []
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@needs_peft
@pytest.mark.parametrize("config", [SMALL, INDEPENDENT], ids=["shared", "independent"])
def test_the_recipe_trains_lora_and_the_new_weights(config: NSAConfig, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    sparse_model("qwen3", config, trained=False).save_pretrained(tmp_path / "base")
    base = from_pretrained(tmp_path / "base")  # An adapter names the folder of its model.
    model = lora(base).train()
    trained = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
    kinds = ("lora_", "gate", "k_compressor", "v_compressor")
    for kind in kinds:
        assert any(kind in name for name in trained), kind
    assert all(any(kind in name for kind in kinds) for name in trained)
    losses = train(model)
    assert losses[-1] < losses[0]
    found = dict(model.named_parameters())
    assert [name for name, x in trained.items() if torch.equal(found[name], x)] == []

    model.eval()
    tokens = some_tokens(2, 50)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        before = base(tokens).logits
        with model.disable_adapter():
            start = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        merged = model.merge_and_unload()
        assert type(merged) is type(base)
        error = largest(merged(tokens).logits - expected)
    assert torch.equal(before, expected)  # The adapter sits inside the model.
    assert largest(start - expected) > 1e-2 * largest(expected)
    assert error <= 1e-4 * largest(expected)
    merged.save_pretrained(tmp_path / "merged")


@needs_peft
def test_lora_alone_leaves_the_new_weights_as_they_are() -> None:
    model = lora(sparse_model("llama", trained=False), modules_to_save=None).train()
    names = [name for name, x in model.named_parameters() if x.requires_grad]
    assert all("lora_" in name for name in names)
    assert not any("compressor" in name or "gate" in name for name in names)
