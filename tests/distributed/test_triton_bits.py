"""The forward output's bits on the Triton backend do not depend on the split.

From q, k, v, gates and compressor weights on, one rank's output is every rank's output. Without a
GPU the kernels run in Triton's interpreter, whose dot is a BLAS call with results that depend on
where a row stands in a tile; a dot of fixed order takes its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import BRANCHES, BlockCompressor, NSAConfig, make_sharding, native_sparse_attention
from nsa_kernels.compressors import COMPRESSORS
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

INTERPRETED = not torch.cuda.is_available()
SMALL = NSAConfig(
    4,
    2,
    16,
    compress_block=4,
    compress_stride=2,
    select_block=16,
    num_selected=4,
    window=20,
)
LARGE = NSAConfig(32, 2, 128, num_selected=8, window=200)


@dataclass(frozen=True)
class Case:
    """Documents of one packed stream, or one document of ``length`` tokens for None.

    shared: one k and v for all branches.
    """

    config: NSAConfig = SMALL
    layout: str = "zigzag"
    lengths: tuple[int, ...] | None = (60, 1, 37)
    length: int = 97
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    shared: bool = False


def drawn(case: Case) -> tuple[list[Tensor], list[BlockCompressor]]:
    """q, k and v of each branch, gates [1, T, ...], and the compressors, the same on every rank."""
    config = case.config
    torch.manual_seed(7)
    length = case.length if case.lengths is None else sum(case.lengths)
    shapes = [(config.num_heads, config.head_dim)]
    shapes += [(config.num_kv_heads, config.head_dim)] * 3
    shapes += [(config.num_kv_heads, config.value_dim)] * 3
    tensors = [torch.randn(1, length, *shape).to(case.device, case.dtype) for shape in shapes]
    tensors.append(torch.rand(1, length, config.num_heads, 3).to(case.device))
    compressors = [
        BlockCompressor(config, width).to(case.device, case.dtype)
        for width in (config.head_dim, config.value_dim)
    ]
    for compressor in compressors:
        for name, p in compressor.named_parameters():
            if name == "position":
                torch.nn.init.normal_(p, std=0.1)
    return tensors, compressors


def forward_bits(case: Case, group: Any = None, **options: Any) -> Tensor:
    """The whole output [1, T, H, Dv] on the CPU."""
    tensors, compressors = drawn(case)
    bounds = None
    if case.lengths is not None:
        bounds = torch.tensor([0, *case.lengths]).cumsum(0).int()
    sharding = make_sharding(
        tensors[0].shape[1], cu_seqlens=bounds, layout=case.layout, group=group
    )
    q, *kv, gates = (sharding.shard(x) for x in tensors)
    k = kv[0] if case.shared else dict(zip(BRANCHES, kv[:3], strict=True))
    v = kv[3] if case.shared else dict(zip(BRANCHES, kv[3:], strict=True))
    order: Any = nullcontext()
    if INTERPRETED:
        from tests.ops.triton.guard import fixed_order_dot

        order = fixed_order_dot()
    with order, torch.no_grad():
        out = native_sparse_attention(
            q,
            k,
            v,
            gates,
            *compressors,
            config=case.config,
            cu_seqlens=sharding.cu_seqlens,
            layout=case.layout,
            group=group,
            backend="triton",
            **options,
        )
    assert isinstance(out, Tensor)
    return sharding.unshard(out).cpu()


def bits_on_rank(case: Case, ranks_per_node: int | None = None) -> Tensor:
    return forward_bits(case, dist.group.WORLD, ranks_per_node=ranks_per_node)


LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")


# What the quick tests run of the product below.
QUICK = {
    (2, "contiguous", True, "mlp"),
    (4, "zigzag", False, "mean"),
    (4, "zigzag_per_document", True, "mlp"),
}
PRODUCT = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in (
        *itertools.product((2, 4), LAYOUTS, (False, True), ("mlp", "mean")),
        *itertools.product((2, 4), ("zigzag",), (True,), ("linear", "conv1d", "attention_pool")),
    )
]


@pytest.mark.skipif(not INTERPRETED, reason="GPUs run the larger cases")
@pytest.mark.parametrize("size, layout, packed, compress", PRODUCT)
def test_bits_do_not_depend_on_the_split(
    size: int, layout: str, packed: bool, compress: Any, ranks_of: Callable[[int], Ranks]
) -> None:
    case = Case(config=replace(SMALL, compress=compress), layout=layout)
    if not packed:
        case = replace(case, lengths=None)
    expected = forward_bits(case)
    assert expected.isfinite().all()
    for found in ranks_of(size).run(bits_on_rank, case):
        assert torch.equal(found, expected)


@pytest.mark.skipif(not INTERPRETED, reason="GPUs run the larger cases")
@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[] if x == "zigzag" else pytest.mark.slow) for x in LAYOUTS]
)
def test_bits_over_two_levels_of_links(layout: str, ranks_of: Callable[[int], Ranks]) -> None:
    case = Case(config=replace(SMALL, num_heads=2, compress="mean"), layout=layout)
    expected = forward_bits(case)
    for found in ranks_of(4).run(bits_on_rank, case, 2):
        assert torch.equal(found, expected)


@pytest.mark.skipif(not INTERPRETED, reason="GPUs run the larger cases")
@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_bits_of_shared_keys_and_values(layout: str, ranks_of: Callable[[int], Ranks]) -> None:
    """One buffer of keys, with one halo, for all branches."""
    config = replace(SMALL, independent_kv=False, compress="mean")
    case = Case(config, layout, shared=True)
    expected = forward_bits(case)
    assert expected.isfinite().all()
    for found in ranks_of(2).run(bits_on_rank, case):
        assert torch.equal(found, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("shared", [False, True], ids=["independent", "shared"])
@pytest.mark.parametrize("compress", list(COMPRESSORS))
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_do_not_depend_on_the_gpus(
    dtype: torch.dtype, layout: str, packed: bool, compress: Any, shared: bool, gpus: Ranks
) -> None:
    lengths = (1500, 1, 33, 3500, 70) if packed else None
    config = replace(LARGE, compress=compress, independent_kv=not shared)
    case = Case(config, layout, lengths, 5003, dtype, "cuda", shared)
    expected = forward_bits(case)
    assert expected.isfinite().all()
    for ranks_per_node in (1, 2) if gpus.size == 4 else (None,):
        for found in gpus.run(bits_on_rank, case, ranks_per_node):
            assert torch.equal(found, expected)
