"""The programs for trained models on a GPU: what they give on the CPU, and their defaults."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.options import first_bad_choice
from launch.evaluate import EvaluateOptions
from launch.evaluate import run as evaluate
from launch.generate import GenerateOptions
from launch.generate import run as generate
from launch.inspect_attention import InspectOptions
from launch.inspect_attention import run as inspect
from launch.settings import Settings
from tests.launch.common import tiny
from tests.launch.trained import KINDS, write_run

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {
    "head_dim": 32,
    "compress_block": 16,
    "compress_stride": 16,
    "select_block": 32,
    "num_selected": 4,
    "window": 64,
}


def settings_of(root: Path, kind: str) -> Settings:
    """One of ``KINDS`` in sizes that kernels have."""
    table = {section: dict(options) for section, options in KINDS[kind].items()}
    table["attention"] = {**table.get("attention", {}), **SIZES}
    return tiny(root, **table, run={"dtype": "auto", "device": "auto"})


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_the_cpu(root: Path, tmp_path: Path, kind: str) -> None:
    write_run(tmp_path, settings_of(root, kind))
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "dtype": "float32"}
    prompt = "red green blue window " * 20
    texts = [
        generate(
            GenerateOptions(tmp_path, prompt=prompt, device=device, **options),
            lambda _: None,
            lambda _: None,
        )
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_the_inside_is_that_of_the_cpu(root: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", settings_of(root, "nsa"))
    (tmp_path / "text").write_text("red green blue window " * 40)
    options: dict[str, Any] = {"dtype": "float32", "out": tmp_path / "out"}
    cpu, cuda = (
        inspect(
            InspectOptions(tmp_path / "run", tmp_path / "text", device=device, **options),
            lambda _: None,
        )
        for device in ("cpu", "cuda")
    )
    # Scores that differ in their last bits may choose another block: a legal one.
    attention = settings_of(root, "nsa").attention
    for selected in cuda.selected.to(torch.int32):
        assert first_bad_choice(selected, attention) is None
    # Those of the first layer see no choice before them.
    torch.testing.assert_close(cpu.gates[0], cuda.gates[0], rtol=1e-4, atol=1e-4)
    assert math.isclose(cpu.loss, cuda.loss, rel_tol=1e-3)


@pytest.mark.parametrize("kind", ["nsa", "hybrid", "dense"])
def test_a_model_is_judged_in_bfloat16(root: Path, tmp_path: Path, kind: str) -> None:
    write_run(tmp_path / "run", settings_of(root, kind))
    out = tmp_path / "out"
    options: dict[str, Any] = {"lengths": (2048,), "depths": (0.5,), "samples": 1, "out": out}
    evaluate(EvaluateOptions(tmp_path / "run", **options), lambda _: None)
    for name in ("needle", "multi_needle", "ruler"):
        with (out / f"{name}.csv").open(encoding="utf-8") as file:
            assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(file))
