"""DeepSpeed as an engine: what it can run and what its checkpoints look like.

Imported whether or not DeepSpeed is installed. ``deepspeed_training.py`` trains by it.
"""

from __future__ import annotations

import filecmp
import importlib.util
from pathlib import Path

from torch import Tensor

from launch.engines.base import Engine, EngineSpec, grid
from launch.processes.ranks import Ranks
from launch.settings import Settings
from launch.storage.checkpoint import Checkpoint
from nsa_dist.checks import check

COMPANION = "_universal"
"""End of the name of a checkpoint's universal form, which a script of DeepSpeed writes."""


def check_settings(settings: Settings) -> None:
    """Refuse what DeepSpeed cannot do."""
    must = "'auto', 'bfloat16' or 'float32' with parallel.engine = 'deepspeed'"
    check(settings.run.dtype != "float64", "run.dtype", settings.run.dtype, must)


def check_machine(settings: Settings, device: str) -> None:
    """Refuse a machine without DeepSpeed."""
    there = importlib.util.find_spec("deepspeed") is not None
    must = "'fsdp2' where deepspeed is not installed (pip install nsa-dist[deepspeed])"
    check(there, "parallel.engine", settings.parallel.engine, must)


def describe(settings: Settings, ranks: Ranks) -> str:
    return f"DeepSpeed, ZeRO {settings.parallel.zero_stage}, {grid(settings, ranks)}"


def build(settings: Settings, vocab_size: int, ranks: Ranks) -> Engine:
    from launch.engines.deepspeed_training import DeepSpeedEngine

    return DeepSpeedEngine(settings, vocab_size, ranks)


def is_universal(path: Path) -> bool:
    """Whether DeepSpeed's script wrote this folder."""
    return (path / "zero").is_dir()


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """``EngineSpec.read_weights``.

    Raises:
        ValueError: also where DeepSpeed is not installed.
    """
    there = importlib.util.find_spec("deepspeed") is not None
    must = (
        "one of another engine where deepspeed is not installed (pip install nsa-dist[deepspeed])"
    )
    check(there, "checkpoint", str(checkpoint.path), must)
    from nsa_dist.adapters.deepspeed import read_weights

    return read_weights(checkpoint.path)


SPEC = EngineSpec(
    name="deepspeed",
    build=build,
    check_settings=check_settings,
    check_machine=check_machine,
    describe=describe,
    options=("parallel.zero_stage",),
    fixed_options=("parallel.zero_stage",),
    file_suffixes=(".pt",),
    companion=COMPANION,
    is_companion=is_universal,
    read_weights=read_weights,
)


def universal_of(path: Path) -> Path:
    """Where the universal form of a checkpoint lies, if there is one."""
    return path.with_name(path.name + COMPANION)


def has_universal(path: Path) -> bool:
    """Whether a verified checkpoint's universal form lies beside it.

    Raises:
        ValueError: if the folder there is of another checkpoint, or incomplete.
    """
    form = universal_of(path)
    if not form.is_dir():
        return False
    # The script copies these files last. Its folder tmp exists until then.
    copies = [form / file.name for file in path.glob("*model_states.pt")]
    whole = is_universal(form) and not (form / "tmp").exists()
    whole = whole and all(
        copy.is_file() and filecmp.cmp(copy, path / copy.name, shallow=False) for copy in copies
    )
    if not whole:
        must = f"find the whole universal form of {path.name}, or none"
        raise ValueError(f"run.resume must {must}, got {str(form)!r}; convert it again")
    return True
