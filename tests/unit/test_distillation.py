"""Distillation from dense attention, against the definition written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nsa_dist.distillation.distill as distilling
from nsa_dist import (
    BlockCompressor,
    NativeSparseAttention,
    NSAConfig,
    RotaryConfig,
    distill_dense,
    native_sparse_attention,
)
from nsa_dist.distillation.dense import choice_loss
from nsa_kernels.reference import (
    ReferenceOptions,
    compress_blocks,
    compressed_mask,
    masked_softmax,
    nsa_reference,
    select_blocks,
    weighted_values,
)
from tests.ops.accuracy import assert_2x, plain_dtype

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=6,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=4,
    window=12,
    independent_kv=False,
)
DOCUMENTS = (0, 5, 5, 131, 132, 300)
"""Boundaries: one shorter than a block, an empty one, one of a token."""


@dataclass
class Case:
    """Inputs of a call, float64 on the CPU."""

    config: NSAConfig
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    weights: dict[str, dict[str, Tensor]]

    def compressors(self, dtype: torch.dtype) -> dict[str, BlockCompressor]:
        made = {}
        for name, width in (("k", self.config.head_dim), ("v", self.config.value_dim)):
            module = BlockCompressor(self.config, width, dtype=dtype)
            module.load_state_dict(self.weights[name])
            made[name] = module
        return made


def case_of(config: NSAConfig, tokens: int = DOCUMENTS[-1]) -> Case:
    shape = (tokens, config.num_kv_heads)
    weights = {
        name: {
            key: value + 0.1 * torch.randn_like(value)
            for key, value in BlockCompressor(config, width, dtype=torch.float64)
            .state_dict()
            .items()
        }
        for name, width in (("k", config.head_dim), ("v", config.value_dim))
    }
    double = {"dtype": torch.float64}
    return Case(
        config,
        2 * torch.randn(tokens, config.num_heads, config.head_dim, **double),
        2 * torch.randn(*shape, config.head_dim, **double),
        torch.randn(*shape, config.value_dim, **double),
        torch.rand(tokens, config.num_heads, len(config.branches), **double),
        weights,
    )


Found = dict[str, Tensor]


def ours(case: Case, dtype: torch.dtype, cu_seqlens: Sequence[int]) -> tuple[Found, Tensor]:
    """What distill_dense finds, gradients of the loss, and the blocks that were chosen."""
    modules = case.compressors(dtype)
    q, k, v, gates = (
        x.to(dtype, copy=True)[None].requires_grad_() for x in (case.q, case.k, case.v, case.gates)
    )
    with distill_dense() as distilled:
        out, details = native_sparse_attention(
            *(q, k, v, gates),
            *(modules["k"], modules["v"]),
            config=case.config,
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
            backend="pytorch",
            return_details=True,
        )
    (layer,) = distilled.layers
    distilled.loss.backward()
    assert q.grad is k.grad is v.grad is None
    assert not out.requires_grad
    found = {
        "out": out[0],
        "choice": layer.choice,
        "output": layer.output,
        "captured": layer.captured,
        "best": layer.best,
        "gates": gates.grad[0],  # type: ignore[index]
    }
    for name, module in modules.items():
        found |= {f"{name}.{key}": p.grad for key, p in module.named_parameters()}  # type: ignore[misc]
    assert details.selected is not None
    return found, details.selected[0]


def dense_masses(probs: Tensor, block: int) -> Tensor:
    """[S, G, B] of dense probabilities [S, G, R, S], one block after another."""
    whole = torch.arange(0, probs.shape[-1], block)
    return torch.stack([probs[..., at : at + block].sum(-1).mean(2) for at in whole], dim=-1)


def oracle(case: Case, dtype: torch.dtype, cu_seqlens: Sequence[int], blocks: Tensor) -> Found:
    """The same by the definition, with whole matrices and torch's gradients."""
    config = case.config
    reference = ReferenceOptions.from_config(config)
    scale = config.softmax_scale
    strides = config.select_block // config.compress_stride
    overlap = config.compress_block // config.compress_stride
    q, k, v, gates = (x.to(dtype, copy=True) for x in (case.q, case.k, case.v, case.gates))
    gates.requires_grad_()
    params = {
        name: {key: value.to(dtype, copy=True).requires_grad_() for key, value in weights.items()}
        for name, weights in case.weights.items()
    }
    choice, dense, shares, best = q.new_zeros(()), [], [], []
    for start, end in pairwise(cu_seqlens):
        if start == end:
            continue
        here, length = slice(start, end), end - start
        t = torch.arange(length)
        probs, _ = masked_softmax(q[here], k[here], t <= t[:, None], scale)
        dense.append(weighted_values(probs, v[here]))
        mass = dense_masses(probs, config.select_block)
        keys = compress_blocks(
            k[here], config.compress_block, config.compress_stride, config.compress, params["k"]
        )
        mask = compressed_mask(length, config.compress_block, config.compress_stride, q.device)
        p, _ = masked_softmax(q[here], keys, mask, scale)
        best_blocks = select_blocks(mass, reference)
        count = mass.shape[-1]
        touches = q.new_zeros(p.shape[-1], count)  # Strides that a key shares with a block.
        for j in range(count):
            for m in range(strides):
                for i in range(overlap):
                    if 0 <= strides * j + m - i < len(touches):
                        touches[strides * j + m - i, j] += 1
        score, j = p.sum(2) @ touches, torch.arange(count)
        own = (t // config.select_block)[:, None]
        free = (j >= config.num_init_blocks) & (j <= own - config.num_local_blocks)
        asked = (own[:, 0] + 1 > config.num_selected).nonzero().flatten().tolist()
        for kept, by in ((shares, blocks[here]), (best, best_blocks)):
            for at in asked:
                for g in range(config.num_kv_heads):
                    kept.append(mass[at, g, by[at, g][by[at, g] >= 0].long()].sum())
        for at in free.any(-1).nonzero().flatten().tolist():
            teacher, student = mass[at][:, free[at]], score[at][:, free[at]]
            total = teacher.sum(-1, keepdim=True)
            ratio = (teacher / total) / (student / student.sum(-1, keepdim=True))
            choice = choice + (teacher * ratio.log()).sum()
    choice = choice / (len(q) * config.num_kv_heads)
    sparse = nsa_reference(
        *(q, k, v, gates, reference),
        k_params=params["k"],
        v_params=params["v"],
        cu_seqlens=list(cu_seqlens),
        selected=blocks,
    ).output
    out = torch.cat(dense)
    output = (sparse - out).square().sum() / out.square().sum()
    (choice + output).backward()
    means = [torch.stack(each).mean() for each in (shares, best)]
    found = {"out": out, "choice": choice, "output": output, "captured": means[0], "best": means[1]}
    found["gates"] = gates.grad  # type: ignore[assignment]
    for name, weights in params.items():
        found |= {f"{name}.{key}": x.grad for key, x in weights.items()}  # type: ignore[misc]
    return {name: x.detach() for name, x in found.items()}


MLP = CONFIG
APART = replace(CONFIG, compress="linear", compress_stride=8, scale=0.7)
FORCED = replace(CONFIG, compress="conv1d", num_init_blocks=2, num_local_blocks=1)
CHUNKS = CONFIG.num_heads * 131 * 20
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "config, dtype, most",
    [
        pytest.param(MLP, torch.float64, CHUNKS, id="mlp-float64-chunks"),
        pytest.param(MLP, torch.float32, distilling.MOST, id="mlp-float32-whole"),
        pytest.param(MLP, torch.float32, CHUNKS, id="mlp-float32-chunks", marks=slow),
        pytest.param(APART, torch.float64, distilling.MOST, id="apart-float64-whole"),
        pytest.param(APART, torch.float32, CHUNKS, id="apart-float32-chunks", marks=slow),
        pytest.param(FORCED, torch.float64, CHUNKS, id="forced-float64-chunks"),
        pytest.param(FORCED, torch.float32, distilling.MOST, id="forced-float32", marks=slow),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, config: NSAConfig, dtype: torch.dtype, most: int
) -> None:
    monkeypatch.setattr(distilling, "MOST", most)
    case = case_of(config)
    found, blocks = ours(case, dtype, DOCUMENTS)
    exact = oracle(case, torch.float64, DOCUMENTS, blocks)
    plain = oracle(case, plain_dtype(dtype), DOCUMENTS, blocks)
    assert found.keys() == exact.keys()
    assert 0 < exact["captured"] < exact["best"] < 1
    for name, value in exact.items():
        if not value.ndim:
            value, found[name], plain[name] = value[None], found[name][None], plain[name][None]
        documents = DOCUMENTS if name in ("out", "gates") else None
        # A gate's gradient comes of a difference of two outputs, whose rounding is no smaller where
        # a head's gradients are.
        heads = name == "out"
        assert_2x(found[name], plain[name], value, dtype, name, cu_seqlens=documents, heads=heads)


def test_scores_that_are_the_dense_mass_cost_nothing() -> None:
    """Keys that are equal within each block, and blocks that tile: a mean key has the mass of its
    block but for the block's length."""
    config = replace(
        CONFIG, num_heads=2, v_head_dim=8, compress_block=16, compress_stride=16, compress="mlp"
    )
    case = case_of(config, 160)
    case.k = case.k[::16].repeat_interleave(16, dim=0)
    for name in ("k", "v"):
        module = BlockCompressor(config, 8, dtype=torch.float64)
        module.start_as_mean()
        case.weights[name] = module.state_dict()
    found, _ = ours(case, torch.float64, (0, 160))
    assert abs(found["choice"].item()) < 1e-14
    assert float(found["captured"]) == pytest.approx(float(found["best"]), rel=1e-12)
    case.weights["k"]["position"] += torch.randn(16, 8, dtype=torch.float64)
    case.weights["k"]["up"] += 0.3 * torch.randn_like(case.weights["k"]["up"])
    found, _ = ours(case, torch.float64, (0, 160))
    assert found["choice"].item() > 1e-3
    assert found["captured"] < found["best"]


def test_only_what_is_not_forced_counts() -> None:
    """In proportion to the mass there; any multiple of it costs nothing."""
    mass = torch.rand(2, 3, 7, dtype=torch.float64)
    free = torch.arange(7) >= torch.tensor([[2], [5], [7]])
    scores = torch.where(free, 3 * mass, torch.rand_like(mass))
    assert abs(float(choice_loss(mass, scores.log(), free))) < 1e-14
    other = torch.rand_like(mass)
    cost = choice_loss(mass, other.log(), free)
    for forced in (mass, other):
        forced.masked_fill_(~free, 17.0)
    assert choice_loss(mass, other.log(), free) == cost > 0
    assert torch.isclose(choice_loss(2 * mass, other.log(), free), 2 * cost)


def test_a_score_of_zero_still_learns() -> None:
    """float32 has no exp(-200); the logarithm and its gradient are there."""
    case = case_of(CONFIG)
    case.q *= 40
    found, blocks = ours(case, torch.float32, DOCUMENTS)
    exact = oracle(case, torch.float64, DOCUMENTS, blocks)
    assert not oracle(case, torch.float32, DOCUMENTS, blocks)["choice"].isfinite()
    assert found["choice"] > 5
    assert torch.isclose(found["choice"].double(), exact["choice"], rtol=1e-4)
    for key in ("k.up", "k.down"):
        assert found[key].isfinite().all()
        assert found[key].abs().max() > 0


def make_layer(**changed: Any) -> NativeSparseAttention:
    return NativeSparseAttention(
        32, replace(CONFIG, **changed), qk_norm=True, backend="pytorch", dtype=torch.float64
    )


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"independent_kv": True}, id="own_keys_and_values"),
        pytest.param({"compress_pre_rope": True}, id="pre_rope"),
        pytest.param({"branches": ("selected", "window")}, id="two_branches"),
        pytest.param({"compress": "mean"}, id="no_weights"),
    ],
)
def test_a_layer_gives_dense_attention_of_its_selected_branch(changed: dict[str, Any]) -> None:
    """Which has blocks enough to be dense attention itself."""
    layer = make_layer(gate_init=(-40.0, 40.0, -40.0), num_selected=19, **changed)
    layer.gate.start_as_constant()
    x = torch.randn(2, 300, 32, dtype=torch.float64)
    expected = layer(x).detach()
    with distill_dense() as distilled:
        found = layer(x)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    (of_layer,) = distilled.layers
    assert of_layer.output.item() < 1e-24
    assert of_layer.captured.isnan()  # All blocks are chosen.
    layer.o_proj.requires_grad_(False)
    distilled.loss.backward()
    learn = {name for name, p in layer.named_parameters() if p.grad is not None}
    gates = {"gate.proj.weight", "gate.proj.bias"}
    assert gates <= learn <= gates | {n for n, _ in layer.named_parameters() if "compr" in n}
    if "mean" not in changed.values():
        assert layer.k_compressor is not None
        assert all(float(p.grad.abs().max()) > 0 for p in layer.k_compressor.parameters())  # type: ignore[union-attr]


def test_it_learns_to_choose() -> None:
    """A few steps of an optimizer bring the choice nearer to the best one."""
    layer = make_layer(independent_kv=False)
    x = torch.randn(1, 300, 32, dtype=torch.float64)
    optimizer = torch.optim.Adam([p for n, p in layer.named_parameters() if "compr" in n], lr=3e-3)
    seen = []
    for _ in range(25):
        with distill_dense() as distilled:
            layer(x)
        optimizer.zero_grad()
        distilled.loss.backward()
        optimizer.step()
        seen.append(distilled.layers[0])
    assert seen[-1].choice.item() < 0.8 * seen[0].choice.item()
    assert seen[-1].captured > seen[0].captured


def test_without_gradients_it_measures() -> None:
    layer, x = make_layer(), torch.randn(1, 200, 32, dtype=torch.float64)
    with distill_dense() as learning:
        layer(x)
    with torch.no_grad(), distill_dense() as measuring:
        layer(x)
    assert not measuring.loss.requires_grad
    assert torch.equal(measuring.loss, learning.loss)


class Other:
    """A selector that chooses nothing but a query's own block."""

    name, branch = "own", None

    def grids(self, config: NSAConfig) -> dict[str, Any]:
        return {}

    def stated(self) -> dict[str, str]:
        return {}

    def problem(self, call: Any) -> None:
        return None


def test_what_cannot_be_distilled_is_refused() -> None:
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    with distill_dense() as nothing:
        pass
    with pytest.raises(ValueError, match="must see a call of a sparse layer, got none"):
        _ = nothing.loss
    layer = make_layer(branches=("compressed", "window"))
    with pytest.raises(ValueError, match="branches must have 'selected' in distill_dense, got"):
        run(layer, x)
    exact = NativeSparseAttention(
        32, CONFIG, backend="pytorch", dtype=torch.float64, exact_gradients=2
    )
    with pytest.raises(ValueError, match="exact_gradients must be 0 in distill_dense, got 2"):
        run(exact, x)
    own = NativeSparseAttention(
        *(32, replace(CONFIG, branches=("selected", "window"))),
        backend="pytorch",
        dtype=torch.float64,
        selector=Other(),  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="selector must be NSA's own in distill_dense, got 'own'"):
        run(own, x)
    kept = make_layer()
    match = "activation checkpointing must be off in distill_dense"
    with pytest.raises(ValueError, match=match), distill_dense():
        checkpoint(kept, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="watched once at a time"), distill_dense():
        run(kept, x)
    run(kept, x)  # And the next good one works.


def run(layer: nn.Module, x: Tensor) -> None:
    with distill_dense():
        layer(x)


def test_rotary_positions_of_unrotated_keys() -> None:
    """compress_pre_rope hands the teacher unrotated keys: packed documents rotate by their own."""
    config = replace(CONFIG, compress_pre_rope=True)
    layer = NativeSparseAttention(
        32, config, rotary=RotaryConfig(theta=100.0), backend="pytorch", dtype=torch.float64
    )
    x = torch.randn(1, 100, 32, dtype=torch.float64)
    packed = torch.tensor([0, 37, 100], dtype=torch.int32)
    with torch.no_grad():
        with distill_dense():
            whole = layer(x, cu_seqlens=packed)
        for start, end in pairwise(packed.tolist()):
            with distill_dense():
                part = layer(x[:, start : end - (end - start) % 2])
            assert torch.allclose(whole[:, start : start + part.shape[1]], part, atol=1e-13)


INTERPRETED = [
    slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter"),
]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=INTERPRETED),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_the_triton_backend_finds_the_same(device: str) -> None:
    """In the interpreter without a GPU. Over several inputs: plain code's error in a single number,
    as the divergence of one input is, is now and then smaller than what it rounds by."""
    config = replace(
        CONFIG, head_dim=16, v_head_dim=16, compress_block=16, compress_stride=8, window=24
    )
    inputs = torch.randn(6, 1, 160, 32, dtype=torch.float64)
    packed = torch.tensor([0, 50, 160], dtype=torch.int32)
    weights = NativeSparseAttention(32, config, dtype=torch.float64).state_dict()

    def find(backend: str, dtype: torch.dtype, place: str) -> Found:
        each = [find_one(x, backend, dtype, place) for x in inputs]
        return {name: torch.stack([found[name] for found in each]) for name in each[0]}

    def find_one(x: Tensor, backend: str, dtype: torch.dtype, place: str) -> Found:
        layer = NativeSparseAttention(32, config, backend=backend, dtype=dtype, device=place)
        layer.load_state_dict(weights)
        with distill_dense() as distilled:
            out = layer(x.to(place, dtype), cu_seqlens=packed)
        distilled.loss.backward()
        (of_layer,) = distilled.layers
        values = {name: getattr(of_layer, name)[None] for name in ("choice", "output", "captured")}
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        return {name: x.cpu() for name, x in {"out": out[0], **values, **grads}.items()}

    found = find("triton", torch.float32, device)
    plain = find("pytorch", torch.float32, "cpu")
    exact = find("pytorch", torch.float64, "cpu")
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert_2x(found[name], plain[name], value.detach(), torch.float32, name)
