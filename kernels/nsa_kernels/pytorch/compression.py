"""One token for each compression block (phi of Eq. 7, arXiv 2502.11089), and blocks for a module.

Each kind is a forward and a backward over a tile of blocks; the Function around them gathers the
tiles and adds what overlapping blocks send back to a row. Letters of a tile: P sets of weights (G
with one a head, else 1), n blocks (of all heads when they share a set), l rows, D width.
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
    def forward(x: Tensor) -> Tensor:
        return x.mean(dim=2)

    @staticmethod
    def backward(grad: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (grad / x.shape[2]).unsqueeze(2).expand_as(x), ()


class _Linear:
    @staticmethod
    def forward(x: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        return (x + position.unsqueeze(1)).flatten(2) @ weight.mT

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, position: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        placed = x + position.unsqueeze(1)
        grad_x = (grad @ weight).view_as(x)
        return grad_x, (grad_x.sum(dim=1), product_over_rows(grad, placed.flatten(2)))


class _Mlp:
    @staticmethod
    def forward(x: Tensor, position: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.silu((x + position.unsqueeze(1)).flatten(2) @ up.mT) @ down.mT

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, position: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        placed = (x + position.unsqueeze(1)).flatten(2)
        hidden = placed @ up.mT
        gate = hidden.sigmoid()
        grad_hidden = (grad @ down) * (gate + gate * hidden * (1 - gate))
        grad_x = (grad_hidden @ up).view_as(x)
        grad_up = product_over_rows(grad_hidden, placed)
        grad_down = product_over_rows(grad, gate * hidden)
        return grad_x, (grad_x.sum(dim=1), grad_up, grad_down)


class _Conv1d:
    @staticmethod
    def forward(x: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        return ((x + position.unsqueeze(1)) * weight.mT.unsqueeze(1)).sum(dim=2)

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, position: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        grad_rows = grad.unsqueeze(2)
        grad_x = grad_rows * weight.mT.unsqueeze(1)
        grad_weight = (grad_rows * (x + position.unsqueeze(1))).sum(dim=1).mT
        return grad_x, (grad_x.sum(dim=1), grad_weight)


class _AttentionPool:
    @staticmethod
    def _shares(x: Tensor, position: Tensor, query: Tensor) -> Tensor:
        placed = x + position.unsqueeze(1)
        return (placed * query[:, None, None]).sum(dim=-1).softmax(dim=-1)  # [P, n, l]

    @classmethod
    def forward(cls, x: Tensor, position: Tensor, query: Tensor) -> Tensor:
        return (cls._shares(x, position, query).unsqueeze(-1) * x).sum(dim=2)

    @classmethod
    def backward(
        cls, grad: Tensor, x: Tensor, position: Tensor, query: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        shares = cls._shares(x, position, query)
        grad_shares = (grad.unsqueeze(2) * x).sum(dim=-1)
        mean = (shares * grad_shares).sum(dim=-1, keepdim=True)
        grad_logits = shares * (grad_shares - mean)  # [P, n, l]
        direct = shares.unsqueeze(-1) * grad.unsqueeze(2)
        grad_placed = grad_logits.unsqueeze(-1) * query[:, None, None]
        placed = x + position.unsqueeze(1)
        grad_query = (grad_logits.unsqueeze(-1) * placed).sum(dim=(1, 2))
        return direct.add_(grad_placed), (grad_placed.sum(dim=1), grad_query)


# forward(x [P, n, l, D], *params [P, ...]) -> [P, n, D], backward(its gradient, x, *params) -> that
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

    def gather(self, x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """x [E, G, D], rows [c, l] -> [P, n, l, D]."""
        blocks = x[rows].to(dtype).permute(2, 0, 1, 3)  # [G, c, l, D]
        return blocks.contiguous() if self.per_head else blocks.flatten(0, 1).unsqueeze(0)

    def heads_last(self, out: Tensor) -> Tensor:
        """[P, n, ...] -> [c, G, ...]."""
        return out.reshape(self.num_groups, -1, *out.shape[2:]).transpose(0, 1)

    def heads_first(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """[c, G, D] -> [P, n, D]."""
        grad = grad.to(dtype).transpose(0, 1)
        return grad.contiguous() if self.per_head else grad.flatten(0, 1).unsqueeze(0)


def _tiles(block_rows: Tensor, block: int, row_elements: int) -> list[tuple[slice, Tensor]]:
    """(which blocks, int64 [blocks, block] their rows) for a tile after the other."""
    size = tile_rows(block * row_elements, 4)  # products with large weights want many rows
    offset = torch.arange(block, device=block_rows.device)
    return [
        (slice(i, i + size), block_rows[i : i + size].unsqueeze(1) + offset)
        for i in range(0, block_rows.shape[0], size)
    ]


class _Compress(torch.autograd.Function):
    """k~_i = phi(x[block i]); weights' gradients are summed over tiles, rows' over blocks."""

    @staticmethod
    @exact
    def forward(
        ctx: Any, x: Tensor, block_rows: Tensor, kind: Any, shape: _Shape, *params: Tensor
    ) -> Tensor:
        dtype = accumulation_dtype(x)
        weights = _weights(params, shape, dtype)
        out = [x.new_zeros(0, *x.shape[1:])]
        for _, rows in _tiles(block_rows, shape.block, x[:1].numel()):
            result = kind.forward(shape.gather(x, rows, dtype), *weights)
            out.append(shape.heads_last(result).to(x.dtype))
        ctx.save_for_backward(x, block_rows, *params)
        ctx.kind, ctx.shape = kind, shape
        return torch.cat(out)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, block_rows, *params = ctx.saved_tensors
        dtype, shape = accumulation_dtype(x), ctx.shape
        weights = _weights(params, shape, dtype)
        grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
        sums = [TreeSum(weight) for weight in weights]
        for blocks, rows in _tiles(block_rows, shape.block, x[:1].numel()):
            tile = shape.gather(x, rows, dtype)
            grad_tile, grad_weights = ctx.kind.backward(
                shape.heads_first(grad[blocks], dtype), tile, *weights
            )
            for total, grad_weight in zip(sums, grad_weights, strict=True):
                total.next().add_(grad_weight)
            grad_rows = shape.heads_last(grad_tile).transpose(1, 2)  # [c, l, G, D]
            add_rows_(grad_x, rows.flatten(), grad_rows.flatten(0, 1))
        grad_params = [
            (total.result() if shape.per_head else total.result().squeeze(0)).to(param.dtype)
            for total, param in zip(sums, params, strict=True)
        ]
        return grad_x.to(x.dtype), None, None, None, *grad_params


def _weights(params: Any, shape: _Shape, dtype: torch.dtype) -> list[Tensor]:
    # Contiguous: a BLAS may add up otherwise where rows lie apart.
    return [(p if shape.per_head else p.unsqueeze(0)).to(dtype).contiguous() for p in params]


class _GatherBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block_rows: Tensor, block: int) -> Tensor:
        offset = torch.arange(block, device=x.device)
        rows = block_rows.unsqueeze(1) + offset
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x[rows].transpose(1, 2)

    @staticmethod
    @first_order
    @exact
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        dtype = accumulation_dtype(grad)
        grad_x = torch.zeros(ctx.shape, dtype=dtype, device=grad.device)
        add_rows_(grad_x, rows.flatten(), grad.to(dtype).transpose(1, 2).flatten(0, 1))
        return grad_x.to(grad.dtype), None, None


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
