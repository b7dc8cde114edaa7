"""Native Sparse Attention under DeepSpeed: any ZeRO stage, with sequences split over ranks.

    mpu = make_mpu(mesh["sp"])                      # for deepspeed.initialize(mpu=mpu)
    attention = NSADistributedAttention(config, mpu.get_sequence_parallel_group())
    engine.backward(scale_loss(engine, loss_sum, num_targets))

ZeRO shards over all ranks. ``docs/adapters/deepspeed.md`` explains weights, batches, losses,
checkpoints and limits.
"""

from nsa_dist.adapters.deepspeed.attention import NSADistributedAttention
from nsa_dist.adapters.deepspeed.checkpoint import load_checkpoint, read_weights
from nsa_dist.adapters.deepspeed.loss import count_targets, scale_loss
from nsa_dist.adapters.deepspeed.mpu import SequenceParallelMPU, make_mpu

__all__ = [
    "NSADistributedAttention",
    "SequenceParallelMPU",
    "count_targets",
    "load_checkpoint",
    "make_mpu",
    "read_weights",
    "scale_loss",
]
