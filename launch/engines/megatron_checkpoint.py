"""Megatron's checkpoints, read and written without Megatron.

A weight is saved by its key (``megatron_names.py``), its moments as
``optimizer.state.exp_avg.KEY`` and ``optimizer.state.exp_avg_sq.KEY``, and the float32 weight
behind a bfloat16 one as ``optimizer.state.param.KEY``. ``common.pt`` has the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from launch.engines.base import MOMENTS, WholeState
from launch.engines.megatron_names import from_saved, to_saved
from launch.settings import Settings
from launch.storage.checkpoint import Checkpoint
from launch.storage.manifest import shared_failure
from nsa_dist.checkpoints.safe_load import check_dcp, read_file, read_tensors

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_whole(checkpoint: Checkpoint) -> WholeState:
    """A verified checkpoint of Megatron, whole, in a process group of one.

    Raises:
        ValueError: if a file holds more than data.
    """
    check_dcp(checkpoint.path, "common.pt")
    saved, attention = read_tensors(checkpoint.path), checkpoint.settings.attention

    def of_optimizer(kind: str) -> dict[str, Tensor]:
        prefix = f"optimizer.state.{kind}."
        found = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        return from_saved(found, attention) if found else {}

    rounded = {k: v for k, v in saved.items() if not k.startswith("optimizer.")}
    weights = from_saved(rounded, attention)
    common = read_file(checkpoint.path / "common.pt")
    step = int(common["step"])
    return WholeState(
        weights=weights | of_optimizer("param"),
        moments={kind: of_optimizer(kind) for kind in MOMENTS},
        step=step,
        updates=int(common.get("updates", step)),
        dtype=weights["norm.weight"].dtype,
    )


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of ``read_whole`` alone: the float32 ones where there are any.

    Raises:
        ValueError: if a file holds more than data.
    """
    prefix = "optimizer.state.param."
    check_dcp(checkpoint.path, "common.pt")

    def wanted(key: str) -> bool:
        return key.startswith(prefix) or not key.startswith("optimizer.")

    saved = read_tensors(checkpoint.path, wanted)
    whole = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    rounded = {k: v for k, v in saved.items() if not k.startswith(prefix)}
    return from_saved(rounded | whole, checkpoint.settings.attention)


def write_whole(path: Path, state: WholeState, settings: Settings) -> None:
    """Write a checkpoint of Megatron into an empty folder, in a process group of one.

    Raises:
        CheckpointError: if it cannot be written.
    """

    def saved(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return to_saved(named, settings.attention, settings.model.layers)

    weights = saved(state.weights)
    tensors = {f"optimizer.state.param.{key}": value for key, value in weights.items()}
    for kind in MOMENTS:
        prefix = f"optimizer.state.{kind}."
        tensors |= {prefix + key: value for key, value in saved(state.moments[kind]).items()}
    tensors |= {key: value.to(state.dtype) for key, value in weights.items()}
    with shared_failure():
        save(tensors, checkpoint_id=path)
    torch.save({"step": state.step, "updates": state.updates}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
