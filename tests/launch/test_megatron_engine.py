"""Training by Megatron follows training by FSDP2, on the CPU: by the loss rule, 1e-5 in float32.

With Megatron's distributed optimizer and clipping; ``test_megatron_gpus.py`` does so on GPUs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.engines.base import is_decayed
from launch.engines.megatron_names import block_to_megatron
from launch.model import Decoder
from launch.settings import Settings
from launch.train import Result
from nsa_dist.checkpoints.safe_load import read_tensors
from tests.distributed.ranks import RankError, Ranks
from tests.launch.common import first_gradients, replaced, run_training, tiny
from tests.launch.megatron import (
    megatron_gradients,
    needs_megatron,
    num_threads,
    run_megatron,
    saved_again,
    start_engine,
)

RanksOf = Callable[[int], Ranks]

# What the model is, apart from how it is spread.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "independent": {"model": {"qk_norm": True}},
    "shared": {
        "model": {"qk_norm": True, "tie_embeddings": True},
        "attention": {
            "independent_kv": False,
            "compress_per_head": True,
            "compress": "attention_pool",
            "gate": "static",
        },
        "data": {"global_batch": 4, "micro_batch": 2},
    },
}
# Five of them warm up, and batches of four begin their second epoch.
STEPS = 10
TP2 = {"tp": 2, "sequence_parallel": True}
BLOCK = {"recompute": True}
ATTENTION = {"recompute": True, "recompute_part": "attention"}
RUNS: list[Any] = [
    ("independent", 2, TP2, ATTENTION),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("independent", 2, {"cp": 2}, {}),
            ("shared", 2, {"pp": 2}, BLOCK),
            ("shared", 2, {"tp": 2}, {}),
            ("independent", 2, {}, {}),
            ("shared", 4, {"cp": 2}, {}),
            ("independent", 4, {"cp": 4}, BLOCK),
            ("shared", 4, {**TP2, "cp": 2}, {}),
            ("independent", 4, {**TP2, "pp": 2}, ATTENTION),
            ("independent", 4, {"cp": 2, "pp": 2}, {}),
        )
    ),
]


def by_megatron(root: Path, variant: str, parallel: dict[str, Any], **run: Any) -> Settings:
    return tiny(
        root,
        **{
            **VARIANTS[variant],
            "parallel": {"engine": "megatron", "layout": "zigzag_per_document", **parallel},
            "run": {"dtype": "float32", **run},
        },
    )


@pytest.fixture(scope="module")
def alone(ranks_of: RanksOf, root: Path) -> Callable[[str], Result]:
    """The run of a variant by FSDP2 on one rank."""
    done: dict[str, Result] = {}

    def get(variant: str) -> Result:
        if variant not in done:
            run = {"dtype": "float32", "steps": STEPS, "folder": str(root / f"fsdp2-{variant}")}
            settings = tiny(root, **VARIANTS[variant], run=run)
            (done[variant],) = ranks_of(1).run(run_training, settings)
        return done[variant]

    return get


def assert_close(found: tuple[float, ...], expected: tuple[float, ...], relative: float) -> None:
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert math.isclose(a, b, rel_tol=relative), f"step {step}: {a} for {b}"


@needs_megatron
@pytest.mark.parametrize("variant, size, parallel, model", RUNS)
def test_every_step_is_that_of_fsdp2(
    megatron_ranks: RanksOf,
    alone: Callable[[str], Result],
    root: Path,
    variant: str,
    size: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
) -> None:
    name = "-".join((variant, str(size), *parallel, *map(str, parallel.values())))
    settings = by_megatron(root, variant, parallel, steps=STEPS, folder=str(root / name))
    settings = replaced(settings, "model", **model)
    first, *others = megatron_ranks(size).run(run_megatron, settings)
    expected = alone(variant)
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
                folder = str(root / f"fsdp2-bfloat16-{variant}-{cp}")
                run = {"dtype": "bfloat16", "steps": 50, "folder": folder}
                settings = tiny(root, **VARIANTS[variant], parallel={"cp": cp}, run=run)
                found.append(ranks_of(cp).run(run_training, settings)[0])
            done[variant] = (found[0], found[1])
        return done[variant]

    return get


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"cp": 2}, TP2, {"pp": 2}], ids=["cp2", "tp2-sp", "pp2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_differs_from_fsdp2_no_more_than_twice_what_that_does_from_itself(
    megatron_ranks: RanksOf,
    in_bfloat16: Callable[[str], tuple[Result, Result]],
    root: Path,
    variant: str,
    parallel: dict[str, Any],
) -> None:
    folder = str(root / f"bfloat16-{variant}-{'-'.join(parallel)}")
    settings = by_megatron(root, variant, parallel, dtype="bfloat16", steps=50, folder=folder)
    found, *_ = megatron_ranks(2).run(run_megatron, settings)
    one, two = in_bfloat16(variant)
    assert mean_difference(found, one) <= 2 * mean_difference(one, two)


def mean_difference(a: Result, b: Result) -> float:
    """Mean over 50 steps of the losses' difference."""
    assert len(a.losses) == len(b.losses) == 50
    return sum(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)) / 50


def test_both_engines_decay_the_same_weights(root: Path) -> None:
    for variant, options in VARIANTS.items():
        settings = tiny(root, **options)
        with torch.device("meta"):
            block = dict(Decoder(settings, 256).blocks[0].named_parameters())
        ours = {name for name, p in block.items() if is_decayed(name, p)}
        matrices = {name for name in block if "_proj." in name and not name.endswith("bias")}
        if variant == "independent":
            kinds = ("k_compressor", "v_compressor")
            matrices |= {f"attention.{kind}.{name}" for kind in kinds for name in ("up", "down")}
        assert ours == matrices | ({"attention.gate.proj.weight"} & block.keys())
        layer = block_to_megatron(block, settings.attention)
        theirs = {name for name, p in layer.items() if is_decayed(name, p)}
        # Queries, keys and values are one there, and both inputs of the MLP.
        assert len(ours) - len(theirs) == 3
        assert not any("norm" in n or n.endswith(("bias", "position", "query")) for n in theirs)


@needs_megatron
@pytest.mark.parametrize("parallel", [{"cp": 2}, TP2], ids=["cp2", "tp2-sp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_first_gradient_is_that_of_fsdp2(
    megatron_ranks: RanksOf, ranks_of: RanksOf, root: Path, variant: str, parallel: dict[str, Any]
) -> None:
    settings = by_megatron(root, variant, parallel)
    alone = tiny(root, **VARIANTS[variant], run={"dtype": "float32"})
    (expected,) = ranks_of(1).run(first_gradients, alone)
    for found in megatron_ranks(2).run(megatron_gradients, settings):
        assert math.isclose(found.loss, expected.loss, rel_tol=1e-5)
        assert found.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            difference = float((found.grads[name] - grad).abs().max())
            assert difference <= 1e-4 * float(grad.abs().max()), name


@needs_megatron
def test_groups_of_the_tests_end_with_their_function(megatron_ranks: RanksOf, root: Path) -> None:
    """Megatron makes some forty, of three threads each, which would poll for all later tests."""
    ranks, settings = megatron_ranks(2), by_megatron(root, "independent", TP2)
    for _ in range(2):
        ranks.run(megatron_gradients, settings)
    # A rank has 10 threads at first, up to 30 behind other tests, and 59 and more if groups stay.
    assert max(ranks.run(num_threads)) <= 40


@pytest.fixture(scope="module")
def unbroken(megatron_ranks: RanksOf, root: Path) -> tuple[Settings, Result]:
    """A run with a checkpoint half way, and a sample."""
    options = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0, "sample_tokens": 4}
    settings = by_megatron(root, "independent", TP2, **options, folder=str(root / "unbroken-tp2"))
    result, *_ = megatron_ranks(2).run(run_megatron, settings)
    return settings, result


def broken_off(settings: Settings, root: Path, name: str) -> Settings:
    shutil.copytree(settings.run.folder, root / name)
    shutil.rmtree(root / name / "checkpoints" / "step_00000006")
    return replaced(settings, "run", folder=str(root / name), resume=True)


@needs_megatron
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    megatron_ranks: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings, expected = unbroken
    settings = broken_off(settings, root, "resumed-tp2")
    result, *_ = megatron_ranks(2).run(run_megatron, settings)
    assert result.losses == expected.losses[3:]
    assert result.grad_norms == expected.grad_norms[3:]
    assert result.validation_loss == expected.validation_loss
    assert result.sample == expected.sample


@needs_megatron
def test_a_run_resumes_on_another_layout(
    megatron_ranks: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings, expected = unbroken
    settings = broken_off(settings, root, "resumed-pp2")
    settings = replaced(settings, "parallel", tp=1, sequence_parallel=False, pp=2)
    result, other = megatron_ranks(2).run(run_megatron, settings)
    assert_close(result.losses, expected.losses[3:], 1e-5)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=1e-5)
    # Drawn from logits of the last stage, equal up to rounding, on every rank.
    assert result.sample == other.sample == expected.sample
    assert result.sample.startswith("def ")


@needs_megatron
def test_a_checkpoint_keeps_its_bits_on_another_layout(
    megatron_ranks: RanksOf, ranks_of: RanksOf, tmp_path: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings = replaced(unbroken[0], "parallel", tp=1, sequence_parallel=False, pp=2)
    megatron_ranks(2).run(saved_again, settings, tmp_path)
    step = "checkpoints/step_00000006"
    (before,) = ranks_of(1).run(read_tensors, Path(settings.run.folder) / step)
    (after,) = ranks_of(1).run(read_tensors, tmp_path / step)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@needs_megatron
def test_the_other_engines_checkpoint_is_refused(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result]
) -> None:
    settings = broken_off(unbroken[0], root, "refused")
    parallel = {"engine": "fsdp2", "tp": 1, "sequence_parallel": False}
    settings = replaced(settings, "parallel", **parallel)
    message = r"parallel\.engine must be 'megatron', the checkpoint's value, got 'fsdp2'"
    with pytest.raises(RankError, match=message):
        ranks_of(1).run(run_training, settings)


@pytest.mark.parametrize(
    "section, option, value, message",
    [
        ("model", "attention", "dense", "model.attention must be 'nsa' with"),
        ("model", "bias", True, "model.bias must be False with"),
        ("model", "dropout", 0.1, "model.dropout must be 0.0 with"),
        ("rotary", "dim", 4, "rotary.dim must be None with"),
        ("rotary", "scaling", "yarn", "rotary.scaling must be 'none' with"),
        ("attention", "compress_pre_rope", True, "attention.compress_pre_rope must be False"),
        ("attention", "v_head_dim", 16, "attention.v_head_dim must be 8, as attention.head_dim"),
        ("parallel", "layout", "zigzag", "parallel.layout must be 'zigzag_per_document' with"),
        ("parallel", "reshard_after_forward", False, "parallel.reshard_after_forward must be True"),
        ("parallel", "tp", 4, "parallel.tp must be a divisor of attention.num_kv_heads = 2, got 4"),
        ("parallel", "pp", 3, "parallel.pp must be a divisor of model.layers = 2, got 3"),
        ("parallel", "sequence_parallel", True, "parallel.sequence_parallel must be False"),
        ("parallel", "exact_gradients", 4, "parallel.exact_gradients must be 0 with"),
        ("run", "dtype", "float64", "run.dtype must be 'auto', 'bfloat16' or 'float32' with"),
    ],
)
def test_what_megatron_cannot_do_is_refused_by_name(
    root: Path, section: str, option: str, value: Any, message: str
) -> None:
    settings = by_megatron(root, "independent", {})
    with pytest.raises(ValueError) as error:
        replaced(settings, section, **{option: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "section, option, value",
    [
        ("parallel", "tp", 2),
        ("parallel", "pp", 2),
        ("parallel", "sequence_parallel", True),
        ("model", "recompute_part", "attention"),
    ],
)
def test_what_is_megatrons_is_refused_with_fsdp2(
    root: Path, section: str, option: str, value: Any
) -> None:
    with pytest.raises(
        ValueError, match=rf"{section}\.{option} must be .*'fsdp2'.*'megatron'.*, got"
    ):
        replaced(tiny(root), section, **{option: value})


@needs_megatron
def test_ranks_and_vocabularies_that_do_not_fit_are_refused_by_name(
    megatron_ranks: RanksOf, ranks_of: RanksOf, root: Path
) -> None:
    for parallel, message in (
        (
            {"tp": 2, "pp": 2},
            r"parallel\.tp x pp x cp must be a divisor of the 2 .*, got '2 x 2 x 1'",
        ),
        ({"dp": 2, "cp": 2}, r"parallel\.dp must be -1 or 2 // \(tp x pp x cp\) = 1, got 2"),
    ):
        settings = by_megatron(root, "independent", parallel)
        with pytest.raises(RankError, match=message):
            megatron_ranks(2).run(run_megatron, settings)
    message = r"parallel\.tp must be a divisor of the vocabulary's 255 tokens, got 2"
    with pytest.raises(RankError, match=message):
        megatron_ranks(2).run(start_engine, by_megatron(root, "independent", TP2), 255)
    # Not in a process that answers for Megatron's GPUs.
    with pytest.raises(
        RankError, match=r"run\.device must be 'cuda' with .*'megatron'.*, got 'cpu'"
    ):
        ranks_of(1).run(run_training, by_megatron(root, "independent", {}))
