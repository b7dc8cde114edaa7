"""A layer under Megatron by the rule of ``tests/ops/accuracy.py``, how it starts, hybrid models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.adapters.megatron.dense_case import documents_by_option, from_dense_by_option
from tests.adapters.megatron.layer_case import (
    DOCUMENTS,
    differing_starts,
    fresh_weights,
    layer_kinds,
    layer_results,
    padding_changes,
    rotated_like_ours,
    rows_of_boundaries,
    specs_agree,
    starts,
)
from tests.adapters.megatron.small_gpt import VARIANTS, Layout
from tests.distributed.ranks import Ranks
from tests.ops.accuracy import assert_2x

GetRanks = Callable[[int], Ranks]
NSA, DENSE = "NSASelfAttention", "SelfAttention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["independent-mlp", "shared-per-head"])
def test_layer_by_the_2x_rule(variant: str, dtype: torch.dtype, megatron_ranks: GetRanks) -> None:
    ours, plain, x64 = megatron_ranks(1).run(layer_results, variant, dtype)[0]
    assert ours.keys() == plain.keys() == x64.keys()
    bounds = [0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()]
    for name in x64:
        documents = bounds if name in ("output", "input") else None
        assert_2x(ours[name], plain[name], x64[name], dtype, name, cu_seqlens=documents)


def test_rotary_is_that_of_our_layer(megatron_ranks: GetRanks) -> None:
    """Positions within documents; Megatron's angles, up to the longest document's length in
    radians, are float32."""
    error, largest = megatron_ranks(1).run(rotated_like_ours)[0]
    assert error <= max(DOCUMENTS) * torch.finfo(torch.float32).eps * largest


def test_options_of_megatron_do_what_they_do_to_dense_layers(megatron_ranks: GetRanks) -> None:
    """Rotary embeddings, scales and norms, where blocks and window cover every token: float64, so
    equal to rounding. Each option makes other logits than none, or it would not be on."""
    (found,) = megatron_ranks(1).run(from_dense_by_option)
    plain = found["plain"][0]
    for name, (logits, *errors) in found.items():
        assert max(errors) < 1e-12, name
        assert name == "plain" or (logits - plain).abs().max() > 1e-4 * plain.abs().max(), name


@pytest.mark.parametrize("split", ["zigzag_per_document", "zigzag"])
def test_options_of_megatron_in_packed_batches(split: str, megatron_ranks: GetRanks) -> None:
    for found in megatron_ranks(4).run(documents_by_option, Layout(cp=2), split):
        assert found and max(found.values()) < 1e-12, found


@pytest.mark.parametrize(("ranks", "layout"), [(1, Layout()), (4, Layout(tp=2, cp=2, sp=True))])
def test_boundaries_of_megatrons_loaders(
    ranks: int, layout: Layout, megatron_ranks: GetRanks
) -> None:
    assert megatron_ranks(ranks).run(rows_of_boundaries, layout) == [True] * ranks


def test_padded_boundaries_are_where_tokens_lie(megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(padding_changes) == [False]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["host", "GPU"])
def test_every_layout_starts_from_the_same_weights(
    variant: str, on_gpu: bool, megatron_ranks: GetRanks
) -> None:
    weights = megatron_ranks(1).run(fresh_weights, variant, on_gpu)[0]
    for layout in (Layout(tp=2, sp=True), Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2)):
        for names in megatron_ranks(4).run(differing_starts, layout, variant, on_gpu, weights):
            # On a GPU Megatron draws what it splits on each tensor parallel rank apart.
            is_split = on_gpu and layout.tp > 1
            ours = [n for n in names if not is_split or "gate" in n or "compressor" in n]
            assert ours == [], layout


def test_init_methods_draw_the_weights(megatron_ranks: GetRanks) -> None:
    found = megatron_ranks(1).run(starts, True)[0]
    compressors = [f"core_attention.{x}_compressor" for x in "kv"]
    for name in ["linear_qkv", "gate.up", "gate.down"]:
        assert found.pop(f"{name}.weight") == (0.5, 0.5)
    assert found.pop("linear_proj.weight") == (0.25, 0.25)
    assert found.pop("linear_qkv.bias") == found.pop("gate.up.bias") == (0.0, 0.0)
    assert found.pop("gate.down.bias") == (1.0, 3.0)
    for name in compressors:
        assert found.pop(f"{name}.up") == found.pop(f"{name}.down") == (0.5, 0.5)
        assert found.pop(f"{name}.position") == (0.0, 0.0)
    assert found == {}
    megatron_ranks(1).run(starts, False)


def test_the_layer_spec_is_the_block_spec_of_a_layer(megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(specs_agree) == [True]


def test_hybrid_models(megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(layer_kinds, Layout(), (0, 1)) == [([DENSE, NSA], [])]
    kinds = megatron_ranks(4).run(layer_kinds, Layout(pp=2), (0, 1))
    assert kinds == [([DENSE], [])] * 2 + [([NSA], [])] * 2
