"""The corpus of a run: documents to train on, documents held out, and their tokenizer.

Documents of text are tokenised at the start and stay in memory, packed end to end into streams of
equal length. Those of a prepared folder (prepared.py) stay on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from launch.data.mixing import MixedSplit, shares
from launch.data.prepared import Prepared, open_prepared
from launch.data.sources import read_documents
from launch.data.streams import Split, Stream
from launch.data.tokenizer import Tokenizer, make_tokenizer
from launch.seeds import mix_seed
from launch.settings import DataSettings
from nsa_dist.checks import check


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised documents end to end.

    Args:
        tokens: integer [total], in the smallest dtype that holds the vocabulary.
        starts: int64 [documents + 1], where each starts in ``tokens``; none is empty.
        names: of each document.
    """

    tokens: Tensor
    starts: Tensor
    names: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def streams(self, length: int, seed: int | None) -> PackedStreams:
        return PackedStreams(self, length, seed)

    def counts(self, vocab_size: int) -> Tensor:
        """float64 [vocab_size], how often each token is there."""
        counts = torch.zeros(vocab_size, dtype=torch.float64)
        # In pieces: bincount works on a copy in int64.
        for piece in self.tokens.split(1 << 22):
            counts += torch.bincount(piece.to(torch.int64), minlength=vocab_size)
        return counts


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out documents.

    Args:
        digest: hexadecimal hash of the vocabulary's size and of every document's name and tokens.
            It does not depend on where the documents and the tokenizer lie.
    """

    training: Split
    held_out: Split
    tokenizer: Tokenizer
    digest: str


def is_held_out(name: str, fraction: float) -> bool:
    """Decided by a hash of the name, so that adding or removing other documents moves none."""
    head = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def load_corpus(settings: DataSettings, share: tuple[int, int] = (0, 1)) -> Corpus:
    """The corpus that the settings name.

    Args:
        share: number of this process and of all processes that check a prepared folder's files
            together; each of them must learn what another finds.

    Raises:
        ValueError: if either split ends up empty, the source or the tokenizer cannot be read, or
            a prepared folder is not whole.
    """
    if settings.source == "prepared":
        return _open_corpus(settings, share)
    return _read_corpus(settings)


def load_tokenizer(settings: DataSettings) -> Tokenizer:
    """The tokenizer of a run's data."""
    if settings.source == "prepared":
        return open_prepared(*_named_folders(settings)[0]).tokenizer()
    return make_tokenizer(settings.tokenizer)


def _named_folders(settings: DataSettings) -> list[tuple[str, str]]:
    """Paths of the prepared folders to train on, each with the option that names it."""
    if settings.sources:
        return [(path, f"data.sources[{at}]") for at, path in enumerate(settings.sources)]
    return [(settings.path, "data.path")]


def _read_corpus(settings: DataSettings) -> Corpus:
    """Read and tokenise every document; all of them stay in memory."""
    tokenizer = make_tokenizer(settings.tokenizer)
    digest = hashlib.sha256(f"vocabulary {tokenizer.vocab_size}\0".encode())
    splits: dict[bool, list[tuple[str, Tensor]]] = {False: [], True: []}
    for name, text in read_documents(settings):
        tokens = tokenizer.encode(text, name)
        if tokens.numel():
            _add_document(digest, name, tokens)
            held_out = not settings.validation_path and is_held_out(name, settings.held_out)
            splits[held_out].append((name, tokens))
    if settings.validation_path:
        digest.update(b"validation\0")
        for name, text in read_documents(replace(settings, path=settings.validation_path)):
            tokens = tokenizer.encode(text, name)
            if tokens.numel():
                _add_document(digest, name, tokens)
                splits[True].append((name, tokens))
    training, held_out_documents = (
        Documents(
            tokens=torch.cat([tokens for _, tokens in split]) if split else torch.empty(0),
            starts=_starts([tokens.numel() for _, tokens in split]),
            names=tuple(name for name, _ in split),
        )
        for split in (splits[False], splits[True])
    )
    corpus = Corpus(training, held_out_documents, tokenizer, digest.hexdigest())
    _check_splits(settings, corpus)
    return corpus


def _open_corpus(settings: DataSettings, share: tuple[int, int]) -> Corpus:
    """The corpus of a prepared folder or of several, and of another one for validation."""
    folders = [open_prepared(path, option) for path, option in _named_folders(settings)]
    for other in folders[1:]:
        other.check_same_tokenizer(folders[0])
    for folder in folders:
        folder.check_files(settings.verify, share)
    folder = folders[0]
    tokenizer = folder.tokenizer()
    digest, held_out = folder.digest, folder.split("held_out")
    training: Split = folder.split("training")
    if settings.sources:
        digest = hashlib.sha256("\0".join(each.digest for each in folders).encode()).hexdigest()
        training = _mix(settings, folders)
    if settings.validation_path:
        other = open_prepared(settings.validation_path, "data.validation_path")
        other.check_same_tokenizer(folder)
        other.check_files(settings.verify, share)
        digest = hashlib.sha256(f"{digest}\0validation\0{other.digest}".encode()).hexdigest()
        # Whatever was held out of it when it was prepared: all of it is for validation.
        held_out = other.split("training", "held_out")
    corpus = Corpus(training, held_out, tokenizer, digest)
    _check_splits(settings, corpus)
    return corpus


def _mix(settings: DataSettings, folders: Sequence[Prepared]) -> MixedSplit:
    """The training splits of several folders, by weight.

    Raises:
        ValueError: naming a folder without a stream to train on, or a weight that is too small.
    """
    places = shares(settings.weights, "data.weights")
    splits = [folder.split("training") for folder in folders]
    for folder, split in zip(folders, splits, strict=True):
        documents, tokens = split.num_documents, split.num_tokens
        must = (
            f"a folder with a stream of data.length = {settings.length} tokens to train on and "
            f"documents of two tokens or more ({documents} documents, {tokens} tokens)"
        )
        some = tokens >= settings.length and tokens > documents
        check(some, folder.option, str(folder.folder), must)
    return MixedSplit(splits, places)


def _check_splits(settings: DataSettings, corpus: Corpus) -> None:
    """Refuse splits without documents, or without a target."""
    training, held_out = corpus.training, corpus.held_out
    where, validation = settings.path or settings.source, settings.validation_path
    some = training.num_documents or held_out.num_documents
    check(bool(some), "data.path", where, "documents with some text")
    # A document's first token is not a target, and no document is empty.
    targets = [split.num_tokens > split.num_documents for split in (training, held_out)]
    if validation:
        must = "documents of two tokens or more"
        check(targets[0], "data.path", where, must)
        check(targets[1], "data.validation_path", validation, must)
        return
    counts = f"{training.num_documents} documents to train on and {held_out.num_documents} held out"
    both = bool(training.num_documents and held_out.num_documents)
    if settings.source == "prepared":
        must = (
            f"a folder with documents in both splits ({counts}; another --held-out of "
            "prepare_data.py gives others) without data.validation_path"
        )
        check(both, "data.path", where, must)
    else:
        must = f"a fraction that leaves some documents in both splits ({where} gives {counts})"
        check(both, "data.held_out", settings.held_out, must)
    check(all(targets), "data.path", where, "documents of two tokens or more in both splits")


def _add_document(digest: hashlib._Hash, name: str, tokens: Tensor) -> None:
    """Add a document to a digest that does not depend on the dtype of tokens."""
    digest.update(f"{name}\0{tokens.numel()}\0".encode())
    for piece in tokens.split(1 << 22):
        digest.update(piece.to(torch.int32).numpy().astype("<i4", copy=False))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class PackedStreams:
    """Documents as an endless, randomly addressed sequence of packed streams.

    Each epoch lays the documents end to end in an order of its own, cuts that into streams, drops
    the rest, and takes the streams in an order of its own: a long document does not fill
    neighbouring streams. ``seed=None`` keeps both orders as they are.
    """

    def __init__(self, documents: Documents, length: int, seed: int | None) -> None:
        self.documents, self.length, self.seed = documents, length, seed
        self.per_epoch = documents.tokens.numel() // length
        must = f"at most the {documents.tokens.numel()} tokens of the split"
        check(self.per_epoch > 0, "data.length", length, must)
        self._epoch = -1

    def _start_epoch(self, epoch: int) -> None:
        count = len(self.documents.names)
        if self.seed is None:
            self._documents = torch.arange(count)
            self._slots = torch.arange(self.per_epoch)
        else:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "epoch", epoch))
            self._documents = torch.randperm(count, generator=generator)
            self._slots = torch.randperm(self.per_epoch, generator=generator)
        lengths = self.documents.starts.diff()[self._documents]
        self._starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        self._epoch = epoch

    def __getitem__(self, index: int) -> Stream:
        epoch, slot = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        begin = int(self._slots[slot]) * self.length
        end = begin + self.length
        first, last = torch.searchsorted(self._starts, torch.tensor([begin, end - 1]), right=True)
        pieces, boundaries = [], [0]
        for place in range(int(first) - 1, int(last)):
            document = self._documents[place]
            start, stop = self._starts[place : place + 2].clamp(begin, end).tolist()
            offset = int(self.documents.starts[document]) - int(self._starts[place])
            pieces.append(self.documents.tokens[offset + start : offset + stop])
            boundaries.append(stop - begin)
        return Stream(
            tokens=torch.cat(pieces).to(torch.int64)[None],
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        )


def unigram_loss(training: Split, streams: Iterable[Stream], vocab_size: int) -> float:
    """Cross-entropy of the streams' targets under the training tokens' frequencies, nats.

    What a model without any context reaches. Targets are every token but each document's first;
    one is added to each count, so that a token never seen costs a finite number.
    """
    counts = training.counts(vocab_size)
    log_p = ((counts + 1) / (counts + 1).sum()).log()
    total, targets = 0.0, 0
    for stream in streams:
        is_target = torch.ones(stream.tokens.numel(), dtype=torch.bool)
        is_target[stream.cu_seqlens[:-1].to(torch.int64)] = False
        total -= float(log_p[stream.tokens[0, is_target]].sum())
        targets += int(is_target.sum())
    return total / max(targets, 1)
