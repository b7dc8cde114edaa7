"""Checkpoints: on the same ranks as they are, elsewhere in DeepSpeed's universal form.

The next three losses are those of the run that was not broken off: by the loss rule, 1e-5 in
float32, and on the same mesh bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters.deepspeed.case import Case, Run, run_command
from tests.distributed.ranks import Ranks

pytest.importorskip("deepspeed")

GetRanks = Callable[[int], Ranks]
Losses = list[float]
SAVED = Case(dp=1, cp=2, lr=1e-2, adam=True)
TAG = "half"


def saved_and_on(case: Case, folder: str) -> tuple[Losses, list[str]]:
    """Two steps, a checkpoint, three more: their losses, and the parameters that did not change:
    those of the attention change by their gradient alone, without weight decay."""
    run = Run(case)
    before = run.weights()
    for step in range(2):
        run.step(step)
    after = run.weights()
    idle = [name for name in before if bool((after[name] == before[name]).all())]
    run.engine.save_checkpoint(folder, tag=TAG, client_state={"note": 7})
    return [run.step(step) for step in range(2, 5)], idle


def loaded(case: Case, folder: str, universal: bool) -> Losses:
    """Three steps from the checkpoint."""
    from nsa_dist.adapters.deepspeed import load_checkpoint

    run = Run(case, universal)
    path, state = load_checkpoint(run.engine, folder, None if not universal else f"{TAG}_universal")
    assert TAG in path
    assert state["note"] == 7
    return [run.step(step) for step in range(2, 5)]


def refused(case: Case, folder: str, tag: str | None, universal: bool = False) -> str:
    from nsa_dist.adapters.deepspeed import load_checkpoint

    run = Run(case, universal)
    with pytest.raises(ValueError) as error:
        load_checkpoint(run.engine, folder, tag)
    return str(error.value)


@pytest.fixture(scope="module")
def saved(
    deepspeed_ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[str, Losses]]:
    """A checkpoint of a stage, and the losses after it."""
    done: dict[int, tuple[str, Losses]] = {}

    def get(stage: int) -> tuple[str, Losses]:
        if stage not in done:
            folder = str(tmp_path_factory.mktemp(f"ZeRO{stage}"))
            (losses, idle), *_ = deepspeed_ranks(2).run(
                saved_and_on, replace(SAVED, stage=stage), folder
            )
            assert idle == []
            done[stage] = folder, losses
        return done[stage]

    return get


def assert_close(found: Losses, expected: Losses) -> None:
    assert len(found) == len(expected) == 3
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", range(4))
def test_the_same_mesh_goes_on_bit_for_bit(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]], stage: int
) -> None:
    folder, losses = saved(stage)
    for found in deepspeed_ranks(2).run(loaded, replace(SAVED, stage=stage), folder, False):
        assert found == losses


@pytest.mark.parametrize("stage", range(4))
def test_as_many_ranks_go_on_however_they_split_sequences(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]], stage: int
) -> None:
    folder, losses = saved(stage)
    case = replace(SAVED, stage=stage, dp=2, cp=1)
    for found in deepspeed_ranks(2).run(loaded, case, folder, False):
        assert_close(found, losses)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_numbers_of_ranks_go_on_by_the_command_that_the_refusal_names(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]], stage: int
) -> None:
    folder, losses = saved(stage)
    elsewhere = [replace(SAVED, stage=stage, dp=dp, cp=cp) for dp, cp in ((2, 2), (1, 4), (1, 1))]
    for message in deepspeed_ranks(4).run(refused, elsewhere[0], folder, None):
        assert "world size: found 4 with a checkpoint of 2 ranks" in message
    command = re.search(r"(python -m deepspeed.*) and {", message)
    assert command, message
    run_command(command[1])
    for case in (*elsewhere, replace(SAVED, stage=stage)):
        for found in deepspeed_ranks(case.size).run(loaded, case, folder, True):
            assert_close(found, losses)


def test_without_zero_any_number_of_ranks_goes_on(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]]
) -> None:
    folder, losses = saved(0)
    for found in deepspeed_ranks(4).run(loaded, replace(SAVED, dp=2), folder, False):
        assert_close(found, losses)


@pytest.mark.parametrize(
    "stage, others, works", [(0, (1, 3), "0"), (1, (0, 3), "1 or 2"), (3, (0, 2), "3")]
)
def test_other_stages_are_refused(
    deepspeed_ranks: GetRanks,
    saved: Callable[[int], tuple[str, Losses]],
    stage: int,
    others: tuple[int, ...],
    works: str,
) -> None:
    folder, _ = saved(stage)
    for other in others:
        for message in deepspeed_ranks(2).run(refused, replace(SAVED, stage=other), folder, TAG):
            assert f"zero_optimization.stage: found {other}; {works}, as that of" in message


def test_stages_1_and_2_read_each_other_s(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]]
) -> None:
    folder, losses = saved(1)
    for found in deepspeed_ranks(2).run(loaded, replace(SAVED, stage=2), folder, False):
        assert_close(found, losses)


def test_a_universal_form_is_refused_without_zero(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]]
) -> None:
    folder, _ = saved(0)
    for message in deepspeed_ranks(2).run(refused, SAVED, folder, TAG, True):
        assert "checkpoint.load_universal: found True; False works" in message


def test_what_is_not_there_is_refused(deepspeed_ranks: GetRanks, tmp_path: Path) -> None:
    ranks, case, folder = deepspeed_ranks(2), replace(SAVED, stage=2), str(tmp_path)
    assert "without 'latest'; one works" in ranks.run(refused, case, folder, None)[0]
    assert "tag: found 'other'; a folder in" in ranks.run(refused, case, folder, "other")[1]
