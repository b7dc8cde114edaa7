"""The comparison over groups of heads and widths, but for its clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy")

from torch.nn.attention import SDPBackend

from launch.bench import compare, operators, shapes
from launch.bench.table import read_csv
from tests.launch.bench.test_bench import SMALL, NoClock

SIZES = ("lengths", "compress_block", "compress_stride", "select_block", "num_selected")


def options_of(**options: object) -> shapes.ShapesOptions:
    values = {name: getattr(SMALL, name) for name in (*SIZES, "window", "dtype", "backend")}
    values |= {"shapes": ("4/4/16/16", "4/2/16/24")}
    return shapes.ShapesOptions(**(values | options))  # type: ignore[arg-type]


def test_every_shape_has_a_ratio_on_both_kinds_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a CPU has.
    monkeypatch.setitem(operators.BACKENDS, "cudnn", SDPBackend.MATH)
    csv = tmp_path / "out.csv"
    rows, wrong = shapes.compare(options_of(csv=csv), NoClock())  # type: ignore[arg-type]
    assert wrong == []
    found = [(row.shape.kv_heads, row.shape.data, row.operator) for row in rows]
    assert found == [
        (groups, kind, name)
        for groups in (4, 2)
        for kind in ("random", "coherent")
        for name in ("dense_cudnn", "whole")
    ]
    assert all(row.error is None or row.error < 1e-4 for row in rows)
    text = shapes.markdown(read_csv(csv))
    assert "| 4 / 4, 16 / 16 | random | 1.00 / 1.00 | below 90 |" in text
    assert "| 4 / 2, 16 / 24 | coherent | 1.00 / 1.00 | below 90 |" in text


def test_a_wrong_result_is_told_with_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators.BACKENDS, "cudnn", SDPBackend.MATH)
    monkeypatch.setattr(compare, "Meter", lambda _: NoClock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shapes.tyro, "cli", lambda *_, **__: options_of(shapes=("4/4/16/16",)))
    judge = "launch.bench.judges.Verdict.right"
    monkeypatch.setattr(judge, property(lambda _: False))
    with pytest.raises(
        SystemExit, match=r"shapes.py: wrong .*\n.*4 heads in 4 groups.*90 tokens: error"
    ):
        shapes.main([])


def test_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="shapes must be four integers H/G/Dk/Dv, got '4/2/16'"):
        options_of(shapes=("4/2/16",))
    with pytest.raises(ValueError, match=r"kinds must be .*, got 'recorded'"):
        options_of(kinds=("recorded",))
