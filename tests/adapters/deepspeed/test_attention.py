"""The module is the functional form on one rank, takes Ulysses' place, and refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_dist import NSAConfig
from nsa_dist.adapters.deepspeed import NSADistributedAttention
from tests.adapters.deepspeed.attention_case import (
    beside_ulysses,
    difference,
    make_module,
    refused_on_every_rank,
    rotary_tables,
    tensors,
    with_fewer_kv_heads_than_ranks,
)
from tests.adapters.deepspeed.small_model import SMALL
from tests.distributed.ranks import Ranks

pytest.importorskip("deepspeed")

GetRanks = Callable[[int], Ranks]

# Changes of the config; layout, batch_dim_idx, packed, rotated channels, whether gates are given.
CASES: dict[str, Any] = {
    "rows-batch-first-rotary": ({}, "contiguous", 0, False, 8, False),
    "rows-tokens-first-gates": ({}, "zigzag", 1, False, 0, True),
    "packed-rotary-of-some-channels": ({}, "zigzag_per_document", 0, True, 4, False),
    "packed-tokens-first": ({"compress": "attention_pool"}, "zigzag", 1, True, 8, False),
    "two-branches": ({"branches": ("selected", "window")}, "contiguous", 0, True, 0, False),
}


@pytest.mark.parametrize("name", CASES)
def test_four_ranks_with_two_kv_heads_are_one(deepspeed_ranks: GetRanks, name: str) -> None:
    for found in deepspeed_ranks(4).run(difference, *CASES[name]):
        assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("rotated_here", [False, True], ids=["rotated", "rotary_pos_emb"])
def test_it_stands_where_ulysses_stood(deepspeed_ranks: GetRanks, rotated_here: bool) -> None:
    for found in deepspeed_ranks(2).run(beside_ulysses, rotated_here):
        assert found <= 1e-12


def test_fewer_kv_heads_than_ranks_work_here_alone(deepspeed_ranks: GetRanks) -> None:
    for raised, shape in deepspeed_ranks(4).run(with_fewer_kv_heads_than_ranks):
        assert "2" in raised and "4" in raised, raised
        assert shape == (1, 16, SMALL.num_heads, SMALL.head_dim)


def test_given_gates_leave_static_ones_a_gradient_of_zeros() -> None:
    module = make_module(SMALL, None, "contiguous")
    q, k, v, gates = tensors(SMALL, 1)
    module(q, k, v, 0, gates=gates).sum().backward()
    assert module.gate.logits.grad.count_nonzero() == 0
    module(q, k, v, 0).sum().backward()
    assert module.gate.logits.grad.count_nonzero() > 0


def test_what_cannot_be_built_is_refused_by_name() -> None:
    independent = NSAConfig(4, 2, 8, gate="static")
    cases: list[tuple[NSAConfig, dict[str, Any], str]] = [
        (independent, {}, r"independent_kv must be False .*, got True"),
        (
            replace(SMALL, compress_pre_rope=True),
            {},
            "compress_pre_rope must be False .*, got True",
        ),
        (SMALL, {"layout": "stripes"}, "layout must be one of .*, got 'stripes'"),
        (SMALL, {"backend": "cuda"}, "backend"),
        (
            SMALL,
            {"k_compressor": torch.nn.Identity()},
            r"k_compressor must be None with .*, got an Identity",
        ),
        (
            replace(SMALL, compress="custom"),
            {},
            "k_compressor must be an nn.Module with compress='custom' .*, got None",
        ),
        (SMALL, {"sequence_process_group": "sp"}, "group must be a process group .*, got 'sp'"),
    ]
    for config, options, message in cases:
        with pytest.raises(ValueError, match=message):
            NSADistributedAttention(config, **options)
    with pytest.raises(ValueError, match="config must be an NSAConfig, got 4"):
        NSADistributedAttention(4)


@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_gates_of_hidden_states_must_be_given(gate: Any) -> None:
    module = make_module(replace(SMALL, gate=gate), None, "contiguous")
    q, k, v, gates = tensors(SMALL, 1)
    assert module(q, k, v, 0, gates=gates).shape == q.shape
    assert not any(name.startswith("gate") for name, _ in module.named_parameters())
    message = f"gates must be a tensor with gate='{gate}'.*or use gate='static'.*, got None"
    with pytest.raises(ValueError, match=message):
        module(q, k, v, 0)


def test_what_cannot_be_called_is_refused_by_name() -> None:
    module = make_module(SMALL, None, "contiguous")
    q, k, v, gates = tensors(SMALL, 2)
    cos, sin = rotary_tables(q.shape[1], 8)
    bounds = torch.tensor([0, 64], dtype=torch.int32)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((q, k, v, 2), {}, r"batch_dim_idx must be 0 for .*, got 2"),
        ((q, k, v, True), {}, r"batch_dim_idx must be 0 for .*, got True"),
        ((None, k, v, 0), {}, "q must be a plain tensor, got None"),
        ((q, None, v, 0), {}, "k must be a plain tensor, got None"),
        ((q[..., :3, :], k, v, 0), {}, r"q must have shape \[batch, local tokens, .*, got "),
        ((q, k.flatten(2), v, 0), {}, "k must have four dimensions"),
        ((q, k, v[:, 1:], 0), {}, "v must have shape"),
        ((q, k.float(), v, 0), {}, r"k must be torch.float64 on cpu .*, got torch.float32"),
        ((q.long(), k.long(), v.long(), 0), {}, r"q must hold data in .*, got torch.int64"),
        ((q, k, v, 0, cos), {}, r"rotary_pos_emb must be None or \(cos, sin\), got"),
        (
            (q, k, v, 0, (cos[1:], sin[1:])),
            {},
            r"rotary_pos_emb must be .*64 tokens of the whole.*, got cos",
        ),
        ((q, k, v, 0, (cos, sin[..., :4])), {}, r"rotary_pos_emb must be .*, got sin"),
        ((q, k, v, 0), {"gates": gates[..., :2]}, "gates must have shape"),
        (
            (q, k, v, 0),
            {"cu_seqlens": bounds},
            "cu_seqlens must come with batch size 1, got batch size 2",
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            module(*arguments, **options)


def test_what_one_rank_has_wrong_every_rank_raises(deepspeed_ranks: GetRanks) -> None:
    for found in deepspeed_ranks(4).run(refused_on_every_rank, 2):
        assert "rank 2: batch_dim_idx must be 0 for" in found
