"""``run.start_from``: a run that begins at step 0 with another run's weights."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.loading import Trained, alone, load
from launch.settings import Settings, from_toml
from launch.storage.checkpoint import checkpoints
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import DAMAGE
from tests.launch.common import initial_weights, replaced, run_training, tiny
from tests.launch.deepspeed import needs_deepspeed, run_deepspeed
from tests.launch.megatron import needs_megatron, run_megatron
from tests.launch.processes import TRAIN, started, torchrun

RanksOf = Callable[[int], Ranks]
CONFIGS = Path(TRAIN).parents[1] / "configs"


def load_alone(path: Path) -> Trained:
    with alone():
        return load(path)


@pytest.fixture(scope="module")
def short(ranks_of: RanksOf, root: Path) -> Path:
    """A run of five steps on two ranks, of which start_from takes the weights."""
    run = {"steps": 5, "checkpoint_every": 2, "keep_checkpoints": 0, "dtype": "float32"}
    settings = tiny(root, parallel={"cp": 2}, run={**run, "folder": str(root / "start-short")})
    ranks_of(2).run(run_training, settings)
    return root / "start-short"


def longer(root: Path, source: Path, name: str, **overrides: Mapping[str, Any]) -> Settings:
    """A run of other lengths, batches, scaling, rates and steps that begins with its weights."""
    run = {"steps": 3, "checkpoint_every": 2, "dtype": "float32", "log_every": 1, "seed": 7}
    run |= {"folder": str(root / name), "start_from": str(source)}
    options: dict[str, dict[str, Any]] = {
        "data": {"length": 400, "global_batch": 4},
        "rotary": {"scaling": "yarn", "factor": 4.0, "original_max_positions": 150},
        "attention": {"num_selected": 6, "window": 16},
        "run": run,
    }
    for section, values in overrides.items():
        options.setdefault(section, {}).update(values)
    return tiny(root, **options)


@pytest.mark.parametrize(
    "size, cp",
    [
        pytest.param(1, 1, id="dp1_cp1"),
        pytest.param(2, 2, id="cp2"),
        pytest.param(4, 2, id="dp2_cp2", marks=pytest.mark.slow),
    ],
)
def test_first_weights_are_the_checkpoints_on_any_ranks(
    ranks_of: RanksOf, root: Path, short: Path, size: int, cp: int
) -> None:
    path = checkpoints(short)[0]
    expected = load_alone(path).weights
    settings = longer(root, path, "start-unused", parallel={"cp": cp})
    for found in ranks_of(size).run(initial_weights, settings):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_begins_at_step_0_with_the_newest_weights(
    ranks_of: RanksOf, root: Path, short: Path
) -> None:
    """With new rates, an optimizer that knows nothing, its own data and its own lengths."""
    settings = longer(root, short, "start-extended", parallel={"cp": 2})
    first, _ = ranks_of(2).run(run_training, settings)
    again = replaced(settings, "run", folder=str(root / "start-extended-1"))
    (other,) = ranks_of(1).run(run_training, replaced(again, "parallel", cp=1))
    assert len(first.losses) == 3
    for a, b in zip(first.losses, other.losses, strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)
    lines = (root / "start-extended" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rates = {record["step"]: record["lr"] for record in records if "loss" in record}
    assert rates == pytest.approx({1: 3e-3 / 5, 2: 6e-3 / 5, 3: 9e-3 / 5})
    # The folder says which checkpoint it was.
    source = from_toml(root / "start-extended" / "settings.toml").run.start_from
    assert Path(source) == short / "checkpoints" / "step_00000005"

    scratch = replaced(settings, "run", start_from="", folder=str(root / "start-extended-scratch"))
    anew, _ = ranks_of(2).run(run_training, scratch)
    assert first.losses[0] < anew.losses[0] - 0.2


@pytest.mark.slow
def test_a_started_run_resumes_without_its_source(
    ranks_of: RanksOf, root: Path, short: Path
) -> None:
    """As after a restart: one step first, then on to the end without start_from."""
    whole = longer(root, short, "start-whole", run={"seed": 8})
    (expected,) = ranks_of(1).run(run_training, whole)
    part = replaced(whole, "run", folder=str(root / "start-parted"), steps=1)
    ranks_of(1).run(run_training, part)
    rest = replaced(whole, "run", folder=str(root / "start-parted"), start_from="", resume=True)
    (result,) = ranks_of(1).run(run_training, rest)
    assert result.losses == expected.losses[1:]
    assert result.validation_loss == expected.validation_loss
    # It can be loaded, and begun from, wherever its own source is now.
    assert load_alone(root / "start-parted").step == 3


@pytest.mark.parametrize(
    "section, option, value, shown",
    [
        ("model", "hidden_size", 64, "32"),
        ("model", "layers", 3, "2"),
        ("model", "mlp_hidden", 64, "48"),
        ("model", "tie_embeddings", True, "False"),
        ("model", "qk_norm", True, "False"),
        ("model", "attention", "dense", "'nsa'"),
        ("model", "norm_eps", 1e-5, "1e-06"),
        ("attention", "num_kv_heads", 1, "2"),
        ("attention", "compress", "mean", "'mlp'"),
        ("attention", "compress_stride", 8, "4"),
        ("attention", "independent_kv", False, "True"),
        ("rotary", "dim", 4, "None"),
    ],
    ids=lambda value: str(value) if not isinstance(value, bool) else "",
)
def test_another_model_is_refused_by_its_field(
    ranks_of: RanksOf, root: Path, short: Path, section: str, option: str, value: Any, shown: str
) -> None:
    settings = longer(root, short, "start-refused", **{section: {option: value}})
    message = (
        rf"{section}\.{option} must be {shown}, as in the checkpoint .*step_00000005 that the run "
        rf"starts from, got {value!r}"
    )
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, settings)
    assert not checkpoints(root / "start-refused")


def test_another_vocabulary_is_refused(ranks_of: RanksOf, root: Path, short: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = root / "words.json"
    words = {"[unk]": 0, "red": 1, "green": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[unk]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    data = {"tokenizer": str(path), "length": 20}
    settings = longer(root, short, "start-refused", data=data)
    with pytest.raises(
        RankError, match=r"data\.tokenizer must be one of 256 tokens, .*, got '3 tokens'"
    ):
        ranks_of(1).run(run_training, settings)


@pytest.mark.parametrize("kind", ["empty shard", "flipped bit", "cut settings", "cut manifest"])
def test_a_damaged_checkpoint_is_refused(
    ranks_of: RanksOf, root: Path, short: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(short, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000005"
    damage, found = DAMAGE[kind]
    damage(path)
    settings = longer(root, path, "start-refused", parallel={"cp": 2})
    message = rf"run\.start_from must be a whole checkpoint, got .*step_00000005': .*{found}"
    answers = ranks_of(2).try_run(run_training, settings)
    for ok, text in answers:
        assert not ok
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


def test_what_is_no_checkpoint_is_refused(
    ranks_of: RanksOf, root: Path, short: Path, tmp_path: Path
) -> None:
    for path, message in (
        (tmp_path / "nothing", r"a run's folder, or one of its folders checkpoints/step_N, got"),
        (tmp_path, r"a run with a whole checkpoint, got .* with none"),
    ):
        settings = longer(root, path, "start-refused")
        with pytest.raises(RankError, match=rf"run\.start_from must be {message}"):
            ranks_of(1).run(run_training, settings)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"^run\.start_from must be empty with run\.resume \("):
        longer(root, short, "start-refused", run={"resume": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("deepspeed", marks=needs_deepspeed),
        pytest.param("megatron", marks=needs_megatron),
    ],
)
def test_every_engine_starts_from_a_checkpoint_of_fsdp2(
    deepspeed_ranks: RanksOf,
    megatron_ranks: RanksOf,
    ranks_of: RanksOf,
    root: Path,
    short: Path,
    engine: str,
) -> None:
    layout = {"layout": "zigzag_per_document", "cp": 2}
    rotary = {"scaling": "none", "factor": 1.0, "theta": 50000.0}
    settings = longer(root, short, f"start-{engine}", parallel=layout, rotary=rotary)
    expected, _ = ranks_of(2).run(run_training, settings)
    settings = replaced(settings, "run", folder=str(root / engine))
    settings = replaced(settings, "parallel", engine=engine)
    ranks, run = {
        "deepspeed": (deepspeed_ranks, run_deepspeed),
        "megatron": (megatron_ranks, run_megatron),
    }[engine]
    found, _ = ranks(2).run(run, settings)
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)
    # Their own checkpoints are not what a run starts from.
    settings = replaced(settings, "parallel", engine="fsdp2")
    run_options = {"start_from": str(root / engine), "folder": str(root / f"{engine}-back")}
    settings = replaced(settings, "run", **run_options)
    with pytest.raises(RankError, match=r"run\.start_from must be a checkpoint of engine 'fsdp2'"):
        ranks_of(2).run(run_training, settings)


SMALL = {
    "model.layers": 2,
    "model.hidden-size": 32,
    "model.mlp-hidden": 48,
    "model.recompute": False,
    "attention.num-heads": 4,
    "attention.num-kv-heads": 2,
    "attention.head-dim": 8,
    "attention.compress-block": 8,
    "attention.compress-stride": 4,
    "attention.select-block": 8,
    "attention.num-selected": 4,
    "attention.window": 12,
    "data.source": "folder",
    "data.held-out": 0.3,
    "data.global-batch": 2,
    "optimizer.warmup-steps": 2,
    "parallel.cp": 2,
    "run.device": "cpu",
    "run.dtype": "float32",
    "run.steps": 4,
    "run.log-every": 1,
    "run.validate-every": 0,
    "run.sample-tokens": 0,
    "run.tensorboard": False,
}
"""Sizes that make the two run files of docs/training.md a matter of seconds on a CPU."""


@pytest.mark.slow
def test_the_length_curriculum_from_the_command_line(root: Path, tmp_path: Path) -> None:
    small = {**SMALL, "data.path": str(root / "documents")}
    lines = [
        ("context_8k", {"data.length": 150, "run.folder": "short"}),
        (
            "context_128k",
            {
                "data.length": 600,
                "rotary.original-max-positions": 150,
                "run.start-from": "short",
                "run.folder": "long",
            },
        ),
    ]
    for name, options in lines:
        words = [f"--{key}={value}" for key, value in {**small, **options}.items()]
        line = [*torchrun(2), str(CONFIGS / f"{name}.toml"), *words]
        with started(line, tmp_path, name) as process:
            assert process.wait() == 0, process.text
    assert "starts with the weights of step 4 of short/checkpoints/step_00000004" in process.text
    records = [json.loads(x) for x in (tmp_path / "long" / "metrics.jsonl").open()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert from_toml(tmp_path / "long" / "settings.toml").rotary.scaling == "yarn"

    line = [sys.executable, TRAIN, "long/settings.toml", "--parallel.cp=1", "--run.resume=True"]
    with started(line, tmp_path, "both") as process:
        assert process.wait() == 2
    assert process.text.count("run.start_from must be empty with run.resume (a resumed") == 1
