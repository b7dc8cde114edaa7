"""Communication that was begun and is not finished yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Work(Generic[T]):
    """A transfer under way, to be finished once.

    Between ``begin_...`` and ``finish`` the caller may compute; neither may touch what is being
    received. Every work must be finished, on every rank and in the same order on all.

    Args:
        wait: waits for the transfer, and returns what came.
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        self._wait: Callable[[], T] | None = wait

    @classmethod
    def done(cls, result: T) -> Work[T]:
        """A work with nothing to wait for."""
        return cls(lambda: result)

    def then(self, unpack: Callable[[T], U]) -> Work[U]:
        """The same transfer, whose result goes through ``unpack`` when it is finished."""
        return Work(lambda: unpack(self.finish()))

    def finish(self) -> T:
        """Wait, and return what came.

        Raises:
            RuntimeError: the second time.
        """
        if self._wait is None:
            raise RuntimeError("a transfer must be finished once, got a second finish()")
        wait, self._wait = self._wait, None
        return wait()
