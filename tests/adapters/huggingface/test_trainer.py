"""transformers' Trainer and pipeline on a converted model: resuming, smoothing, what they read."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("needs accelerate", allow_module_level=True)

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nsa_dist.adapters.huggingface import convert_to_nsa, from_pretrained
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    VOCABULARY,
    dense_model,
    some_tokens,
    sparse_model,
)
from tests.traps.mutation import Rewritten, catches

# Windows and choices that hold the whole of a row: the converted model starts as the dense one.
WHOLE = replace(SMALL, window=64, num_selected=8)
ROWS = [{"input_ids": x, "labels": x} for x in some_tokens(8, 40)]


def _trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    values: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    parts = {x: options.pop(x) for x in ("eval_dataset", "data_collator") if x in options}
    arguments = TrainingArguments(output_dir=str(folder), **(values | options))
    return Trainer(model=model, args=arguments, train_dataset=ROWS, **parts)


def _losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [x["loss"] for x in trainer.state.log_history if "loss" in x]


def _assert_same_weights(found: Any, expected: Any) -> None:
    weights: dict[str, Tensor] = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in found.state_dict().items())


def test_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = sparse_model("qwen3", INDEPENDENT)
    _trainer(whole, tmp_path, **options).train()
    resumed = sparse_model("qwen3", INDEPENDENT, seed=5)
    _trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    _assert_same_weights(resumed, whole)
    _assert_same_weights(from_pretrained(tmp_path / "checkpoint-4"), whole)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = sparse_model("llama")
    trainer = _trainer(
        model,
        tmp_path,
        eval_dataset=ROWS[:2],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1.0,  # So that it gets worse.
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-4")
    _assert_same_weights(model, from_pretrained(best))


@catches(
    "smoothed labels that are not shifted",
    "the Trainer does not know the model's class by name",
    Rewritten(
        "nsa_dist.adapters.huggingface:register",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[$NAME] = $MODEL.__name__",
        "pass",
    ),
)
def test_smoothed_labels_are_shifted(tmp_path: Path) -> None:
    """As the dense model's, over steps of two batches; the Trainer goes by the class's name."""
    models = dense_model("qwen3"), convert_to_nsa(dense_model("qwen3"), WHOLE)
    options = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "max_steps": 1}
    dense, sparse = (_losses(_trainer(x, tmp_path, **options))[0] for x in models)
    assert abs(sparse - dense) <= 1e-4 * dense  # Gates of 4.5e-5 are not quite nothing.


def test_a_class_that_fsdp_made_keeps_its_shift() -> None:
    """FSDP2 renames a model's class, by which the Trainer knows that labels are to be shifted."""
    name = sparse_model("llama")._get_name()
    for known in (name, f"FSDP{name}"):
        assert known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_rows_without_padding_between_documents(tmp_path: Path) -> None:
    """The collator that packs them gives the loss of the same rows one by one."""
    losses = []
    for collator in (None, DataCollatorWithFlattening()):
        rows = {"data_collator": collator} if collator else {}
        model = sparse_model("qwen3", INDEPENDENT, dtype=torch.float64)
        losses.append(_losses(_trainer(model, tmp_path, max_steps=1, **rows))[0])
    assert abs(losses[1] - losses[0]) <= 1e-6 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_options_mean_what_they_do_for_the_dense_model(
    options: dict[str, Any], tmp_path: Path
) -> None:
    models = dense_model("llama"), convert_to_nsa(dense_model("llama"), WHOLE)
    dense, sparse = (_losses(_trainer(x, tmp_path, max_steps=1, **options))[0] for x in models)
    assert abs(sparse - dense) <= 1e-4 * dense


def test_pipelines(tmp_path: Path) -> None:
    """Of a loaded model with its folder's tokenizer, and of the folder by itself."""
    model = sparse_model("llama")
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    expected = model.generate(torch.tensor([[3]]), max_new_tokens=4, do_sample=False)[0]
    for source, options in (
        (from_pretrained(tmp_path), {"tokenizer": str(tmp_path)}),
        (str(tmp_path), {}),
    ):
        generate = pipeline("text-generation", model=source, device="cpu", **options)
        found = generate("w3", max_new_tokens=4, do_sample=False, return_tensors=True)
        assert found[0]["generated_token_ids"] == expected.tolist()
