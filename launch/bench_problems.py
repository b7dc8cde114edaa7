"""What bench_kernels.py times: each operator and the whole attention on one document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_dist import BRANCHES, BlockCompressor, NSAConfig, native_sparse_attention
from nsa_kernels import QuerySegments, get_backend


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        lengths: tokens of the one document.
        heads, kv_heads, head_dim, v_head_dim: H, G, Dk, Dv.
        compress_block, compress_stride, select_block, num_selected, window: as of NSAConfig.
        dtype: bfloat16, float16 or float32.
        backend: as of the layers.
        only: operators to run, by name; all when empty.
        choices: npz file with `selected` [layer, group, token, n]; random choices when None.
        layer: layer of that file.
        dense: time dense attention too.
        repeats_ms: time spent on each measurement.
        csv: file to write the table to.
        plot: file to draw time against length to.
    """

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512
    dtype: str = "bfloat16"
    backend: str = "triton"
    only: tuple[str, ...] = ()
    choices: Path | None = None
    layer: int = 0
    dense: bool = True
    repeats_ms: int = 200
    csv: Path | None = None
    plot: Path | None = None

    @property
    def config(self) -> NSAConfig:
        return NSAConfig(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
        )


@dataclass
class Problem:
    """One operator on one length.

    Args:
        inputs: what gradients are taken of, in the order of ``run``'s arguments.
        run: inputs -> output [S, H, Dv] (or any tensor).
        reference: float64 inputs and rows -> output of those rows; None where it is not checked.
        flops: useful, forward.
    """

    inputs: list[Tensor]
    run: Callable[..., Any]
    reference: Callable[..., Tensor] | None
    flops: float
    differentiable: bool = True


def random_choices(length: int, config: NSAConfig, device: torch.device) -> Tensor:
    """Forced blocks and others at random, int32 [S, G, n], as ``select_blocks`` gives them."""
    blocks = -(-length // config.select_block)
    index = torch.arange(blocks, device=device)
    out = torch.empty(
        length, config.num_kv_heads, config.num_selected, dtype=torch.int32, device=device
    )
    for start in range(0, length, 4096):
        t = torch.arange(start, min(start + 4096, length), device=device)
        own = (t // config.select_block)[:, None, None]
        score = torch.rand(len(t), config.num_kv_heads, blocks, device=device)
        forced = (index < config.num_init_blocks) | (index > own - config.num_local_blocks)
        score = score.masked_fill(forced, 2.0).masked_fill(index > own, -1.0)
        value, best = score.topk(min(config.num_selected, blocks), dim=-1)
        best = best.masked_fill(value < 0, blocks).sort(-1).values
        best = best.masked_fill(best == blocks, -1)
        out[start : start + len(t)] = torch.nn.functional.pad(
            best, (0, config.num_selected - best.shape[-1]), value=-1
        )
    return out


def recorded_choices(options: Options, length: int, device: torch.device) -> Tensor:
    """Choices of a trained model, from ``options.choices``.

    Raises:
        ValueError: where the file's tokens, groups or n are not the run's.
    """
    import numpy

    assert options.choices is not None
    selected = torch.from_numpy(numpy.load(options.choices)["selected"][options.layer].copy())
    config = options.config
    expected = (config.num_kv_heads, length, config.num_selected)
    if tuple(selected.shape) != expected:
        raise ValueError(
            f"choices: found [group, token, n] = {list(selected.shape)} in {options.choices}; "
            f"{list(expected)} (kv_heads, lengths, num_selected of the run) works"
        )
    return selected.to(device, torch.int32).transpose(0, 1).contiguous()


def problems(options: Options, length: int, choices: Tensor) -> Iterator[tuple[str, Problem]]:
    """Every operator on one document of ``length`` tokens."""
    config, device = options.config, torch.device("cuda")
    dtype = getattr(torch, options.dtype)
    ops, exact = get_backend(options.backend), get_backend("pytorch")
    heads, groups, dk, dv = options.heads, options.kv_heads, options.head_dim, options.v_head_dim
    scale = config.softmax_scale
    block, stride, select = config.compress_block, config.compress_stride, config.select_block

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    segments = QuerySegments.from_rows([(0, length, 0, 0, 0, 0)], device)
    q, k, v = draw(length, heads, dk), draw(length, groups, dk), draw(length, groups, dv)
    blocks = max(0, (length - block) // stride + 1)
    k_cmp, v_cmp = draw(blocks, groups, dk), draw(blocks, groups, dv)
    t = torch.arange(length, dtype=torch.float64)
    seen = ((t - block + 1).div(stride, rounding_mode="floor") + 1).clamp(min=0).sum().item()
    in_window = (t + 1).clamp(max=config.window).sum().item()
    tokens = torch.arange(length, device=device)[:, None, None]
    in_blocks = (tokens + 1 - choices * select).clamp(0, select) * (choices >= 0)
    chosen = in_blocks.sum().item() / groups
    pair = 2.0 * heads * (dk + dv)

    band: dict[str, Any] = {"block": block, "stride": stride, "scale": scale}
    yield (
        "compressed_attention",
        Problem(
            [q, k_cmp, v_cmp],
            lambda q, k, v: ops.compressed_attention(q, k, v, segments, **band)[0],
            lambda rows, q, k, v: exact.compressed_attention(
                q[rows], k, v, _segments_of(rows, device), **band
            )[0],
            seen * pair,
        ),
    )
    with torch.no_grad():
        lse = ops.compressed_attention(q, k_cmp, v_cmp, segments, **band)[1]
    yield (
        "block_selection",
        Problem(
            [q, k_cmp],
            lambda q, k: ops.select_blocks(
                q,
                k,
                lse,
                segments,
                **band,
                select_block=select,
                num_selected=config.num_selected,
                num_init_blocks=config.num_init_blocks,
                num_local_blocks=config.num_local_blocks,
            ),
            None,
            seen * 2.0 * heads * dk,
            differentiable=False,
        ),
    )
    starts = torch.arange(0, length, select, device=device)
    lengths = (length - starts).clamp(max=select)
    table = starts.expand(groups, -1).contiguous()
    yield (
        "selected_attention",
        Problem(
            [q, k, v],
            lambda q, k, v: ops.selected_attention(
                q,
                k,
                v,
                k[:0],
                v[:0],
                choices,
                table,
                lengths,
                segments,
                select_block=select,
                scale=scale,
            )[0],
            lambda rows, q, k, v: exact.selected_attention(
                q[rows],
                k,
                v,
                k[:0],
                v[:0],
                choices[rows],
                table,
                lengths,
                _segments_of(rows, device),
                select_block=select,
                scale=scale,
            )[0],
            chosen * pair,
        ),
    )
    yield (
        "window_attention",
        Problem(
            [q, k, v],
            lambda q, k, v: ops.window_attention(
                q, k, v, segments, window=config.window, scale=scale
            )[0],
            lambda rows, q, k, v: exact.window_attention(
                q[rows], k, v, _segments_of(rows, device), window=config.window, scale=scale
            )[0],
            in_window * pair,
        ),
    )
    rows_of_blocks = torch.arange(blocks, device=device) * stride
    compressor = BlockCompressor(config, dk, device=device, dtype=torch.float32)
    weights = {name: p.detach() for name, p in compressor.named_parameters()}
    hidden = config.compress_hidden or 2 * dk
    yield (
        "compression",
        Problem(
            [k],
            lambda k: ops.compress(k, rows_of_blocks, block, config.compress, weights),
            None,
            2.0 * blocks * groups * hidden * (block + 1) * dk,
        ),
    )
    gates = torch.rand(length, heads, 3, device=device, requires_grad=True)
    outputs = [draw(length, heads, dv) for _ in range(3)]
    yield (
        "combine",
        Problem(
            [*outputs, gates],
            lambda a, b, c, gates: ops.combine([a, b, c], gates),
            lambda rows, a, b, c, gates: exact.combine([x[rows] for x in (a, b, c)], gates[rows]),
            0.0,
        ),
    )
    compressors = [BlockCompressor(config, width, device=device, dtype=dtype) for width in (dk, dv)]
    keys = {b: draw(1, length, groups, dk) for b in BRANCHES}
    values = {b: draw(1, length, groups, dv) for b in BRANCHES}
    yield (
        "whole",
        Problem(
            [q, gates, *keys.values(), *values.values()],
            lambda q, gates, *kv: native_sparse_attention(
                q[None],
                dict(zip(BRANCHES, kv[:3], strict=True)),
                dict(zip(BRANCHES, kv[3:], strict=True)),
                gates[None],
                *compressors,
                config=config,
                backend=options.backend,
            ),
            None,
            (seen + chosen + in_window) * pair + seen * 2.0 * heads * dk,
        ),
    )


def _segments_of(rows: Tensor, device: torch.device) -> QuerySegments:
    """One segment a sampled row of the document."""
    return QuerySegments.from_rows(
        [(i, 1, t, 0, 0, 0) for i, t in enumerate(rows.tolist())], device
    )
