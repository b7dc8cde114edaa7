"""Training over ranks that share the sequence is that of one process, with transformers' means."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_dist import NSAConfig

pytest.importorskip("transformers")

from transformers import DynamicCache

from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    gradients,
    gradients_on_rank,
    refusals_on_rank,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x

GetRanks = Callable[[int], Ranks]

CASES: dict[str, tuple[str, NSAConfig, str, bool]] = {
    "llama-zigzag-packed": ("llama", INDEPENDENT, "zigzag", True),
    "qwen3-per-document": ("qwen3", SMALL, "zigzag_per_document", True),
    "qwen3-contiguous-rows": (
        "qwen3",
        replace(INDEPENDENT, compress="conv1d", gate="static"),
        "contiguous",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_over_two_ranks_by_the_2x_rule(case: str, ranks_of: GetRanks) -> None:
    family, config, layout, packed = CASES[case]

    def run(dtype: torch.dtype, split: bool) -> Any:
        arguments = (family, config, layout, dtype)
        if not split:
            return gradients(*arguments, packed, False)
        return ranks_of(2).run(gradients_on_rank, *arguments, packed, True)[0]

    x64_loss, x64 = run(torch.float64, False)
    plain_loss, plain = run(torch.float32, False)
    for dtype in (torch.float32, torch.float64):
        loss, ours = run(dtype, True)
        assert ours.keys() == x64.keys()
        for name in x64:
            assert_2x(ours[name], plain[name], x64[name], dtype, name)
        losses = (torch.tensor([x], dtype=torch.float64) for x in (loss, plain_loss, x64_loss))
        ours_loss, plain32, exact = losses
        # transformers takes its logits to float32 for the loss.
        assert_2x(ours_loss, plain32.float(), exact, torch.float32, "loss")


@pytest.mark.parametrize("sharded", [False, True], ids=["whole-weights", "FSDP2"])
def test_recomputation_changes_no_bit(sharded: bool, ranks_of: GetRanks) -> None:
    arguments = ("qwen3", INDEPENDENT, "zigzag", torch.float32, True)
    expected, found = (
        ranks_of(2).run(gradients_on_rank, *arguments, True, *options)[0]
        for options in ((False, False), (True, sharded))
    )
    assert found[0] == expected[0]
    for name, grad in expected[1].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tokens = some_tokens(2, 50)
    grads = []
    for recompute in (False, True):
        model = sparse_model("llama", layers=[0]).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model(tokens, labels=tokens).loss.backward()
        grads.append({name: x.grad for name, x in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


@pytest.mark.parametrize(
    "config",
    [SMALL, INDEPENDENT, replace(INDEPENDENT, branches=("selected", "window"))],
    ids=["shared", "independent", "without-compressed"],
)
def test_gradients_through_a_cache(config: NSAConfig) -> None:
    """Of a prompt in two pieces, the second of which attends to what the first left."""
    tokens = some_tokens(2, 53)
    grads = []
    for sizes in ((53,), (31, 22)):
        model = sparse_model("qwen3", config, layers=[1], dtype=torch.float64).train()
        cache = DynamicCache() if len(sizes) > 1 else None
        logits = [
            model(piece, past_key_values=cache).logits for piece in tokens.split(sizes, dim=1)
        ]
        torch.cat(logits, dim=1).square().sum().backward()
        grads.append({name: x.grad for name, x in model.named_parameters()})
    for name, grad in grads[0].items():
        assert largest(grads[1][name] - grad) <= 1e-12 * largest(grad), name


def test_training_moves_every_new_weight() -> None:
    """From the conversion's own start, where gates are constants and compressors means."""
    model = sparse_model("qwen3", INDEPENDENT, trained=False).train()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    tokens = some_tokens(4, 60)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    same = [name for name, x in model.named_parameters() if torch.equal(x, before[name])]
    assert same == []


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = sparse_model("llama", trained=False)
    data = [{"input_ids": x, "labels": x} for x in some_tokens(1, 40).expand(32, -1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < losses[0]
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists()


def test_bad_calls_are_refused_on_every_rank(ranks_of: GetRanks) -> None:
    """Where one rank's call is bad too: none waits for the other."""
    answers = ranks_of(2).run(refusals_on_rank)
    assert answers[0].keys() == answers[1].keys()
    for name in answers[0]:
        option = name.split(",")[0]
        for answer in answers:
            assert option in answer[name], (name, answer[name])
            assert " must " in answer[name] and ", got " in answer[name], (name, answer[name])
