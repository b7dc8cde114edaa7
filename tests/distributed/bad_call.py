"""Calls that go wrong on one rank, and what became of them on each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import (
    BlockCompressor,
    NativeSparseAttention,
    make_sharding,
    native_sparse_attention,
)
from tests.distributed.layer_case import HIDDEN, SMALL

LOCAL = 32
END = -1
"""In boundaries: the length of the whole stream."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended on one rank: an error's class and message, or none with a result."""

    error: str | None
    message: str
    seconds: float


def attempt(call: Callable[[], Any]) -> Outcome:
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        seconds = time.monotonic() - start
        return Outcome(type(error).__name__, str(error), seconds)
    return Outcome(None, "", time.monotonic() - start)


def is_bad_rank() -> bool:
    """The last rank is the one that errs."""
    return dist.get_rank() == dist.get_world_size() - 1


def cu_seqlens(group: Any, boundaries: Any) -> Any:
    if not isinstance(boundaries, tuple):
        return boundaries
    total = LOCAL * dist.get_world_size(group)
    return torch.tensor([total if b == END else b for b in boundaries], dtype=torch.int32)


def call_layer(
    group: Any,
    *,
    shape: tuple[int, ...] = (1, LOCAL, HIDDEN),
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    boundaries: Any = (0, 20, END),
    position_ids: Tensor | None = None,
    autocast: bool = False,
    layer: dict[str, Any] | None = None,
    **config: Any,
) -> Tensor:
    """A forward of the layer; further keywords change the config."""
    options = {"layout": "contiguous", "dtype": dtype} | (layer or {})
    torch.manual_seed(0)
    built = NativeSparseAttention(HIDDEN, replace(SMALL, **config), group=group, **options)
    x = torch.ones(shape, dtype=x_dtype or dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        return built(x, cu_seqlens=cu_seqlens(group, boundaries), position_ids=position_ids)


def call_functional(
    group: Any,
    *,
    q: tuple[int, ...] = (1, LOCAL, 4, 8),
    k: tuple[int, ...] = (1, LOCAL, 2, 8),
    v_dtype: torch.dtype = torch.float32,
    gates: tuple[int, ...] = (1, LOCAL, 4, 3),
    gates_dtype: torch.dtype = torch.float32,
    left_out: str | None = None,
    table: int | None = None,
    compressor: bool = True,
    **options: Any,
) -> Tensor:
    """The functional form; ``table`` rotates unrotated keys by tables of so many positions."""
    config = replace(SMALL, compress_pre_rope=table is not None)
    keys = {b: torch.ones(k) for b in config.key_branches if b != left_out}
    v = torch.ones(1, LOCAL, 2, 6, dtype=v_dtype)
    result = native_sparse_attention(
        torch.ones(q),
        keys,
        dict.fromkeys(config.branches, v),
        torch.ones(gates, dtype=gates_dtype),
        BlockCompressor(config, 8) if compressor else None,
        BlockCompressor(config, 6),
        config=config,
        rotary=None if table is None else (torch.ones(table, 4), torch.zeros(table, 4)),
        group=group,
        **{"layout": "contiguous", **options},
    )
    assert isinstance(result, Tensor)
    return result


def call_unshard(
    group: Any,
    *,
    length: int | None = 50,
    layout: str = "zigzag",
    boundaries: Any = None,
    dtype: torch.dtype = torch.float32,
    width: int = 3,
    extra: int = 0,
) -> Tensor:
    length = LOCAL * dist.get_world_size(group) if length is None else length
    sharding = make_sharding(
        length, layout=layout, group=group, cu_seqlens=cu_seqlens(group, boundaries)
    )
    local = sharding.local_columns.numel() + extra
    return sharding.unshard(torch.ones(1, local, width, dtype=dtype))
