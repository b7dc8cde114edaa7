"""Training with dense layers, alone or among NSA layers, over ranks that share the sequence."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch.processes.ranks import check_dense
from launch.settings import Settings
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import (
    Gradients,
    first_gradients,
    plain_gradients,
    replaced,
    run_training,
    sampled_and_naive,
    tiny,
)
from tests.launch.deepspeed import needs_deepspeed, run_deepspeed
from tests.launch.test_training import assert_close, assert_same_gradients, run

pytestmark = pytest.mark.skipif(
    find_spec("ring_flash_attn") is None, reason="needs ring-flash-attn, not here"
)

RanksOf = Callable[[int], Ranks]
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"attention": "dense"},
    "hybrid": {"layers": 3, "dense_every": 2},
}


def settings_of(root: Path, kind: str, name: str, **run: Any) -> Settings:
    """One rank; ``replaced`` gives others."""
    options = {"folder": str(root / f"{kind}-{name}"), **run}
    return tiny(root, model=KINDS[kind], parallel={"layout": "contiguous"}, run=options)


@pytest.mark.parametrize(
    "dtype, relative", [("float64", 1e-9), pytest.param("float32", 1e-5, marks=pytest.mark.slow)]
)
# A hybrid model has dense layers too.
@pytest.mark.parametrize("kind", ["hybrid", pytest.param("dense", marks=pytest.mark.slow)])
def test_every_step_is_the_same_over_two_ranks(
    ranks_of: RanksOf, root: Path, kind: str, dtype: str, relative: float
) -> None:
    settings = settings_of(root, kind, f"{dtype}-1", dtype=dtype)
    expected = run(ranks_of(1), settings)
    spread = replaced(settings, "parallel", cp=2)
    spread = replaced(spread, "run", folder=str(root / f"{kind}-{dtype}-2"))
    result = run(ranks_of(2), spread)
    assert_close(result.losses, expected.losses, relative)
    assert_close(result.grad_norms, expected.grad_norms, 100 * relative)
    assert_close([result.validation_loss], [expected.validation_loss], relative)
    assert expected.losses[-1] < 0.8 * expected.losses[0]
    assert result.received["ring"] > 0 and result.received["ring_grad"] > 0
    assert bool(result.received["fetch"]) == (kind == "hybrid")


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_the_plain_one(ranks_of: RanksOf, root: Path, kind: str) -> None:
    settings = settings_of(root, kind, "gradients")
    settings = replaced(settings, "model", qk_norm=True)
    (expected,) = ranks_of(1).run(plain_gradients, settings)
    for size, cp in ((1, 1), (2, 2), (4, 2), (4, 4)):
        settings = replaced(settings, "parallel", cp=cp)
        for found in ranks_of(size).run(first_gradients, settings):
            assert_same_gradients(found, expected, 1e-11)


def test_dropout_and_recomputation_do_not_depend_on_the_spread(
    ranks_of: RanksOf, root: Path
) -> None:
    settings = replaced(settings_of(root, "hybrid", "dropout"), "model", dropout=0.3)
    (expected,) = ranks_of(1).run(first_gradients, settings)
    without: Gradients = ranks_of(1).run(first_gradients, replaced(settings, "model", dropout=0))[0]
    assert abs(expected.loss - without.loss) > 1e-6
    settings = replaced(replaced(settings, "parallel", cp=2), "model", recompute=True)
    for found in ranks_of(2).run(first_gradients, settings):
        assert_same_gradients(found, expected, 1e-11)


@pytest.fixture(scope="module")
def bf16_difference(ranks_of: RanksOf, root: Path) -> Callable[[str], float]:
    """Mean difference of 50 losses between one rank and two, by kind of model, in bfloat16."""
    done: dict[str, float] = {}

    def get(kind: str) -> float:
        if kind not in done:
            losses = []
            for cp in (1, 2):
                folder = str(root / f"bf16-{kind}-{cp}")
                settings = tiny(
                    root,
                    model=KINDS.get(kind, {}),
                    parallel={"cp": cp, "layout": "zigzag_per_document"},
                    run={"dtype": "bfloat16", "steps": 50, "folder": folder},
                )
                result = run(ranks_of(cp), settings)
                assert result.losses[-1] < 0.8 * result.losses[0]
                losses.append(result.losses)
            done[kind] = sum(abs(a - b) for a, b in zip(*losses, strict=True)) / 50
        return done[kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_the_ring_trains_in_bfloat16(bf16_difference: Callable[[str], float], kind: str) -> None:
    """Losses differ between one rank and two no more than twice as much as those of NSA do."""
    found, reference = bf16_difference(kind), bf16_difference("nsa")
    print(f"{kind}: mean difference {found:.1e}, of NSA {reference:.1e}")
    assert 0 < found <= 2 * reference


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_trains_hybrid_models(
    ranks_of: RanksOf, deepspeed_ranks: RanksOf, root: Path
) -> None:
    settings = settings_of(root, "hybrid", "fsdp2", dtype="float32")
    expected = run(ranks_of(1), settings)
    settings = replaced(settings, "parallel", engine="deepspeed", zero_stage=3, cp=2)
    settings = replaced(settings, "run", folder=str(root / "hybrid-deepspeed"))
    found, *_ = deepspeed_ranks(2).run(run_deepspeed, settings)
    assert_close(found.losses, expected.losses, 1e-5)
    assert found.received["ring"] > 0 and found.received["fetch"] > 0


def test_a_sample_is_drawn_from_the_logits_of_the_last_token(ranks_of: RanksOf, root: Path) -> None:
    text = [(7 * i) % 251 for i in range(63)]
    settings = replaced(settings_of(root, "hybrid", "sample"), "parallel", cp=2)
    for found, naive in ranks_of(2).run(sampled_and_naive, settings, text):
        assert found == naive
        assert len(set(found)) > 1


def test_a_run_resumes_over_other_ranks(ranks_of: RanksOf, root: Path) -> None:
    options = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0}
    settings = settings_of(root, "hybrid", "whole", **options)
    expected = run(ranks_of(1), settings)
    half = root / "hybrid-half" / "checkpoints"
    half.mkdir(parents=True)
    step = "step_00000003"
    (root / "hybrid-whole" / "checkpoints" / step).rename(half / step)
    resumed = replaced(settings, "run", folder=str(half.parent), resume=True)
    result = run(ranks_of(2), replaced(resumed, "parallel", cp=2))
    assert_close(result.losses, expected.losses[3:], 1e-10)


def test_what_is_known_only_where_it_runs_is_refused_by_name(
    ranks_of: RanksOf, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = {"cp": 2, "layout": "zigzag_per_document"}
    settings = tiny(root, model=KINDS["dense"], parallel=ring, run={"dtype": "auto"})
    with pytest.raises(
        RankError, match=r"run\.dtype must be 'bfloat16' .*on the CPU.*, got 'auto'"
    ):
        ranks_of(2).run(run_training, settings)
    check_dense(settings, "cuda")
    contiguous = replaced(settings, "parallel", layout="contiguous")
    check_dense(contiguous, "cpu")
    monkeypatch.setattr("launch.processes.ranks.importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=r"parallel\.cp must be 1 .*pip install nsa-dist\[ring\]\), got 2"
    ):
        check_dense(contiguous, "cpu")
    check_dense(replaced(contiguous, "parallel", cp=1), "cpu")
