"""Whether a tensor still has the values that something was made from."""

from __future__ import annotations

import torch
from torch import Tensor


class Seen:
    """The values of a tensor at one time.

    torch counts the changes that its own operators make. It does not count what messages of
    torch.distributed (broadcast, all-reduce, scatter), `.data` or the replay of a CUDA graph write.

    Args:
        name: of the tensor, for errors.
    """

    def __init__(self, x: Tensor, name: str) -> None:
        self._name = name
        self._version = None if x.is_inference() else x._version
        self._values = x.detach().clone()

    def again(self, x: Tensor) -> bool:
        """Whether x, the same tensor as before, has the same values.

        The host does not wait for a GPU: it sees the changes that torch counts, and after others
        the GPU fails, as it does for an index out of range. Values made in inference mode have no
        count, so that the host waits for them.
        """
        if x.shape != self._values.shape or x.dtype != self._values.dtype:
            return False
        if x.device.type != "cuda" or x.is_inference():
            return torch.equal(x, self._values)
        if x._version != self._version:
            return False
        assert_same(x, self._values, self._name)
        return True


def assert_same(x: Tensor, values: Tensor, name: str) -> None:
    """Make the device fail where x has other values."""
    torch._assert_async(
        (x == values).all(),
        f"{name} must be a new tensor, or one that operators of torch changed, got one that "
        "something else wrote to, such as torch.distributed",
    )
