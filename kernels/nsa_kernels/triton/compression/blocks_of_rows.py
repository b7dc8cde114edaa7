"""Which compression blocks contain a row of the buffer, found on the device without a wait.

Letters: C blocks, l rows of a block, E rows of the buffer.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.triton.shared.cache import cached_in, kept_with


class BlocksOfRows(NamedTuple):
    """The blocks of l rows that start at given rows, no two at the same one, in order of rows.

    starts: int64 [C], first rows, ascending. order: int64 [C], the number of each block as given.
    owned: int32 [C], rows from its start up to the next block's start, at most l.
    latest: int32 [E], of each row, the last of `starts` at or before it; -1: none.
    block_at: int32 [E], the number, as given, of the block that starts at each row; -1: none.
    step: int32 [1], a power of two that divides the distance of any two blocks that share rows
    and share them with none between, or l where no blocks do; at most l / step blocks, rounded up,
    contain a row.
    """

    starts: Tensor
    order: Tensor
    owned: Tensor
    latest: Tensor
    block_at: Tensor
    step: Tensor

    @classmethod
    def of(cls, block_rows_C: Tensor, block: int, num_rows: int) -> BlocksOfRows:
        """Of a buffer of num_rows = E rows, block_rows int64; C at least 1.

        Kept with the tensor: keys, values and all layers of a batch have the same blocks.
        """
        if block_rows_C.is_inference():  # whose changes are not counted
            return cls._made(block_rows_C, block, num_rows)
        cache = kept_with(block_rows_C, "_blocks_of_rows", dict)
        make = partial(cls._made, block_rows_C, block, num_rows)
        return cached_in(cache, (block, num_rows), block_rows_C.device, make)

    @classmethod
    def _made(cls, block_rows_C: Tensor, block: int, num_rows: int) -> BlocksOfRows:
        starts_C, order_C = block_rows_C.sort(stable=True)
        gaps_C = torch.cat([starts_C.diff(), starts_C.new_full((1,), block)])
        lowest_bit_C = torch.where(gaps_C < block, gaps_C & -gaps_C, block)
        rows_E = torch.arange(num_rows, device=block_rows_C.device)
        latest_E = torch.searchsorted(starts_C, rows_E, right=True) - 1
        at_E = latest_E.clamp(min=0)
        starts_here_E = (latest_E >= 0) & (starts_C[at_E] == rows_E)
        return cls(
            starts=starts_C,
            order=order_C,
            owned=gaps_C.clamp(max=block).int(),
            latest=latest_E.int(),
            block_at=torch.where(starts_here_E, order_C[at_E], -1).int(),
            step=lowest_bit_C.min().clamp(min=1).int().reshape(1),
        )
