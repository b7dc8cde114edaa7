"""The compressors and the gathered blocks against the oracle."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nsa_kernels.compressors import COMPRESSORS
from nsa_kernels.reference import compress_blocks, num_compressed
from tests.ops.accuracy import assert_2x, plain_dtype
from tests.ops.backends import DTYPES as KERNEL_DTYPES
from tests.ops.backends import PYTORCH, TRITON, BackendOnDevice, over, over_all
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

KINDS = list(COMPRESSORS)
BLOCKS = [(8, 4), (8, 8), (6, 2), (4, 1)]
DOCUMENTS = (41, 3, 0, 8, 19)
GROUPS, WIDTH = 2, 6
KERNEL_WIDTH = 16
every_kind = pytest.mark.parametrize("kind", KINDS)
over_widths = over("width", pytorch=[WIDTH], triton=[KERNEL_WIDTH])


@pytest.fixture(autouse=True)
def _has_kernels(request: pytest.FixtureRequest) -> None:
    """Skip a kind without kernels, which the Triton backend refuses."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "kind" in values and values.get("backend") == TRITON.name:
        from nsa_kernels.triton.compression.kinds import KINDS as WITH_KERNELS

        if values["kind"] not in WITH_KERNELS:
            pytest.skip(f"{values['kind']} has no kernels yet")


def make_params(
    kind: str, block: int, dtype: torch.dtype, per_head: bool = False, width: int = WIDTH
) -> dict[str, Tensor]:
    table = COMPRESSORS[kind](block, width, 2 * width + 1)
    head = (GROUPS,) if per_head else ()
    return {name: random(*head, *p.shape, dtype=dtype, gain=0.5) for name, p in table.items()}


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


def run(
    backend: BackendOnDevice,
    x: Tensor,
    rows: Tensor,
    block: int,
    kind: str,
    params: dict[str, Tensor],
    grad: Tensor,
) -> dict[str, Tensor]:
    """Compressed tokens and the gradients of x and all weights, on the host."""
    device = backend.device
    x = x.detach().to(device).requires_grad_()
    leaves = {name: p.detach().to(device).requires_grad_() for name, p in params.items()}
    out = backend.ops.compress(x, rows.to(device), block, kind, leaves)
    grads = torch.autograd.grad(out, [x, *leaves.values()], grad.to(device))
    found = dict(zip(["x", *leaves], grads, strict=True))
    return {name: value.detach().cpu() for name, value in {"out": out, **found}.items()}


def assert_compresses(
    backend: BackendOnDevice,
    blocks: Blocks,
    kind: str,
    dtype: torch.dtype,
    params: dict[str, Tensor],
    width: int,
) -> None:
    x = random(blocks.num_tokens, GROUPS, width, dtype=dtype)
    grad = random(blocks.rows.shape[0], GROUPS, width, dtype=dtype)
    buffer = fill(x, blocks.index)
    ours = run(backend, buffer, blocks.rows, blocks.block, kind, params, grad)
    assert ours["out"].dtype == ours["x"].dtype == dtype
    assert all(ours[name].dtype == p.dtype for name, p in params.items())
    ours["x"] = collect(ours["x"], blocks.index, blocks.num_tokens)
    exact = blocks.dense(x, kind, params, grad, torch.float64)
    plain = blocks.dense(x, kind, params, grad, plain_dtype(dtype))
    for name, value in ours.items():
        heads = name in ("out", "x")
        assert_2x(value, plain[name], exact[name], dtype, f"{kind} {name}", heads=heads)


@over("dtype", pytorch=DTYPES, triton=KERNEL_DTYPES)
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@every_kind
def test_against_the_oracle(
    backend: BackendOnDevice, kind: str, per_head: bool, dtype: torch.dtype
) -> None:
    width = WIDTH if backend is PYTORCH else KERNEL_WIDTH
    for block, stride in BLOCKS if backend is PYTORCH else BLOCKS[:1]:
        params = make_params(kind, block, dtype, per_head, width)
        assert_compresses(backend, Blocks(block, stride), kind, dtype, params, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@every_kind
def test_weights_in_float32(kind: str, dtype: torch.dtype) -> None:
    params = make_params(kind, 8, torch.float32)
    assert_compresses(PYTORCH, Blocks(8, 4), kind, dtype, params, WIDTH)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@every_kind
def test_more_tiles_than_are_added_in_a_row(
    kind: str, per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block a tile: 147 tiles."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", 1)
    params = make_params(kind, 8, torch.float32, per_head)
    assert_compresses(PYTORCH, Blocks(8, 2, (300,)), kind, torch.float32, params, WIDTH)


@over_widths
@every_kind
@pytest.mark.parametrize("rows", [0, 5])
def test_trap_zero_compression_windows(
    backend: BackendOnDevice, width: int, rows: int, kind: str
) -> None:
    """No block at all: no compressed token, and gradients of zeros, not None, for every weight."""
    x = torch.zeros(rows, GROUPS, width)
    params = make_params(kind, 8, torch.float32, width=width)
    none = torch.zeros(0, dtype=torch.int64)
    found = run(backend, x, none, 8, kind, params, torch.zeros(0, GROUPS, width))
    assert found["out"].shape == (0, GROUPS, width)
    for name, leaf in {"x": x, **params}.items():
        assert torch.equal(found[name], torch.zeros_like(leaf))


@over_widths
@every_kind
@pytest.mark.parametrize("value", [largest(torch.float32), math.nan], ids=["huge", "nan"])
def test_tokens_of_later_blocks_change_no_bit(
    backend: BackendOnDevice, width: int, value: float, kind: str
) -> None:
    x = torch.randn(64, GROUPS, width).to(backend.device)
    params = make_params(kind, 8, torch.float32, width=width)
    params = {name: p.to(backend.device) for name, p in params.items()}
    rows = torch.arange(0, 57, 4, device=backend.device)

    def disturb() -> None:
        x[33:] = value

    def run() -> tuple[Tensor]:
        return (backend.ops.compress(x, rows, 8, kind, params),)

    assert_unchanged_bits(run, disturb, slice(0, 7))  # block 6 is tokens 24..31


def test_weights_of_a_head_are_its_own() -> None:
    """Per head, a set of weights does to its head what it does when shared."""
    x = torch.randn(20, GROUPS, WIDTH, dtype=torch.float64)
    rows = torch.arange(0, 13, 4)
    params = make_params("mlp", 8, torch.float64, per_head=True)
    out = PYTORCH.ops.compress(x, rows, 8, "mlp", params)
    for g in range(GROUPS):
        alone = PYTORCH.ops.compress(
            x[:, g : g + 1], rows, 8, "mlp", {name: p[g] for name, p in params.items()}
        )
        torch.testing.assert_close(out[:, g : g + 1], alone, rtol=1e-14, atol=1e-14)


@over_all
def test_kind_that_does_not_exist(backend: BackendOnDevice) -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"compress must be one of 'mlp', .*, got 'max'"):
        backend.ops.compress(torch.zeros(8, 1, 16), rows, 8, "max", {})


@over(
    "block, stride, width, dtype",
    pytorch=product([8], [4], [WIDTH], DTYPES),
    triton=(
        (*grid, KERNEL_WIDTH, dtype)
        for grid, dtype in product([(8, 4), (4, 4), (16, 2)], KERNEL_DTYPES)
    ),
)
def test_gathered_blocks(
    backend: BackendOnDevice, block: int, stride: int, width: int, dtype: torch.dtype
) -> None:
    blocks = Blocks(block, stride)
    x = random(blocks.num_tokens, GROUPS, width, dtype=dtype)
    buffer = fill(x, blocks.index).to(backend.device).requires_grad_()
    out = backend.ops.gather_blocks(buffer, blocks.rows.to(backend.device), block)
    tokens = blocks.index[blocks.rows[:, None] + torch.arange(block)]
    assert torch.equal(out.cpu(), x[tokens].transpose(1, 2))
    grad = random(*out.shape, dtype=dtype)
    ours = torch.autograd.grad(out, buffer, grad.to(backend.device))[0]
    assert ours.dtype == dtype

    def scatter(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype).requires_grad_()
        return torch.autograd.grad(y[tokens].transpose(1, 2), y, grad.to(dtype))[0]

    found = collect(ours.cpu(), blocks.index, blocks.num_tokens)
    assert_2x(found, scatter(plain_dtype(dtype)), scatter(torch.float64), dtype, "x", heads=True)


@over_widths
def test_no_gathered_blocks(backend: BackendOnDevice, width: int) -> None:
    x = torch.zeros(0, GROUPS, width, device=backend.device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=backend.device)
    out = backend.ops.gather_blocks(x, none, 8)
    assert out.shape == (0, GROUPS, 8, width)
    out.sum().backward()
    assert x.grad is not None
