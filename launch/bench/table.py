"""The measurements of the benchmarks as CSV, Markdown and a plot.

    python launch/bench/table.py FILE.csv [FILE.csv ...] [--docs docs/benchmarks.md]

prints the Markdown tables of measurements, or puts them into a document between its two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, TypeVar

import tyro

from launch.bench.options import OPERATORS
from nsa_dist.checks import check

DENSE = {"cudnn": "cuDNN", "flash": "FlashAttention"}
"""torch's kernels of dense attention; their rows are called dense_cudnn and dense_flash."""
BEGIN, END = "<!-- numbers of {}: written by launch/bench/table.py -->", "<!-- end of numbers -->"


@dataclass(frozen=True)
class Shape:
    """What was run and where: rows of equal shapes can be compared."""

    gpu: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    documents: int
    compress_block: int
    compress_stride: int
    select_block: int
    num_selected: int
    window: int
    compress: str = "mlp"
    independent_kv: bool = True
    data: str = "random"

    def title(self) -> str:
        groups = "one group" if self.kv_heads == 1 else f"{self.kv_heads} groups"
        widths = f"width {self.head_dim}"
        if self.v_head_dim != self.head_dim:
            widths = f"widths {self.head_dim} and {self.v_head_dim}"
        documents = "one document" if self.documents == 1 else f"{self.documents} documents"
        if self.compress != "mlp":
            documents += f", compression by {self.compress}"
        if not self.independent_kv:
            documents += ", shared keys and values"
        if self.data != "random":
            documents += f", {self.data} data"
        return (
            f"{self.gpu}: {self.heads} heads in {groups}, {widths}, {self.dtype}, "
            f"l{self.compress_block} d{self.compress_stride} l'{self.select_block} "
            f"n{self.num_selected} w{self.window}, {documents}"
        )


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        operator: of ``OPERATORS``, or dense_cudnn or dense_flash.
        length: tokens.
        choices: the source of the chosen blocks, or "" where it does not matter.
        forward_ms, backward_ms: medians; backward is None without a backward.
        forward_tflops, backward_tflops: useful TFLOP/s, None for what multiplies nothing.
        forward_gbs, backward_gbs: GB/s if each input and output is moved once.
        bound: what the floor of the operator is of, products or bytes.
        forward_of_floor, backward_of_floor: the floor's time over the measured one.
        peak_gib: largest memory of one forward and backward over the inputs.
        error, limit: of the check before it was timed; None for dense attention.
        forward_over_*, both_over_*: time of dense attention over this one's, forward, and forward
            and backward.
        forward_share, backward_share: of the whole attention's time; all its calls together.
        matmul_tflops, copy_tbs: what this GPU was measured to reach.
    """

    operator: str
    length: int
    choices: str
    forward_ms: float
    backward_ms: float | None
    shape: Shape
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    forward_gbs: float | None = None
    backward_gbs: float | None = None
    bound: str = ""
    forward_of_floor: float | None = None
    backward_of_floor: float | None = None
    peak_gib: float | None = None
    error: float | None = None
    limit: float | None = None
    forward_over_cudnn: float | None = None
    both_over_cudnn: float | None = None
    forward_over_flash: float | None = None
    both_over_flash: float | None = None
    forward_share: float | None = None
    backward_share: float | None = None
    matmul_tflops: float | None = None
    copy_tbs: float | None = None
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    @property
    def both_ms(self) -> float:
        return self.forward_ms + (self.backward_ms or 0.0)


def find(rows: Iterable[Row], like: Row, operator: str, choices: str = "") -> Row | None:
    """The last measurement of that operator at the length and shape of ``like``."""
    found = [
        row
        for row in rows
        if (row.operator, row.choices, row.length, row.shape)
        == (operator, choices, like.length, like.shape)
    ]
    return found[-1] if found else None


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with ratios to dense attention and shares of the whole attention filled in."""
    filled = []
    for row in rows:
        values: dict[str, float] = {}
        for name in DENSE:
            dense = find(rows, row, f"dense_{name}")
            if dense is None or row.operator not in OPERATORS:
                continue
            values[f"forward_over_{name}"] = dense.forward_ms / row.forward_ms
            if row.backward_ms is not None:
                values[f"both_over_{name}"] = dense.both_ms / row.both_ms
        whole = find(rows, row, "whole", row.choices or "random")
        if whole is not None and row.operator in OPERATORS:
            calls = 2 if row.operator == "compression" else 1  # Keys and values.
            values["forward_share"] = calls * row.forward_ms / whole.forward_ms
            if row.backward_ms is not None and whole.backward_ms:
                values["backward_share"] = calls * row.backward_ms / whole.backward_ms
        filled.append(replace(row, **values))  # type: ignore[arg-type]
    return filled


def crossover(rows: Sequence[Row], dense: str = "cudnn") -> float | None:
    """Tokens from which the whole attention, forward and backward, is faster than dense.

    Between the two measured lengths where that changes, the logarithm of the ratio is taken to be
    linear in the logarithm of the length. None where the rows do not show a change for the better;
    ``crossover_text`` says which side they are on.

    Args:
        rows: of one shape; of each length the whole attention on its own choices is used.
    """
    ratios = _ratios(rows, dense)
    found = None
    for (short, below), (long, above) in itertools.pairwise(ratios):
        if below < 1 <= above:
            part = math.log(below) / (math.log(below) - math.log(above))
            found = short * (long / short) ** part
        elif above < 1:
            found = None
    return found


def _ratios(rows: Sequence[Row], dense: str) -> list[tuple[int, float]]:
    """(length, dense time over ours), by length."""
    found = {}
    for row in rows:
        other = find(rows, row, f"dense_{dense}")
        if (row.operator, row.choices) == ("whole", "random") and other is not None:
            found[row.length] = other.both_ms / row.both_ms
    return sorted(found.items())


def crossover_text(rows: Sequence[Row], dense: str = "cudnn") -> str:
    """The crossover in words, or "" if there is nothing to compare."""
    ratios, tokens = _ratios(rows, dense), crossover(rows, dense)
    if not ratios:
        return ""
    if tokens is not None:
        return f"{tokens:,.0f}"
    faster = ratios[-1][1] >= 1
    return f"below {ratios[0][0]:,}" if faster else f"above {ratios[-1][0]:,}"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row, all of one class; what was not measured is empty."""
    kind = type(rows[0]) if rows else Row
    names = [f.name for f in fields(kind) if f.name != "shape"]
    names += [f.name for f in fields(Shape)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            values |= values.pop("shape")
            for name, value in values.items():
                if isinstance(value, float):
                    values[name] = f"{value:.5g}"
            writer.writerow(values)


D = TypeVar("D")


def write_fields(path: Path, rows: Sequence[Any]) -> None:
    """A line a row, all of one dataclass, one at least; its fields as they are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(rows[0]))
        writer.writerows(astuple(row) for row in rows)


def read_fields(path: Path, kind: type[D]) -> list[D]:
    """The rows of dataclass ``kind`` that ``write_fields`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**typed(kind, line)) for line in csv.DictReader(file)]


R = TypeVar("R", bound=Row)
ADDED = ("compress", "independent_kv", "data")
"""Columns that older files lack; their rows have the defaults."""


def read_csv(path: Path) -> list[Row]:
    """``read_rows`` for rows of operators.py."""
    return read_rows(path, Row)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """The rows of class ``kind`` that ``write_csv`` wrote.

    Raises:
        ValueError: if the file is missing or has other columns.
    """
    check(path.is_file(), "csv", str(path), "an existing file")
    rows, number = [], 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for line in lines:
                number = lines.line_num
                shape = Shape(**typed(Shape, line))
                rows.append(kind(**typed(kind, line), shape=shape))
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        # ValueError: a field is not a number, or a byte is not UTF-8.
        raise ValueError(
            f"csv must be a file of launch/bench/operators.py --csv, got {path} line {number} "
            f"({type(error).__name__}: {error})"
        ) from None
    return rows


def typed(cls: type, line: dict[str, str]) -> dict[str, Any]:
    """Values of the fields of ``cls`` but ``shape``, from the texts of a line of a CSV."""
    kinds: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    kinds["bool"] = "True".__eq__
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.name == "shape" or (f.name in ADDED and f.name not in line):
            continue
        kind, text = str(f.type), line[f.name]
        values[f.name] = None if "None" in kind and not text else kinds[kind.split(" ")[0]](text)
    return values


def markdown(rows: Sequence[Row]) -> str:
    """Tables of every shape: the whole beside dense, the operators, recorded choices."""
    rows = with_ratios(rows)
    parts = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == shape]
        parts += [f"### {shape.title()}", described(own)]
        parts += [_whole_table(own), _operator_table(own), _choices_table(own)]
    crossings = _crossover_table(rows)
    if crossings:
        parts += ["### Faster than dense attention from", crossings]
    return "\n\n".join(part for part in parts if part) + "\n"


def described(rows: Sequence[Row]) -> str:
    """When, at which commit and versions, and on which peaks rows were measured."""
    seen = dict.fromkeys((row.date, row.commit, row.torch, row.triton) for row in rows)
    texts = [
        f"{date}, commit {commit}, torch {torch}, triton {triton}"
        for date, commit, torch, triton in seen
    ]
    measured = [(row.matmul_tflops, row.copy_tbs) for row in rows if row.copy_tbs]
    if measured:
        # Of several runs the lowest and the highest.
        matmul, copy = zip(*measured, strict=True)
        tflops = " to ".join(dict.fromkeys(f"{f(matmul):.0f}" for f in (min, max)))
        tbytes = " to ".join(dict.fromkeys(f"{f(copy):.2f}" for f in (min, max)))
        texts.append(f"peaks measured: {tflops} TFLOP/s of matmul, {tbytes} TB/s of copy")
    return "; ".join(texts) + ". Pairs are forward / backward; of ratios, forward / both together."


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def pair(first: float | None, second: float | None) -> str:
    texts = [number(x) for x in (first, second) if x is not None]
    return " / ".join(texts)


def _percent(first: float | None, second: float | None) -> str:
    return " / ".join(f"{100 * x:.0f}%" for x in (first, second) if x is not None)


def _whole_table(rows: Sequence[Row]) -> str:
    wholes = [row for row in rows if (row.operator, row.choices) == ("whole", "random")]
    names = [n for n in DENSE if any(row.operator == f"dense_{n}" for row in rows)]
    head = ["tokens", "whole, ms", "TFLOP/s", "GiB"]
    for name in names:
        head += [f"{DENSE[name]}, ms", "GiB", "ratio"]
    lines = []
    for row in sorted(wholes, key=lambda row: row.length):
        line = [
            str(row.length),
            pair(row.forward_ms, row.backward_ms),
            pair(row.forward_tflops, row.backward_tflops),
            number(row.peak_gib),
        ]
        for name in names:
            dense = find(rows, row, f"dense_{name}")
            ratio = (
                getattr(row, f"forward_over_{name}"),
                getattr(row, f"both_over_{name}"),
            )
            times = (dense.forward_ms, dense.backward_ms) if dense else (None, None)
            line += [pair(*times), number(dense.peak_gib) if dense else "", pair(*ratio)]
        lines.append(line)
    return table(head, lines)


def _operator_table(rows: Sequence[Row]) -> str:
    """Of the longest stream of which the whole was measured."""
    lengths = [row.length for row in rows if row.operator == "whole"]
    lengths = lengths or [row.length for row in rows if row.operator in OPERATORS]
    shown = [
        row
        for row in rows
        if lengths
        and row.length == max(lengths)
        and row.operator in OPERATORS
        and row.choices in ("", "random")
    ]
    lines = [
        [
            row.operator.replace("_", " ") + (", random choices" if row.choices else ""),
            pair(row.forward_ms, row.backward_ms),
            _percent(row.forward_share, row.backward_share),
            pair(row.forward_tflops, row.backward_tflops),
            pair(row.forward_gbs, row.backward_gbs) if row.bound == "bytes" else "",
            _percent(row.forward_of_floor, row.backward_of_floor),
            number(row.peak_gib),
        ]
        for row in shown
    ]
    operator = f"operator at {max(lengths)} tokens" if lengths else ""
    return table([operator, "ms", "share", "TFLOP/s", "GB/s", "of the floor", "GiB"], lines)


def _choices_table(rows: Sequence[Row]) -> str:
    """The selected branch and the whole on recorded choices, random ones beside them."""
    recorded = {row.length for row in rows if row.choices not in ("", "random")}
    lines = [
        [
            f"{row.operator.replace('_', ' ')}, {row.choices}",
            str(row.length),
            pair(row.forward_ms, row.backward_ms),
            pair(row.forward_tflops, row.backward_tflops),
            pair(row.forward_over_cudnn, row.both_over_cudnn) if row.operator == "whole" else "",
        ]
        for row in rows
        if row.choices and row.length in recorded
    ]
    return table(["operator, choices", "tokens", "ms", "TFLOP/s", "ratio to cuDNN"], lines)


def _crossover_table(rows: Sequence[Row]) -> str:
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == shape]
        texts = [crossover_text(own, name) for name in DENSE]
        if any(texts):
            lines.append([shape.title(), *texts])
    return table(["forward and backward", *(f"tokens, {name}" for name in DENSE.values())], lines)


def draw_plot(path: Path, rows: Sequence[Row]) -> None:
    """Forward, and forward and backward, of the whole and of dense attention against length."""
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lines = {"whole": "this attention"} | {f"dense_{n}": text for n, text in DENSE.items()}
    for color, (operator, label) in enumerate(lines.items()):
        own = [
            row
            for row in rows
            if row.operator == operator and row.choices in ("", "random") and row.shape == shapes[0]
        ]
        own.sort(key=lambda row: row.length)
        lengths = [row.length for row in own]
        for style, name, times in (
            ("o-", "forward and backward", [row.both_ms for row in own]),
            ("s:", "forward", [row.forward_ms for row in own]),
        ):
            if own:
                axes.plot(lengths, times, style, color=f"C{color}", label=f"{label}, {name}")
    ticks = sorted({row.length for row in rows if row.shape == shapes[0]})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes.minorticks_off()
    axes.set_title(shapes[0].title(), fontsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def with_numbers(document: str, numbers: str, name: str) -> str:
    """The document with new text between its marks for the file ``name``.

    Raises:
        ValueError: if a mark is missing.
    """
    begin = BEGIN.format(name)
    head, found, rest = document.partition(begin)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        must = f"a document with {begin!r} and then {END!r}"
        raise ValueError(f"docs must be {must}, got one without")
    return f"{head}{begin}\n\n{numbers}\n{END}{tail}"


def write_numbers(path: Path, numbers: str, name: str) -> None:
    """``with_numbers`` of a document's file."""
    text = with_numbers(path.read_text(encoding="utf-8"), numbers, name)
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TableOptions:
    """Print the tables of measurements as Markdown, or put them into a document.

    Args:
        csv: files of operators.py --csv; their rows are joined.
        merged: file to write the joined rows to.
        docs: document whose part between the marks is replaced; the marks name the merged file, or
            the only one.
        plot: file to draw time against length to, of the first shape.
    """

    csv: tyro.conf.Positional[tuple[Path, ...]]
    merged: Path | None = None
    docs: Path | None = None
    plot: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(TableOptions, args=arguments)
    try:
        check(bool(options.csv), "csv", options.csv, "one file or more")
        rows = with_ratios([row for path in options.csv for row in read_csv(path)])
        if options.merged is not None:
            write_csv(options.merged, rows)
        if options.docs is not None:
            name = (options.merged or options.csv[0]).name
            write_numbers(options.docs, markdown(rows), name)
        else:
            print(markdown(rows))
        if options.plot is not None:
            draw_plot(options.plot, rows)
    except (ValueError, ImportError) as error:
        sys.exit(f"table.py: {error}")


if __name__ == "__main__":
    main()
