"""The oracle's attention against numbers worked out by hand.

Most cases give every query logits of 0, so that a branch's output is the mean of the values it
sees: with value t at token t that mean names the tokens, and exp(lse) counts them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nsa_kernels.reference import (
    ReferenceOptions,
    block_scores,
    compress_blocks,
    nsa_reference,
    num_compressed,
    select_blocks,
    selected_mask,
)
from tests.ops.hand import close, double, small

KINDS = ("mlp", "linear", "conv1d", "attention_pool", "mean", "custom")


def uniform(branch: str, length: int, *, dtype=torch.float64, cu_seqlens=None, selected=None, **kw):
    """Output and visible count of one branch at every token: logits 0, value t at token t."""
    zeros = torch.zeros(length, 1, 1, dtype=dtype)
    values = torch.arange(length, dtype=dtype)[:, None, None]
    result = nsa_reference(
        zeros,
        zeros,
        values,
        torch.ones(length, 1, 1, dtype=dtype),
        small(branches=(branch,), **kw),
        cu_seqlens=cu_seqlens,
        selected=selected,
    )
    assert torch.equal(result.output, result.outputs[branch])
    return result.output[:, 0, 0], result.lse[branch][:, 0].exp()


def random_case(
    kind: str = "mean", length: int = 13, *, width: int = 2, hidden: int = 3, **changes
):
    """Random float64 inputs of nsa_reference with H=4, G=2: (tensors by name, options)."""
    o = small(num_heads=4, num_kv_heads=2, head_dim=width, compress=kind, **changes)
    block = o.compress_block
    shapes = {
        "mlp": {"up": (hidden, block * width), "down": (width, hidden)},
        "linear": {"weight": (width, block * width)},
        "conv1d": {"weight": (width, block)},
        "attention_pool": {"query": (width,)},
    }.get(kind, {})
    if shapes:
        shapes["position"] = (block, width)
    tensors = {"q": torch.randn(length, 4, width), "gates": torch.rand(length, 4, 3)}
    tensors |= {f"k.{b}": torch.randn(length, 2, width) for b in o.key_branches}
    tensors |= {f"v.{b}": torch.randn(length, 2, width) for b in o.value_branches}
    tensors |= {f"{kv}_params.{n}": torch.randn(s) for kv in "kv" for n, s in shapes.items()}
    return {name: x.double() for name, x in tensors.items()}, o


def run_case(tensors: dict[str, Tensor], o: ReferenceOptions, **kw):
    parts = {
        group: {n.split(".")[1]: x for n, x in tensors.items() if n.startswith(group + ".")}
        for group in ("k", "v", "k_params", "v_params")
    }
    if o.compress == "custom":
        kw |= {"k_module": lambda x: x.amax(2), "v_module": lambda x: x[:, :, 0]}
    return nsa_reference(
        tensors["q"],
        parts["k"],
        parts["v"],
        tensors["gates"][..., : len(o.branches)],
        o,
        k_params=parts["k_params"],
        v_params=parts["v_params"],
        **kw,
    )


@pytest.mark.parametrize(
    "length, block, stride, count",
    [
        (0, 4, 2, 0),
        (1, 4, 2, 0),
        (3, 4, 2, 0),
        (4, 4, 2, 1),
        (5, 4, 2, 1),
        (6, 4, 2, 2),
        (7, 4, 2, 2),
        (8, 4, 4, 2),
        (1, 4, 1, 0),
        (64, 32, 16, 3),
        (79, 32, 16, 3),
        (80, 32, 16, 4),
    ],
)
def test_number_of_compression_blocks(length, block, stride, count):
    assert num_compressed(length, block, stride) == count
    x = torch.zeros(length, 1, 1)
    assert compress_blocks(x, block, stride, "mean", {}).shape == (count, 1, 1)


def test_compression_block_becomes_visible_with_its_last_token():
    # Blocks 0..3, 2..5, 4..7 have means 1.5, 3.5, 5.5 and are seen from tokens 3, 5, 7 on.
    # Token 8 is a tail that no block covers.
    o, count = uniform("compressed", 9)
    close(o, [0, 0, 0, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5])
    close(count, [0, 0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(
    "window, expected",
    [
        (1, [0, 1, 2, 3, 4, 5]),
        (3, [0, 0.5, 1, 2, 3, 4]),
        (6, [0, 0.5, 1, 1.5, 2, 2.5]),
        (99, [0, 0.5, 1, 1.5, 2, 2.5]),
    ],
)
def test_window_sees_the_last_w_tokens(window, expected):
    o, count = uniform("window", 6, window=window)
    close(o, expected)
    close(count, [min(t + 1, window) for t in range(6)])


def test_selected_branch_sees_the_causal_tokens_of_its_blocks():
    # Blocks of 2. Token 2 chose block 1, whose token 3 is still ahead; token 4 chose 0 and 2;
    # token 5 chose only block 0; a token that chose nothing sees nothing.
    chosen = torch.tensor([[0, -1], [-1, -1], [1, -1], [0, 1], [0, 2], [0, -1]], dtype=torch.int32)
    o, count = uniform("selected", 6, selected=chosen[:, None], select_block=2, compress_block=2)
    close(count, [1, 0, 1, 4, 3, 2])
    close(o, [0, 0, 2, 1.5, 5 / 3, 0.5])
    rows = [[int(x) for x in row] for row in selected_mask(chosen[:, None], 2)[3:5, 0]]
    assert rows == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]


def scores_of(probs: list[list[float]], length: int, **changes) -> list[float]:
    """Scores of the last query, from one row of compressed probabilities for each head."""
    heads = double(probs)[None, None].expand(length, -1, -1, -1)
    return block_scores(heads, small(**changes))[-1, 0].tolist()


@pytest.mark.parametrize(
    "block, stride, select, first, weights",
    [
        # Selection block 1 begins at stride select/stride; compression blocks before it reach in.
        (32, 16, 64, 3, [1, 2, 2, 2, 1]),
        (16, 16, 64, 4, [1, 1, 1, 1]),
        (32, 16, 32, 1, [1, 2, 1]),
        (32, 8, 64, 5, [1, 2, 3, 4, 4, 4, 4, 4, 3, 2, 1]),
    ],
)
def test_overlap_weights_of_an_inner_block(block, stride, select, first, weights):
    length = 4 * select
    sizes = {"compress_block": block, "compress_stride": stride, "select_block": select}
    found = []
    for i in range(num_compressed(length, block, stride)):
        one = [0.0] * num_compressed(length, block, stride)
        one[i] = 1.0
        found.append(scores_of([one], length, **sizes)[1])
    before, after = found[:first], found[first + len(weights) :]
    # With -m-k the weights would end at `first`, with +m+k they would begin one overlap later.
    assert found[first : first + len(weights)] == weights
    assert not any(before)
    assert not any(after)


def test_scores_add_m_and_subtract_k():
    # Blocks of 4 every 2, selection blocks of 4: block j shares strides 1, 2, 1 with compression
    # blocks 2j-1, 2j, 2j+1. All the weight on block 4 (tokens 8..11) is selection block 2 alone.
    # -m-k would split it over 2 and 3, +m+k over 1 and 2.
    assert scores_of([[0, 0, 0, 0, 1, 0, 0]], 16) == [0, 0, 2, 0]
    # Compression block 5 (tokens 10..13) lies half in block 2 and half in block 3.
    assert scores_of([[0, 0, 0, 0, 0, 1, 0]], 16) == [0, 0, 1, 1]
    # 2*0.5 + 0.25;  0.25 + 2*0.125 + 0.0625;  0.0625 + 0 + 0.03125;  0.03125 + 2*0.03125.
    mixed = [[0.5, 0.25, 0.125, 0.0625, 0, 0.03125, 0.03125]]
    assert scores_of(mixed, 16) == [1.25, 0.5625, 0.09375, 0.09375]
    # The last selection block is a tail of 2 tokens that no compression block begins in.
    assert scores_of([[0.5, 0.25, 0.25]], 9) == [1.25, 0.75, 0]


def test_a_group_sums_its_heads_and_groups_stay_apart():
    # Blocks of 2 that do not overlap: the scores are the sums of the probabilities.
    sizes = {"compress_block": 2, "compress_stride": 2, "select_block": 2, "num_selected": 2}
    probs = double([[[0.5, 0.25, 0], [0, 0.25, 0.75]], [[0, 1, 0], [0.5, 0.5, 0]]])
    probs = probs[None].expand(7, -1, -1, -1)  # [S, G, R, C]
    scores = block_scores(probs, small(**sizes))
    assert scores[-1].tolist() == [[0.5, 0.5, 0.75, 0], [0.5, 1.5, 0, 0]]
    chosen = select_blocks(scores, small(**sizes, num_init_blocks=0))
    assert chosen[-1].tolist() == [[2, 3], [1, 3]]


SCORES = [0, 0.1, 0.5, 0.3, 0.2, 0.4, 0.05, 0]


@pytest.mark.parametrize(
    "query, expected, changes",
    [
        pytest.param(0, [0, -1, -1, -1], {}, id="first token: one block"),
        pytest.param(3, [0, 1, -1, -1], {}, id="fewer eligible than n"),
        pytest.param(5, [0, 1, 2, -1], {}, id="forced blocks overlap the first"),
        pytest.param(7, [0, 1, 2, 3], {}, id="as many as n"),
        pytest.param(8, [0, 2, 3, 4], {}, id="first token of a block"),
        pytest.param(15, [0, 2, 6, 7], {}, id="one free place"),
        pytest.param(15, [0, 2, 5, 6, 7], {"num_selected": 5}, id="two free places"),
        pytest.param(15, [0, 2, 5, 7], {"num_local_blocks": 1}, id="own block alone forced"),
        pytest.param(15, [0, 1, 6, 7], {"num_init_blocks": 2}, id="nothing free"),
        pytest.param(15, [2, 5, 6, 7], {"num_init_blocks": 0}, id="no first block forced"),
        pytest.param(1, [0, -1, -1, -1], {"num_init_blocks": 2}, id="fewer than forced first"),
        pytest.param(15, [*range(8), -1], {"num_selected": 9}, id="n above the blocks there are"),
        pytest.param(15, [0, 6, 7], {"num_selected": 3}, id="forced blocks alone"),
    ],
)
def test_chosen_blocks(query, expected, changes):
    o = small(**{"select_block": 2, "num_selected": 4, "num_local_blocks": 2, **changes})
    chosen = select_blocks(double(SCORES).expand(16, 1, -1), o)
    assert chosen.dtype == torch.int32
    assert chosen[query, 0].tolist() == expected


def test_equal_scores_go_to_the_lower_index():
    o = small(select_block=1, num_selected=4)
    tied = double([0, 0.25, 0.5, 0.25, 0.5, 0.5, 0.25, 0]).expand(8, 1, -1)
    assert select_blocks(tied, o)[-1, 0].tolist() == [0, 2, 4, 7]
    # Scores are compared as float32, where 0.25 + 1e-12 is 0.25.
    near = double([0, 0.25, 0, 0.25 + 1e-12, 0.25 + 2e-12, 0, 0, 0]).expand(8, 1, -1)
    assert select_blocks(near, o)[-1, 0].tolist() == [0, 1, 3, 7]
    # No compressed key is visible yet: all scores are 0.
    assert select_blocks(torch.zeros(8, 1, 8), o)[-1, 0].tolist() == [0, 1, 2, 7]


def test_documents_of_any_length_start_anew():
    # Documents of 0, 1, 3, 0 and 5 tokens. Only the last is as long as a compression block:
    # its block is tokens 4..7, mean 5.5, seen from 7 on.
    cu_seqlens = torch.tensor([0, 0, 1, 4, 4, 9], dtype=torch.int32)
    o, count = uniform("compressed", 9, cu_seqlens=cu_seqlens)
    close(o, [0, 0, 0, 0, 0, 0, 0, 5.5, 5.5])
    close(count, [0, 0, 0, 0, 0, 0, 0, 1, 1])
    o, count = uniform("window", 9, cu_seqlens=cu_seqlens)
    close(o, [0, 1, 1.5, 2, 4, 4.5, 5, 6, 7])
    close(count, [1, 1, 2, 3, 1, 2, 3, 3, 3])
    # Of the last document's blocks 4..7 and 8, token 8 chooses its own alone when n = 1.
    places = {"num_init_blocks": 0, "num_selected": 1}
    o, count = uniform("selected", 9, cu_seqlens=cu_seqlens, **places)
    close(o, [0, 1, 1.5, 2, 4, 4.5, 5, 5.5, 8])
    close(count, [1, 1, 2, 3, 1, 2, 3, 4, 1])


@pytest.mark.parametrize("lengths", [(1,), (3,), (4,), (0,), (5, 0, 1, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_query_without_keys_gives_zero_and_no_nan(kind, lengths):
    tensors, o = random_case(kind, sum(lengths))
    for x in tensors.values():
        x.requires_grad_()
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    result = run_case(tensors, o, cu_seqlens=cu_seqlens)
    with torch.autograd.detect_anomaly():  # raises at a NaN that a later step would mask away
        result.output.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors.values())
    blind = torch.cat([torch.arange(length) < 3 for length in lengths])
    assert (result.lse["compressed"].isinf().all(dim=1) == blind).all()
    assert not result.outputs["compressed"][blind].any()
    assert result.outputs["compressed"][~blind].all()
    assert not result.output.isnan().any()


def test_gradient_of_a_query_without_keys_is_zero():
    tensors, o = random_case(length=5, branches=("compressed",))
    q = tensors["q"].requires_grad_()
    run_case(tensors, o).output.sum().backward()
    # A query that sees a single key has a constant softmax, so five tokens are not enough.
    assert not q.grad.any()
    tensors, o = random_case(length=7, branches=("compressed",))
    q = tensors["q"].requires_grad_()
    run_case(tensors, o).output.sum().backward()
    assert not q.grad[:5].any()
    assert q.grad[5:].abs().max() > 1e-3


def test_packed_documents_do_not_see_one_another():
    tensors, o = random_case("mlp", 17)
    alone = {n: x if "params" in n else x[5:] for n, x in tensors.items()}
    expected = run_case(alone, o).output
    for x in (x for n, x in tensors.items() if "params" not in n):
        x[:5] = math.nan
    assert torch.equal(run_case(tensors, o, cu_seqlens=[0, 5, 17]).output[5:], expected)


@pytest.mark.parametrize("token", [0, 3, 4, 7, 8, 12])
def test_no_token_changes_what_came_before_it(token):
    tensors, o = random_case("mlp")
    before = run_case(tensors, o).output
    for x in (x for n, x in tensors.items() if "params" not in n):
        x[token] = torch.randn_like(x[token]) * 100
    after = run_case(tensors, o).output
    assert torch.equal(before[:token], after[:token])
    assert not torch.equal(before[token], after[token])


@pytest.mark.parametrize("scale, logit", [(None, 3.0), (0.1, 0.6)])
def test_scale_of_the_logits(scale, logit):
    # Width 4: 1/sqrt(4) * 2*3.
    q, k = double([[[2, 0, 0, 0]]]), double([[[3, 0, 0, 0]]])
    o = small(head_dim=4, branches=("window",), scale=scale)
    close(nsa_reference(q, k, k, torch.ones(1, 1, 1), o).lse["window"], [[logit]])


def test_gates_weigh_each_branch_head_and_token():
    # At token 3 of 4: compressed mean 1.5, selected mean 1.5, window (3) mean 2. Token 2 sees no
    # compressed key; its other means are 1 and 1.
    values = torch.arange(4.0, dtype=torch.float64)[:, None, None]
    zeros = torch.zeros(4, 2, 1, dtype=torch.float64)
    gates = torch.zeros(4, 2, 3, dtype=torch.float64)
    gates[3, 0], gates[3, 1] = double([1, 10, 100]), double([0, 0, 1])
    gates[2, 1] = double([1000, 1, 0.5])
    result = nsa_reference(zeros, zeros[:, :1], values, gates, small(num_heads=2))
    close(result.output[..., 0], [[0, 0], [0, 0], [0, 1.5], [1.5 + 15 + 200, 2]])


def test_shared_keys_and_values_equal_the_same_ones_for_each_branch():
    tensors, o = random_case("mlp")
    k, v = tensors["k.window"], tensors["v.window"]
    params = {
        f"{kv}_params": {n.split(".")[1]: x for n, x in tensors.items() if n.startswith(f"{kv}_p")}
        for kv in "kv"
    }
    shared = nsa_reference(tensors["q"], k, v, tensors["gates"], o, **params)
    tensors |= {n: k for n in tensors if n.startswith("k.")}
    tensors |= {n: v for n in tensors if n.startswith("v.")}
    assert torch.equal(shared.output, run_case(tensors, o).output)


@pytest.mark.parametrize("left", ["compressed", "selected", "window"])
def test_each_branch_reads_its_own_keys_and_values(left):
    tensors, o = random_case()
    before = run_case(tensors, o)
    chosen = before.selected
    tensors[f"k.{left}"] = tensors[f"k.{left}"] + 1 + torch.rand(13, 2, 2)
    tensors[f"v.{left}"] = tensors[f"v.{left}"] + 1
    after = run_case(tensors, o, selected=chosen)
    for branch in ("compressed", "selected", "window"):
        same = torch.equal(before.outputs[branch], after.outputs[branch])
        assert same == (branch != left)
        assert torch.equal(before.lse[branch], after.lse[branch]) == (branch != left)


@pytest.mark.parametrize(
    "branches",
    [("compressed",), ("selected",), ("window",), ("selected", "window"), ("window", "compressed")],
    ids="+".join,
)
def test_branches_left_out(branches):
    tensors, o = random_case("mlp")
    whole = run_case(tensors, o)
    part = ReferenceOptions(**{**vars(o), "branches": branches})
    kept = [b for b in ("compressed", "selected", "window") if b in branches]
    gates = {b: tensors["gates"][..., i] for i, b in enumerate(kept)}
    result = run_case(tensors, part)
    assert list(result.outputs) == kept
    expected = sum(gates[b][..., None] * whole.outputs[b] for b in kept)
    close(result.output, expected.tolist())
    # Scores need compressed keys whether or not that branch is used.
    assert part.key_branches == tuple(
        b for b in whole.outputs if b in branches or (b == "compressed" and "selected" in branches)
    )
    assert (result.selected is None) == ("selected" not in branches)
    if "selected" in branches:
        assert torch.equal(result.selected, whole.selected)


def test_selection_carries_no_gradient():
    tensors, o = random_case("mlp", branches=("selected",))
    for x in tensors.values():
        x.requires_grad_()
    result = run_case(tensors, o)
    result.output.sum().backward()
    assert not result.scores[0].requires_grad
    assert tensors["k.compressed"].grad is None
    assert tensors["k.selected"].grad.any()


def by_loops(tensors: dict[str, Tensor], o: ReferenceOptions) -> Tensor:
    """The definition read aloud, one query at a time, for `mean` compression."""
    length, heads, width = tensors["q"].shape
    groups = tensors["k.window"].shape[1]
    l, d, big = o.compress_block, o.compress_stride, o.select_block
    out = torch.zeros(length, heads, width, dtype=torch.float64)

    def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, list]:
        if not keys:
            return torch.zeros(width, dtype=torch.float64), []
        exps = [math.exp(float(query @ key) / math.sqrt(width)) for key in keys]
        probs = [e / sum(exps) for e in exps]
        return sum(p * value for p, value in zip(probs, values, strict=True)), probs

    def block_means(x: Tensor) -> list[Tensor]:
        return [x[i : i + l].mean(dim=0) for i in range(0, length - l + 1, d)]

    for g in range(groups):
        k, v = ({b: tensors[f"{kv}.{b}"][:, g] for b in o.branches} for kv in "kv")
        for t in range(length):
            seen = [i for i in range(length) if i * d + l - 1 <= t]
            k_cmp, v_cmp = block_means(k["compressed"]), block_means(v["compressed"])
            group = range(g * heads // groups, (g + 1) * heads // groups)
            score = dict.fromkeys(range(t // big + 1), 0.0)
            for h in group:
                q, gates = tensors["q"][t, h], tensors["gates"][t, h]
                o_cmp, p = attend(q, [k_cmp[i] for i in seen], [v_cmp[i] for i in seen])
                out[t, h] += gates[0] * o_cmp
                for j in score:
                    for m in range(big // d):
                        for n in range(l // d):
                            if 0 <= big // d * j + m - n < len(p):
                                score[j] += p[big // d * j + m - n]
            own = t // big
            chosen = {*range(min(o.num_init_blocks, own + 1))}
            chosen |= {own - i for i in range(min(o.num_local_blocks, own + 1))}
            free = sorted(score.keys() - chosen, key=lambda j: (-score[j], j))
            chosen |= {*free[: o.num_selected - len(chosen)]}
            picked = [s for s in range(t + 1) if s // big in chosen]
            near = range(max(0, t - o.window + 1), t + 1)
            for h in group:
                q, gates = tensors["q"][t, h], tensors["gates"][t, h]
                for b, (name, tokens) in enumerate((("selected", picked), ("window", near)), 1):
                    keys = [k[name][s] for s in tokens]
                    out[t, h] += gates[b] * attend(q, keys, [v[name][s] for s in tokens])[0]
    return out


def test_random_case_equals_the_definition_read_query_by_query():
    tensors, o = random_case(length=23, num_selected=3)
    result = run_case(tensors, o)
    # The last query leaves blocks unchosen, so that the choice matters.
    assert (result.selected[-1] >= 0).sum(-1).tolist() == [3, 3]
    assert result.scores[0].shape == (23, 2, 6)
    close(result.output, by_loops(tensors, o).tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_softmax_is_float32_or_float64(dtype):
    o, _ = uniform("window", 257, dtype=dtype, window=512)
    zeros = torch.zeros(257, 1, 1, dtype=dtype)
    options = small(branches=("window",), window=512)
    lse = nsa_reference(zeros, zeros, zeros, zeros, options).lse["window"]
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(lse[-1]) == pytest.approx(math.log(257), rel=1e-6)  # bfloat16 would give 5.5625


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("mlp", "attention_pool") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_gradients_by_finite_differences(kind):
    tensors, o = random_case(kind, 7, num_selected=1, num_init_blocks=0)
    cu_seqlens = [0, 1, 1, 7]
    chosen = run_case(tensors, o, cu_seqlens=cu_seqlens).selected
    names = list(tensors)
    inputs = [x.requires_grad_() for x in tensors.values()]

    def output(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return run_case(given, o, cu_seqlens=cu_seqlens, selected=chosen).output

    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("cu_seqlens", [[0, 3], [1, 5], [0, 4, 2, 5]], ids=str)
def test_cu_seqlens_that_do_not_cover_the_stream(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens"):
        uniform("window", 5, cu_seqlens=cu_seqlens)


def test_options_from_a_config_of_the_same_names():
    config = SimpleNamespace(**vars(small(window=7)), gate_init=(0.0, 0.0, 0.0))
    assert ReferenceOptions.from_config(config) == small(window=7)
