"""One token for each compression block (phi of Eq. 7, arXiv 2502.11089), and blocks for a module.

No two blocks may start at the same row.

Letters: E rows of x, G KV heads, D width, C blocks, l rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.compressors import check_kind, parameter_names
from nsa_kernels.triton.compression.blocks_of_rows import BlocksOfRows
from nsa_kernels.triton.compression.kinds import KINDS, Blocks
from nsa_kernels.triton.compression.pooling import COPY, pool, pool_row_gradient
from nsa_kernels.triton.shared.custom_ops import empty_as, register


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


@register("compress(Tensor x, Tensor block_rows, int block, str kind, Tensor[] params) -> Tensor")
def _compress(
    x: Tensor, block_rows: Tensor, block: int, kind: str, params: Sequence[Tensor]
) -> Tensor:
    """x [E, G, D], params in the order of `COMPRESSORS` -> [C, G, D]."""
    weights = _sets(params, _is_per_head(params))
    sets = weights[0].shape[0] if weights else 1
    return KINDS[kind].forward(Blocks(_aligned(x), block_rows, block, sets), *weights)


@_compress.register_fake
def _(x: Tensor, block_rows: Tensor, *_: Any) -> Tensor:
    return x.new_empty(block_rows.shape[0], *x.shape[1:])


@register(
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
    blocks = Blocks(_aligned(x), block_rows, block, sets)
    dx_EGD, grads = KINDS[kind].backward(do.contiguous(), blocks, *weights)
    return [
        dx_EGD,
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


def _compress_gradients(ctx: Any, do_CGD: Tensor) -> tuple[Any, ...]:
    x_EGD, block_rows_C, *params = ctx.saved_tensors
    dx_EGD, *grads = _compress_backward(do_CGD, x_EGD, block_rows_C, ctx.block, ctx.kind, params)
    return dx_EGD, None, None, None, grads


_compress.register_autograd(_compress_gradients, setup_context=_save_compress)


@register("gather_blocks(Tensor x, Tensor block_rows, int block) -> Tensor")
def _gather_blocks(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    """x [E, G, D] -> [C, G, l, D]."""
    return pool(_aligned(x), block_rows, block, COPY)


@_gather_blocks.register_fake
def _(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    return x.new_empty(block_rows.shape[0], x.shape[1], block, x.shape[2])


@register("gather_blocks_backward(Tensor do, Tensor block_rows, SymInt num_rows) -> Tensor")
def _gather_blocks_backward(do: Tensor, block_rows: Tensor, num_rows: int) -> Tensor:
    """dx [E, G, D] from do [C, G, l, D], E = num_rows."""
    if not do.numel():
        return do.new_zeros(num_rows, do.shape[1], do.shape[3])
    block = do.shape[2]
    blocks = BlocksOfRows.of(block_rows, block, num_rows)
    return pool_row_gradient(do.contiguous(), block, COPY, blocks)


@_gather_blocks_backward.register_fake
def _(do: Tensor, block_rows: Tensor, num_rows: int) -> Tensor:
    return do.new_empty(num_rows, do.shape[1], do.shape[3])


def _save_gather(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, block_rows, _ = inputs
    ctx.save_for_backward(block_rows)
    ctx.num_rows = x.shape[0]


def _gather_gradients(ctx: Any, do_CGlD: Tensor) -> tuple[Tensor | None, ...]:
    (block_rows_C,) = ctx.saved_tensors
    return _gather_blocks_backward(do_CGlD, block_rows_C, ctx.num_rows), None, None


_gather_blocks.register_autograd(_gather_gradients, setup_context=_save_gather)


def gather_blocks(x: Tensor, block_rows: Tensor, block: int) -> Tensor:
    """See `Backend.gather_blocks`. No two blocks may start at the same row."""
    return _gather_blocks(x, block_rows, block)


def compress(
    x: Tensor, block_rows: Tensor, block: int, kind: str, params: Mapping[str, Tensor]
) -> Tensor:
    """See `Backend.compress`. No two blocks may start at the same row."""
    check_kind(kind, KINDS, "triton")
    names = parameter_names(kind)
    assert set(params) == set(names), (kind, sorted(params))
    return _compress(x, block_rows, block, kind, [params[name] for name in names])
