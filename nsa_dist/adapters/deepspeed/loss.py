"""From a sum of losses to what ``engine.backward`` takes.

DeepSpeed averages gradients, over the data parallel ranks or over all, by stage and options. A
rank's own mean is no help, since ranks that share a sequence have unlike numbers of targets. So the
sum is divided by the number of targets everywhere, and multiplied by what DeepSpeed divides by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.adapters.deepspeed.mpu import SequenceParallelMPU
from nsa_dist.checks import check_int, describe
from nsa_dist.sharding import ShardedBatch

# What would divide gradients otherwise, or has not been tried; the value that works.
_ONLY_ENGINE: tuple[tuple[str, str, Any], ...] = (
    ("gradient_predivide_factor", "gradient_predivide_factor", 1.0),
    ("zero_optimization.zero_quantized_gradients", "zero_quantized_gradients", False),
    ("zero_optimization.zero_hpz_partition_size", "zero_hpz_partition_size", 1),
)


def count_targets(batches: Sequence[ShardedBatch], mpu: SequenceParallelMPU) -> int:
    """Targets of one optimizer step: of all its micro-batches on all replicas. Collective.

    Args:
        batches: this replica's micro-batches, from ``shard_batch``.
    """
    local = torch.tensor([sum(batch.num_targets for batch in batches)])
    group = mpu.get_sequence_data_parallel_group()
    if "nccl" in dist.get_backend(group):
        local = local.cuda()
    dist.all_reduce(local, group=group)
    # Each rank counts its replica's whole sequences.
    return int(local) // mpu.get_sequence_parallel_world_size()


def scale_loss(engine: Any, loss_sum: Tensor, num_targets: int) -> Tensor:
    """The loss for ``engine.backward``, so that gradients are those of one process.

    With L the sum of all targets' losses over their number N, over ranks, replicas and the
    micro-batches of an optimizer step, the optimizer steps along dL/dw at every ZeRO stage. A rank
    without a target gives the sum 0, and takes part.

    Args:
        engine: what ``deepspeed.initialize`` returned, given the ``mpu`` of ``make_mpu``.
        loss_sum: scalar with a graph, the sum of the losses of this rank's targets in one
            micro-batch (``cross_entropy(..., ignore_index=-100, reduction="sum")``).
        num_targets: N, as of ``count_targets``; with 0 the loss is 0.

    Returns:
        ``loss_sum`` times a factor. To log L add ``loss_sum`` over all ranks and micro-batches and
        divide by N.

    Raises:
        ValueError: if the engine has another ``mpu``, or divides gradients in ways not known here.
    """
    check_int("num_targets", num_targets, 0)
    if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1:
        raise ValueError(f"loss_sum: found {describe(loss_sum)}; a scalar works")
    return loss_sum * (_divisor(engine) / max(num_targets, 1))


def _divisor(engine: Any) -> float:
    """What DeepSpeed divides a rank's gradients by before it adds those of all ranks."""
    mpu = engine.mpu
    if not isinstance(mpu, SequenceParallelMPU):
        raise ValueError(
            f"mpu: found {describe(mpu)}; deepspeed.initialize(mpu=make_mpu(group)) works"
        )
    for option, method, works in _ONLY_ENGINE:
        found = getattr(engine, method)()
        if found != works:
            raise ValueError(f"{option}: found {found!r}; {works!r} works with scale_loss")
    if not engine.gradient_average:
        replicas = 1
    elif engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter():
        # This path alone takes ranks that share a sequence for replicas.
        replicas = dist.get_world_size(mpu.get_sequence_data_parallel_group())
    else:
        replicas = mpu.get_data_parallel_world_size()
    return float(replicas * engine.gradient_accumulation_steps())
