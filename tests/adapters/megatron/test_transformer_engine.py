"""Layers of TransformerEngine's linear layers and norms, with modules of its names and arguments
in its place (``fake_engine``); Megatron's wrappers of them are Megatron's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.megatron.engine_case import (
    IN_8_BITS,
    engine_agrees,
    graphs_without_attention,
    keys_of_kinds,
    kinds_in_8_bits,
    load_engine,
    modules_of_a_layer,
    predicting_parts,
    programs_agree,
    refusals_with_engine,
    save_engine,
)
from tests.adapters.megatron.small_gpt import Case, Layout
from tests.distributed.ranks import Ranks, rank_pool

TP2 = Layout(tp=2, sp=True)
CP2 = Layout(cp=2)
CASES = {
    "DP2-rows": Case("independent-mlp"),
    "TP2xSP-packed": Case("shared-per-head", TP2, packed=True, recompute="full"),
    "TP2-rows": Case("independent-mlp", Layout(tp=2), recompute="selective"),
    "CP2-packed": Case("mlp-gate-conv1d", CP2, packed=True),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks that have not imported Megatron without TransformerEngine."""
    with rank_pool(ends_groups=True, preloaded=False) as get:
        yield get(2)


@pytest.mark.parametrize(
    "name",
    [
        "DP2-rows",
        "TP2xSP-packed",
        pytest.param("TP2-rows", marks=pytest.mark.slow),
        pytest.param("CP2-packed", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_megatrons_own_modules(name: str, two: Ranks) -> None:
    for errors in two.run(engine_agrees, CASES[name], {}):
        worst = max(errors, key=lambda x: errors[x])
        assert errors[worst] <= 1e-12, f"{worst}: {errors[worst]:.2e}"


def test_what_a_layer_is_made_of(two: Ranks) -> None:
    for experts in (False, True):
        for found in two.run(modules_of_a_layer, experts):
            assert found["input_layernorm"] == found["final_layernorm"] == "RMSNorm"
            assert found["linear_qkv"] == "TEColumnParallelLinear"
            assert found["linear_proj"] == "TERowParallelLinear"
            assert found["q_layernorm"] == found["k_layernorm"] == "Norm"
            if experts:
                assert (found["mlp"], found["pre_mlp_layernorm"]) == ("MoELayer", "RMSNorm")
            else:
                assert found["linear_fc1"] == "TELayerNormColumnParallelLinear"
                assert found["pre_mlp_layernorm"] == "IdentityOp"


def test_checkpoints_have_the_same_keys(two: Ranks) -> None:
    """As layers of Megatron's own modules, and as dense layers of TransformerEngine's where keys
    and values are shared."""
    for other, not_dense in two.run(keys_of_kinds, TP2, "shared-per-head"):
        assert other == set()
        assert not_dense
        assert all("gate" in name or "compressor" in name for name in not_dense)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(True, id="from it"),
        pytest.param(False, id="to it", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_load_in_layers_of_the_other_kind(
    engine: bool, two: Ranks, tmp_path: Path
) -> None:
    case = Case("independent-mlp", TP2)
    saved = two.run(save_engine, case, str(tmp_path), engine)
    assert two.run(load_engine, case, str(tmp_path), not engine, saved) == [[], []]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed norm"])
def test_linear_layers_in_8_bits(recompute: bool, two: Ranks) -> None:
    """The attention, its gates and compressors get what the model's dtype is."""
    for ran, dtypes, error in two.run(kinds_in_8_bits, recompute):
        parts = ("self_attention.linear_qkv", "self_attention.linear_proj")
        parts += ("mlp.linear_fc1", "mlp.linear_fc2")
        assert ran == {f"decoder.layers.{i}.{part}" for i in range(2) for part in parts}
        assert dtypes == {"torch.float64"}
        assert error <= 1e-12


@pytest.mark.slow
def test_gradients_with_8_bit_layers_on_split_sequences(two: Ranks) -> None:
    case = Case("independent-mlp", CP2, packed=True, recompute="selective")
    for errors in two.run(engine_agrees, case, dict(IN_8_BITS)):
        assert max(errors.values()) <= 1e-12


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_cuda_graphs_of_mlps(packed: bool, two: Ranks) -> None:
    case = Case("independent-mlp", CP2, packed=packed)
    assert two.run(graphs_without_attention, case) == [True] * 2


@pytest.mark.parametrize("by", ["builder", "object", "function"])
def test_programs_with_transformer_engine(by: str, two: Ranks) -> None:
    assert two.run(programs_agree, by) == [True] * 2


def test_multi_token_prediction(two: Ranks) -> None:
    for names in two.run(predicting_parts):
        assert names.count("NSASelfAttention") == 1
        assert set(names) == {"NSASelfAttention", "RMSNorm"}


def test_what_does_not_go_with_it(two: Ranks) -> None:
    for answer in two.run(refusals_with_engine, CP2):
        assert answer["fp8"] == ""
        told: dict[str, tuple[str, Any]] = {
            "fused": ("linear_qkv", "TELayerNormColumnParallelLinear"),
            "fp8 of Megatron's": ("fp8", "hybrid"),
            "dense": ("context_parallel_size", 2),
        }
        for name, (option, found) in told.items():
            assert f"{option} must be " in answer[name], answer
            assert f", got {found!r}" in answer[name], answer
        assert "use_transformer_engine=True" in answer["fused"]
        for name in ("graphs of all", "graphs of attention"):
            assert " must be one or more of ('mlp', 'moe', " in answer[name], answer
            assert answer[name].startswith(("cuda_graph_scope", "cuda_graph_modules")), answer
