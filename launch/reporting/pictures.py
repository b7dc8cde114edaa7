"""Heat maps and curves as PNG files, with Pillow alone."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PAPER, _INK, _GRID, _EMPTY = (255, 255, 255), (40, 40, 40), (225, 225, 225), (200, 200, 200)
_RAMP = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
"""Colours of 0, 1/2 and 1."""
LINES = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))
"""Colours of curves, in order."""
_SIZE = 15


def check_pictures() -> None:
    """Refuse where Pillow is not installed.

    Raises:
        ValueError: with what to install.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("Pillow must be installed (pip install pillow), got no package PIL")


def shade(value: float) -> tuple[int, int, int]:
    """The colour of a value from 0 to 1; grey for NaN."""
    if math.isnan(value):
        return _EMPTY
    place = min(max(value, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    part = place - low
    pairs = zip(_RAMP[low], _RAMP[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * part) for a, b in pairs)
    return red, green, blue


class _Canvas:
    """A picture with a title, and words at places of pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.font: Any = ImageFont.load_default(_SIZE)
        width = max(width, round(self.font.getlength(title)) + 2 * _SIZE)
        self.image = Image.new("RGB", (width, height), _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.words(_SIZE, _SIZE, title, "la")

    def words(self, x: float, y: float, text: str, anchor: str = "mm", ink: Any = _INK) -> None:
        self.draw.text((x, y), text, fill=ink, font=self.font, anchor=anchor)

    def length(self, texts: Sequence[str]) -> int:
        return max((math.ceil(self.font.getlength(text)) for text in texts), default=0)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.save(path, "PNG")


def _widest(texts: Sequence[str]) -> int:
    return _Canvas(1, 1, "").length(texts)


def heat_map(
    path: Path,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    names: tuple[str, str],
) -> None:
    """A cell for each value from 0 to 1 with its number in it; NaN stays grey.

    Args:
        values: by row, then by column.
        names: of what rows and columns are.
    """
    cell_w, cell_h = max(64, _widest(columns) + 2 * _SIZE), 3 * _SIZE
    left, top = _widest([*rows, names[0]]) + 3 * _SIZE, 5 * _SIZE
    width, height = left + cell_w * len(columns) + _SIZE, top + cell_h * len(rows) + 4 * _SIZE
    canvas = _Canvas(width, height, title)
    canvas.words(_SIZE, top - _SIZE, names[0], "ls")
    for i, row in enumerate(rows):
        canvas.words(left - _SIZE, top + (i + 0.5) * cell_h, row, "rm")
        for j, value in enumerate(values[i]):
            x, y = left + j * cell_w, top + i * cell_h
            canvas.draw.rectangle((x, y, x + cell_w - 2, y + cell_h - 2), fill=shade(value))
            if not math.isnan(value):
                ink = _PAPER if value > 0.6 else _INK
                canvas.words(x + cell_w / 2, y + cell_h / 2, f"{value:.2f}", ink=ink)
    for j, column in enumerate(columns):
        canvas.words(left + (j + 0.5) * cell_w, top + cell_h * len(rows) + _SIZE, column)
    middle = left + cell_w * len(columns) / 2
    canvas.words(middle, top + cell_h * len(rows) + 2.5 * _SIZE, names[1])
    canvas.save(path)


def panels(
    path: Path,
    images: Sequence[tuple[str, Tensor]],
    *,
    columns: int,
    title: str,
    note: str,
) -> None:
    """Pictures of one size side by side, each below its name.

    Args:
        images: names, and float [height, width] values from 0 to 1 each, NaN for grey.
        note: a line at the end.
    """
    from PIL import Image

    height, width = images[0][1].shape
    names = [name for name, _ in images]
    cell_w, cell_h = max(width, _widest(names)) + _SIZE, height + 2 * _SIZE
    rows = -(-len(images) // columns)
    wide = max(columns * cell_w, _widest([note])) + 2 * _SIZE
    canvas = _Canvas(wide, 4 * _SIZE + rows * cell_h + 2 * _SIZE, title)
    ramp = torch.tensor([shade(step / 255) for step in range(256)], dtype=torch.uint8)
    grey = torch.tensor(_EMPTY, dtype=torch.uint8)
    for place, (name, values) in enumerate(images):
        x, y = _SIZE + place % columns * cell_w, 3 * _SIZE + place // columns * cell_h
        canvas.words(x, y + _SIZE, name, "ls")
        empty = values.isnan()
        steps = (values.nan_to_num() * 255).round().clamp(0, 255).long()
        pixels = torch.where(empty[..., None], grey, ramp[steps]).contiguous()
        image = Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
        canvas.image.paste(image, (x, y + round(1.3 * _SIZE)))
    canvas.words(_SIZE, 4 * _SIZE + rows * cell_h, note, "ls")
    canvas.save(path)


def curves(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    names: tuple[str, str],
    size: tuple[int, int] = (640, 320),
) -> None:
    """Curves over a logarithmic x axis, of points with x above 0 that are finite.

    Args:
        names: of x and y.
        size: of the area of the curves, in pixels.
    """
    points = [p for line in lines.values() for p in line if math.isfinite(p[1])]
    xs, ys = [math.log2(x) for x, _ in points] or [0.0], [y for _, y in points] or [0.0]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    left, top = 5 * _SIZE, 5 * _SIZE
    canvas = _Canvas(left + size[0] + 2 * _SIZE, top + size[1] + 4 * _SIZE, title)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log2(x) - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * size[0], top + (1 - up) * size[1]

    for power in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = place(2.0**power, y0)
        canvas.draw.line((x, top, x, top + size[1]), fill=_GRID)
        if power % max(1, round((x1 - x0) / 12)) == 0:
            canvas.words(x, top + size[1] + _SIZE, f"{2**power:,}" if power >= 0 else "")
    for part in range(5):
        y = y0 + (y1 - y0) * part / 4
        _, at = place(2.0**x0, y)
        canvas.draw.line((left, at, left + size[0], at), fill=_GRID)
        canvas.words(left - 6, at, f"{y:.2f}", "rm")
    at = left + 4 * _SIZE
    for (name, line), ink in zip(lines.items(), LINES * (1 + len(lines) // 5), strict=False):
        placed = [place(x, y) for x, y in line if math.isfinite(y)]
        if len(placed) > 1:
            canvas.draw.line(placed, fill=ink, width=2)
        for x, y in placed:
            canvas.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink)
        canvas.words(at, 3.5 * _SIZE, name, "lm", ink)
        at += canvas.length([name]) + 2 * _SIZE
    canvas.words(left + size[0] / 2, top + size[1] + 2.5 * _SIZE, names[0])
    canvas.words(_SIZE / 2, top - 0.7 * _SIZE, names[1], "ls")
    canvas.save(path)
