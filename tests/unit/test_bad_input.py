"""Bad input of a call: a ValueError that names the option, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import (
    BlockCompressor,
    NativeSparseAttention,
    NSAConfig,
    RotaryConfig,
    get_plan,
    make_sharding,
    native_sparse_attention,
    shard,
    shard_batch,
    unshard,
)
from nsa_dist.comm.group import context_group
from nsa_dist.plan.layout import check_lengths, make_layout
from tests.unit.bad_input import (
    CPU,
    CUSTOM,
    HIDDEN,
    PRE_ROPE,
    SHARED,
    SMALL,
    TOKENS,
    WINDOW_ONLY,
    Case,
    Fixed,
    assert_refused,
    cu,
    named,
    tokens,
)


def forward(
    x: Any = None, config: NSAConfig = SMALL, layer: dict[str, Any] | None = None, **inputs: Any
) -> Callable[[], Any]:
    def call() -> Any:
        built = NativeSparseAttention(HIDDEN, config, **(layer or {}))
        return built(tokens() if x is None else x, **inputs)

    return call


def functional(config: Any = SMALL, **changes: Any) -> Callable[[], Any]:
    """The functional form with good inputs for ``config``, but for the changes."""

    def call() -> Any:
        known = config if isinstance(config, NSAConfig) else SMALL
        heads, kv_heads = known.num_heads, known.num_kv_heads
        k, v = tokens(1, TOKENS, kv_heads, 8), tokens(1, TOKENS, kv_heads, 6)
        independent = known.independent_kv
        built_in = known.compress != "custom"
        inputs: dict[str, Any] = {
            "q": tokens(1, TOKENS, heads, 8),
            "k": dict.fromkeys(known.key_branches, k) if independent else k,
            "v": dict.fromkeys(known.branches, v) if independent else v,
            "gates": tokens(1, TOKENS, heads, len(known.branches)),
            "rotary": RotaryConfig() if known.compress_pre_rope else None,
        }
        if known.uses_compression and built_in:
            inputs["k_compressor"] = BlockCompressor(known, 8)
            inputs["v_compressor"] = BlockCompressor(known, 6)
        return native_sparse_attention(**(inputs | changes), config=config)

    return call


def keys(**changes: Any) -> dict[str, Any]:
    return dict.fromkeys(SMALL.key_branches, tokens(1, TOKENS, 2, 8)) | changes


def plan(config: Any = SMALL, length: int = TOKENS, **options: Any) -> Any:
    given = dict(batch=1, local_length=length, cu_seqlens=None, dtype=torch.float32, device=CPU)
    return get_plan(config, "zigzag", None, **(given | options))


def check_split(
    layout: str, size: int, length: int, cu_seqlens: Tensor | None = None
) -> Callable[[], None]:
    """What a group of ``size`` ranks would be told."""

    def call() -> None:
        problem = check_lengths(make_layout(layout, size), 1, length, cu_seqlens)
        if problem is not None:
            raise ValueError(problem)

    return call


FORWARD_CASES: dict[str, Case] = {
    "x-list": (forward([0.0]), "x: a list; tensor"),
    "x-one-row": (forward(tokens(TOKENS, HIDDEN)), "x: (32, 24); [batch, local tokens, hidden"),
    "x-scalar": (forward(torch.tensor(0.0)), "x: (); [batch, local tokens, hidden"),
    "x-other-width": (forward(tokens(1, TOKENS, 23)), "x: (1, 32, 23); hidden_size=24"),
    "x-integers": (forward(tokens(dtype=torch.int64)), "x: torch.int64; torch.float32"),
    "x-complex": (forward(tokens(dtype=torch.complex64)), "x: torch.complex64; torch.float32"),
    "x-other-dtype-than-weights": (
        forward(tokens(dtype=torch.float64)),
        "x: torch.float64; torch.float32",
    ),
    "x-on-meta": (forward(tokens(device="meta")), "x: on meta; data"),
    "x-other-device-than-weights": (forward(layer={"device": "meta"}), "x: on cpu; on meta"),
    "position_ids-list": (forward(position_ids=[0]), "position_ids: a list; (1, 32)"),
    "position_ids-shape": (
        forward(position_ids=torch.arange(TOKENS)),
        "position_ids: (32,); shape (1, 32)",
    ),
    "position_ids-float": (
        forward(position_ids=tokens(1, TOKENS)),
        "position_ids: torch.float32; integers",
    ),
    "position_ids-bool": (
        forward(position_ids=tokens(1, TOKENS, dtype=torch.bool)),
        "position_ids: torch.bool; integers",
    ),
    "position_ids-device": (
        forward(position_ids=tokens(1, TOKENS, dtype=torch.int64, device="meta")),
        "position_ids: meta; on cpu",
    ),
    "position_ids-with-pre-rope": (
        forward(config=PRE_ROPE, position_ids=torch.arange(TOKENS)[None]),
        "position_ids: positions; None with compress_pre_rope=True",
    ),
    "cu_seqlens-list": (forward(cu_seqlens=[0, TOKENS]), "cu_seqlens: a list; int32 tensor"),
    "cu_seqlens-int64": (
        forward(cu_seqlens=cu(0, TOKENS, dtype=torch.int64)),
        "cu_seqlens: torch.int64; int32",
    ),
    "cu_seqlens-two-dimensions": (
        forward(cu_seqlens=cu(0, TOKENS)[None]),
        "cu_seqlens: (1, 2); vector",
    ),
    "cu_seqlens-scalar": (forward(cu_seqlens=cu(TOKENS)[0]), "cu_seqlens: (); vector"),
    "cu_seqlens-one-boundary": (forward(cu_seqlens=cu(0)), "cu_seqlens: (1,); at least two"),
    "cu_seqlens-on-meta": (
        forward(cu_seqlens=cu(0, TOKENS).to("meta")),
        "cu_seqlens: on meta; int32 tensor",
    ),
    "cu_seqlens-first": (forward(cu_seqlens=cu(1, TOKENS)), "cu_seqlens: boundary 1; start at 0"),
    "cu_seqlens-unsorted": (
        forward(cu_seqlens=cu(0, 20, 9, TOKENS)),
        "cu_seqlens: 20 before 9; sorted",
    ),
    "cu_seqlens-negative": (
        forward(cu_seqlens=cu(0, -4, TOKENS)),
        "cu_seqlens: 0 before -4; sorted",
    ),
    "cu_seqlens-slack-rows": (
        forward(cu_seqlens=cu(0, 9, 30)),
        "cu_seqlens: last boundary 30; length 32",
    ),
    "cu_seqlens-past-the-end": (
        forward(cu_seqlens=cu(0, 40)),
        "cu_seqlens: last boundary 40; length 32",
    ),
    "cu_seqlens-with-two-rows": (
        forward(tokens(2, TOKENS, HIDDEN), cu_seqlens=cu(0, TOKENS)),
        "cu_seqlens: last boundary 32; 2 rows of 32",
    ),
    "cu_seqlens-over-two-rows": (
        forward(tokens(2, TOKENS, HIDDEN), cu_seqlens=cu(0, 9, 2 * TOKENS)),
        "cu_seqlens: none at 32; start of each of the 2 rows",
    ),
    "custom-k_compressor-shape": (
        forward(
            config=CUSTOM, layer={"k_compressor": Fixed(tokens(3)), "v_compressor": Fixed(None)}
        ),
        "compressor: shape (3,); (15, 2, 8)",
    ),
    "custom-v_compressor-nothing": (
        forward(
            config=CUSTOM,
            layer={"k_compressor": Fixed(tokens(15, 2, 8)), "v_compressor": Fixed(None)},
        ),
        "compressor: None; (15, 2, 6)",
    ),
    "custom-compressor-integers": (
        forward(
            config=CUSTOM,
            layer={
                "k_compressor": Fixed(tokens(15, 2, 8, dtype=torch.int64)),
                "v_compressor": Fixed(None),
            },
        ),
        "compressor: torch.int64; floating point",
    ),
}
LENGTH_CASES: dict[str, Case] = {
    "length-contiguous": (check_split("contiguous", 4, 30), "length: 30; multiple of 4"),
    "length-zigzag": (check_split("zigzag", 4, 36), "length: 36; multiple of 8"),
    "length-zigzag-packed": (
        check_split("zigzag", 2, 30, cu(0, 16, 30)),
        "length: 30; multiple of 4",
    ),
    "length-zigzag_per_document-unpacked": (
        check_split("zigzag_per_document", 2, 30),
        "length: 30; multiple of 4",
    ),
    "document-zigzag_per_document": (
        check_split("zigzag_per_document", 2, 32, cu(0, 8, 18, 32)),
        "document length: 10 (document 1); multiple of 4",
    ),
}
FUNCTIONAL_CASES: dict[str, Case] = {
    "config-none": (functional(None), "config: None; an NSAConfig"),
    "q-none": (functional(q=None), "q: None; tensor"),
    "q-no-batch": (functional(q=tokens(TOKENS, 4, 8)), "q: (32, 4, 8); [batch, local tokens"),
    "q-other-heads": (functional(q=tokens(1, TOKENS, 3, 8)), "q: (1, 32, 3, 8); num_heads=4"),
    "q-other-width": (functional(q=tokens(1, TOKENS, 4, 6)), "q: (1, 32, 4, 6); head_dim=8"),
    "q-integers": (
        functional(q=tokens(1, TOKENS, 4, 8, dtype=torch.int32)),
        "q: torch.int32; torch.float16",
    ),
    "q-on-meta": (functional(q=tokens(1, TOKENS, 4, 8, device="meta")), "q: on meta; data"),
    "k-none": (functional(k=None), "k: None; map"),
    "k-list": (functional(k=list(keys().values())), "k: a list; map"),
    "k-one-tensor": (
        functional(k=tokens(1, TOKENS, 2, 8)),
        "k: torch.float32; map ('compressed', 'selected', 'window') to tensors with",
    ),
    "k-shared-a-mapping": (
        functional(SHARED, k=keys()),
        "k: a mapping; one tensor with independent_kv=False",
    ),
    "k-missing-branch": (
        functional(k={"window": tokens(1, TOKENS, 2, 8)}),
        "k: ('window',); map ('compressed', 'selected', 'window')",
    ),
    "k-extra-branch": (
        functional(k=keys(dense=tokens(1))),
        "k: 'dense'; map ('compressed', 'selected', 'window')",
    ),
    "k-not-tensors": (functional(k=keys(selected=None)), "k['selected']: None; tensor"),
    "k-query-heads": (
        functional(k=keys(window=tokens(1, TOKENS, 4, 8))),
        "k['window']: (1, 32, 4, 8); (1, 32, 2, 8)",
    ),
    "k-other-length": (
        functional(k=keys(compressed=tokens(1, 31, 2, 8))),
        "k['compressed']: (1, 31, 2, 8); (1, 32, 2, 8)",
    ),
    "k-other-dtype": (
        functional(k=keys(window=tokens(1, TOKENS, 2, 8, dtype=torch.float64))),
        "k['window']: torch.float64; torch.float32",
    ),
    "k-other-device": (
        functional(SHARED, k=tokens(1, TOKENS, 2, 8, device="meta")),
        "k: meta; cpu",
    ),
    "v-key-width": (
        functional(SHARED, v=tokens(1, TOKENS, 2, 8)),
        "v: (1, 32, 2, 8); (1, 32, 2, 6)",
    ),
    "v-missing-branch": (functional(v={}), "v: (); map ('compressed', 'selected', 'window')"),
    "gates-none": (functional(gates=None), "gates: None; a plain tensor"),
    "gates-other-branches": (
        functional(gates=tokens(1, TOKENS, 4, 2)),
        "gates: (1, 32, 4, 2); (1, 32, 4, 3)",
    ),
    "gates-bool": (
        functional(gates=tokens(1, TOKENS, 4, 3, dtype=torch.bool)),
        "gates: torch.bool; floating dtype",
    ),
    "gates-other-device": (
        functional(gates=tokens(1, TOKENS, 4, 3, device="meta")),
        "gates: on meta; on cpu",
    ),
    "rotary-not-given": (functional(PRE_ROPE, rotary=None), "rotary: None; a RotaryConfig or"),
    "rotary-of-rotated-keys": (
        functional(rotary=RotaryConfig()),
        "rotary: a RotaryConfig; None with compress_pre_rope=False",
    ),
    "rotary-name": (functional(PRE_ROPE, rotary="yarn"), "rotary: a str; (cos, sin)"),
    "rotary-over-head_dim": (
        functional(PRE_ROPE, rotary=RotaryConfig(dim=12)),
        "rotary dim: 12; up to head_dim = 8",
    ),
    "rotary-wide-tables": (
        functional(PRE_ROPE, rotary=(tokens(TOKENS, 5), tokens(TOKENS, 5))),
        "rotary: (32, 5); up to 4",
    ),
    "rotary-unequal-tables": (
        functional(PRE_ROPE, rotary=(tokens(TOKENS, 4), tokens(TOKENS, 3))),
        "rotary: (32, 3); one shape",
    ),
    "rotary-integer-tables": (
        functional(PRE_ROPE, rotary=(tokens(TOKENS, 4, dtype=torch.int64),) * 2),
        "rotary: torch.int64; floating point",
    ),
    "rotary-short-tables": (
        functional(PRE_ROPE, rotary=(tokens(31, 4), tokens(31, 4))),
        "rotary: 31; at least 32 positions",
    ),
    "layout-unknown": (functional(layout="ring"), "layout: 'ring'; 'zigzag'"),
    "backend-unknown": (functional(backend="flash"), "backend: 'flash'; 'pytorch'"),
    "k_compressor-not-given": (
        functional(k_compressor=None),
        "k_compressor: None; a BlockCompressor",
    ),
    "k_compressor-name": (functional(k_compressor="mlp"), "k_compressor: a str; a BlockCompressor"),
    "k_compressor-of-users": (
        functional(k_compressor=Fixed(None)),
        "k_compressor: Fixed; a BlockCompressor with compress='mlp'",
    ),
    "k_compressor-of-ours-with-custom": (
        functional(CUSTOM, k_compressor=BlockCompressor(SMALL, 8), v_compressor=Fixed(None)),
        "k_compressor: BlockCompressor; a module of your own with compress='custom'",
    ),
    "k_compressor-other-kind": (
        functional(k_compressor=BlockCompressor(replace(SMALL, compress="linear"), 8)),
        "k_compressor: 'linear'; 'mlp'",
    ),
    "k_compressor-other-block": (
        functional(k_compressor=BlockCompressor(replace(SMALL, compress_block=8), 8)),
        "k_compressor: 8; compress_block=4",
    ),
    "k_compressor-other-hidden": (
        functional(k_compressor=BlockCompressor(replace(SMALL, compress_hidden=5), 8)),
        "k_compressor: 5; compress_hidden=16",
    ),
    "k_compressor-per-head": (
        functional(k_compressor=BlockCompressor(replace(SMALL, compress_per_head=True), 8)),
        "k_compressor: True; compress_per_head=False",
    ),
    "v_compressor-key-width": (
        functional(v_compressor=BlockCompressor(SMALL, 8)),
        "v_compressor: 8; width=6",
    ),
    "v_compressor-not-used": (
        functional(WINDOW_ONLY, v_compressor=BlockCompressor(SMALL, 6)),
        "v_compressor: a BlockCompressor; None with branches=('window',)",
    ),
    "plan-of-other-config": (
        lambda: functional(plan=plan(replace(SMALL, window=3)))(),
        "plan: window=3; window=9",
    ),
    "plan-of-other-length": (lambda: functional(plan=plan(length=64))(), "plan: (1, 64); (1, 32)"),
    "plan-beside-cu_seqlens": (
        lambda: functional(plan=plan(), cu_seqlens=cu(0, TOKENS))(),
        "cu_seqlens: boundaries; None with a plan",
    ),
    "plan-config-none-with-grids": (
        lambda: plan(None, selector_grids={}),
        "config: None; an NSAConfig",
    ),
    "plan-config-none": (lambda: plan(None), "config: None; an NSAConfig"),
}
IDS = torch.zeros(1, TOKENS, dtype=torch.int64)
SHARDING_CASES: dict[str, Case] = {
    "tokens-list": (lambda: shard_batch([[1, 2]]), "tokens: a list; integers [batch, length]"),
    "tokens-float": (lambda: shard_batch(tokens(1, 8)), "tokens: torch.float32; integers"),
    "tokens-one-dimension": (lambda: shard_batch(IDS[0]), "tokens: (32,); [batch, length]"),
    "labels-shape": (lambda: shard_batch(IDS, labels=IDS[:, 1:]), "labels: (1, 31); (1, 32)"),
    "labels-float": (lambda: shard_batch(IDS, labels=tokens(1, 32)), "labels: float32; integ"),
    "pad_token-float": (lambda: shard_batch(IDS, pad_token=0.5), "pad_token: 0.5; an integer"),
    "shard_batch-cu_seqlens-two-rows": (
        lambda: shard_batch(IDS.expand(2, -1), cu_seqlens=cu(0, TOKENS)),
        "cu_seqlens: batch size 2; batch size 1",
    ),
    "shard_batch-cu_seqlens-unsorted": (
        lambda: shard_batch(IDS, cu_seqlens=cu(0, 9, 8, TOKENS)),
        "cu_seqlens: 9 before 8; sorted",
    ),
    "shard_batch-cu_seqlens-last": (
        lambda: shard_batch(IDS, cu_seqlens=cu(0, 31)),
        "cu_seqlens: last boundary 31; length 32",
    ),
    "shard_batch-cu_seqlens-list": (
        lambda: shard_batch(IDS, cu_seqlens=[0, TOKENS]),
        "cu_seqlens: a list; an int32 tensor",
    ),
    "shard_batch-layout": (lambda: shard_batch(IDS, layout="x"), "layout: 'x'; 'zigzag'"),
    "shard_batch-group": (lambda: shard_batch(IDS, group=4), "group: 4; a process group"),
    "shard-one-dimension": (lambda: shard(tokens(8)), "x: (8,); [batch, length, ...]"),
    "shard-cu_seqlens-two-rows": (
        lambda: shard(tokens(2, 8), cu_seqlens=cu(0, 8)),
        "cu_seqlens: batch size 2; batch size 1",
    ),
    "make_sharding-length-negative": (lambda: make_sharding(-3), "length: -3; at least 0"),
    "make_sharding-length-float": (lambda: make_sharding(8.0), "length: 8.0; an integer"),
    "sharding-other-length": (
        lambda: make_sharding(TOKENS).shard(tokens(1, 31)),
        "x: (1, 31); [batch, 32, ...]",
    ),
    "unshard-other-length": (
        lambda: unshard(tokens(1, TOKENS), 31),
        "x: (1, 32); [batch, 31, ...]",
    ),
    "unshard-list": (lambda: unshard([1], 31), "x: a list; tensor"),
    "context_group-int": (lambda: context_group(0), "group: 0; a process group"),
}
CASES = named(
    forward=FORWARD_CASES,
    length=LENGTH_CASES,
    functional=FUNCTIONAL_CASES,
    sharding=SHARDING_CASES,
)


@pytest.mark.parametrize("name", CASES)
def test_refused_with_option_value_and_what_is_allowed(name: str) -> None:
    assert_refused(CASES[name])


def test_the_good_calls_behind_the_cases_pass() -> None:
    """Each case changes little of a call that works, so that nothing else can be the reason."""
    custom = {"k_compressor": Fixed(tokens(15, 2, 8)), "v_compressor": Fixed(tokens(15, 2, 6))}
    for call in (
        forward(),
        forward(cu_seqlens=cu(0, 20, TOKENS)),
        forward(position_ids=torch.arange(TOKENS)[None]),
        forward(config=PRE_ROPE),
        forward(config=CUSTOM, layer=custom),
        check_split("zigzag", 4, 32),
        check_split("zigzag_per_document", 2, 32, cu(0, 8, 20, 32)),
        functional(),
        functional(SHARED),
        functional(PRE_ROPE),
        functional(PRE_ROPE, rotary=(tokens(TOKENS, 4), tokens(TOKENS, 4))),
        functional(WINDOW_ONLY),
        functional(CUSTOM, **custom),
        lambda: functional(plan=plan())(),
        lambda: shard_batch(IDS, labels=IDS, cu_seqlens=cu(0, 9, TOKENS), pad_token=3),
        lambda: unshard(tokens(1, TOKENS), TOKENS),
    ):
        call()
