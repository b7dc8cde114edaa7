"""Sequences that accelerate, DeepSpeed or torch split, without a call of ``use_group``.

None of them passes its group to the model. But while one of them splits sequences, it has replaced
an attention function of torch or transformers by one that knows the group. A dense model would run
that function; a converted one takes the group from it:

    torch's ``context_parallel`` (``cp_size`` of accelerate): ``scaled_dot_product_attention`` of
        torch, while the context is active; the layout is zigzag, or contiguous without torch's
        load balancer
    DeepSpeed's ALST (``sp_size`` of accelerate): the attention function of transformers; the
        layout is contiguous

Where sizes are stated but no function is replaced, the parts of a sequence are unknown.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nsa_dist.comm.group import GroupLike


@dataclass(frozen=True)
class Split:
    """Who splits the sequences of a call, and how.

    Attributes:
        option: the name that its users know.
        group: the ranks that share a sequence.
        layout: the layout of parts.
        mean_of_parts: whether losses are means over a rank's own targets, which the caller weighs
            by their numbers.
    """

    option: str
    group: GroupLike
    layout: str
    mean_of_parts: bool


def find_split(attention: str, training: bool) -> Split | None:
    """How torch or DeepSpeed splits the sequences of the next call; None if neither does.

    Equal on all ranks.

    Args:
        attention: ``attn_implementation`` of the model.
        training: whether the model is in training mode; in evaluation DeepSpeed may be told to
            leave sequences whole.
    """
    return _torch() or _deepspeed(attention, training)


def _torch() -> Split | None:
    function = F.scaled_dot_product_attention
    module = getattr(function, "__module__", None) or ""
    if not module.startswith("torch.distributed.tensor.experimental"):
        return None
    mesh = inspect.getclosurevars(function).nonlocals["device_mesh"]
    balanced = sys.modules[module]._cp_options.enable_load_balance
    layout = "zigzag" if balanced else "contiguous"
    return Split("torch's context_parallel", mesh, layout, mean_of_parts=False)


def _deepspeed(attention: str, training: bool) -> Split | None:
    function: Any = ALL_ATTENTION_FUNCTIONS.get(attention)
    if getattr(function, "__module__", None) != "deepspeed.runtime.sequence_parallel.ulysses_sp":
        return None
    ulysses = inspect.getclosurevars(function).nonlocals["uattn"]
    if ulysses.disable_in_eval and not training:
        return None
    return Split(
        "DeepSpeed's sequence parallelism", ulysses.process_group, "contiguous", mean_of_parts=True
    )


def _stated_by_accelerate() -> tuple[str, int] | None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    config = getattr(state.AcceleratorState(), "parallelism_config", None)
    for option in ("cp_size", "sp_size"):
        size = getattr(config, option, None) or 1
        if size > 1:
            return f"{option} of accelerate's ParallelismConfig", size
    return None


def _stated_by_deepspeed() -> tuple[str, int] | None:
    option = "sequence_parallel_size of DeepSpeed"
    # ``UlyssesSPAttentionHF.register_with_transformers`` makes this group, with or without engine.
    ulysses = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if ulysses is not None and ulysses._SEQUENCE_PARALLEL_GROUP is not None:
        return option, ulysses.get_sequence_parallel_world_size()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and (groups.mpu is not None or groups.mesh_device is not None):
        return option, groups._get_sequence_parallel_world_size()
    return None


def unknown_split(
    training: bool, position_ids: Tensor | None, shift_labels: Tensor | None
) -> str | None:
    """The error if a split is stated but ``find_split`` finds none, or None.

    In training it is an error on every rank. In evaluation rows are whole, as for a dense model,
    unless the arguments show a part: labels that are shifted already, which accelerate's data
    loaders make as they split rows, or positions that start after 0 (not on the first rank).

    Args:
        position_ids: integer [1 or B, L]; None if they were not given or continue a cache.
        shift_labels: from the caller.
    """
    for stated in (_stated_by_accelerate, _stated_by_deepspeed):
        option, size = stated() or ("", 1)
        if size == 1:
            continue
        if not training and shift_labels is None:
            late = position_ids is not None and bool((position_ids[:, :1] > 0).any())
            if not late:
                continue
        return (
            f"{option} must be 1 without a call of use_group where neither torch's "
            f"context_parallel nor DeepSpeed's attention is active, got {size}: each rank would "
            "take its part of a sequence for a whole one; call use_group(group, layout=...) if "
            "ranks have parts, or use_group(None) if every rank has whole sequences"
        )
    return None
