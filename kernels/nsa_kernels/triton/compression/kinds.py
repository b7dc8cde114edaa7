"""What each kind of compressor is made of, forward and backward.

The kernels stand in projection.py (`mlp`, `linear`) and pooling.py (`conv1d`, `attention_pool`,
`mean`). Products are computed in the dtype of x with sums in float32, so weights of another dtype
are rounded to it, while position embeddings and what multiplies them stay in float32. A token's
bits depend on nothing but its own block and the weights.

The workspace of a backward is two [C, G, h] in x's dtype and one in float32 for `mlp`, two
float32 [C, G, l] for `attention_pool`, and float32 sums of weights' gradients, of at most PROGRAMS
tiles and RUNS blocks.

Letters: E rows, G KV heads, D width, C blocks, l rows of a block, P sets of weights (G with one a
head, else 1), I = l*D inputs and O outputs of a product, h hidden width.
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
    """Blocks of x [E, G, D] from rows int64 [C] on, and what a gradient needs to know of them."""

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


def _bias(weight_POI: Tensor, position_PlD: Tensor) -> Tensor:
    """W vec(e), float32 [P, O]."""
    return (weight_POI.float() * position_PlD.float().flatten(1).unsqueeze(1)).sum(dim=-1)


def _product_gradients(
    dh_CGO: Tensor, blocks: Blocks, position_PlD: Tensor, weight_POI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, position and weight of h = W vec(x + e) for every block."""
    total_PO = blocks.sum(dh_CGO)
    flat_PI = position_PlD.float().flatten(1)
    d_weight_POI = project_weight_gradient(
        dh_CGO, blocks.x, blocks.rows, weight_POI.shape[2], blocks.sets
    )
    d_weight_POI.addcmul_(total_PO.unsqueeze(-1), flat_PI.unsqueeze(1))
    d_position_PlD = (total_PO.unsqueeze(-1) * weight_POI.float()).sum(dim=1).view_as(position_PlD)
    dx_EGD = project_row_gradient(dh_CGO, weight_POI.to(dh_CGO.dtype), blocks.block, blocks.of_rows)
    return dx_EGD, d_position_PlD, d_weight_POI


class _Mlp:
    """W2 silu(W1 vec(x + e))."""

    @staticmethod
    def forward(blocks: Blocks, position_PlD: Tensor, up_PhI: Tensor, down_PDh: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        active_CGh = project(
            blocks.x, blocks.rows, up_PhI.to(dtype), _bias(up_PhI, position_PlD), SILU
        )
        return project(active_CGh, blocks.itself(), down_PDh.to(dtype))

    @staticmethod
    def backward(
        do_CGD: Tensor, blocks: Blocks, position_PlD: Tensor, up_PhI: Tensor, down_PDh: Tensor
    ) -> Gradients:
        dtype, itself_C = blocks.x.dtype, blocks.itself()
        down_PhD = down_PDh.to(dtype).mT.contiguous()
        d_active_CGh = project(do_CGD, itself_C, down_PhD, dtype=torch.float32)
        active_CGh, dh_CGh = project_backward(
            blocks.x, blocks.rows, up_PhI.to(dtype), _bias(up_PhI, position_PlD), d_active_CGh
        )
        d_down_PDh = project_weight_gradient(
            do_CGD, active_CGh, itself_C, up_PhI.shape[1], blocks.sets
        )
        dx_EGD, d_position_PlD, d_up_PhI = _product_gradients(dh_CGh, blocks, position_PlD, up_PhI)
        return dx_EGD, (d_position_PlD, d_up_PhI, d_down_PDh)


class _Linear:
    """W vec(x + e)."""

    @staticmethod
    def forward(blocks: Blocks, position_PlD: Tensor, weight_PDI: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        return project(blocks.x, blocks.rows, weight_PDI.to(dtype), _bias(weight_PDI, position_PlD))

    @staticmethod
    def backward(
        do_CGD: Tensor, blocks: Blocks, position_PlD: Tensor, weight_PDI: Tensor
    ) -> Gradients:
        dx_EGD, d_position_PlD, d_weight_PDI = _product_gradients(
            do_CGD, blocks, position_PlD, weight_PDI
        )
        return dx_EGD, (d_position_PlD, d_weight_PDI)


class _Conv1d:
    """sum_r w_r (x + e)_r, a weight for each row and channel."""

    @staticmethod
    def forward(blocks: Blocks, position_PlD: Tensor, weight_PDl: Tensor) -> Tensor:
        weight_PlD = weight_PDl.float().mT.contiguous()
        bias_PD = (weight_PlD * position_PlD.float()).sum(dim=1)
        return pool(blocks.x, blocks.rows, blocks.block, CONV1D, weight_PlD, bias_PD)

    @staticmethod
    def backward(
        do_CGD: Tensor, blocks: Blocks, position_PlD: Tensor, weight_PDl: Tensor
    ) -> Gradients:
        weight_PlD = weight_PDl.float().mT.contiguous()
        total_P1D = blocks.sum(do_CGD).unsqueeze(1)
        d_weight_PlD = conv1d_weight_gradient(
            do_CGD, blocks.x, blocks.rows, blocks.block, blocks.sets
        )
        d_weight_PlD.addcmul_(total_P1D, position_PlD.float())
        dx_EGD = pool_row_gradient(do_CGD, blocks.block, CONV1D, blocks.of_rows, weight_PlD)
        return dx_EGD, (total_P1D * weight_PlD, d_weight_PlD.mT)


class _AttentionPool:
    """sum_r a_r x_r with a = softmax_r(u (x + e)_r)."""

    @staticmethod
    def forward(blocks: Blocks, position_PlD: Tensor, query_PD: Tensor) -> Tensor:
        u_PD = query_PD.float().contiguous()
        bias_Pl = (position_PlD.float() * u_PD.unsqueeze(1)).sum(dim=-1)
        return pool(blocks.x, blocks.rows, blocks.block, ATTENTION_POOL, u_PD, bias_Pl)

    @staticmethod
    def backward(
        do_CGD: Tensor, blocks: Blocks, position_PlD: Tensor, query_PD: Tensor
    ) -> Gradients:
        u_PD, e_PlD = query_PD.float().contiguous(), position_PlD.float()
        bias_Pl = (e_PlD * u_PD.unsqueeze(1)).sum(dim=-1)
        shares_CGl, d_logits_CGl, d_query_PD = attention_pool_backward(
            do_CGD, blocks.x, blocks.rows, u_PD, bias_Pl
        )
        total_Pl1 = blocks.sum(d_logits_CGl).unsqueeze(-1)
        d_query_PD.add_((total_Pl1 * e_PlD).sum(dim=1))
        dx_EGD = pool_row_gradient(
            do_CGD, blocks.block, ATTENTION_POOL, blocks.of_rows, u_PD, shares_CGl, d_logits_CGl
        )
        return dx_EGD, (total_Pl1 * u_PD.unsqueeze(1), d_query_PD)


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
