"""Estimate what a run costs before it runs: bytes between ranks, memory and time.

    python launch/estimate.py configs/default.toml --estimate.lengths 131072 1048576 \
        --estimate.ranks 4 8 [--section.option value ...]

Reads a run file as train.py does. Bytes follow from the plan, memory from formulas, time from rates
that launch/bench/operators.py measured. docs/estimates.md says what is counted, and how far the
estimates are from measured runs. Needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields

from launch.data.corpus import load_tokenizer
from launch.estimating.estimates import Estimate, EstimateSettings, estimates, table
from launch.processes.mistakes import end
from launch.settings import read_command_line


def write_csv(path: Path, rows: Sequence[Estimate]) -> None:
    """All numbers, a line an estimate."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Estimate)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        settings = read_command_line(given, EstimateSettings, "estimate.py")
        vocab_size = load_tokenizer(settings.data).vocab_size
        rows = estimates(settings, vocab_size, 4 if settings.run.dtype == "float32" else 2)
    except ValueError as error:
        end("estimate.py", error)
    print(table(rows))
    if settings.estimate.csv:
        write_csv(Path(settings.estimate.csv), rows)


if __name__ == "__main__":
    main()
