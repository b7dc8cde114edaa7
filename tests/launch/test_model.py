"""The decoder: construction, dense attention and hybrid models, the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from launch.engines.base import is_decayed
from launch.losses import ROWS
from launch.model import Decoder
from launch.settings import Settings
from nsa_dist import NativeSparseAttention, NSAConfig, RotaryConfig, apply_rotary, rotary_cos_sin
from nsa_dist.adapters.ring import DenseAttention
from nsa_kernels.compressors import COMPRESSORS, parameter_names
from tests.distributed.ranks import Ranks
from tests.launch.common import initial_weights, tiny


def plain_decoder(settings: Settings) -> Decoder:
    model = Decoder(settings, 256).double()
    model.reset_parameters(settings.run.seed)
    return model


@pytest.mark.parametrize("kind", ["nsa", "dense", "hybrid"])
def test_meta_construction_gives_the_weights_of_direct_construction(
    ranks_of: Callable[[int], Ranks], root: Path, kind: str
) -> None:
    model = {"dense_every": 2} if kind == "hybrid" else {"attention": kind}
    options = {**model, "qk_norm": True, "bias": True}
    settings = tiny(root, model=options, attention={"gate_init": [0.5, 0.0, -0.5]})
    (weights,) = ranks_of(1).run(initial_weights, settings)
    direct = dict(plain_decoder(settings).named_parameters())
    assert weights.keys() == direct.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, direct[name]), name
        assert bool(weight.isfinite().all()), name


def test_a_run_file_says_what_layers_fetch_and_compute_again(root: Path) -> None:
    parallel = {
        "fetch": "full",
        "fetch_again": "never",
        "recompute_branches": ["window"],
        "exact_gradients": 4,
    }
    settings = tiny(root, model={"layers": 2, "dense_every": 2}, parallel=parallel)
    sparse, dense = (block.attention for block in Decoder(settings, 256).blocks)
    assert (sparse.setup.fetch, sparse.setup.fetch_again) == ("full", False)
    assert sparse.setup.recompute_branches == ("window",)
    assert sparse.setup.exact_gradients == 4
    assert isinstance(dense, DenseAttention)


def ranks_per_node(settings: Settings) -> int | None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    layer = Decoder(settings, 256, group=mesh["cp"]).blocks[0].attention
    assert isinstance(layer, NativeSparseAttention)
    return layer.setup.ranks_per_node


def test_a_run_file_says_which_ranks_share_a_node(
    ranks_of: Callable[[int], Ranks], root: Path
) -> None:
    for given, expected in ((2, 2), (0, None)):
        settings = tiny(root, parallel={"cp": 4, "ranks_per_node": given})
        assert ranks_of(4).run(ranks_per_node, settings) == [expected] * 4
        Decoder(settings, 256)  # On one rank it has no meaning.
    for given, must in ((3, "0 or a divisor of parallel.cp = 4"), (-2, "at least 0")):
        with pytest.raises(ValueError, match=f"parallel.ranks_per_node must be {must}, got"):
            tiny(root, parallel={"cp": 4, "ranks_per_node": given})
    with pytest.raises(ValueError, match=r"parallel\.ranks_per_node must be 0 or 1 with"):
        tiny(root, parallel={"cp": 4, "ranks_per_node": 2, "exact_gradients": 4})


def test_every_so_many_th_layer_of_a_hybrid_model_is_dense(root: Path) -> None:
    def kinds(**model: object) -> list[type]:
        settings = tiny(root, model={"layers": 7, **model})
        return [type(block.attention) for block in Decoder(settings, 256).blocks]

    nsa, dense = NativeSparseAttention, DenseAttention
    assert kinds() == [nsa] * 7
    assert kinds(attention="dense") == [dense] * 7
    assert kinds(dense_every=3) == [nsa, nsa, dense, nsa, nsa, dense, nsa]
    assert kinds(dense_every=7) == [nsa] * 6 + [dense]


def test_weights_depend_on_the_seed_and_on_nothing_else(
    ranks_of: Callable[[int], Ranks], root: Path
) -> None:
    (alone,) = ranks_of(1).run(initial_weights, tiny(root))
    for size, cp in ((2, 1), (2, 2), (4, 2), (4, 4)):
        for weights in ranks_of(size).run(initial_weights, tiny(root, parallel={"cp": cp})):
            assert all(torch.equal(weight, alone[name]) for name, weight in weights.items())
    (other,) = ranks_of(1).run(initial_weights, tiny(root, run={"seed": 1}))
    assert not torch.equal(other["head.weight"], alone["head.weight"])
    # Parts draw from seeds of their own: no two blocks start alike.
    first, second = (alone[f"blocks.{i}.attention.q_proj.weight"] for i in range(2))
    assert not torch.equal(first, second)


def test_tied_embeddings_are_one_weight(ranks_of: Callable[[int], Ranks], root: Path) -> None:
    (weights,) = ranks_of(1).run(initial_weights, tiny(root, model={"tie_embeddings": True}))
    assert "head.weight" not in weights
    model = plain_decoder(tiny(root, model={"tie_embeddings": True}))
    tokens = torch.arange(24)[None]
    model(tokens, labels=tokens).backward()
    grad = model.embedding.weight.grad
    assert grad is not None
    # Never an input, so its gradient comes through the output alone.
    assert float(grad[100].abs().max()) > 0


@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 7, 7, 30, 40]], ids=["one", "packed"])
def test_dense_attention_is_causal_softmax_within_documents(bounds: list[int]) -> None:
    config = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=6)
    layer = DenseAttention(12, config, bias=True).double()
    x = torch.randn(1, 40, 12, dtype=torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    found = layer(x, cu_seqlens=cu_seqlens)

    starts = torch.tensor(bounds)
    document = torch.searchsorted(starts, torch.arange(40), right=True) - 1
    positions = torch.arange(40) - starts[document]
    cos, sin = rotary_cos_sin(RotaryConfig(), 8, positions)
    q = apply_rotary(layer.q_proj(x[0]).view(40, 4, 8), cos, sin)
    k = apply_rotary(layer.k_proj(x[0]).view(40, 2, 8), cos, sin).repeat_interleave(2, dim=1)
    v = layer.v_proj(x[0]).view(40, 2, 6).repeat_interleave(2, dim=1)
    logits = torch.einsum("thd,shd->hts", q, k) / 8**0.5
    hidden = (document[:, None] != document) | (positions[:, None] < positions)
    probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = layer.o_proj(torch.einsum("hts,shd->thd", probs, v).flatten(1))
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_the_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    model = plain_decoder(tiny(root, model={"attention": "dense"}))
    tokens = torch.randint(256, (2, 50))
    labels = torch.where(torch.rand(2, 50) < 0.3, -100, torch.randint(256, (2, 50)))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert ROWS > 100
    monkeypatch.setattr("launch.losses.ROWS", 7)
    found = model(tokens, labels=labels)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-10, atol=1e-13)


def test_no_label_at_all_is_a_loss_of_zero_with_gradients(root: Path) -> None:
    model = plain_decoder(tiny(root))
    tokens = torch.randint(256, (1, 64))
    loss = model(tokens, labels=torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0.0
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) == 0.0, name


@pytest.mark.parametrize(
    ("kind", "per_head"),
    [(kind, per_head) for kind in COMPRESSORS for per_head in {False, bool(parameter_names(kind))}],
)
def test_weight_decay_acts_on_matrices_of_compressors(kind: str, per_head: bool) -> None:
    matrices = {"mlp": {"up", "down"}, "linear": {"weight"}, "conv1d": {"weight"}}
    config = NSAConfig(4, 2, 8, compress=kind, compress_per_head=per_head)
    with torch.device("meta"):
        layer = NativeSparseAttention(24, config)
    weights = dict(layer.k_compressor.named_parameters())
    found = {name for name, p in weights.items() if is_decayed(f"k_compressor.{name}", p)}
    assert found == matrices.get(kind, set())
