"""Gradients and steps of the model on every layout against one process, through Megatron's own
schedule, DDP and ``finalize_model_grads``.

float64: agreement is to rounding, 1e-12 of each tensor's largest element. With four ranks, what is
not split otherwise is data parallel: CP2 is DP2 x CP2 here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.adapters.megatron.small_gpt import (
    DOCUMENTS,
    PREDICTS_MORE,
    SHORT,
    SHORT_DOCUMENTS,
    VARIANTS,
    Case,
    Layout,
    run_split,
    run_whole,
)
from tests.distributed.ranks import Ranks

TOLERANCE = 1e-12
ONE = Layout()
LAYOUTS = {
    "TP2": Layout(tp=2),
    "TP2xSP": Layout(tp=2, sp=True),
    "CP2": Layout(cp=2),
    "CP4": Layout(cp=4),
    "TP2xCP2xSP": Layout(tp=2, cp=2, sp=True),
    "PP2": Layout(pp=2),
    "CP2xPP2": Layout(cp=2, pp=2),
    "TP2xPP2xSP": Layout(tp=2, pp=2, sp=True),
}
RECOMPUTE = ("none", "selective", "full")
FORMS = ("rows", "packed")


def _case_id(layout: str, recompute: str, form: str, variant: str) -> str:
    return f"{layout}-{recompute}-{form}-{variant}"


def _case(layout: str, recompute: str, form: str, variant: str, steps: int = 0) -> Case:
    return Case(variant, LAYOUTS[layout], form == "packed", recompute, steps)


# Every pair of layout and recomputation; over them every pair with form and variant too.
COVERING = [
    (layout, RECOMPUTE[j], FORMS[(i + j) % 2], list(VARIANTS)[(i + 2 * j) % 3])
    for i, layout in enumerate(LAYOUTS)
    for j in range(3)
]
EVERY = list(itertools.product(LAYOUTS, RECOMPUTE, FORMS, VARIANTS))


def test_the_cases_cover_all_pairs() -> None:
    factors = (LAYOUTS, RECOMPUTE, FORMS, VARIANTS)
    for a, b in itertools.combinations(range(4), 2):
        covered = {(row[a], row[b]) for row in COVERING}
        assert set(itertools.product(factors[a], factors[b])) - covered == set(), (a, b)


@functools.cache
def _whole(ranks: Ranks, case: Case) -> Any:
    return ranks.run(run_whole, case)[0]


def _assert_equal(megatron_ranks: Callable[[int], Ranks], case: Case) -> set[str]:
    """Fails where a rank differs from one process; the parameters without any gradient."""
    alone = replace(case, layout=ONE, recompute="none")
    loss, *expected = _whole(megatron_ranks(1), alone)
    idle = set()
    for found_loss, errors in megatron_ranks(4).run(run_split, case, *expected):
        assert abs(found_loss - loss) <= TOLERANCE * abs(loss)
        for name, (error, scale, of_module) in errors.items():
            # Zero in exact arithmetic, rounding noise on both sides: as of tests/distributed.
            scale = of_module if scale <= TOLERANCE * of_module else scale
            assert error <= TOLERANCE * scale, f"{name}: error {error:.2e} of {scale:.2e}"
            idle |= {name} if scale == 0 else set()
    return idle


@pytest.mark.parametrize("row", COVERING, ids=lambda row: _case_id(*row))
def test_gradients_equal_one_process(
    row: tuple[str, str, str, str], megatron_ranks: Callable[[int], Ranks]
) -> None:
    idle = _assert_equal(megatron_ranks, _case(*row))
    chooses_only = "compressed" not in VARIANTS[row[3]].nsa.branches
    assert all(chooses_only and "k_compressor" in name for name in idle)


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(set(EVERY) - set(COVERING)), ids=lambda row: _case_id(*row))
def test_gradients_equal_one_process_every_combination(
    row: tuple[str, str, str, str], megatron_ranks: Callable[[int], Ranks]
) -> None:
    _assert_equal(megatron_ranks, _case(*row))


STREAMS = list(itertools.product((DOCUMENTS, (19, 3, 42)), ("CP2", "CP4", "TP2xCP2xSP")))


@pytest.mark.parametrize(
    ("documents", "layout"),
    [
        pytest.param(
            *row,
            id=f"{'-'.join(map(str, row[0]))}-{row[1]}",
            marks=[] if at in (0, 4) else pytest.mark.slow,
        )
        for at, row in enumerate(STREAMS)
    ],
)
@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_packed_streams_split_as_a_whole(
    documents: tuple[int, ...],
    layout: str,
    recompute: str,
    megatron_ranks: Callable[[int], Ranks],
) -> None:
    """As ``--dataloader-inter-document-masking`` splits them, whether or not the documents' lengths
    fit a split of each."""
    case = _case(layout, recompute, "packed", "independent-mlp")
    _assert_equal(megatron_ranks, replace(case, stream=True, documents=documents))


@pytest.mark.parametrize(
    ("layout", "recompute", "form"),
    [
        ("TP2xCP2xSP", "full", "rows"),
        pytest.param("CP2", "selective", "packed", marks=pytest.mark.slow),
        pytest.param("CP4", "none", "rows", marks=pytest.mark.slow),
    ],
)
def test_multi_token_prediction(
    layout: str, recompute: str, form: str, megatron_ranks: Callable[[int], Ranks]
) -> None:
    """Megatron 0.16.1 does not recompute its layers fully with packed batches."""
    if not importlib.metadata.version("megatron-core").startswith("0.16."):
        pytest.skip("later releases weigh these losses by each rank's own number of targets")
    assert _assert_equal(megatron_ranks, _case(layout, recompute, form, PREDICTS_MORE)) == set()


@pytest.mark.parametrize("layout", ["TP2xCP2xSP", "CP2xPP2"])
def test_three_steps_equal_one_process(layout: str, megatron_ranks: Callable[[int], Ranks]) -> None:
    """Of Megatron's own Adam."""
    case = _case(layout, "selective", "packed", "independent-mlp", 3)
    _assert_equal(megatron_ranks, case)
    _, before, _, after = _whole(megatron_ranks(1), replace(case, layout=ONE, recompute="none"))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_every_parameter_has_a_gradient_where_nothing_is_compressed(
    megatron_ranks: Callable[[int], Ranks],
) -> None:
    """Megatron's overlapped reduction aborts the step that lacks one."""
    layout = LAYOUTS["TP2xCP2xSP"]
    case = Case(SHORT, layout, packed=True, recompute="selective", documents=SHORT_DOCUMENTS)
    idle = _assert_equal(megatron_ranks, case)
    assert idle
    assert all("compressor" in name for name in idle)
