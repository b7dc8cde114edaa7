"""Streams as one rank may hold them, for the operators, and the oracle's dense code over them.

A case names documents and the runs of them that are the local queries. `Layout` puts what those
queries may read into buffers the way the operators take them: in pieces, at odd offsets, with rows
of NaN between them that nobody may read, blocks partly in the own and partly in the fetched rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nsa_kernels import QuerySegments
from nsa_kernels.reference import (
    ReferenceOptions,
    compressed_mask,
    masked_softmax,
    num_compressed,
    select_blocks,
    selected_mask,
    weighted_values,
    window_mask,
)
from tests.ops.accuracy import assert_2x, plain_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NOBODY = -1  # a buffer row that belongs to no token


@dataclass(frozen=True)
class Case:
    """documents: their lengths; runs: (document, position, length) of the local queries."""

    name: str
    documents: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...] = ()
    heads: int = 4
    groups: int = 2
    key_width: int = 16
    value_width: int = 12
    block: int = 8
    stride: int = 4
    select_block: int = 16
    num_selected: int = 4
    window: int = 20

    @property
    def local_runs(self) -> tuple[tuple[int, int, int], ...]:
        return self.runs or tuple((i, 0, length) for i, length in enumerate(self.documents))

    @property
    def scale(self) -> float:
        return self.key_width**-0.5

    @property
    def bounds(self) -> list[int]:
        """Where documents start and end in the stream."""
        return list(accumulate(self.documents, initial=0))

    @property
    def compressed_bounds(self) -> list[int]:
        counts = (num_compressed(length, self.block, self.stride) for length in self.documents)
        return list(accumulate(counts, initial=0))

    @property
    def run_bounds(self) -> list[int]:
        return list(accumulate((length for _, _, length in self.local_runs), initial=0))

    @property
    def local_rows(self) -> Tensor:
        """int64 [N], the stream row of each local query."""
        return join(
            [
                torch.arange(length) + self.bounds[document] + position
                for document, position, length in self.local_runs
            ]
        )

    @property
    def options(self) -> ReferenceOptions:
        return ReferenceOptions(
            self.heads,
            self.groups,
            self.key_width,
            self.value_width,
            compress_block=self.block,
            compress_stride=self.stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
        )


CASES = [
    Case("one_document", (150,)),
    Case("packed", (1, 70, 0, 7, 33, 130), heads=3, groups=1, key_width=5, value_width=9),
    Case(
        "pieces",
        (40, 200, 90),
        ((1, 37, 50), (1, 150, 50), (2, 0, 13), (2, 60, 1)),
        heads=8,
        block=4,
        stride=2,
        select_block=8,
        window=33,
    ),
    Case("one_key_each", (23, 9), heads=2, block=4, select_block=4, num_selected=3, window=1),
    Case("wide", (90, 61), heads=32, groups=1, block=16, stride=2, num_selected=9, window=500),
]
NO_QUERY = Case("no_query", (0,))


def join(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def case_id(value: object) -> str:
    if isinstance(value, Case):
        return value.name
    return str(value).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Normal values of `dtype`."""
    return (torch.randn(shape, dtype=torch.float64) * gain).to(dtype)


def fill(x: Tensor, index: Tensor) -> Tensor:
    """The buffer whose row i is x[index[i]], NaN where that is nobody's."""
    nobody = (index == NOBODY).view(-1, *[1] * (x.dim() - 1))
    if not x.shape[0]:
        return x.new_full((index.shape[0], *x.shape[1:]), torch.nan)
    return x[index.clamp(min=0)].masked_fill(nobody, torch.nan)


def collect(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Gradient of a buffer -> of the rows it was filled from, float64; nobody's must be 0."""
    nobody = index == NOBODY
    assert torch.equal(grad[nobody], torch.zeros_like(grad[nobody])), "gradient of unread rows"
    rows = torch.zeros(num_rows, *grad.shape[1:], dtype=torch.float64)
    return rows.index_add_(0, index[~nobody], grad[~nobody].double())


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a choice as own and fetched rows; indices tell the stream row of each."""

    own_index: Tensor  # [E]
    fetched_index: Tensor  # [G, F]
    block_rows: Tensor  # [G, B]
    block_lengths: Tensor  # [B]

    def fill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, G, D] -> own [E, G, D], fetched [F, G, D]."""
        heads = [fill(x[:, g], index) for g, index in enumerate(self.fetched_index)]
        return fill(x, self.own_index), torch.stack(heads, dim=1)

    def collect(self, own: Tensor, fetched: Tensor, num_rows: int) -> Tensor:
        grads = [
            collect(fetched[:, g], index, num_rows) for g, index in enumerate(self.fetched_index)
        ]
        return collect(own, self.own_index, num_rows) + torch.stack(grads, dim=1)


class Layout:
    """segments of a case and, for the window and compressed buffers, the stream row of each row."""

    def __init__(self, case: Case) -> None:
        self.case = case
        compressed = [torch.full((5,), NOBODY)]
        compressed_bases = []
        for start, end in zip(case.compressed_bounds, case.compressed_bounds[1:], strict=False):
            compressed_bases.append(sum(map(len, compressed)))
            compressed += [torch.arange(start, end), torch.full((1,), NOBODY)]
        self.compressed_index = join(compressed)

        blocks = (-(-length // case.select_block) for length in case.documents)
        self.selected_bases = list(accumulate(blocks, initial=2))

        window: list[Tensor] = [torch.full((1,), NOBODY)]
        rows, start = [], 0
        for document, position, length in case.local_runs:
            oldest = max(0, position - case.window + 1)
            row = sum(map(len, window))
            tokens = torch.arange(oldest, position + length) + case.bounds[document]
            window += [tokens, torch.full((2,), NOBODY)]
            bases = compressed_bases[document], self.selected_bases[document], row - oldest
            rows.append((start, length, position, *bases))
            start += length
        self.window_index = join(window)
        self.segments = QuerySegments.from_rows(rows)

    def block_table(self, selected: Tensor) -> BlockTable:
        """For a choice [N, G, n] of the local queries: about half of the blocks are own."""
        case, width = self.case, self.case.select_block
        num_ids = self.selected_bases[-1] + 1
        tokens = {}
        for document, length in enumerate(case.documents):
            for j in range(-(-length // width)):
                start = case.bounds[document] + j * width
                end = min(start + width, case.bounds[document + 1])
                tokens[self.selected_bases[document] + j] = torch.arange(start, end)
        generator = torch.Generator().manual_seed(7)
        order = torch.randperm(num_ids, generator=generator).tolist()
        block_rows = torch.full((case.groups, num_ids), -1)
        own: list[Tensor] = [torch.full((1,), NOBODY)]
        for block in order:
            if block in tokens and block % 2:
                block_rows[:, block] = sum(map(len, own))
                own += [tokens[block], torch.full((1,), NOBODY)]
        num_own = sum(map(len, own))
        bases = join(
            [
                torch.full((length,), self.selected_bases[document])
                for document, _, length in case.local_runs
            ]
        )
        fetched = []
        for g in range(case.groups):
            ids = (selected[:, g] + bases[:, None])[selected[:, g] >= 0].unique().tolist()
            parts: list[Tensor] = [torch.full((g,), NOBODY)]
            for block in (b for b in order[::-1] if b in ids and block_rows[g, b] < 0):
                block_rows[g, block] = num_own + sum(map(len, parts))
                parts.append(tokens[block])
            fetched.append(join(parts))
        most = max(map(len, fetched))
        fetched_index = torch.full((case.groups, most), NOBODY)
        for g, rows in enumerate(fetched):
            fetched_index[g, : len(rows)] = rows
        lengths = torch.tensor([len(tokens.get(block, ())) for block in range(num_ids)])
        return BlockTable(join(own), fetched_index, block_rows, lengths)


def random_choice(case: Case, seed: int = 0) -> Tensor:
    """int32 [T, G, n]: the forced blocks of each token and others by chance."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for length in case.documents:
        blocks = -(-length // case.select_block)
        scores = torch.rand(length, case.groups, blocks, generator=generator)
        chosen.append(select_blocks(scores, case.options))
    return torch.cat(chosen)


def masks(case: Case, branch: str, selected: Tensor | None = None) -> list[Tensor]:
    """The mask of each document, [S, keys] or [S, G, keys]."""
    device = torch.device("cpu")
    found = []
    for number, length in enumerate(case.documents):
        if branch == "compressed":
            found.append(compressed_mask(length, case.block, case.stride, device))
        elif branch == "window":
            found.append(window_mask(length, case.window, device))
        else:
            assert selected is not None
            own = selected[case.bounds[number] : case.bounds[number + 1]]
            found.append(selected_mask(own, case.select_block))
    return found


def dense_attention(
    case: Case,
    masks: list[Tensor],
    key_bounds: list[int],
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_o: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The oracle's dense code in `dtype` over q [T, H, Dk] and keys, and all gradients."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    outputs, lses = [], []
    for number, mask in enumerate(masks):
        tokens = slice(case.bounds[number], case.bounds[number + 1])
        keys = slice(key_bounds[number], key_bounds[number + 1])
        probs, lse = masked_softmax(q[tokens], k[keys], mask, case.scale)
        outputs.append(weighted_values(probs, v[keys]))
        lses.append(lse)
    rows = case.local_rows
    o = torch.cat(outputs)[rows]
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad_o.to(dtype))
    return {"o": o, "lse": torch.cat(lses)[rows], "dq": dq[rows], "dk": dk, "dv": dv}


def assert_attention(
    case: Case,
    ours: dict[str, Tensor],
    masks: list[Tensor],
    key_bounds: list[int],
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_o: Tensor,
) -> None:
    """Judges o, lse, dq of each run and head, dk and dv of each document and head."""
    dtype = inputs[0].dtype
    arguments = (case, masks, key_bounds, inputs, grad_o)
    exact = dense_attention(*arguments, torch.float64)
    plain = dense_attention(*arguments, plain_dtype(dtype))
    assert ours["o"].dtype == dtype
    assert ours["lse"].dtype == (dtype if dtype == torch.float64 else torch.float32)
    for name, x in ours.items():
        bounds = key_bounds if name in ("dk", "dv") else case.run_bounds
        assert_2x(x, plain[name], exact[name], dtype, name, cu_seqlens=bounds, heads=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: 0 is not -0, and a NaN equals the same NaN."""
    assert a.dtype == b.dtype
    raw = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(raw), b.detach().contiguous().view(raw))


def largest(dtype: torch.dtype) -> float:
    """A finite value whose products overflow."""
    return torch.finfo(dtype).max


def assert_unchanged_bits(
    run: Callable[[], tuple[Tensor, ...]], disturb: Callable[[], object], rows: slice | Tensor
) -> None:
    """`disturb` changes inputs in place; `rows` of every result of `run` must not notice."""
    before = [x[rows].clone() for x in run()]
    disturb()
    after = run()
    changed = [not same_bits(x, y[rows]) for x, y in zip(before, after, strict=True)]
    assert not any(changed), changed
