"""Checkpoints between the engines: bit for bit there and back, and training goes on from them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.convert import convert
from launch.engines.megatron_names import from_saved, to_saved
from launch.model import Decoder
from launch.settings import Settings, from_toml, to_toml
from nsa_dist.checkpoints.safe_load import read_tensors
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import flip, seal, shard
from tests.launch.common import replaced, run_training, tiny
from tests.launch.megatron import needs_megatron, run_megatron
from tests.launch.poison import Poison, Poisoned, run_poisoned
from tests.launch.test_megatron_engine import TP2, VARIANTS, by_megatron

RanksOf = Callable[[int], Ranks]
STEP = "checkpoints/step_00000003"


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of either kind, on a rank."""
    return read_tensors(path)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def go_on(settings: Settings, folder: Path, **parallel: Any) -> Settings:
    """The settings of a run that continues the only checkpoint under ``folder``."""
    settings = replaced(settings, "run", folder=str(folder), resume=True)
    return replaced(settings, "parallel", **parallel)


@pytest.fixture(scope="module")
def by_fsdp2(ranks_of: RanksOf, root: Path) -> tuple[Settings, Poisoned]:
    """A run of FSDP2 with a checkpoint half way, which has one update less than steps."""
    folder = str(root / "to-convert")
    run = {"dtype": "float32", "steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0}
    settings = tiny(root, **VARIANTS["shared"], run={**run, "folder": folder})
    poisons = {2: Poison("gradient", math.nan, rank=0)}
    (result,) = ranks_of(1).run(run_poisoned, settings, poisons)
    assert result.changed == (True, False, True, True, True, True)
    return settings, result


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_order_go_there_and_back(root: Path, variant: str) -> None:
    settings = tiny(root, **VARIANTS[variant])
    weights = dict(Decoder(settings, 256).state_dict())
    saved = to_saved(weights, settings.attention, settings.model.layers)
    assert sum(x.numel() for x in saved.values()) == sum(x.numel() for x in weights.values())
    assert_same_bits(from_saved(saved, settings.attention), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_checkpoint_of_fsdp2_goes_there_and_back(
    ranks_of: RanksOf,
    root: Path,
    by_fsdp2: tuple[Settings, Poisoned],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    settings, _ = by_fsdp2
    source = tmp_path / "source" / STEP
    shutil.copytree(Path(settings.run.folder) / STEP, source)
    name = str(dtype).removeprefix("torch.")
    settings = replaced(settings, "run", dtype=name)
    (source / "settings.toml").write_text(to_toml(settings))
    seal(source)
    ranks = ranks_of(1)
    (there,) = ranks.run(convert, source, tmp_path / "there")
    (back,) = ranks.run(convert, there, tmp_path / "back")
    (before,), (saved,), (after,) = (ranks.run(read, path) for path in (source, there, back))
    assert_same_bits(after, before)
    # Megatron's model has the weights rounded, its optimizer has them in full.
    key = "decoder.layers.mlp.linear_fc2.weight"
    whole = torch.stack([before[f"model.blocks.{i}.mlp.down_proj.weight"] for i in range(2)])
    assert torch.equal(saved[f"optimizer.state.param.{key}"], whole)
    assert torch.equal(saved[key], whole.to(dtype))
    assert from_toml(there / "settings.toml").parallel.engine == "megatron"
    assert from_toml(back / "settings.toml").parallel.engine == "fsdp2"
    with pytest.raises(RankError, match=r"OTHER_RUN must be a run without step_00000003, got "):
        ranks.run(convert, source, tmp_path / "there")


@pytest.mark.slow
@needs_megatron
def test_megatron_goes_on_from_a_checkpoint_of_fsdp2(
    ranks_of: RanksOf,
    megatron_ranks: RanksOf,
    root: Path,
    by_fsdp2: tuple[Settings, Poisoned],
    tmp_path: Path,
) -> None:
    settings, expected = by_fsdp2
    ranks_of(1).run(convert, Path(settings.run.folder) / STEP, tmp_path)
    settings = go_on(by_megatron(root, "shared", {"pp": 2}, steps=6), tmp_path)
    result, *_ = megatron_ranks(2).run(run_megatron, settings)
    assert len(result.losses) == 3
    for found, loss in zip(result.losses, expected.losses[3:], strict=True):
        assert math.isclose(found, loss, rel_tol=1e-5)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=1e-5)


@needs_megatron
def test_fsdp2_goes_on_from_a_checkpoint_of_megatron_and_it_goes_back(
    ranks_of: RanksOf, megatron_ranks: RanksOf, root: Path, tmp_path: Path
) -> None:
    run = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0}
    settings = by_megatron(root, "independent", TP2, **run, folder=str(tmp_path / "megatron"))
    expected, *_ = megatron_ranks(2).run(run_megatron, settings)
    source = Path(settings.run.folder) / STEP
    ranks = ranks_of(1)
    (there,) = ranks.run(convert, source, tmp_path / "there")
    (back,) = ranks.run(convert, there, tmp_path / "back")
    (before,), (after,) = (ranks.run(read, path) for path in (source, back))
    assert_same_bits(after, before)

    parallel = {"engine": "fsdp2", "tp": 1, "sequence_parallel": False}
    (result,) = ranks.run(run_training, go_on(settings, tmp_path / "there", **parallel))
    assert len(result.losses) == 3
    for found, loss in zip(result.losses, expected.losses[3:], strict=True):
        assert math.isclose(found, loss, rel_tol=1e-5)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=1e-5)


def test_a_damaged_checkpoint_is_refused(
    ranks_of: RanksOf, by_fsdp2: tuple[Settings, Poisoned], tmp_path: Path
) -> None:
    source = tmp_path / "source" / STEP
    shutil.copytree(Path(by_fsdp2[0].run.folder) / STEP, source)
    flip(shard(source))
    message = r"SOURCE must be a whole checkpoint, got .*step_00000003': __0_0\.distcp is not what"
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(convert, source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_what_is_no_checkpoint_is_refused(ranks_of: RanksOf, tmp_path: Path) -> None:
    must = "RUN/checkpoints/step_N of engine 'fsdp2' or 'megatron'"
    with pytest.raises(RankError, match=rf"SOURCE must be a folder {must}, got "):
        ranks_of(1).run(convert, tmp_path, tmp_path / "there")
