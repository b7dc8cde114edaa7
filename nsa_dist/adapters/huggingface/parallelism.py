"""Detection of sequence parallelism by accelerate, DeepSpeed and torch.

None of them passes its group to the model. Without ``use_group`` the model would treat each rank's
part as a document of its own, and could not notice. But all three keep settings, equal on all
ranks, that show whether sequences are split, and over how many ranks.
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
    # ``UlyssesSPAttentionHF.register_with_transformers`` makes this group, with or without engine.
    ulysses = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if ulysses is not None and ulysses._SEQUENCE_PARALLEL_GROUP is not None:
        return option, ulysses.get_sequence_parallel_world_size()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and (groups.mpu is not None or groups.mesh_device is not None):
        return option, groups._get_sequence_parallel_world_size()
    return None


def _torch() -> tuple[str, int] | None:
    # torch's context manager replaces this function while it is active.
    module = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if module.startswith("torch.distributed.tensor.experimental"):
        return "torch's context_parallel", 2  # At least 2; torch does not expose the number.
    return None


def split_without_group() -> str | None:
    """The error if sequences are split although ``use_group`` was not called, or None.

    Equal on all ranks.
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
