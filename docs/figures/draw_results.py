"""Draw the figures of docs/results.md and write its tables, and those of a small model.

    python docs/figures/draw_results.py [NUMBERS]
    python docs/figures/draw_results.py --small [NUMBERS]

copies NUMBERS, which launch/reproduce.py wrote, to docs/benchmarks/trained, reads what is there,
writes docs/figures/trained_*.svg, and puts the tables between the marks of docs/results.md. With
--small (as of launch/reproduce.py) these are docs/benchmarks/small, docs/figures/small_*.svg and
docs/training.md. Only the standard library is needed. The colours follow the reader's light or dark
scheme.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NUMBERS = HERE.parent / "benchmarks" / "trained"
DOCUMENT = HERE.parent / "results.md"
SMALL_NUMBERS = HERE.parent / "benchmarks" / "small"
SMALL_DOCUMENT = HERE.parent / "training.md"
BEGIN = "<!-- numbers: written by docs/figures/draw_results.py -->"
END = "<!-- end of numbers -->"

Row = Mapping[str, str]
NAMES = {
    "dense": "dense",
    "nsa": "NSA",
    "hybrid": "every fourth layer dense",
    "stages": "converted in two stages",
    "distilled": "distilled, then all weights",
    "at_once": "converted, all weights at once",
    "dense_more": "dense, trained on",
}
JUDGED = {
    "dense": "dense",
    "nsa": "nsa",
    "hybrid": "hybrid",
    "stage2": "stages",
    "distilled_all": "distilled",
}
"""Runs that are judged, and what they are called in figures."""
CONVERSIONS = {
    "stages": ("stage1", "stage2"),
    "distilled": ("distilled", "distilled_all"),
    "at_once": ("at_once",),
    "dense_more": ("dense_more",),
}
"""By the key of ``NAMES`` runs, one after another, that begin with the dense model's weights."""
CHOOSING = {
    "converted": "as converted: compressors are means",
    "stage1": "first stage by the next byte",
    "distilled": "first stage by distillation",
    "stage2": "two stages, the first by the next byte",
    "distilled_all": "two stages, the first by distillation",
    "at_once": "all weights at once",
}
"""Runs whose choice of blocks is told."""
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de }
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .title { font-size: 15px; font-weight: 600 }
    .note { fill: #59636e }
    .grid { stroke: #d0d7de }
    .dense { stroke: #0757b8; fill: #0757b8 }
    .nsa { stroke: #a64500; fill: #a64500 }
    .hybrid { stroke: #1a7f37; fill: #1a7f37 }
    .stages { stroke: #8250df; fill: #8250df }
    .distilled { stroke: #bf3989; fill: #bf3989 }
    .at_once { stroke: #9a6700; fill: #9a6700 }
    .dense_more { stroke: #59636e; fill: #59636e }
    polyline { fill: none !important; stroke-width: 2 }
    text.name { stroke: none }
    .cell { stroke: none; fill: #0757b8 }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d }
      text { fill: #f0f6fc }
      .note { fill: #9198a1 }
      .grid { stroke: #3d444d }
      .dense { stroke: #58a6ff; fill: #58a6ff }
      .nsa { stroke: #f0883e; fill: #f0883e }
      .hybrid { stroke: #3fb950; fill: #3fb950 }
      .stages { stroke: #bc8cff; fill: #bc8cff }
      .distilled { stroke: #f778ba; fill: #f778ba }
      .at_once { stroke: #d29922; fill: #d29922 }
      .dense_more { stroke: #9198a1; fill: #9198a1 }
      .cell { fill: #58a6ff }
    }
"""


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes.

    Args:
        curves: points (x, y) by the key of ``NAMES``.
        below: what x is.
        dots: whether points are marked.
        log: whether x is logarithmic.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    below: str
    dots: bool = False
    log: bool = False


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'  <text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, from low to high."""
    rough = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(panel: Panel, left: float, width: float, top: float, height: float) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    place: Callable[[float], float] = math.log2 if panel.log else float
    xs, ys = [place(x) for x, _ in points], [y for _, y in points]
    x_low, x_high = (min(xs), max(xs)) if panel.log else (0.0, max(xs) or 1.0)
    y_low, y_high = min(ys), max(ys)
    pad = 0.05 * (y_high - y_low) or 0.1
    y_low, y_high = y_low - pad, y_high + pad

    def at(x: float, y: float) -> tuple[float, float]:
        across = (place(x) - x_low) / (x_high - x_low or 1.0)
        return left + width * across, top + height * (1 - (y - y_low) / (y_high - y_low))

    parts = [_text(left, top - 12, panel.title, "note", "start")]
    for y in _ticks(y_low, y_high):
        _, height_of = at(2**x_low if panel.log else x_low, y)
        line = f'x1="{left:.0f}" y1="{height_of:.1f}" x2="{left + width:.0f}" y2="{height_of:.1f}"'
        parts.append(f'  <line class="grid" {line}/>')
        parts.append(_text(left - 8, height_of + 4, f"{y:.3g}", "note", "end"))
    if panel.log:
        marks = [2.0**power for power in range(math.ceil(x_low), math.floor(x_high) + 1, 2)]
    else:
        marks = _ticks(x_low, x_high)
    for x in marks:
        across, _ = at(x, y_low)
        parts.append(_text(across, top + height + 18, f"{x:,.4g}".replace("e+", "e"), "note"))
    parts.append(_text(left + width / 2, top + height + 38, panel.below, "note"))
    for name, curve in panel.curves.items():
        placed = [at(x, y) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'  <polyline class="{name}" points="{line}"/>')
        if panel.dots:
            parts += [
                f'  <circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed
            ]
    return parts


def _figure(title: str, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 860 {height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"  <title>{title}</title>",
            f"  <style>{STYLE}  </style>",
            f'  <rect class="card" x="0.5" y="0.5" width="859" height="{height - 1:.0f}" rx="6"/>',
            _text(24, 30, title, "title", "start"),
            *parts,
            "</svg>\n",
        ]
    )


def curves_figure(title: str, panels: Sequence[Panel], note: str) -> str:
    """A figure of panels side by side, with the names of the curves above them."""
    parts, x = list[str](), 24.0
    for name in dict.fromkeys(name for panel in panels for name in panel.curves):
        parts.append(f'  <circle class="{name}" cx="{x + 5:.0f}" cy="52" r="5"/>')
        parts.append(_text(x + 16, 56, NAMES[name], "name", "start"))
        x += 40 + 7.0 * len(NAMES[name])
    width = (860 - 90 * len(panels)) / len(panels)
    for number, panel in enumerate(panels):
        parts += _panel(panel, 64 + number * (width + 84), width, 96, 230)
    return _figure(title, 404, [*parts, _text(24, 392, note, "note", "start")])


def maps_figure(title: str, rows: Sequence[Row], note: str) -> str:
    """A heat map of the answer's loss for each model: depths down, lengths across."""
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    low, high = min(losses), max(losses)
    parts = list[str]()
    models = [name for name in JUDGED if any(row["run"] == name for row in rows)]
    width = (860 - 60 - 30 * len(models)) / len(models)
    for number, model in enumerate(models):
        own = [row for row in rows if row["run"] == model]
        lengths = sorted({int(row["length"]) for row in own})
        depths = sorted({float(row["depth"]) for row in own})
        left, across, down = 60 + number * (width + 30), width / len(lengths), 34
        parts.append(_text(left, 62, NAMES[JUDGED[model]], "note", "start"))
        for row in own:
            x = left + across * lengths.index(int(row["length"]))
            y = 74 + down * depths.index(float(row["depth"]))
            if row["loss"]:
                part = (high - float(row["loss"])) / (high - low or 1.0)
                box = f'x="{x:.1f}" y="{y}" width="{across - 2:.1f}" height="{down - 2}"'
                parts.append(f'  <rect class="cell" opacity="{0.1 + 0.6 * part:.2f}" {box}/>')
                parts.append(_text(x + across / 2 - 1, y + 21, f"{float(row['loss']):.2f}"))
        for length in lengths:
            x = left + across * (lengths.index(length) + 0.5)
            parts.append(_text(x, 92 + down * len(depths), f"{length / 1024:g}K", "note"))
        if not number:
            for depth in depths:
                parts.append(
                    _text(52, 95 + down * depths.index(depth), f"{depth:g}", "note", "end")
                )
    return _figure(title, 310, [*parts, _text(24, 296, note, "note", "start")])


@dataclass(frozen=True)
class Numbers:
    """What launch/reproduce.py wrote."""

    about: Mapping[str, Any]
    curves: Sequence[Row]
    validation: Sequence[Row]
    positions: Sequence[Row]
    choice: Sequence[Row]
    needle: Sequence[Row]
    multi_needle: Sequence[Row]

    def of(self, rows: Sequence[Row], run: str) -> list[Row]:
        return [row for row in rows if row["run"] == run]

    @property
    def trained(self) -> list[str]:
        """The models that were trained from drawn weights, to the end."""
        return [name for name in ("dense", "nsa", "hybrid") if self.has_ended(name)]

    def has_ended(self, run: str) -> bool:
        return self.about["runs"].get(run, {}).get("validation_loss") is not None

    @property
    def note(self) -> str:
        about = self.about
        versions = f"torch {about['torch']}, Triton {about['triton']}"
        where = "CPU, float32" if about["gpu"] == "none" else f"{about['gpu']}, bfloat16"
        return f"{where}, {versions}, {about['date']}"


def read_numbers(folder: Path = NUMBERS) -> Numbers:
    """The files of a folder."""

    def rows(name: str) -> list[Row]:
        path = folder / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    about = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    names = ("curves", "validation", "loss", "choice", "needle", "multi_needle")
    return Numbers(about, *(rows(name) for name in names))


def conversion_curves(numbers: Numbers) -> dict[str, list[tuple[float, float]]]:
    """Validation loss less that of the dense model, by tokens as per cent of the dense model's."""
    found = dict[str, list[tuple[float, float]]]()
    if not numbers.has_ended("dense"):
        return found
    dense = numbers.about["runs"]["dense"]
    for name, runs in CONVERSIONS.items():
        points, before = list[tuple[float, float]](), 0
        for run in runs:
            rows = numbers.of(numbers.validation, run)
            for row in rows[1:] if points else rows:
                share = 100 * (before + int(row["tokens"])) / dense["tokens"]
                points.append((share, float(row["loss"]) - dense["validation_loss"]))
            before += numbers.about["runs"].get(run, {}).get("tokens", 0)
        if points:
            found[name] = points
    return found


def figures(numbers: Numbers) -> dict[str, str]:
    """SVG by the names of files."""
    found = dict[str, str]()
    by_tokens, by_time = dict[str, Any](), dict[str, Any]()
    for name in numbers.trained:
        first = numbers.about["runs"][name]["steps"] / 10
        rows = [row for row in numbers.of(numbers.curves, name) if int(row["step"]) > first]
        by_tokens[name] = [(int(row["tokens"]) / 1e6, float(row["loss"])) for row in rows]
        by_time[name] = [(float(row["seconds"]), float(row["loss"])) for row in rows]
    if numbers.trained:
        panels = (
            Panel("by tokens", by_tokens, "million tokens"),
            Panel("by time", by_time, "seconds of training"),
        )
        title = "Training loss after a tenth of the steps, nats a byte, mean of ten steps"
        found["trained_loss"] = curves_figure(title, panels, numbers.note)
    by_place = {
        JUDGED[run]: [(int(row["context_from"]), float(row["loss"])) for row in rows]
        for run in JUDGED
        if (rows := [row for row in numbers.of(numbers.positions, run) if int(row["targets"]) > 99])
    }
    if by_place:
        title = "Loss by position in documents held apart, nats a byte"
        panel = Panel("", by_place, "bytes before (first of a span that doubles)", True, True)
        found["trained_positions"] = curves_figure(title, [panel], numbers.note)
    for name, rows in (("needle", numbers.needle), ("multi_needle", numbers.multi_needle)):
        if rows:
            what = "a hidden number" + (" among three others" if name == "multi_needle" else "")
            title = f"Loss of {what}, nats a byte: depth down, length across"
            found[f"trained_{name}"] = maps_figure(title, rows, numbers.note)
    return found | conversion_figure(numbers, "trained_conversion")


def conversion_figure(numbers: Numbers, name: str) -> dict[str, str]:
    """The figure of ``conversion_curves``, if there are any."""
    gaps = conversion_curves(numbers)
    if not gaps:
        return {}
    title = "From dense to sparse: validation loss less the dense model's, nats a byte"
    panel = Panel("", gaps, "tokens, per cent of the dense model's", True)
    return {name: curves_figure(title, [panel], numbers.note)}


def small_figures(numbers: Numbers) -> dict[str, str]:
    """``figures`` of a small model."""
    return conversion_figure(numbers, "small_conversion")


def conversion_table(numbers: Numbers) -> list[str]:
    """Of each of ``conversion_curves`` the beginning and the end of each of its runs."""
    lines = ["| | tokens, % of dense's | validation loss less dense's |", "|---|---|---|"]
    dense = numbers.about["runs"]["dense"]
    for name, points in conversion_curves(numbers).items():
        ends, done = [points[0]], 0
        for run in CONVERSIONS[name]:
            about = numbers.about["runs"].get(run, {})
            if about.get("validation_loss") is not None:
                done += about["tokens"]
                gap = about["validation_loss"] - dense["validation_loss"]
                ends.append((100 * done / dense["tokens"], gap))
        for share, gap in ends:
            lines.append(f"| {NAMES[name]} | {share:.2f} | {gap:+.4f} |")
    return [*lines, ""]


def choice_table(numbers: Numbers) -> list[str]:
    """How much of dense attention chosen blocks hold, the mean over layers; empty without rows."""
    heads = ("dense attention in the chosen blocks", "in the best ones")
    heads += ("divergence of scores, nats", "distance of outputs")
    lines = [f"| held-out documents | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name, title in CHOOSING.items():
        rows = numbers.of(numbers.choice, name)
        if rows:
            columns = ("captured", "best", "choice", "output")
            means = [sum(float(row[column]) for row in rows) / len(rows) for column in columns]
            shown = " | ".join(f"{mean:.4f}" for mean in means)
            lines.append(f"| {title} | {shown} |")
    return [*lines, ""] if len(lines) > 2 else []


def small_tables(numbers: Numbers) -> str:
    """The generated part of docs/training.md, without its marks."""
    runs, data = numbers.about["runs"], numbers.about["data"]
    dense = runs["dense"]
    text = (
        f"{numbers.note}. The dense model: {dense['parameters']:,} weights, {dense['tokens']:,} "
        f"tokens of {data['training']['tokens']:,} bytes, streams of {dense['length']:,}, "
        f"validation loss {dense['validation_loss']:.4f} nats a byte."
    )
    picture = "![Loss gap to dense by tokens](figures/small_conversion.svg)"
    tables = [*conversion_table(numbers), picture, "", *choice_table(numbers)]
    return "\n".join([text, "", *tables])


def tables(numbers: Numbers) -> str:
    """The generated part of docs/results.md, without its marks."""
    runs, data = numbers.about["runs"], numbers.about["data"]
    text = (
        f"{numbers.note}. Text: {data['training']['tokens']:,} bytes in "
        f"{data['training']['documents']:,} documents to train on, "
        f"{data['validation']['tokens']:,} bytes for validation."
    )
    lines = [
        text,
        "",
        "| | weights | tokens | seconds | tokens/s | peak memory | validation loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in numbers.trained:
        run = runs[name]
        lines.append(
            f"| {NAMES[name]} | {run['parameters']:,} | {run['tokens']:,} | {run['seconds']:.0f} | "
            f"{run.get('tokens_per_second', 0):,} | {run['peak_memory'] / 2**30:.1f} GiB | "
            f"{run['validation_loss']:.4f} |"
        )
    lines.append("")
    drawn = figures(numbers)
    for name, alternative in (
        ("trained_loss", "Training loss by tokens and by time"),
        ("trained_positions", "Loss by position"),
        ("trained_needle", "Loss of a hidden number"),
        ("trained_multi_needle", "Loss of a hidden number among others"),
    ):
        if name in drawn:
            lines += [f"![{alternative}](figures/{name}.svg)", ""]
    starts = [name for name in runs if name.startswith("start_") and numbers.has_ended("dense")]
    if conversion_curves(numbers):
        lines += ["### From dense to sparse", "", *conversion_table(numbers)]
        lines += ["![Loss gap to dense by tokens](figures/trained_conversion.svg)", ""]
        lines += choice_table(numbers)
    if starts:
        lines += ["First gates, before any training:", ""]
        lines += ["| run of `launch/reproduce.py` | validation loss less dense's |", "|---|---|"]
        dense = runs["dense"]["validation_loss"]
        for name in [*starts, "stage1"]:
            for first in numbers.of(numbers.validation, name)[:1]:
                lines.append(f"| `{name}` | {float(first['loss']) - dense:+.4f} |")
        lines.append("")
    timed = {name: run["tokens_per_second"] for name, run in runs.items() if run["steps"] > 1}
    pairs = {
        name: name.replace("dense", "nsa") for name in timed if name.startswith("speed_dense_")
    }
    speeds = [name for name, other in pairs.items() if other in timed]
    if speeds:
        lines += ["### Speed by length", "", "| tokens of a document | dense, tokens/s | NSA |"]
        lines.append("|---|---|---|")
        for name in sorted(speeds, key=lambda name: runs[name]["length"]):
            dense_rate, rate = timed[name], timed[pairs[name]]
            lines.append(f"| {runs[name]['length']:,} | {dense_rate:,} | {rate:,} |")
        lines.append("")
    return "\n".join(lines)


def document(text: str, generated: str) -> str:
    """The document with generated tables between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{generated}\n{END}{after}"


def main(words: Sequence[str]) -> None:
    small = "--small" in words
    folder, page = (SMALL_NUMBERS, SMALL_DOCUMENT) if small else (NUMBERS, DOCUMENT)
    for given in words:
        if given != "--small":
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path(given).iterdir()):
                if file.read_text(encoding="utf-8").strip():  # Not one without rows.
                    shutil.copy(file, folder / file.name)
    numbers = read_numbers(folder)
    drawn = small_figures(numbers) if small else figures(numbers)
    for name, figure in drawn.items():
        (HERE / f"{name}.svg").write_text(figure, encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    generated = small_tables(numbers) if small else tables(numbers)
    page.write_text(document(text, generated), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
