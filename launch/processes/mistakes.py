"""Errors that a user made, printed once however many processes find them.

Under torchrun one rank or all ranks find a wrong option or a broken file. The first one prints the
error, or the first one of each host where torchrun's agents keep no store for all. The others wait
for that, as torchrun ends all ranks as soon as one has exited.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

T = TypeVar("T")

BAD_INPUT = 2
"""Status of a program whose every error is one of its command line or of the files it names, as
that of a bad option."""

# How long a rank waits for another one to print.
_TIMEOUT = timedelta(seconds=20)


def has_agent_store() -> bool:
    """Whether torchrun's agents keep the store by which ranks meet. With
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` rank 0 keeps one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launcher_store() -> Any:
    """A store that outlives every rank, of torchrun's agents or else of this host's alone; None
    without torchrun."""
    if not has_agent_store():
        # The agent makes a folder for each attempt, with one for each of its ranks, and removes it.
        own = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if not own:
            return None
        path = Path(own).parents[1] / "mistakes"
        return dist.FileStore(str(path), -1)  # type: ignore[attr-defined]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT
        )
    except RuntimeError:
        return None  # The agent is gone: every rank prints, which is better than none.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"mistakes/{attempt}", store)  # type: ignore[attr-defined]


@contextmanager
def told_once(words: str) -> Iterator[bool]:
    """Yields whether this process prints ``words``; the others wait until that is done.

    Without torchrun every process prints.
    """
    store = _launcher_store()
    if store is None:
        yield True
        return
    key = hashlib.sha256(words.encode("utf-8", "backslashreplace")).hexdigest()
    if store.add(f"{key}/tellers", 1) == 1:
        try:
            yield True
        finally:
            store.set(f"{key}/told", "")
        return
    try:
        store.wait([f"{key}/told"], _TIMEOUT)
    except RuntimeError:
        # That process was ended before it could print.
        yield True
        return
    yield False


def end(program: str, error: Exception, status: int = 1) -> NoReturn:
    """Print an error in one line, once, and end the program."""
    words = f"{program}: {' '.join(line.strip() for line in str(error).splitlines())}"
    if "TORCHELASTIC_RUN_ID" not in os.environ and status == 1:
        sys.exit(words)
    with told_once(words) as first:
        if first:
            print(words, file=sys.stderr, flush=True)
    sys.exit(status)


def read_once(parse: Callable[[], T]) -> T:
    """What ``parse`` reads of the command line.

    If that ends the program (a bad option, ``--help``), one process prints the reason.
    """
    words = io.StringIO()
    try:
        with redirect_stdout(words), redirect_stderr(words):
            read = parse()
    except SystemExit:
        with told_once("the command line") as first:
            if first:
                parse()
        raise
    print(words.getvalue(), end="", file=sys.stderr)
    return read
