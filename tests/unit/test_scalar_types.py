"""Numbers of other types than Python's: taken as Python's, or refused by name.

What is printed, compared, hashed and written of an option must not depend on the type it came as:
ranks compare printed values, and a run writes them into its settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from nsa_dist import (
    BlockCompressor,
    NativeSparseAttention,
    NSABlock,
    RotaryConfig,
    get_plan,
    make_sharding,
    shard_batch,
)
from tests.unit.bad_input import HIDDEN, SMALL, TOKENS

np = pytest.importorskip("numpy")

ROTARY = RotaryConfig(
    theta=500.0,
    dim=8,
    scaling="yarn",
    factor=4.0,
    beta_fast=16.0,
    beta_slow=2.0,
    attention_factor=1.5,
)
CONFIG = replace(SMALL, compress_hidden=6, gate="mlp", gate_hidden=5, scale=0.5, v_head_dim=6)


def as_numpy(value: Any) -> Any:
    """The same value as NumPy has it; True and False as they are."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [as_numpy(x) for x in value]
    return {int: np.int64, float: np.float32, str: np.str_}[type(value)](value)


@pytest.mark.parametrize("config", [CONFIG, ROTARY], ids=["NSAConfig", "RotaryConfig"])
def test_a_config_of_numpys_numbers_is_the_same(config: Any) -> None:
    found = type(config)(**{f.name: as_numpy(getattr(config, f.name)) for f in fields(config)})
    assert found == config
    assert hash(found) == hash(config)
    assert repr(found) == repr(config)
    assert json.dumps(asdict(found)) == json.dumps(asdict(config))
    for f in fields(config):
        assert type(getattr(found, f.name)) is type(getattr(config, f.name)), f.name


@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", "int64"])
def test_every_width_of_integers_is_taken(kind: str) -> None:
    window = replace(SMALL, window=getattr(np, kind)(9)).window
    assert (type(window), window) == (int, 9)


@pytest.mark.parametrize(
    "scale", [1, np.int64(1), np.float16(1), np.float64(1), Fraction(1)], ids=repr
)
def test_every_real_number_is_taken_as_a_float(scale: Any) -> None:
    assert repr(replace(SMALL, scale=scale).scale) == "1.0"


# Neither is a whole number of its own type, nor may one be guessed.
@pytest.mark.parametrize(
    "window",
    [9.0, np.float64(9), np.bool_(True), True, "9", torch.tensor(9), np.array(9), np.array([9])],
    ids=repr,
)
def test_what_is_no_integer_is_refused_by_name(window: Any) -> None:
    with pytest.raises(ValueError, match=r"^window must be an integer of at least 1, got "):
        replace(SMALL, window=window)


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(1.0), np.array(1.0), np.float32("nan"), np.float64("inf"), "1", True, 1j],
    ids=repr,
)
def test_what_is_no_number_is_refused_by_name(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^scale must be a positive finite number or None, got "):
        replace(SMALL, scale=scale)


@pytest.mark.parametrize(
    "option, value",
    [
        ("branches", [np.array(["selected", "window"])]),
        ("branches", np.array(["selected"])),
        ("compress", np.array(["mlp", "mean"])),
        ("gate", 3),
        ("gate_init", np.zeros(3)),
        ("gate_init", [torch.tensor(0.0)] * 3),
        ("compress_per_head", np.bool_(False)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be .*, got "):
        replace(SMALL, **{option: value})


def layer_options(number: Callable[[Any], Any]) -> tuple[Any, ...]:
    block = NSABlock(
        number(HIDDEN),
        SMALL,
        mlp_hidden=number(32),
        norm_eps=number(0.5),
        dropout=number(0.25),
        layout=number("zigzag"),
        qk_norm=True,
    )
    layer: NativeSparseAttention = block.attention
    linear = block.mlp.gate_proj
    sizes = (layer.hidden_size, linear.in_features, linear.out_features)
    compressor = BlockCompressor(SMALL, number(8))
    assert layer.q_norm is not None
    return (*sizes, layer.dropout, layer.layout, layer.q_norm.eps, compressor.dim)


def test_a_layer_of_numpys_numbers_is_the_same() -> None:
    assert repr(layer_options(as_numpy)) == repr(layer_options(lambda x: x))


def plan_of(number: Callable[[Any], Any]) -> Any:
    sizes = {"batch": number(1), "local_length": number(TOKENS)}
    options = {"cu_seqlens": None, "dtype": torch.float32, "device": torch.device("cpu")}
    return get_plan(SMALL, number("zigzag"), None, **sizes, **options)


def test_a_plan_of_numpys_numbers_is_the_same() -> None:
    assert plan_of(as_numpy) is plan_of(lambda x: x)
    with pytest.raises(ValueError, match=r"^batch must be an integer of at least 0, got 1\.0"):
        plan_of(lambda x: 1.0 if x == 1 else x)


def test_sharding_takes_numpys_numbers() -> None:
    sharding = make_sharding(np.int64(TOKENS), layout=np.str_("contiguous"))
    assert (type(sharding.length), type(sharding.layout)) == (int, str)
    batch = shard_batch(torch.arange(TOKENS)[None], pad_token=np.int32(3))
    assert batch.num_targets == TOKENS - 1
