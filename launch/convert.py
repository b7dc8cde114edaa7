"""Turn a checkpoint of the Megatron engine into one of the FSDP2 engine, or back.

    python launch/convert.py RUN/checkpoints/step_00001000 OTHER_RUN

writes ``OTHER_RUN/checkpoints/step_00001000`` for the other engine, from which a run with
``--run.folder OTHER_RUN --run.resume True`` goes on. Weights, both moments and the step move, bit
for bit. Neither Megatron nor a GPU is needed, and the sizes (tp, cp, pp, dp) that wrote a
checkpoint or will read it do not matter. The model is in memory once, with its moments.

``engines/megatron_names.py`` has the names. In Megatron's checkpoints a weight is saved by its key,
its moments as ``optimizer.state.exp_avg.KEY`` and ``optimizer.state.exp_avg_sq.KEY``, and the
float32 weight behind a bfloat16 one as ``optimizer.state.param.KEY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # This file's folder makes way for the packages of its checkout.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from launch.engines.fsdp2 import make_optimizer
from launch.engines.megatron_names import from_saved, to_saved
from launch.model import Decoder
from launch.settings import Settings, check
from launch.storage.checkpoint import (
    Checkpoint,
    checkpoint_path,
    is_deepspeed,
    is_megatron,
    load_state,
    open_checkpoint,
    save_checkpoint,
    save_state,
)
from launch.storage.manifest import CheckpointError, shared_failure
from nsa_dist.checkpoints.dcp_metadata import read_metadata
from nsa_dist.checkpoints.safe_load import check_dcp, load, read_file

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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
    there = (source / "settings.toml").exists() and not is_deepspeed(source)
    works = "a folder RUN/checkpoints/step_N of engine 'fsdp2' or 'megatron' works"
    check(there, "SOURCE", str(source), works)
    found = open_checkpoint(source, "SOURCE")
    target = checkpoint_path(folder, found.step)
    check(not target.exists(), "OTHER_RUN", str(folder), f"one without {target.name} works")
    check_dcp(source, *(["common.pt"] if is_megatron(source) else []))
    return _from_megatron(found, folder) if is_megatron(source) else _to_megatron(found, folder)


def _from_megatron(checkpoint: Checkpoint, folder: Path) -> Path:
    source, settings = checkpoint.path, checkpoint.settings
    saved = _read_tensors(source)
    moments: dict[str, dict[str, Tensor]] = {}
    for kind in (*_MOMENTS, "param"):
        prefix = f"optimizer.state.{kind}."
        found = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        moments[kind] = from_saved(found, settings.attention) if found else {}
    saved = {k: v for k, v in saved.items() if not k.startswith("optimizer.")}
    weights = from_saved(saved, settings.attention)
    parallel = replace(
        settings.parallel, engine="fsdp2", tp=1, pp=1, dp=-1, sequence_parallel=False
    )
    rounded = weights["norm.weight"].dtype == torch.bfloat16
    settings = replace(
        settings,
        parallel=parallel,
        model=replace(settings.model, recompute_part="block"),
        # So that the way back knows what the weights were rounded to.
        run=replace(settings.run, dtype="bfloat16") if rounded else settings.run,
    )
    model, optimizer = _build(settings, weights["embedding.weight"].shape[0])
    model.load_state_dict(weights | moments["param"])
    common = read_file(source / "common.pt")
    step = int(common["step"])
    updates = float(common.get("updates", step))
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {kind: moments[kind][name].clone() for kind in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(updates), **state}

    def write(path: Path, step: int) -> None:
        save_state(path, step, model, optimizer)

    return save_checkpoint(write, folder, step, settings, checkpoint.data)


def _to_megatron(checkpoint: Checkpoint, folder: Path) -> Path:
    source, settings = checkpoint.path, checkpoint.settings
    parallel = replace(
        settings.parallel,
        engine="megatron",
        dp=-1,
        layout="zigzag_per_document",
        reshard_after_forward=True,
    )
    megatron = replace(settings, parallel=parallel)  # Refuses what Megatron cannot run.
    sizes = read_metadata(source).state_dict_metadata
    embedding = sizes["model.embedding.weight"]
    assert isinstance(embedding, TensorStorageMetadata)
    model, optimizer = _build(settings, embedding.size[0])
    step = load_state(source, model, optimizer)

    named = dict(model.named_parameters())
    whole = _saved({name: p.detach() for name, p in named.items()}, settings)
    tensors = {f"optimizer.state.param.{key}": value for key, value in whole.items()}
    for kind in _MOMENTS:
        moments = {name: optimizer.state[p][kind] for name, p in named.items()}
        prefix = f"optimizer.state.{kind}."
        tensors |= {prefix + key: value for key, value in _saved(moments, settings).items()}
    dtype = torch.bfloat16 if settings.run.dtype == "bfloat16" else torch.float32
    tensors |= {key: value.to(dtype) for key, value in whole.items()}
    # Skipped steps make no update.
    updates = int(optimizer.state[named["embedding.weight"]]["step"])

    def write(path: Path, step: int) -> None:
        with shared_failure():
            save(tensors, checkpoint_id=path)
        torch.save({"step": step, "updates": updates}, path / "common.pt")
        (path / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")

    return save_checkpoint(write, folder, step, megatron, checkpoint.data)


def _build(settings: Settings, vocab_size: int) -> tuple[Decoder, Optimizer]:
    model = Decoder(settings, vocab_size).float()
    return model, make_optimizer(model, settings.optimizer)


def _saved(named: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    return to_saved(named, settings.attention, settings.model.layers)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by key."""
    sizes = read_metadata(path).state_dict_metadata
    tensors = {
        key: torch.empty(size.size, dtype=size.properties.dtype)
        for key, size in sizes.items()
        if isinstance(size, TensorStorageMetadata)
    }
    load(tensors, path)
    return tensors


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: convert.py RUN/checkpoints/step_N OTHER_RUN")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f"convert.py: {error}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
