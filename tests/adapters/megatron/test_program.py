"""Native Sparse Attention in ``pretrain_gpt.py``: its flags, its model builder, ``--spec``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nsa_dist import NSAConfig
from tests.adapters.megatron.program_case import (
    SMALL_FLAGS,
    builder_agrees,
    kinds_of_mlps,
    layer_numbers,
    layouts_by_arguments,
    named_spec,
    options_without_a_flag,
    parsed_config,
    prediction_layers,
    refusal_in_a_stack,
    refusal_of_program,
    rotary_frequencies,
    specs_agree,
    undecayed,
)
from tests.adapters.megatron.small_gpt import SMALL, Layout
from tests.distributed.ranks import Ranks

GetRanks = Callable[[int], Ranks]
DEFAULT = NSAConfig(SMALL.num_heads, SMALL.num_kv_heads, SMALL.head_dim)

FLAGS: dict[str, NSAConfig] = {
    "": DEFAULT,
    SMALL_FLAGS: SMALL,
    "--nsa-num-init-blocks 0 --nsa-num-local-blocks 3 --nsa-branches window selected": replace(
        DEFAULT, num_init_blocks=0, num_local_blocks=3, branches=("selected", "window")
    ),
    "--nsa-compress linear --nsa-compress-per-head --nsa-shared-kv": replace(
        DEFAULT, compress="linear", compress_per_head=True, independent_kv=False
    ),
    "--nsa-compress-hidden 24 --nsa-gate mlp --nsa-gate-hidden 12 --nsa-gate-init -1 0 2.5": (
        replace(DEFAULT, compress_hidden=24, gate="mlp", gate_hidden=12, gate_init=(-1.0, 0.0, 2.5))
    ),
    "--nsa-shared-kv --nsa-from-dense": replace(
        DEFAULT, independent_kv=False, gate_init=(-10.0, 0.0, 0.0)
    ),
    "--nsa-shared-kv --nsa-from-dense --nsa-gate-init -3 0 0": replace(
        DEFAULT, independent_kv=False, gate_init=(-3.0, 0.0, 0.0)
    ),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str, megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(parsed_config, flags) == [FLAGS[flags]]


def test_every_option_has_a_flag(megatron_ranks: GetRanks) -> None:
    """But those that this attention refuses under Megatron."""
    refused = {"v_head_dim", "compress_pre_rope"}
    assert megatron_ranks(1).run(options_without_a_flag) == [refused]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--nsa-window 0", "window must be an integer of at least 1, got 0"),
        ("--nsa-from-dense", "nsa_shared_kv must be True with --nsa-from-dense, got False"),
    ],
)
def test_flags_that_are_refused(flags: str, told: str, megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(parsed_config, flags) == [told]


@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["", "qk-layernorm"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, Layout()), (4, Layout(tp=2, sp=True)), (4, Layout(tp=2, pp=2, sp=True))],
    ids=["one", "TP2xSP", "TP2xPP2xSP"],
)
def test_the_builder_makes_the_block_specs_model(
    ranks: int, layout: Layout, qk_layernorm: bool, megatron_ranks: GetRanks
) -> None:
    assert megatron_ranks(ranks).run(builder_agrees, layout, qk_layernorm) == [True] * ranks


def test_chunks_of_an_interleaved_pipeline(megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(4).run(layer_numbers) == [[1, 3]] * 2 + [[2, 4]] * 2


@pytest.mark.parametrize("by", ["builder", "spec"])
def test_experts_where_the_config_has_them(by: str, megatron_ranks: GetRanks) -> None:
    assert megatron_ranks(1).run(kinds_of_mlps, by) == [["MLP", "MoELayer"]]


def test_multi_token_prediction_is_sparse(megatron_ranks: GetRanks) -> None:
    ((attentions, norms, layers),) = megatron_ranks(1).run(prediction_layers)
    assert layers == 2
    assert attentions == ["NSASelfAttention"] * 2
    assert norms == ["Norm"] * 5 * 2  # Three of its own and two of the layer in each.


@pytest.mark.parametrize("kind", ["object", "function"])
def test_a_spec_by_name(kind: str, megatron_ranks: GetRanks) -> None:
    """Up to 0.18 an object, from 0.19 on a function."""
    assert megatron_ranks(1).run(specs_agree, kind, Layout()) == [True]
    (called, is_called) = megatron_ranks(1).run(named_spec)[0]
    assert called == is_called


def test_sequence_parallel_by_a_spec(megatron_ranks: GetRanks) -> None:
    layout = Layout(tp=2, sp=True)
    assert megatron_ranks(4).run(specs_agree, "function", layout) == [True] * 4
    for message in megatron_ranks(4).run(specs_agree, "object", layout):
        assert message.startswith("sequence_parallel must be False with --spec")
        assert "nsa_gpt_builder" in message and "got True" in message


@pytest.mark.parametrize(
    ("by", "option", "value"),
    [
        (by, *given)
        for by in ("builder", "spec")
        for given in (
            ("transformer_impl", "transformer_engine"),
            ("transformer_impl", "inference_optimized"),
            ("hybrid_override_pattern", "M*-"),
            ("hybrid_layer_pattern", "M*-"),
            ("is_hybrid_model", True),
            ("heterogeneous_layers_config_path", "layers.json"),
            ("use_legacy_models", True),
            ("modelopt_enabled", True),
        )
    ]
    + [
        ("builder", "reset_attention_mask", True),
        ("builder", "use_torch_fsdp2", True),
        ("builder", "use_megatron_fsdp", True),
        ("builder", "optimizer", "muon"),
        ("builder", "optimizer", "dist_muon"),
    ],
)
def test_arguments_of_another_model(
    by: str, option: str, value: Any, megatron_ranks: GetRanks
) -> None:
    (message,) = megatron_ranks(1).run(refusal_of_program, by, {option: value}, {}, Layout())
    assert f"{option} must be " in message and f"got {value!r}" in message


def test_rope_scaling(megatron_ranks: GetRanks) -> None:
    """A factor that Megatron-LM's programs do not hand to the model, but the builder does."""
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    (of_model,) = megatron_ranks(1).run(rotary_frequencies, scaled)
    (of_eight,) = megatron_ranks(1).run(rotary_frequencies, scaled | {"rope_scaling_factor": 8.0})
    assert of_model[0] == of_model[1] != of_eight[0] == of_eight[1]
    (message,) = megatron_ranks(1).run(refusal_of_program, "spec", scaled, {}, Layout())
    assert message.startswith("rope_scaling_factor must be 8.0 with --spec")
    assert "nsa_gpt_builder" in message and "got 32.0" in message
    scaled["use_rope_scaling"] = False  # Then the factor is not read.
    assert megatron_ranks(1).run(refusal_of_program, "spec", scaled, {}, Layout()) == [""]


def test_interpolation_by_a_spec(megatron_ranks: GetRanks) -> None:
    """Which Megatron-LM hands to the model from 0.19 on, when a spec is a function."""
    given = {"rotary_seq_len_interpolation_factor": 2}
    (message,) = megatron_ranks(1).run(specs_agree, "object", Layout(), given)
    assert message.startswith("rotary_seq_len_interpolation_factor must be None with --spec")
    assert "nsa_gpt_builder" in message and "got 2" in message
    assert megatron_ranks(1).run(refusal_of_program, "spec", given, {}, Layout()) == [""]


def test_a_model_of_mamba_layers(megatron_ranks: GetRanks) -> None:
    (message,) = megatron_ranks(1).run(refusal_in_a_stack)
    assert message.startswith("spec must be that of a stack of layers in a model with Mamba layers")
    assert "got 'LayerFromArguments'" in message


def test_a_spec_beside_the_builder(megatron_ranks: GetRanks) -> None:
    given = {"spec": ["a", "b"]}
    (message,) = megatron_ranks(1).run(refusal_of_program, "builder", given, {}, Layout())
    assert message.startswith(
        "spec must be None or ['nsa_dist.adapters.megatron', 'nsa_spec'] with"
    )
    assert message.endswith("got ['a', 'b']")


def test_multi_token_prediction_by_a_spec(megatron_ranks: GetRanks) -> None:
    """Megatron would make its layers dense."""
    mtp = {"mtp_num_layers": 1}
    (message,) = megatron_ranks(1).run(refusal_of_program, "spec", {}, mtp, Layout())
    assert message.startswith("mtp_num_layers must be None with --spec")
    assert "nsa_gpt_builder" in message and "got 1" in message


def test_streams_split_as_a_whole_with_multi_token_prediction(megatron_ranks: GetRanks) -> None:
    args, mtp = {"dataloader_inter_document_masking": True}, {"mtp_num_layers": 1}
    layout = Layout(cp=2)
    for options, refused in (({}, False), (mtp, True)):
        for message in megatron_ranks(4).run(refusal_of_program, "builder", args, options, layout):
            assert ("mtp_num_layers must be None" in message) == refused, message
    # Each document of its own, as of --sft, is shifted right.
    found = megatron_ranks(4).run(refusal_of_program, "builder", args | {"sft": True}, mtp, layout)
    assert found == [""] * 4


def test_packed_batches_are_split_as_the_arguments_say(megatron_ranks: GetRanks) -> None:
    for answer in megatron_ranks(4).run(layouts_by_arguments, Layout(cp=2)):
        assert len(answer) == 3 and all(answer.values()), answer


@pytest.mark.parametrize(
    "nsa", [{}, {"gate": "static", "compress": "conv1d"}, {"independent_kv": False}]
)
def test_what_is_not_decayed(nsa: dict[str, Any], megatron_ranks: GetRanks) -> None:
    ((names, kept),) = megatron_ranks(1).run(undecayed, nsa)
    ours = [n for n in names if n.endswith(("position", "k_layernorm.weight", "gate.logits"))]
    assert set(ours) <= kept
    matrices = {n for n in names if n.endswith((".up", ".down", "qkv.weight", "proj.weight"))}
    assert matrices and not matrices & kept
    assert all("norm" in n or n.endswith(".bias") for n in kept - set(ours))
