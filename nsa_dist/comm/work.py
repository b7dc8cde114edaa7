"""A handle for communication that has begun and is not finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


class Work(Generic[T]):
    """A transfer in progress, which must be finished exactly once.

    Between ``begin_...`` and ``finish`` the caller may compute, but must not use the buffers that
    are being received. All ranks must finish their transfers in the same order.

    Args:
        wait: waits for the transfer and returns its result.
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        self._wait: Callable[[], T] | None = wait

    @classmethod
    def done(cls, result: T) -> Work[T]:
        """A transfer that is already complete."""
        return cls(lambda: result)

    def then(self, unpack: Callable[[T], U]) -> Work[U]:
        """This transfer with ``unpack`` applied to its result."""
        return Work(lambda: unpack(self.finish()))

    def finish(self) -> T:
        """Wait for the transfer and return its result.

        Raises:
            RuntimeError: if called twice.
        """
        if self._wait is None:
            raise RuntimeError("a transfer must be finished once, got a second finish()")
        wait, self._wait = self._wait, None
        return wait()


class Exchange:
    """State that the sending and the receiving half of a transfer share.

    The halves are separate autograd nodes, which pass their ``Work`` to each other here.

    Attributes:
        incoming: the transfer of forward; the sending half begins it, the receiving half finishes.
        returning: that of backward; the receiving half begins it, the sending half finishes.
    """

    def __init__(self) -> None:
        self.incoming: Work[Tensor] | None = None
        self.returning: Work[Tensor] | None = None

    def receive(self) -> Tensor:
        """Finish ``incoming``."""
        assert self.incoming is not None
        work, self.incoming = self.incoming, None
        return work.finish()

    def take_back(self) -> Tensor:
        """Finish ``returning``."""
        assert self.returning is not None
        work, self.returning = self.returning, None
        return work.finish()
