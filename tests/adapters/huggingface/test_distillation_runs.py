"""Distillation by transformers' Trainer over processes: losses and weights of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

RUNS: dict[str, dict[str, Any]] = {
    "DDP": {"mode": "ddp"},
    "DDP-checkpointed": {"mode": "ddp", "options": {"gradient_checkpointing": True}},
    "FSDP2": {"mode": "fsdp", "fsdp": {"cpu_ram_efficient_loading": False}},
    "FSDP2-one-rank-loads": {"mode": "fsdp", "fsdp": {"cpu_ram_efficient_loading": True}},
    "FSDP2-checkpointed": {
        "mode": "fsdp",
        "fsdp": {"cpu_ram_efficient_loading": True, "activation_checkpointing": True},
    },
    "FSDP2-checkpointed-by-transformers": {
        "mode": "fsdp",
        "options": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    },
    "FSDP2-one-unit": {"mode": "fsdp", "fsdp": {"auto_wrap_policy": "NO_WRAP"}},
    "ZeRO1": {"mode": "zero", "stage": 1},
    "ZeRO2": {"mode": "zero", "stage": 2},
    "ZeRO3": {"mode": "zero", "stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
}
"""By what the Trainer is told; ZeRO 3 keeps small weights whole by default."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (HAS_ACCELERATE and HAS_DEEPSPEED), reason="needs accelerate, deepspeed")
@pytest.mark.parametrize("case", RUNS)
def test_distillation_over_processes(case: str, tmp_path: Path) -> None:
    """As one process that accumulates the batches of both; new weights alone move."""
    from tests.adapters.huggingface.trainer_runs import build, over_ranks, train

    settings = {"distil": True, "rate": 0.5, "batch": 1, **RUNS[case]}
    options = settings.get("options", {})
    batches = 2 * options.get("gradient_accumulation_steps", 1)
    alone = {**settings, "mode": "one", "options": {"gradient_accumulation_steps": batches}}
    expected = train(alone, tmp_path / "alone")
    found = over_ranks(tmp_path, 2, settings)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0.0)
    if found["evaluations"]:
        evaluations = expected["evaluations"]
        torch.testing.assert_close(found["evaluations"], evaluations, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-7)
    start = dict(build(settings).named_parameters())
    for name, weight in found["weights"].items():
        new = "self_attn.gate." in name or "compressor." in name
        assert new != torch.equal(weight, start[name]), name
