"""Checkpoints: on the same ranks as they are, elsewhere in DeepSpeed's universal form.

The next three losses are those of the run that was not broken off: by the loss rule, 1e-5 in
float32, and on the same mesh bit for bit. In bfloat16 they differ elsewhere by no more than twice
what that run's differ from those in float32.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.adapters.deepspeed.small_model import Case, Run, run_command
from tests.distributed.ranks import Ranks

pytest.importorskip("deepspeed")

GetRanks = Callable[[int], Ranks]
Losses = list[float]
SAVED = Case(dp=1, cp=2, lr=1e-2, adam=True)
# ZeRO 1 has an optimizer of its own for these: its own files, and its own reading of them.
BF16 = replace(
    SAVED,
    stage=1,
    dtype=torch.bfloat16,
    options=(("data_types", {"grad_accum_dtype": "fp32"}),),
)
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


def refused(
    case: Case,
    folder: str,
    tag: str | None,
    universal: bool = False,
    options: dict[str, bool] | None = None,
) -> str:
    from nsa_dist.adapters.deepspeed import load_checkpoint

    run = Run(case, universal)
    with pytest.raises(ValueError) as error:
        load_checkpoint(run.engine, folder, tag, **(options or {}))
    return str(error.value)


def only_weights(
    case: Case, folder: str, option: dict[str, bool]
) -> tuple[dict[str, Tensor], float]:
    """The weights, and the loss of the next step."""
    from nsa_dist.adapters.deepspeed import load_checkpoint

    run = Run(case)
    load_checkpoint(run.engine, folder, **option)
    return run.weights(), run.step(2)


def loaded_from_own_disk(case: Case, folder: str) -> tuple[Losses, str]:
    """Three steps where each rank sees its own part alone, and what is said without the option."""
    own = Path(folder) / f"disk{dist.get_rank()}"
    shutil.copytree(Path(folder) / TAG, own / TAG)
    (own / "latest").write_text(TAG)
    (other,) = (own / TAG).glob(f"*zero_pp_rank_{1 - dist.get_rank()}_*_optim_states.pt")
    other.unlink()
    message = refused(case, str(own), None)
    local = replace(case, options=(("checkpoint", {"use_node_local_storage": True}),))
    return loaded(local, str(own), False), message


def optimizer_of(case: Case) -> str:
    return type(Run(case).engine.optimizer).__name__


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


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))]
)
def test_other_numbers_of_ranks_go_on_by_the_command_that_the_refusal_names(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]], stage: int
) -> None:
    folder, losses = saved(stage)
    elsewhere = [replace(SAVED, stage=stage, dp=dp, cp=cp) for dp, cp in ((2, 2), (1, 4), (1, 1))]
    for message in deepspeed_ranks(4).run(refused, elsewhere[0], folder, None):
        assert re.search(r"world size must be 2 as when .* was saved, got 4", message)
    command = re.search(r"(python -m deepspeed.*) and set {", message)
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
    "stage, others, allowed", [(0, (1, 3), "0"), (1, (0, 3), "1 or 2"), (3, (0, 2), "3")]
)
def test_other_stages_are_refused(
    deepspeed_ranks: GetRanks,
    saved: Callable[[int], tuple[str, Losses]],
    stage: int,
    others: tuple[int, ...],
    allowed: str,
) -> None:
    folder, _ = saved(stage)
    for other in others:
        for message in deepspeed_ranks(2).run(refused, replace(SAVED, stage=other), folder, TAG):
            assert message.startswith(f"zero_optimization.stage must be {allowed} to load ")
            assert message.endswith(f", got {other}")


@pytest.mark.parametrize("stage, other", [(1, 2), (2, 1)])
def test_stages_1_and_2_read_each_other_s(
    deepspeed_ranks: GetRanks,
    saved: Callable[[int], tuple[str, Losses]],
    stage: int,
    other: int,
) -> None:
    folder, losses = saved(stage)
    for found in deepspeed_ranks(2).run(loaded, replace(SAVED, stage=other), folder, False):
        assert_close(found, losses)


@pytest.fixture(scope="module")
def in_bfloat16(
    deepspeed_ranks: GetRanks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Losses]:
    folder = str(tmp_path_factory.mktemp("bfloat16"))
    (losses, idle), *_ = deepspeed_ranks(2).run(saved_and_on, BF16, folder)
    assert idle == []
    return folder, losses


def test_bfloat16_with_float32_accumulation_goes_on_bit_for_bit(
    deepspeed_ranks: GetRanks, in_bfloat16: tuple[str, Losses]
) -> None:
    ranks, (folder, losses) = deepspeed_ranks(2), in_bfloat16
    assert ranks.run(optimizer_of, BF16) == ["BF16_Optimizer"] * 2
    for found in ranks.run(loaded, BF16, folder, False):
        assert found == losses


@pytest.mark.slow
def test_bfloat16_with_float32_accumulation_goes_on_elsewhere(
    deepspeed_ranks: GetRanks,
    in_bfloat16: tuple[str, Losses],
    saved: Callable[[int], tuple[str, Losses]],
) -> None:
    (folder, losses), (_, float32) = in_bfloat16, saved(1)
    elsewhere = [replace(BF16, dp=dp, cp=cp) for dp, cp in ((2, 2), (1, 1))]
    for message in deepspeed_ranks(4).run(refused, elsewhere[0], folder, None):
        command = re.search(r"(python -m deepspeed.*) and set {", message)
        assert command, message
    run_command(command[1])
    allowed = 2 * furthest(losses, float32)
    for case in elsewhere:
        for found in deepspeed_ranks(case.size).run(loaded, case, folder, True):
            assert furthest(found, losses) <= allowed


def furthest(a: Losses, b: Losses) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("option", [{"load_module_only": True}, {"load_optimizer_states": False}])
@pytest.mark.parametrize("stage, other", [(0, 1), (1, 2), (2, 0), (2, 2)])
def test_weights_alone_load_at_any_stage_below_3_on_any_number_of_ranks(
    deepspeed_ranks: GetRanks,
    saved: Callable[[int], tuple[str, Losses]],
    stage: int,
    other: int,
    option: dict[str, bool],
) -> None:
    folder, losses = saved(stage)
    file = Path(folder) / TAG / "mp_rank_00_model_states.pt"
    expected = torch.load(file, map_location="cpu", weights_only=False)["module"]
    case = replace(SAVED, stage=other, dp=2)
    for weights, loss in deepspeed_ranks(4).run(only_weights, case, folder, option):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert math.isclose(loss, losses[0], rel_tol=1e-5)


def test_weights_alone_load_at_stage_3_on_as_many_ranks(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]]
) -> None:
    folder, losses = saved(3)
    case, option = replace(SAVED, stage=3), {"load_optimizer_states": False}
    for _, loss in deepspeed_ranks(2).run(only_weights, case, folder, option):
        assert math.isclose(loss, losses[0], rel_tol=1e-5)
    for message in deepspeed_ranks(4).run(
        refused, replace(case, dp=2), folder, None, False, option
    ):
        assert re.search(r"world size must be 2 as when .* was saved, got 4", message)


def test_weights_alone_are_refused_where_deepspeed_would_load_others(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]], tmp_path: Path
) -> None:
    ranks, (folder, _) = deepspeed_ranks(2), saved(3)
    zero3, module_only = replace(SAVED, stage=3), {"load_module_only": True}
    without_state = {"load_optimizer_states": False}
    for message in ranks.run(refused, zero3, folder, None, False, module_only):
        assert "load_module_only must be False at ZeRO 3" in message
    shutil.copytree(Path(folder) / TAG, tmp_path / TAG)
    (tmp_path / "latest").write_text("another")
    for message in ranks.run(refused, zero3, str(tmp_path), TAG, False, without_state):
        assert message.startswith("tag must be 'another' as in ") and f"got '{TAG}'" in message
    folder, _ = saved(0)
    bf16 = replace(SAVED, dtype=torch.bfloat16)
    for message in ranks.run(refused, bf16, folder, None, False, without_state):
        assert "load_optimizer_states must be True in 16 bits without ZeRO" in message


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_needs_its_own_part_alone_on_disks_of_nodes(
    deepspeed_ranks: GetRanks,
    saved: Callable[[int], tuple[str, Losses]],
    tmp_path: Path,
    stage: int,
) -> None:
    folder, losses = saved(stage)
    shutil.copytree(Path(folder) / TAG, tmp_path / TAG)
    case = replace(SAVED, stage=stage)
    for found, message in deepspeed_ranks(2).run(loaded_from_own_disk, case, str(tmp_path)):
        assert found == losses
        assert re.search(r"world size must be 1 as when .* was saved, got 2", message)


def test_a_universal_form_is_refused_without_zero(
    deepspeed_ranks: GetRanks, saved: Callable[[int], tuple[str, Losses]]
) -> None:
    folder, _ = saved(0)
    for message in deepspeed_ranks(2).run(refused, SAVED, folder, TAG, True):
        assert re.search(r"checkpoint.load_universal must be False .*, got True", message)


def test_what_is_not_there_is_refused(deepspeed_ranks: GetRanks, tmp_path: Path) -> None:
    ranks, case, folder = deepspeed_ranks(2), replace(SAVED, stage=2), str(tmp_path)
    assert (
        "load_dir must be a folder with a file 'latest', got"
        in ranks.run(refused, case, folder, None)[0]
    )
    message = ranks.run(refused, case, folder, "other")[1]
    assert re.search(r"tag must be the name of a folder in .*, got 'other'", message)
