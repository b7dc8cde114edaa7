"""Bad options: a ValueError that names the option, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_dist import BlockCompressor, NativeSparseAttention, NSABlock, RotaryConfig
from tests.unit.bad_input import CUSTOM, HIDDEN, PRE_ROPE, SMALL, Case, Fixed, assert_refused, named


def config(**changes: Any) -> Callable[[], Any]:
    return lambda: replace(SMALL, **changes)


def rotary(**options: Any) -> Callable[[], Any]:
    return lambda: RotaryConfig(**options)


def layer(config: Any = SMALL, hidden_size: Any = HIDDEN, **options: Any) -> Callable[[], Any]:
    return lambda: NativeSparseAttention(hidden_size, config, **options)


def block(hidden_size: Any = HIDDEN, mlp_hidden: Any = 32, **options: Any) -> Callable[[], Any]:
    return lambda: NSABlock(hidden_size, SMALL, mlp_hidden=mlp_hidden, **options)


CONFIG_CASES: dict[str, Case] = {
    "num_heads-zero": (config(num_heads=0), "num_heads: 0; at least 1"),
    "num_heads-float": (config(num_heads=4.0), "num_heads: 4.0; an integer"),
    "num_heads-bool": (config(num_heads=True), "num_heads: True; an integer"),
    "num_kv_heads-no-divisor": (config(num_kv_heads=3), "num_kv_heads: 3; num_heads = 4"),
    "num_kv_heads-group-over-32": (
        config(num_heads=66, num_kv_heads=2),
        "num_kv_heads: 2; at most 32 query heads",
    ),
    "head_dim-zero": (config(head_dim=0), "head_dim: 0; at least 1"),
    "v_head_dim-zero": (config(v_head_dim=0), "v_head_dim: 0; at least 1"),
    "compress_block-zero": (config(compress_block=0), "compress_block: 0; at least 1"),
    "compress_stride-zero": (config(compress_stride=0), "compress_stride: 0; at least 1"),
    "compress_stride-not-of-block": (
        config(compress_stride=3),
        "compress_stride: 3; compress_block = 4",
    ),
    "compress_stride-not-of-select_block": (
        config(compress_stride=4, select_block=10),
        "compress_stride: 4; select_block = 10",
    ),
    "select_block-under-compress_block": (
        config(select_block=2),
        "select_block: 2; at least compress_block = 4",
    ),
    "num_selected-under-forced": (
        config(num_selected=2),
        "num_selected: 2; num_init_blocks + num_local_blocks = 3",
    ),
    "num_init_blocks-negative": (config(num_init_blocks=-1), "num_init_blocks: -1; at least 0"),
    "num_local_blocks-zero": (config(num_local_blocks=0), "num_local_blocks: 0; at least 1"),
    "window-zero": (config(window=0), "window: 0; at least 1"),
    "window-over-int32": (config(window=10**30), "window: 1000000; at most 2147483647"),
    "branches-none": (config(branches=()), "branches: (); non-empty"),
    "branches-unknown": (config(branches=("sliding",)), "branches: sliding; 'window'"),
    "branches-twice": (config(branches=("window",) * 2), "branches: window; without repeats"),
    "branches-string": (config(branches="window"), "branches: 'window'; choice"),
    "compress-unknown": (config(compress="lstm"), "compress: 'lstm'; 'attention_pool'"),
    "compress_hidden-zero": (config(compress_hidden=0), "compress_hidden: 0; at least 1"),
    "compress_hidden-without-mlp": (
        config(compress="linear", compress_hidden=8),
        "compress_hidden: 8; compress='mlp'",
    ),
    "compress_per_head-int": (config(compress_per_head=1), "compress_per_head: 1; True or"),
    "compress_per_head-of-mean": (
        config(compress="mean", compress_per_head=True),
        "compress_per_head: True; False",
    ),
    "compress_pre_rope-string": (config(compress_pre_rope="no"), "compress_pre_rope: no; True"),
    "independent_kv-none": (config(independent_kv=None), "independent_kv: None; True or False"),
    "scale-zero": (config(scale=0), "scale: 0; positive"),
    "scale-nan": (config(scale=float("nan")), "scale: nan; finite"),
    "scale-over-float": (config(scale=10**400), "scale: 1000; finite"),
    "gate-unknown": (config(gate="softmax"), "gate: 'softmax'; 'static'"),
    "gate_hidden-without-mlp": (config(gate_hidden=8), "gate_hidden: 8; gate='mlp'"),
    "gate_init-two": (config(gate_init=(0, 0)), "gate_init: (0, 0); three numbers"),
    "gate_init-infinite": (config(gate_init=(0.0, float("inf"), 0.0)), "gate_init: inf; finite"),
}
ROTARY_CASES: dict[str, Case] = {
    "theta-one": (rotary(theta=1.0), "theta: 1.0; above 1"),
    "theta-string": (rotary(theta="1e4"), "theta: '1e4'; finite number"),
    "dim-odd": (rotary(dim=3), "dim: 3; even"),
    "dim-zero": (rotary(dim=0), "dim: 0; at least 2"),
    "scaling-unknown": (rotary(scaling="ntk"), "scaling: 'ntk'; 'yarn'"),
    "factor-under-1": (rotary(scaling="linear", factor=0.5), "factor: 0.5; at least 1"),
    "factor-without-scaling": (rotary(factor=4.0), "factor: 4.0; 'linear'"),
    "original_max_positions-zero": (
        rotary(original_max_positions=0),
        "original_max_positions: 0; at least 1",
    ),
    "low_freq_factor-zero": (rotary(low_freq_factor=0), "low_freq_factor: 0; positive"),
    "high_freq_factor-low": (
        rotary(high_freq_factor=0.5),
        "high_freq_factor: 0.5; low_freq_factor = 1.0",
    ),
    "beta_fast-low": (rotary(beta_fast=1.0), "beta_fast: 1.0; beta_slow = 1.0"),
    "attention_factor-zero": (
        rotary(scaling="yarn", attention_factor=0),
        "attention_factor: 0; positive",
    ),
    "attention_factor-without-yarn": (
        rotary(scaling="linear", factor=2.0, attention_factor=1.5),
        "attention_factor: 1.5; 'yarn'",
    ),
}
LAYER_CASES: dict[str, Case] = {
    "hidden_size-zero": (layer(hidden_size=0), "hidden_size: 0; at least 1"),
    "hidden_size-string": (layer(hidden_size="24"), "hidden_size: '24'; an integer"),
    "config-dict": (layer({"num_heads": 4}), "config: {'num_heads': 4}; an NSAConfig"),
    "bias-string": (layer(bias="no"), "bias: 'no'; True or False"),
    "qk_norm-string": (layer(qk_norm="l2"), "qk_norm: 'l2'; True or False"),
    "norm_eps-negative": (layer(norm_eps=-1e-6), "norm_eps: -1e-06; positive"),
    "rotary-string": (layer(rotary="yarn"), "rotary: 'yarn'; a RotaryConfig or None"),
    "rotary-over-head_dim": (
        layer(rotary=RotaryConfig(dim=10)),
        "rotary dim: 10; up to head_dim = 8",
    ),
    "rotary-odd-head_dim": (layer(replace(SMALL, head_dim=7)), "rotary dim: 7; even number"),
    "rotary-none-with-pre-rope": (layer(PRE_ROPE, rotary=None), "rotary: None; a RotaryConfig"),
    "dropout-one": (layer(dropout=1.0), "dropout: 1.0; [0, 1)"),
    "dropout-negative": (layer(dropout=-0.1), "dropout: -0.1; [0, 1)"),
    "dropout-string": (layer(dropout="0.1"), "dropout: '0.1'; [0, 1)"),
    "layout-unknown": (layer(layout="striped"), "layout: 'striped'; 'zigzag_per_document'"),
    "layout-none": (layer(layout=None), "layout: None; 'contiguous'"),
    "backend-unknown": (layer(backend="cuda"), "backend: 'cuda'; 'pytorch'"),
    "group-string": (layer(group="cp"), "group: 'cp'; a process group"),
    "group-rank-list": (layer(group=[0, 1]), "group: [0, 1]; DeviceMesh or None"),
    "dtype-int": (layer(dtype=torch.int8), "dtype: torch.int8; torch.bfloat16"),
    "k_compressor-not-given": (
        layer(CUSTOM, v_compressor=Fixed(None)),
        "k_compressor: None; an nn.Module",
    ),
    "v_compressor-not-given": (
        layer(CUSTOM, k_compressor=Fixed(None)),
        "v_compressor: None; an nn.Module",
    ),
    "k_compressor-without-custom": (
        layer(k_compressor=Fixed(None)),
        "k_compressor: Fixed; None",
    ),
    "v_compressor-not-used": (
        layer(
            replace(CUSTOM, branches=("selected",)),
            k_compressor=Fixed(None),
            v_compressor=Fixed(None),
        ),
        "v_compressor: Fixed; None with compress='custom' and branches=('selected',)",
    ),
    "k_compressor-function": (
        layer(CUSTOM, k_compressor=lambda x: x, v_compressor=Fixed(None)),
        "k_compressor: function; an nn.Module",
    ),
    "block-hidden_size-string": (block("24"), "hidden_size: '24'; an integer"),
    "block-mlp_hidden-zero": (block(mlp_hidden=0), "mlp_hidden: 0; at least 1"),
    "block-norm_eps-nan": (block(norm_eps=float("nan")), "norm_eps: nan; finite"),
    "block-layout": (block(layout="zig"), "layout: 'zig'; 'zigzag'"),
    "compressor-of-custom": (lambda: BlockCompressor(CUSTOM, 8), "compress: 'custom'; built-in"),
}
CASES = named(config=CONFIG_CASES, rotary=ROTARY_CASES, layer=LAYER_CASES)


@pytest.mark.parametrize("name", CASES)
def test_refused_with_option_value_and_what_is_allowed(name: str) -> None:
    assert_refused(CASES[name])


def test_the_good_calls_behind_the_cases_pass() -> None:
    """Each case changes little of a call that works, so that nothing else can be the reason."""
    custom = {"k_compressor": Fixed(None), "v_compressor": Fixed(None)}
    for call in (
        config(),
        config(gate="mlp", gate_hidden=8, compress_hidden=8, compress_per_head=True, scale=2),
        rotary(scaling="yarn", factor=2.0, attention_factor=1.5),
        layer(),
        layer(bias=True, qk_norm=True, dropout=0.5, rotary=None, dtype=torch.bfloat16),
        layer(CUSTOM, **custom),
        block(),
    ):
        call()
