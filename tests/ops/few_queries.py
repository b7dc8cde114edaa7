"""Few queries at the ends of documents, over caches of which nobody may read the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.backend import attend_few
from nsa_kernels.reference import masked_softmax, weighted_values
from nsa_kernels.segments import QueriesOnDevice
from tests.ops.backends import BackendOnDevice

BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class Decoding:
    """rows: (tokens, new ones) of each document; the rest as the operators take them."""

    name: str
    rows: tuple[tuple[int, int], ...]
    heads: int = 4
    groups: int = 2
    key_width: int = 32
    value_width: int = 32
    block: int = 8
    stride: int = 4
    select_block: int = 16
    num_selected: int = 4
    window: int = 40
    branches: tuple[str, ...] = BRANCHES

    @property
    def capacity(self) -> int:
        return max(tokens for tokens, _ in self.rows) + 5

    @property
    def compressed(self) -> int:
        return self.capacity // self.stride

    @property
    def most(self) -> int:
        return -(-self.capacity // self.select_block)

    @property
    def scale(self) -> float:
        return self.key_width**-0.5

    @property
    def options(self) -> dict[str, Any]:
        names = ("block", "stride", "select_block", "num_selected", "window", "scale", "branches")
        forced = {"num_init_blocks": 1, "num_local_blocks": 2}
        return {name: getattr(self, name) for name in names} | forced


CASES = (
    Decoding("ends of documents", ((150, 1), (33, 1), (6, 1), (1, 1))),
    Decoding("several tokens", ((90, 5), (40, 1), (17, 3)), block=4, stride=4),
    Decoding(
        "padded",
        ((70, 2), (49, 1)),
        heads=3,
        groups=1,
        key_width=48,
        value_width=80,
        block=16,
        stride=4,
        select_block=32,
        num_selected=3,
        window=33,
    ),
    Decoding("32 heads", ((60, 1),), heads=32, groups=1, value_width=16),
    Decoding("many parts", ((300, 1), (280, 1)), block=4, stride=2, num_selected=7, window=100),
    Decoding("nothing compressed yet", ((7, 1), (3, 2))),
    Decoding("compressed keys that only select", ((90, 1),), branches=("selected", "window")),
)


class Problem:
    """Caches with NaN in all rows that nobody may read, and the queries at their ends."""

    def __init__(self, case: Decoding, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(len(case.name))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        batch, groups = len(case.rows), case.groups
        queries = sum(new for _, new in case.rows)
        self.q = normal(queries, case.heads, case.key_width)
        self.gates = torch.rand(queries, case.heads, len(case.branches), generator=generator)
        self.keys, self.values = {}, {}
        for name in BRANCHES:
            rows = case.compressed if name == "compressed" else case.capacity
            # KV heads of all branches stand beside each other, as in a cache with independent sets.
            both = normal(batch, rows, 3 * groups, max(case.key_width, case.value_width))
            for b, (tokens, _) in enumerate(case.rows):
                seen = tokens
                if name == "compressed":
                    seen = max(0, (tokens - case.block) // case.stride + 1)
                both[b, seen:] = math.nan
            k, v = both[:, :, :groups], both[:, :, groups : 2 * groups]
            self.keys[name] = k[..., : case.key_width].flatten(0, 1)
            if name in case.branches:
                self.values[name] = v[..., : case.value_width].flatten(0, 1)
        blocks = torch.arange(case.most) * case.select_block
        rows = torch.arange(batch)[:, None] * case.capacity + blocks
        ends = torch.tensor([tokens for tokens, _ in case.rows])[:, None]
        self.block_rows = rows.where(blocks < ends, -1).flatten()
        self.paging: dict[str, Any] = {}

    def into_pages(self, page: int) -> None:
        """Move blocks, and pages of compressed tokens, each to another place; NaN between them."""
        case, groups = self.case, self.case.groups
        generator = torch.Generator().manual_seed(page)
        starts, size = self.block_rows, case.select_block
        lengths = [
            min(size, max(0, tokens - j * size))
            for tokens, _ in case.rows
            for j in range(case.most)
        ]
        pages = -(-case.compressed // page)
        of_compressed = [
            (b * case.compressed + j * page, min(page, case.compressed - j * page))
            for b in range(len(case.rows))
            for j in range(pages)
        ]
        self.block_rows = torch.randperm(len(lengths), generator=generator) * (size + 1)
        rows = torch.randperm(len(of_compressed), generator=generator) * page
        self.paging = {"compressed_rows": rows, "compressed_page": page}
        for given in (self.keys, self.values):
            for name, old in given.items():
                places = list(zip(starts.tolist(), lengths, self.block_rows.tolist(), strict=True))
                if name == "compressed":
                    places = [(*x, y) for x, y in zip(of_compressed, rows.tolist(), strict=True)]
                room = max(place for *_, place in places) + max(size, page)
                new = old.new_full((room, groups, old.shape[-1]), math.nan)
                for start, length, place in places:
                    new[place : place + length] = old[max(0, start) : max(0, start) + length]
                given[name] = new

    def segments(self, rows: list[int] | None = None, only: int | None = None) -> QuerySegments:
        """Of all rows, or of these; of one of their tokens, counted from the end, if `only`."""
        case, found, start = self.case, [], 0
        for b, (tokens, new) in enumerate(case.rows):
            if rows is not None and b not in rows:
                continue
            length, position = (new, tokens - new) if only is None else (1, tokens - only)
            page = self.paging.get("compressed_page", 1)
            base = (b * -(-case.compressed // page), b * case.most, b * case.capacity)
            found.append((start, length, position, *base))
            start += length
        return QuerySegments.from_rows(found)

    def on_device(self) -> QueriesOnDevice:
        """The last query of each row, of which the host knows that they stand within the caches."""
        alone, newest = self.segments(only=1), self.case.capacity - 1
        host = alone.host.clone()
        host[:, 2] = newest
        return QueriesOnDevice(host, alone.table, len(host), bound=newest)

    def run(
        self, backend: BackendOnDevice, segments: QuerySegments, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of some of the queries, which stand in the segments."""
        few = attend_few(backend.ops)
        assert few is not None

        def placed(x: Tensor) -> Tensor:
            return x.to(backend.device)

        out, blocks = few(
            placed(self.q[queries]),
            {name: placed(x) for name, x in self.keys.items()},
            {name: placed(x) for name, x in self.values.items()},
            placed(self.gates[queries]),
            segments.to(backend.device),
            placed(self.block_rows),
            **{n: placed(x) if isinstance(x, Tensor) else x for n, x in self.paging.items()},
            **self.case.options,
        )
        return out.cpu(), blocks.cpu()

    def dense(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """All branches by dense code in a dtype, with the given choice."""
        case, out, n = self.case, [], 0
        for b, (tokens, new) in enumerate(case.rows):
            for t in range(tokens - new, tokens):
                key = torch.arange(case.capacity)
                ends = torch.arange(case.compressed) * case.stride + case.block - 1
                chosen = (key // case.select_block == blocks[n].unsqueeze(-1)).any(1)
                masks = {
                    "compressed": ends <= t,
                    "selected": chosen & (key <= t),
                    "window": (key <= t) & (key > t - case.window),
                }
                total = torch.zeros(1, case.heads, case.value_width, dtype=dtype)
                for i, name in enumerate(case.branches):
                    rows = len(masks["compressed"] if name == "compressed" else key)
                    at = slice(b * rows, (b + 1) * rows)
                    k, v = (x[name][at].to(dtype).nan_to_num() for x in (self.keys, self.values))
                    q = self.q[n : n + 1].to(dtype)
                    probs, _ = masked_softmax(q, k, masks[name][None], case.scale)
                    gate = self.gates[n, :, i, None].to(dtype)
                    total = total + gate * weighted_values(probs, v)
                out.append(total)
                n += 1
        return torch.cat(out)
