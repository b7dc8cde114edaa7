"""Steps of one token whose lengths the device alone knows, so that one CUDA graph fits them all.

Over a cache that does not grow every tensor of such a step has the same shape and place, however
many tokens are cached. What changes follows on the device from one number, the cached tokens: the
queries' positions, the column of the new token, the compression block that was completed last. Each
row compresses that one, whether the new token completes it or an earlier one did. A row without one
compresses what is there as its block 0, which no query sees before it is whole and made again.

Letters: B rows of a batch, each with one query.
"""

from __future__ import annotations

import torch

from nsa_dist.config import NSAConfig
from nsa_dist.decoding.step import Step, plan_of, selection_blocks, to_device
from nsa_dist.host_tables import on_cpu
from nsa_dist.plan.grid import num_blocks
from nsa_kernels.segments import QueriesOnDevice


class StaticTables:
    """What all steps over a cache have in common, on its device.

    Attributes:
        starts: column of the first token of each row, which must be cached.
        capacity: tokens of a row that the cache has room for, at least a compression block.
        block_capacity: compressed tokens of a row that there is room for.
        longest: tokens of the longest document when the cache is full.
        device: of the cache.
    """

    def __init__(
        self,
        config: NSAConfig,
        starts: tuple[int, ...],
        capacity: int,
        device: torch.device,
    ) -> None:
        assert capacity >= config.compress_block, capacity
        self.config, self.starts, self.capacity, self.device = config, starts, capacity, device
        self.block_capacity = num_blocks(capacity, config)
        self.longest = capacity - min(starts)
        select = config.select_block
        most = -(-self.longest // select)  # selection blocks of a row
        with on_cpu():
            rows, lengths = selection_blocks(starts, capacity, most, capacity, select)
            past, moves = torch.tensor([0]), torch.tensor([0, 0, 1, 0, 0, 0])
        # As Segment has them, position 0 standing for the column of the new token.
        segments = [
            (b, 1, -start, b * self.block_capacity, b * most, b * capacity + start)
            for b, start in enumerate(starts)
        ]
        table = torch.tensor(segments, dtype=torch.int64, device="cpu")
        self._newest = table.clone()
        self._newest[:, 2] = self.longest - 1
        tables = to_device((past, table, moves, rows, lengths), device)
        self._past, self._table_B6, self._moves_6, self._rows, self._lengths = tables

    def begin(self, past: int) -> None:
        """Tell the device how many tokens of each row are cached, ahead of a step."""
        self._past.fill_(past)

    def step(self, past: int) -> Step:
        """The tables of the step that ``begin`` announced, made on the device.

        Args:
            past: as ``begin`` had it; no tensor depends on it.
        """
        config, batch = self.config, len(self.starts)
        block, stride = config.compress_block, config.compress_stride
        table_B6 = self._table_B6 + self._moves_6 * self._past
        position_B, compressed_B, _, first_B = table_B6[:, 2:].unbind(1)
        index_B = (position_B + (1 - block)).clamp(min=0) // stride
        # A row without a whole block may have none in the cache's memory either.
        made_rows_B = (first_B + index_B * stride).clamp(max=batch * self.capacity - block)
        slots_B = compressed_B + index_B
        queries = QueriesOnDevice(self._newest, table_B6, batch, bound=self.longest - 1)
        rows = batch * self.capacity
        plan = plan_of(config, queries, self.longest, rows, made_rows_B, self._rows, self._lengths)
        return Step(
            past,
            self.starts,
            self.capacity,
            self.block_capacity,
            1,
            slots_B,
            plan,
            column=self._past,
        )
