"""One token for each compression block (phi of Eq. 7, arXiv 2502.11089), and blocks for a module.

Each kind is a forward and a backward over a tile of blocks; the Function around them gathers the
tiles and adds what overlapping blocks send back to a row.

Letters: E rows of x, G KV heads, D width, C blocks (of the call, or of a tile of them), l rows of a
block, I = l*D, h hidden width, P sets of weights (G with one a head, else 1), Z blocks that one set
compresses (C with one a head, else G*C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.autograd import first_order
from nsa_kernels.compressors import COMPRESSORS, check_kind, parameter_names
from nsa_kernels.pytorch._common import (
    TreeSum,
    accumulation_dtype,
    add_rows_,
    exact,
    product_over_rows,
    tile_rows,
)


class _Mean:
    @staticmethod
    def forward(x_PZlD: Tensor) -> Tensor:
        return x_PZlD.mean(dim=2)

    @staticmethod
    def backward(grad_PZD: Tensor, x_PZlD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (grad_PZD / x_PZlD.shape[2]).unsqueeze(2).expand_as(x_PZlD), ()


class _Linear:
    @staticmethod
    def forward(x_PZlD: Tensor, position_PlD: Tensor, weight_PDI: Tensor) -> Tensor:
        return (x_PZlD + position_PlD.unsqueeze(1)).flatten(2) @ weight_PDI.mT

    @staticmethod
    def backward(
        grad_PZD: Tensor, x_PZlD: Tensor, position_PlD: Tensor, weight_PDI: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        placed_PZlD = x_PZlD + position_PlD.unsqueeze(1)
        grad_x_PZlD = (grad_PZD @ weight_PDI).view_as(x_PZlD)
        return grad_x_PZlD, (
            grad_x_PZlD.sum(dim=1),
            product_over_rows(grad_PZD, placed_PZlD.flatten(2)),
        )


class _Mlp:
    @staticmethod
    def forward(x_PZlD: Tensor, position_PlD: Tensor, up_PhI: Tensor, down_PDh: Tensor) -> Tensor:
        return F.silu((x_PZlD + position_PlD.unsqueeze(1)).flatten(2) @ up_PhI.mT) @ down_PDh.mT

    @staticmethod
    def backward(
        grad_PZD: Tensor, x_PZlD: Tensor, position_PlD: Tensor, up_PhI: Tensor, down_PDh: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        placed_PZI = (x_PZlD + position_PlD.unsqueeze(1)).flatten(2)
        hidden_PZh = placed_PZI @ up_PhI.mT
        gate_PZh = hidden_PZh.sigmoid()
        grad_hidden_PZh = (grad_PZD @ down_PDh) * (
            gate_PZh + gate_PZh * hidden_PZh * (1 - gate_PZh)
        )
        grad_x_PZlD = (grad_hidden_PZh @ up_PhI).view_as(x_PZlD)
        grad_up_PhI = product_over_rows(grad_hidden_PZh, placed_PZI)
        grad_down_PDh = product_over_rows(grad_PZD, gate_PZh * hidden_PZh)
        return grad_x_PZlD, (grad_x_PZlD.sum(dim=1), grad_up_PhI, grad_down_PDh)


class _Conv1d:
    @staticmethod
    def forward(x_PZlD: Tensor, position_PlD: Tensor, weight_PDl: Tensor) -> Tensor:
        return ((x_PZlD + position_PlD.unsqueeze(1)) * weight_PDl.mT.unsqueeze(1)).sum(dim=2)

    @staticmethod
    def backward(
        grad_PZD: Tensor, x_PZlD: Tensor, position_PlD: Tensor, weight_PDl: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        grad_PZ1D = grad_PZD.unsqueeze(2)
        grad_x_PZlD = grad_PZ1D * weight_PDl.mT.unsqueeze(1)
        grad_weight_PDl = (grad_PZ1D * (x_PZlD + position_PlD.unsqueeze(1))).sum(dim=1).mT
        return grad_x_PZlD, (grad_x_PZlD.sum(dim=1), grad_weight_PDl)


class _AttentionPool:
    @staticmethod
    def _shares(x_PZlD: Tensor, position_PlD: Tensor, query_PD: Tensor) -> Tensor:
        placed_PZlD = x_PZlD + position_PlD.unsqueeze(1)
        return (placed_PZlD * query_PD[:, None, None]).sum(dim=-1).softmax(dim=-1)  # [P, Z, l]

    @classmethod
    def forward(cls, x_PZlD: Tensor, position_PlD: Tensor, query_PD: Tensor) -> Tensor:
        return (cls._shares(x_PZlD, position_PlD, query_PD).unsqueeze(-1) * x_PZlD).sum(dim=2)

    @classmethod
    def backward(
        cls, grad_PZD: Tensor, x_PZlD: Tensor, position_PlD: Tensor, query_PD: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        shares_PZl = cls._shares(x_PZlD, position_PlD, query_PD)
        grad_shares_PZl = (grad_PZD.unsqueeze(2) * x_PZlD).sum(dim=-1)
        mean_PZ1 = (shares_PZl * grad_shares_PZl).sum(dim=-1, keepdim=True)
        grad_logits_PZl = shares_PZl * (grad_shares_PZl - mean_PZ1)
        direct_PZlD = shares_PZl.unsqueeze(-1) * grad_PZD.unsqueeze(2)
        grad_placed_PZlD = grad_logits_PZl.unsqueeze(-1) * query_PD[:, None, None]
        placed_PZlD = x_PZlD + position_PlD.unsqueeze(1)
        grad_query_PD = (grad_logits_PZl.unsqueeze(-1) * placed_PZlD).sum(dim=(1, 2))
        return direct_PZlD.add_(grad_placed_PZlD), (grad_placed_PZlD.sum(dim=1), grad_query_PD)


# forward(x [P, Z, l, D], *params [P, ...]) -> [P, Z, D], backward(its gradient, x, *params) -> that
# of x and those of params, which come in the order of `COMPRESSORS`.
_KINDS: dict[str, Any] = {
    "mlp": _Mlp,
    "linear": _Linear,
    "conv1d": _Conv1d,
    "attention_pool": _AttentionPool,
    "mean": _Mean,
}
assert _KINDS.keys() == COMPRESSORS.keys(), (_KINDS.keys(), COMPRESSORS.keys())


class _Shape(NamedTuple):
    """How a tile of blocks is laid out: rows of a block, heads, and one set of weights a head?"""

    block: int
    num_groups: int
    per_head: bool

    def gather(self, x_EGD: Tensor, rows_Cl: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of x, [P, Z, l, D]."""
        blocks_GClD = x_EGD[rows_Cl].to(dtype).permute(2, 0, 1, 3)
        return blocks_GClD.contiguous() if self.per_head else blocks_GClD.flatten(0, 1).unsqueeze(0)

    def heads_last(self, out: Tensor) -> Tensor:
        """[P, Z, ...] -> [C, G, ...]."""
        return out.reshape(self.num_groups, -1, *out.shape[2:]).transpose(0, 1)

    def heads_first(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """[C, G, D] -> [P, Z, D]."""
        grad = grad.to(dtype).transpose(0, 1)
        return grad.contiguous() if self.per_head else grad.flatten(0, 1).unsqueeze(0)


def _tiles(block_rows_C: Tensor, block: int, row_elements: int) -> list[tuple[slice, Tensor]]:
    """(which blocks, int64 [C, l] their rows) for a tile after the other."""
    size = tile_rows(block * row_elements, 4)  # products with large weights want many rows
    offset_l = torch.arange(block, device=block_rows_C.device)
    return [
        (slice(i, i + size), block_rows_C[i : i + size].unsqueeze(1) + offset_l)
        for i in range(0, block_rows_C.shape[0], size)
    ]


class _Compress(torch.autograd.Function):
    """k~_i = phi(x[block i]); weights' gradients are summed over tiles, rows' over blocks."""

    @staticmethod
    @exact
    def forward(
        ctx: Any, x_EGD: Tensor, block_rows_C: Tensor, kind: Any, shape: _Shape, *params: Tensor
    ) -> Tensor:
        dtype = accumulation_dtype(x_EGD)
        weights = _weights(params, shape, dtype)
        out = [x_EGD.new_zeros(0, *x_EGD.shape[1:])]
        for _, rows_Cl in _tiles(block_rows_C, shape.block, x_EGD[:1].numel()):
            out_PZD = kind.forward(shape.gather(x_EGD, rows_Cl, dtype), *weights)
            out.append(shape.heads_last(out_PZD).to(x_EGD.dtype))
        ctx.save_for_backward(x_EGD, block_rows_C, *params)
        ctx.kind, ctx.shape = kind, shape
        return torch.cat(out)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_CGD: Tensor) -> tuple[Tensor | None, ...]:
        x_EGD, block_rows_C, *params = ctx.saved_tensors
        dtype, shape = accumulation_dtype(x_EGD), ctx.shape
        weights = _weights(params, shape, dtype)
        grad_x_EGD = torch.zeros(x_EGD.shape, dtype=dtype, device=x_EGD.device)
        sums = [TreeSum(weight) for weight in weights]
        for blocks, rows_Cl in _tiles(block_rows_C, shape.block, x_EGD[:1].numel()):
            x_PZlD = shape.gather(x_EGD, rows_Cl, dtype)
            grad_x_PZlD, grad_weights = ctx.kind.backward(
                shape.heads_first(grad_CGD[blocks], dtype), x_PZlD, *weights
            )
            for total, grad_weight in zip(sums, grad_weights, strict=True):
                total.next().add_(grad_weight)
            grad_rows_ClGD = shape.heads_last(grad_x_PZlD).transpose(1, 2)
            add_rows_(grad_x_EGD, rows_Cl.flatten(), grad_rows_ClGD.flatten(0, 1))
        grad_params = [
            (total.result() if shape.per_head else total.result().squeeze(0)).to(param.dtype)
            for total, param in zip(sums, params, strict=True)
        ]
        return grad_x_EGD.to(x_EGD.dtype), None, None, None, *grad_params


def _weights(params: Any, shape: _Shape, dtype: torch.dtype) -> list[Tensor]:
    # Contiguous: a BLAS may add up otherwise where rows lie apart.
    return [(p if shape.per_head else p.unsqueeze(0)).to(dtype).contiguous() for p in params]


class _GatherBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_EGD: Tensor, block_rows_C: Tensor, block: int) -> Tensor:
        offset_l = torch.arange(block, device=x_EGD.device)
        rows_Cl = block_rows_C.unsqueeze(1) + offset_l
        ctx.save_for_backward(rows_Cl)
        ctx.shape = x_EGD.shape
        return x_EGD[rows_Cl].transpose(1, 2)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad_CGlD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_Cl,) = ctx.saved_tensors
        dtype = accumulation_dtype(grad_CGlD)
        grad_x_EGD = torch.zeros(ctx.shape, dtype=dtype, device=grad_CGlD.device)
        add_rows_(grad_x_EGD, rows_Cl.flatten(), grad_CGlD.to(dtype).transpose(1, 2).flatten(0, 1))
        return grad_x_EGD.to(grad_CGlD.dtype), None, None


def gather_blocks(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    """See `Backend.gather_blocks`."""
    return _GatherBlocks.apply(x, block_rows, block)


def compress(
    x: Tensor, block_rows: Tensor, block: int, kind: str, params: Mapping[str, Tensor]
) -> Tensor:
    """See `Backend.compress`."""
    check_kind(kind, _KINDS, "pytorch")
    names = parameter_names(kind)
    assert set(params) == set(names), (kind, sorted(params))
    per_head = bool(names) and params["position"].dim() == 3
    shape = _Shape(block, x.shape[1], per_head)
    return _Compress.apply(x, block_rows, _KINDS[kind], shape, *(params[name] for name in names))
