"""Gradients, losses and weights that are not finite: skipped, reported, never saved."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.reporting.health import HUGE_NORM, Health, check_validation, finite_mean
from launch.settings import OptimizerSettings, Settings, to_toml
from launch.storage.checkpoint import checkpoints
from tests.distributed.ranks import Ranks
from tests.launch.common import replaced, tiny
from tests.launch.deepspeed import needs_deepspeed
from tests.launch.megatron import needs_megatron
from tests.launch.poison import Poison, Poisoned, run_poisoned
from tests.launch.processes import TRAIN, Process, torchrun

RanksOf = Callable[[int], Ranks]
NAN, INF = math.nan, math.inf

# On one rank of two, in one micro-batch of two; never three in a row.
POISONS = {
    1: Poison("gradient", NAN, rank=0),
    3: Poison("gradient", INF, rank=1),
    4: Poison("gradient", NAN, rank=1, micro=1),
    6: Poison("loss", INF, rank=0),
    7: Poison("gradient", -INF, rank=0),
}
CHANGED = (False, True, False, False, True, False, False, True)


def settings_of(root: Path, name: str, parallel: dict[str, Any], **run: Any) -> Settings:
    """Of one layer: a step is skipped whole, however deep the model is."""
    run = {"dtype": "float32", "steps": 8, "folder": str(root / name), **run}
    data = {"global_batch": 2 if parallel.get("cp") == 2 or "tp" in parallel else 4}
    return tiny(root, model={"layers": 1}, data=data, parallel=parallel, run=run)


def records(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, read as strictly as JSON is."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def broken_off(settings: Settings, last: str) -> Settings:
    """The run as it was before its last checkpoint, to be resumed elsewhere."""
    again = replaced(settings, "run", folder=f"{settings.run.folder}-resumed", resume=True)
    shutil.copytree(settings.run.folder, again.run.folder)
    shutil.rmtree(Path(again.run.folder, "checkpoints", last))
    return again


def assert_skips_and_resumes(
    ranks: Ranks, settings: Settings, poisons: dict[int, Poison] = POISONS
) -> None:
    """Of a run with a checkpoint after the fourth step, which is skipped."""
    settings = replaced(settings, "run", checkpoint_every=4, keep_checkpoints=0, log_every=1)
    found: list[Poisoned] = ranks.run(run_poisoned, settings, poisons)
    for result in found:
        assert result.changed == CHANGED
        assert tuple(map(math.isfinite, result.norms)) == CHANGED
        finite = [math.isfinite(loss) for loss in result.losses]
        assert finite == [step != 6 for step in range(1, 9)]
        assert math.isfinite(result.validation_loss)
        assert repr(result) == repr(found[0])
    told = records(settings.run.folder)
    skips = {record["step"]: record for record in told if "skipped" in record}
    assert list(skips) == [1, 3, 4, 6, 7]
    assert [skip["in_a_row"] for skip in skips.values()] == [1, 1, 2, 1, 2]
    assert skips[6]["skipped"].startswith("the loss is inf and the gradient norm is ")
    steps = {record["step"]: record for record in told if "loss" in record}
    assert [steps[step]["grad_norm"] is None for step in range(1, 9)] == [not c for c in CHANGED]
    assert steps[6]["loss"] is steps[6]["mean_loss"] is None

    again = broken_off(settings, "step_00000008")
    for result in ranks.run(run_poisoned, again, poisons):
        assert repr(result.losses) == repr(found[0].losses[4:])
        assert repr(result.norms) == repr(found[0].norms[4:])
        assert result.changed == CHANGED[4:]
        assert result.validation_loss == found[0].validation_loss


@pytest.mark.parametrize("parallel", [{"cp": 2}, {}], ids=["cp2", "dp2"])
def test_a_step_that_is_not_finite_changes_no_bit(
    ranks_of: RanksOf, root: Path, parallel: dict[str, Any]
) -> None:
    dtype = "float32" if parallel else "float64"
    settings = settings_of(root, f"skips-{len(parallel)}", parallel, dtype=dtype)
    assert_skips_and_resumes(ranks_of(2), settings)


@needs_megatron
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"cp": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
        {},
    ],
    ids=["cp2", "tp2", "dp2"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_megatron_skips_a_step_that_is_not_finite(
    megatron_ranks: RanksOf, root: Path, parallel: dict[str, Any], dtype: str
) -> None:
    megatron = {"engine": "megatron", "layout": "zigzag_per_document", **parallel}
    name = "-".join(("skips-megatron", dtype, *parallel))
    assert_skips_and_resumes(megatron_ranks(2), settings_of(root, name, megatron, dtype=dtype))


@needs_deepspeed
@pytest.mark.parametrize(
    "stage, dtype",
    [
        (3, "float32"),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, "float32", marks=pytest.mark.slow),
        pytest.param(2, "float32", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(3, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_skips_a_step_that_is_not_finite(
    deepspeed_ranks: RanksOf, root: Path, stage: int, dtype: str
) -> None:
    parallel = {"engine": "deepspeed", "zero_stage": stage}
    settings = settings_of(root, f"skips-deepspeed-{stage}-{dtype}", parallel, dtype=dtype)
    assert_skips_and_resumes(deepspeed_ranks(2), settings)


FIRST_STEPS: list[Any] = [
    pytest.param("ranks_of", {"engine": "fsdp2"}, id="fsdp2"),
    pytest.param(
        "megatron_ranks",
        {"engine": "megatron", "layout": "zigzag_per_document"},
        marks=[needs_megatron, pytest.mark.slow],
        id="megatron",
    ),
    *(
        pytest.param(
            "deepspeed_ranks",
            {"engine": "deepspeed", "zero_stage": stage},
            marks=[needs_deepspeed, pytest.mark.slow],
            id=f"deepspeed{stage}",
        )
        for stage in (1, 2, 3)
    ),
]


@pytest.mark.parametrize("ranks, parallel", FIRST_STEPS)
def test_a_run_goes_on_from_a_first_step_without_an_update(
    request: pytest.FixtureRequest, root: Path, ranks: str, parallel: dict[str, Any]
) -> None:
    two: Ranks = request.getfixturevalue(ranks)(2)
    run = {"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 0}
    settings = settings_of(root, "first-" + "-".join(map(str, parallel.values())), parallel, **run)
    poisons = {1: Poison("gradient", NAN, rank=1)}
    expected = two.run(run_poisoned, settings, poisons)
    assert expected[0].changed == (False, True)
    found = two.run(run_poisoned, broken_off(settings, "step_00000002"), poisons)
    for result in found:
        assert (result.losses, result.norms) == (expected[0].losses[1:], expected[0].norms[1:])
        assert result.validation_loss == expected[0].validation_loss


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_is_not_finite_changes_no_bit(root: Path) -> None:
    size = min(2, torch.cuda.device_count())
    settings = settings_of(root, "skips-gpu", {}, device="cuda", dtype="bfloat16")
    settings = replaced(settings, "model", backend="pytorch")
    poisons = {step: replace(poison, rank=poison.rank % size) for step, poison in POISONS.items()}
    ranks = Ranks(size, timedelta(seconds=120), "nccl", ends_groups=True)
    try:
        assert_skips_and_resumes(ranks, settings, poisons)
        settings = replaced(settings, "run", folder=str(root / "not-saved-gpu"), steps=2)
        for value in (NAN, INF):
            (ok, text), *_ = ranks.try_run(run_poisoned, settings, {2: Poison("weight", value, 0)})
            assert not ok and "the state after step 2 is not finite (rank 0: " in text
    finally:
        ranks.close()


def kept(folder: str | Path) -> list[str]:
    return [path.name for path in checkpoints(Path(folder))]


def test_steps_in_a_row_that_are_not_finite_end_the_run(ranks_of: RanksOf, root: Path) -> None:
    run = {"checkpoint_every": 2, "keep_checkpoints": 1}
    settings = settings_of(root, "in-a-row", {"cp": 2}, **run)
    settings = replaced(settings, "optimizer", max_skipped=2)
    poisons = dict.fromkeys(range(3, 9), Poison("gradient", NAN, rank=1))
    answers = ranks_of(2).try_run(run_poisoned, settings, poisons)
    message = (
        "optimizer.max_skipped must be above 2 .*, got 2: .* in steps 3 to 4, the gradient norm is"
    )
    for ok, text in answers:
        assert not ok
        with pytest.raises(FloatingPointError, match=message):
            raise FloatingPointError(text)
    assert kept(settings.run.folder) == ["step_00000002"]
    assert [r["step"] for r in records(settings.run.folder) if "skipped" in r] == [3, 4]


@pytest.mark.parametrize(
    "what, message",
    [
        ("weight", r"the state after step 4 is not finite \(rank 1: \S+\); resume from"),
        ("reported loss", r"step 4: the loss is inf although its gradients are finite"),
    ],
    ids=["weight", "reported_loss"],
)
def test_what_is_not_finite_by_another_way_is_not_saved(
    ranks_of: RanksOf, root: Path, what: str, message: str
) -> None:
    run = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 1}
    settings = settings_of(root, f"not-saved-{what[0]}", {"cp": 2}, **run)
    poison = Poison(what, NAN if what == "weight" else INF, rank=1)
    for ok, text in ranks_of(2).try_run(run_poisoned, settings, {4: poison}):
        assert not ok
        with pytest.raises(FloatingPointError, match=message):
            raise FloatingPointError(text)
    assert kept(settings.run.folder) == ["step_00000002"]


def test_a_last_step_that_is_not_finite_leaves_a_good_checkpoint(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    settings = settings_of(root, "last-step", {}, steps=3)
    # Of the second, each gradient is finite, and their norm in float32 is not.
    poisons = {2: Poison("gradients", 1e30, rank=0), 3: Poison("gradient", NAN, rank=0)}
    (result,) = ranks_of(1).run(run_poisoned, settings, poisons)
    assert result.changed == (True, False, False)
    assert result.norms[1] == INF
    assert math.isfinite(result.validation_loss)
    assert kept(settings.run.folder) == ["step_00000003"]
    (path,) = checkpoints(Path(settings.run.folder))
    dcp_to_torch_save(path, tmp_path / "state.pt")
    weights = torch.load(tmp_path / "state.pt", weights_only=False)["model"]
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


class Told:
    """What ``Health`` needs of a ``Report``."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.skips: list[tuple[int, str, int]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def skipped(self, step: int, why: str, in_a_row: int) -> None:
        self.skips.append((step, why, in_a_row))


def health(told: Told, most: int = 3) -> Health:
    return Health(OptimizerSettings(max_skipped=most), told)  # type: ignore[arg-type]


def look(health: Health, norms: list[float]) -> None:
    for step, norm in enumerate(norms, start=1):
        health.add(step, torch.tensor([2.0, norm, 0.0], dtype=torch.float64))
    health.settle()


def test_each_step_is_looked_at_one_step_late() -> None:
    told = Told()
    watch = health(told)
    watch.add(1, torch.tensor([2.0, NAN, 0.0]))
    assert not told.skips
    watch.add(2, torch.tensor([NAN, INF, 0.0]))
    assert told.skips == [(1, "the gradient norm is nan", 1)]
    watch.settle()
    assert told.skips[1:] == [(2, "the loss is nan and the gradient norm is inf", 2)]
    look(watch, [1.0, NAN, NAN, 1.0, NAN])
    assert watch.skipped == 5 and watch.in_a_row == 1


@pytest.mark.parametrize("most, steps", [(0, "2"), (1, "2"), (2, "2 to 3"), (3, "2 to 4")])
def test_so_many_steps_in_a_row_end_the_run(most: int, steps: str) -> None:
    message = (
        rf"optimizer.max_skipped must be .*, got {most}: .* in steps {steps}, the gradient norm is"
    )
    with pytest.raises(FloatingPointError, match=message):
        look(health(Told(), most), [1.0, NAN, INF, NAN, NAN])
    look(health(Told(), 2), [NAN, 1.0, INF, 1.0, -NAN])


def test_a_huge_norm_is_told_once_until_it_is_over() -> None:
    told = Told()
    look(health(told), [1e30, 1e30])
    assert told.lines == ["step 1: warning: the gradient norm is 1e+30"]
    told = Told()
    usual = [1.0 + step % 3 for step in range(50)]
    look(health(told), [*usual, 1e4, 2e4, 1e30, 1e30, *usual, 1e4, *usual])
    assert [line.split(":")[0] for line in told.lines] == ["step 51", "step 53", "step 105"]
    assert told.lines[0].endswith("is 1e+04; the median of the 50 before is 2")
    told = Told()
    look(health(told), [1e-3, HUGE_NORM / 2, 5.0, 900.0])
    assert not told.lines


def test_means_leave_out_what_is_not_finite() -> None:
    assert finite_mean([1.0, NAN, 3.0, INF]) == 2.0
    assert math.isnan(finite_mean([NAN]))
    check_validation(2.0, 3)
    with pytest.raises(FloatingPointError, match="the validation loss after step 3 is nan"):
        check_validation(NAN, 3)


def test_a_negative_number_of_skipped_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.max_skipped must be at least 0, got -1"):
        OptimizerSettings(max_skipped=-1)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_ends_with_one_line_and_status_1(root: Path, size: int) -> None:
    settings = settings_of(root, f"diverges-{size}", {}, steps=30, log_every=5)
    settings = replaced(settings, "optimizer", lr=1e30, warmup_steps=0, clip=0.0)
    config = root / f"diverges-{size}.toml"
    config.write_text(to_toml(settings))
    command = [sys.executable, TRAIN] if size == 1 else torchrun(size)
    run = Process([*command, str(config)], root, f"diverges-{size}")
    assert run.wait() == 1
    told = [line for line in run.text.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1, run.text
    assert told[0].startswith("train.py: optimizer.max_skipped must be above 3 to go on, got 3: ")
    assert size > 1 or "Traceback" not in run.text
    assert kept(settings.run.folder) == []
    assert [r["step"] for r in records(settings.run.folder) if "skipped" in r] == [2, 3, 4]
