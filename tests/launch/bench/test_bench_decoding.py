"""The benchmark of decoding but for its clock, on small sizes without a GPU."""

from __future__ import annotations

import csv
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("triton")

from torch.nn.attention import SDPBackend

from launch.bench import decoding
from launch.bench.table import read_fields
from tests.launch.bench.test_bench import NoClock

SMALL = decoding.DecodingOptions(
    lengths=(60, 70),
    batches=(1, 2),
    heads=2,
    kv_heads=1,
    head_dim=16,
    v_head_dim=16,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=20,
    dtype="float32",
    graphs=False,
)
METHODS = ["dense", "dense_grouped", "few", "operators"]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention as a CPU has it, and no package that needs a GPU."""
    for name in ("dense", "dense_grouped"):
        method = functools.partialmethod(getattr(decoding.Problem, name), SDPBackend.MATH)
        monkeypatch.setattr(decoding.Problem, name, method)
    monkeypatch.setattr(decoding, "find_spec", lambda _: None)


def test_a_run_gives_a_row_of_each_method(tmp_path: Path) -> None:
    options = replace(SMALL, lengths=(60,), batches=(2,), csv=tmp_path / "out.csv")
    rows, wrong = decoding.compare(options, NoClock())  # type: ignore[arg-type]
    assert wrong == []
    assert [row.method for row in rows] == METHODS
    assert all(row.milliseconds == decoding.best_dense(rows, row) == 2.0 for row in rows)
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == METHODS
    assert read_fields(tmp_path / "out.csv", decoding.Row) == rows


def test_a_table_says_how_much_faster_than_the_best_dense() -> None:
    row = decoding.Row("dense", 4096, 16, 64, 4, "bfloat16", True, 3.0, 0.0, 1.0, "a GPU")
    few = replace(row, method="few", milliseconds=0.5)
    rows = [row, few, replace(row, batch=1)]
    assert decoding.markdown(rows).splitlines()[2:] == [
        "| tokens | rows | FlashAttention | kernels for few queries |",
        "| --- | ---: | ---: | ---: |",
        "| 4,096 | 16 | 3.00 | 0.500 (6.00 x) |",
        "| 4,096 | 1 | 3.00 |  |",
    ]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoding.Problem.few
    monkeypatch.setattr(
        decoding.Problem, "few", lambda self: (1.01 * right(self)[0], right(self)[1])
    )
    monkeypatch.setattr(decoding, "methods", lambda problem: {"few": problem.few})
    monkeypatch.setattr(decoding.tyro, "cli", lambda *_, **__: replace(SMALL, batches=(1,)))
    monkeypatch.setattr(decoding, "Meter", lambda _: NoClock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"few, 60 tokens, batch 1: error .*\n.*few, 70 tokens"):
        decoding.main([])


def test_settings_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"batches": ()}, "batches must be one batch size or more, got "),
        ({"batches": (0,)}, "batches must be at least 1, got 0"),
        ({"documents": 2}, "documents must be 1: a document for each row, got 2"),
        ({"independent_kv": True}, "independent_kv must be False: .*, got True"),
        ({"data": "coherent"}, "data must be random, got 'coherent'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **options)
    monkeypatch.setattr(decoding, "attend_few", lambda _: None)
    monkeypatch.setattr(decoding, "methods", lambda problem: {"few": problem.few})
    with pytest.raises(ValueError, match=r"backend must be one with kernels .*, got triton"):
        decoding.compare(SMALL, NoClock())  # type: ignore[arg-type]
