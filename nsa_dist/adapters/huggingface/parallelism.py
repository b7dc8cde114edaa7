"""Who else splits sequences over ranks: accelerate, DeepSpeed and torch.

None of them tells the model. A model that has been told of no group would take each rank's part for
a document of its own, and no rank could see it: the first part starts at position 0. But each of
them states on every rank alike that it splits sequences, and over how many ranks.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F


def _accelerate() -> tuple[str, int] | None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    config = getattr(state.AcceleratorState(), "parallelism_config", None)
    for option in ("cp_size", "sp_size"):
        size = getattr(config, option, None) or 1
        if size > 1:
            return f"{option} of accelerate's ParallelismConfig", size
    return None


def _deepspeed() -> tuple[str, int] | None:
    option = "sequence_parallel_size of DeepSpeed"
    # What ``register_with_transformers`` of its UlyssesSPAttentionHF makes, engine or not.
    ulysses = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if ulysses is not None and ulysses._SEQUENCE_PARALLEL_GROUP is not None:
        return option, ulysses.get_sequence_parallel_world_size()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and (groups.mpu is not None or groups.mesh_device is not None):
        return option, groups._get_sequence_parallel_world_size()
    return None


def _torch() -> tuple[str, int] | None:
    # Its context manager puts a function of its own here for as long as it holds.
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if module.startswith("torch.distributed.tensor.experimental"):
        return "torch's context_parallel", 2  # At least: it keeps the number to itself.
    return None


def stated_split() -> str | None:
    """What is wrong with a call of a model that was told of no group; None if nothing is.

    The same on every rank.
    """
    for stated in (_accelerate, _deepspeed, _torch):
        split = stated()
        if split is not None and split[1] > 1:
            option, size = split
            return (
                f"{option} must be 1 without a call of use_group, got {size}: each rank would "
                "take its part of a sequence for a whole one; call use_group(group, layout=...) "
                "and cut batches by nsa_dist.shard_batch, or call use_group(None) where every "
                "rank has whole sequences"
            )
    return None
