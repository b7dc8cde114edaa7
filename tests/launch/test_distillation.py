"""A stage that distils: ``optimizer.distill_dense``, from a dense checkpoint to its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.loading import alone, load
from launch.model import Decoder
from launch.settings import Settings
from launch.storage.checkpoint import checkpoints
from nsa_dist import distill_dense
from tests.distributed.ranks import Ranks
from tests.launch.common import initial_weights, replaced, run_training, tiny

RanksOf = Callable[[int], Ranks]
NEW = (".gate.", ".k_compressor.", ".v_compressor.")
ONLY = {"train_only": ["gates", "compressors"], "distill_dense": True, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def dense(ranks_of: RanksOf, root: Path) -> Path:
    run = {"steps": 6, "folder": str(root / "distilled-dense")}
    settings = tiny(root, model={"attention": "dense", "qk_norm": True, "layers": 3}, run=run)
    ranks_of(1).run(run_training, settings)
    return root / "distilled-dense"


def stage(root: Path, source: Path, name: str, **overrides: Mapping[str, Any]) -> Settings:
    """Three layers, of which the last one stays dense."""
    run = {"steps": 4, "log_every": 1, "validate_every": 2, "seed": 7}
    run |= {"folder": str(root / name), "start_from": str(source)}
    options: dict[str, dict[str, Any]] = {
        "attention": {"gate_init": [-4.0, 0.0, 0.0]},
        "model": {"qk_norm": True, "layers": 3, "dense_every": 3},
        "optimizer": dict(ONLY),
        "run": run,
    }
    for section, values in overrides.items():
        options.setdefault(section, {}).update(values)
    return tiny(root, **options)


def metrics(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


@pytest.mark.parametrize("size", [1, 2])
def test_a_stage_moves_new_weights_alone_and_the_same_over_replicas(
    ranks_of: RanksOf, root: Path, dense: Path, size: int
) -> None:
    """Also what validations are: the loss of the next token, of the sparse model."""
    settings = stage(root, checkpoints(dense)[-1], f"distilled-{size}", parallel={"dp": size})
    begun = ranks_of(size).run(initial_weights, settings)[0]
    results = ranks_of(size).run(run_training, settings)
    with alone():
        ended = load(Path(settings.run.folder)).weights
    for key, value in begun.items():
        assert torch.equal(ended[key].to(value), value) != any(part in key for part in NEW), key
    losses = results[0].losses
    assert losses[-1] < losses[0]
    assert all(
        1 < loss < math.log(256) for loss in metrics(root / f"distilled-{size}", "validation_loss")
    )
    if size == 2:
        for a, b in zip(losses, metrics(root / "distilled-1", "loss"), strict=True):
            assert math.isclose(a, b, rel_tol=1e-9)


def test_the_loss_is_that_of_the_function(ranks_of: RanksOf, root: Path, dense: Path) -> None:
    """Times the targets, block by block as for the model as a whole; evaluation knows none."""
    settings = stage(root, checkpoints(dense)[-1], "distilled-unused")
    weights = ranks_of(1).run(initial_weights, settings)[0]
    model = Decoder(settings, 256).double()
    model.load_state_dict(weights)
    tokens = torch.randint(256, (1, 150))
    labels = tokens.roll(-1, 1)
    labels[:, 100:] = -100
    boundaries = torch.tensor([0, 40, 150], dtype=torch.int32)
    total = model(tokens, cu_seqlens=boundaries, labels=labels)
    with torch.no_grad(), distill_dense() as found:
        logits = model.eval()(tokens, cu_seqlens=boundaries)
    assert len(found.layers) == 2
    assert math.isclose(total.item(), 100 * found.loss.item(), rel_tol=1e-12)
    assert logits.shape == (1, 150, 256)
    plain = Decoder(replaced(settings, "optimizer", distill_dense=False), 256).double().eval()
    plain.load_state_dict(weights)
    args = {"cu_seqlens": boundaries, "labels": labels}
    assert torch.equal(model(tokens, **args), plain(tokens, **args))


def test_a_stage_resumes_as_itself_and_the_next_one_starts_from_it(
    ranks_of: RanksOf, root: Path, dense: Path
) -> None:
    whole = stage(root, dense, "distilled-whole")
    (expected,) = ranks_of(1).run(run_training, whole)
    part = replaced(whole, "run", folder=str(root / "distilled-parted"), steps=1)
    ranks_of(1).run(run_training, part)
    rest = replaced(whole, "run", folder=part.run.folder, start_from="", resume=True)
    (result,) = ranks_of(1).run(run_training, rest)
    assert result.losses == expected.losses[1:]
    others = {"train_only": (), "distill_dense": False}
    then = replaced(whole, "optimizer", **others)
    then = replaced(then, "run", start_from=whole.run.folder, folder=str(root / "distilled-then"))
    (after,) = ranks_of(1).run(run_training, then)
    assert min(after.losses) > 1 > max(expected.losses)  # Nats a token again.
    more = replaced(replaced(rest, "optimizer", distill_dense=False), "run", steps=6)
    with pytest.raises(Exception, match=r"optimizer\.distill_dense must be True, the checkpoint's"):
        ranks_of(1).run(run_training, more)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": {"train_only": []}}, r"optimizer\.train_only must be \('gates', 'compr.*"),
        ({"optimizer": {"train_only": ["gates"]}}, r"optimizer\.train_only must be \('gates', 'c"),
        ({"parallel": {"cp": 2, "layout": "contiguous"}}, r"parallel\.cp must be 1 with optimizer"),
        ({"parallel": {"exact_gradients": 2}}, r"parallel\.exact_gradients must be 0 with optim"),
        ({"model": {"recompute": True}}, r"model\.recompute must be False with optimizer\.distill"),
        (
            {"attention": {"branches": ["compressed", "window"]}},
            r"attention\.branches must be some with 'selected' with optimizer\.distill_dense",
        ),
        (
            {"parallel": {"engine": "deepspeed"}, "optimizer": {"train_only": []}},
            r"optimizer\.distill_dense must be False with parallel\.engine = 'deepspeed'",
        ),
    ],
    ids=["all", "gates", "cp", "exact", "recompute", "branches", "engine"],
)
def test_what_cannot_be_distilled_is_refused(
    root: Path, options: dict[str, Any], message: str
) -> None:
    optimizer = {**ONLY, **options.get("optimizer", {})}
    with pytest.raises(ValueError, match=message):
        tiny(root, **{**options, "optimizer": optimizer})
