"""The benchmark of generation but for its clock, on small sizes without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("transformers")

from launch.bench import generation
from launch.bench.table import read_fields

SMALL = generation.GenerationOptions(
    lengths=(30,),
    batches=(2,),
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    v_head_dim=16,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=20,
    new_tokens=6,
    dtype="float32",
    backend="pytorch",
)
METHODS = ["dense", "dense_compiled", "eager", "graphed"]


class Counting:
    """A meter of a machine on which a call takes as many ms as it generates tokens."""

    device, gpu = torch.device("cpu"), "a clock that counts"

    def milliseconds(self, function: Callable[[], Any]) -> float:
        return float(function().shape[1] - SMALL.lengths[0])


def test_a_run_gives_a_row_of_each_method(tmp_path: Path) -> None:
    options = replace(SMALL, csv=tmp_path / "out.csv")
    rows, wrong = generation.compare(options, Counting())  # type: ignore[arg-type]
    assert wrong == []
    assert [row.method for row in rows] == METHODS
    assert all((row.prompt_ms, row.tokens_per_s) == (1.0, 2000.0) for row in rows)
    assert read_fields(tmp_path / "out.csv", generation.Row) == rows
    assert generation.markdown(rows).splitlines()[2:] == [
        "| prompt | rows | dense | dense, compiled | without graphs | by a CUDA graph |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 30 | 2 | 2,000 | 2,000 | 2,000 (1.00 x) | 2,000 (1.00 x) |",
    ]


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = generation.generate

    def wrong(model: Any, prompt: Any, new: int, **options: Any) -> Any:
        found = right(model, prompt, new, **options)
        if "output_logits" in options and "cache_implementation" in options:
            found.sequences[0, -1] += 1
        return found

    monkeypatch.setattr(generation, "generate", wrong)
    monkeypatch.setattr(generation.tyro, "cli", lambda *_, **__: replace(SMALL, compiled=False))
    monkeypatch.setattr(generation, "Meter", lambda _: Counting())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"graphed, 30 tokens, batch 2: other tokens than"):
        generation.main([])


def test_settings_are_refused_by_name() -> None:
    for options, message in (
        ({"batches": ()}, "batches must be one batch size or more, got "),
        ({"batches": (0,)}, "batches must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"new_tokens": 3}, "new_tokens must be at least 4, .*, got 3"),
        ({"documents": 2}, "documents must be 1: a document for each row, got 2"),
        ({"v_head_dim": 32}, "v_head_dim must be head_dim = 16, .*, got 32"),
        ({"data": "coherent"}, "data must be random, got 'coherent'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **options)
