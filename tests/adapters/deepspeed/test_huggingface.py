"""transformers' converted models under ZeRO-3 and DeepSpeed's sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from tests.adapters.deepspeed.huggingface_case import (
    ulysses_on_rank,
    write_models,
    zero3_differences,
)
from tests.distributed.ranks import Ranks

GetRanks = Callable[[int], Ranks]


@pytest.mark.parametrize(
    "case",
    ["load", *(pytest.param(x, marks=pytest.mark.slow) for x in ("convert", "convert-in-context"))],
)
def test_independent_keys_under_zero_3(
    case: str, deepspeed_ranks: GetRanks, tmp_path: Path
) -> None:
    """Equal bits when made, and one step as that of one process."""
    write_models(tmp_path)
    for found in deepspeed_ranks(2).run(zero3_differences, str(tmp_path), case):
        # float32 sums over a hundred tokens in another order, of gradients below 1.
        assert max(found.values()) <= 100 * torch.finfo(torch.float32).eps, found


def test_the_group_of_ulysses(deepspeed_ranks: GetRanks) -> None:
    """Taken from DeepSpeed's attention where that is in use; refused where it is not."""
    for answer in deepspeed_ranks(2).run(ulysses_on_rank):
        assert answer.pop("before") == answer.pop("use_group(None)") == ""
        for name in ("training", "evaluation", "training, evaluation whole", "evaluation whole"):
            assert answer.pop(name) <= 1e-10, name
        assert len(answer) == 3
        for message in answer.values():
            assert message.startswith("sequence_parallel_size of DeepSpeed must be 1 ")
            assert ", got 2" in message
            assert "use_group" in message
