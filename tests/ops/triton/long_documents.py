"""Float64 attention of some queries and keys of a document too long for a dense computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.reference import masked_softmax, num_compressed, weighted_values
from tests.ops.accuracy import assert_2x

BLOCK, STRIDE, SELECT, NUM_SELECTED, WINDOW, WIDTH = 32, 16, 64, 16, 512, 128
SCALE = WIDTH**-0.5
CHUNK = 512  # queries that are computed at once

# (query positions [m], KV head of each [m]) -> rows of k and v [m, K], and which of these it sees.
Keys = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def last_tokens(length: int, device: torch.device) -> Tensor:
    """int64 [C], of the compression blocks."""
    count = num_compressed(length, BLOCK, STRIDE)
    return torch.arange(count, device=device) * STRIDE + BLOCK - 1


def compressed_keys(length: int) -> Keys:
    def keys(t: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        last = last_tokens(length, t.device)
        rows = torch.arange(len(last), device=t.device).expand(len(t), -1)
        return rows, last <= t[:, None]

    return keys


def window_keys(t: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    rows = t[:, None] - torch.arange(WINDOW, device=t.device)
    return rows.clamp(min=0), rows >= 0


def selected_keys(selected: Tensor) -> Keys:
    def keys(t: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        chosen = selected[t, head].long()[..., None]
        rows = chosen * SELECT + torch.arange(SELECT, device=t.device)
        seen = (chosen >= 0) & (rows <= t[:, None, None])
        return rows.where(seen, 0).flatten(1), seen.flatten(1)

    return keys


def _attend(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, seen: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The oracle in `dtype`: q, do [S, H, D], k, v [K, G, D], seen [S, K] or [S, G, K]."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    probs, lse = masked_softmax(leaves[0], leaves[1], seen, SCALE)
    o = weighted_values(probs, leaves[2])
    grads = torch.autograd.grad(o, leaves, do.to(dtype))
    return {
        "o": o.detach(),
        "lse": lse.detach(),
        **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
    }


@dataclass(frozen=True)
class Attention:
    """An operator's results over one document of S tokens.

    inputs: q [S, H, D], k, v [rows, G, D]; do, o [S, H, D]; lse [S, H]; grads: as inputs.
    """

    inputs: tuple[Tensor, ...]
    do: Tensor
    o: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]
    keys: Keys

    def _own_keys(self, t: Tensor, head: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Queries at t [m] with the R heads of KV head [m] each: o, dq [m, R, D], dk [m, K, D]."""
        q, k, v = self.inputs
        rows, seen = self.keys(t, head)
        # A query with its own keys is what the oracle calls a KV head, in a stream of one token.
        q, do = (x.unflatten(1, (k.shape[1], -1))[t, head] for x in (q, self.do))
        k, v = (x[rows, head[:, None]].transpose(0, 1) for x in (k, v))
        found = _attend(q.flatten(0, 1)[None], k, v, do.flatten(0, 1)[None], seen[None], dtype)
        by_query = {name: found[name][0].unflatten(0, q.shape[:2]) for name in ("o", "lse", "dq")}
        return by_query | {name: found[name].transpose(0, 1) for name in ("dk", "dv")}

    def check_queries(self, t: Tensor) -> None:
        """o, lse and dq of the queries at t, of all heads, by the 2x rule."""
        groups = self.inputs[1].shape[1]
        positions = t.repeat_interleave(groups)
        heads = torch.arange(groups, device=t.device).repeat(len(t))
        ours = {"o": self.o[t], "lse": self.lse[t], "dq": self.grads[0][t]}
        exact, plain = (
            self._own_keys(positions, heads, dtype) for dtype in (torch.float64, self.o.dtype)
        )
        for name, x in ours.items():
            y, z = (found[name].reshape(x.shape) for found in (plain, exact))
            assert_2x(x, y, z, self.o.dtype, name, heads=True)

    def check_keys(self, rows: Tensor, t: Tensor, head: int) -> None:
        """dk and dv of these rows of a KV head, which of all queries those at t may see."""
        place = torch.full(self.inputs[1].shape[:1], -1, device=t.device)
        place[rows] = torch.arange(len(rows), device=t.device)

        def parts(dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for some in t.split(CHUNK):
                heads = torch.full_like(some, head)
                at = place[self.keys(some, heads)[0]]
                grads = self._own_keys(some, heads, dtype)
                yield at[at >= 0], {name: grads[name][at >= 0] for name in ("dk", "dv")}

        self._judge_keys(rows, head, parts)

    def check_all_keys(self, head: int) -> None:
        """dk and dv of a KV head, all of whose keys each query may see: the compressed ones."""
        q, k, v = (x.unflatten(1, (self.inputs[1].shape[1], -1))[:, head] for x in self.inputs)
        do = self.do.unflatten(1, (self.inputs[1].shape[1], -1))[:, head]
        t = torch.arange(len(q), device=q.device)

        def parts(dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for some in t.split(CHUNK):
                seen = self.keys(some, some)[1]
                count = int(seen[-1].sum())
                at = t[:count]
                yield at, _attend(q[some], k[:count], v[:count], do[some], seen[:, :count], dtype)

        self._judge_keys(torch.arange(len(k), device=q.device), head, parts)

    def _judge_keys(
        self,
        rows: Tensor,
        head: int,
        parts: Callable[[torch.dtype], Iterator[tuple[Tensor, dict[str, Tensor]]]],
    ) -> None:
        """parts(dtype): gradients by the oracle, [..., D] for places [...] among the rows."""
        dtype, sums = self.o.dtype, {}
        for kind in (torch.float64, dtype):
            # Each part of the plain code is rounded; adding them up is not what is judged.
            wide = torch.float64 if kind == torch.float64 else torch.float32
            sums[kind] = torch.zeros(2, len(rows), WIDTH, dtype=wide, device=rows.device)
            for at, grads in parts(kind):
                for total, name in zip(sums[kind], ("dk", "dv"), strict=True):
                    total.index_add_(0, at, grads[name].reshape(-1, WIDTH).to(wide))
        for number, name in enumerate(("dk", "dv")):
            found = self.grads[1 + number][rows, head]
            plain, exact = sums[dtype][number].to(dtype), sums[torch.float64][number]
            assert_2x(found, plain, exact, dtype, f"{name} of some rows")
