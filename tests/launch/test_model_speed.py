"""Options that make the model around the attention faster or smaller: the same losses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.convert import for_fsdp2, for_megatron
from launch.engines.registry import ENGINES, engine_spec
from launch.estimating.estimates import describe_run
from launch.settings import Settings, from_toml, to_toml
from launch.train import Result
from tests.distributed.ranks import Ranks
from tests.launch.common import forward_ranges, kept_bytes, run_compiled, run_training, tiny

RanksOf = Callable[[int], Ranks]
PARTS = ("norms", "projections", "mlp")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = ("compile", "dense_every", "loss", "qk_norm", "recompute", "recompute_part")


def settings_of(root: Path, folder: Path, **options: Any) -> Settings:
    run = {"folder": str(folder), "steps": 3, "validation_streams": 1, "timeout": 170.0}
    sections: dict[str, dict[str, Any]] = {"model": {}, "parallel": {"cp": 2}, "run": run}
    for name, value in options.items():
        section = "model" if name in MODEL else "parallel"
        sections[section][name] = list(value) if isinstance(value, tuple) else value
    return tiny(root, **sections)


@pytest.fixture(scope="module")
def plain(
    ranks_of: RanksOf, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Result]:
    """Rank 0's result of a run with some options."""
    return lambda **options: ranks_of(2).run(
        run_training, settings_of(root, tmp_path_factory.mktemp("run") / "run", **options)
    )[0]


@pytest.fixture(scope="module")
def unchanged(plain: Callable[..., Result]) -> Result:
    return plain()


def same_bits(found: Result, expected: Result) -> bool:
    return (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)


def test_compiled_parts_give_the_same_losses(
    ranks_of: RanksOf, root: Path, tmp_path: Path, unchanged: Result
) -> None:
    for parts, least in (((), 0), (("mlp",), 1), (PARTS, 3)):
        settings = settings_of(root, tmp_path / "-".join(("run", *parts)), compile=parts)
        found = ranks_of(2).run(run_compiled, settings)
        for result, graphs in found:
            assert (graphs >= least) and (graphs > 0) == bool(parts)
            assert result.losses == pytest.approx(unchanged.losses, rel=1e-12)
            assert result.grad_norms == pytest.approx(unchanged.grad_norms, rel=1e-11)


def test_compiled_parts_of_dense_layers_with_norms_of_heads(
    ranks_of: RanksOf, root: Path, tmp_path: Path, plain: Callable[..., Result]
) -> None:
    options = {"dense_every": 2, "qk_norm": True, "layout": "contiguous", "cp": 1}
    expected = plain(**options)
    settings = settings_of(root, tmp_path / "run", compile=PARTS, recompute=True, **options)
    for result, graphs in ranks_of(2).run(run_compiled, settings):
        assert graphs > 0
        assert result.losses == pytest.approx(expected.losses, rel=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_by_inductor(
    ranks_of: RanksOf, root: Path, tmp_path: Path, unchanged: Result
) -> None:
    # One rank: processors that are busy compile for minutes.
    settings = settings_of(root, tmp_path / "run", compile=PARTS, cp=1)
    (result,) = ranks_of(1).run(run_training, settings)
    assert result.losses == pytest.approx(unchanged.losses, rel=1e-9)


def test_recomputed_mlps_send_nothing_again(
    plain: Callable[..., Result], unchanged: Result
) -> None:
    of_mlps = plain(recompute=True, recompute_part="mlp")
    assert same_bits(of_mlps, unchanged)
    assert of_mlps.received == unchanged.received
    of_blocks = plain(recompute=True)
    assert same_bits(of_blocks, unchanged)
    assert of_blocks.received["fetch"] == 2 * unchanged.received["fetch"]


def test_recomputed_mlps_are_not_kept(ranks_of: RanksOf, root: Path, tmp_path: Path) -> None:
    kept = {
        name: ranks_of(1).run(kept_bytes, settings_of(root, tmp_path, cp=1, **options))[0]
        for name, options in {
            "all": {},
            "mlp": {"recompute": True, "recompute_part": "mlp"},
            "block": {"recompute": True},
        }.items()
    }
    # gate, up, silu and their product, [L, 48] each, of two blocks, in float64.
    length = 150
    assert kept["all"] - kept["mlp"] >= 2 * 3 * length * 48 * 8
    assert kept["block"] < kept["mlp"]


@pytest.mark.parametrize("ahead", [0, 2])
def test_weights_gathered_ahead_are_the_same(
    plain: Callable[..., Result], unchanged: Result, ahead: int
) -> None:
    assert same_bits(plain(gather_ahead=ahead), unchanged)


def test_weights_of_the_next_block_are_gathered_ahead(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    for ahead in (0, 1):
        settings = settings_of(root, tmp_path / str(ahead), gather_ahead=ahead)
        for names in ranks_of(2).run(forward_ranges, settings):
            assert ("FSDP::forward_prefetch for blocks.1" in names) == bool(ahead)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"compile": ["mlp", "mlp"]},
            r"model.compile must be each part once, got \('mlp', 'mlp'\)",
        ),
        ({"compile": ["all"]}, r"model.compile\[0\] must be one of 'norms', 'projections', 'mlp'"),
        (
            {"recompute": True, "recompute_part": "attention"},
            "model.recompute_part must be 'block' or 'mlp' with parallel.engine = 'fsdp2' ",
        ),
        ({"recompute_part": "mlp"}, "model.recompute_part must be 'block' without model.recompute"),
        ({"gather_ahead": -1}, "parallel.gather_ahead must be at least 0, got -1"),
    ],
)
def test_refused(root: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(root, tmp_path, **options)


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"fsdp2"}))
def test_other_engines_refuse_them(root: Path, tmp_path: Path, engine: str) -> None:
    megatron = {"layout": "zigzag_per_document"} if engine == "megatron" else {}
    model: dict[str, Any]
    for model, parallel, name in (
        ({"compile": ["mlp"]}, {}, "model.compile"),
        ({"loss": "liger"}, {}, "model.loss"),
        ({"recompute": True, "recompute_part": "mlp"}, {}, "model.recompute_part"),
        ({}, {"gather_ahead": 2}, "parallel.gather_ahead"),
    ):
        chosen = {"engine": engine, **megatron, **parallel}
        run = {"folder": str(tmp_path), "dtype": "float32"}
        with pytest.raises(ValueError, match=f"{name} must be .* with parallel.engine = "):
            tiny(root, model=model, parallel=chosen, run=run)


def test_settings_are_read_back(root: Path, tmp_path: Path) -> None:
    settings = settings_of(root, tmp_path, compile=PARTS[::-1], gather_ahead=3)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(settings))
    assert dataclasses.asdict(from_toml(path)) == dataclasses.asdict(settings)


def test_a_conversion_leaves_out_what_the_other_engine_has_not(root: Path, tmp_path: Path) -> None:
    options = {"compile": PARTS, "recompute": True, "recompute_part": "mlp", "gather_ahead": 2}
    ours = settings_of(root, tmp_path, **options)
    run = dataclasses.replace(ours.run, dtype="float32", async_checkpoints=True)
    ours = dataclasses.replace(ours, run=run)
    theirs = for_megatron(ours)
    assert (theirs.parallel.engine, theirs.model.compile) == ("megatron", ())
    assert (theirs.model.recompute, theirs.model.recompute_part) == (True, "block")
    attention = dataclasses.replace(theirs.model, recompute_part="attention")
    back = for_fsdp2(dataclasses.replace(theirs, model=attention), torch.float32)
    assert (back.parallel.engine, back.parallel.tp) == ("fsdp2", 1)
    assert back.model == dataclasses.replace(ours.model, compile=(), recompute_part="block")


@pytest.mark.parametrize(
    "there, device, message",
    [
        (False, "cuda", "model.loss must be 'pieces' where liger-kernel is not installed"),
        (True, "cpu", "model.loss must be 'pieces' on the CPU"),
    ],
)
def test_liger_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    tmp_path: Path,
    there: bool,
    device: str,
    message: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there else None)
    plain = settings_of(root, tmp_path)
    settings = dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, loss="liger"),
        run=dataclasses.replace(plain.run, dtype="float32"),
    )
    with pytest.raises(ValueError, match=message):
        engine_spec("fsdp2").check_machine(settings, device)


@pytest.mark.parametrize("name, ranks", [("fsdp2_1b", 8), ("fsdp2_8b", 32)])
def test_configs_fit_their_gpus_by_estimate(name: str, ranks: int) -> None:
    settings = from_toml(CONFIGS / f"{name}.toml")
    lines = describe_run(settings, ranks // settings.parallel.cp, 128_256)
    (memory,) = [line for line in lines if line.startswith("memory of a rank")]
    assert 5 < float(memory.split()[4]) < 40


LOSS = """
import torch
from launch.losses import sum_by_liger, sum_in_pieces

torch.manual_seed(0)
device, dtype = {device!r}, torch.{dtype}
x = torch.randn(300, 64, device=device, dtype=dtype, requires_grad=True)
weight = torch.randn(513, 64, device=device, dtype=dtype, requires_grad=True)
labels = torch.randint(513, (300,), device=device)
labels[::7] = -100
exact = [t.detach().double().requires_grad_() for t in (x, weight)]

def of(loss, *inputs):
    total = loss(*inputs, labels)
    return [total.detach(), *torch.autograd.grad(total / 257, inputs)]

expected = of(sum_in_pieces, *exact)
plain, found = of(sum_in_pieces, x, weight), of(sum_by_liger, x, weight)
for a, b, c in zip(expected, plain, found, strict=True):
    error, usual = ((t.double() - a).abs().max() for t in (c, b))
    eps = torch.finfo(dtype).eps * a.abs().max()
    assert c.dtype == b.dtype and error <= 2 * usual + 2 * eps, (error, usual, eps)
with torch.no_grad():
    assert torch.equal(sum_by_liger(x, weight, labels), plain[0])
"""


@pytest.mark.slow
def test_ligers_loss_in_the_interpreter() -> None:
    pytest.importorskip("liger_kernel")
    check_loss("cpu", "float32", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ligers_loss(dtype: str) -> None:
    pytest.importorskip("liger_kernel")
    check_loss("cuda", dtype)


def check_loss(device: str, dtype: str, **variables: str) -> None:
    """Loss and gradients against float64 and beside the pieces', in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOSS.format(device=device, dtype=dtype)],
        cwd=CONFIGS.parent,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
