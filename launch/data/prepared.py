"""A prepared folder: documents as tokens on the disk, of which a run reads what it needs.

``launch/prepare_data.py`` writes it (preparing.py). Its documents lie in shards, in a fixed order:

    prepared.json                 what the folder holds, with every file's size and SHA-256
    tokenizer.json, tokenizer/    one of them, unless tokens are bytes
    training.counts               int64 [vocabulary], how often each token is in the training split
    shards/000000/
        training.tokens           uint16 or uint32 [tokens], documents end to end
        training.index            int64 [2, documents + 1], where each starts in .tokens and .names
        training.names            UTF-8 [bytes], names end to end
        held_out.tokens, ...      the same of the documents that are held out
        shard.json, shard.counts  what preparing goes on from

Numbers are little-endian. A split that has no document in a shard has no files there. Tokens and
index are memory-mapped, a few shards at a time. Nothing of the size of the tokens or of the number
of documents is kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.data.permutation import Permutation
from launch.data.streams import Stream
from launch.data.tokenizer import Tokenizer, make_tokenizer
from launch.seeds import mix_seed
from launch.storage.manifest import hash_file, write_text
from nsa_dist.checks import check

NAME = "prepared.json"
PLAN = "preparing.json"
"""Says what a folder that is not finished is prepared from."""
COUNTS = "training.counts"
FORMAT = 1
"""Format number of a prepared folder."""
SplitName = Literal["training", "held_out"]
SPLITS: tuple[SplitName, ...] = ("training", "held_out")
PARTS = ("tokens", "index", "names")
MOST_OPEN = 32
"""Files of each split that are mapped at once."""
_PIECE = 1 << 20
"""Numbers of an index or of counts that are looked at together."""

Files = Mapping[str, tuple[int, str]]
"""(bytes, SHA-256) by name."""


def token_dtype(vocab_size: int) -> str:
    """The dtype of tokens on the disk."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """What one shard holds.

    Args:
        training, held_out: documents and tokens.
        empty: documents without a token, which are left out.
        broken: records that could not be read, which are left out.
        text_bytes: bytes of UTF-8 that the tokens are of.
        files: by their names in the shard's folder.
    """

    training: tuple[int, int]
    held_out: tuple[int, int]
    empty: int
    broken: int
    text_bytes: int
    files: Files

    def size_of(self, split: SplitName) -> tuple[int, int]:
        """Documents and tokens."""
        return self.training if split == "training" else self.held_out

    @classmethod
    def from_table(cls, table: Any) -> Shard:
        """A shard by its JSON object.

        Raises:
            ValueError: if that is not one.
        """
        try:
            files = {name: (size, sha256) for name, (size, sha256) in table["files"].items()}
            sizes: list[tuple[int, int]] = []
            for split in SPLITS:
                documents, tokens = table[split]
                sizes.append((documents, tokens))
            rest = [table[name] for name in ("empty", "broken", "text_bytes")]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError("a shard lacks what one has") from None
        numbers = [n for pair in sizes for n in pair] + rest
        numbers += [size for size, _ in files.values()]
        right = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        right = right and all(isinstance(sha256, str) for _, sha256 in files.values())
        if not right:
            raise ValueError("a shard lacks what one has")
        training, held_out = sizes
        empty, broken, text_bytes = rest
        return cls(training, held_out, empty, broken, text_bytes, files)

    def expected(self, vocab_size: int) -> dict[str, int | None]:
        """The files that it must have and their bytes; None where that is free."""
        item = 2 if token_dtype(vocab_size) == "uint16" else 4
        found: dict[str, int | None] = {}
        for split in SPLITS:
            documents, tokens = self.size_of(split)
            if documents:
                found[f"{split}.tokens"] = tokens * item
                found[f"{split}.index"] = 2 * (documents + 1) * 8
                found[f"{split}.names"] = None
        return found


@dataclass(frozen=True)
class Metadata:
    """What ``prepared.json`` says.

    Args:
        tokenizer: 'bytes', 'tokenizer.json' or 'tokenizer', a file or folder within.
        options: what the folder was prepared with, as text for a reader.
        inputs: hash of the input files' names and sizes and of ``options``.
        files: outside of shards, by their paths within the folder.
    """

    tokenizer: str
    vocab_size: int
    options: Mapping[str, Any]
    inputs: str
    files: Files
    shards: Sequence[Shard]

    @property
    def digest(self) -> str:
        """Hexadecimal hash of the vocabulary's size and of every document's name and tokens, and
        of where shards end."""
        digest = hashlib.sha256(f"prepared\0vocabulary {self.vocab_size}\0".encode())
        for split in SPLITS:
            for shard in self.shards:
                for part in PARTS:
                    if shard.size_of(split)[0]:
                        digest.update(shard.files[f"{split}.{part}"][1].encode())
            digest.update(b"\0")
        return digest.hexdigest()

    def size_of(self, split: SplitName) -> tuple[int, int]:
        """Documents and tokens."""
        sizes = [shard.size_of(split) for shard in self.shards]
        return sum(documents for documents, _ in sizes), sum(tokens for _, tokens in sizes)


def shard_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06}"


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write ``prepared.json``, whole or not at all."""
    table = {"format": FORMAT, **asdict(metadata)}
    new = folder / f"{NAME}.new"
    write_text(new, json.dumps({**table, "sha256": _checksum(table)}, indent=1) + "\n")
    new.replace(folder / NAME)


def read_metadata(folder: Path) -> Metadata:
    """What a folder says about itself.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        table = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{NAME} cannot be read ({error})") from None
    number = table.get("format") if isinstance(table, dict) else None
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise ValueError(f"{NAME} has the format {number!r}, 1 to {FORMAT} can be read")
    if table.pop("sha256", None) != _checksum(table):
        raise ValueError(f"{NAME} is not what was written: its own checksum differs")
    del table["format"]
    try:
        shards = tuple(Shard.from_table(shard) for shard in table.pop("shards"))
        files = {name: (size, sha256) for name, (size, sha256) in table.pop("files").items()}
        metadata = Metadata(**table, files=files, shards=shards)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{NAME} lacks what it must have") from None
    right = type(metadata.vocab_size) is int and 1 <= metadata.vocab_size < 1 << 31
    right = right and metadata.tokenizer in ("bytes", "tokenizer.json", "tokenizer")
    right = right and files.get(COUNTS, (0, ""))[0] == 8 * metadata.vocab_size
    right = right and not any(".." in Path(n).parts or Path(n).is_absolute() for n in files)
    if not right or not all(
        set(shard.files) == set(shard.expected(metadata.vocab_size)) for shard in shards
    ):
        raise ValueError(f"{NAME} lacks what it must have")
    return metadata


def _checksum(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def open_prepared(path: str, option: str) -> Prepared:
    """A prepared folder; of its files only ``prepared.json`` is read.

    Args:
        option: that named it.

    Raises:
        ValueError: naming the option, if it is none, is not finished, or is of a later format.
    """
    folder = Path(path)
    must = "a folder that prepare_data.py wrote"
    check(folder.is_dir(), option, path, must)
    try:
        metadata = read_metadata(folder)
    except ValueError as error:
        if (folder / PLAN).exists() and not (folder / NAME).exists():
            must = "a finished folder (the line of prepare_data.py that began it finishes it)"
            check(False, option, path, must)
        raise ValueError(f"{option} must be {must}, got {path!r}: {error}") from None
    return Prepared(folder, option, metadata)


@dataclass(frozen=True)
class Prepared:
    """A finished folder, named by ``option``."""

    folder: Path
    option: str
    metadata: Metadata

    @property
    def digest(self) -> str:
        """As ``Corpus.digest``."""
        return self.metadata.digest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside.

        Raises:
            ValueError: if it cannot be loaded or is another one.
        """
        name = self.metadata.tokenizer
        if name != "bytes":
            name = str(self.folder / name)
        tokenizer = make_tokenizer(name, f"the tokenizer of {self.option}")
        must = f"a folder whose tokenizer has the vocabulary of its tokens, {tokenizer.vocab_size}"
        same = tokenizer.vocab_size == self.metadata.vocab_size
        check(same, self.option, self.metadata.vocab_size, must)
        return tokenizer

    def check_same_tokenizer(self, other: Prepared) -> None:
        """Refuse this folder if its tokenizer is not that of the other one."""
        own, others = (x.metadata for x in (self, other))
        same = own.vocab_size == others.vocab_size and _identity(own) == _identity(others)
        must = f"a folder that was prepared with the tokenizer of {other.option} = {other.folder}"
        check(same, self.option, str(self.folder), must)

    def split(self, *splits: SplitName) -> PreparedSplit:
        """The documents of a split, or of several one after another."""
        return PreparedSplit(self, splits)

    def check_files(self, verify: bool, share: tuple[int, int] = (0, 1)) -> None:
        """Compare files with what ``prepared.json`` says of them.

        Args:
            verify: read all of them; if not, those whose size depends on the number of tokens
                are compared by size alone.
            share: number of this process and of all that check the folder together: each checks
                a part of the files.

        Raises:
            ValueError: naming the folder and files that are missing, cut or changed.
        """
        files = dict(self.metadata.files)
        for number, shard in enumerate(self.metadata.shards):
            at = shard_path(self.folder, number).relative_to(self.folder)
            expected = shard.expected(self.metadata.vocab_size)
            for name, (size, sha256) in shard.files.items():
                # Where the sizes that numbers ask for differ, the file is read as another one.
                asked = expected[name]
                files[str(at / name)] = (size if asked is None else asked, sha256)
        problems = []
        for name in sorted(files)[share[0] :: share[1]]:
            path, (size, sha256) = self.folder / name, files[name]
            try:
                found = path.stat().st_size if path.is_file() else None
                if found is None:
                    problems.append(f"{name} is missing")
                elif found != size:
                    problems.append(f"{name} has {found:,} bytes, {size:,} in {NAME}")
                elif (verify or name.endswith(".index")) and hash_file(path)[1] != sha256:
                    problems.append(f"{name} is not what was written: its checksum differs")
                elif name.endswith(".index") and not _is_index(path):
                    problems.append(f"{name} does not hold ascending numbers")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
        if problems:
            rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"{self.option} must be a whole prepared folder, got {str(self.folder)!r}: "
                f"{'; '.join(problems[:3])}{rest}"
            )


def _identity(metadata: Metadata) -> Any:
    """What is the same for equal tokenizers. What transformers writes beside it names folders."""
    folder = "" if metadata.tokenizer == "tokenizer.json" else "tokenizer/"
    files = {name: sha256 for name, (_, sha256) in metadata.files.items() if name != COUNTS}
    return files.get(f"{folder}tokenizer.json") or files


def _is_index(path: Path) -> bool:
    """Whether the starts of tokens are strictly ascending from 0, and those of names ascending."""
    numbers, size = _Mapped(path, np.dtype("<i8")), path.stat().st_size // 16
    for row, least in ((0, 1), (1, 0)):
        before = -least
        for first in range(0, size, _PIECE):
            at = row * size + first
            piece = numbers.array[at : at + min(_PIECE, size - first)]
            steps = np.diff(piece, prepend=before)
            if (first == 0 and piece[0] != 0) or bool((steps < least).any()):
                return False
            before = int(piece[-1])
            del piece, steps
            numbers.forget()
    return True


class _Mapped:
    """A file of numbers, mapped into memory to be read."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array: NDArray[Any] = np.frombuffer(self._map, dtype)

    def forget(self) -> None:
        """Give the pages that were read back to the system, which may keep them in its cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class _Part:
    """A split's documents in one shard."""

    folder: Path
    split: SplitName
    documents: int
    tokens: int

    def path(self, end: str) -> Path:
        return self.folder / f"{self.split}.{end}"


class PreparedSplit:
    """Documents of a prepared folder, end to end in the order of its shards."""

    def __init__(self, prepared: Prepared, splits: Sequence[SplitName]) -> None:
        self._prepared, self._splits = prepared, splits
        self._dtype = np.dtype(token_dtype(prepared.metadata.vocab_size)).newbyteorder("<")
        self._parts: list[_Part] = []
        # After each part, the documents and tokens of it and those before.
        self._documents, self._tokens = [0], [0]
        for split in splits:
            for number, shard in enumerate(prepared.metadata.shards):
                documents, tokens = shard.size_of(split)
                if documents:
                    folder = shard_path(prepared.folder, number)
                    self._parts.append(_Part(folder, split, documents, tokens))
                    self._documents.append(self._documents[-1] + documents)
                    self._tokens.append(self._tokens[-1] + tokens)
        self._open: OrderedDict[Path, _Mapped] = OrderedDict()

    @property
    def num_documents(self) -> int:
        return self._documents[-1]

    @property
    def num_tokens(self) -> int:
        return self._tokens[-1]

    def streams(self, length: int, seed: int | None) -> PreparedStreams:
        return PreparedStreams(self, length, seed)

    def counts(self, vocab_size: int) -> Tensor:
        """float64 [vocab_size], how often each token is in the training split."""
        assert tuple(self._splits) == ("training",) and vocab_size == self._vocab_size
        path = self._prepared.folder / COUNTS
        return torch.from_numpy(np.fromfile(path, "<i8").astype(np.float64))

    def document(self, number: int) -> tuple[str, Tensor]:
        """A document's name and its tokens, int64 [length]."""
        at = bisect_right(self._documents, number) - 1
        part, place = self._parts[at], number - self._documents[at]
        index = self._mapped(part.path("index"), np.dtype("<i8"))
        starts, names = (row[place : place + 2].tolist() for row in index.array.reshape(2, -1))
        with part.path("names").open("rb") as file:
            file.seek(names[0])
            name = file.read(names[1] - names[0]).decode("utf-8")
        first = self._tokens[at]
        return name, torch.from_numpy(self.read(first + starts[0], first + starts[1])[0])

    def read(self, begin: int, end: int) -> tuple[NDArray[np.int64], list[int]]:
        """Tokens from ``begin`` to ``end`` of the whole split.

        Returns:
            int64 [end - begin], and where in them documents end.

        Raises:
            ValueError: naming a file that does not hold tokens of the vocabulary.
        """
        out = np.empty(end - begin, np.int64)
        ends: list[int] = []
        at = bisect_right(self._tokens, begin) - 1
        while self._tokens[at] < end:
            part, first = self._parts[at], self._tokens[at]
            start, stop = max(begin - first, 0), min(end - first, part.tokens)
            tokens = self._mapped(part.path("tokens"), self._dtype)
            piece = out[first + start - begin : first + stop - begin]
            piece[:] = tokens.array[start:stop]
            tokens.forget()
            largest = int(piece.max(initial=0))
            if largest >= self._vocab_size:
                option, path = self._prepared.option, part.path("tokens")
                must = f"hold tokens below {self._vocab_size}, its vocabulary"
                raise ValueError(f"{option} must {must}, got {largest} in {path}")
            index = self._mapped(part.path("index"), np.dtype("<i8"))
            # Documents end where the next one starts; the last start is the part's end.
            starts = index.array[: part.documents + 1]
            low, high = np.searchsorted(starts, [start, stop], side="right")
            found = starts[low:high] + (first - begin)
            ends += found.tolist()
            index.forget()
            at += 1
        if not ends or ends[-1] != end - begin:
            ends.append(end - begin)
        return out, ends

    @property
    def _vocab_size(self) -> int:
        return self._prepared.metadata.vocab_size

    def _mapped(self, path: Path, dtype: np.dtype[Any]) -> _Mapped:
        mapped = self._open.pop(path, None) or _Mapped(path, dtype)
        self._open[path] = mapped
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return mapped


class PreparedStreams:
    """A prepared split as an endless, randomly addressed sequence of packed streams.

    The documents lie end to end as in the folder. Each epoch cuts them into streams from a place of
    its own on, over the end to the beginning, drops the rest, and takes the streams in an order of
    its own (permutation.py). ``seed=None`` cuts from the first token on and keeps the order: these
    are the streams of the same documents in memory.
    """

    def __init__(self, split: PreparedSplit, length: int, seed: int | None) -> None:
        self.split, self.length, self.seed = split, length, seed
        self.per_epoch = split.num_tokens // length
        must = f"at most the {split.num_tokens} tokens of the split"
        check(self.per_epoch > 0, "data.length", length, must)

    def __getitem__(self, index: int) -> Stream:
        epoch, slot = divmod(index, self.per_epoch)
        first = 0
        if self.seed is not None:
            slot = Permutation(self.per_epoch, mix_seed(self.seed, "epoch", epoch))[slot]
            first = mix_seed(self.seed, "first token", epoch) % self.split.num_tokens
        begin = (first + slot * self.length) % self.split.num_tokens
        end = min(begin + self.length, self.split.num_tokens)
        tokens, ends = self.split.read(begin, end)
        missing = self.length - (end - begin)
        if missing:
            # The last document's end is also a document's end in this stream.
            more, more_ends = self.split.read(0, missing)
            tokens = np.concatenate((tokens, more))
            ends += [end - begin + at for at in more_ends]
        return Stream(
            tokens=torch.from_numpy(tokens)[None],
            cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        )
