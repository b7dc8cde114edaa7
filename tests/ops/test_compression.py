"""The compressors and the gathered blocks against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_kernels import get_backend
from nsa_kernels.reference import compress_blocks, num_compressed
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.op_cases import (
    DTYPES,
    assert_unchanged_bits,
    case_id,
    collect,
    fill,
    join,
    largest,
    random,
)

BACKEND = get_backend("pytorch")
KINDS = ["mlp", "linear", "conv1d", "attention_pool", "mean"]
BLOCKS = [(8, 4), (8, 8), (6, 2), (4, 1)]
DOCUMENTS = (41, 3, 0, 8, 19)
GROUPS, WIDTH = 2, 6


def make_params(
    kind: str, block: int, dtype: torch.dtype, per_head: bool = False, width: int = WIDTH
) -> dict[str, Tensor]:
    shapes = {
        "mlp": {"up": (2 * width + 1, block * width), "down": (width, 2 * width + 1)},
        "linear": {"weight": (width, block * width)},
        "conv1d": {"weight": (width, block)},
        "attention_pool": {"query": (width,)},
        "mean": {},
    }[kind]
    if kind != "mean":
        shapes = {"position": (block, width), **shapes}
    head = (GROUPS,) if per_head else ()
    return {name: random(*head, *shape, dtype=dtype, gain=0.5) for name, shape in shapes.items()}


class Blocks:
    """The compression blocks of packed documents in a buffer with rows of nobody."""

    def __init__(self, block: int, stride: int, documents: tuple[int, ...] = DOCUMENTS) -> None:
        self.block, self.stride, self.documents = block, stride, documents
        index, rows = [torch.full((3,), -1)], []
        tokens = 0
        for length in documents:
            start = sum(map(len, index))
            rows.append(start + stride * torch.arange(num_compressed(length, block, stride)))
            # A tail that no block covers is never read: it may be nobody's.
            covered = max(0, length - block) // stride * stride + block if length >= block else 0
            index += [
                torch.arange(tokens, tokens + covered),
                torch.full((length - covered + 1,), -1),
            ]
            tokens += length
        self.index, self.rows, self.num_tokens = join(index), join(rows), tokens

    def dense(
        self, x: Tensor, kind: str, params: dict[str, Tensor], grad: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The oracle in `dtype`: compressed tokens and all gradients."""
        x = x.to(dtype).requires_grad_()
        params = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
        parts = [
            compress_blocks(part, self.block, self.stride, kind, params)
            for part in x.split(self.documents)
        ]
        out = torch.cat(parts)
        grads = torch.autograd.grad(out, [x, *params.values()], grad.to(dtype))
        return {"out": out, **dict(zip(["x", *params], grads, strict=True))}


def assert_compresses(
    blocks: Blocks, kind: str, dtype: torch.dtype, params_dtype: torch.dtype, per_head: bool
) -> None:
    x = random(blocks.num_tokens, GROUPS, WIDTH, dtype=dtype)
    grad = random(blocks.rows.shape[0], GROUPS, WIDTH, dtype=dtype)
    params = make_params(kind, blocks.block, params_dtype, per_head)
    buffer = fill(x, blocks.index).requires_grad_()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = BACKEND.compress(buffer, blocks.rows, blocks.block, kind, leaves)
    assert out.dtype == dtype
    grad_x, *grads = torch.autograd.grad(out, [buffer, *leaves.values()], grad)
    assert grad_x.dtype == dtype
    assert all(g.dtype == params_dtype for g in grads)
    ours = {"out": out, "x": collect(grad_x, blocks.index, blocks.num_tokens)}
    ours.update(zip(leaves, grads, strict=True))
    exact = blocks.dense(x, kind, params, grad, torch.float64)
    plain = blocks.dense(x, kind, params, grad, plain_dtype(dtype))
    for name, value in ours.items():
        heads = name in ("out", "x")
        assert_2x(value, plain[name], exact[name], dtype, f"{kind} {name}", heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_oracle(kind: str, per_head: bool, dtype: torch.dtype) -> None:
    for block, stride in BLOCKS:
        assert_compresses(Blocks(block, stride), kind, dtype, dtype, per_head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_float32(kind: str, dtype: torch.dtype) -> None:
    assert_compresses(Blocks(8, 4), kind, dtype, torch.float32, False)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_more_tiles_than_are_added_in_a_row(
    kind: str, per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block a tile: 147 tiles."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    assert_compresses(Blocks(8, 2, (300,)), kind, torch.float32, torch.float32, per_head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 5])
def test_trap_zero_compression_windows(rows: int, kind: str) -> None:
    """No block at all: no compressed token, and gradients of zeros, not None, for every weight."""
    x = torch.zeros(rows, GROUPS, WIDTH, requires_grad=True)
    params = {name: p.requires_grad_() for name, p in make_params(kind, 8, torch.float32).items()}
    out = BACKEND.compress(x, torch.zeros(0, dtype=torch.int64), 8, kind, params)
    assert out.shape == (0, GROUPS, WIDTH)
    out.sum().backward()
    for leaf in (x, *params.values()):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [largest(torch.float32), math.nan], ids=["huge", "nan"])
def test_tokens_of_later_blocks_change_no_bit(value: float, kind: str) -> None:
    x = torch.randn(64, GROUPS, WIDTH)
    params = make_params(kind, 8, torch.float32)
    rows = torch.arange(0, 57, 4)

    def disturb() -> None:
        x[33:] = value

    def run() -> tuple[Tensor]:
        return (BACKEND.compress(x, rows, 8, kind, params),)

    assert_unchanged_bits(run, disturb, slice(0, 7))  # block 6 is tokens 24..31


def test_weights_of_a_head_are_its_own() -> None:
    """Per head, a set of weights does to its head what it does when shared."""
    x = torch.randn(20, GROUPS, WIDTH, dtype=torch.float64)
    rows = torch.arange(0, 13, 4)
    params = make_params("mlp", 8, torch.float64, per_head=True)
    out = BACKEND.compress(x, rows, 8, "mlp", params)
    for g in range(GROUPS):
        alone = BACKEND.compress(
            x[:, g : g + 1], rows, 8, "mlp", {name: p[g] for name, p in params.items()}
        )
        torch.testing.assert_close(out[:, g : g + 1], alone, rtol=1e-14, atol=1e-14)


def test_kind_that_does_not_exist() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"compress: found 'max'; 'mlp', .*'mean' work"):
        BACKEND.compress(torch.zeros(8, 1, 4), rows, 8, "max", {})


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_gathered_blocks(dtype: torch.dtype) -> None:
    blocks = Blocks(8, 4)
    x = random(blocks.num_tokens, GROUPS, WIDTH, dtype=dtype)
    buffer = fill(x, blocks.index).requires_grad_()
    out = BACKEND.gather_blocks(buffer, blocks.rows, 8)
    tokens = blocks.index[blocks.rows[:, None] + torch.arange(8)]
    assert torch.equal(out, x[tokens].transpose(1, 2))
    grad = random(*out.shape, dtype=dtype)
    ours = torch.autograd.grad(out, buffer, grad)[0]
    assert ours.dtype == dtype

    def scatter(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype).requires_grad_()
        return torch.autograd.grad(y[tokens].transpose(1, 2), y, grad.to(dtype))[0]

    ours = collect(ours, blocks.index, blocks.num_tokens)
    assert_2x(ours, scatter(plain_dtype(dtype)), scatter(torch.float64), dtype, "x", heads=True)


def test_no_gathered_blocks() -> None:
    x = torch.zeros(0, GROUPS, WIDTH, requires_grad=True)
    out = BACKEND.gather_blocks(x, torch.zeros(0, dtype=torch.int64), 8)
    assert out.shape == (0, GROUPS, 8, WIDTH)
    out.sum().backward()
    assert x.grad is not None
