"""The choice of blocks: by float64 scores where scores round, else as the oracle chooses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_kernels import QuerySegments, pytorch
from nsa_kernels.reference import (
    block_scores,
    compressed_mask,
    masked_softmax,
    num_compressed,
    select_blocks,
)
from nsa_kernels.triton.selection import operator
from nsa_kernels.triton.shared.shapes import ScoreTile
from tests.ops.op_cases import CASES, Case, Layout, case_id, fill, random
from tests.traps.mutation import Rewritten, catches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]


def choose(
    case: Case, segments: QuerySegments, q: Tensor, k: Tensor, init: int = 1, local: int = 2
) -> Tensor:
    """int32 [N, G, n], with a log-sum-exp from elsewhere."""
    blocks = {"block": case.block, "stride": case.stride, "scale": case.scale}
    _, lse = pytorch.compressed_attention(q, k, k, segments, **blocks)
    selected = operator.select_blocks(
        q.to(DEVICE),
        k.to(DEVICE),
        lse.to(DEVICE),
        segments.to(DEVICE),
        select_block=case.select_block,
        num_selected=case.num_selected,
        num_init_blocks=init,
        num_local_blocks=local,
        **blocks,
    )
    return selected.cpu()


def one(length: int) -> QuerySegments:
    return QuerySegments.from_rows([(0, length, 0, 0, 0, 0)])


def scores(case: Case, document: int, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, G, B] by the dense code in `dtype`, of the whole stream's q and compressed k."""
    tokens = slice(case.bounds[document], case.bounds[document + 1])
    keys = slice(case.compressed_bounds[document], case.compressed_bounds[document + 1])
    mask = compressed_mask(case.documents[document], case.block, case.stride, q.device)
    probs, _ = masked_softmax(q[tokens].to(dtype), k[keys].to(dtype), mask, case.scale)
    return block_scores(probs, case.options)


def make_inputs(case: Case, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """q of the stream, compressed k of its documents."""
    count = case.compressed_bounds[-1]
    q = random(sum(case.documents), case.heads, case.key_width, dtype=dtype, gain=gain)
    return q, random(count, case.groups, case.key_width, dtype=dtype)


def assert_well_formed(
    case: Case, selected: Tensor, positions: Tensor, init: int, local: int
) -> None:
    """Ascending, eligible, no more and no fewer than there are, -1 at the end, the forced there."""
    eligible = positions // case.select_block + 1
    for row, count in zip(selected, eligible.tolist(), strict=True):
        for choice in row.tolist():
            chosen = choice[: min(case.num_selected, count)]
            assert chosen == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] < count
            assert choice[len(chosen) :] == [-1] * (case.num_selected - len(chosen))
            forced = {*range(min(init, count)), *range(max(0, count - local), count)}
            assert forced <= set(chosen)


def assert_highest(
    case: Case, selected: Tensor, q: Tensor, k: Tensor, init: int = 1, local: int = 2
) -> None:
    """Among blocks not forced, in float64: no unchosen one above a chosen one by more than tau,
    4 x the largest error of the plain code's scores in this dtype."""
    assert selected.dtype == torch.int32
    assert selected.shape == (case.run_bounds[-1], case.groups, case.num_selected)
    start = 0
    for document, position, length in case.local_runs:
        own = selected[start : start + length].long()
        start += length
        if not length:
            continue
        t = torch.arange(position, position + length)
        assert_well_formed(case, own, t, init, local)
        exact = scores(case, document, q, k, torch.float64)
        tau = 4 * (scores(case, document, q, k, q.dtype).double() - exact).abs().max()
        exact = exact[position : position + length]
        num_blocks = exact.shape[-1]
        last = (t // case.select_block)[:, None, None]
        block = torch.arange(num_blocks)
        free = (block >= init) & (block <= last - local)
        chosen = torch.zeros(length, case.groups, num_blocks + 1, dtype=torch.bool)
        chosen.scatter_(-1, own.where(own >= 0, num_blocks), True)
        chosen = chosen[..., :-1]
        worst_chosen = exact.masked_fill(~(chosen & free), math.inf).amin(dim=-1)
        best_left = exact.masked_fill(chosen | ~free, -math.inf).amax(dim=-1)
        assert (best_left - worst_chosen <= tau).all()


@catches(
    "inverted compression mask",
    "scores are those of blocks that end later",
    Rewritten(
        "nsa_kernels.triton:_score_tiles", "$J * STRIDE + OFFSET <= $T", "$J * STRIDE + OFFSET > $T"
    ),
    case="one_document-float32",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_chosen_scores_are_the_highest(case: Case, dtype: torch.dtype) -> None:
    layout = Layout(case)
    q, k = make_inputs(case, dtype)
    selected = choose(case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index))
    assert_highest(case, selected, q, k)


def small(name: str, **options: int) -> Case:
    blocks = {"block": 4, "stride": 2, "select_block": 4, "heads": 2, "groups": 1}
    return Case(name, (70, 33), ((0, 11, 59), (1, 0, 33)), **{**blocks, **options})


OPTIONS = [
    *[small(f"heads_{r}", heads=2 * r, groups=2) for r in (1, 3, 8)],
    *[small(f"heads_{r}", heads=r) for r in (12, 16, 32)],
    *[small(f"width_{d}", key_width=d) for d in (64, 80, 96, 128, 192, 256)],
    *[small(f"chosen_{n}", num_selected=n) for n in (3, 5, 16, 64)],
    small("no_overlap", block=8, stride=8, select_block=8),
    small("no_overlap_of_4", block=4, stride=4, select_block=16),
    small("overlap_4", block=8, stride=2, select_block=8),
    small("overlap_8_of_8", block=16, stride=2, select_block=16),
    small("overlap_2_of_16", block=4, stride=2, select_block=32),
    small("overlap_32_of_64", block=64, stride=2, select_block=128),
]


@catches(
    "index order changing bits",
    "indices come in descending order",
    Rewritten(
        "nsa_kernels.triton:top_keys",
        "tl.where($N == $I, $FIRST[:, None], $COLUMN)",
        "tl.where($N == $COUNT[:, None] - 1 - $I, $FIRST[:, None], $COLUMN)",
        given=("return $COLUMN, $COUNT",),
    ),
    case="chosen_5",
)
@pytest.mark.parametrize("case", OPTIONS, ids=case_id)
def test_options(case: Case) -> None:
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    selected = choose(case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index))
    assert_highest(case, selected, q, k)


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_tile_shapes(columns: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of tokens a tile, whichever this device would take."""
    shape = ScoreTile(columns=columns, keys=64, warps=4, stages=2)
    monkeypatch.setattr(operator, "score_tile", lambda *_: shape)
    case = small("shape", heads=heads)
    layout = Layout(case)
    q, k = make_inputs(case, torch.float16)
    selected = choose(case, layout.segments, q[case.local_rows], fill(k, layout.compressed_index))
    assert_highest(case, selected, q, k)


@pytest.mark.parametrize(("init", "local"), [(0, 1), (0, 4), (3, 1), (2, 2)])
def test_forced_blocks(init: int, local: int) -> None:
    case = small("forced")
    q, k = make_inputs(case, torch.float32)
    keys = fill(k, Layout(case).compressed_index)
    selected = choose(case, Layout(case).segments, q[case.local_rows], keys, init, local)
    assert_highest(case, selected, q, k, init, local)


def exact_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each head reads a channel of its own, in which some keys outshine all before them: the last
    of these has probability 1 to the bit, all others 0, and most blocks tie."""
    group = case.heads // case.groups
    q = torch.zeros(sum(case.documents), case.groups, group, case.key_width, dtype=dtype)
    for r in range(group):
        q[:, :, r, r] = 2048.0
    shape = case.compressed_bounds[-1], case.groups, case.key_width
    shines = torch.rand(shape) < 0.2
    k = torch.where(shines, torch.arange(shape[0])[:, None, None] + 1.0, -1.0).to(dtype)
    assert shape[0] < 256  # exact in bfloat16
    return q.flatten(1, 2), k


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(
    "case",
    [
        replace(CASES[0], num_selected=5),
        replace(CASES[2], num_selected=6),
        Case("three_heads", (99, 64), heads=3, groups=1, block=4, stride=2, select_block=8),
        Case("no_overlap", (99, 64), block=4, stride=4, select_block=8, num_selected=5),
        Case("much_overlap", (99, 64), block=8, stride=1, select_block=8, num_selected=5),
    ],
    ids=case_id,
)
@pytest.mark.parametrize(("init", "local"), [(1, 2), (0, 1), (3, 2)])
def test_equals_the_oracle_where_scores_are_exact(
    case: Case, dtype: torch.dtype, init: int, local: int
) -> None:
    layout = Layout(case)
    q, k = exact_inputs(case, dtype)
    options = replace(case.options, num_init_blocks=init, num_local_blocks=local)
    expected = torch.cat(
        [
            select_blocks(scores(case, number, q, k, torch.float64), options)
            for number in range(len(case.documents))
        ]
    )[case.local_rows]
    keys = fill(k, layout.compressed_index)
    selected = choose(case, layout.segments, q[case.local_rows], keys, init, local)
    assert torch.equal(selected, expected)


@catches(
    "ties",
    "equal scores go to the higher index",
    Rewritten("nsa_kernels.triton:top_keys", "W - $COLUMN[None, :, :]", "$COLUMN[None, :, :] + 1"),
    case="0.0",
)
@pytest.mark.usefixtures("_same_bits_in_any_row")
@pytest.mark.parametrize("gain", [0.0, 0.3])  # 0.3: probabilities that no float holds
def test_trap_ties(gain: float) -> None:
    """All keys equal: every inner block scores the same, and the lowest win."""
    case = Case("one", (144,), block=4, stride=4, select_block=16, num_selected=5)
    q = torch.full((144, case.heads, case.key_width), gain)
    k = torch.full((36, case.groups, case.key_width), gain)
    selected = choose(case, one(144), q, k)
    # Complete blocks tie; the query's own may not be complete, and the first is forced.
    expected = torch.tensor([0, 1, 2, 7, 8], dtype=torch.int32)
    assert torch.equal(selected[143], expected.expand(case.groups, -1))
    assert torch.equal(selected[16 * 6, 0], torch.tensor([0, 1, 2, 5, 6], dtype=torch.int32))


@catches(
    "k larger than the blocks there are",
    "places without an eligible block keep a future one",
    Rewritten(
        "nsa_kernels.triton:_choose_kernel",
        "tl.where($LOCAL < $BLOCKS[:, None], $LOCAL, -1)",
        "$LOCAL",
    ),
)
def test_trap_k_larger_than_the_blocks_there_are() -> None:
    case = Case("one", (70,), num_selected=9)
    q, k = make_inputs(case, torch.float32)
    selected = choose(case, one(70), q, k)
    block = torch.arange(9, dtype=torch.int32)
    eligible = torch.arange(70)[:, None, None] // 16
    assert torch.equal(selected, block.where(block <= eligible, -1).expand(-1, 2, -1))


@catches(
    "Eq. 9's sign",
    "a key counts for the block before the one it begins in",
    Rewritten(
        "nsa_kernels.triton:_score_tiles",
        "tl.store($P + 3, $PASSED, mask=$M & ($B + 1 < $PITCH))",
        "tl.store($P - 1, $PASSED, mask=$M & ($B > 0))",
    ),
)
@pytest.mark.parametrize(("shining", "expected"), [(7, [0, 3, 9]), (8, [0, 4, 9])])
def test_trap_eq_9_sign(shining: int, expected: list[int]) -> None:
    """Block j is touched by compression blocks 2j-1, 2j, 2j+1 (l = l' = 8, d = 4): the one before
    it counts for it too, and the one after it does not."""
    case = Case("one", (80,), heads=1, groups=1, block=8, stride=4, select_block=8, num_selected=3)
    q = torch.zeros(80, 1, case.key_width)
    q[..., 0] = 1000.0
    k = torch.zeros(num_compressed(80, 8, 4), 1, case.key_width)
    k[shining, 0, 0] = 1.0
    selected = choose(case, one(80), q, k, init=1, local=1)
    # 7 is tokens 28..35, in blocks 3 and 4: a tie, and the lower one wins.
    assert selected[79, 0].tolist() == expected


@pytest.mark.parametrize("documents", [(), (0,), (1, 3, 2)], ids=str)
def test_documents_without_compressed_tokens(documents: tuple[int, ...]) -> None:
    case = Case("short", documents)
    q, k = make_inputs(case, torch.float32)
    selected = choose(case, Layout(case).segments, q, k[:0])
    expected = torch.tensor([0, -1, -1, -1], dtype=torch.int32)
    assert torch.equal(selected, expected.expand(sum(documents), case.groups, -1))


@pytest.mark.parametrize("bits", [0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, -0x400000], ids=hex)
def test_future_and_other_documents_change_no_choice(bits: int) -> None:
    """Bits of the largest finite float, infinity, a NaN of a GPU and one of a CPU."""
    case = Case("two", (110, 50))
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    keys = fill(k, layout.compressed_index)
    before = choose(case, layout.segments, q, keys)
    for t in (48, 100):
        disturbed, q_disturbed = keys.clone(), q.clone()
        disturbed.view(torch.int32)[layout.compressed_index * case.stride + case.block - 1 > t] = (
            bits
        )
        q_disturbed[t + 1 :] *= -3
        after = choose(case, layout.segments, q_disturbed, disturbed)
        assert torch.equal(before[: t + 1], after[: t + 1])
        # Whoever sees what is not finite still gets blocks that exist.
        assert_well_formed(case, after[:110].long(), torch.arange(110), 1, 2)


def test_strided_inputs() -> None:
    case = small("strides", heads=8, groups=2)
    layout = Layout(case)
    q, k = make_inputs(case, torch.float32)
    q, k = q[case.local_rows], fill(k, layout.compressed_index)
    expected = choose(case, layout.segments, q, k)
    fused = torch.cat([k.new_full((q.shape[0], 3, 16), math.nan), q], dim=1)[:, 3:]
    turned = k.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not fused.is_contiguous()
    assert turned.stride(-1) != 1
    for a, b in ((fused, k), (q, turned), (fused, k.transpose(0, 1).contiguous().transpose(0, 1))):
        assert torch.equal(choose(case, layout.segments, a, b), expected)


def test_has_no_gradient() -> None:
    case = small("one")
    q, k = (x.requires_grad_() for x in make_inputs(case, torch.float32))
    selected = choose(case, one(70), q[:70], k[: num_compressed(70, 4, 2)])
    assert not selected.requires_grad


def scores_of(
    positions: Tensor, q: Tensor, k: Tensor, case: Case, dtype: torch.dtype, num_blocks: int
) -> Tensor:
    """[m, G, B] of some queries of one document, by the dense code in `dtype`."""
    last = torch.arange(k.shape[0], device=q.device) * case.stride + case.block - 1
    mask = last <= positions[:, None]
    probs, _ = masked_softmax(q.to(dtype), k.to(dtype), mask, case.scale)
    probs = probs.sum(dim=2)
    per_block, overlap = case.select_block // case.stride, case.block // case.stride
    probs = pad(probs, (overlap - 1, per_block * num_blocks - probs.shape[-1]))
    width = per_block * num_blocks
    shifted = (probs[..., b : b + width] for b in range(overlap))
    return torch.stack(tuple(shifted)).sum(dim=0).unflatten(-1, (-1, per_block)).sum(dim=-1)


def assert_some_are_the_highest(
    case: Case, selected: Tensor, rows: Tensor, q: Tensor, k: Tensor
) -> None:
    """As `assert_highest`, of the queries at `rows` of one document, on the device of all."""
    assert_well_formed(case, selected[rows].cpu().long(), rows.cpu(), 1, 2)
    num_blocks = -(-q.shape[0] // case.select_block)
    exact = scores_of(rows, q[rows], k, case, torch.float64, num_blocks)
    plain = scores_of(rows, q[rows], k, case, q.dtype, num_blocks)
    tau = 4 * (plain.double() - exact).abs().max()
    block, own = torch.arange(num_blocks, device=q.device), (rows // case.select_block)
    free = (block >= 1) & (block <= own[:, None, None] - 2)
    chosen = (selected[rows].long().unsqueeze(-1) == block).any(dim=2)
    worst_chosen = exact.masked_fill(~(chosen & free), math.inf).amin(dim=-1)
    best_left = exact.masked_fill(chosen | ~free, -math.inf).amax(dim=-1)
    assert (best_left - worst_chosen <= tau).all()


@pytest.mark.parametrize(
    ("length", "select_block"),
    [
        (140, 4),
        *(pytest.param(s, b, marks=pytest.mark.gpu) for s, b in ((65536, 64), (131072, 16))),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_long_document(length: int, select_block: int, dtype: torch.dtype) -> None:
    """Some queries of a document of which a chunk holds but a part, lines of several parts too."""
    case = Case("long", (length,), heads=16, groups=1, key_width=64, num_selected=16)
    case = replace(case, block=select_block, stride=select_block // 2, select_block=select_block)
    segments = one(length).to(DEVICE)
    count = num_compressed(length, case.block, case.stride)
    q = random(length, 16, 64, dtype=dtype).to(DEVICE)
    k = random(count, 1, 64, dtype=dtype).to(DEVICE)
    rows = torch.randperm(length, device=DEVICE)[:50]
    mask = torch.arange(count, device=DEVICE) * case.stride + case.block - 1 <= rows[:, None]
    lse = torch.full((length, 16), math.nan, device=DEVICE)
    lse[rows] = masked_softmax(q[rows].double(), k.double(), mask, case.scale)[1].float()
    options = {"num_selected": 16, "num_init_blocks": 1, "num_local_blocks": 2}
    blocks = {"block": case.block, "stride": case.stride, "select_block": select_block}
    selected = operator.select_blocks(q, k, lse, segments, **blocks, **options, scale=case.scale)
    assert_some_are_the_highest(case, selected, rows, q, k)
