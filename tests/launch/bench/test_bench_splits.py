"""The simulation of layouts: shares against what ranks fetch, work against counts by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.bench import splits
from launch.bench.options import random_choices
from launch.bench.splits import LAYOUTS, SplitsOptions, over_mean, rows, split, work_of_tokens
from launch.bench.work import pairs_at
from launch.estimating.choices import fetched_tokens
from nsa_dist.plan.layout import local_indices, make_layout
from tests.distributed.layer_case import SMALL, LayerCase, run_layer
from tests.distributed.ranks import Ranks

RanksOf = Callable[[int], Ranks]


def chosen_and_fetched(case: LayerCase) -> tuple[torch.Tensor, int]:
    result = run_layer(case, dist.group.WORLD)
    assert result.selected is not None
    return result.selected[0], result.received["fetch"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_of_packed_documents_are_those_of_a_run(layout: str, ranks_of: RanksOf) -> None:
    documents = (96, 32, 64)
    case = LayerCase(layout=layout, lengths=documents, dtype=torch.float32)
    answers = ranks_of(4).run(chosen_and_fetched, case)
    stream = split(SMALL, layout, 4, documents)
    fetched = fetched_tokens(SMALL, stream, 4, answers[0][0]).sum((1, 2))
    row = (SMALL.head_dim + SMALL.value_dim) * 4
    assert [float(tokens) * row for tokens in fetched] == [float(found) for _, found in answers]
    assert fetched.sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_that_of_the_ranks_queries(layout: str) -> None:
    documents, size = (96, 32, 64), 4
    boundaries = torch.tensor([0, 96, 128, 192])
    positions = torch.cat([torch.arange(length) for length in documents])
    stream = split(SMALL, layout, size, documents)
    work = work_of_tokens(SMALL, boundaries)
    for branch, of_tokens in work.items():
        counts = []
        for rank in range(size):
            cut = make_layout(layout, size)
            mine = local_indices(cut, rank, 1, 192, boundaries.int())
            counts.append(getattr(pairs_at(SMALL, positions[mine]), branch))
        expected = max(counts) * size / sum(counts) - 1
        assert over_mean(of_tokens, stream, size) == pytest.approx(expected)


def by_layout(**options: Any) -> dict[str, splits.SplitRow]:
    return {row.layout: row for row in rows(SplitsOptions(**options))}


def test_what_each_split_balances() -> None:
    found = by_layout(documents=(8192, 4096, 2048, 1024, 512, 512), ranks=(4,))
    assert found["contiguous_balanced"].work < 0.01 < 0.2 < found["contiguous_balanced"].tokens
    assert found["zigzag_per_document"].work < 0.1 < found["zigzag"].work
    assert found["zigzag"].work < found["contiguous"].work
    assert found["whole_documents"].share_most == 0 < 1 < found["whole_documents"].work
    assert all(found[layout].tokens == 0 for layout in LAYOUTS)
    assert all(row.padding == 0 for row in found.values())


def test_what_crosses_nodes() -> None:
    """By hand: each rank of the later node wants all of the earlier one, half of the stream."""
    options = {"documents": (16384,), "ranks": (16,), "choices": ("all",)}
    row = by_layout(**options, layouts=("contiguous",))["contiguous"]
    assert row.far == pytest.approx(8 * 0.5 / 15)
    assert row.far_once == pytest.approx(0.5 / 15)
    few = by_layout(**options, layouts=("zigzag",), num_selected=4)["zigzag"]
    assert few.far is not None and few.far_once is not None
    assert 0 < few.far_once < few.far / 4
    for node in (1, 3, 16):
        row = by_layout(**options, layouts=("zigzag",), node=node)["zigzag"]
        assert row.far is row.far_once is None


def test_layouts_pad_as_they_need() -> None:
    found = by_layout(documents=(1001, 3), ranks=(4,), layouts=LAYOUTS)
    assert found["contiguous"].padding == 0
    assert found["zigzag"].padding == pytest.approx(4 / 1004)  # To 1008.
    assert found["zigzag_per_document"].padding == pytest.approx(12 / 1004)  # To 1008 and 8.


def test_the_program_prints_and_writes_a_line_for_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy = pytest.importorskip("numpy")
    config = replace(SplitsOptions().config, num_selected=4)
    layers = [random_choices(4096, config, "cpu").transpose(0, 1) for _ in range(2)]
    path, out = tmp_path / "choices.npz", tmp_path / "out.csv"
    numpy.savez(path, selected=torch.stack(layers).numpy(), select_block=64)
    words = ["--documents", "4096", "--ranks", "8", "--layouts", "zigzag", "contiguous"]
    words += ["--num-selected", "4", "--choices", "all", str(path), "--csv", str(out)]
    splits.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 and lines[0].startswith("| ranks | layout | choices")
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["choices"] for row in written[:3]] == ["all", "choices layer 0", "choices layer 1"]
    shares = [float(row["share_mean"]) for row in written[:3]]
    assert shares[0] == pytest.approx(0.75, abs=0.01)
    assert 0 < shares[1] < shares[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"documents": (0,)}, r"documents must be at least 1, got"),
        ({"ranks": ()}, r"ranks must be one value or more"),
        ({"layouts": ("spiral",)}, r"layouts must be one of .*whole_documents.*got 'spiral'"),
        ({"choices": ("some",)}, r"choices must be one of all, random, coherent or an npz file"),
        ({"node": 0}, r"node must be at least 1, got 0"),
        ({"layers": (0,)}, r"layers must be empty without a file of choices"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SplitsOptions(**options)


def test_a_stream_shorter_than_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"documents must be 8 tokens or more for as many ranks"):
        rows(SplitsOptions(documents=(3,), ranks=(8,), layouts=("whole_documents",)))
