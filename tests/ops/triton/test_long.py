"""Long documents and many of them on one GPU, each operator on some of its queries and keys.

Queries, keys and values are views of one fused projection, of which 262144 tokens with 64 heads of
128 channels and their KV heads pass 2^31 elements; so do the outputs. No two of these tests run at
a time, in whichever processes, as each may need most of the GPU's memory.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_dist import BRANCHES, BlockCompressor, NSAConfig, native_sparse_attention
from nsa_kernels import QuerySegments, get_backend
from nsa_kernels.reference import compress_blocks, num_compressed
from nsa_kernels.triton.compression.kinds import KINDS
from tests.ops.accuracy import assert_2x
from tests.ops.backends import DEVICE, TRITON
from tests.ops.banded import Branch
from tests.ops.choices import assert_some_are_the_highest
from tests.ops.op_cases import (
    Case,
    assert_attention,
    case_id,
    collect,
    masks,
    random_choice,
    same_bits,
)
from tests.ops.selected import attention_results, make_inputs
from tests.ops.test_combine import dense
from tests.ops.test_compression import make_params
from tests.ops.triton.long_documents import (
    BLOCK,
    NUM_SELECTED,
    SCALE,
    SELECT,
    STRIDE,
    WIDTH,
    WINDOW,
    Attention,
    Keys,
    compressed_keys,
    selected_keys,
    window_keys,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.xdist_group("long")]

BAND = {"block": BLOCK, "stride": STRIDE, "scale": SCALE}
long = pytest.mark.parametrize(
    "length, dtype", [(131072, torch.float16), (262144, torch.bfloat16)], ids=case_id
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with open(Path(tempfile.gettempdir()) / "nsa_dist_long_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def num_heads() -> tuple[int, int]:
    """H and G: 64 and 4 where the whole attention of the longest document fits."""
    roomy = torch.cuda.get_device_properties(0).total_memory >= 120 << 30
    return (64, 4) if roomy else (16, 1)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def fused(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q [S, H, D], k, v [S, G, D] of one tensor, whose rows stand apart."""
    heads, groups = num_heads()
    x = draw(length, heads + 2 * groups, WIDTH, dtype=dtype)
    return tuple(x.split([heads, groups, groups], dim=1))


def leaves_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)


def one(length: int) -> QuerySegments:
    return QuerySegments.from_rows([(0, length, 0, 0, 0, 0)], DEVICE)


def some(length: int, count: int = 24) -> Tensor:
    """Positions at the edges of blocks, windows and the document, and others by chance."""
    edges = [0, 1, BLOCK - 2, BLOCK - 1, SELECT - 1, SELECT, WINDOW - 1, WINDOW, length - 1]
    chance = torch.randint(length, (count,))
    return torch.cat([torch.tensor(edges), chance, chance + length // 2]).remainder(length).unique()


def results(
    operator: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], keys: Keys
) -> Attention:
    leaves = leaves_of(*inputs)
    o, lse = operator(*leaves)
    do = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, do)
    return Attention(inputs, do, o.detach(), lse, grads, keys)


def plain_table(length: int, groups: int) -> tuple[Tensor, Tensor]:
    """block_rows and block_lengths of one document."""
    rows = torch.arange(0, length, SELECT, device=DEVICE)
    return rows.repeat(groups, 1), (length - rows).clamp(max=SELECT)


def random_blocks(length: int, groups: int) -> Tensor:
    """int32 [S, G, n]: the first block, the newest two, and others by chance, ascending."""
    own = torch.arange(length, device=DEVICE)[:, None, None] // SELECT
    chance = (torch.rand(length, groups, NUM_SELECTED - 3, device=DEVICE) * (own + 1)).long()
    chosen = torch.cat([0 * chance[..., :1], chance, own.expand(-1, groups, 1)], dim=-1)
    chosen = torch.cat([chosen, (chosen[..., -1:] - 1).clamp(min=0)], dim=-1).sort().values
    again = chosen[..., 1:] == chosen[..., :-1]
    chosen[..., 1:] = chosen[..., 1:].masked_fill(again, length)
    chosen = chosen.sort().values
    return chosen.masked_fill(chosen == length, -1).int()


@long
def test_compressed_attention(length: int, dtype: torch.dtype) -> None:
    ops, segments = get_backend("triton"), one(length)
    q, k, v = fused(length, dtype)
    count = num_compressed(length, BLOCK, STRIDE)
    found = results(
        lambda q, k, v: ops.compressed_attention(q, k, v, segments, **BAND),
        (q, k[:count], v[:count]),
        compressed_keys(length),
    )
    found.check_queries(some(length).to(DEVICE))
    found.check_all_keys(k.shape[1] - 1)


@long
def test_window_attention(length: int, dtype: torch.dtype) -> None:
    ops, segments = get_backend("triton"), one(length)
    found = results(
        lambda q, k, v: ops.window_attention(q, k, v, segments, window=WINDOW, scale=SCALE),
        fused(length, dtype),
        window_keys,
    )
    found.check_queries(some(length).to(DEVICE))
    for first in (0, length // 2 - 7, length - 32):
        rows = torch.arange(first, first + 32, device=DEVICE)
        t = torch.arange(first, min(first + 32 + WINDOW, length), device=DEVICE)
        for head in (0, found.inputs[1].shape[1] - 1):
            found.check_keys(rows, t, head)


@long
def test_selected_attention(length: int, dtype: torch.dtype) -> None:
    ops, segments = get_backend("triton"), one(length)
    q, k, v = fused(length, dtype)
    groups = k.shape[1]
    selected = random_blocks(length, groups)
    table = plain_table(length, groups)
    found = results(
        lambda q, k, v: ops.selected_attention(
            q, k, v, k[:0], v[:0], selected, *table, segments, select_block=SELECT, scale=SCALE
        ),
        (q, k, v),
        selected_keys(selected),
    )
    found.check_queries(some(length).to(DEVICE))
    # All queries chose the first block; few, the others.
    for block in (0, length // SELECT // 2 + 1, length // SELECT - 1):
        rows = torch.arange(block * SELECT, (block + 1) * SELECT, device=DEVICE)
        chose = (selected[:, groups - 1] == block).any(dim=-1).nonzero().flatten()
        found.check_keys(rows, chose, groups - 1)


@long
def test_block_selection(length: int, dtype: torch.dtype) -> None:
    """The choice of some queries, and memory beyond the result within the workspace's bound."""
    ops, segments = get_backend("triton"), one(length)
    q, k, _ = fused(length, dtype)
    k = k[: num_compressed(length, BLOCK, STRIDE)]
    groups = k.shape[1]
    options = {"select_block": SELECT, "num_selected": NUM_SELECTED}
    forced = {"num_init_blocks": 1, "num_local_blocks": 2}

    def choose() -> Tensor:
        return ops.select_blocks(q, k, lse, segments, **BAND, **options, **forced)

    with torch.no_grad():
        _, lse = ops.compressed_attention(q, k, k, segments, **BAND)
    choose()  # Tables of the segments are made once.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    selected = choose()
    workspace = torch.cuda.max_memory_allocated() - before - 4 * selected.numel()
    assert workspace <= 256 << 20, workspace
    case = Case("long", (length,), heads=q.shape[1], groups=groups, key_width=WIDTH)
    case = replace(case, block=BLOCK, stride=STRIDE, **options)
    assert_some_are_the_highest(case, selected, some(length).to(DEVICE), q, k)


@long
@pytest.mark.parametrize("kind", KINDS)
def test_compression(kind: str, length: int, dtype: torch.dtype) -> None:
    """All compressed tokens and gradients against the oracle in float64."""
    ops = get_backend("triton")
    x = fused(length, dtype)[1][:, :2]
    params = make_params(kind, BLOCK, dtype, width=WIDTH)
    params = {name: p.to(DEVICE) * 0.1 for name, p in params.items()}
    rows = torch.arange(num_compressed(length, BLOCK, STRIDE), device=DEVICE) * STRIDE
    do = draw(len(rows), x.shape[1], WIDTH, dtype=dtype)

    def run(dtype: torch.dtype, oracle: bool) -> list[Tensor]:
        leaf, *weights = leaves_of(*(y.to(dtype) for y in (x, *params.values())))
        named = dict(zip(params, weights, strict=True))
        if oracle:
            out = compress_blocks(leaf, BLOCK, STRIDE, kind, named)
        else:
            out = ops.compress(leaf, rows, BLOCK, kind, named)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *weights], do.to(dtype))]

    ours, plain, exact = run(dtype, False), run(dtype, True), run(torch.float64, True)
    for name, a, b, c in zip(["out", "x", *params], ours, plain, exact, strict=True):
        assert_2x(a, b, c, dtype, f"{kind} {name}", heads=name in ("out", "x"))


@long
def test_combine(length: int, dtype: torch.dtype) -> None:
    ops = get_backend("triton")
    heads, _ = num_heads()
    leaves = leaves_of(
        *(draw(length, heads, WIDTH, dtype=dtype) for _ in BRANCHES),
        draw(length, heads, len(BRANCHES), dtype=dtype).sigmoid(),
    )
    o = ops.combine(leaves[:-1], leaves[-1])
    do = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, do)
    t = some(length).to(DEVICE)
    ours = [x[t] for x in (o, *grads)]
    outputs, gates = [x[t].detach() for x in leaves[:-1]], leaves[-1][t].detach()
    exact, plain = (dense(outputs, gates, do[t], x) for x in (torch.float64, dtype))
    names = ["o", *BRANCHES, "gates"]
    for name, x, y, z in zip(names, ours, plain, exact, strict=True):
        assert_2x(x, y, z, dtype, name, heads=True)


def config_of(heads: int, groups: int) -> NSAConfig:
    return NSAConfig(
        heads,
        groups,
        WIDTH,
        WIDTH,
        compress_block=BLOCK,
        compress_stride=STRIDE,
        select_block=SELECT,
        num_selected=NUM_SELECTED,
        window=WINDOW,
    )


@long
def test_whole_attention(length: int, dtype: torch.dtype) -> None:
    """The bits that the operators give one after another, each with its gate, and their gradients'.

    `tests/ops/test_gates.py` judges the gates, the tests above the rest.
    """
    heads, groups = num_heads()
    config = config_of(heads, groups)
    compressors = [BlockCompressor(config, WIDTH, device=DEVICE, dtype=dtype) for _ in "kv"]
    weights = [p for module in compressors for p in module.parameters()]
    q = draw(length, heads, WIDTH, dtype=dtype)
    gates = draw(length, heads, 3, dtype=torch.float32).sigmoid()
    kv = [draw(length, groups, WIDTH, dtype=dtype) for _ in range(6)]
    do = draw(length, heads, WIDTH, dtype=dtype)

    leaves = leaves_of(q, gates, *kv)
    batch = [x[None] for x in leaves]
    keys, values = (dict(zip(BRANCHES, batch[i : i + 3], strict=True)) for i in (2, 5))
    out = native_sparse_attention(
        batch[0], keys, values, batch[1], *compressors, config=config, backend="triton"
    )
    assert isinstance(out, Tensor)
    whole = torch.autograd.grad(out, [*leaves, *weights], do[None])
    dq, whole = whole[0], whole[1:]
    out = out.detach()[0]
    assert out.isfinite().all()
    del leaves, batch, keys, values

    ops, segments = get_backend("triton"), one(length)
    *queries, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win = leaves_of(q, q, q, gates, *kv)
    rows = torch.arange(num_compressed(length, BLOCK, STRIDE), device=DEVICE) * STRIDE
    short = [
        ops.compress(x, rows, BLOCK, "mlp", dict(module.named_parameters()))
        for x, module in zip((k_cmp, v_cmp), compressors, strict=True)
    ]
    g_cmp, g_slc, g_win = gates.unbind(-1)
    o_cmp, lse, *of_cmp = ops.compressed_attention(queries[0], *short, segments, **BAND, gate=g_cmp)
    selected = ops.select_blocks(
        q, short[0].detach(), lse, segments, **BAND, select_block=SELECT,
        num_selected=NUM_SELECTED, num_init_blocks=1, num_local_blocks=2,
    )  # fmt: skip
    o_slc, _, *of_slc = ops.selected_attention(
        queries[1], k_slc, v_slc, k_slc[:0], v_slc[:0], selected, *plain_table(length, groups),
        segments, select_block=SELECT, scale=SCALE, gate=g_slc,
    )  # fmt: skip
    o_win, _, *of_win = ops.window_attention(
        queries[2], k_win, v_win, segments, window=WINDOW, scale=SCALE, gate=g_win
    )
    o = ops.combine([o_cmp, o_slc, o_win], gates, [of_cmp, of_slc, of_win])
    assert same_bits(out, o)
    others = [gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win, *weights]
    parts = torch.autograd.grad(o, [*queries, *others], do)
    for x, y in zip(whole, parts[3:], strict=True):
        assert torch.equal(x, y)  # Not to the bit: gradients from fetched blocks add 0 to -0.
    # dq is the sum of those of the branches, rounded once, the window's first.
    dq_cmp, dq_slc, dq_win = parts[:3]
    ones = torch.ones(length, heads, 3, dtype=dtype, device=DEVICE)
    assert same_bits(dq, ops.combine([dq_win, dq_cmp, dq_slc], ones))


def many_documents(tokens: int, count: int) -> list[int]:
    """Lengths: some long, many short, a few empty or of one token; they add up to `tokens`."""
    weights = torch.rand(count - 40).log().neg()
    weights[::97] *= 40
    lengths = (weights / weights.sum() * (tokens - 20)).long().clamp(min=2)
    lengths = torch.cat([lengths, torch.tensor([0, 1] * 20)])[torch.randperm(count)]
    lengths[lengths.argmax()] += tokens - lengths.sum()
    return lengths.tolist()


def sampled(lengths: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """Documents of shortest..longest tokens, from the whole stream."""
    found = [i for i, length in enumerate(lengths) if shortest <= length <= longest]
    assert len(found) >= count
    return found[:: len(found) // count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_each_of_many_documents_is_as_alone(dtype: torch.dtype) -> None:
    """Output bits in a packed stream of 2000 documents; gradients stay in their documents."""
    tokens, heads, groups = 131072, 32, 2
    lengths = many_documents(tokens, 2000)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    config = config_of(heads, groups)
    compressors = [BlockCompressor(config, WIDTH, device=DEVICE, dtype=dtype) for _ in "kv"]
    q = draw(1, tokens, heads, WIDTH, dtype=dtype)
    gates = draw(1, tokens, heads, 3, dtype=dtype).sigmoid()
    kv = [draw(1, tokens, groups, WIDTH, dtype=dtype) for _ in range(6)]

    def run(leaves: tuple[Tensor, ...], cu_seqlens: Tensor) -> Tensor:
        keys, values = (dict(zip(BRANCHES, leaves[i : i + 3], strict=True)) for i in (2, 5))
        out = native_sparse_attention(
            leaves[0], keys, values, leaves[1], *compressors, config=config, backend="triton",
            cu_seqlens=cu_seqlens.int(),
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    leaves = leaves_of(q, gates, *kv)
    packed = run(leaves, bounds)
    checked = [
        *sampled(lengths, 1, BLOCK, 12),
        *sampled(lengths, BLOCK, 1024, 12),
        lengths.index(max(lengths)),
    ]
    silent = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    for i in checked:
        first, last = int(bounds[i]), int(bounds[i + 1])
        silent[first:last] = False
        with torch.no_grad():
            alone = run(tuple(x[:, first:last] for x in leaves), torch.tensor([0, last - first]))
        assert same_bits(alone, packed[:, first:last]), lengths[i]
    do = torch.ones_like(packed).masked_fill(silent[:, None, None], 0.0)
    for grad in torch.autograd.grad(packed, leaves, do):
        assert not grad[:, silent].any()
        assert grad[:, ~silent].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("name", ["compressed", "selected", "window"])
def test_some_of_many_documents_against_the_oracle(name: str, dtype: torch.dtype) -> None:
    lengths = many_documents(131072, 2000)
    case = Case("packed", tuple(lengths), key_width=64, value_width=64, num_selected=5)
    key_bounds = case.compressed_bounds if name == "compressed" else case.bounds
    choice = random_choice(case) if name == "selected" else None
    if choice is None:
        branch = Branch(TRITON, name, case)
        inputs, do = branch.inputs(dtype)
        found = [x.cpu() for x in branch.results(branch.buffers(inputs), do)]
        found[3:] = [collect(x, branch.index, inputs[1].shape[0]) for x in found[3:]]
    else:
        inputs, do = make_inputs(case, dtype)
        found = attention_results(TRITON, case, inputs, do, choice)
    ours = dict(zip(("o", "lse", "dq", "dk", "dv"), found, strict=True))
    for i in sampled(lengths, 64, 800, 8):
        alone = replace(case, documents=(lengths[i],))
        tokens = slice(case.bounds[i], case.bounds[i + 1])
        keys = slice(key_bounds[i], key_bounds[i + 1])
        bounds = [0, key_bounds[i + 1] - key_bounds[i]]
        mask = masks(alone, name, None if choice is None else choice[tokens])
        own = {key: x[keys if key in ("dk", "dv") else tokens] for key, x in ours.items()}
        some_inputs = (inputs[0][tokens], inputs[1][keys], inputs[2][keys])
        assert_attention(alone, own, mask, bounds, some_inputs, do[tokens])
