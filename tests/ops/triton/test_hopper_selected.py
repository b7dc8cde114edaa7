"""The selected branch by Hopper's Gluon kernels, which nothing interprets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nsa_kernels.triton.selected import backward, forward
from nsa_kernels.triton.selected.hopper_dkv import HopperDkv
from nsa_kernels.triton.shared import shapes
from tests.ops.backends import DEVICE, INTERPRETED, TRITON
from tests.ops.op_cases import Case, case_id, random_choice, same_bits
from tests.ops.selected import (
    attend_plain,
    attention_results,
    check_against_the_oracle,
    make_inputs,
)

pytestmark = pytest.mark.skipif(
    INTERPRETED or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
WORKSPACE = backward.WORKSPACE
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)


def case(name: str, documents: tuple[int, ...], ratio: int, *widths: int, groups: int = 1) -> Case:
    sizes = {"select_block": 64, "num_selected": 16, "key_width": widths[0]}
    heads = ratio * groups
    return Case(name, documents, (), heads, groups, value_width=widths[1], **sizes)


# Each ratio and pair of widths; documents and blocks shorter than a tile, and lists of many tiles.
CASES = [
    case("R4", (70, 700), 4, 64, 64, groups=2),
    case("R8_packed", (1, 70, 0, 7, 33, 730), 8, 64, 64, groups=2),
    case("R8_wide_keys", (700, 64), 8, 128, 64),
    case("R16", (900, 31), 16, 128, 128, groups=2),
    replace(
        case("R16_pieces", (300, 500), 16, 64, 128),
        runs=((1, 37, 350), (1, 450, 20), (0, 0, 213)),
        num_selected=4,
    ),
    case("R32", (700,), 32, 128, 128),
]
# Widths of queries and keys in three parts. Plain kernels take shorter tiles of keys there.
WIDE_CASES = [
    case("R4_192", (70, 700), 4, 192, 64, groups=2),
    case("R8_192_packed", (1, 70, 0, 7, 33, 730), 8, 192, 128, groups=2),
    case("R16_192", (900, 31), 16, 192, 128, groups=2),
    replace(
        case("R16_192_pieces", (300, 500), 16, 192, 64),
        runs=((1, 37, 350), (1, 450, 20), (0, 0, 213)),
        num_selected=4,
    ),
    case("R32_192", (700,), 32, 192, 128),
]
each_width = pytest.mark.parametrize("width", [128, 192])


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    found: Counter[str] = Counter()

    class Counted(HopperDkv):
        def __call__(self, dk: torch.Tensor, dv: torch.Tensor, first: int, end: int) -> None:
            found["dkv"] += 1
            super().__call__(dk, dv, first, end)

    def counted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            found[name] += 1
            function(*arguments)

        return run

    monkeypatch.setattr(backward, "HopperDkv", Counted)
    monkeypatch.setattr(backward, "hopper_dq", counted("dq", backward.hopper_dq))
    monkeypatch.setattr(forward, "hopper_forward", counted("forward", forward.hopper_forward))
    return found


@every_dtype
@pytest.mark.parametrize("case", [*CASES, *WIDE_CASES], ids=case_id)
def test_against_the_oracle(case: Case, dtype: torch.dtype, made: Counter[str]) -> None:
    check_against_the_oracle(TRITON, case, dtype)
    dkv = {"dkv"} if case.heads // case.groups >= 8 else set()
    assert made.keys() == {"forward", "dq"} | dkv


@every_dtype
@pytest.mark.parametrize("case", [*CASES, case("long", (4000,), 16, 128, 128)], ids=case_id)
def test_the_plain_kernels_sum_alike(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, made: Counter[str]
) -> None:
    """Their results have the bits of these: the order of sums is the same by design."""
    inputs, grad_o = make_inputs(case, dtype)
    choice = random_choice(case)
    found = attention_results(TRITON, case, inputs, grad_o, choice)
    for module in (forward, backward):
        monkeypatch.setattr(module, "selected_walk_gluon", lambda *_: False)
    plain = attention_results(TRITON, case, inputs, grad_o, choice)
    assert made["forward"] == made["dq"] == 1
    for x, y in zip(found[:3], plain[:3], strict=True):  # o, lse and dq
        assert same_bits(x, y)


@every_dtype
@each_width
@pytest.mark.parametrize("ratio", [4, 16, 32])
def test_bits_do_not_depend_on_tiles(ratio: int, width: int, dtype: torch.dtype) -> None:
    """Rows that stand elsewhere in their tile, in one that is cut, keep their bits."""
    whole = case("whole", (300,), ratio, width, 128)
    cut = replace(whole, runs=((0, 0, 1), (0, 1, 5), (0, 6, 131), (0, 137, 163)))
    inputs, grad_o = make_inputs(whole, dtype)
    results = [
        attention_results(TRITON, one, inputs, grad_o, random_choice(whole))[:3]
        for one in (whole, cut)
    ]
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@each_width
def test_tokens_that_chose_nothing(width: int) -> None:
    one = case("one", (300,), 16, width, 128)
    inputs, grad_o = make_inputs(one, torch.bfloat16)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    selected = random_choice(one)
    selected[100:110] = -1
    o, lse = attend_plain(TRITON, one, *leaves, selected)
    dq, *_ = torch.autograd.grad(o, leaves, grad_o.to(DEVICE))
    assert not o[100:110].any() and not dq[100:110].any()
    assert (lse[100:110] == -math.inf).all()
    assert lse[:100].isfinite().all() and lse[110:].isfinite().all()


@every_dtype
@each_width
@pytest.mark.parametrize("workspace", [WORKSPACE, 40 * 64 * 256 * 4], ids=["all", "40"])
def test_gradients_repeat(
    workspace: int,
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    made: Counter[str],
) -> None:
    """Also where most blocks have several programs, over one launch or several."""
    long = case("long", (4000,), 16, width, 128)
    inputs, grad_o = make_inputs(long, dtype)
    monkeypatch.setattr(backward, "WORKSPACE", workspace)
    results = [
        attention_results(TRITON, long, inputs, grad_o, random_choice(long)) for _ in range(2)
    ]
    assert (made["dkv"] > 2) == (workspace != WORKSPACE)
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@every_dtype
@each_width
def test_a_gate_of_ones_is_no_gate(width: int, dtype: torch.dtype) -> None:
    one = case("one", (500,), 16, width, 128)
    inputs, grad_o = make_inputs(one, dtype)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
    gate = torch.ones(500, 16, device=DEVICE)
    grads = []
    for options in ({}, {"gate": gate}):
        results = attend_plain(TRITON, one, *leaves, random_choice(one), **options)
        out = results[2] if options else results[0]
        grads.append(torch.autograd.grad(out, leaves, grad_o.to(DEVICE)))
    assert all(same_bits(x, y) for x, y in zip(*grads, strict=True))


@every_dtype
@each_width
def test_views_that_tma_cannot_read(width: int, dtype: torch.dtype, made: Counter[str]) -> None:
    """Strides and addresses that are not whole 16 bytes: the bits of copies."""
    one = case("one", (300,), 16, width, 128)
    inputs, grad_o = make_inputs(one, dtype)
    selected = random_choice(one)
    grads = []
    for odd in (False, True):
        leaves = []
        for x in inputs:
            wide = torch.zeros(*x.shape[:2], x.shape[2] + 2 + odd, dtype=dtype, device=DEVICE)
            leaf = wide[..., odd : x.shape[2] + odd]
            leaf = leaf if odd else leaf.contiguous()
            leaves.append(leaf.copy_(x).requires_grad_())
        o, _ = attend_plain(TRITON, one, *leaves, selected)
        do = grad_o.to(DEVICE)[:, :1, :1].expand_as(o)
        grads.append(torch.autograd.grad(o, leaves, do))
    assert made == {"forward": 2, "dq": 2, "dkv": 2}
    assert all(same_bits(x, y) for x, y in zip(*grads, strict=True))


@each_width
def test_nan_behind_the_last_query(width: int) -> None:
    """Rows of a chosen block that nobody may see hold NaN: no bit of anything changes."""
    one = case("one", (256,), 16, width, 128)
    (q, k, v), grad_o = make_inputs(one, torch.bfloat16)
    leaves = [x.to(DEVICE).requires_grad_() for x in (q[:200], k, v)]
    results = []
    for value in (0.5, math.nan):
        with torch.no_grad():
            for x in leaves[1:]:
                x[200:] = value
        o, _ = attend_plain(TRITON, one, *leaves, random_choice(one)[:200])
        results.append((o, *torch.autograd.grad(o, leaves, grad_o[:200].to(DEVICE))))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))
    for grad in results[1][2:]:
        assert not grad[200:].any()


def test_which_shapes_take_it() -> None:
    def takes(ratio: int, dk: int, dv: int, block: int, dtype: torch.dtype) -> tuple[bool, bool]:
        q = torch.empty(1, 2 * ratio, dk, dtype=dtype, device=DEVICE)
        v = q.new_empty(1, 2, dv)
        walk = shapes.walk_tiles(q, v, 16, block)[1]
        of_queries = shapes.selected_walk_gluon(q, v, block, walk)
        assert not shapes.selected_walk_gluon(q, v, block, walk._replace(apart=True))
        return of_queries, shapes.selected_dkv_gluon(q, v, block)

    assert takes(16, 128, 64, 64, torch.bfloat16) == (True, True)
    assert takes(16, 192, 128, 64, torch.bfloat16) == (True, True)
    assert takes(4, 192, 64, 64, torch.float16) == (True, False)
    assert takes(4, 128, 128, 64, torch.float16) == (True, False)
    others = [(2, 128, 128, 64), (12, 64, 64, 64), (16, 192, 192, 64), (16, 128, 128, 32)]
    assert {takes(*other, torch.float16) for other in others} == {(False, False)}
    assert takes(16, 128, 128, 64, torch.float32) == (False, False)
