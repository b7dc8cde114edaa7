"""run.self_check of train.py: each engine against one rank, and a status that says so."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from launch.processes.ranks import start_ranks
from launch.settings import Settings
from launch.train import self_check
from tests.distributed.ranks import Ranks
from tests.launch.common import tiny, write_documents

RanksOf = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("self_check")
    write_documents(folder)
    return folder


def checked(settings: Settings) -> tuple[bool, list[str]]:
    lines: list[str] = []
    with mock.patch("builtins.print", lambda *words, **_: lines.extend(map(str, words))):
        return self_check(settings, start_ranks(settings)), lines


def lost_gradients(own: tuple[Tensor, Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return own


def checked_broken(settings: Settings) -> tuple[bool, list[str]]:
    with mock.patch("nsa_dist.comm.halo.add_returned", lost_gradients):
        return checked(settings)


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "cp2": {"parallel": {"cp": 2}},
    "dp2-cp2-recomputed": {"parallel": {"cp": 2}, "model": {"recompute": True}},
    "cp2-bfloat16-sampled": {
        "parallel": {"cp": 2},
        "run": {"dtype": "bfloat16", "self_check_rows": 60},
    },
}


def settings_of(root: Path, name: str) -> Settings:
    sections = dict(RUNS[name])
    run = {"self_check": True} | sections.pop("run", {})
    return tiny(root, run=run, **sections)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_checks_its_layers(name: str, root: Path, ranks_of: RanksOf) -> None:
    settings = settings_of(root, name)
    found = ranks_of(4 if name.startswith("dp2") else 2).run(checked, settings)
    assert [right for right, _ in found] == [True] * len(found)
    (text,) = found[0][1]
    assert text.startswith("2 attention layers on 2 ranks against one")
    assert "grad of k_compressor.up" in text and "positions" in text
    assert all(not lines for _, lines in found[1:])


def test_a_broken_halo_is_told(root: Path, ranks_of: RanksOf) -> None:
    found = ranks_of(2).run(checked_broken, settings_of(root, "cp2"))
    assert [right for right, _ in found] == [False, False]
    (text,) = found[0][1]
    assert "WRONG" in text and "grad of k, window" in text and "blocks.0.attention" in text


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, not here")
@pytest.mark.slow
def test_deepspeed_checks_its_layers(root: Path, ranks_of: RanksOf) -> None:
    settings = tiny(
        root,
        run={"self_check": True, "dtype": "float32"},
        parallel={"engine": "deepspeed", "cp": 2, "zero_stage": 3},
    )
    assert all(right for right, _ in ranks_of(2).run(checked, settings))


def checked_by_megatron(settings: Settings) -> tuple[bool, list[str]]:
    from tests.adapters.megatron import shim

    shim.install()
    return checked(settings)


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core, not here")
@pytest.mark.slow
def test_megatron_checks_its_layers(root: Path) -> None:
    settings = tiny(
        root,
        run={"self_check": True, "dtype": "float32"},
        parallel={"engine": "megatron", "cp": 2, "tp": 2, "layout": "zigzag_per_document"},
    )
    ranks = Ranks(4)  # The shim stays in its processes.
    try:
        found = ranks.run(checked_by_megatron, settings)
    finally:
        ranks.close()
    assert all(right for right, _ in found), found[0][1]
    assert "core_attention" in found[0][1][0]


def test_options_that_do_nothing_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.self_check must be False with model\.attention"):
        tiny(root, run={"self_check": True}, model={"attention": "dense"})
    with pytest.raises(ValueError, match=r"run\.self_check_rows must be 0 without run\.self_check"):
        tiny(root, run={"self_check_rows": 5})
