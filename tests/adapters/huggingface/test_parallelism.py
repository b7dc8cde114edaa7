"""Sequences that accelerate, DeepSpeed or torch split: as one process, or refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    batch_gradients,
    context_parallel_gradients,
    stated_splits_on_rank,
)
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Replaced, catches

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
GetRanks = Callable[[int], Ranks]


def not_looked_at() -> None:
    return None


@catches(
    "a part of a sequence taken for a whole one",
    "sizes that accelerate states are not looked at",
    Replaced("nsa_dist.adapters.huggingface:_stated_by_accelerate", not_looked_at),
)
@pytest.mark.skipif(not HAS_ACCELERATE, reason="needs accelerate")
def test_sizes_that_others_state(ranks_of: GetRanks) -> None:
    works = {
        "nothing stated",
        "cp_size, evaluation of whole rows",
        "sp_size, evaluation of whole rows",
        "cp_size, use_group(None)",
        "cp_size, use_group(group)",
        "context_parallel",
        "context_parallel is over",
    }
    answers = ranks_of(2).run(stated_splits_on_rank)
    for option in ("cp_size", "sp_size"):  # The first rank cannot tell.
        assert answers[0].pop(f"{option}, evaluation of a later part") == ""
    for answer in answers:
        assert {name for name, message in answer.items() if not message} == works
        assert re.search("labels must come with shift_labels .*, got None", answer.pop("labels"))
        assert re.match("layers must be all 2 to split .*, got 1", answer.pop("layers"))
        for name in answer.keys() - works:
            message, option = answer[name], name.partition(", ")[0]
            assert re.match(f"{option} of accelerate's .* must be 1 .*, got 2: ", message), message
            assert "use_group" in message, message


def one_document(*args: Any) -> None:
    return None


# Family, config, batch, whether torch balances its load, whether the caller counts targets.
CASES = {
    "llama-rows": ("llama", SMALL, "rows", True, True),
    "qwen3-packed": ("qwen3", INDEPENDENT, "packed", True, True),
    "llama-padded-uncounted": ("llama", INDEPENDENT, "padded", True, False),
    "qwen3-packed-contiguous": ("qwen3", SMALL, "packed", False, True),
    "one-KV-head": ("llama", replace(SMALL, num_kv_heads=1), "rows", True, True),
}


@catches(
    "packed documents joined where a sequence is split",
    "positions of a part are not read for documents",
    Replaced("nsa_dist.adapters.huggingface:_boundaries", one_document),
    case="qwen3-packed",
)
@pytest.mark.parametrize("case", CASES)
def test_context_parallel_of_torch(case: str, ranks_of: GetRanks) -> None:
    """Without a call of use_group: loss and gradients of one process, by the 2x rule."""
    family, config, batch, balanced, counted = CASES[case]
    x64_loss, x64 = batch_gradients(family, config, batch, torch.float64)
    plain_loss, plain = batch_gradients(family, config, batch, torch.float32)
    arguments = (family, config, batch)
    for dtype in (torch.float32, torch.float64):
        options = (dtype, balanced, counted)
        loss, ours = ranks_of(2).run(context_parallel_gradients, *arguments, *options)[0]
        assert ours.keys() == x64.keys()
        for name in x64:
            assert_2x(ours[name], plain[name], x64[name], dtype, name)
        losses = (torch.tensor([x], dtype=torch.float64) for x in (loss, plain_loss, x64_loss))
        ours_loss, plain32, exact = losses
        assert_2x(ours_loss, plain32.float(), exact, torch.float32, "loss")


def _alone(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    from tests.adapters.huggingface.trainer_runs import over_ranks, train

    if torch.cuda.device_count() > 1:  # All of which the Trainer would take.
        return over_ranks(folder, 1, settings)
    return train(settings, folder)


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sp-ZeRO1": (2, {"mode": "sp", "stage": 1, "batch": 1}),
    "sp-ZeRO2-masked": (2, {"mode": "sp", "stage": 2, "rows": "masked", "batch": 1}),
    "sp-ZeRO3-packed": (2, {"mode": "sp", "stage": 3, "rows": "packed", "batch": 1}),
    "sp-flattened": (2, {"mode": "sp", "stage": 2, "rows": "rows", "flatten": True}),
    "sp-one-KV-head": (2, {"mode": "sp", "stage": 2, "batch": 1, "kv_heads": 1}),
    "sp-independent-4-ranks": (4, {"mode": "sp", "stage": 2, "batch": 1, "independent_kv": True}),
    "cp": (2, {"mode": "cp"}),
    "cp-masked-accumulated": (
        2,
        {"mode": "cp", "rows": "masked", "options": {"gradient_accumulation_steps": 2}},
    ),
    "cp-packed": (2, {"mode": "cp", "rows": "packed", "batch": 1}),
    "cp-one-KV-head-4-ranks": (4, {"mode": "cp", "kv_heads": 1}),
    # Whole rows, which no rank takes for parts.
    "DDP": (2, {"mode": "ddp", "batch": 1}),
    "FSDP2": (2, {"mode": "fsdp", "batch": 1, "rows": "packed"}),
    "ZeRO2": (2, {"mode": "zero", "stage": 2, "batch": 1}),
    "ZeRO3": (2, {"mode": "zero", "stage": 3, "batch": 1, "rows": "masked"}),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (HAS_ACCELERATE and HAS_DEEPSPEED), reason="needs accelerate, deepspeed")
@pytest.mark.parametrize("case", RUNS)
def test_runs_of_the_trainer(case: str, tmp_path: Path) -> None:
    """With no line about groups: losses by their rule, weights by the 2x rule."""
    processes, settings = RUNS[case]
    # accelerate gives every sp rank each batch, and DeepSpeed trains on those of all ranks in turn.
    repeats = processes if settings["mode"] == "sp" else 1
    alone = {**settings, "mode": "one", "repeats": repeats}
    if settings["mode"] in ("ddp", "fsdp", "zero"):
        alone["options"] = {"gradient_accumulation_steps": processes}
        # In an evaluation the Trainer divides by the targets of all processes at a time.
        alone["options"]["per_device_eval_batch_size"] = processes
    plain = _alone(tmp_path / "plain", alone)
    exact = _alone(tmp_path / "exact", {**alone, "float64": True})
    from tests.adapters.huggingface.trainer_runs import over_ranks

    found = over_ranks(tmp_path, processes, settings)
    for name in ("losses", "evaluations") if found["evaluations"] else ("losses",):
        ours, one = torch.tensor(found[name]), torch.tensor(plain[name])
        assert ours.shape == one.shape
        assert bool(((ours - one).abs() <= 1e-5 * one.abs()).all()), (name, ours, one)
    assert found["weights"].keys() == exact["weights"].keys()
    for name, x64 in exact["weights"].items():
        assert_2x(found["weights"][name], plain["weights"][name], x64, torch.float32, name)
