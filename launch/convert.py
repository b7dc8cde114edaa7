"""Turn a checkpoint of the Megatron engine into one of the FSDP2 engine, or back.

    python launch/convert.py RUN/checkpoints/step_00001000 OTHER_RUN

writes ``OTHER_RUN/checkpoints/step_00001000`` for the other engine, from which a run with
``--run.folder OTHER_RUN --run.resume True`` continues. Weights, both moments and the step move, bit
for bit. Neither Megatron nor a GPU is needed, and the sizes (tp, cp, pp, dp) that wrote a
checkpoint or will read it do not matter. The model is in memory once, with its moments.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

from dataclasses import replace
from typing import Any

import torch

from launch.engines import fsdp2, megatron_checkpoint
from launch.engines.registry import engine_spec
from launch.loading import alone
from launch.settings import Settings
from launch.storage.checkpoint import SETTINGS, checkpoint_path, open_checkpoint, save_checkpoint
from launch.storage.manifest import CheckpointError
from nsa_dist.checks import check


def convert(source: Path, folder: Path) -> Path:
    """Convert a checkpoint; in a process group of one.

    Args:
        source: a folder ``step_N`` of a run's checkpoints.
        folder: of the run that the new one is for.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: if ``source`` is no checkpoint or not whole, the target is there already, or the
            other engine cannot run the settings, or a file holds more than data.
        CheckpointError: if the new one cannot be written.
    """
    must = "a folder RUN/checkpoints/step_N of engine 'fsdp2' or 'megatron'"
    check((source / SETTINGS).exists(), "SOURCE", str(source), must)
    found = open_checkpoint(source, "SOURCE")
    target = checkpoint_path(folder, found.step)
    engine = found.settings.parallel.engine
    check(engine in ("fsdp2", "megatron"), "SOURCE", str(source), must)
    check(not target.exists(), "OTHER_RUN", str(folder), f"a run without {target.name}")
    if engine == "fsdp2":
        settings = for_megatron(found.settings)  # Refuses what Megatron cannot run.
        state, write_whole = fsdp2.read_whole(found), megatron_checkpoint.write_whole
    else:
        state, write_whole = megatron_checkpoint.read_whole(found), fsdp2.write_whole
        settings = for_fsdp2(found.settings, state.dtype)

    def write(path: Path, step: int) -> None:
        write_whole(path, state, settings)

    return save_checkpoint(write, folder, state.step, settings, found.data)


def for_megatron(settings: Settings) -> Settings:
    """A run's settings, to go on by Megatron.

    Raises:
        ValueError: for what it cannot run.
    """
    return _with_engine(
        settings, "megatron", parallel={"layout": "zigzag_per_document"}, run={"start_from": ""}
    )


def for_fsdp2(settings: Settings, dtype: torch.dtype) -> Settings:
    """A run's settings, to go on by FSDP2.

    Args:
        dtype: of Megatron's weights, so that the way back knows what they were rounded to.
    """
    run = {"start_from": ""}
    if dtype == torch.bfloat16:
        run["dtype"] = "bfloat16"
    return _with_engine(settings, "fsdp2", run=run)


def _with_engine(settings: Settings, engine: str, **options: dict[str, Any]) -> Settings:
    """The settings with another engine and some options, by section. What only the old engine has
    gets its default.

    Raises:
        ValueError: for an option of the optimizer that only the old engine has.
    """
    spec = engine_spec(settings.parallel.engine)
    changed: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "parallel": {}, "run": {}}
    for option in spec.options:
        section, name = option.split(".")
        value = getattr(settings, section)
        default = getattr(type(value), name)
        if section == "optimizer":
            found = getattr(value, name)
            check(found == default, option, found, f"{default!r} for engine {engine} to go on")
        changed[section][name] = default
    changed["parallel"] |= {"engine": engine, "dp": -1}
    for section, values in options.items():
        changed[section] |= values
    sections = {name: replace(getattr(settings, name), **v) for name, v in changed.items()}
    return replace(settings, **sections)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: convert.py RUN/checkpoints/step_N OTHER_RUN")
    try:
        with alone():
            print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"convert.py: {error}")


if __name__ == "__main__":
    main()
