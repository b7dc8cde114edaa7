"""Text to tokens: bytes as they are, a ``tokenizer.json``, or what transformers loads."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nsa_dist.checks import check

# Tokens are kept as int32 at most.
_MOST_TOKENS = torch.iinfo(torch.int32).max


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocab_size: the largest token + 1; some smaller ones may be unused.
        unit: what a token is called.
        note: a line that is printed at the start of a run; may be empty.
    """

    vocab_size: int
    unit: str
    note: str

    def encode(self, text: bytes, name: str) -> Tensor:
        """Tokens of a document, an integer vector in the smallest dtype for the vocabulary.

        Raises:
            ValueError: naming the document, if it cannot be encoded.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> str:
        """Write what ``make_tokenizer`` needs to make it again.

        Returns:
            The path within ``folder``, or 'bytes', which needs nothing.
        """
        ...


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256
    unit = "byte"
    note = ""

    def encode(self, text: bytes, name: str) -> Tensor:
        if not text:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> str:
        return "bytes"


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` (package tokenizers) or a model's name or folder (transformers).

    Truncation and padding, which a file may have switched on for a model's inputs, are switched
    off: they would cut every document or fill it up.

    Args:
        option: what errors call the option that named it.

    Raises:
        ValueError: if it cannot be loaded, or its ids cannot be indices of an embedding.
    """

    unit = "token"

    def __init__(self, name: str, option: str = "data.tokenizer") -> None:
        self._name, self._option = name, option
        package = "tokenizers" if name.endswith(".json") else "transformers"
        try:
            library: Any = importlib.import_module(package)
        except ImportError:
            raise ValueError(
                f"{option} must be 'bytes' where {package} is not installed "
                f"(pip install {package}), got {name!r}"
            ) from None
        if package == "tokenizers":
            check(Path(name).is_file(), option, name, "an existing file")
            load = library.Tokenizer.from_file
            # What transformers' option of this name does not switch on.
            self._options: dict[str, Any] = {}
        else:
            # Code that comes with it would otherwise run after a question on the terminal.
            load = partial(library.AutoTokenizer.from_pretrained, trust_remote_code=False)
            # No warning of texts beyond a model's longest input: they are cut into streams.
            self._options = {"verbose": False}
        try:
            self._inner: Any = load(name)
        except Exception as error:  # These packages raise errors of any type.
            must = f"'bytes' or a tokenizer that {package} loads"
            got = f"{name!r} ({_words(error)})"
            raise ValueError(f"{option} must be {must}, got {got}") from None
        self.note = self._switch_off()

        ids = self._inner.get_vocab().values()
        least, largest = min(ids, default=0), max(ids, default=-1)
        check(bool(ids), option, name, "one with tokens")
        if least < 0 or largest >= _MOST_TOKENS:
            raise ValueError(
                f"{option} must be one with ids from 0 to {_MOST_TOKENS - 1}, "
                f"got {name!r} with ids from {least} to {largest}"
            )
        self.vocab_size = largest + 1
        self._dtype = _smallest_dtype(self.vocab_size)

    def _switch_off(self) -> str:
        """Switch truncation and padding off; returns a note about it, which may be empty."""
        inner = getattr(self._inner, "backend_tokenizer", self._inner)
        found = []
        if getattr(inner, "truncation", None) is not None:
            found.append(f"truncation to {inner.truncation['max_length']} tokens")
            inner.no_truncation()
        if getattr(inner, "padding", None) is not None:
            found.append("padding")
            inner.no_padding()
        if not found:
            return ""
        return f"{self._option}: {' and '.join(found)} of {self._name!r} switched off"

    def encode(self, text: bytes, name: str) -> Tensor:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._option} must be 'bytes' for a document that is not UTF-8, "
                f"got {self._name!r} for {name!r} ({error})"
            ) from None
        try:
            encoded = self._inner.encode(decoded, add_special_tokens=False, **self._options)
        except Exception as error:  # As above: of any type.
            must = f"one that can encode document {name!r}"
            got = f"{self._name!r} ({_words(error)})"
            raise ValueError(f"{self._option} must be {must}, got {got}") from None
        ids = torch.tensor(getattr(encoded, "ids", encoded), dtype=torch.int64)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            must = f"one whose tokens are in its vocabulary, 0 to {self.vocab_size - 1}"
            got = f"token {int(ids.max())} or {int(ids.min())} in document {name!r}"
            raise ValueError(f"{self._option} must be {must}, got {self._name!r} with {got}")
        return ids.to(self._dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode(list(tokens)))

    def save(self, folder: Path) -> str:
        if self._name.endswith(".json"):
            shutil.copyfile(self._name, folder / "tokenizer.json")
            return "tokenizer.json"
        self._inner.save_pretrained(str(folder / "tokenizer"))
        return "tokenizer"


def _smallest_dtype(vocab_size: int) -> torch.dtype:
    dtypes = (torch.uint8, torch.int16, torch.int32)
    return next(dtype for dtype in dtypes if vocab_size - 1 <= torch.iinfo(dtype).max)


def _words(error: Exception) -> str:
    """An error of another package in a line."""
    return " ".join(str(error).split()) or type(error).__name__


def make_tokenizer(name: str, option: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer of a name that ``option`` was given."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name, option)
