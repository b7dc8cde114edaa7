"""The stream that the benchmarks run on: packed documents of equal length, one device."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from launch.bench.options import DTYPES, Sizes
from launch.bench.work import operator_flops
from nsa_dist import BRANCHES, BlockCompressor
from nsa_kernels import Backend, QuerySegments, get_backend


class Stream:
    """Packed documents of equal length, with the inputs that several operators share."""

    def __init__(self, options: Sizes, length: int, device: torch.device | str) -> None:
        self.options, self.length, self.device = options, length, torch.device(device)
        self.config, self.dtype = options.config, DTYPES[options.dtype]
        self.ops = get_backend(options.backend)
        config = self.config
        self.size = length // options.documents
        self.blocks = max(0, (self.size - config.compress_block) // config.compress_stride + 1)
        self.select_blocks = -(-self.size // config.select_block)
        self.flops = operator_flops(options, length)
        self.segments = QuerySegments.from_rows(
            [(i * self.size, self.size, 0, *self._bases(i)) for i in range(options.documents)],
            self.device,
        )

    def _bases(self, document: int) -> tuple[int, int, int]:
        sizes = (self.blocks, self.select_blocks, self.size)
        return tuple(document * size for size in sizes)  # type: ignore[return-value]

    def boundaries(self, layout: str) -> Tensor | None:
        """int32 [documents + 1]; None for one document, where the layout needs none."""
        if self.options.documents == 1 and layout != "zigzag_per_document":
            return None
        return torch.arange(self.options.documents + 1, dtype=torch.int32) * self.size

    def segments_of(self, rows: Tensor) -> QuerySegments:
        """A segment for each sampled row."""
        places = [(i, *divmod(row, self.size)) for i, row in enumerate(rows.tolist())]
        return QuerySegments.from_rows(
            [(i, 1, t, *self._bases(document)) for i, document, t in places], self.device
        )

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device, requires_grad=True)

    @cached_property
    def q(self) -> Tensor:
        """[S, H, Dk]. Coherent ones follow a direction of their group, which drifts."""
        config = self.config
        q = self.draw(self.length, config.num_heads, config.head_dim)
        if self.options.data == "random":
            return q
        directions = drifting(self.length, config.num_kv_heads, config.head_dim, self.device)
        q = q.detach()
        # Some tokens at a time: the sums are in float32, and q may be most of a GPU's memory.
        for own, of_groups in zip(q.split(1 << 15), directions.split(1 << 15), strict=True):
            shared = of_groups.repeat_interleave(config.heads_per_group, dim=1)
            own.copy_(0.53 * own + 0.85 * shared)
        return q.requires_grad_()

    @cached_property
    def k(self) -> Tensor:
        return self.draw_keys()

    def draw_keys(self) -> Tensor:
        """[S, G, Dk]. Coherent ones of one selection block have a vector in common."""
        config = self.config
        shape = (self.length, config.num_kv_heads, config.head_dim)
        k = self.draw(*shape)
        if self.options.data == "random":
            return k
        blocks = torch.randn(-(-self.length // config.select_block), *shape[1:], device=self.device)
        shared = blocks.repeat_interleave(config.select_block, dim=0)[: self.length]
        return (0.6 * k.detach() + 0.8 * shared).to(self.dtype).requires_grad_()

    @cached_property
    def v(self) -> Tensor:
        return self.draw(self.length, self.config.num_kv_heads, self.config.value_dim)

    @cached_property
    def gates(self) -> Tensor:
        shape = (self.length, self.config.num_heads, len(BRANCHES))
        return torch.rand(shape, device=self.device, requires_grad=True)

    @cached_property
    def compressed(self) -> tuple[Tensor, Tensor]:
        config, tokens = self.config, self.options.documents * self.blocks
        return (
            self.draw(tokens, config.num_kv_heads, config.head_dim),
            self.draw(tokens, config.num_kv_heads, config.value_dim),
        )

    @cached_property
    def compressors(self) -> tuple[BlockCompressor, BlockCompressor]:
        widths = (self.config.head_dim, self.config.value_dim)
        k, v = (
            BlockCompressor(self.config, width, device=self.device, dtype=self.dtype)
            for width in widths
        )
        return k, v

    @cached_property
    def block_rows(self) -> Tensor:
        """int64 [C], where each compression block starts."""
        first = torch.arange(self.blocks, device=self.device) * self.config.compress_stride
        documents = torch.arange(self.options.documents, device=self.device) * self.size
        return (documents[:, None] + first).flatten()

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor]:
        """int64 [G, B] where each selection block starts, int64 [B] how long it is."""
        select = self.config.select_block
        first = torch.arange(self.select_blocks, device=self.device) * select
        documents = torch.arange(self.options.documents, device=self.device) * self.size
        lengths = (self.size - first).clamp(max=select).repeat(self.options.documents)
        rows = (documents[:, None] + first).flatten()
        return rows.expand(self.config.num_kv_heads, -1).contiguous(), lengths

    def compress(self, k: Tensor) -> Tensor:
        """Keys [S, heads, Dk] as the run compresses them: [C, heads, Dk]."""
        config, params = self.config, dict(self.compressors[0].named_parameters())
        arguments = k, self.block_rows, config.compress_block, config.compress
        return self.ops.compress(*arguments, params)

    @property
    def band(self) -> dict[str, Any]:
        config = self.config
        return {
            "block": config.compress_block,
            "stride": config.compress_stride,
            "scale": config.softmax_scale,
        }

    def select(self, ops: Backend, q: Tensor, *rest: Any) -> Tensor:
        """``selected_attention`` on buffers without fetched rows: k, v, choices, segments."""
        k, v, choices, segments = rest
        return ops.selected_attention(
            *(q, k, v, k[:0], v[:0], choices, *self.pool, segments),
            select_block=self.config.select_block,
            scale=self.config.softmax_scale,
        )[0]

    def slide(self, ops: Backend, q: Tensor, k: Tensor, v: Tensor, at: QuerySegments) -> Tensor:
        """``window_attention``'s output."""
        window, scale = self.config.window, self.config.softmax_scale
        return ops.window_attention(q, k, v, at, window=window, scale=scale)[0]


MEMORY = 0.97
"""What is left of a direction at the next token. With the weights of ``q`` and ``draw_keys``, tiles
of 2, 4 and 8 neighbouring tokens then choose 1.3, 1.6 and 2.2 times the blocks of one."""
TAPS = 512


def drifting(length: int, groups: int, width: int, device: torch.device) -> Tensor:
    """float32 [length, groups, width], normal numbers: white noise, filtered along the tokens."""
    noise = torch.randn(groups * width, 1, length + TAPS - 1, device=device)
    taps = MEMORY ** torch.arange(TAPS - 1, -1, -1, device=device) * math.sqrt(1 - MEMORY**2)
    filtered = torch.nn.functional.conv1d(noise, taps[None, None])
    return filtered[:, 0].T.reshape(length, groups, width)
