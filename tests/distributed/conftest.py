"""Ranks on GPUs, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="module", params=[2, 4], ids="{}_ranks".format)
def gpus(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two and four ranks over NCCL, a GPU each."""
    there = torch.cuda.device_count()
    if there < request.param:
        pytest.skip(f"needs {request.param} CUDA devices, found {there}")
    ranks = Ranks(request.param, timedelta(seconds=120), "nccl")
    yield ranks
    ranks.close()
