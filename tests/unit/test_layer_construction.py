"""Building a layer: initial weights, the meta device, custom compressors, positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_dist import (
    NativeSparseAttention,
    NSABlock,
    NSAConfig,
    RotaryConfig,
    gates_from_logits,
    initial_gate_logits,
    shard_batch,
)
from nsa_kernels.compressors import COMPRESSORS

SMALL = NSAConfig(
    4,
    2,
    8,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=9,
)
HIDDEN = 24
KINDS = tuple(COMPRESSORS)


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("gate", ["linear", "mlp", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_construction_then_reset_gives_the_direct_weights(kind: Any, gate: Any) -> None:
    config = replace(SMALL, compress=kind, gate=gate, gate_init=(-1.0, 0.5, 2.0))
    options = {"mlp_hidden": 40, "bias": True, "qk_norm": True}
    torch.manual_seed(5)
    direct = NSABlock(HIDDEN, config, **options)
    direct.reset_parameters()
    with torch.device("meta"):
        lazy = NSABlock(HIDDEN, config, **options)
    assert all(p.is_meta for p in lazy.parameters())
    lazy.to_empty(device="cpu")
    torch.manual_seed(5)
    NSABlock(HIDDEN, config, **options)  # Building draws once, as it did above.
    lazy.reset_parameters()
    assert equal_weights(lazy, direct)
    x = torch.randn(1, 40, HIDDEN)
    assert torch.equal(lazy(x), direct(x))


def test_device_argument_builds_on_meta() -> None:
    layer = NativeSparseAttention(HIDDEN, SMALL, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_same_seed_same_weights_whatever_the_layout() -> None:
    torch.manual_seed(1)
    first = NativeSparseAttention(HIDDEN, SMALL)
    torch.manual_seed(1)
    second = NativeSparseAttention(HIDDEN, SMALL, layout="contiguous")
    assert equal_weights(first, second)


@pytest.mark.parametrize("gate", ["linear", "mlp", "static"])
def test_initial_gates(gate: Any) -> None:
    config = replace(SMALL, gate=gate, gate_init=(-10.0, 0.0, 3.0), branches=("window", "selected"))
    layer = NativeSparseAttention(HIDDEN, config)
    _, details = layer(torch.zeros(1, 8, HIDDEN), return_details=True)
    if gate == "mlp":
        with torch.no_grad():
            layer.gate.up.bias.zero_()
        _, details = layer(torch.zeros(1, 8, HIDDEN), return_details=True)
    expected = torch.sigmoid(torch.tensor([0.0, 3.0])).expand(1, 8, 4, 2)
    assert torch.allclose(details.gates, expected)


def test_gates_from_logits_are_those_of_the_layer() -> None:
    config = replace(SMALL, gate_init=(-10.0, 0.0, 3.0))
    layer = NativeSparseAttention(HIDDEN, config)
    x = torch.randn(1, 8, HIDDEN)
    assert torch.equal(layer.gate.proj.bias, initial_gate_logits(config).flatten())
    logits = layer.gate.proj(x)
    _, details = layer(x, return_details=True)
    assert torch.equal(gates_from_logits(logits, config), details.gates)
    assert gates_from_logits(logits.bfloat16(), config).dtype == torch.float32


def test_config_of_a_tensor_parallel_rank() -> None:
    config = NSAConfig(32, 8, 64, window=100)
    assert config.split(4) == NSAConfig(8, 2, 64, window=100)
    assert config.split(1) == config
    with pytest.raises(ValueError, match=r"ranks must be a divisor of num_kv_heads = 8 .*, got 3"):
        config.split(3)


class Last(nn.Module):
    """A compressor of a user's: the block's last row, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks[:, :, -1] * self.factor


def test_custom_compressors_get_blocks_and_gradients() -> None:
    config = replace(SMALL, compress="custom")
    layer = NativeSparseAttention(HIDDEN, config, k_compressor=Last(), v_compressor=Last())
    x = torch.randn(1, 64, HIDDEN, requires_grad=True)
    layer(x).square().sum().backward()
    for module in (layer.k_compressor, layer.v_compressor):
        assert isinstance(module, Last)
        assert module.factor.grad is not None
        assert float(module.factor.grad.abs()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "branches", [("window",), ("compressed",), ("selected",), ("window", "selected")]
)
def test_every_parameter_gets_a_gradient(branches: tuple[str, ...], kind: Any) -> None:
    config = replace(SMALL, branches=branches, compress=kind)
    for tokens in (1, 3, 40):
        layer = NativeSparseAttention(HIDDEN, config, qk_norm=True)
        layer(torch.randn(1, tokens, HIDDEN)).sum().backward()
        missing = [name for name, p in layer.named_parameters() if p.grad is None]
        assert missing == []


def test_position_ids_are_rotary_positions() -> None:
    # An MLP over rotated keys is not relative; the window's plain keys are.
    layer = NativeSparseAttention(HIDDEN, replace(SMALL, branches=("window",)))
    x = torch.randn(1, 40, HIDDEN)
    default = layer(x)
    ids = torch.arange(40)[None]
    assert torch.equal(layer(x, position_ids=ids), default)
    # Rotary is relative: a shift moves the result by rounding alone, a stretch changes it.
    assert torch.allclose(layer(x, position_ids=ids + 7), default, atol=1e-5)
    assert not torch.allclose(layer(x, position_ids=3 * ids), default, atol=1e-3)


def test_no_rotary() -> None:
    layer = NativeSparseAttention(HIDDEN, SMALL, rotary=None)
    x = torch.randn(1, 40, HIDDEN)
    stretched = layer(x, position_ids=3 * torch.arange(40)[None])
    assert torch.equal(stretched, layer(x))


def test_frozen_projections_leave_the_rest_trainable() -> None:
    layer = NativeSparseAttention(HIDDEN, SMALL, rotary=RotaryConfig(scaling="linear", factor=2.0))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("compressor" in name)
    layer(torch.randn(1, 40, HIDDEN)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == ("compressor" in name)


def test_block_returns_details() -> None:
    block = NSABlock(HIDDEN, SMALL, mlp_hidden=40)
    x = torch.randn(2, 40, HIDDEN)
    out, details = block(x, return_details=True)
    assert torch.equal(out, block(x))
    assert details.selected.shape == (2, 40, 2, 4)


def test_default_device_does_not_matter() -> None:
    x = torch.randn(1, 40, HIDDEN)
    tokens = torch.arange(40)[None]
    layer = NativeSparseAttention(HIDDEN, SMALL, dropout=0.5, device="cpu")
    config = replace(SMALL, window=10)  # Of which no plan is made yet.
    other = NativeSparseAttention(HIDDEN, config, device="cpu")
    torch.manual_seed(3)
    expected = layer(x)
    expected_batch = shard_batch(tokens)
    with torch.device("meta"):
        torch.manual_seed(3)
        assert torch.equal(layer(x), expected)
        assert other(x).device.type == "cpu"
        batch = shard_batch(tokens)
    assert torch.equal(batch.labels, expected_batch.labels)
    assert torch.equal(batch.position_ids, expected_batch.position_ids)


def test_a_layer_shows_its_backend() -> None:
    assert "backend=pytorch" in repr(NativeSparseAttention(HIDDEN, SMALL))
    assert "backend=pytorch" in repr(NativeSparseAttention(HIDDEN, SMALL, backend="pytorch"))


@pytest.mark.gpu
def test_a_layer_on_a_gpu_runs_on_triton() -> None:
    """And refuses what Triton does not compute: where it is made, or when it first runs."""
    refused = "head_dim must be a multiple of 16 up to 256 with backend='triton', got 8"
    with pytest.raises(ValueError, match=refused):
        NativeSparseAttention(HIDDEN, SMALL, device="cuda")
    layer = NativeSparseAttention(HIDDEN, SMALL)
    x = torch.randn(1, 40, HIDDEN)
    assert layer(x).shape == x.shape
    layer.cuda()
    assert "backend=triton" in repr(layer)
    with pytest.raises(ValueError, match=refused):
        layer(x.cuda())
    wide = NativeSparseAttention(HIDDEN, replace(SMALL, head_dim=16, select_block=16)).cuda()
    assert wide(x.cuda()).isfinite().all()
    with pytest.raises(ValueError, match=r"dtype must be .*backend='triton', got torch.float64"):
        wide.double()(x.cuda().double())
