"""torchtitan's trainer with Native Sparse Attention: every layout trains the same model.

The runs start from one seed checkpoint, since torchtitan's initial weights depend on the number of
ranks, and read the same rows. Float32 losses agree by the rule for training runs, unless rounding
chooses another block for some query: a draw of the weights that is the same in each run of the
tests keeps that from coming and going. Float64 leaves rounding out, and there layouts must agree to
its last digits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STEPS = 20
RELATIVE = 1e-5
RELATIVE_FLOAT64 = 1e-12
CP = "--parallelism.context_parallel_degree"
BALANCER = "--parallelism.context_parallel_load_balancer"
REPLICATED = "--parallelism.data_parallel_replicate_degree"
SHARDED = "--parallelism.data_parallel_shard_degree"
TP = "--parallelism.tensor_parallel_degree"
PP = "--parallelism.pipeline_parallel_degree"
OVERRIDE = (
    'nsa_dist.adapters.torchtitan.nsa={"compress_block": 8, "compress_stride": 4, '
    '"select_block": 8, "num_selected": 3, "num_local_blocks": 1, "window": 16, '
    '"gate_init": [0.5, 0.0, -0.5]'
)


@dataclass(frozen=True)
class Run:
    """A run on ``ranks`` ranks from the seed checkpoint of ``seed``, or that of its own config."""

    ranks: int
    arguments: str = ""
    config: str = "sparse"
    seed: str = ""
    override: str = ""
    in_float64: bool = False


SEEDS = ("sparse", "shared")
COMPILE = "--compile.enable --compile.components model --compile.backend aot_eager"
COMPILED = {
    "compiled": (1, ""),
    "compiled-memory-budget": (1, "activation-checkpoint:memory-budget"),
    "compiled-selective-recomputation": (1, "activation-checkpoint:selective"),
    "compiled-full-recomputation": (1, "activation-checkpoint:full"),
    "cp2-compiled": (2, f"{CP} 2"),
    "cp2-compiled-selective-recomputation": (2, f"{CP} 2 activation-checkpoint:selective"),
}
ALIKE = {
    "one": Run(1),
    "selective-recomputation": Run(1, "activation-checkpoint:selective"),
    "full-recomputation": Run(1, "activation-checkpoint:full"),
    "cp2": Run(2, f"{CP} 2"),
    "cp2-contiguous": Run(2, f"{CP} 2 {BALANCER} None"),
    "cp2-selective-recomputation": Run(2, f"{CP} 2 activation-checkpoint:selective"),
    "cp2-validated": Run(2, f"{CP} 2", config="validated", seed="sparse"),
    "fsdp2": Run(2, "--training.local_batch_size 2"),
    "hsdp2": Run(2, f"{REPLICATED} 2 {SHARDED} 1 --training.local_batch_size 2"),
    "accumulated": Run(1, "--training.local_batch_size 2"),
    "tp2": Run(2, f"{TP} 2"),
    "tp2-without-sp": Run(2, f"{TP} 2 --parallelism.no-enable-sequence-parallel"),
    "pp2": Run(2, f"{PP} 2"),
    "pp2-interleaved": Run(2, f"{PP} 2 --parallelism.pipeline_parallel_schedule Interleaved1F1B"),
    "cp2-tp2": Run(4, f"{CP} 2 {TP} 2"),
    **{name: Run(ranks, f"{COMPILE} {rest}") for name, (ranks, rest) in COMPILED.items()},
    "override": Run(1, config="dense", seed="sparse", override=OVERRIDE + "}"),
    "override-cp2": Run(2, f"{CP} 2", config="dense", seed="sparse", override=OVERRIDE + "}"),
    "override-cp2-contiguous": Run(
        2,
        f"{CP} 2 {BALANCER} None",
        config="dense",
        seed="sparse",
        override=OVERRIDE + ', "load_balancer": null}',
    ),
}
SHARED = {
    "shared": Run(1, config="shared"),
    "shared-cp2": Run(2, f"{CP} 2", config="shared"),
    "shared-tp2": Run(2, f"{TP} 2", config="shared"),
}
FLOAT64 = {
    f"{config}-{layout}-float64": Run(ranks, arguments, config, in_float64=True)
    for config in SEEDS
    for layout, (ranks, arguments) in {
        "one": (1, ""),
        "cp2": (2, f"{CP} 2"),
        "tp2": (2, f"{TP} 2"),
        "tp2-without-sp": (2, f"{TP} 2 --parallelism.no-enable-sequence-parallel"),
    }.items()
}
REFUSED = {
    "cuda-graphs": (
        Run(1, "--training.no-disable-cuda-graphs"),
        "training.disable_cuda_graphs must be True with Native Sparse Attention",
    ),
    "ptrr": (
        Run(2, f"{CP} 2 {BALANCER} ptrr"),
        "context_parallel_load_balancer must be 'headtail' or None with Native Sparse Attention",
    ),
    "full-dtensor": (
        Run(2, f"{CP} 2 --parallelism.spmd_backend full_dtensor"),
        "parallelism.spmd_backend must be 'spmd_types' with Native Sparse Attention",
    ),
    "typechecking": (
        Run(1, "--debug.spmd_typechecking activation-checkpoint:full"),
        "debug.spmd_typechecking must be False with Native Sparse Attention",
    ),
    "tp-beyond-kv-heads": (Run(4, f"{TP} 4"), "must divide n_kv_heads (2)"),
    "override-split-otherwise": (
        Run(2, f"{CP} 2 {BALANCER} None", "dense", "sparse", OVERRIDE + "}"),
        "positions must go on by 1 or start again at 0 in rows split as 'zigzag' over 2 ranks",
    ),
    "override-compiled": (
        Run(1, "--compile.enable --compile.backend aot_eager", "dense", "sparse", OVERRIDE + "}"),
        "with compile.enable, replace the attention by use_nsa in a config function",
    ),
    "separate-keys-to-a-folder": (
        Run(1, "--checkpoint.last_save_in_hf --checkpoint.last_save_model_only"),
        "checkpoint.last_save_in_hf must be False with independent_kv",
    ),
    "separate-keys-from-a-folder": (
        Run(1, "--checkpoint.initial_load_in_hf"),
        "checkpoint.initial_load_in_hf must be False with independent_kv",
    ),
    "override-unknown-option": (
        Run(1, config="dense", override='nsa_dist.adapters.torchtitan.nsa={"windows": 16}'),
        "option of NSAConfig must be one of branches, compress, ",
    ),
}


RESUMED = {
    "cp2-then-one": ("cp2", Run(1)),
    "one-then-cp2": ("one", Run(2, f"{CP} 2")),
    "tp2-then-cp2": ("tp2", Run(2, f"{CP} 2")),
}


def arguments(run: Run, name: str, folder: Path) -> list[str]:
    """The command line of torchtitan's program."""
    seed = folder / f"seed-{run.seed or run.config}" / "checkpoint" / "step-0"
    override = ["--override.imports", run.override] if run.override else []
    return [
        *("--module", "tests.adapters.torchtitan.small", "--config", run.config),
        *("--dump_folder", str(folder / name), "--checkpoint.enable"),
        *("--checkpoint.initial_load_path", str(seed)),
        *override,
        *run.arguments.split(),
    ]


def all_runs(folder: Path) -> list[tuple[str, int, list[str], bool]]:
    """Seed checkpoints, then every run, then those that go on from another's tenth step."""
    first = ["--module", "tests.adapters.torchtitan.small", "--checkpoint.enable"]
    made = [
        (
            f"seed-{config}",
            1,
            [
                *first,
                *("--config", config, "--dump_folder", str(folder / f"seed-{config}")),
                *("--checkpoint.create_seed_checkpoint", "--debug.seed", "1"),
            ],
            False,
        )
        for config in SEEDS
    ]
    refused = {name: run for name, (run, _) in REFUSED.items()}
    runs = ALIKE | SHARED | FLOAT64 | refused
    made += [
        (name, run.ranks, arguments(run, name, folder), run.in_float64)
        for name, run in runs.items()
    ]
    for name, (begun, run) in RESUMED.items():
        # In the folder of the run that it follows.
        resumed = [*arguments(run, begun, folder), "--checkpoint.load_step", "10"]
        made.append((name, run.ranks, resumed, run.in_float64))
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]] | str]:
    """What became of every run: one start of torchtitan, whose import takes longer than they."""
    folder = tmp_path_factory.mktemp("torchtitan")
    asked, found = folder / "asked.json", folder / "found.json"
    asked.write_text(json.dumps({"runs": all_runs(folder), "results": str(found)}), "utf-8")
    module = "tests.adapters.torchtitan.train_on_cpus"
    done = subprocess.run(
        [sys.executable, "-m", module, str(asked)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    read: dict[str, list[list[float]] | str] = json.loads(found.read_text("utf-8"))
    return read


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def assert_alike(
    found: list[list[float]] | str, expected: list[list[float]] | str, relative: float = RELATIVE
) -> None:
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    assert len(found) == len(expected)
    for step, ((loss, *_), (expected_loss, *_)) in enumerate(zip(found, expected, strict=True)):
        assert abs(loss - expected_loss) <= relative * expected_loss, (step, loss, expected_loss)


@pytest.mark.parametrize("name", [name for name in ALIKE if name != "one"])
def test_losses_are_those_of_one_rank(
    name: str, results: dict[str, list[list[float]] | str]
) -> None:
    assert len(results["one"]) == STEPS
    assert_alike(results[name], results["one"])


@pytest.mark.parametrize("name", [name for name in SHARED if name != "shared"])
def test_losses_with_one_shared_kv(name: str, results: dict[str, list[list[float]] | str]) -> None:
    assert_alike(results[name], results["shared"])


@pytest.mark.parametrize("name", [name for name in FLOAT64 if "-one-" not in name])
def test_float64_losses_are_those_of_one_rank(
    name: str, results: dict[str, list[list[float]] | str]
) -> None:
    one = results[f"{FLOAT64[name].config}-one-float64"]
    assert len(one) == STEPS
    assert_alike(results[name], one, RELATIVE_FLOAT64)


@pytest.mark.parametrize("name", COMPILED)
def test_layers_are_compiled(name: str, results: dict[str, list[list[float]] | str]) -> None:
    """Before and after the attention: with recomputation too, which cannot be part of a graph."""
    _, _, graphs = results[name][-1]
    assert graphs >= 2
    assert results["one"][-1][2] == 0


def test_the_model_learns(results: dict[str, list[list[float]] | str]) -> None:
    for name in ("one", "shared"):
        losses = [loss for loss, *_ in results[name]]
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_goes_on_at_another_layout(
    name: str, results: dict[str, list[list[float]] | str]
) -> None:
    assert_alike(results[name], results["one"][10:])


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, results: dict[str, list[list[float]] | str]) -> None:
    assert REFUSED[name][1] in str(results[name])
