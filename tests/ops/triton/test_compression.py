"""The kernels of the compressors: every width, rows in any order, strides, places and offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_kernels.triton import compress
from nsa_kernels.triton.compression import pooling, projection
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DEVICE, DTYPES, INTERPRETED, TRITON, natively_all
from tests.ops.op_cases import case_id, collect, fill, random, same_bits
from tests.ops.test_compression import (
    GROUPS,
    Blocks,
    assert_compresses,
    every_kind,
    make_params,
    run,
)
from tests.ops.test_compression import KERNEL_WIDTH as WIDTH
from tests.ops.triton.guard import far_apart


def assert_all_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {name: same_bits(x, b[name]) for name, x in a.items()} == dict.fromkeys(a, True)


@pytest.mark.parametrize(
    "block, stride, width",
    [(4, 2, 80), (8, 8, 48), (16, 2, 16), (32, 16, 96), (64, 4, 16), (4, 4, 256)],
    ids=lambda x: str(x),
)
@every_kind
def test_blocks_and_widths(kind: str, block: int, stride: int, width: int) -> None:
    params = make_params(kind, block, torch.float32, width=width)
    blocks = Blocks(block, stride, (2 * block + 1, 3, 0, block, block + 9))
    assert_compresses(TRITON, blocks, kind, torch.float16, params, width)


@every_kind
def test_more_tiles_than_are_added_in_a_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "PIECE", 2)
    monkeypatch.setattr(projection, "PROGRAMS", 2)
    monkeypatch.setattr(pooling, "PIECE", 2)
    monkeypatch.setattr(pooling, "RUNS", 3)
    params = make_params(kind, 16, torch.float32, width=32)
    if kind == "mlp":
        params["up"], params["down"] = (
            random(150, 512, dtype=torch.float32),
            random(32, 150, dtype=torch.float32),
        )
    assert_compresses(TRITON, Blocks(16, 4, (131, 40)), kind, torch.float32, params, 32)


@pytest.mark.parametrize("hidden", [1, 16, 200])
def test_hidden_widths(hidden: int) -> None:
    params = make_params("mlp", 4, torch.float32, width=WIDTH)
    params["up"] = random(hidden, 4 * WIDTH, dtype=torch.float32)
    params["down"] = random(WIDTH, hidden, dtype=torch.float32)
    assert_compresses(TRITON, Blocks(4, 2), "mlp", torch.float32, params, WIDTH)


@every_kind
def test_blocks_of_a_run_that_are_not_there(kind: str) -> None:
    """Some blocks of the grid are another rank's: distances are multiples of the stride."""
    blocks = Blocks(16, 2, (90,))
    blocks.rows = blocks.rows[[0, 1, 4, 7, 8, 20, 22, 30]]
    x = random(90, GROUPS, WIDTH, dtype=torch.float32)
    grad = random(8, GROUPS, WIDTH, dtype=torch.float32)
    params = make_params(kind, 16, torch.float32, width=WIDTH)
    ours = run(TRITON, fill(x, blocks.index), blocks.rows, 16, kind, params, grad)
    whole = Blocks(16, 2, (90,))
    scattered = torch.zeros(whole.rows.shape[0], GROUPS, WIDTH)
    scattered[[0, 1, 4, 7, 8, 20, 22, 30]] = grad
    exact = whole.dense(x, kind, params, scattered, torch.float64)
    plain = whole.dense(x, kind, params, scattered, torch.float32)
    ours["x"] = collect(ours["x"], blocks.index, 90)
    for name in ("x", *params):
        assert_2x(ours[name], plain[name], exact[name], torch.float32, name)


@every_kind
def test_blocks_in_any_order(kind: str) -> None:
    blocks = Blocks(8, 4)
    order = torch.randperm(blocks.rows.shape[0])
    buffer = fill(random(blocks.num_tokens, GROUPS, WIDTH, dtype=torch.float32), blocks.index)
    params = make_params(kind, 8, torch.float32, width=WIDTH)
    grad = random(len(order), GROUPS, WIDTH, dtype=torch.float32)
    given = run(TRITON, buffer, blocks.rows, 8, kind, params, grad)
    found = run(TRITON, buffer, blocks.rows[order], 8, kind, params, grad[order])
    torch.testing.assert_close(found["out"], given["out"][order])
    torch.testing.assert_close(found["x"], given["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@every_kind
@pytest.mark.usefixtures("_same_bits_in_any_row")
def test_a_token_depends_on_its_block_alone(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, whatever other blocks the call has and wherever they stand."""
    x = random(150, GROUPS, WIDTH, dtype=dtype).to(DEVICE)
    params = {k: p.to(DEVICE) for k, p in make_params(kind, 8, dtype, width=WIDTH).items()}
    rows = torch.arange(0, 143, 2, device=DEVICE)
    whole = compress(x, rows, 8, kind, params)
    for first, last in ((0, 1), (1, 40), (40, 72)):
        start, end = int(rows[first]), int(rows[last - 1]) + 8
        part = compress(x[start:end].clone(), rows[first:last] - start, 8, kind, params)
        assert same_bits(part, whole[first:last])


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
@every_kind
def test_gradients_repeat(kind: str, dtype: torch.dtype) -> None:
    blocks = Blocks(8, 2)
    buffer = fill(random(blocks.num_tokens, GROUPS, WIDTH, dtype=dtype), blocks.index)
    params = make_params(kind, 8, dtype, width=WIDTH)
    grad = random(blocks.rows.shape[0], GROUPS, WIDTH, dtype=dtype)
    first = run(TRITON, buffer, blocks.rows, 8, kind, params, grad)
    assert_all_same(run(TRITON, buffer, blocks.rows, 8, kind, params, grad), first)


@pytest.mark.parametrize("dtype", natively_all(torch.float32), ids=case_id)
@every_kind
def test_views_of_any_strides(kind: str, dtype: torch.dtype) -> None:
    blocks = Blocks(8, 4)
    x = fill(random(blocks.num_tokens, GROUPS, WIDTH, dtype=dtype), blocks.index)
    params = make_params(kind, 8, dtype, per_head=True, width=WIDTH)
    grad = random(blocks.rows.shape[0], GROUPS, WIDTH, dtype=dtype)
    expected = run(TRITON, x, blocks.rows, 8, kind, params, grad)
    fused = torch.full((x.shape[0], GROUPS, 5 * WIDTH), torch.nan, dtype=dtype)
    aligned, shifted = fused[..., WIDTH : 2 * WIDTH], fused[..., 3 * WIDTH + 1 : 4 * WIDTH + 1]
    heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    channels_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    moved = {name: p.mT.contiguous().mT for name, p in params.items()}
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (aligned.copy_(x), shifted.copy_(x), heads_first, channels_first):
        assert_all_same(run(TRITON, given, blocks.rows, 8, kind, moved, grad), expected)


@pytest.mark.skipif(not INTERPRETED, reason="what overflows shows in the interpreter")
@every_kind
@pytest.mark.parametrize("strides", [(1 << 28, 16, 1), (16, 1 << 31, 1)], ids=["rows", "heads"])
def test_offsets_past_two_to_the_31(strides: tuple[int, int, int], kind: str) -> None:
    x = random(24, GROUPS, WIDTH, dtype=torch.float16)
    rows = torch.arange(0, 17, 4)
    params = make_params(kind, 8, torch.float16, width=WIDTH)
    grad = random(5, GROUPS, WIDTH, dtype=torch.float16)
    expected = run(TRITON, x, rows, 8, kind, params, grad)
    assert_all_same(run(TRITON, far_apart(x, *strides), rows, 8, kind, params, grad), expected)


def test_blocks_that_move_in_place_are_found_again() -> None:
    """What is kept of a tensor of first rows is not that of its rows before a change."""
    x = torch.randn(40, GROUPS, WIDTH, device=DEVICE)
    rows = torch.arange(0, 17, 4, device=DEVICE)
    grad = torch.randn(5, GROUPS, WIDTH, device=DEVICE)
    for shift in (0, 8):
        rows += shift
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(compress(leaf, rows, 8, "mean", {}), leaf, grad)[0]
        fresh = torch.autograd.grad(compress(leaf, rows.clone(), 8, "mean", {}), leaf, grad)[0]
        assert same_bits(found, fresh)
        assert not found[:shift].any()
        assert found[shift].all()
