"""Time the whole attention beside dense attention over groups of heads and widths.

    python launch/bench/shapes.py --shapes 32/32/128/128 64/4/128/128 --csv shapes.csv

A shape is H/G/Dk/Dv: query heads, KV heads, width of queries and keys, width of values. Blocks are
compressed by their mean and the branches share keys and values, as in peers.py. Data are random and
coherent (``stream.py``). Dense attention runs on cuDNN's kernels, or on FlashAttention's where
cuDNN has none for the widths. Ours is checked against float64 before it is timed; where it is
wrong, the program ends with status 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tyro

from launch.bench.compare import beside_dense, compare_streams, run_program
from launch.bench.meter import Meter
from launch.bench.options import DATA, Sizes, check_docs
from launch.bench.table import (
    DENSE,
    Row,
    Shape,
    crossover_text,
    described,
    find,
    pair,
    table,
    with_ratios,
)
from nsa_dist.checks import as_choice, check

SHAPES = (
    *("32/32/128/128", "32/16/128/128", "32/8/128/128", "64/8/128/128", "64/4/128/128"),
    *("64/2/128/128", "64/4/192/128"),
)


@dataclass(frozen=True)
class ShapesOptions(Sizes):
    """Time the whole attention beside dense attention over groups of heads and widths.

    Args:
        shapes: H/G/Dk/Dv each; takes the place of heads, kv_heads, head_dim and v_head_dim.
        kinds: data to run on, of random and coherent; takes the place of ``data``.
        docs: document that gets the table, between its marks for the file of ``csv``.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    lengths: tuple[int, ...] = (16384, 32768, 65536)
    shapes: tuple[str, ...] = SHAPES
    kinds: tuple[str, ...] = DATA
    docs: Path | None = None
    compress: str = "mean"
    independent_kv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            parts = shape.split("/")
            right = len(parts) == 4 and all(x.isdecimal() for x in parts)
            check(right, "shapes", shape, "four integers H/G/Dk/Dv")
        for kind in self.kinds:
            as_choice("kinds", kind, DATA)
        check_docs(self.docs, self.csv)
        _ = [*self.each()]

    def each(self) -> list[ShapesOptions]:
        """Options of one shape and kind of data each."""
        found = []
        for shape in self.shapes:
            heads, kv_heads, head_dim, v_head_dim = map(int, shape.split("/"))
            one = replace(self, shapes=(), heads=heads, kv_heads=kv_heads)
            one = replace(one, head_dim=head_dim, v_head_dim=v_head_dim)
            found += [replace(one, data=kind) for kind in self.kinds]
        return found


def compare(options: ShapesOptions, meter: Meter) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results. Prints and writes each row."""
    variants = [(one, length) for one in options.each() for length in one.lengths]
    return compare_streams(variants, beside_dense, meter, options.csv)


def markdown(rows: Sequence[Row]) -> str:
    """How many times as fast as dense attention each shape is, by data and length."""
    rows = with_ratios(rows)
    lengths = sorted({row.length for row in rows})
    head = ["heads / groups, widths", "data", *(f"{x:,} tokens" for x in lengths), "faster from"]
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == shape]
        name = next(name for name in DENSE if any(row.operator == f"dense_{name}" for row in own))
        cells = [_ratio(own, shape, length, name) for length in lengths]
        widths = f"{shape.heads} / {shape.kv_heads}, {shape.head_dim} / {shape.v_head_dim}"
        beside = "" if name == "cudnn" else f", beside {DENSE[name]}"
        lines.append([widths, shape.data + beside, *cells, crossover_text(own, name)])
    return f"{rows[0].shape.gpu}. {described(rows)}\n\n{table(head, lines)}\n"


def _ratio(rows: Sequence[Row], shape: Shape, length: int, dense: str) -> str:
    row = find(rows, Row("", length, "", 0.0, None, shape), "whole", "random")
    if row is None:
        return ""
    return pair(getattr(row, f"forward_over_{dense}"), getattr(row, f"both_over_{dense}"))


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(ShapesOptions, args=arguments)
    run_program("shapes.py", options, lambda meter: compare(options, meter), markdown, options.docs)


if __name__ == "__main__":
    main()
