"""Load checkpoints of ``engine.save_checkpoint``, or name the command that makes them loadable."""

from __future__ import annotations

import contextlib
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.checkpoints.safe_load import PLAIN_VALUES, on_every_rank, read_file, weights_only
from nsa_dist.checks import check

ALLOWED = (
    f"{PLAIN_VALUES} (torch.serialization.add_safe_globals([it]) allows a class of your "
    "client_state; load_checkpoint(..., trusted=True) allows anything, where you trust who wrote "
    "the file)"
)


def load_checkpoint(
    engine: Any,
    load_dir: str | Path,
    tag: str | None = None,
    *,
    trusted: bool = False,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """``engine.load_checkpoint`` with checks first.

    Where this raises, DeepSpeed would return None, fail later, or leave weights unchanged.

    A ZeRO checkpoint holds one part per rank, so it loads on the same number of ranks, which may
    split sequences differently. For other numbers of ranks, convert it to DeepSpeed's universal
    form by the command in the error, and set ``"checkpoint": {"load_universal": true}`` in
    DeepSpeed's config. Weights alone (``load_module_only=True`` or
    ``load_optimizer_states=False``) are whole at stages 0 to 2, and load at any of these stages on
    any number of ranks.

    DeepSpeed runs code that its files contain. This function refuses files that contain more than
    tensors, plain values and the few classes that DeepSpeed writes.

    Args:
        load_dir, tag, options: as for ``engine.load_checkpoint``.
        trusted: load any files, and run code that they contain.

    Returns:
        The path that was read, and the client state.

    Raises:
        ValueError: on every rank, if there is no checkpoint; if it is for another number of ranks
            or another stage (1 and 2 are interchangeable); if it is universal and ZeRO is off; if
            DeepSpeed would ignore a request for weights alone; or if a file contains more than
            data.
    """
    folder, universal = Path(load_dir), bool(engine.load_universal_checkpoint())
    if tag is None:
        latest = folder / ("latest_universal" if universal else "latest")
        if not latest.is_file():
            must = f"a folder with a file {latest.name!r}"
            raise ValueError(f"load_dir must be {must}, got {str(folder)!r} without one")
        tag = latest.read_text(encoding="utf-8").strip()
        within = not Path(tag).is_absolute() and ".." not in Path(tag).parts
        check(within, f"the tag in {latest}", tag, f"the name of a folder in {str(folder)!r}")
    path, stage = folder / tag, engine.zero_optimization_stage()
    module_only = bool(options.get("load_module_only", False))
    optimizer_states = bool(options.get("load_optimizer_states", True))
    if not path.is_dir():
        raise ValueError(f"tag must be the name of a folder in {str(folder)!r}, got {tag!r}")
    with contextlib.nullcontext() if trusted else weights_only(_classes()):
        if not trusted:
            _check_contents(engine, path)
        if universal:
            must = "False without ZeRO (any number of ranks can read its checkpoints as they are)"
            check(stage > 0, "checkpoint.load_universal", universal, must)
        else:
            _check_parts(engine, path, only_weights=module_only or not optimizer_states)
            _check_options(engine, path, module_only, optimizer_states)
        read, state = engine.load_checkpoint(str(folder), tag=tag, **options)
        if read is None:
            must = "a folder with a checkpoint that DeepSpeed can read"
            raise ValueError(f"load_dir must be {must}, got {str(path)!r}")
        if universal and stage == 3 and optimizer_states and not module_only:
            _restore_groups(engine.optimizer.optimizer, path)
    return read, state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Whole weights of a ZeRO checkpoint, without an engine, on any number of ranks.

    Args:
        path: the folder of one tag.

    Returns:
        float32 on the CPU by the module's names: those that the optimizer steps.

    Raises:
        ValueError: if a file contains more than data, or they are not those of a ZeRO checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    path, said = Path(path), io.StringIO()
    with weights_only(_classes()):
        for file in sorted(path.glob("*.pt")):
            read_file(file, ALLOWED)
        try:
            with redirect_stdout(said), redirect_stderr(said):
                whole = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ValueError(f"{path} must be a whole checkpoint of ZeRO, got {error!r}") from error
    return dict(whole)


def _classes() -> tuple[Any, ...]:
    """The classes that DeepSpeed writes; all are plain records."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address


def _check_contents(engine: Any, path: Path) -> None:
    """Raise ValueError on every rank if a file contains more than data. Each rank reads some."""
    files: list[Path] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(path, followlinks=True):  # DeepSpeed follows links too.
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
        else:
            seen.add(real)
            files += [Path(folder) / name for name in names if name.endswith(".pt")]
    files.sort()
    if not engine.use_node_local_storage():
        files = files[dist.get_rank() :: dist.get_world_size()]

    def read() -> None:
        for file in files:
            read_file(file, ALLOWED)

    on_every_rank(read)


def _check_parts(engine: Any, path: Path, only_weights: bool) -> None:
    """Raise ValueError unless a checkpoint's files fit this stage and number of ranks."""
    saved, size = len(list(path.glob("*zero_pp_rank_*_optim_states.pt"))), dist.get_world_size()
    # Without ZeRO every rank has all parameters, and there is one file.
    stages: tuple[int, ...] = (1, 2) if saved else (0,)
    if any(path.glob("zero_pp_rank_*_model_states.pt")):
        stages = (3,)
    elif only_weights:
        stages = (0, 1, 2)
    must = f"{' or '.join(map(str, stages))} to load {str(path)!r}"
    stage = engine.zero_optimization_stage()
    check(stage in stages, "zero_optimization.stage", stage, must)
    # Below stage 3 weights are whole. A node's own disk has only the parts of its own ranks, so
    # DeepSpeed itself compares the number of ranks with that in the file.
    if (only_weights and stage < 3) or engine.use_node_local_storage():
        return
    if saved not in (0, size):
        raise ValueError(
            f"world size must be {saved} as when {str(path)!r} was saved, got {size}; for any "
            f"number of ranks run {universal_command(path)} and set "
            '{"checkpoint": {"load_universal": true}} in the config of DeepSpeed'
        )


def _check_options(engine: Any, path: Path, module_only: bool, optimizer_states: bool) -> None:
    """Raise ValueError where DeepSpeed 0.19.8 would silently keep other weights."""
    stage = engine.zero_optimization_stage()
    if stage == 3 and module_only and optimizer_states:
        raise ValueError(
            "load_module_only must be False at ZeRO 3, where it loads nothing, got True; "
            "load_optimizer_states=False loads the weights alone"
        )
    if stage == 3 and not optimizer_states:
        latest = path.parent / "latest"
        newest = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
        must = f"{newest!r} as in {str(latest)!r} (ZeRO 3 reads that without the optimizer)"
        check(path.name == newest, "tag", path.name, must)
    low = engine.bfloat16_enabled() or engine.fp16_enabled()
    if stage == 0 and low and not optimizer_states and not module_only:
        raise ValueError(
            "load_optimizer_states must be True in 16 bits without ZeRO, where the optimizer keeps "
            "its own weights, got False; load_module_only=True loads the weights alone"
        )


def _restore_groups(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Repair parameter groups after DeepSpeed loads a universal checkpoint at ZeRO 3.

    It gives all groups the options of the first, and one shared step counter that each increments.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    file = path / "zero" / "optimizer_state.pt"
    # As DeepSpeed reads it; unless trusted, weights_only() limits what the file may contain.
    saved = torch.load(file, map_location="cpu", weights_only=False)["param_groups"]
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})


def universal_command(path: Path) -> str:
    """The command that converts a checkpoint for any number of ranks, in a folder beside it."""
    return (
        "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
        f"--input_folder {path} --output_folder {path}_universal"
    )
