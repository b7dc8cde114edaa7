"""What a folder is prepared from: text files, JSONL files, Parquet files and folders of them.

Inputs are cut into pieces that can be read apart from one another: a text file, lines of a JSONL
file, row groups of a Parquet file. A document has the same name however they are cut: a file's path
in its folder, and of a line or row its number after a colon, as in training from text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launch.data.sources import (
    Options,
    check_is_text,
    check_name,
    check_utf8,
    find_files,
    is_blank,
    named,
    read_file,
    read_lines,
    shown,
    text_of,
)
from nsa_dist.checks import check

OPTIONS = Options(path="INPUT", pattern="--pattern", field="--field", tokenizer="--tokenizer")
_KINDS: dict[str, Literal["jsonl", "parquet"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_ROWS = 1024
"""Rows of a Parquet file that are read at once."""
_BYTES = 1 << 22
"""Bytes of a file that are read at once to count its lines."""

Broken = Callable[[ValueError], None]
"""Is told of a record that cannot be read, and raises if that is the end."""


@dataclass(frozen=True)
class Piece:
    """Documents that are read together.

    Args:
        name: the file's, as documents are named by it.
        start, stop: bytes of a text or JSONL file, row groups of a Parquet file.
        first: number of the first line or row, from 1.
        size: about the bytes of its text.
    """

    kind: Literal["text", "jsonl", "parquet"]
    path: Path
    name: str
    start: int
    stop: int
    size: int
    first: int = 1


def find_inputs(inputs: Sequence[Path], patterns: Sequence[str]) -> dict[str, Path]:
    """The files of all inputs by their names: paths in their folder, or files' own.

    Raises:
        ValueError: for an input that is not there, a folder without a matching file, and two files
            of one name.
    """
    found: dict[str, Path] = {}
    for path in inputs:
        with named(path, OPTIONS.path):
            is_folder = path.is_dir()
            check(is_folder or path.is_file(), "INPUT", str(path), "an existing file or folder")
        check_name(path, OPTIONS)
        files = {path.name: path}
        if is_folder:
            files = {}
            for pattern in patterns:
                files |= find_files(path, pattern, OPTIONS)
            must = f"a pattern that files of {shown(path)} match"
            check(bool(files), "--pattern", " ".join(patterns), must)
        for name in sorted(files):
            if name in found:
                must = "files with names of their own (a folder above both tells them apart)"
                raise ValueError(f"INPUT must be {must}, got {found[name]} and {files[name]}")
            found[name] = files[name]
    return found


def cut(name: str, path: Path, field: str, size: int) -> list[Piece]:
    """A file as pieces of about ``size`` bytes, with lines not numbered yet.

    Raises:
        ValueError: if it cannot be read, is compressed, or has no such field.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind == "parquet":
        return _cut_parquet(name, path, field, size)
    with named(path, OPTIONS.path):
        whole = path.stat().st_size
    if kind is None:
        return [Piece("text", path, name, 0, whole, whole)]
    check_is_text(path, "JSON", OPTIONS)
    starts = [0]
    with named(path, OPTIONS.path), path.open("rb") as file:
        while starts[-1] + size < whole:
            # A line that begins before this byte belongs to the piece before.
            file.seek(starts[-1] + size - 1)
            file.readline()
            starts.append(file.tell())
    stops = [*starts[1:], whole]
    return [
        Piece("jsonl", path, name, start, stop, stop - start)
        for start, stop in zip(starts, stops, strict=True)
        if stop > start or whole == 0
    ]


def count_lines(piece: Piece) -> int:
    """Lines of a piece of a JSONL file, by the ends of ``read_lines``."""
    ends, before = 0, b""
    with named(piece.path, OPTIONS.path), piece.path.open("rb") as file:
        file.seek(piece.start)
        left = piece.stop - piece.start
        while left and (data := file.read(min(left, _BYTES))):
            ends += data.count(b"\n") + data.count(b"\r") - (before + data).count(b"\r\n")
            before, left = data[-1:], left - len(data)
    return ends


def number(pieces: Sequence[Piece], lines: Sequence[int]) -> list[Piece]:
    """The pieces of one file with their first lines, of the number of lines of each."""
    numbered, first = [], 1
    for piece, count in zip(pieces, lines, strict=True):
        numbered.append(replace(piece, first=first))
        first += count
    return numbered


def read_piece(
    piece: Piece, field: str, is_text: bool, broken: Broken
) -> Iterator[tuple[str, bytes]]:
    """Each document's name and its text.

    Args:
        is_text: whether text must be UTF-8.
        broken: is told of each record that is left out.

    Raises:
        ValueError: for a file that cannot be read, and what ``broken`` raises.
    """
    if piece.kind == "parquet":
        yield from _read_parquet(piece, field, broken)
    elif piece.kind == "jsonl":
        lines = read_lines(piece.path, OPTIONS, piece.start, piece.stop)
        for at, line in enumerate(lines, piece.first):
            if is_blank(line):
                continue
            try:
                text = text_of(line, field, f"{shown(piece.path)} line {at}", OPTIONS)
            except ValueError as error:
                broken(error)
                continue
            yield f"{piece.name}:{at}", text
    else:
        text = read_file(piece.path, OPTIONS.path)
        try:
            if is_text:
                check_utf8(piece.path, text, OPTIONS)
        except ValueError as error:
            broken(error)
            return
        yield piece.name, text


def _open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        must = "text or JSONL where pyarrow is not installed (pip install pyarrow)"
        raise ValueError(f"INPUT must be {must}, got {shown(path)}") from None
    with named(path, OPTIONS.path):
        try:
            return parquet.ParquetFile(path)
        except importlib.import_module("pyarrow").ArrowException as error:
            got = f"{shown(path)} ({' '.join(str(error).split())})"
            raise ValueError(f"INPUT must hold Parquet, got {got}") from None


def _cut_parquet(name: str, path: Path, field: str, size: int) -> list[Piece]:
    types: Any = None
    with _open_parquet(path) as file:
        types = importlib.import_module("pyarrow").types
        schema = file.schema_arrow
        has = schema.names
        must = f"a column of {shown(path)}, {has[:10]}"
        check(field in has, OPTIONS.field, field, must)
        kind = schema.field(field).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        tests = (types.is_string, types.is_large_string, types.is_string_view)
        if not any(test(value) for test in tests):
            raise ValueError(
                f"INPUT must hold text in the column {field!r}, got {kind} in {shown(path)}"
            )
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        rows = [group.num_rows for group in groups]
    pieces, start, first = [], 0, 1
    for stop in range(1, len(groups) + 1):
        if stop == len(groups) or sum(sizes[start : stop + 1]) > size:
            about = sum(sizes[start:stop])
            pieces.append(Piece("parquet", path, name, start, stop, about, first))
            first += sum(rows[start:stop])
            start = stop
    return pieces


def _read_parquet(piece: Piece, field: str, broken: Broken) -> Iterator[tuple[str, bytes]]:
    arrow: Any = importlib.import_module("pyarrow")
    at = piece.first
    with _open_parquet(piece.path) as file:
        batches = file.iter_batches(
            batch_size=_ROWS, row_groups=list(range(piece.start, piece.stop)), columns=[field]
        )
        while True:
            try:
                with named(piece.path, OPTIONS.path):
                    batch = next(batches, None)
            except arrow.ArrowException as error:
                got = f"{shown(piece.path)} at row {at} ({' '.join(str(error).split())})"
                raise ValueError(f"INPUT must hold Parquet, got {got}") from None
            if batch is None:
                return
            # Bytes, as UTF-8 is not checked by the format.
            for text in batch.column(0).cast(arrow.large_binary()).to_pylist():
                if text is None:
                    where = f"{shown(piece.path)} row {at}"
                    must = f"INPUT must hold text in the column {field!r}"
                    broken(ValueError(f"{must}, got null in {where}"))
                else:
                    yield f"{piece.name}:{at}", text
                at += 1
