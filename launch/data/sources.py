"""Where documents come from: this Python's library, a folder's files, the lines of a JSONL file.

What cannot be read raises an error that names the file and the line; nothing is skipped here.
"""

from __future__ import annotations

import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from launch.settings import DataSettings
from nsa_dist.checks import check

# Skipped because they are not typical programs: tests and their data, generated tables, help text,
# and installed packages.
_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)

# First bytes of files that are often mistaken for text.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip; decompress it",
    b"\x28\xb5\x2f\xfd": "zstd; decompress it",
    b"\x04\x22\x4d\x18": "lz4; decompress it",
    b"\xfd7zXZ\0": "xz; decompress it",
    b"BZh": "bzip2; decompress it",
    b"PK\3\4": "zip; unpack it",
    b"PAR1": "Parquet; convert it",
    b"ARROW1": "Arrow; convert it",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}


@dataclass(frozen=True)
class Options:
    """What errors call the options that name documents."""

    path: str = "data.path"
    pattern: str = "data.pattern"
    field: str = "data.field"
    tokenizer: str = "data.tokenizer"


RUN = Options()
"""Those of a training run."""


def read_documents(settings: DataSettings) -> Iterator[tuple[str, bytes]]:
    """Each document's name, the same on every machine, and its text, in a fixed order.

    Names are unique: a file's path in its folder, or the JSONL file's name and the line's number.

    Raises:
        ValueError: naming the file and the line of what cannot be read.
    """
    if settings.source == "jsonl":
        path = Path(settings.path)
        must = "a file with data.source = 'jsonl'"
        with named(path, "data.path"):
            if path.is_dir():
                must += " ('folder' reads a folder)"
            check(path.is_file(), "data.path", str(path), must)
        check_is_text(path, "JSON", RUN)
        for number, line in enumerate(read_lines(path, RUN), 1):
            if not is_blank(line):
                where = f"{shown(path)} line {number}"
                yield f"{path.name}:{number}", text_of(line, settings.field, where, RUN)
        return
    if settings.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = {
            name: path
            for name, path in find_files(root, "**/*.py", skipped=_SKIPPED_FOLDERS).items()
            if not path.name.startswith("_sysconfigdata")
        }
    else:
        root = Path(settings.path)
        must = "a folder with data.source = 'folder'"
        check(root.is_dir(), "data.path", settings.path, must)
        files = find_files(root, settings.pattern)
        must = f"a pattern that files of {settings.path} match"
        check(bool(files), "data.pattern", settings.pattern, must)
    is_text = settings.tokenizer != "bytes"
    for name, path in sorted(files.items()):
        text = read_file(path, "data.path")
        if is_text:
            check_utf8(path, text, RUN)
        yield name, text


def read_file(path: Path, option: str) -> bytes:
    """The content of a file; ValueError that names file and option if it cannot be read."""
    with named(path, option):
        return path.read_bytes()


def find_files(
    root: Path,
    pattern: str,
    options: Options = RUN,
    skipped: frozenset[str] = frozenset(),
) -> dict[str, Path]:
    """The files of a folder that match a pattern, by their path in the folder.

    As pathlib's glob, with ``**`` for any folders (which does not enter linked ones), but that
    raises for folders that cannot be read, is the same in every Python and stays in the folder.
    Links to files are read, and links to folders that the pattern names.

    Args:
        skipped: names of folders that ``**`` does not enter.

    Raises:
        ValueError: for such a folder, an invalid pattern, and a match that is a broken link,
            not a regular file, or has a name that is not UTF-8.
    """
    parts = _split_pattern(pattern, options)
    found: dict[str, Path] = {}
    # Folders to search, by their path in ``root``, with the number of parts already matched.
    waiting, seen = [("", 0)], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        folder, done = place
        with named(root / folder, options.path):
            entries = list(os.scandir(root / folder))
        recursive = parts[done] == "**"
        if recursive:
            waiting += [
                (f"{folder}{entry.name}/", done)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and entry.name not in skipped
            ]
            done += 1
            if done < len(parts):
                waiting.append((folder, done))
                continue
        last = recursive or done == len(parts) - 1
        for entry in entries:
            if not recursive and not fnmatchcase(entry.name, parts[done]):
                continue
            if not last:
                with named(Path(entry.path), options.path):
                    if entry.is_dir():
                        waiting.append((f"{folder}{entry.name}/", done + 1))
            elif _is_document(Path(entry.path), options.path):
                found[f"{folder}{entry.name}"] = Path(entry.path)
    for path in found.values():
        check_name(path, options)
    return found


def _split_pattern(pattern: str, options: Options) -> list[str]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    stays = not pattern.startswith("/") and ".." not in parts
    must = f"a pattern of files in {options.path}, such as '**/*.txt'"
    check(bool(parts) and stays and "\0" not in pattern, options.pattern, pattern, must)
    must = "a pattern with '**' as a whole part, such as '**/*.txt'"
    check(all("**" not in part or part == "**" for part in parts), options.pattern, pattern, must)
    return [part for i, part in enumerate(parts) if part != "**" or parts[i + 1 : i + 2] != ["**"]]


def _is_document(path: Path, option: str) -> bool:
    """True for a file, False for a folder; ValueError for anything else."""
    with named(path, option):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{option} must hold files, got a broken link: {shown(path)}")
        mode = path.stat().st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ValueError(f"{option} must hold files, got a pipe, socket or device: {shown(path)}")
    return stat.S_ISREG(mode)


def check_name(path: Path, options: Options) -> None:
    """Refuse a file whose name is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        must = f"hold files with names in UTF-8, unless {options.pattern} leaves them out"
        raise ValueError(f"{options.path} must {must}, got {shown(path)}") from None


def check_utf8(path: Path, text: bytes, options: Options) -> None:
    """Refuse a file's text, by file and line, that is not UTF-8."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        got = f"byte 0x{text[error.start]:02x} in {shown(path)} line {line}{_beginning(text)}"
        must = f"hold text in UTF-8 unless {options.tokenizer} = 'bytes'"
        raise ValueError(f"{options.path} must {must}, got {got}") from None


def check_is_text(path: Path, what: str, options: Options) -> None:
    """Refuse a file that begins as a compressed or a binary one."""
    with named(path, options.path), path.open("rb") as file:
        looks = _beginning(file.read(16))
    if looks:
        raise ValueError(f"{options.path} must hold {what}, got {shown(path)}{looks}")


def read_lines(
    path: Path, options: Options, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Lines of a file, ended by a line feed, a carriage return or both, which become line feeds.

    A byte order mark before the first line is left out.

    Args:
        start, stop: bytes; lines that begin there. Both at the start of a line, or ``stop`` None
            for the end of the file.
    """
    with named(path, options.path):
        file = path.open("rb")
    with file:
        with named(path, options.path):
            file.seek(start)
        at = start
        while stop is None or at < stop:
            with named(path, options.path):
                raw = file.readline()
            if not raw:
                return
            if not at:
                raw, at = raw.removeprefix(b"\xef\xbb\xbf"), len(raw)
            else:
                at += len(raw)
            for line in raw.splitlines(keepends=True):
                text = line.rstrip(b"\r\n")
                yield text + b"\n" if len(text) < len(line) else text


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space."""
    return not line.startswith(b"{") and not line.decode("utf-8", "replace").strip()


def text_of(line: bytes, field: str, where: str, options: Options) -> bytes:
    """One field of a JSON object, in UTF-8; errors say ``where`` it is."""
    path = options.path
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        got = f"byte 0x{line[error.start]:02x} in {where} column {column}"
        raise ValueError(f"{path} must hold JSON in UTF-8, got {got}") from None
    try:
        # Numbers are not used; as floats they may have any number of digits.
        record: Any = json.loads(decoded, parse_int=float)
    except json.JSONDecodeError as error:
        got = f"{where} column {error.colno} ({error.msg.removesuffix(' at')})"
        raise ValueError(f"{path} must hold JSON, got {got}") from None
    except RecursionError:
        raise ValueError(f"{path} must hold flat objects, got deep nesting in {where}") from None
    if not isinstance(record, dict):
        kind = _KINDS[type(record)]
        must = f"hold objects with the field {field!r}"
        raise ValueError(f"{path} must {must}, got {kind} in {where}")
    if field not in record:
        has = _listed(sorted(record))
        raise ValueError(f"{options.field} must be a field of {where}, {has}, got {field!r}")
    text = record[field]
    if not isinstance(text, str):
        got = f"{_KINDS[type(text)]} in {where}"
        raise ValueError(f"{path} must hold text in the field {field!r}, got {got}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        got = f"a lone surrogate, \\u{ord(text[error.start]):04x}, at character {error.start + 1}"
        must = f"hold Unicode text in the field {field!r}"
        raise ValueError(f"{path} must {must}, got {got} in {where}") from None


_KINDS = {
    type(None): "null",
    bool: "a truth value",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _listed(names: list[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{rest}"


def _beginning(head: bytes) -> str:
    """What a file that is not text looks like, as the end of a sentence; empty if unknown."""
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return f"; it looks like {what}"
    return ""


@contextmanager
def named(path: Path, option: str) -> Iterator[None]:
    """Errors of the file system as ValueErrors that name the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{option} must be a file that can be read, got {shown(path)} ({reason})"
        ) from None


def shown(path: Path) -> str:
    """A path for an error message: quoted if it cannot be printed in a line."""
    return str(path) if str(path).isprintable() else repr(str(path))
