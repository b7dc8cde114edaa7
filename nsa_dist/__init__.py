"""Native Sparse Attention for training on sequences split over many GPUs.

    from nsa_dist import NativeSparseAttention, NSAConfig, shard_batch

``docs/algorithm.md`` explains the algorithm and the flow of data.
"""

from nsa_dist.attention.functional import NSADetails, native_sparse_attention
from nsa_dist.attention.plan_cache import get_plan
from nsa_dist.block import NSABlock
from nsa_dist.comm.counter import CommunicationCounter
from nsa_dist.config import BRANCHES, NSAConfig, RotaryConfig
from nsa_dist.layer import NativeSparseAttention
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.rotary import apply_rotary, rotary_cos_sin
from nsa_dist.sharding import ShardedBatch, Sharding, make_sharding, shard, shard_batch, unshard

__all__ = [
    "BRANCHES",
    "BlockCompressor",
    "CommunicationCounter",
    "NSABlock",
    "NSAConfig",
    "NSADetails",
    "NativeSparseAttention",
    "RotaryConfig",
    "ShardedBatch",
    "Sharding",
    "apply_rotary",
    "get_plan",
    "make_sharding",
    "native_sparse_attention",
    "rotary_cos_sin",
    "shard",
    "shard_batch",
    "unshard",
]
