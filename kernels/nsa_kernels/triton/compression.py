"""One token for each compression block (phi of Eq. 7, arXiv 2502.11089), and blocks for a module.

What each kind is made of; the kernels stand in block_projection.py (`mlp`, `linear`) and
block_pooling.py (`conv1d`, `attention_pool`, `mean`). Products are computed in the dtype of x with
sums in float32, so weights of another dtype are rounded to it, while position embeddings and what
multiplies them stay in float32. A token's bits depend on nothing but its own block and the weights.

No two blocks may start at the same row. The workspace of a backward is two [C, G, hidden] in x's
dtype and one in float32 for `mlp`, two float32 [C, G, l] for `attention_pool`, and float32 sums of
weights' gradients, of at most PROGRAMS tiles and RUNS blocks.

Letters: E rows, G KV heads, D width, C blocks, l rows of a block, P sets of weights (G with one a
head, else 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.triton.block_map import BlockMap
from nsa_kernels.triton.block_pooling import (
    ATTENTION_POOL,
    CONV1D,
    COPY,
    MEAN,
    attention_pool_backward,
    conv1d_weight_gradient,
    pool,
    pool_row_gradient,
)
from nsa_kernels.triton.block_projection import (
    SILU,
    project,
    project_backward,
    row_gradient,
    weight_gradient,
)
from nsa_kernels.triton.library import empty_as, operator

Gradients = tuple[Tensor, tuple[Tensor, ...]]


class _Blocks:
    """Blocks of x, and what a gradient needs to know of them."""

    def __init__(self, x: Tensor, block_rows: Tensor, block: int, sets: int) -> None:
        self.x, self.rows, self.block, self.sets = x, block_rows, block, sets

    @property
    def map(self) -> BlockMap:
        return BlockMap.of(self.rows, self.block, self.x.shape[0])

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
    dh: Tensor, blocks: _Blocks, position: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, position and weight of h = W vec(x + e) for every block, from dh [C, G, O]."""
    total = blocks.sum(dh)  # [P, O]
    flat = position.float().flatten(1)
    d_weight = weight_gradient(dh, blocks.x, blocks.rows, weight.shape[2], blocks.sets)
    d_weight.addcmul_(total.unsqueeze(-1), flat.unsqueeze(1))
    d_position = (total.unsqueeze(-1) * weight.float()).sum(dim=1).view_as(position)
    dx = row_gradient(dh, weight.to(dh.dtype), blocks.block, blocks.map)
    return dx, d_position, d_weight


class _Mlp:
    """W2 silu(W1 vec(x + e))."""

    params = ("position", "up", "down")

    @staticmethod
    def forward(blocks: _Blocks, position: Tensor, up: Tensor, down: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        active = project(blocks.x, blocks.rows, up.to(dtype), _bias(up, position), SILU)
        return project(active, blocks.itself(), down.to(dtype))

    @staticmethod
    def backward(
        do: Tensor, blocks: _Blocks, position: Tensor, up: Tensor, down: Tensor
    ) -> Gradients:
        dtype, itself = blocks.x.dtype, blocks.itself()
        transposed = down.to(dtype).mT.contiguous()
        d_active = project(do, itself, transposed, dtype=torch.float32)
        active, dh = project_backward(
            blocks.x, blocks.rows, up.to(dtype), _bias(up, position), d_active
        )
        d_down = weight_gradient(do, active, itself, up.shape[1], blocks.sets)
        dx, d_position, d_up = _product_gradients(dh, blocks, position, up)
        return dx, (d_position, d_up, d_down)


class _Linear:
    """W vec(x + e)."""

    params = ("position", "weight")

    @staticmethod
    def forward(blocks: _Blocks, position: Tensor, weight: Tensor) -> Tensor:
        dtype = blocks.x.dtype
        return project(blocks.x, blocks.rows, weight.to(dtype), _bias(weight, position))

    @staticmethod
    def backward(do: Tensor, blocks: _Blocks, position: Tensor, weight: Tensor) -> Gradients:
        dx, d_position, d_weight = _product_gradients(do, blocks, position, weight)
        return dx, (d_position, d_weight)


class _Conv1d:
    """sum_r w_r (x + e)_r, a weight for each row and channel."""

    params = ("position", "weight")

    @staticmethod
    def forward(blocks: _Blocks, position: Tensor, weight: Tensor) -> Tensor:
        rows = weight.float().mT.contiguous()  # [P, l, D]
        bias = (rows * position.float()).sum(dim=1)
        return pool(blocks.x, blocks.rows, blocks.block, CONV1D, rows, bias)

    @staticmethod
    def backward(do: Tensor, blocks: _Blocks, position: Tensor, weight: Tensor) -> Gradients:
        rows = weight.float().mT.contiguous()
        total = blocks.sum(do).unsqueeze(1)  # [P, 1, D]
        d_rows = conv1d_weight_gradient(do, blocks.x, blocks.rows, blocks.block, blocks.sets)
        d_rows.addcmul_(total, position.float())
        dx = pool_row_gradient(do, blocks.block, CONV1D, blocks.map, rows)
        return dx, (total * rows, d_rows.mT)


class _AttentionPool:
    """sum_r a_r x_r with a = softmax_r(u (x + e)_r)."""

    params = ("position", "query")

    @staticmethod
    def forward(blocks: _Blocks, position: Tensor, query: Tensor) -> Tensor:
        u = query.float().contiguous()
        bias = (position.float() * u.unsqueeze(1)).sum(dim=-1)  # [P, l]
        return pool(blocks.x, blocks.rows, blocks.block, ATTENTION_POOL, u, bias)

    @staticmethod
    def backward(do: Tensor, blocks: _Blocks, position: Tensor, query: Tensor) -> Gradients:
        u, e = query.float().contiguous(), position.float()
        bias = (e * u.unsqueeze(1)).sum(dim=-1)
        shares, d_logits, d_query = attention_pool_backward(do, blocks.x, blocks.rows, u, bias)
        total = blocks.sum(d_logits).unsqueeze(-1)  # [P, l, 1]
        d_query.add_((total * e).sum(dim=1))
        block_map = blocks.map
        dx = pool_row_gradient(do, blocks.block, ATTENTION_POOL, block_map, u, shares, d_logits)
        return dx, (total * u.unsqueeze(1), d_query)


class _Mean:
    params = ()

    @staticmethod
    def forward(blocks: _Blocks) -> Tensor:
        return pool(blocks.x, blocks.rows, blocks.block, MEAN)

    @staticmethod
    def backward(do: Tensor, blocks: _Blocks) -> Gradients:
        return pool_row_gradient(do, blocks.block, MEAN, blocks.map), ()


_KINDS: dict[str, Any] = {
    "mlp": _Mlp,
    "linear": _Linear,
    "conv1d": _Conv1d,
    "attention_pool": _AttentionPool,
    "mean": _Mean,
}


def _aligned(x: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 elements and 16 bytes.

    Wide loads need it, and the order of a sum over lanes follows the width of loads.
    """
    strides = x.stride()
    if strides[-1] == 1 and not any(s % 16 for s in strides[:-1]) and not x.data_ptr() % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _sets(params: Sequence[Tensor], per_head: bool) -> list[Tensor]:
    """Every parameter with its leading [P], contiguous: sums follow the order of memory."""
    return [(p if per_head else p.unsqueeze(0)).contiguous() for p in params]


@operator("compress(Tensor x, Tensor block_rows, int block, str kind, Tensor[] params) -> Tensor")
def _compress(
    x: Tensor, block_rows: Tensor, block: int, kind: str, params: Sequence[Tensor]
) -> Tensor:
    """x [E, G, D], params in the order of the kind's `params` -> [C, G, D]."""
    weights = _sets(params, _is_per_head(params))
    sets = weights[0].shape[0] if weights else 1
    return _KINDS[kind].forward(_Blocks(_aligned(x), block_rows, block, sets), *weights)


@_compress.register_fake
def _(x: Tensor, block_rows: Tensor, *_: Any) -> Tensor:
    return x.new_empty(block_rows.shape[0], *x.shape[1:])


@operator(
    "compress_backward(Tensor do, Tensor x, Tensor block_rows, int block, str kind, "
    "Tensor[] params) -> Tensor[]"
)
def _compress_backward(
    do: Tensor, x: Tensor, block_rows: Tensor, block: int, kind: str, params: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of x and of the params from do [C, G, D]."""
    if not do.numel():
        return [empty_as(p).zero_() for p in (x, *params)]
    per_head = _is_per_head(params)
    weights = _sets(params, per_head)
    sets = weights[0].shape[0] if weights else 1
    blocks = _Blocks(_aligned(x), block_rows, block, sets)
    dx, grads = _KINDS[kind].backward(do.contiguous(), blocks, *weights)
    return [
        dx,
        *(
            (grad if per_head else grad.squeeze(0)).to(p.dtype).contiguous()
            for grad, p in zip(grads, params, strict=True)
        ),
    ]


@_compress_backward.register_fake
def _(do: Tensor, x: Tensor, block_rows: Tensor, block: int, kind: str, params: Any) -> Any:
    return [empty_as(p) for p in (x, *params)]


def _is_per_head(params: Sequence[Tensor]) -> bool:
    return bool(params) and params[0].dim() == 3  # position [G, l, D] or [l, D]


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, block_rows, ctx.block, ctx.kind, params = inputs
    ctx.save_for_backward(x, block_rows, *params)


def _compress_gradients(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    x, block_rows, *params = ctx.saved_tensors
    dx, *grads = _compress_backward(do, x, block_rows, ctx.block, ctx.kind, params)
    return dx, None, None, None, grads


_compress.register_autograd(_compress_gradients, setup_context=_save_compress)


@operator("gather_blocks(Tensor x, Tensor block_rows, int block) -> Tensor")
def _gather_blocks(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    return pool(_aligned(x), block_rows, block, COPY)


@_gather_blocks.register_fake
def _(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    return x.new_empty(block_rows.shape[0], x.shape[1], block, x.shape[2])


@operator("gather_blocks_backward(Tensor do, Tensor block_rows, SymInt num_rows) -> Tensor")
def _gather_blocks_backward(do: Tensor, block_rows: Tensor, num_rows: int) -> Tensor:
    """dx [num_rows, G, D] from do [C, G, block, D]."""
    if not do.numel():
        return do.new_zeros(num_rows, do.shape[1], do.shape[3])
    block = do.shape[2]
    blocks = BlockMap.of(block_rows, block, num_rows)
    return pool_row_gradient(do.contiguous(), block, COPY, blocks)


@_gather_blocks_backward.register_fake
def _(do: Tensor, block_rows: Tensor, num_rows: int) -> Tensor:
    return do.new_empty(num_rows, do.shape[1], do.shape[3])


def _save_gather(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, block_rows, _ = inputs
    ctx.save_for_backward(block_rows)
    ctx.num_rows = x.shape[0]


def _gather_gradients(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    (block_rows,) = ctx.saved_tensors
    return _gather_blocks_backward(do, block_rows, ctx.num_rows), None, None


_gather_blocks.register_autograd(_gather_gradients, setup_context=_save_gather)


def gather_blocks(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    """See `Backend.gather_blocks`. No two blocks may start at the same row."""
    return _gather_blocks(x, block_rows, block)


def compress(
    x: Tensor, block_rows: Tensor, block: int, kind: str, params: Mapping[str, Tensor]
) -> Tensor:
    """See `Backend.compress`. No two blocks may start at the same row."""
    if kind not in _KINDS:
        raise ValueError(f"compress: found {kind!r}; {', '.join(map(repr, _KINDS))} work")
    names = _KINDS[kind].params
    assert set(params) == set(names), (kind, sorted(params))
    return _compress(x, block_rows, block, kind, [params[name] for name in names])
