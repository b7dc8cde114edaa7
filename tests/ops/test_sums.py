"""Long sums add up as well as the rule asks whatever the BLAS: in the least accurate, they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_kernels import get_backend
from nsa_kernels.pytorch._common import product_over_rows
from nsa_kernels.reference import compress_blocks
from tests.ops.accuracy import assert_2x
from tests.ops.in_order import ProductsInOrder
from tests.ops.op_cases import (
    Case,
    Layout,
    assert_attention,
    fill,
    masks,
    random,
    random_choice,
)

BACKEND = get_backend("pytorch")
EPS = torch.finfo(torch.float32).eps
LONG = Case("long", (800,), heads=2, groups=1, block=8, stride=2, select_block=32, num_selected=8)


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float(((x.double() - exact) / exact).abs().max())


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 640, 4000])
@pytest.mark.parametrize("elements", [1 << 20, 1])
def test_products_over_rows(rows: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers of one sign, so that what a chain loses stays lost."""
    monkeypatch.setattr("nsa_kernels.pytorch._common.TILE_ELEMENTS", elements)
    a, b = torch.rand(2, rows, 3) + 1, torch.rand(2, rows, 5) + 1
    exact = a.double().mT @ b.double()
    with ProductsInOrder() as products:
        ours, chain = product_over_rows(a, b), torch.bmm(a.mT, b)
    assert products.count >= 2
    assert ours.shape == (2, 3, 5)
    if not rows:
        assert torch.equal(ours, torch.zeros(2, 3, 5))
        return
    assert relative_error(ours, exact) <= 3 * EPS
    if rows == 4000:
        assert relative_error(chain, exact) > 8 * EPS


@pytest.mark.accuracy
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("kind", ["mlp", "linear", "conv1d", "attention_pool"])
def test_weights_of_compressors(kind: str, per_head: bool) -> None:
    """The oracle adds a document and a head after the other, the backend all of them at once."""
    groups, width, block, stride, lengths = 2, 6, 4, 2, (12,) * 80 + (300,)
    shapes: dict[str, tuple[int, ...]] = {
        "mlp": {"up": (13, block * width), "down": (width, 13)},
        "linear": {"weight": (width, block * width)},
        "conv1d": {"weight": (width, block)},
        "attention_pool": {"query": (width,)},
    }[kind]
    shapes = {"position": (block, width), **shapes}
    heads = (groups,) if per_head else ()
    params = {n: random(*heads, *s, dtype=torch.float32, gain=0.5) for n, s in shapes.items()}
    x = random(sum(lengths), groups, width, dtype=torch.float32)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    rows = torch.cat(
        [
            start + torch.arange(0, length - block + 1, stride)
            for start, length in zip(starts, lengths, strict=True)
        ]
    )
    # Gradients of one sign: their sums grow with every row.
    grad = random(rows.shape[0], groups, width, dtype=torch.float32).abs() + 1

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: p.to(dtype).requires_grad_() for n, p in params.items()}
        parts = x.to(dtype).split(lengths)
        out = torch.cat([compress_blocks(part, block, stride, kind, leaves) for part in parts])
        return list(torch.autograd.grad(out, list(leaves.values()), grad.to(dtype)))

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with ProductsInOrder():
        out = BACKEND.compress(x, rows, block, kind, leaves)
        ours = torch.autograd.grad(out, list(leaves.values()), grad)
    for name, a, b, c in zip(params, ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_2x(a, b, c, torch.float32, f"{kind} {name}")


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_attention(branch: str, mean: float) -> None:
    """Gradients of keys are sums over queries."""
    case = LONG
    layout, tokens = Layout(case), sum(case.documents)
    bounds = case.compressed_bounds if branch == "compressed" else case.bounds
    q = random(tokens, case.heads, case.key_width, dtype=torch.float32)
    k = random(bounds[-1], case.groups, case.key_width, dtype=torch.float32, gain=0.5)
    v = random(bounds[-1], case.groups, case.value_width, dtype=torch.float32) + mean
    grad = random(tokens, case.heads, case.value_width, dtype=torch.float32) + mean
    segments, selected = layout.segments, None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with ProductsInOrder() as products:
        if branch == "selected":
            selected = random_choice(case)
            table = layout.block_table(selected)
            (k_own, k_fetched), (v_own, v_fetched) = (table.fill(x) for x in leaves[1:])
            o, lse = BACKEND.selected_attention(
                leaves[0],
                k_own,
                v_own,
                k_fetched,
                v_fetched,
                selected,
                table.block_rows,
                table.block_lengths,
                segments,
                select_block=case.select_block,
                scale=case.scale,
            )
        elif branch == "window":
            o, lse = BACKEND.window_attention(
                leaves[0],
                *(fill(x, layout.window_index) for x in leaves[1:]),
                segments,
                window=case.window,
                scale=case.scale,
            )
        else:
            o, lse = BACKEND.compressed_attention(
                leaves[0],
                *(fill(x, layout.compressed_index) for x in leaves[1:]),
                segments,
                block=case.block,
                stride=case.stride,
                scale=case.scale,
            )
        dq, dk, dv = torch.autograd.grad(o, leaves, grad)
    assert products.count
    ours = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert_attention(case, ours, masks(case, branch, selected), bounds, (q, k, v), grad)
