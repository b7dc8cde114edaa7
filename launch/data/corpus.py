"""Documents, packed end to end into streams of equal length.

A stream is [1, T] tokens with the document boundaries inside it (``cu_seqlens``). A document cut
by a stream's end continues in another stream as a document of its own: nothing attends across.
Which tokens stream i holds depends on the data, the length and the seed alone, never on ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.data.sources import read_documents
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


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out documents.

    Args:
        digest: hexadecimal hash of the vocabulary's size and of every document's name and tokens.
            It does not depend on where the documents and the tokenizer lie.
    """

    training: Documents
    held_out: Documents
    tokenizer: Tokenizer
    digest: str


def is_held_out(name: str, fraction: float) -> bool:
    """Decided by a hash of the name, so that adding or removing other documents moves none."""
    head = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def load_corpus(settings: DataSettings) -> Corpus:
    """Read and tokenise every document; all of them stay in memory.

    Raises:
        ValueError: if either split ends up empty, or the source or the tokenizer cannot be read.
    """
    tokenizer = make_tokenizer(settings.tokenizer)
    digest = hashlib.sha256(f"vocabulary {tokenizer.vocab_size}\0".encode())
    splits: dict[bool, list[tuple[str, Tensor]]] = {False: [], True: []}
    for name, text in read_documents(settings):
        tokens = tokenizer.encode(text, name)
        if tokens.numel():
            _add_document(digest, name, tokens)
            splits[is_held_out(name, settings.held_out)].append((name, tokens))
    where = settings.path or settings.source
    check(any(splits.values()), "data.path", where, "documents with some text")
    counts = f"{len(splits[False])} documents to train on and {len(splits[True])} held out"
    for split in splits.values():
        must = f"a fraction that leaves some documents in both splits ({where} gives {counts})"
        check(bool(split), "data.held_out", settings.held_out, must)
        # A document's first token is not a target.
        targets = any(tokens.numel() > 1 for _, tokens in split)
        must = "documents of two tokens or more in both splits"
        check(targets, "data.path", where, must)
    training, held_out = (
        Documents(
            tokens=torch.cat([tokens for _, tokens in split]),
            starts=_starts([tokens.numel() for _, tokens in split]),
            names=tuple(name for name, _ in split),
        )
        for split in (splits[False], splits[True])
    )
    return Corpus(training, held_out, tokenizer, digest.hexdigest())


def _add_document(digest: hashlib._Hash, name: str, tokens: Tensor) -> None:
    """Add a document to a digest that does not depend on the dtype of tokens."""
    digest.update(f"{name}\0{tokens.numel()}\0".encode())
    for piece in tokens.split(1 << 22):
        digest.update(piece.to(torch.int32).numpy().astype("<i4", copy=False))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass(frozen=True, eq=False)
class Stream:
    """Packed documents.

    Args:
        tokens: int64 [1, T].
        cu_seqlens: int32 [documents + 1] on the CPU, where each document starts; the last is T.
    """

    tokens: Tensor
    cu_seqlens: Tensor


def join(streams: Sequence[Stream]) -> Stream:
    """Streams end to end as one; the documents stay the same."""
    offsets = _starts([stream.tokens.numel() for stream in streams])
    pieces = [s.cu_seqlens[1:] + offset for s, offset in zip(streams, offsets, strict=False)]
    cu_seqlens = torch.cat([torch.zeros(1), *pieces]).to(torch.int32)
    return Stream(torch.cat([stream.tokens for stream in streams], dim=1), cu_seqlens)


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


def unigram_loss(training: Documents, streams: Iterable[Stream], vocab_size: int) -> float:
    """Cross-entropy of the streams' targets under the training tokens' frequencies, nats.

    What a model without any context reaches. Targets are every token but each document's first;
    one is added to each count, so that a token never seen costs a finite number.
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    # In pieces: bincount works on a copy in int64.
    for piece in training.tokens.split(1 << 22):
        counts += torch.bincount(piece.to(torch.int64), minlength=vocab_size)
    log_p = ((counts + 1) / (counts + 1).sum()).log()
    total, targets = 0.0, 0
    for stream in streams:
        is_target = torch.ones(stream.tokens.numel(), dtype=torch.bool)
        is_target[stream.cu_seqlens[:-1].to(torch.int64)] = False
        total -= float(log_p[stream.tokens[0, is_target]].sum())
        targets += int(is_target.sum())
    return total / max(targets, 1)
