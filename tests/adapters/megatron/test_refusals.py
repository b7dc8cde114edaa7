"""What Megatron can ask for and the layer cannot do is refused by name, before training."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_dist.adapters.megatron.masks import check_mask
from nsa_dist.comm import CommunicationCounter
from nsa_dist.comm.group import SINGLE
from tests.adapters.megatron.layer_case import (
    refusal,
    refusal_of_block,
    refusal_of_call,
    refusal_of_modules,
    refusals_of_experts,
    refusals_of_masks,
)
from tests.adapters.megatron.small_gpt import Layout
from tests.distributed.ranks import Ranks

GetRanks = Callable[[int], Ranks]
ONE = Layout()

OPTIONS: dict[str, Any] = {
    "attention_dropout": 0.1,
    "softmax_type": "learnable",
    "window_size": (128, 0),
    "window_attn_skip_freq": 2,
    "attention_output_gate": True,
    "apply_query_key_layer_scaling": True,
    "qk_clip": True,
    "log_max_attention_logit": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "fp8": "e4m3",
    "fp4": "e2m1",
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "apply_rope_fusion": True,
    "fused_single_qkv_rope": True,
    "mrope_section": [2, 1, 1],
    "is_hybrid_model": True,
    "hybrid_context_parallel": True,
    "hierarchical_context_parallel_sizes": [2, 2],
    "flash_decode": True,
    "cuda_graph_impl": "local",
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "fine_grained_activation_offloading": True,
    "cpu_offloading": True,
    "delay_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "tp_comm_overlap": True,
    "gtp_weight_remat_size": 2,
    "batch_invariant_mode": True,
    "test_mode": True,
    "use_kitchen": True,
    "init_model_with_meta_device": True,
    "enable_autocast": True,
    "cp_comm_type": ["p2p", "a2a"],
    "softmax_scale": 0.5,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "context_parallel_size": 2,
}
NSA_OPTIONS: dict[str, dict[str, Any]] = {
    "compress_pre_rope": {"compress_pre_rope": True},
    "compress": {"compress": "custom"},
    "v_head_dim": {"v_head_dim": 4},
}
SPEC_OPTIONS: dict[str, Any] = {
    "multi_latent_attention": True,
    "fp8": "e4m3",
    "use_kitchen": True,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "use_transformer_engine": True,
    "backend": "cuda",
    "from_dense": True,
}


def _assert_names(message: str, option: str, found: Any) -> None:
    assert option in message, message
    assert " must be " in message and f", got {found!r}" in message, message


def _built(ranks: Ranks, layout: Layout = ONE, **given: dict[str, Any]) -> list[str]:
    parts = (given.get(name, {}) for name in ("options", "nsa", "spec"))
    return ranks.run(refusal, layout, *parts)


def test_nothing_refused_is_built(megatron_ranks: GetRanks) -> None:
    options = {"cp_comm_type": "p2p", "fp32_residual_connection": True, "softmax_scale": 8**-0.5}
    assert _built(megatron_ranks(1), options=options) == [""]


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_megatron(option: str, megatron_ranks: GetRanks) -> None:
    (message,) = _built(megatron_ranks(1), options={option: OPTIONS[option]})
    of_nsa = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
    _assert_names(message, option, of_nsa.get(option, OPTIONS[option]))


@pytest.mark.parametrize("option", NSA_OPTIONS)
def test_options_of_the_attention(option: str, megatron_ranks: GetRanks) -> None:
    (message,) = _built(megatron_ranks(1), nsa=NSA_OPTIONS[option])
    _assert_names(message, option, NSA_OPTIONS[option][option])


@pytest.mark.parametrize("option", SPEC_OPTIONS)
def test_options_of_the_spec(option: str, megatron_ranks: GetRanks) -> None:
    (message,) = _built(megatron_ranks(1), spec={option: SPEC_OPTIONS[option]})
    # The config, which says False, is what is wrong where the spec norms queries and keys.
    names = {
        "qk_layernorm": ("qk_layernorm", False),
        "qk_l2_norm": ("qk_l2_norm", False),
        "from_dense": ("independent_kv", True),
    }
    option, found = names.get(option, (option, SPEC_OPTIONS[option]))
    _assert_names(message, option, found)


@pytest.mark.parametrize("name", ["linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"])
def test_modules_of_transformer_engine(name: str, megatron_ranks: GetRanks) -> None:
    (message,) = megatron_ranks(1).run(refusal_of_modules, name)
    _assert_names(message, name, "TELinear")


@pytest.mark.parametrize(
    "option",
    [
        "inference_context",
        "inference_params",
        "key_value_states",
        "attention_bias",
        "qkv_format",
        "local_cp_size",
        "cu_seqlens_q",
        "cu_seqlens_q of two rows",
        "mtp_num_layers",
    ],
)
def test_calls(option: str, megatron_ranks: GetRanks) -> None:
    (message,) = megatron_ranks(1).run(refusal_of_call, option)
    assert option.split(" ")[0] in message
    assert " must be " in message and ", got " in message


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, ONE), (4, Layout(tp=2, cp=2, sp=True))], ids=["one", "tp2-cp2-sp"]
)
def test_masks_that_are_more_than_causal(
    ranks: int, layout: Layout, megatron_ranks: GetRanks
) -> None:
    """As --reset-attention-mask makes them: refused on every rank, whatever its own rows show."""
    answers = megatron_ranks(ranks).run(refusals_of_masks, layout)
    for answer in answers:
        fine = {name for name, message in answer.items() if message == ""}
        assert fine == {f"{x}{y}" for x in ("causal", "one for all rows") for y in ("", ", again")}
        for name in answer.keys() - fine:
            told = r"attention_mask must be None .*, got torch\."
            assert re.search(told, answer[name]), name
        assert "packed_seq_params" in answer["documents"]


def test_mlps_that_are_not_the_configs(megatron_ranks: GetRanks) -> None:
    (answer,) = megatron_ranks(1).run(refusals_of_experts)
    for name in ("dense", "experts", "every second", "listed"):
        assert answer.pop(name) == "", name
    found = {"num_moe_experts": 4, "num_moe_experts, None": None, "moe_layer_freq": 2}
    assert answer.keys() == found.keys()
    for name, value in found.items():
        _assert_names(answer[name], name.split(",")[0], value)


def test_tensor_parallel_beyond_the_kv_heads(megatron_ranks: GetRanks) -> None:
    for message in _built(megatron_ranks(4), Layout(tp=4)):
        _assert_names(message, "tensor_model_parallel_size", 4)
        assert "num_query_groups = 2" in message


def test_blocks_of_unlike_layers(megatron_ranks: GetRanks) -> None:
    for message in megatron_ranks(4).run(refusal_of_block, Layout(cp=2), (0, 1), True):
        _assert_names(message, "context_parallel_size", 2)
    (message,) = megatron_ranks(1).run(refusal_of_block, Layout(), (0, 1), False)
    _assert_names(message, "hetereogenous_dist_checkpoint", False)
    (message,) = megatron_ranks(1).run(refusal_of_block, Layout(), (1, 2), False)
    _assert_names(message, "layers", (1, 2))


def test_masks_made_in_inference_mode() -> None:
    """Nothing counts what changes in them: each is read each time."""
    counter = CommunicationCounter()
    with torch.inference_mode():
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        for _ in range(2):
            check_mask(mask, 8, SINGLE, counter)
        mask[0, 0, 5, 2] = True
        with pytest.raises(ValueError, match="attention_mask must be None or the causal mask"):
            check_mask(mask, 8, SINGLE, counter)
