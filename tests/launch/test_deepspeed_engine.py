"""Training by DeepSpeed follows training by FSDP2, on the CPU: by the loss rule.

``test_deepspeed_gpus.py`` does so on GPUs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.engines.deepspeed import SPEC
from launch.settings import Settings
from launch.train import Result
from tests.adapters.deepspeed.small_model import run_command
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import replaced, run_training, tiny
from tests.launch.deepspeed import broken_off, needs_deepspeed, run_deepspeed
from tests.launch.test_megatron_engine import STEPS, VARIANTS, assert_close, mean_difference

RanksOf = Callable[[int], Ranks]

RUNS: list[Any] = [
    ("shared", 2, {"zero_stage": 3, "cp": 2}, {"recompute": True}),
    ("independent", 2, {"zero_stage": 1}, {}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("independent", 2, {"zero_stage": 3, "cp": 2}, {"dropout": 0.1}),
            ("shared", 2, {"zero_stage": 2, "cp": 2}, {"recompute": True}),
            ("independent", 2, {"zero_stage": 2, "cp": 2}, {}),
            ("shared", 2, {"zero_stage": 1, "cp": 2}, {}),
            ("independent", 1, {"zero_stage": 3}, {}),
            ("shared", 4, {"zero_stage": 3, "cp": 2, "layout": "contiguous"}, {}),
            ("independent", 4, {"zero_stage": 2, "cp": 2}, {}),
            ("shared", 4, {"zero_stage": 1, "cp": 4}, {}),
        )
    ),
]


def by_deepspeed(root: Path, variant: str, parallel: dict[str, Any], **run: Any) -> Settings:
    options: dict[str, Any] = {
        **VARIANTS[variant],
        "parallel": {"engine": "deepspeed", **parallel},
        "run": {"dtype": "float32", **run},
    }
    if variant == "independent":
        options["data"] = {"global_batch": 4}
    return tiny(root, **options)


@pytest.fixture(scope="module")
def alone(ranks_of: RanksOf, root: Path) -> Callable[[Settings], Result]:
    """The run by FSDP2 on one rank."""
    done: dict[str, Result] = {}

    def get(settings: Settings) -> Result:
        settings = replaced(
            settings, "parallel", engine="fsdp2", cp=1, zero_stage=3, layout="zigzag"
        )
        settings = replaced(settings, "model", recompute=False)
        settings = replaced(settings, "run", folder="")
        key = repr(settings)
        if key not in done:
            folder = str(root / f"fsdp2-beside-deepspeed-{len(done)}")
            settings = replaced(settings, "run", folder=folder)
            (done[key],) = ranks_of(1).run(run_training, settings)
        return done[key]

    return get


@needs_deepspeed
@pytest.mark.parametrize("variant, size, parallel, model", RUNS)
def test_every_step_is_that_of_fsdp2(
    deepspeed_ranks: RanksOf,
    alone: Callable[[Settings], Result],
    root: Path,
    variant: str,
    size: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
) -> None:
    name = "-".join(("deepspeed", variant, str(size), *map(str, parallel.values())))
    settings = by_deepspeed(root, variant, parallel, steps=STEPS, folder=str(root / name))
    settings = replaced(settings, "model", **model)
    first, *others = deepspeed_ranks(size).run(run_deepspeed, settings)
    expected = alone(settings)
    assert all(other.losses == first.losses for other in others)
    assert len(first.losses) == STEPS
    assert_close(first.losses, expected.losses, 1e-5)
    assert_close(first.grad_norms, expected.grad_norms, 1e-5)
    assert math.isclose(first.validation_loss, expected.validation_loss, rel_tol=1e-5)
    assert bool(sum(first.received.values())) == (settings.parallel.cp > 1)


@pytest.fixture(scope="module")
def in_bfloat16(ranks_of: RanksOf, root: Path) -> Callable[[str], tuple[Result, Result]]:
    """Fifty steps of a variant by FSDP2 on one rank and on two that share the sequence."""
    done: dict[str, tuple[Result, Result]] = {}

    def get(variant: str) -> tuple[Result, Result]:
        if variant not in done:
            found = []
            for cp in (1, 2):
                folder = str(root / f"bfloat16-beside-deepspeed-{variant}-{cp}")
                settings = by_deepspeed(root, variant, {}, dtype="bfloat16", steps=50)
                settings = replaced(settings, "parallel", engine="fsdp2", cp=cp)
                settings = replaced(settings, "run", folder=folder)
                found.append(ranks_of(cp).run(run_training, settings)[0])
            done[variant] = (found[0], found[1])
        return done[variant]

    return get


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_differs_from_fsdp2_no_more_than_twice_what_that_does_from_itself(
    deepspeed_ranks: RanksOf,
    in_bfloat16: Callable[[str], tuple[Result, Result]],
    root: Path,
    variant: str,
    stage: int,
) -> None:
    folder = str(root / f"deepspeed-bfloat16-{variant}-{stage}")
    parallel = {"zero_stage": stage, "cp": 2}
    settings = by_deepspeed(root, variant, parallel, dtype="bfloat16", steps=50, folder=folder)
    found, *_ = deepspeed_ranks(2).run(run_deepspeed, settings)
    one, two = in_bfloat16(variant)
    assert mean_difference(found, one) <= 2 * mean_difference(one, two)


LAST = "step_00000006"


@pytest.fixture(scope="module")
def unbroken(deepspeed_ranks: RanksOf, root: Path) -> Callable[[int], tuple[Settings, Result]]:
    """A run at a stage on two ranks, with a checkpoint half way, and a sample."""
    done: dict[int, tuple[Settings, Result]] = {}

    def get(stage: int) -> tuple[Settings, Result]:
        if stage not in done:
            options = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0}
            settings = by_deepspeed(
                root,
                "independent",
                {"zero_stage": stage, "cp": 2},
                sample_tokens=4,
                folder=str(root / f"unbroken-deepspeed-{stage}"),
                **options,
            )
            result, *_ = deepspeed_ranks(2).run(run_deepspeed, settings)
            done[stage] = settings, result
        return done[stage]

    return get


@needs_deepspeed
@pytest.mark.parametrize("stage", [3, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 2))])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    deepspeed_ranks: RanksOf,
    root: Path,
    unbroken: Callable[[int], tuple[Settings, Result]],
    stage: int,
) -> None:
    settings, expected = unbroken(stage)
    settings = broken_off(settings, root, f"resumed-deepspeed-{stage}", LAST)
    result, other = deepspeed_ranks(2).run(run_deepspeed, settings)
    assert result.losses == expected.losses[3:]
    assert result.grad_norms == expected.grad_norms[3:]
    assert result.validation_loss == expected.validation_loss
    assert result.sample == other.sample == expected.sample
    assert result.sample.startswith("def ")


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_on_elsewhere_by_the_command_that_its_refusal_names(
    deepspeed_ranks: RanksOf,
    root: Path,
    unbroken: Callable[[int], tuple[Settings, Result]],
    stage: int,
) -> None:
    settings, expected = unbroken(stage)
    settings = broken_off(settings, root, f"moved-deepspeed-{stage}", LAST)
    settings = replaced(settings, "parallel", cp=1)
    with pytest.raises(RankError) as error:
        deepspeed_ranks(1).run(run_deepspeed, settings)
    found = re.search(
        r"world size must be 2 as when .* was saved, got 1; for any number of ranks run "
        r"(python -m deepspeed\S* .*) and set {\"checkpoint\"",
        str(error.value),
    )
    assert found, str(error.value)
    run_command(found[1])
    folder = Path(settings.run.folder, "checkpoints")
    for old in ("step_00000001_universal", f"{LAST}_universal"):
        (folder / old / "zero").mkdir(parents=True)
    (result,) = deepspeed_ranks(1).run(run_deepspeed, settings)
    # A rewritten checkpoint loses its universal form; those of other checkpoints stay.
    assert sorted(path.name for path in folder.glob("step_*")) == [
        "step_00000001_universal",
        "step_00000003",
        "step_00000003_universal",
        LAST,
    ]
    assert len(result.losses) == 3
    assert_close(result.losses, expected.losses[3:], 1e-5)
    assert_close(result.grad_norms, expected.grad_norms[3:], 1e-5)


@needs_deepspeed
def test_another_stage_or_engine_is_refused(
    deepspeed_ranks: RanksOf,
    ranks_of: RanksOf,
    root: Path,
    unbroken: Callable[[int], tuple[Settings, Result]],
) -> None:
    settings = broken_off(unbroken(2)[0], root, "refused-deepspeed", LAST)
    with pytest.raises(
        RankError, match=r"parallel\.zero_stage must be 2, the checkpoint's value, got 3"
    ):
        deepspeed_ranks(2).run(run_deepspeed, replaced(settings, "parallel", zero_stage=3))
    fsdp2 = replaced(settings, "parallel", engine="fsdp2", cp=1, zero_stage=3)
    message = r"parallel\.engine must be 'deepspeed', the checkpoint's value, got 'fsdp2'"
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, fsdp2)


@pytest.mark.parametrize(
    "section, option, value, message",
    [
        ("parallel", "tp", 2, "parallel.tp must be 1 with parallel.engine = 'deepspeed'"),
        ("parallel", "pp", 2, "parallel.pp must be 1 with parallel.engine = 'deepspeed'"),
        ("parallel", "sequence_parallel", True, "parallel.sequence_parallel must be False"),
        ("parallel", "reshard_after_forward", False, "parallel.reshard_after_forward must be True"),
        (
            "model",
            "recompute_part",
            "attention",
            "model.recompute_part must be 'block'",
        ),
        ("run", "dtype", "float64", "run.dtype must be 'auto', 'bfloat16' or 'float32' with"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(
    root: Path, section: str, option: str, value: Any, message: str
) -> None:
    settings = by_deepspeed(root, "independent", {})
    with pytest.raises(ValueError) as error:
        replaced(settings, section, **{option: value})
    assert message in str(error.value)


def test_a_stage_is_refused_with_other_engines(root: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel\.zero_stage must be 3 with.*fsdp2.*, got 2"):
        replaced(tiny(root), "parallel", zero_stage=2)


@needs_deepspeed
def test_sizes_that_do_not_fit_are_refused(deepspeed_ranks: RanksOf, root: Path) -> None:
    settings = by_deepspeed(root, "independent", {"cp": 3})
    with pytest.raises(
        RankError, match=r"parallel\.cp must be a divisor of the 2 processes, got 3"
    ):
        deepspeed_ranks(2).run(run_deepspeed, settings)


def test_without_deepspeed_its_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = (
        r"parallel\.engine must be 'fsdp2' .*pip install nsa-dist\[deepspeed\]\), got 'deepspeed'"
    )
    with pytest.raises(ValueError, match=message):
        SPEC.check_machine(by_deepspeed(root, "independent", {}), "cpu")
