"""``run.timeout``: how long ranks wait for each other, in every group that a run makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.processes.ranks import start_ranks
from launch.settings import Settings
from nsa_dist import NativeSparseAttention
from tests.distributed.bad_call import Outcome, attempt, is_bad_rank
from tests.distributed.ranks import Ranks
from tests.launch.common import tiny

SECONDS = 3.0
SLACK_SECONDS = 10.0


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Processes whose own groups would wait far longer."""
    ranks = Ranks(2, timedelta(seconds=100))
    yield ranks
    ranks.close()


def wait_in_cp_group(settings: Settings) -> tuple[Outcome, list[float]]:
    """The last rank does not come to a forward; and the timeouts of all groups of the run."""
    ranks = start_ranks(settings)
    group = ranks.cp_mesh.get_group()
    groups = (group, ranks.flat_mesh.get_group())
    cpu = torch.device("cpu")
    timeouts = [g._get_backend(cpu).options._timeout.total_seconds() for g in groups]
    layer = NativeSparseAttention(8, settings.attention, group=ranks.cp_mesh)
    dist.barrier()
    if is_bad_rank():
        time.sleep(SECONDS + 1)
        return Outcome(None, "", 0.0), timeouts
    return attempt(lambda: layer(torch.ones(1, 32, 8))), timeouts


def test_a_wait_in_the_cp_group_ends_at_the_timeout(two: Ranks, root: Path) -> None:
    settings = tiny(root, parallel={"cp": 2}, data={"length": 64}, run={"timeout": SECONDS})
    (outcome, timeouts), _ = two.run(wait_in_cp_group, settings)
    assert timeouts == [SECONDS, SECONDS]
    assert outcome.error == "RuntimeError", outcome
    assert outcome.message.startswith("plan: failed after ")
    assert "on rank 0 of the group of global ranks [0, 1]" in outcome.message
    assert SECONDS - 0.5 < outcome.seconds < SECONDS + SLACK_SECONDS


@pytest.mark.parametrize("found", [0.0, -1.0, 2e6, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(root: Path, found: float) -> None:
    with pytest.raises(ValueError, match=r"^run.timeout must be a .*number.*, got "):
        tiny(root, run={"timeout": found})
