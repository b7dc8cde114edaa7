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

from nsa_dist import distill_dense
from nsa_dist.adapters.huggingface import convert_to_nsa, from_pretrained
from nsa_dist.adapters.huggingface.distillation import (
    DistillationTrainer,
    train_new_weights_only,
)
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    VOCABULARY,
    dense_model,
    left_padded,
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


def _distilled_by_hand(model: Any, rows: list[Any], rate: float) -> list[float]:
    """The loop of the documents: losses of a step for each row."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for row in rows:
        with distill_dense() as distilled:
            model.model(row["input_ids"][None])
        optimizer.zero_grad()
        distilled.loss.backward()
        optimizer.step()
        losses.append(distilled.loss.item())
    return losses


@pytest.mark.parametrize("config", [SMALL, INDEPENDENT], ids=["shared", "independent"])
def test_distillation_moves_gates_and_compressors_alone(config: Any) -> None:
    """They begin as the conversion leaves them, and padding changes nothing."""
    model = sparse_model("qwen3", config, trained=False).train()
    train_new_weights_only(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows = [{"input_ids": x} for x in some_tokens(1, 75).expand(6, -1)]
    tokens, mask = left_padded([rows[0]["input_ids"], rows[0]["input_ids"][:40]])
    with distill_dense() as alone, torch.no_grad():
        model.model(tokens[:1])
    losses = _distilled_by_hand(model, rows, 3e-3)
    assert losses[0] == pytest.approx(alone.loss.item(), rel=1e-5)
    assert losses[-1] < losses[0]
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        parts = []
        for row in (tokens[:1], tokens[1:, -40:]):
            with distill_dense() as distilled:
                model.model(row)
            parts.append([layer.choice.item() for layer in distilled.layers])
        with distill_dense() as padded:
            model.model(tokens, attention_mask=mask)
    for layer, whole, short in zip(padded.layers, *parts, strict=True):
        assert layer.choice.item() == pytest.approx((75 * whole + 40 * short) / 115, rel=1e-4)


def test_trainer_distils_as_a_loop_does(tmp_path: Path) -> None:
    """Accumulated too: a mean over batches. Its evaluation is that of the next token."""
    rows = [{"input_ids": x, "labels": x} for x in some_tokens(4, 60)]
    models = [sparse_model("llama", trained=False).train() for _ in range(2)]
    for model in models:
        train_new_weights_only(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(models[0], arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        next_token = [
            models[1](x["input_ids"][None], labels=x["labels"][None]).loss.item() for x in rows
        ]
    start = sum(next_token) / len(rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(start, rel=1e-5)
    found = _losses(trainer)
    with distill_dense() as distilled:
        for row in rows:
            models[1](row["input_ids"][None])
    distilled.loss.backward()
    assert found == [pytest.approx(distilled.loss.item(), rel=1e-4)]
    for (name, p), q in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        expected = p if p.grad is None else p - 0.1 * p.grad
        assert torch.allclose(q, expected, rtol=1e-4, atol=1e-6), name


def test_trainer_does_not_distil_all_weights(tmp_path: Path) -> None:
    model = sparse_model("llama")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="model must have no trained weights but gates and compr"):
        DistillationTrainer(model, arguments, train_dataset=ROWS)
