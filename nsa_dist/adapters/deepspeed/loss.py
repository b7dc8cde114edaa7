"""From a sum of losses to what ``engine.backward`` takes.

DeepSpeed averages gradients, over the data parallel ranks or over all, by stage and options. A
rank's own mean is no help, since ranks that share a sequence have unlike numbers of targets. So the
sum is divided by the number of targets everywhere, and multiplied by what DeepSpeed divides by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.adapters.deepspeed.mpu import SequenceParallelMPU
from nsa_dist.checks import as_int, check, describe
from nsa_dist.sharding import ShardedBatch

# Options that would change the divisor of gradients, or are untested: name, value, allowed values.
_ONLY_ENGINE: tuple[tuple[str, Callable[[Any], Any], tuple[Any, ...]], ...] = (
    ("gradient_predivide_factor", lambda engine: engine.gradient_predivide_factor(), (1.0,)),
    (
        "zero_optimization.zero_quantized_gradients",
        lambda engine: engine.zero_quantized_gradients(),
        (False,),
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        lambda engine: engine.zero_hpz_partition_size(),
        (1,),
    ),
    (
        "zero_optimization.offload_optimizer.device",
        lambda engine: _device(engine.zero_offload_optimizer()),
        ("none", "cpu"),
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        lambda engine: engine.super_offload(),
        (False,),
    ),
    (
        "zero_optimization.offload_param.device",
        lambda engine: _device(engine.zero_offload_param()),
        ("none", "cpu"),
    ),
    ("zero_optimization.zenflow", lambda engine: engine.zenflow_config(), (None,)),
    ("compile.deepcompile", lambda engine: engine.is_deepcompile_enabled(), (False,)),
    ("tensor_parallel.autotp_size", lambda engine: engine.autotp_size(), (0, 1)),
    ("MoE layers in the model", lambda engine: engine.has_moe_layers, (False,)),
)


def _device(offload: Any) -> str:
    return "none" if offload is None else offload.device


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
        ValueError: if the engine has another ``mpu``, or an option that divides gradients in
            ways not known here, or has not been tried.
    """
    num_targets = as_int("num_targets", num_targets, 0)
    if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1:
        raise ValueError(f"loss_sum must be a scalar tensor, got {describe(loss_sum)}")
    return loss_sum * (_divisor(engine) / max(num_targets, 1))


def _divisor(engine: Any) -> float:
    """What DeepSpeed divides a rank's gradients by before it adds those of all ranks."""
    mpu = engine.mpu
    if not isinstance(mpu, SequenceParallelMPU):
        must = "that of deepspeed.initialize(mpu=make_mpu(group))"
        raise ValueError(f"mpu must be {must}, got {describe(mpu)}")
    for option, read, allowed in _ONLY_ENGINE:
        value = read(engine)
        check(value in allowed, option, value, f"{' or '.join(map(repr, allowed))} for scale_loss")
    if not engine.gradient_average:
        replicas = 1
    elif engine.zero_optimization_stage() == 3 and _scatters(engine):
        # This path alone takes ranks that share a sequence for replicas.
        replicas = dist.get_world_size(mpu.get_sequence_data_parallel_group())
    else:
        replicas = mpu.get_data_parallel_world_size()
    return float(replicas * engine.gradient_accumulation_steps())


def _scatters(engine: Any) -> bool:
    """Whether ZeRO 3 averages all gradients by reduce-scatter. It falls back to that, by another
    divisor, for what is not in its contiguous bucket."""
    if engine.zero_reduce_scatter() or not engine.zero_contiguous_gradients():
        return True
    bucket = engine.zero_reduce_bucket_size()
    trained = (p for p in engine.module.parameters() if p.requires_grad)
    largest = max((getattr(p, "ds_numel", p.numel()) for p in trained), default=0)
    if largest > bucket and engine.mpu.get_sequence_parallel_world_size() > 1:
        raise ValueError(
            f"zero_optimization.reduce_bucket_size must be at least {largest}, the elements of "
            f"the largest parameter, for scale_loss with reduce_scatter=False, got {bucket}"
        )
    return False
