"""TRL's trainers on a converted model give the losses of the dense model on the same weights.

Rows are no longer than what the selected and the window branch cover, and new weights stay as they
start, so that the two models are one function but for gates of 4.5e-5.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from nsa_dist.adapters.huggingface import convert_to_nsa
from tests.adapters.huggingface.small_models import (
    SMALL,
    VOCABULARY,
    dense_model,
    some_tokens,
)

pytestmark = pytest.mark.slow

WHOLE = replace(SMALL, window=128, num_selected=16)
LENGTHS = (40, 17, 29, 8, 33, 21, 12, 37)
COMMON: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}


def _tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def _words(length: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in some_tokens(1, length, seed=seed)[0].tolist())


def _pair(make: Any = None) -> tuple[Any, Any]:
    """A dense model, and its conversion, of which the new weights are frozen."""
    dense = dense_model("llama", eos_token_id=2)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    if make is not None:
        dense = make(dense)
    sparse = convert_to_nsa(copy.deepcopy(dense), WHOLE)
    for name, parameter in sparse.named_parameters():
        if "self_attn.gate" in name or "compressor" in name:
            parameter.requires_grad_(False)
    return dense, sparse


class _SameAdapters(TrainerCallback):
    """Draws the weights of adapters by name: modules come in another order in the two models."""

    def on_train_begin(self, *_: Any, model: Any, **options: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    parameter.copy_(0.2 * noise)


def _history(trainer: Any, *names: str) -> list[list[float]]:
    trainer.add_callback(_SameAdapters())
    trainer.train()
    steps = [x for x in trainer.state.log_history if "loss" in x]
    return [[float(x[name]) for name in ("loss", *names)] for x in steps]


def _assert_same(dense: list[list[float]], sparse: list[list[float]]) -> None:
    assert len(dense) == len(sparse) == COMMON["max_steps"]
    expected, found = torch.tensor(dense), torch.tensor(sparse)
    size = expected.abs().amax(0)
    assert bool(((found - expected).abs() <= 1e-4 * size).all()), (expected, found)


SFT: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "completion-only": ({"completion_only_loss": True}, False),
    "packing": ({"packing": True, "max_length": 48}, False),
    "padding-free": ({"padding_free": True, "max_length": None}, False),
    "label-smoothing": ({"label_smoothing_factor": 0.1}, False),
    "LoRA": ({}, True),
    "LoRA-packing-accumulation": (
        {"packing": True, "max_length": 48, "gradient_accumulation_steps": 2},
        True,
    ),
}


@pytest.mark.parametrize("case", SFT)
def test_supervised_fine_tuning(case: str, tmp_path: Path) -> None:
    options, lora = SFT[case]
    rows = [some_tokens(1, n, seed=n)[0].tolist() for n in LENGTHS * 2]
    columns = {"input_ids": rows}
    if case == "completion-only":
        columns["completion_mask"] = [[0] * 5 + [1] * (len(row) - 5) for row in rows]
    losses = []
    for model in _pair():
        arguments = SFTConfig(str(tmp_path), **{**COMMON, **options})
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        losses.append(_history(trainer, "entropy", "mean_token_accuracy"))
    _assert_same(*losses)


PAIRS = {
    "prompt": [_words(n // 3, n) for n in LENGTHS],
    "chosen": [" " + _words(n // 2, n + 50) for n in LENGTHS],
    "rejected": [" " + _words(n // 4 + 1, n + 90) for n in LENGTHS],
}


def _preferences(model: Any, reference: Any, folder: Path, lora: bool = False) -> DPOTrainer:
    return DPOTrainer(
        model,
        reference,
        DPOConfig(str(folder), **COMMON, max_length=64, beta=0.5),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["reference-model", "LoRA"])
def test_direct_preference_optimisation(lora: bool, tmp_path: Path) -> None:
    losses = []
    for model in _pair():
        reference = None if lora else copy.deepcopy(model)
        trainer = _preferences(model, reference, tmp_path, lora)
        losses.append(_history(trainer, "logps/chosen", "logps/rejected"))
    _assert_same(*losses)


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 7 for i in ids) / 10 for ids in completion_ids]


def _policies(model: Any, folder: Path, lora: bool = False) -> GRPOTrainer:
    return GRPOTrainer(
        model,
        _reward,
        args=GRPOConfig(
            str(folder),
            **{**COMMON, "per_device_train_batch_size": 4},
            num_generations=4,
            max_completion_length=12,
            beta=0.1,
        ),
        train_dataset=Dataset.from_dict({"prompt": [_words(n, n) for n in LENGTHS]}),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["reference-model", "LoRA"])
def test_group_relative_policy_optimisation(lora: bool, tmp_path: Path) -> None:
    """With generation by the trained model, from prompts that are padded on the left. TRL loads the
    reference model from the folder of the trained one."""
    losses = []
    for name, model in zip(("dense", "sparse"), _pair(), strict=True):
        if not lora:
            frozen = [x for x, p in model.named_parameters() if not p.requires_grad]
            model.save_pretrained(tmp_path / name)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            for x in frozen:
                model.get_parameter(x).requires_grad_(False)
        torch.manual_seed(5)  # What is sampled.
        trainer = _policies(model, tmp_path, lora)
        losses.append(_history(trainer, "reward", "entropy", "completions/mean_length", "kl"))
    _assert_same(*losses)
    assert abs(losses[0][-1][-1]) > 0.0  # The policy has left its reference.


def test_a_reference_needs_a_folder(tmp_path: Path) -> None:
    model = _pair()[1]
    for begin in (lambda: _policies(model, tmp_path), lambda: _preferences(model, None, tmp_path)):
        with pytest.raises(OSError, match=r"save_pretrained, then from_pretrained; or give ref_m"):
            begin()


def test_reward_models(tmp_path: Path) -> None:
    def classifier(dense: Any) -> Any:
        dense.config.num_labels = 1
        torch.manual_seed(4)
        made = LlamaForSequenceClassification(dense.config)
        made.model = dense.model
        return made

    columns = {
        "chosen": [_words(n, n + 50) for n in LENGTHS],
        "rejected": [_words(n // 2 + 1, n + 90) for n in LENGTHS],
    }
    losses = []
    for model in _pair(classifier):
        trainer = RewardTrainer(
            model,
            RewardConfig(str(tmp_path), **COMMON, max_length=64),
            train_dataset=Dataset.from_dict(columns),
            processing_class=_tokenizer(),
        )
        losses.append(_history(trainer, "accuracy"))
    _assert_same(*losses)
