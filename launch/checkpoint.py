"""Checkpoints by torch.distributed.checkpoint: every rank writes its shards, any world reads them.

Those of the Megatron and the DeepSpeed engine lie in the same folders, in formats of their own
(convert.py; DeepSpeed's are read by as many ranks as wrote them, or from its universal form).

A checkpoint is a folder ``checkpoints/step_00001000`` with weights, optimizer state and the
settings of its run. Data order and dropout follow from the seed and the step, so nothing else is
needed to continue exactly.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from nsa_dist.safe_load import load
from settings import Settings, check, from_toml, to_toml

# Another model, other data or another seed would make a resumed run a different one. How it is
# spread over ranks, how long it runs and how it is optimised may change.
_FIXED_SECTIONS = ("attention", "rotary", "model", "data")
_FREE_OPTIONS = ("recompute", "recompute_part", "backend", "micro_batch")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    # The metadata file is written last; by Megatron another one after it.
    found = {path.parent for path in folder.glob("checkpoints/step_*/.metadata")}
    found = {path for path in found if not is_megatron(path) or (path / "metadata.json").exists()}
    settings = (path.parent for path in folder.glob("checkpoints/step_*/settings.toml"))
    return sorted(found | {path for path in settings if is_deepspeed(path)})


def is_megatron(path: Path) -> bool:
    """Whether a checkpoint is in Megatron's format."""
    return (path / "common.pt").exists()


def is_deepspeed(path: Path) -> bool:
    """Whether a checkpoint is in DeepSpeed's format."""
    return any(path.glob("*_optim_states.pt"))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def finish_checkpoint(folder: Path, path: Path, settings: Settings) -> None:
    """Write the settings beside the state, remove older checkpoints; collective."""
    if dist.get_rank() == 0:
        (path / "settings.toml").write_text(to_toml(settings), encoding="utf-8")
        keep = settings.run.keep_checkpoints
        for old in checkpoints(folder)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, settings: Settings
) -> None:
    """Write the state after ``step`` steps; collective. Older checkpoints beyond
    ``run.keep_checkpoints`` are removed once the new one is complete."""
    path = checkpoint_path(folder, step)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": step,
    }
    save(state, checkpoint_id=path)
    finish_checkpoint(folder, path, settings)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, settings: Settings
) -> int:
    """Restore the folder's latest checkpoint in place, whatever dp and cp wrote it; collective.

    Returns:
        The steps done, 0 when there is no checkpoint.

    Raises:
        ValueError: if the checkpoint is of another model, other data or another seed.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    check_same_run(from_toml(found[-1] / "settings.toml"), settings)
    return load_state(found[-1], model, optimizer)


def load_state(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore one of ``checkpoints()`` in place; collective.

    Returns:
        The steps done.

    Raises:
        ValueError: on every rank, if it holds more than data; naming the file.
    """
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": 0,
    }
    load(state, path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(state["step"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore the weights of one of ``checkpoints()`` in place, whatever dp and cp wrote it;
    collective.

    Raises:
        ValueError: if it is one of Megatron's or DeepSpeed's.
    """
    works = "a checkpoint of engine 'fsdp2' works; launch/convert.py makes one of Megatron's"
    check(not is_megatron(path) and not is_deepspeed(path), "checkpoint", str(path), works)
    state = {"model": get_model_state_dict(model)}
    load(state, path)
    set_model_state_dict(model, state["model"])


def check_same_run(saved: Settings, now: Settings) -> None:
    """Refuse to continue a checkpoint with settings that would make it another run.

    Raises:
        ValueError: naming the option, the value found and the checkpoint's.
    """
    pairs = [
        # Another engine reads what launch/convert.py makes.
        ("parallel.engine", saved.parallel.engine, now.parallel.engine),
        ("run.seed", saved.run.seed, now.run.seed),
    ]
    for section in _FIXED_SECTIONS:
        old, new = getattr(saved, section), getattr(now, section)
        pairs += [
            (f"{section}.{f.name}", getattr(old, f.name), getattr(new, f.name))
            for f in dataclasses.fields(new)
            if f.name not in _FREE_OPTIONS
        ]
    for option, old, new in pairs:
        if old != new:
            raise ValueError(f"{option}: found {new!r}; {old!r}, the checkpoint's, works")
