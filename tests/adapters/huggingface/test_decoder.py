"""What calls the decoder, not the model: heads of others, classifiers, Auto classes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
)

from nsa_dist.adapters.huggingface import convert_to_nsa
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    dense_model,
    left_padded,
    read_by,
    some_tokens,
    sparse_model,
)

# Windows and choices that hold the whole of a row: the converted model starts as the dense one.
WHOLE = replace(SMALL, window=128, num_selected=16)


def _batches() -> dict[str, dict[str, Tensor]]:
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (30, 7)])
    packed = read_by("packed")
    bounds = torch.cat(((packed["position_ids"][0] == 0).nonzero()[:, 0], torch.tensor([128])))
    ones = torch.ones_like(packed["input_ids"])
    return {
        "rows": {"input_ids": some_tokens(2, 50)},
        "left-padded": {"input_ids": tokens, "attention_mask": mask},
        "right-padded": {x: read_by("padded")[x] for x in ("input_ids", "attention_mask")},
        "position_ids": {x: packed[x] for x in ("input_ids", "position_ids")},
        "cu_seqlens": {"input_ids": packed["input_ids"], "cu_seqlens": bounds.int()},
        "cu_seqlens-mask-of-ones": {
            "input_ids": packed["input_ids"],
            "attention_mask": ones,
            "cu_seqlens": bounds.int(),
        },
    }


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one-dense"])
@pytest.mark.parametrize("batch", _batches())
def test_the_decoder_gives_what_the_model_does(
    batch: str, layers: list[int] | None, training: bool
) -> None:
    model = sparse_model("qwen3", INDEPENDENT, layers=layers).train(training)
    inputs = _batches()[batch]
    expected = model(**inputs)
    found = model.model(**inputs)
    assert torch.equal(model.lm_head(found.last_hidden_state), expected.logits)
    assert (found.past_key_values is None) == (expected.past_key_values is None)
    # And a copy, as of a reference model; also of what was pickled.
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.base_model(**inputs)[0], found.last_hidden_state)


def test_a_mask_of_ones_changes_nothing_for_packed_documents() -> None:
    model, batches = sparse_model("llama"), _batches()
    expected = model(**batches["position_ids"]).logits
    for name in ("cu_seqlens", "cu_seqlens-mask-of-ones"):
        assert torch.equal(model(**batches[name]).logits, expected), name


def test_hidden_states_of_the_decoder() -> None:
    model, tokens = sparse_model("qwen3"), some_tokens(1, 20)
    found = model.model(tokens, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert torch.equal(model.lm_head(found[-1]), model(tokens).logits)


def test_the_decoder_keeps_a_cache() -> None:
    """Of a prompt in two pieces."""
    model = sparse_model("llama", dtype=torch.float64)
    tokens, cache = some_tokens(2, 40), DynamicCache()
    with torch.no_grad():
        whole = model.model(tokens, use_cache=False).last_hidden_state
        for piece in tokens.split((31, 9), dim=1):
            found = model.model(piece, past_key_values=cache).last_hidden_state
    assert (found - whole[:, 31:]).abs().max() <= 1e-12 * whole.abs().max()


CLASSIFIERS: dict[str, tuple[Any, Any]] = {
    "llama-sequences": (LlamaForSequenceClassification, AutoModelForSequenceClassification),
    "qwen3-sequences": (Qwen3ForSequenceClassification, AutoModelForSequenceClassification),
    "llama-tokens": (LlamaForTokenClassification, AutoModelForTokenClassification),
    "qwen3-tokens": (Qwen3ForTokenClassification, AutoModelForTokenClassification),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifiers(case: str, tmp_path: Path) -> None:
    """Converted they are the dense ones; saved and loaded they are themselves."""
    dense_type, auto = CLASSIFIERS[case]
    config = dense_model(case.split("-")[0]).config
    config.num_labels = 3
    torch.manual_seed(3)
    dense = dense_type(config).eval()
    sparse = convert_to_nsa(copy.deepcopy(dense), WHOLE)
    inputs = _batches()["right-padded"]
    labels = torch.tensor([2, 0])
    if case.endswith("tokens"):
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)
    losses = []
    for model in (dense, sparse):
        out = model(**inputs, labels=labels)
        out.loss.backward()
        logits = out.logits.detach()
        if case.endswith("tokens"):
            logits = logits[inputs["attention_mask"].bool()]  # Not what padding got.
        losses.append((out.loss.detach(), logits, model.score.weight.grad))
    for expected, found in zip(*losses, strict=True):
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    sparse.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(sparse)
    assert torch.equal(loaded(**inputs, labels=labels).loss, losses[1][0])


def test_a_language_model_lends_its_decoder(tmp_path: Path) -> None:
    """To a bare model, and to a head that is new: how reward models start."""
    model = sparse_model("qwen3", INDEPENDENT)
    model.save_pretrained(tmp_path)
    tokens = some_tokens(1, 60)
    expected = model.model(tokens).last_hidden_state
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(tokens).last_hidden_state, expected)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert reward.nsa_config == model.nsa_config
    assert torch.equal(reward(tokens).logits, reward.score(expected)[:, -1])
    reward.use_group(None, backend="pytorch")
    assert reward.nsa_runtime.backend == "pytorch"
