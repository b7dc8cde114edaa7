"""Draw docs/figures/speed.svg: the speed relative to dense attention, by length.

    python docs/figures/draw_speed.py

reads docs/benchmarks/h200.csv and writes the figure of the README. Only the standard library is
needed. The colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURED = HERE.parent / "benchmarks" / "h200.csv"
FIGURE = HERE / "speed.svg"

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 690, 80, 264
LOWEST, HIGHEST = 0.4, 8.0
SHAPE = {"heads": "64", "kv_heads": "4", "documents": "1"}
DENSE = {"dense_cudnn": "cuDNN", "dense_flash": "FlashAttention"}
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de }
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .title { font-size: 15px; font-weight: 600 }
    .note { fill: #59636e }
    .grid { stroke: #d0d7de }
    .even { stroke: #59636e; stroke-dasharray: 5 4 }
    .dense_cudnn { stroke: #0757b8; fill: #0757b8 }
    .dense_flash { stroke: #a64500; fill: #a64500 }
    polyline { fill: none !important; stroke-width: 2.5 }
    text.dense_cudnn, text.dense_flash { stroke: none }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d }
      text { fill: #f0f6fc }
      .note { fill: #9198a1 }
      .grid { stroke: #3d444d }
      .even { stroke: #9198a1 }
      .dense_cudnn { stroke: #58a6ff; fill: #58a6ff }
      .dense_flash { stroke: #f0883e; fill: #f0883e }
    }
"""


def ratios(rows: list[dict[str, str]], dense: str) -> dict[int, float]:
    """Time of dense attention over ours, forward and backward together, by tokens."""
    times = {
        (row["operator"], int(row["length"])): float(row["forward_ms"]) + float(row["backward_ms"])
        for row in rows
        if row["operator"] in (dense, "whole") and row["choices"] in ("", "random")
    }
    lengths = sorted(length for operator, length in times if operator == "whole")
    return {length: times[dense, length] / times["whole", length] for length in lengths}


def caption(rows: list[dict[str, str]]) -> str:
    """The figure in words: its title, and the text in its place in the README."""
    parts = []
    for dense, name in DENSE.items():
        curve = ratios(rows, dense)
        ends = (f"{curve[t]:.1f} at {t:,}" for t in (min(curve), max(curve)))
        parts.append(f"over {name} {' and '.join(ends)}")
    return f"Speed relative to dense attention, by tokens: {', '.join(parts)}"


def _y(ratio: float) -> float:
    """Where a ratio lies; the axis is logarithmic."""
    part = math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)
    return BOTTOM - (BOTTOM - TOP) * part


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'  <text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def _line(kind: str, ratio: float) -> str:
    y = f"{_y(ratio):.0f}"
    return f'  <line class="{kind}" x1="{LEFT}" y1="{y}" x2="{RIGHT}" y2="{y}"/>'


def measured() -> list[dict[str, str]]:
    """The rows of docs/benchmarks/h200.csv that the figure shows."""
    with MEASURED.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if SHAPE.items() <= row.items()]


def draw(rows: list[dict[str, str]]) -> str:
    """The figure of these rows, as SVG."""
    curves = {dense: ratios(rows, dense) for dense in DENSE}
    lengths = list(curves["dense_cudnn"])
    x = {
        t: LEFT + 50 + i * (RIGHT - LEFT - 100) / (len(lengths) - 1) for i, t in enumerate(lengths)
    }
    first = rows[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"  <title>{caption(rows)}</title>",
        f"  <style>{STYLE}  </style>",
        f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
        _text(24, 30, "Speed relative to dense attention", "title", "start"),
        _text(24, 50, "attention of one layer, forward and backward", "note", "start"),
    ]
    for ratio in (0.5, 1, 2, 4, 8):
        parts += [
            _line("even" if ratio == 1 else "grid", ratio),
            _text(LEFT - 10, _y(ratio) + 4, f"{ratio:g}x", "note", "end"),
        ]
    parts += [_text(x[t], BOTTOM + 20, f"{t:,}", "note") for t in lengths]
    for number, (dense, name) in enumerate(DENSE.items()):
        curve, above = curves[dense], dense == "dense_flash"
        points = " ".join(f"{x[t]:.0f},{_y(ratio):.1f}" for t, ratio in curve.items())
        parts.append(f'  <polyline class="{dense}" points="{points}"/>')
        for t, ratio in curve.items():
            parts += [
                f'  <circle class="{dense}" cx="{x[t]:.0f}" cy="{_y(ratio):.1f}" r="4"/>',
                _text(
                    x[t] + (0 if above else 14),
                    _y(ratio) + (-11 if above else 18),
                    f"{ratio:.1f}",
                    dense,
                ),
            ]
        parts += [
            f'  <circle class="{dense}" cx="{400 + 120 * number}" cy="26" r="5"/>',
            _text(412 + 120 * number, 30, f"over {name}", dense, "start"),
        ]
    parts += [
        _text((LEFT + RIGHT) / 2, BOTTOM + 38, "tokens in one document", "note"),
        _text(
            24,
            HEIGHT - 10,
            f"{first['gpu']}, {first['dtype']}, {first['heads']} heads in {first['kv_heads']} "
            f"groups of width {first['head_dim']}, torch {first['torch']}, {first['date']}",
            "note",
            "start",
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(draw(measured()), encoding="utf-8")
