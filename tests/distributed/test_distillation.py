"""Distillation from dense attention needs whole sequences, and says so on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from nsa_dist import NativeSparseAttention, NSAConfig, distill_dense
from tests.distributed.ranks import Ranks


def refusal() -> str:
    config = NSAConfig(2, 1, 8, compress_block=4, compress_stride=2, select_block=4, window=8)
    layer = NativeSparseAttention(16, config, group=dist.group.WORLD, backend="pytorch")
    x, found = torch.randn(1, 32, 16), ""
    try:
        with distill_dense():
            layer(x)
    except ValueError as error:
        found = str(error)
    layer(x)  # And the next good call works.
    return found


def test_a_split_sequence_is_refused(ranks_of: Callable[[int], Ranks]) -> None:
    message = "group must have one rank in distill_dense (its dense attention has), got 2"
    assert ranks_of(2).run(refusal) == [message] * 2
