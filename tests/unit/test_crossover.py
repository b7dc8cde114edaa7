"""The hint that a dense attention would be faster is given where it is true, and once."""

from __future__ import annotations

import warnings

import pytest
import torch

from nsa_dist import crossover

GPU = next(iter(crossover.CROSSOVER))
AT = crossover.CROSSOVER[GPU]


@pytest.fixture(autouse=True)
def _in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_warned_on", set())
    monkeypatch.setattr(crossover, "_name", lambda device: GPU)


def hint(
    longest: int,
    device: str = "cuda",
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crossover.hint_at_crossover(longest, torch.device(device), backend, dtype)
    return [str(warning.message) for warning in caught]


def test_below_the_crossover_it_is_said_once() -> None:
    (said,) = hint(AT - 1)
    assert f"has {AT - 1} tokens" in said and GPU in said and str(AT) in said
    assert not hint(AT - 2)


@pytest.mark.parametrize("longest, device", [(AT, "cuda"), (AT - 1, "cpu")])
def test_nothing_is_said_elsewhere(longest: int, device: str) -> None:
    assert not hint(longest, device)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert not hint(16, backend="pytorch")
    assert not hint(16, dtype=torch.float32)


def test_nothing_is_said_of_a_gpu_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_name", lambda device: "another GPU")
    assert not hint(16)
