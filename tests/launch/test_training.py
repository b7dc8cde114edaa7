"""Whole runs: the same whatever ranks they are spread over, however often they are stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.data.corpus import PackedStreams, load_corpus
from launch.settings import Settings, from_toml
from launch.train import Result, learning_rate
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import (
    Gradients,
    first_gradients,
    local_batches,
    one_target_gradients,
    plain_gradients,
    replaced,
    run_training,
    sampled_and_naive,
    tiny,
)

RanksOf = Callable[[int], Ranks]

# World size, parallel.cp.
SPREADS = [(2, 2), (2, 1), (4, 4), (4, 2)]
SPREAD_IDS = [f"dp{size // cp}_cp{cp}" for size, cp in SPREADS]
# float64 tells where tokens go, and the spread with replicas of split sequences tells it of both;
# float32 adds how far rounding gets, and the widest spread tells that.
IN_CI = {("float64", "dp2_cp2"), ("float32", "dp1_cp4")}
EVERY_STEP = [
    pytest.param(
        dtype,
        relative,
        *spread,
        id=f"{dtype}-{relative}-{name}",
        marks=[] if (dtype, name) in IN_CI else pytest.mark.slow,
    )
    for dtype, relative in [("float64", 1e-9), ("float32", 1e-5)]
    for spread, name in zip(SPREADS, SPREAD_IDS, strict=True)
]


def run(ranks: Ranks, settings: Settings) -> Result:
    """The run's result, which every rank must have, its own clock aside."""
    first, *others = ranks.run(run_training, settings)
    clock = {name: getattr(first, name) for name in ("seconds", "saving", "tokens_per_second")}
    assert all(dataclasses.replace(other, **clock) == first for other in others)
    return first


def assert_close(found: Any, expected: Any, relative: float) -> None:
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert math.isclose(a, b, rel_tol=relative), f"step {step}: {a} for {b}"


def assert_same_gradients(found: Gradients, expected: Gradients, relative: float) -> None:
    """Equal within ``relative`` of each tensor's largest entry."""
    assert math.isclose(found.loss, expected.loss, rel_tol=relative)
    assert math.isclose(found.norm, expected.norm, rel_tol=relative)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        difference = float((found.grads[name] - grad).abs().max())
        assert difference <= relative * float(grad.abs().max()), name


@pytest.fixture(scope="module")
def alone(ranks_of: RanksOf, root: Path) -> dict[str, Result]:
    """The tiny run on one rank, by dtype."""
    dtypes = ("float64", "float32")
    return {
        dtype: run(
            ranks_of(1), tiny(root, run={"dtype": dtype, "folder": str(root / f"alone-{dtype}")})
        )
        for dtype in dtypes
    }


@pytest.mark.parametrize("dtype, relative, size, cp", EVERY_STEP)
def test_every_step_is_the_same_on_any_number_of_ranks(
    ranks_of: RanksOf,
    root: Path,
    alone: dict[str, Result],
    dtype: str,
    relative: float,
    size: int,
    cp: int,
) -> None:
    folder = str(root / f"{size}-{cp}-{dtype}")
    settings = tiny(root, parallel={"cp": cp}, run={"dtype": dtype, "folder": folder})
    result = run(ranks_of(size), settings)
    expected = alone[dtype]
    assert_close(result.losses, expected.losses, relative)
    assert_close(result.grad_norms, expected.grad_norms, 100 * relative)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=relative)
    assert expected.losses[-1] < 0.8 * expected.losses[0]
    assert bool(sum(result.received.values())) == (cp > 1)


@pytest.mark.parametrize("size, cp", [(1, 1), *SPREADS], ids=["dp1_cp1", *SPREAD_IDS])
def test_replicas_share_the_same_streams_in_the_same_order(
    ranks_of: RanksOf, root: Path, size: int, cp: int
) -> None:
    steps, batch, micro = 9, 8, 2
    settings = tiny(root, data={"global_batch": batch, "micro_batch": micro}, parallel={"cp": cp})
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    found = ranks_of(size).run(local_batches, settings, steps)
    for rank in range(size):
        assert found[rank] == found[rank // cp * cp]
    for step in range(steps):
        given = [tokens for rank in range(0, size, cp) for tokens in found[rank][step]]
        firsts = range(step * batch, (step + 1) * batch, micro)
        expected = [
            [*streams[first].tokens[0].tolist(), *streams[first + 1].tokens[0].tolist()]
            for first in firsts
        ]
        assert given == expected
    # Several epochs went by.
    assert steps * batch > 2 * streams.per_epoch


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("prompt", [1, 63, 100], ids="prompt_{}".format)
def test_a_sample_is_drawn_from_the_logits_of_the_last_token(
    ranks_of: RanksOf, root: Path, size: int, prompt: int
) -> None:
    text = [(7 * i) % 251 for i in range(prompt)]
    settings = tiny(root, parallel={"cp": size})
    for found, naive in ranks_of(size).run(sampled_and_naive, settings, text):
        assert found == naive
        assert len(set(found)) > 1


@pytest.mark.parametrize(
    "layout",
    [
        "zigzag_per_document",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("contiguous", "zigzag")),
    ],
)
def test_every_gradient_is_the_plain_one(ranks_of: RanksOf, root: Path, layout: str) -> None:
    settings = tiny(root, model={"qk_norm": True}, parallel={"layout": layout})
    (expected,) = ranks_of(1).run(plain_gradients, settings)
    for size, cp in ((1, 1), (2, 2), (4, 2), (4, 4)):
        settings = replaced(settings, "parallel", cp=cp)
        for found in ranks_of(size).run(first_gradients, settings):
            assert_same_gradients(found, expected, 1e-11)


def test_one_target_in_the_whole_batch_gives_one_ranks_gradients(
    ranks_of: RanksOf, root: Path
) -> None:
    (expected,) = ranks_of(1).run(one_target_gradients, tiny(root))
    assert expected.norm > 0
    for size in (2, 4):
        settings = tiny(root, parallel={"cp": size})
        for found in ranks_of(size).run(one_target_gradients, settings):
            assert_same_gradients(found, expected, 1e-11)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_micro_batches_are_one_larger_batch(
    ranks_of: RanksOf, root: Path, size: int
) -> None:
    settings = tiny(root, data={"global_batch": 4}, parallel={"cp": size})
    one_by_one, *_ = ranks_of(size).run(first_gradients, settings)
    for micro_batch in (2, 4):
        larger = replaced(settings, "data", micro_batch=micro_batch)
        found, *_ = ranks_of(size).run(first_gradients, larger)
        assert_same_gradients(found, one_by_one, 1e-11)


@pytest.mark.parametrize("size", [1, 2])
def test_recomputation_changes_nothing(ranks_of: RanksOf, root: Path, size: int) -> None:
    settings = tiny(root, model={"dropout": 0.3}, parallel={"cp": size})
    kept, *_ = ranks_of(size).run(first_gradients, settings)
    settings = replaced(settings, "model", recompute=True)
    for reshard in (True, False):
        settings = replaced(settings, "parallel", reshard_after_forward=reshard)
        recomputed, *_ = ranks_of(size).run(first_gradients, settings)
        assert_same_gradients(recomputed, kept, 0.0)


def test_dropout_does_not_depend_on_the_spread(ranks_of: RanksOf, root: Path) -> None:
    settings = tiny(root, model={"dropout": 0.3})
    (expected,) = ranks_of(1).run(first_gradients, settings)
    (without,) = ranks_of(1).run(first_gradients, tiny(root))
    assert not math.isclose(expected.loss, without.loss, rel_tol=1e-6)
    for size, cp in SPREADS:
        found, *_ = ranks_of(size).run(first_gradients, replaced(settings, "parallel", cp=cp))
        assert_same_gradients(found, expected, 1e-11)


@pytest.fixture(scope="module")
def unbroken(ranks_of: RanksOf, root: Path) -> tuple[Settings, Result]:
    """A run of two ranks with a checkpoint half way."""
    options = {"steps": 10, "checkpoint_every": 5, "keep_checkpoints": 0, "sample_tokens": 12}
    folder = root / "unbroken"
    settings = tiny(root, parallel={"cp": 2}, run={**options, "folder": str(folder)})
    return settings, run(ranks_of(2), settings)


def broken_off(settings: Settings, root: Path, name: str) -> Settings:
    """The run as it was left after its first checkpoint, to be resumed elsewhere."""
    shutil.copytree(settings.run.folder, root / name)
    shutil.rmtree(root / name / "checkpoints" / "step_00000010")
    return replaced(settings, "run", folder=str(root / name), resume=True)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings, expected = unbroken
    result = run(ranks_of(2), broken_off(settings, root, "resumed"))
    assert result.losses == expected.losses[5:]
    assert result.grad_norms == expected.grad_norms[5:]
    assert result.validation_loss == expected.validation_loss
    assert result.sample == expected.sample


@pytest.mark.parametrize("size, cp", [(1, 1), (4, 2)], ids=["dp1_cp1", "dp2_cp2"])
def test_a_run_resumes_on_other_ranks(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result], size: int, cp: int
) -> None:
    settings, expected = unbroken
    settings = broken_off(settings, root, f"resumed-{size}")
    result = run(ranks_of(size), replaced(settings, "parallel", cp=cp))
    assert_close(result.losses, expected.losses[5:], 1e-10)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=1e-10)
    # Also the sampled text, drawn from logits that are the same up to rounding.
    assert result.sample == expected.sample
    assert len(result.sample.encode(errors="replace")) > len("def ")


def test_checkpoints_are_kept_and_removed_as_asked(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    def steps(folder: str) -> list[str]:
        return sorted(path.name for path in Path(folder, "checkpoints").iterdir())

    settings, _ = unbroken
    assert steps(settings.run.folder) == ["step_00000005", "step_00000010"]
    options = {"steps": 4, "checkpoint_every": 1, "folder": str(root / "kept")}
    result = run(ranks_of(1), tiny(root, run=options))
    assert steps(str(result.folder)) == ["step_00000003", "step_00000004"]


def test_a_resume_with_other_settings_is_refused_by_name(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings, _ = unbroken
    again = replaced(settings, "run", resume=False)
    with pytest.raises(
        RankError, match=r"run\.folder must be .*run\.resume = true.*, got .*unbroken"
    ):
        ranks_of(2).run(run_training, again)
    resumed = replaced(settings, "run", resume=True)
    for section, option, value in (
        ("attention", "window", 13),
        ("data", "global_batch", 4),
        ("run", "seed", 1),
    ):
        other = replaced(resumed, section, **{option: value})
        with pytest.raises(
            RankError, match=rf"{section}\.{option} must be .*, the checkpoint's value, got {value}"
        ):
            ranks_of(2).run(run_training, other)


def test_what_a_run_writes(root: Path, unbroken: tuple[Settings, Result]) -> None:
    settings, result = unbroken
    assert from_toml(result.folder / "settings.toml") == settings
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 5, 10]
    for record in steps:
        step = record["step"] - 1
        assert record["loss"] == result.losses[step]
        assert record["grad_norm"] == result.grad_norms[step]
        assert record["tokens_per_second"] > 0
        assert record["peak_memory"] > 1e6
    # Fetched keys and values send gradients of the same size back.
    assert steps[-1]["bytes"] == result.received
    assert result.received["fetch"] == result.received["fetch_grad"] > 0
    assert result.received["halo"] == result.received["halo_grad"] > 0
    assert records[-1]["validation_loss"] == result.validation_loss
    assert records[-1]["unigram_loss"] == result.unigram_loss


def test_dense_attention_trains_alone_and_over_replicas(ranks_of: RanksOf, root: Path) -> None:
    options = {"steps": 60, "dtype": "float32", "folder": str(root / "dense"), "device": "cpu"}
    model = {"attention": "dense"}
    settings = tiny(root, model=model, optimizer={"lr": 1e-2}, run=options)
    result = run(ranks_of(1), settings)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.validation_loss < result.unigram_loss
    spread = run(ranks_of(2), replaced(settings, "run", steps=2, folder=str(root / "dense-2")))
    assert_close(spread.losses[:1], result.losses[:1], 1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"parallel": {"cp": 3}}, r"parallel\.cp must be a divisor of the 2 processes, got 3"),
        (
            {"parallel": {"dp": 2, "cp": 2}},
            r"parallel\.dp must be -1 or 2 // \(tp x pp x cp\) = 1, got 2",
        ),
        ({"data": {"global_batch": 3}}, r"data\.global_batch must be a multiple of .* = 2, got 3"),
    ],
    ids=["cp", "dp", "global_batch"],
)
def test_ranks_that_do_not_fit_are_refused_by_name(
    ranks_of: RanksOf, root: Path, overrides: dict[str, Any], message: str
) -> None:
    answers = ranks_of(2).try_run(run_training, tiny(root, **overrides))
    for ok, text in answers:
        assert not ok
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


def test_the_learning_rate_warms_up_and_falls(root: Path) -> None:
    settings = tiny(root, optimizer={"lr": 2.0, "warmup_steps": 4, "min_lr": 0.1}).optimizer
    rates = [learning_rate(settings, step, 104) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.1)
    assert rates[104] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
