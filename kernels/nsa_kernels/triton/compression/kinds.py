"""What each kind of compressor is made of, forward and backward.

The kernels stand in projection.py (`mlp`, `linear`) and pooling.py (`conv1d`, `attention_pool`,
`mean`). Products are computed in the dtype of x with sums in float32, so weights of another dtype
are rounded to it, while position embeddings and what multiplies them stay in float32. A token's
bits depend on nothing but its own block and the weights.

The workspace of a backward is two [C, G, hidden] in x's dtype and one in float32 for `mlp`, two
float32 [C, G, l] for `attention_pool`, and float32 sums of weights' gradients, of at most PROGRAMS
tiles and RUNS blocks.

Letters: E rows, G KV heads, D width, C blocks, l rows of a block, P sets of weights (G with one a
head, else 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_kernels.compressors import COMPRESSORS
from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.compression.pooling import (
    ATTENTION_POOL,
    CONV1D,
    MEAN,
    attention_pool_backward,
    conv1d_weight_gradient,
    pool,
    pool_row_gradient,
)
from nsa_kernels.triton.compression.projection import (
    SILU,
    project,
    project_backward,
    project_row_gradient,
    project_weight_gradient,
)

Gradients = tuple[Tensor, tuple[Tensor, ...]]


class Blocks:
    """Blocks of x, and what a gradient needs to know of them."""

    def __init__(self, x: Tensor, block_rows: Tensor, block: int, sets: int) -> None:
        self.x, self.rows, self.block, self.sets = x, block_rows, block, sets

    @property
    def of_rows(self) -> BlocksOfRows:
        return BlocksOfRows.of(self.rows, self.block, self.x.shape[0])

    def sum(self, grad: Tensor) -> Tensor:
        """Float32 sum of [C, G, ...] over blocks, and over heads that share weights: [P, ...]."""
        total = grad.sum(dim=0, dtype=torch.float32)
        return total if self.sets > 1 else total.sum(dim=0, keepdim=True)

    def itself(self) -> Tensor:
        return torch.arange(self.rows.shape[0], device=self.rows.device)


def _bias(weight: Tensor, position: Tensor) -> Tensor:
    """W vec(e): weight [P, O, l*D], position [P, l, D] -> float32 [P, O]."""
    return (weight.float() * position.float().flatten(1).unsqueeze(1)).sum(dim=-1)


def _product_gradients(
    dh: Tensor, blocks: Blocks, position: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, position and weight of h = W vec(x + e) for every block, from dh [C, G, O]."""
    total = blocks.sum(dh)  # [P, O]
    flat = position.float().flatten(1)
    d_weight = project_weight_gradient(dh, blocks.x, blocks.rows, weight.shape[2], blocks.sets)
    d_weight.addcmul_(total.unsqueeze(-1), flat.unsqueeze(1))
    d_position = (total.unsqueeze(-1) * weight.float()).sum(dim=1).view_as(position)
    dx = project_row_gradient(dh, weight.to(dh.dtype), blocks.block, blocks.of_rows)
    return dx, d_position, d_weight


class _Mlp:
    """W2 silu(W1 vec(x + e))."""

    @staticmethod
    def forward(blocks: Blocks, position: Tensor, up: Tensor, down: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        active = project(blocks.x, blocks.rows, up.to(dtype), _bias(up, position), SILU)
        return project(active, blocks.itself(), down.to(dtype))

    @staticmethod
    def backward(
        do: Tensor, blocks: Blocks, position: Tensor, up: Tensor, down: Tensor
    ) -> Gradients:
        dtype, itself = blocks.x.dtype, blocks.itself()
        transposed = down.to(dtype).mT.contiguous()
        d_active = project(do, itself, transposed, dtype=torch.float32)
        active, dh = project_backward(
            blocks.x, blocks.rows, up.to(dtype), _bias(up, position), d_active
        )
        d_down = project_weight_gradient(do, active, itself, up.shape[1], blocks.sets)
        dx, d_position, d_up = _product_gradients(dh, blocks, position, up)
        return dx, (d_position, d_up, d_down)


class _Linear:
    """W vec(x + e)."""

    @staticmethod
    def forward(blocks: Blocks, position: Tensor, weight: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        return project(blocks.x, blocks.rows, weight.to(dtype), _bias(weight, position))

    @staticmethod
    def backward(do: Tensor, blocks: Blocks, position: Tensor, weight: Tensor) -> Gradients:
        dx, d_position, d_weight = _product_gradients(do, blocks, position, weight)
        return dx, (d_position, d_weight)


class _Conv1d:
    """sum_r w_r (x + e)_r, a weight for each row and channel."""

    @staticmethod
    def forward(blocks: Blocks, position: Tensor, weight: Tensor) -> Tensor:
        rows = weight.float().mT.contiguous()  # [P, l, D]
        bias = (rows * position.float()).sum(dim=1)
        return pool(blocks.x, blocks.rows, blocks.block, CONV1D, rows, bias)

    @staticmethod
    def backward(do: Tensor, blocks: Blocks, position: Tensor, weight: Tensor) -> Gradients:
        rows = weight.float().mT.contiguous()
        total = blocks.sum(do).unsqueeze(1)  # [P, 1, D]
        d_rows = conv1d_weight_gradient(do, blocks.x, blocks.rows, blocks.block, blocks.sets)
        d_rows.addcmul_(total, position.float())
        dx = pool_row_gradient(do, blocks.block, CONV1D, blocks.of_rows, rows)
        return dx, (total * rows, d_rows.mT)


class _AttentionPool:
    """sum_r a_r x_r with a = softmax_r(u (x + e)_r)."""

    @staticmethod
    def forward(blocks: Blocks, position: Tensor, query: Tensor) -> Tensor:
        u = query.float().contiguous()
        bias = (position.float() * u.unsqueeze(1)).sum(dim=-1)  # [P, l]
        return pool(blocks.x, blocks.rows, blocks.block, ATTENTION_POOL, u, bias)

    @staticmethod
    def backward(do: Tensor, blocks: Blocks, position: Tensor, query: Tensor) -> Gradients:
        u, e = query.float().contiguous(), position.float()
        bias = (e * u.unsqueeze(1)).sum(dim=-1)
        shares, d_logits, d_query = attention_pool_backward(do, blocks.x, blocks.rows, u, bias)
        total = blocks.sum(d_logits).unsqueeze(-1)  # [P, l, 1]
        d_query.add_((total * e).sum(dim=1))
        dx = pool_row_gradient(
            do, blocks.block, ATTENTION_POOL, blocks.of_rows, u, shares, d_logits
        )
        return dx, (total * u.unsqueeze(1), d_query)


class _Mean:
    @staticmethod
    def forward(blocks: Blocks) -> Tensor:
        return pool(blocks.x, blocks.rows, blocks.block, MEAN)

    @staticmethod
    def backward(do: Tensor, blocks: Blocks) -> Gradients:
        return pool_row_gradient(do, blocks.block, MEAN, blocks.of_rows), ()


# forward(blocks, *params) -> [C, G, D], backward(its gradient, blocks, *params) -> that of x and
# those of params, which come in the order of `COMPRESSORS`.
KINDS: dict[str, Any] = {
    "mlp": _Mlp,
    "linear": _Linear,
    "conv1d": _Conv1d,
    "attention_pool": _AttentionPool,
    "mean": _Mean,
}
assert KINDS.keys() <= COMPRESSORS.keys(), (KINDS.keys(), COMPRESSORS.keys())
