"""Writes prepared folders (prepared.py): inputs cut into shards, which processes work on apart.

What a shard holds follows from the inputs and options alone. It is written under another name,
synced to the disk and renamed. So a preparation that was interrupted keeps its finished shards, and
ends with the bits of one that was not. ``prepared.json`` comes last: without it the folder is not
finished. Until then ``preparing.json`` says what it is prepared from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from launch.data.corpus import is_held_out
from launch.data.inputs import OPTIONS, Piece, count_lines, cut, find_inputs, number, read_piece
from launch.data.prepared import (
    COUNTS,
    FORMAT,
    NAME,
    PARTS,
    PLAN,
    Files,
    Metadata,
    Shard,
    SplitName,
    read_metadata,
    shard_path,
    token_dtype,
    write_metadata,
)
from launch.data.tokenizer import Tokenizer, make_tokenizer
from launch.data.workers import Workers, own_state
from launch.storage.lock import NAME as LOCK
from launch.storage.lock import STALE_SECONDS, FolderLock
from launch.storage.manifest import hash_file, sync_folder, write_text
from nsa_dist.checks import check

SHARD = "shard.json"
MOST_TOLD = 10
"""Broken records of a shard that are told by name."""
_BUFFER = 1 << 20
"""Tokens that are written at once."""


@dataclass(frozen=True)
class PrepareOptions:
    """Turn text into a folder of tokens to train from.

    Args:
        inputs: text files, .jsonl (.ndjson, .json: an object a line) and .parquet files, and
            folders of them.
        out: the folder to write, new or begun by the same line.
        tokenizer: bytes, a tokenizer.json, or a name or folder that transformers loads.
        field: the JSON field or Parquet column that holds a document's text.
        pattern: which files of folders are read.
        held_out: fraction of documents kept for validation, 0 to 1, by a hash of their names.
        shard_mib: about the MiB of text in a shard.
        processes: that work at once; 0: one a core.
        strict: stop at the first record that cannot be read; otherwise it is left out and counted.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    tokenizer: str = "bytes"
    field: str = "text"
    pattern: tuple[str, ...] = ("**/*.txt", "**/*.jsonl", "**/*.parquet")
    held_out: float = 0.05
    shard_mib: float = 256.0
    processes: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        check(bool(self.inputs), "INPUT", "nothing", "one file or folder or more")
        check(bool(self.pattern), "--pattern", self.pattern, "one pattern or more")
        check(0 <= self.held_out <= 1, "--held-out", self.held_out, "0 to 1")
        must = "0.001 to 1,000,000"
        check(0.001 <= self.shard_mib <= 1e6, "--shard-mib", self.shard_mib, must)
        check(self.processes >= 0, "--processes", self.processes, "at least 0")


@dataclass
class Progress:
    """How far a preparation is.

    Attributes:
        total, done: bytes of text, about.
        shards, shards_done: how many there are.
        note: something to tell once, such as what the tokenizer had switched on.
    """

    total: int = 0
    done: int = 0
    shards: int = 0
    shards_done: int = 0
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A finished folder.

    Args:
        told: some of the broken records that were left out.
    """

    metadata: Metadata
    told: tuple[str, ...]

    @property
    def broken(self) -> int:
        return sum(shard.broken for shard in self.metadata.shards)

    @property
    def empty(self) -> int:
        return sum(shard.empty for shard in self.metadata.shards)


@dataclass(frozen=True)
class _Task:
    """A shard to write.

    Args:
        tokenizer: its name within ``out``.
        identity: says which it is, by its content.
    """

    out: Path
    number: int
    pieces: tuple[Piece, ...]
    tokenizer: str
    identity: str
    field: str
    held_out: float
    strict: bool


def prepare(options: PrepareOptions, show: Callable[[Progress], None]) -> Result:
    """Write the folder, or what is missing of it.

    Args:
        show: called every now and then.

    Raises:
        ValueError: naming the option, or the file and record.
        OSError: if the folder cannot be written.
    """
    progress = Progress()
    _check_outside(options)
    inputs = find_inputs(options.inputs, options.pattern)
    # Refused before anything is written.
    tokenizer = make_tokenizer(options.tokenizer, OPTIONS.tokenizer)
    progress.note = tokenizer.note
    show(progress)
    _check_out(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    aside = options.out / ".tokenizer.new"
    with _held(options.out), Workers(options.processes or os.cpu_count() or 1) as workers:
        try:
            name, files = _save_tokenizer(tokenizer, aside)
            identity = f"{name} with SHA-256 {_hash_of(files)}" if files else name
            plan = _plan(options, inputs, identity)
            if (options.out / NAME).exists():
                return _finished(options, plan)
            shards = _cut_all(options, inputs, workers)
            _begin(options.out, plan)
            _place_tokenizer(aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        progress.total = sum(piece.size for pieces in shards for piece in pieces)
        progress.shards = len(shards)
        tasks = []
        for at, pieces in enumerate(shards):
            if _is_done(options.out, at):
                progress.done += sum(piece.size for piece in pieces)
                progress.shards_done += 1
                continue
            rest = (options.field, options.held_out, options.strict)
            tasks.append(_Task(options.out, at, tuple(pieces), name, identity, *rest))
        before = progress.done

        def tick(done: int) -> None:
            progress.done = min(before + done, progress.total)
            show(progress)

        for _ in workers.each(_write_shard, tasks, tick):
            progress.shards_done += 1
            show(progress)
        same = _plan(options, inputs, identity) == plan
        check(same, "INPUT", "changed files", "files that stay as they are while they are read")
        return _finish(options, plan, name, files, tokenizer.vocab_size, len(shards))


def _check_outside(options: PrepareOptions) -> None:
    """Refuse a folder whose own files could be taken for inputs."""
    out = options.out.resolve()
    inside = any(path.resolve() in (out, *out.parents) for path in options.inputs)
    check(not inside, "--out", str(options.out), "a folder outside of every INPUT")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keeps other preparations out of the folder."""

    def lost(message: str) -> None:
        print(f"--out: {message}; this program ends here", flush=True)
        os._exit(1)

    lock = FolderLock(out, lost)
    while not lock.take():
        owner, heard = lock.holder(), lock.heard()
        if owner is None or heard is None:
            continue
        lives = owner.lives()
        if lives is None:
            lives = lock.now() - heard < STALE_SECONDS
        check(not lives, "--out", str(out), f"a folder that no other program writes ({owner} does)")
        lock.remove(owner)
    try:
        yield
    finally:
        lock.release()


def _check_out(out: Path) -> None:
    """Refuse a folder that holds what this program did not write."""
    check(out.is_dir() or not out.exists(), "--out", str(out), "a folder")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    own = PLAN in names or NAME in names
    # What one that was killed at once, or that runs now, may have there.
    others = [name for name in names if not name.startswith((".tokenizer.new", LOCK, PLAN))]
    must = "a new or empty folder, or one that this program began"
    check(own or not others, "--out", str(out), must)


def _save_tokenizer(tokenizer: Tokenizer, aside: Path) -> tuple[str, Files]:
    """Write a tokenizer aside; its name within the folder and its files."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    name = tokenizer.save(aside)
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    return name, {p.relative_to(aside).as_posix(): hash_file(p, sync=True) for p in paths}


def _place_tokenizer(aside: Path) -> None:
    """Give the tokenizer its name; one that is there already is the same."""
    for path in aside.iterdir():
        if not (aside.parent / path.name).exists():
            path.rename(aside.parent / path.name)


def _plan(options: PrepareOptions, inputs: Mapping[str, Path], tokenizer: str) -> dict[str, Any]:
    """What the folder is prepared from; an equal plan gives equal bits.

    Args:
        tokenizer: says which it is, by its content.
    """
    stats = {name: path.stat() for name, path in inputs.items()}
    what = {
        "tokenizer": tokenizer,
        "field": options.field,
        "pattern": list(options.pattern),
        "held-out": options.held_out,
        "shard-mib": options.shard_mib,
    }
    sizes = [[name, stat.st_size] for name, stat in stats.items()]
    times = [[name, stat.st_mtime_ns] for name, stat in stats.items()]
    return {
        "format": FORMAT,
        "options": what,
        "inputs": _hash_of([what, sizes]),
        "times": _hash_of(times),
    }


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Begin a folder, or refuse one with shards that were begun with anything else."""
    path = out / PLAN
    if path.exists() and any((out / "shards").glob("[0-9]*")):
        _check_begun(out, plan)
        return
    # Nothing is lost: begun anew, with whatever was put right.
    for name in ("shards", "tokenizer", "tokenizer.json"):
        _remove(out / name)
    new = path.with_name(f"{PLAN}.new")
    write_text(new, json.dumps(plan, indent=1) + "\n")
    new.replace(path)
    sync_folder(out)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_begun(out: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to go on with other options or inputs than those that a folder was begun with."""
    path = out / PLAN
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        before = dict(begun["options"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--out must be a folder that can be continued, got {out} with a {PLAN} that cannot "
            "be read"
        ) from None
    _check_options(out, before, plan["options"])
    same = all(begun.get(key) == plan[key] for key in ("format", "inputs", "times"))
    must = f"the files that {out} was begun with, unchanged (or take another --out)"
    check(same, "INPUT", "other or changed files", must)


def _check_options(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for option, value in now.items():
        was = before.get(option)
        must = f"{was!r}, with which {out} was begun (or take another --out)"
        check(was == value, f"--{option}", value, must)


def _finished(options: PrepareOptions, plan: Mapping[str, Any]) -> Result:
    """A folder that is finished already, if it is this one."""
    try:
        metadata = read_metadata(options.out)
    except ValueError as error:
        raise ValueError(f"--out must be a whole folder, got {options.out}: {error}") from None
    _check_options(options.out, metadata.options, plan["options"])
    must = f"the files that {options.out} was prepared from (or take another --out)"
    check(metadata.inputs == plan["inputs"], "INPUT", "other or changed files", must)
    # A kill may have come between.
    (options.out / PLAN).unlink(missing_ok=True)
    result = Result(metadata, _told(options.out, len(metadata.shards)))
    _check_strict(options, result.told)
    return result


def _check_strict(options: PrepareOptions, told: Sequence[str]) -> None:
    """With --strict, shards of an earlier run may hold no broken record either."""
    if options.strict and told:
        raise ValueError(told[0])


def _cut_all(
    options: PrepareOptions, inputs: Mapping[str, Path], workers: Workers
) -> list[list[Piece]]:
    """The pieces of each shard."""
    size = int(options.shard_mib * (1 << 20))
    by_file = [cut(name, path, options.field, size) for name, path in inputs.items()]
    # Lines are numbered through a file: the others are counted.
    large = [pieces for pieces in by_file if len(pieces) > 1 and pieces[0].kind == "jsonl"]
    counts = iter(workers.map(count_lines, [piece for pieces in large for piece in pieces]))
    shards: list[list[Piece]] = []
    room = 0
    for pieces in by_file:
        if len(pieces) > 1 and pieces[0].kind == "jsonl":
            pieces = number(pieces, [next(counts) for _ in pieces])
        for piece in pieces:
            if room <= 0 or piece.size > room:
                shards.append([])
                room = size
            shards[-1].append(piece)
            room -= piece.size
    return shards


def _is_done(out: Path, at: int) -> bool:
    """Whether a shard is whole by its sizes; one that is not is removed."""
    path = shard_path(out, at)
    if not path.exists():
        return False
    try:
        shard = _read_shard(out, at)[0]
        if all((path / name).stat().st_size == size for name, (size, _) in shard.files.items()):
            return True
    except (OSError, ValueError):
        pass  # Damaged after it was written: written again.
    shutil.rmtree(path)
    return False


def _read_shard(out: Path, at: int) -> tuple[Shard, list[str]]:
    """A finished shard, and the broken records that it tells of."""
    table = json.loads((shard_path(out, at) / SHARD).read_text(encoding="utf-8"))
    return Shard.from_table(table), [str(text) for text in table["told"]]


def _told(out: Path, shards: int) -> tuple[str, ...]:
    told: list[str] = []
    for at in range(shards):
        told += _read_shard(out, at)[1]
        if len(told) >= MOST_TOLD:
            break
    return tuple(told[:MOST_TOLD])


def _finish(
    options: PrepareOptions,
    plan: Mapping[str, Any],
    tokenizer: str,
    files: Files,
    vocab_size: int,
    shards: int,
) -> Result:
    """Write what is about all shards, and ``prepared.json`` last."""
    out = options.out
    told = _told(out, shards)
    _check_strict(options, told)
    found = tuple(_read_shard(out, at)[0] for at in range(shards))
    documents = sum(shard.training[0] + shard.held_out[0] for shard in found)
    broken = sum(shard.broken for shard in found)
    why = f"; {broken:,} broken records, such as: {told[0]}" if told else ""
    got = " ".join(map(str, options.inputs))
    if not documents:
        raise ValueError(f"INPUT must hold documents with some text, got {got}{why}")
    counts = np.zeros(vocab_size, np.int64)
    for at in range(shards):
        counts += np.fromfile(shard_path(out, at) / "shard.counts", "<i8")
    with (out / COUNTS).open("wb") as file:
        file.write(counts.astype("<i8", copy=False).tobytes())
    own = {COUNTS: hash_file(out / COUNTS, sync=True)}
    metadata = Metadata(
        tokenizer, vocab_size, plan["options"], plan["inputs"], {**files, **own}, found
    )
    write_metadata(out, metadata)
    sync_folder(out)
    (out / PLAN).unlink()
    return Result(metadata, told)


@lru_cache(maxsize=1)
def _tokenizer(name: str, identity: str) -> Tokenizer:
    """The tokenizer, loaded once a process; ``identity`` tells one content from another."""
    return make_tokenizer(name, OPTIONS.tokenizer)


def _write_shard(task: _Task) -> None:
    """Write a shard and give it its name."""
    path = shard_path(task.out, task.number)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with ExitStack() as stack:
            _fill(partial, task, stack)
        sync_folder(partial)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        # On a full disk the error has no file name.
        name = error.filename or str(partial)
        raise OSError(error.errno, error.strerror or str(error), str(name)) from None


def _fill(folder: Path, task: _Task, stack: ExitStack) -> None:
    """Write a shard's files, which ``stack`` closes if that fails."""
    name = task.tokenizer if task.tokenizer == "bytes" else str(task.out / task.tokenizer)
    tokenizer, state = _tokenizer(name, task.identity), own_state()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    writers: dict[SplitName, _Writer] = {}
    told: list[str] = []
    empty = broken = text_bytes = 0

    def on_broken(error: ValueError) -> None:
        nonlocal broken
        if task.strict:
            raise error
        broken += 1
        if len(told) < MOST_TOLD:
            told.append(str(error))

    for piece in task.pieces:
        left = piece.size
        for name, text in read_piece(piece, task.field, task.tokenizer != "bytes", on_broken):
            # A document of bytes is about as long as in its file.
            state.add(min(len(text), left))
            left -= min(len(text), left)
            try:
                tokens = tokenizer.encode(text, name)
            except ValueError as error:
                on_broken(error)
                continue
            if not tokens.numel():
                empty += 1
                continue
            text_bytes += len(text)
            split: SplitName = "held_out" if is_held_out(name, task.held_out) else "training"
            if split not in writers:
                to_count = counts if split == "training" else None
                dtype = token_dtype(tokenizer.vocab_size)
                writers[split] = _Writer(folder, split, dtype, to_count, stack)
            writers[split].add(name, tokens)
        state.add(left, at_once=True)
    files: dict[str, tuple[int, str]] = {}
    for writer in writers.values():
        files |= writer.close()
    sizes = [
        (writers[split].documents, writers[split].tokens) if split in writers else (0, 0)
        for split in ("training", "held_out")
    ]
    shard = Shard(sizes[0], sizes[1], empty, broken, text_bytes, dict(sorted(files.items())))
    with (folder / "shard.counts").open("wb") as file:
        _write(file, counts.astype("<i8", copy=False).tobytes())
    write_text(folder / SHARD, json.dumps({**asdict(shard), "told": told}, indent=1) + "\n")


class _Writer:
    """Writes a split's documents of one shard.

    Args:
        counts: int64 [vocabulary], to which tokens are added, or None.
        stack: closes the files.
    """

    def __init__(
        self,
        folder: Path,
        split: SplitName,
        dtype: str,
        counts: NDArray[np.int64] | None,
        stack: ExitStack,
    ) -> None:
        self.tokens = 0
        self._split, self._counts = split, counts
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._ends, self._name_ends = array("q", [0]), array("q", [0])
        self._waiting: list[Tensor] = []
        self._num_waiting = 0
        self._files = {
            part: stack.enter_context((folder / f"{split}.{part}").open("wb")) for part in PARTS
        }
        self._hashes = {part: hashlib.sha256() for part in PARTS}

    @property
    def documents(self) -> int:
        return len(self._ends) - 1

    def add(self, name: str, tokens: Tensor) -> None:
        """Add a document, tokens integer [length]."""
        self.tokens += tokens.numel()
        self._ends.append(self.tokens)
        text = name.encode()
        self._name_ends.append(self._name_ends[-1] + len(text))
        self._put("names", text)
        self._waiting.append(tokens)
        self._num_waiting += tokens.numel()
        if self._num_waiting >= _BUFFER:
            self._flush()

    def close(self) -> dict[str, tuple[int, str]]:
        """Sync everything to the disk; bytes and SHA-256 of each file."""
        self._flush()
        index = np.array([self._ends, self._name_ends], "<i8").tobytes()
        self._put("index", index)
        found = {}
        for part, file in self._files.items():
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            found[f"{self._split}.{part}"] = (size, self._hashes[part].hexdigest())
        return found

    def _flush(self) -> None:
        for tokens in self._waiting:
            numbers = tokens.numpy()
            self._put("tokens", numbers.astype(self._dtype).tobytes())
        if self._counts is not None and self._waiting:
            whole = torch.cat(self._waiting).to(torch.int64).numpy()
            self._counts += np.bincount(whole, minlength=len(self._counts))
        self._waiting, self._num_waiting = [], 0

    def _put(self, part: str, data: bytes) -> None:
        self._files[part].write(data)
        self._hashes[part].update(data)


def _write(file: BinaryIO, data: bytes) -> None:
    """Write to a file and sync it to the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
