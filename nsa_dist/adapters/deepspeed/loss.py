"""The loss for ``engine.backward``, from a sum of losses.

DeepSpeed averages gradients over the data parallel ranks or over all ranks, depending on stage and
options. Each rank's own mean loss would be wrong, because ranks that share a sequence have
different numbers of targets. So the sum is divided by the number of targets on all ranks, and
multiplied by the divisor that DeepSpeed uses.
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
    """Number of targets of one optimizer step, over all micro-batches and replicas. Collective.

    Args:
        batches: this replica's micro-batches, from ``shard_batch``.
    """
    local = torch.tensor([sum(batch.num_targets for batch in batches)])
    group = mpu.get_sequence_data_parallel_group()
    if "nccl" in dist.get_backend(group):
        local = local.cuda()
    dist.all_reduce(local, group=group)
    # Every rank counts the whole sequences of its replica.
    return int(local) // mpu.get_sequence_parallel_world_size()


def scale_loss(engine: Any, loss_sum: Tensor, num_targets: int) -> Tensor:
    """The loss for ``engine.backward`` that gives the gradients of a single process.

    Let L be the sum of the losses of all targets, over ranks, replicas and the micro-batches of an
    optimizer step, divided by their number N. The optimizer then uses dL/dw at every ZeRO stage.
    A rank without targets passes the sum 0 and still calls backward.

    Args:
        engine: returned by ``deepspeed.initialize`` with the ``mpu`` of ``make_mpu``.
        loss_sum: scalar with a graph, the sum of the losses of this rank's targets in one
            micro-batch (``cross_entropy(..., ignore_index=-100, reduction="sum")``).
        num_targets: N, from ``count_targets``; with 0 the loss is 0.

    Returns:
        ``loss_sum`` times a factor. To log L, sum ``loss_sum`` over all ranks and micro-batches and
        divide by N.

    Raises:
        ValueError: if the engine has another ``mpu``, or an option whose divisor of gradients is
            unknown or untested.
    """
    num_targets = as_int("num_targets", num_targets, 0)
    if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1:
        raise ValueError(f"loss_sum must be a scalar tensor, got {describe(loss_sum)}")
    return loss_sum * (_divisor(engine) / max(num_targets, 1))


def _divisor(engine: Any) -> float:
    """The divisor of a rank's gradients in DeepSpeed, before it sums them over all ranks."""
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
        # Only this path counts ranks that share a sequence as replicas.
        replicas = dist.get_world_size(mpu.get_sequence_data_parallel_group())
    else:
        replicas = mpu.get_data_parallel_world_size()
    return float(replicas * engine.gradient_accumulation_steps())


def _scatters(engine: Any) -> bool:
    """Whether ZeRO 3 averages all gradients by reduce-scatter. Parameters that do not fit its
    contiguous bucket also use reduce-scatter, with another divisor."""
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
