"""The oracle's compressors, rotary embedding and layer against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nsa_kernels.reference import (
    ReferenceOptions,
    RotaryOptions,
    apply_rotary,
    compress_blocks,
    layer_reference,
    nsa_reference,
    rotary_frequencies,
    rotary_tables,
)
from tests.ops.hand import close, double, small

INF = math.inf


ROWS = double([[1, 2], [3, 4]])[:, None]  # [S, G, D]: one block of two tokens
POSITION = double([[0.5, 0], [0, 1]])  # makes rows (1.5, 2), (3, 5)
SILU_A, SILU_B = 1.5 / (1 + math.exp(-1.5)), -2 / (1 + math.exp(2))
COMPRESSED = {
    "mean": ({}, [2, 3]),
    # vec is (1.5, 2, 3, 5): rows of the block first, channels within.
    "linear": ({"weight": [[1, 10, 100, 1000], [0, 0, 0, 1]]}, [5321.5, 5]),
    # 1*1.5 + 10*3 and 100*2 + 1000*5.
    "conv1d": ({"weight": [[1, 10], [100, 1000]]}, [31.5, 5200]),
    # Logits ln 3 and 2 ln 3: shares 1/4, 3/4 of the rows without position.
    "attention_pool": ({"query": [math.log(3) / 1.5, 0]}, [2.5, 3.5]),
    # Hidden values 1.5 and -2 before silu.
    "mlp": (
        {"up": [[1, 0, 0, 0], [0, -1, 0, 0]], "down": [[1, 0], [10, 100]]},
        [SILU_A, 10 * SILU_A + 100 * SILU_B],
    ),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressor_by_hand(kind):
    weights, expected = COMPRESSED[kind]
    params = {n: double(w) for n, w in weights.items()} | {"position": POSITION}
    close(compress_blocks(ROWS, 2, 2, kind, params)[0, 0], expected)


@pytest.mark.parametrize("kind", [k for k in COMPRESSED if k != "mean"])
def test_compressor_per_head(kind):
    weights, expected = COMPRESSED[kind]
    params = {n: double(w) for n, w in weights.items()} | {"position": POSITION}
    # Head 1 gets other weights, so that its output differs from head 0's on the same rows.
    per_head = {n: torch.stack([w, w + 1]) for n, w in params.items()}
    found = compress_blocks(ROWS.expand(-1, 2, -1), 2, 2, kind, per_head)[0]
    close(found[0], expected)
    other = compress_blocks(ROWS, 2, 2, kind, {n: w + 1 for n, w in params.items()})[0, 0]
    close(found[1], other.tolist())
    assert not torch.allclose(found[0], found[1])


def test_custom_compressor_gets_the_blocks_without_position():
    x = torch.arange(6.0, dtype=torch.float64)[:, None, None].repeat(1, 2, 1)
    seen = []

    def module(blocks: Tensor) -> Tensor:
        seen.append(blocks)
        return blocks[:, :, -1] * 10

    found = compress_blocks(x, 4, 2, "custom", {"position": torch.ones(4, 1)}, module)
    assert [s.shape for s in seen] == [(2, 2, 4, 1)]
    assert seen[0][:, 1, :, 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert found[:, 0, 0].tolist() == [30, 50]


def test_rotary_turns_the_two_halves():
    # theta 100, width 4: frequencies 1 and 1/10; at position 3 the pairs (1, 3), (2, 4) turn by 3
    # and 0.3.
    cos, sin = rotary_tables(torch.tensor([0, 3]), 4, RotaryOptions(theta=100.0))
    assert cos.dtype == sin.dtype == torch.float32
    x = double([1, 2, 3, 4])[None, None].repeat(2, 1, 1)
    found = apply_rotary(x, cos, sin)[:, 0]
    close(found[0], [1, 2, 3, 4])
    a, b = (math.cos(3), math.sin(3)), (math.cos(0.3), math.sin(0.3))
    turned = [a[0] - 3 * a[1], 2 * b[0] - 4 * b[1], 3 * a[0] + a[1], 4 * b[0] + 2 * b[1]]
    close(found[1], turned, atol=3e-7)  # the tables are float32


def test_rotary_of_the_first_channels_only():
    cos, sin = rotary_tables(torch.tensor([3]), 4, RotaryOptions(dim=2))
    found = apply_rotary(double([1, 2, 3, 4])[None, None], cos, sin)[0, 0]
    c, s = math.cos(3), math.sin(3)
    close(found, [c - 2 * s, 2 * c + s, 3, 4], atol=3e-7)


@pytest.mark.parametrize(
    "scaling, factor, frequencies, on_tables",
    [
        ("none", 2, [1, 1 / 2, 1 / 4, 1 / 8], 1),
        ("linear", 4, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 1),
        # Turns 8, 4, 2, 1: kept from 4 up, halved at 1, a third kept at 2.
        ("llama3", 2, [1, 1 / 2, 1 / 4 * (1 / 3 + 2 / 3 / 2), 1 / 16], 1),
        # 3 and 1.5 turns fall at pairs 1.4 and 2.4: kept up to 1, halved from 3, half kept at 2.
        ("yarn", 2, [1, 1 / 2, 1 / 4 * (1 / 2 + 1 / 2 / 2), 1 / 16], 1 + 0.1 * math.log(2)),
    ],
)
def test_rotary_scaling(scaling, factor, frequencies, on_tables):
    rotary = RotaryOptions(
        theta=16.0,
        scaling=scaling,
        factor=factor,
        original_max_positions=8 * 2 * math.pi,  # pair i turns 8 / 2^i times over it
        beta_fast=3.0,
        beta_slow=1.5,
    )
    found, scale = rotary_frequencies(8, rotary)
    close(found, frequencies)
    assert scale == pytest.approx(on_tables)
    cos, sin = rotary_tables(torch.tensor([5]), 8, rotary)
    close(cos[0].double(), [on_tables * math.cos(5 * f) for f in frequencies], atol=1e-7)
    close(sin[0].double(), [on_tables * math.sin(5 * f) for f in frequencies], atol=1e-7)


def test_yarn_attention_factor_can_be_given():
    rotary = RotaryOptions(scaling="yarn", factor=4.0, attention_factor=1.5)
    cos, _ = rotary_tables(torch.tensor([0]), 8, rotary)
    assert cos.tolist() == [[1.5] * 4]


def test_rotary_angles_far_out_are_float64():
    # In float32 the angle of the second pair would be wrong by up to 0.004 radians here.
    cos, _ = rotary_tables(torch.tensor([131071]), 8, RotaryOptions())
    close(cos[0].double(), [math.cos(131071 * 10.0**-i) for i in range(4)], atol=3.1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_rounds_once(dtype):
    x = torch.randn(9, 2, 8, dtype=dtype)
    cos, sin = rotary_tables(torch.arange(9), 8, RotaryOptions())
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x.float(), cos, sin).to(dtype))


def test_compressed_keys_rotate_at_the_middle_of_their_block():
    # Width 2 turns by the position itself. Keys are (1, 0), so k~_i = (cos p, sin p) with
    # p = 2i + 1 (not 2i + 2): logits of the query (1, 0) are cos 1, cos 3. The first document has
    # 2 tokens and no block.
    length, cu_seqlens = 8, [0, 2, 8]
    k = double([1, 0])[None, None].repeat(length, 1, 1)
    positions = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5])
    cos, sin = rotary_tables(positions, 2, RotaryOptions())
    o = small(head_dim=2, scale=1.0, window=1, num_selected=1, num_init_blocks=0)
    kw = {"cu_seqlens": cu_seqlens, "cos": cos, "sin": sin}
    gates = torch.ones(length, 1, 3)
    pre = ReferenceOptions(**{**vars(o), "compress_pre_rope": True})
    result = nsa_reference(k, k, k, gates, pre, **kw)
    one, both = math.cos(1), math.log(math.exp(math.cos(1)) + math.exp(math.cos(3)))
    close(result.lse["compressed"][:, 0], [-INF] * 5 + [one, one, both], atol=1e-7)
    # The keys of the other branches come unrotated too, and turn by their own position.
    turned = [math.cos(p) for p in positions.tolist()]
    close(result.lse["window"][:, 0], turned, atol=1e-7)
    sums = [math.log(sum(map(math.exp, turned[2 : 3 + t]))) for t in range(4)]
    close(result.lse["selected"][2:6, 0], sums, atol=1e-7)
    # Values are never rotated, and without compress_pre_rope nothing is.
    close(result.outputs["window"][:, 0], [[1, 0]] * length)
    post = nsa_reference(k, k, k, gates, o, **kw)
    close(post.lse["compressed"][:, 0], [-INF] * 5 + [1, 1, 1 + math.log(2)])


def layer_params(**extra) -> dict[str, Tensor]:
    """H=2, G=2, widths 1, hidden 1: at x = 1 the projections are their weights."""
    params = {
        "q_proj.weight": [[1], [2]],
        "k_proj.weight": [[1], [2], [3], [4], [5], [6]],
        "v_proj.weight": [[1], [2], [3], [4], [5], [6]],
        "o_proj.weight": [[1, 10]],
        "gate.logits": [[0, 0, 0], [0, 0, 0]],
    }
    return {name.replace("__", "."): double(w) for name, w in {**params, **extra}.items()}


def layer(params: dict[str, Tensor], x: Tensor | None = None, *, call=None, **changes):
    o = small(**{"num_heads": 2, "num_kv_heads": 2, "gate": "static", "scale": 1.0, **changes})
    return layer_reference(double([[1]]) if x is None else x, params, o, **(call or {}))


def test_layer_projects_a_set_for_each_branch():
    # One token: compressed sees nothing, the others return their value. Rows of k_proj, v_proj are
    # (set, head): selected 3, 4 and window 5, 6, halved by the gates.
    result = layer(layer_params())
    close(result.lse["selected"], [[1 * 3, 2 * 4]])
    close(result.lse["window"], [[1 * 5, 2 * 6]])
    close(result.output, [[(3 + 5) / 2 + 10 * (4 + 6) / 2]])
    assert result.selected.tolist() == [[[0, -1], [0, -1]]]


def test_layer_shares_one_set():
    shared = layer_params(k_proj__weight=[[3], [4]], v_proj__weight=[[7], [8]])
    result = layer(shared, independent_kv=False)
    close(result.lse["window"], [[3, 8]])
    close(result.output, [[7 + 10 * 8]])


def test_layer_without_compressed_keeps_its_keys_for_the_scores():
    params = layer_params(v_proj__weight=[[3], [4], [5], [6]], gate__logits=[[0, 0], [0, 0]])
    result = layer(params, branches=("selected", "window"))
    close(result.lse["selected"], [[3, 8]])
    close(result.output, [[4 + 50]])


def test_layer_biases():
    biases = {f"{n}_proj__bias": [0.5] * rows for n, rows in zip("qkvo", (2, 6, 6, 1), strict=True)}
    result = layer(layer_params(**biases))
    close(result.lse["window"], [[1.5 * 5.5, 2.5 * 6.5]])
    close(result.output, [[4.5 + 10 * 5.5 + 0.5]])


def test_layer_gates_by_head_and_branch():
    # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4; rows are (head, branch).
    a = math.log(3)
    bias = [9, a, -a, 9, -a, -a]
    linear = {"gate__proj.weight": [[0]] * 6, "gate__proj.bias": bias}
    result = layer(layer_params(**linear), gate="linear")
    close(result.output, [[3 * 3 / 4 + 5 / 4 + 10 * (4 + 6) / 4]])
    # The weights see the layer's input: at x = 2 and weight ln(3)/2 the logit is ln 3.
    linear = {"gate__proj.weight": [[a / 2]] * 6, "gate__proj.bias": [0] * 6}
    close(layer(layer_params(**linear), double([[2]]), gate="linear").gates, [[[0.75] * 3] * 2])
    # Hidden silu(1) and silu(-1), added with weights 1 and -1: silu(1) - silu(-1) = 1.
    mlp = {
        "gate__up.weight": [[1], [0]],
        "gate__up.bias": [0, -1],
        "gate__down.weight": [[a, -a]] * 6,
        "gate__down.bias": [0, 0, 0, 0, 0, -2 * a],
    }
    gates = layer(layer_params(**mlp), gate="mlp").gates
    close(gates, [[[0.75] * 3, [0.75, 0.75, 0.25]]])
    static = layer(layer_params(gate__logits=[[9, a, -a], [9, -a, -a]]))
    close(static.output, [[3 * 3 / 4 + 5 / 4 + 10 * (4 + 6) / 4]])


def test_layer_norms_queries_and_keys_over_the_channels():
    # Width 2. (3, 4) has root mean square 5/sqrt(2): unit rows (3, 4) * sqrt(2)/5. Each set of
    # keys has its own weight.
    params = layer_params(
        q_proj__weight=[[3], [4]] * 2,
        k_proj__weight=[[4], [3]] * 6,
        v_proj__weight=[[1]] * 12,
        q_norm__weight=[1, 10],
        k_norm__weight=[[1, 1], [1, 2], [3, 1]],
        o_proj__weight=[[1] * 4],
    )
    result = layer(params, head_dim=2, call={"norm_eps": 0.0})
    close(result.lse["selected"], [[(12 + 10 * 12 * 2) * 2 / 25] * 2])
    close(result.lse["window"], [[(12 * 3 + 10 * 12) * 2 / 25] * 2])
    eps = layer(params, head_dim=2, call={"norm_eps": 12.5})
    close(eps.lse["window"], [[(12 * 3 + 10 * 12) / 25] * 2])


@pytest.mark.parametrize("positions, apart", [(None, 1), ([0, 5], 5), ([7, 9], 2)])
@pytest.mark.parametrize("pre_rope", [False, True], ids=["post", "pre"])
def test_layer_rotates_at_the_position_in_the_document(positions, apart, pre_rope):
    # Two documents of two tokens. Width 2, queries and keys (1, 0): the logit is the cosine of the
    # distance.
    weights = [[1], [0]]
    params = layer_params(
        q_proj__weight=weights * 2,
        k_proj__weight=weights * 6,
        v_proj__weight=weights * 6,
        o_proj__weight=[[1] * 4],
    )
    call = {"rotary": RotaryOptions(), "cu_seqlens": [0, 2, 4]}
    if positions is not None:
        call["position_ids"] = torch.tensor(positions * 2)
    ones = torch.ones(4, 1, dtype=torch.float64)
    result = layer(params, ones, head_dim=2, call=call, compress_pre_rope=pre_rope)
    pair = math.log(math.e + math.exp(math.cos(apart)))
    close(result.lse["window"][:, 0], [1, pair, 1, pair], atol=3e-7)
    close(result.lse["selected"][:, 1], [1, pair, 1, pair], atol=3e-7)
    # Distances alone are right from any start; the same bits come from the same positions.
    assert torch.equal(result.lse["window"][:2], result.lse["window"][2:])


def test_layer_reads_its_compressors():
    # linear with weight 1 on the first row of a block: k~ = k + e, v~ = 10 (v + e).
    first = [[1, 0, 0, 0]]
    params = layer_params(
        **{
            "k_compressor.weight": first,
            "k_compressor.position": [[0.5]] * 4,
            "v_compressor.weight": [[10, 0, 0, 0]],
            "v_compressor.position": [[0.25]] * 4,
        }
    )
    result = layer(params, torch.ones(4, 1, dtype=torch.float64), compress="linear")
    close(result.lse["compressed"][3], [1 * 1.5, 2 * 2.5])
    close(result.outputs["compressed"][3, :, 0], [12.5, 22.5])


def test_layer_gradients_by_finite_differences():
    shapes = {"q_proj": (4, 3), "k_proj": (12, 3), "v_proj": (12, 3), "o_proj": (3, 4)}
    shapes |= {"q_norm": (2,), "k_norm": (3, 2), "gate.proj": (6, 3)}
    params = {f"{n}.weight": torch.randn(s) for n, s in shapes.items()}
    params |= {"gate.proj.bias": torch.randn(6)}
    params |= {f"{kv}_compressor.weight": torch.randn(2, 4) for kv in "kv"}
    params |= {f"{kv}_compressor.position": torch.randn(4, 2) for kv in "kv"}
    params = {n: p.double().requires_grad_() for n, p in params.items()}
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 2, "compress": "conv1d"}
    o = small(**sizes, compress_pre_rope=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(params, values, strict=True))
        rotary = RotaryOptions()
        return layer_reference(x, given, o, rotary=rotary, selected=chosen).output

    chosen = layer_reference(x, params, o, rotary=RotaryOptions()).selected
    assert torch.autograd.gradcheck(output, (x, *params.values()))
