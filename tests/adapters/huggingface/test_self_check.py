"""The self-check on a converted model: it sees the attentions of an adapter as its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from nsa_dist import ParallelReport, check_parallel, shard_batch
from tests.adapters.huggingface.small_models import (
    DOCUMENTS,
    INDEPENDENT,
    loss_of,
    some_tokens,
    sparse_model,
)
from tests.distributed.ranks import Ranks


def checked(layout: str, cut_as: str) -> ParallelReport:
    group = dist.group.WORLD
    model = sparse_model("qwen3", INDEPENDENT, group=group, layout=layout, dtype=torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
    tokens = some_tokens(1, sum(DOCUMENTS))
    batch = shard_batch(tokens, cu_seqlens=bounds, layout=cut_as, group=group)

    def run() -> None:
        loss_of(model, batch).backward()

    return check_parallel(model, run, batch)


def test_a_converted_model_is_checked(ranks_of: Callable[[int], Ranks]) -> None:
    report = ranks_of(2).run(checked, "zigzag", "zigzag")[0]
    assert report.ok, str(report)
    layers = {one.layer for one in report.differences}
    assert layers == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert {"positions", "blocks", "out", "grad of k, window"} <= set(report.largest)
