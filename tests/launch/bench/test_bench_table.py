"""The benchmark's table: ratios, the crossover, CSV, Markdown, the document that shows it."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from launch.bench import decoding, distributed, generation, peers, shapes
from launch.bench.options import Options
from launch.bench.table import (
    Row,
    Shape,
    crossover,
    crossover_text,
    main,
    markdown,
    read_csv,
    read_fields,
    read_rows,
    with_numbers,
    with_ratios,
    write_csv,
)
from nsa_dist.crossover import CROSSOVER

ROOT = Path(__file__).resolve().parents[3]
SHAPE = Shape("a GPU", "bfloat16", 64, 4, 128, 128, 1, 32, 16, 64, 16, 512)
PLACE = {"torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}


def row(operator: str, length: int, forward: float, backward: float | None, **more: object) -> Row:
    return Row(operator, length, "", forward, backward, SHAPE, **PLACE | more)  # type: ignore[arg-type]


def measured(length: int, ours: float, cudnn: float, flash: float | None = None) -> list[Row]:
    """The whole, which takes so long forward and backward together, and dense attention."""
    rows = [row("dense_cudnn", length, cudnn / 4, cudnn * 3 / 4, peak_gib=1.0)]
    if flash is not None:
        rows.append(row("dense_flash", length, flash / 4, flash * 3 / 4))
    rows.append(replace(row("whole", length, ours / 2, ours / 2), choices="random"))
    return rows


def test_the_crossover_lies_on_the_line_between_logarithms() -> None:
    # Ratios 1/2, then 4: a third of the way from 8192 to 65536, which is 16384.
    rows = measured(8192, 20.0, 10.0) + measured(65536, 100.0, 400.0)
    assert crossover(rows) == pytest.approx(16384)
    # In whatever order lengths were run, and whatever the rest is.
    far = measured(131072, 1.0, 100.0) + measured(1024, 100.0, 1.0)
    assert crossover(far + rows[::-1]) == pytest.approx(16384)
    assert crossover_text(rows) == "16,384"
    # Exactly as fast counts as faster.
    assert crossover(measured(8192, 20.0, 10.0) + measured(16384, 30.0, 30.0)) == 16384
    assert crossover(rows, "flash") is None


def test_the_crossover_is_the_last_one() -> None:
    rows = [
        *measured(1000, 2.0, 1.0),
        *measured(2000, 1.0, 2.0),
        *measured(4000, 2.0, 1.0),
        *measured(16000, 1.0, 2.0),
    ]
    assert crossover(rows) == pytest.approx(8000)
    assert crossover(rows[:6]) is None
    assert crossover_text(rows[:6]) == "above 4,000"


def test_where_there_is_no_crossover_the_side_is_told() -> None:
    slower, faster = measured(8192, 20.0, 10.0), measured(8192, 10.0, 20.0)
    assert crossover(slower) is crossover(faster) is None
    assert crossover_text(slower) == "above 8,192"
    assert crossover_text(faster) == "below 8,192"
    assert crossover_text([]) == crossover_text(slower[1:]) == ""


def test_other_shapes_and_recorded_choices_are_not_compared() -> None:
    rows = measured(8192, 20.0, 10.0) + measured(65536, 100.0, 400.0)
    recorded = [replace(r, choices="file layer 0", forward_ms=1.0) for r in rows if r.choices]
    assert crossover(rows + recorded) == pytest.approx(16384)
    other = [replace(r, shape=replace(SHAPE, heads=32, gpu="another")) for r in rows]
    assert with_ratios([rows[0], other[1]])[1].both_over_cudnn is None
    text = markdown(rows + other[:2])
    assert "| a GPU: 64 heads in 4 groups, width 128" in text
    assert "| above 8,192 |" in text and "| 16,384 |" in text


def test_ratios_and_shares_are_filled_in() -> None:
    rows = measured(8192, 40.0, 100.0, flash=120.0)
    rows += [row("compression", 8192, 1.0, 2.0), row("block_selection", 8192, 5.0, None)]
    filled = {r.operator: r for r in with_ratios(rows)}
    whole, compression = filled["whole"], filled["compression"]
    assert (whole.forward_over_cudnn, whole.both_over_cudnn) == (25 / 20, 100 / 40)
    assert (whole.forward_over_flash, whole.both_over_flash) == (30 / 20, 120 / 40)
    # Keys and values are compressed in two calls.
    assert (compression.forward_share, compression.backward_share) == (2 / 20, 4 / 20)
    selection = filled["block_selection"]
    assert (selection.forward_over_cudnn, selection.both_over_cudnn) == (5.0, None)
    assert (selection.forward_share, selection.backward_share) == (0.25, None)
    assert filled["dense_cudnn"].forward_over_cudnn is None


def test_csv_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = with_ratios(
        [
            *measured(8192, 40.0, 100.0),
            row(
                "combine", 8192, 0.5, 1.5, bound="bytes", forward_gbs=3000.0, error=1e-3, limit=0.5
            ),
            row("block_selection", 8192, 5.0, None, forward_tflops=400.0),
        ]
    )
    write_csv(path, rows)
    assert read_csv(path) == rows
    header = path.read_text().splitlines()[0].split(",")
    assert set(header) == {f.name for f in (*fields(Row), *fields(Shape))} - {"shape"}
    for name in ("gpu", "torch", "triton", "commit", "both_over_cudnn", "both_over_flash"):
        assert name in header


def test_files_that_are_no_table_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match=r"csv must be an existing file, got .*table\.csv'"):
        read_csv(path)
    path.write_text("operator,length\nwhole,8192\n")
    with pytest.raises(ValueError, match=r"csv must be a file of .*, got .* line 2 \(KeyError"):
        read_csv(path)
    write_csv(path, measured(8192, 40.0, 100.0))
    good = path.read_bytes()
    for odd, kind in ((b"\xff", "UnicodeDecodeError"), (b'"' + b"9" * 200_000 + b'"', "Error")):
        path.write_bytes(good.replace(b",8192,", b"," + odd + b","))
        with pytest.raises(
            ValueError, match=rf"csv must be a file of .*, got .* line \d+ \({kind}: "
        ):
            read_csv(path)
    path.write_text(good.decode().replace(",8192,", ",many,"))
    with pytest.raises(SystemExit) as error:
        main([str(path)])
    assert str(error.value).startswith("table.py: csv must be a file of ")


def test_the_tables_show_what_was_measured() -> None:
    rows = measured(8192, 40.0, 100.0, flash=120.0) + measured(65536, 1234.0, 10000.0)
    rows.append(
        row("combine", 65536, 0.977, 1.83, bound="bytes", forward_gbs=2750.0, backward_gbs=2930.0)
    )
    rows.append(row("window_attention", 65536, 4.21, 12.8, bound="products", forward_gbs=1.0))
    rows.append(replace(row("selected_attention", 65536, 18.0, 36.0), choices="random"))
    rows.append(replace(row("selected_attention", 65536, 9.0, 20.0), choices="text layer 3"))
    text = markdown(rows)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    by_name = {line[0]: line for line in cells if line}
    assert by_name["8192"][1] == "20.0 / 20.0"
    assert by_name["8192"][4:] == [
        "25.0 / 75.0",
        "1.00",
        "1.25 / 2.50",
        "30.0 / 90.0",
        "",
        "1.50 / 3.00",
    ]
    assert by_name["65536"][4:] == ["2,500 / 7,500", "1.00", "4.05 / 8.10", "", "", ""]
    # The operators at the longest stream only, GB/s where bytes bind.
    assert by_name["combine"][4] == "2,750 / 2,930"
    assert by_name["window attention"][4] == ""
    assert by_name["selected attention, random choices"][1] == "18.0 / 36.0"
    assert by_name["selected attention, text layer 3"][2] == "9.00 / 20.0"
    assert by_name["selected attention, random"][2] == "18.0 / 36.0"
    assert "2026-01-01, commit abc, torch 2, triton 3." in text
    # Ratios 2.5 and 8.1: faster at every length that was measured.
    assert by_name[SHAPE.title()][1] == "below 8,192"
    widths = {len(line) for line in cells if line}
    assert math.prod(widths) > 0


def test_a_document_has_its_numbers_replaced(tmp_path: Path) -> None:
    begin = "<!-- numbers of table.csv: written by launch/bench/table.py -->"
    document = tmp_path / "page.md"
    document.write_text(f"before\n\n{begin}\n\nold\n\n<!-- end of numbers -->\n\nafter\n")
    write_csv(tmp_path / "a.csv", measured(8192, 20.0, 10.0))
    write_csv(tmp_path / "b.csv", measured(65536, 100.0, 400.0))
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    merged = str(tmp_path / "table.csv")
    for _ in range(2):
        main([*files, "--merged", merged, "--docs", str(document)])
    text = document.read_text()
    assert text.startswith(f"before\n\n{begin}\n\n### a GPU")
    assert text.endswith("\n\n<!-- end of numbers -->\n\nafter\n")
    assert "old" not in text and "| 16,384 |" in text
    assert len(read_csv(Path(merged))) == 4
    with pytest.raises(ValueError, match=r"docs must be a document with .*, got one without"):
        with_numbers("no marks", "numbers", "table.csv")


def test_the_documentation_shows_the_measurements_that_are_kept() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    kept = (ROOT / "docs" / "benchmarks").glob("*.csv")
    # Megatron-LM's are on the page of its adapter (test_bench_megatron_lm.py).
    files = sorted(path for path in kept if "megatron" not in path.stem)
    assert files
    for path in files:
        assert with_numbers(document, numbers_of(path), path.name) == document


def numbers_of(path: Path) -> str:
    """The tables of a file, by the program that wrote it."""
    columns = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
    if "prompt_ms" in columns:
        return generation.markdown(read_fields(path, generation.Row))
    if "method" in columns:
        return decoding.markdown(read_fields(path, decoding.Row))
    if "ranks" in columns:
        return distributed.markdown(read_rows(path, distributed.DistributedRow))
    rows = read_csv(path)
    if any(row.operator == peers.PEER for row in rows):
        return peers.markdown(rows)
    return (shapes.markdown if "shapes" in path.stem else markdown)(rows)


def test_the_hint_of_the_layers_is_the_crossover_that_was_measured() -> None:
    rows = read_csv(ROOT / "docs/benchmarks/h200.csv")
    for gpu, tokens in CROSSOVER.items():
        own = [r for r in rows if (r.shape.gpu, r.shape.heads, r.shape.kv_heads) == (gpu, 64, 4)]
        # Level or faster from the shortest length on: the hint speaks of lengths below it.
        found = crossover(own) or min(r.length for r in own)
        assert found == pytest.approx(tokens, rel=0.03)


def test_a_plot_without_matplotlib_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "launch.bench.options.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    with pytest.raises(
        ValueError, match=r"plot must be left out where .*pip install matplotlib\), got "
    ):
        Options(plot=tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_csv(tmp_path / "a.csv", measured(8192, 20.0, 10.0))
    with pytest.raises(SystemExit, match=r"table\.py: .*matplotlib"):
        main([str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")])


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_csv(tmp_path / "a.csv", measured(8192, 20.0, 10.0) + measured(16384, 30.0, 40.0))
    main([str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
