"""Calls every operator of the Triton backend forward and backward, small: for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.ops.triton.every_op

Results are not looked at, and inputs are made on the host, so that nearly all launches are ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels import QuerySegments, get_backend
from nsa_kernels.backend import attend_few
from nsa_kernels.compressors import COMPRESSORS
from nsa_kernels.reference import num_compressed
from nsa_kernels.triton.compression.kinds import KINDS


@dataclass(frozen=True)
class Options:
    """documents: lengths of a packed stream; the rest as the operators take them."""

    documents: tuple[int, ...]
    heads: int
    groups: int
    key_width: int
    value_width: int
    block: int
    stride: int
    select_block: int
    window: int
    dtype: torch.dtype = torch.bfloat16


EVERY = (
    # The paper's heads and blocks; the last of each is short.
    Options((150,), 16, 1, 128, 128, 32, 16, 64, 100),
    # Widths and a group that are padded, documents of no token, one and less than a block.
    Options((1, 70, 0, 7, 33), 3, 1, 80, 96, 8, 4, 16, 20),
    Options((90, 31), 4, 2, 192, 64, 16, 4, 32, 33, torch.float16),
    Options((60,), 2, 2, 64, 64, 4, 4, 16, 1, torch.float32),
    # The paper's widths.
    Options((90, 31), 16, 1, 192, 128, 32, 16, 64, 33),
    # Packed documents in the kernels that Hopper has for powers of two.
    Options((1, 70, 0, 7, 33), 8, 2, 64, 128, 8, 4, 16, 20),
)


def case_id(options: Options) -> str:
    return f"{options.heads // options.groups}_heads_{options.key_width}"


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(device).requires_grad_()


def run(options: Options, device: str) -> None:
    ops, dtype = get_backend("triton"), options.dtype
    heads, groups, dk, dv = options.heads, options.groups, options.key_width, options.value_width
    scale, tokens = dk**-0.5, sum(options.documents)
    segments, starts, first_rows, lengths = [], [], [], []
    at = 0
    for length in options.documents:
        segments.append((at, length, 0, len(starts), len(first_rows), at))
        count = num_compressed(length, options.block, options.stride)
        starts += [at + i * options.stride for i in range(count)]
        blocks = range(0, length, options.select_block)
        first_rows += [at + i for i in blocks]
        lengths += [min(options.select_block, length - i) for i in blocks]
        at += length
    table = QuerySegments.from_rows(segments).to(device)
    rows = torch.tensor(starts).to(device)
    band = {"block": options.block, "stride": options.stride, "scale": scale}

    def weights(width: int) -> dict[str, dict[str, Tensor]]:
        tables = {kind: COMPRESSORS[kind](options.block, width, 2 * width) for kind in KINDS}
        return {
            kind: {n: leaf(*p.shape, dtype=dtype, device=device) for n, p in table.items()}
            for kind, table in tables.items()
        }

    # The keys stand in one tensor with the queries, as views of a fused projection do.
    fused = leaf(tokens, heads + 2 * groups, max(dk, dv), dtype=dtype, device=device)
    q, k, v = fused.split([heads, groups, groups], dim=1)
    q, k, v = q[..., :dk], k[..., :dk], v[..., :dv]
    kinds = weights(dk)
    short = [ops.compress(k, rows, options.block, kind, kinds[kind]) for kind in kinds]
    short.append(ops.gather_blocks(k, rows, options.block).mean(dim=2))
    values = ops.compress(v, rows, options.block, "mean", {})
    keys = torch.stack(short).mean(dim=0)
    o_cmp, lse = ops.compressed_attention(q, keys, values, table, **band)
    selected = ops.select_blocks(
        q.detach(), keys.detach(), lse, table, **band, select_block=options.select_block,
        num_selected=4, num_init_blocks=1, num_local_blocks=2,
    )  # fmt: skip
    own = tokens // 2
    places = torch.tensor(first_rows).expand(groups, -1).contiguous().to(device)
    if any(row < own < row + length for row, length in zip(first_rows, lengths, strict=True)):
        own = max(row for row in first_rows if row < own)
    o_slc, _ = ops.selected_attention(
        q, k[:own], v[:own], k[own:], v[own:], selected, places,
        torch.tensor(lengths).to(device), table, select_block=options.select_block, scale=scale,
    )  # fmt: skip
    o_win, _ = ops.window_attention(q, k, v, table, window=options.window, scale=scale)
    gates = leaf(tokens, heads, 3, dtype=dtype, device=device)
    branches = ("compressed", "selected", "window")
    few = attend_few(ops)
    assert few is not None
    few(
        q.detach(), dict(zip(branches, (keys.detach(), k.detach(), k.detach()), strict=True)),
        dict(zip(branches, (values.detach(), v.detach(), v.detach()), strict=True)),
        gates.detach(), table, places[0], branches=branches, **band,
        select_block=options.select_block, num_selected=4, num_init_blocks=1, num_local_blocks=2,
        window=options.window,
    )  # fmt: skip
    out = ops.combine([o_cmp, o_slc, o_win], gates)
    leaves = [fused, gates, *(x for kind in kinds.values() for x in kind.values())]
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def main(device: str) -> int:
    torch.manual_seed(0)
    for options in EVERY:
        run(options, device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(options, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
