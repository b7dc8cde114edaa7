"""Modules in torchtitan's protocol: projections with rows of their own, compressors, gates.

torchtitan builds every module from a config, on the meta device, and shards its weights as the
config says: parameters without a sharding are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.attention import BaseQKVLinear, FusedQKVLinear, QKVLinear
from torchtitan.models.common.decoder_sharding import colwise_config, dense_param_placement
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from nsa_dist.config import NSAConfig
from nsa_dist.nn.compressor import BlockCompressor, compressor_options
from nsa_dist.nn.gates import initial_gate_logits
from nsa_kernels.compressors import parameter_names

_WEIGHT_INIT = partial(nn.init.trunc_normal_, std=0.02)


class Compressor(BlockCompressor, Module):
    """``BlockCompressor`` in torchtitan's protocol; its own method draws the initial weights."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        nsa: NSAConfig
        width: int

    def __init__(self, config: Config) -> None:
        BlockCompressor.__init__(self, config.nsa, config.width)
        self.nsa = config.nsa

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Shard the weights; those of each head are then of this tensor parallel rank's heads."""
        self.options = compressor_options(self.nsa.split(parallel_dims.tp), self.dim)
        super().parallelize(parallel_dims)


class NSAQKVLinear(BaseQKVLinear):
    """Separate keys and values for each branch.

    Rows of ``wk`` and ``wv`` are (group, set, channel), so that tensor parallel ranks split groups;
    sets are in the order of ``NSAConfig.key_branches`` and ``branches``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseQKVLinear.Config):
        wq: Linear.Config
        wk: Linear.Config
        wv: Linear.Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.wq, self.wk, self.wv = config.wq.build(), config.wk.build(), config.wv.build()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] to q [B, L, H, D], k [B, L, G*nk, D] and v [B, L, G*nv, D]."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return q, k, v


def gate_config(hidden_size: int, nsa: NSAConfig) -> Linear.Config:
    """A linear layer to the logits of gates, rows (head, branch): heads split over TP ranks."""
    logits = initial_gate_logits(nsa).flatten()
    return Linear.Config(
        in_features=hidden_size,
        out_features=logits.numel(),
        bias=True,
        param_init={"weight": _WEIGHT_INIT, "bias": partial(_fill, logits.tolist())},
        sharding_config=colwise_config(),
    )


def compressor_config(nsa: NSAConfig, width: int) -> Compressor.Config:
    """A compressor, whole on every TP rank, or its heads split with weights for each head."""
    split = spmd.S(0) if nsa.compress_per_head else spmd.R
    shardings = {name: dense_param_placement(tp=split) for name in parameter_names(nsa.compress)}
    return Compressor.Config(
        nsa=nsa, width=width, sharding_config=ShardingConfig(state_shardings=shardings)
    )


def qkv_config(
    given: BaseQKVLinear.Config, hidden_size: int, nsa: NSAConfig
) -> BaseQKVLinear.Config:
    """The projections to q, k and v; the model's own with one K, V for all branches."""
    if not nsa.independent_kv:
        return given
    assert isinstance(given, (FusedQKVLinear.Config, QKVLinear.Config))
    like = given.wqkv if isinstance(given, FusedQKVLinear.Config) else given.wq
    # The initial values of a fused projection belong to its shape.
    init = like.param_init if isinstance(given, QKVLinear.Config) else None

    def linear(heads: int) -> Linear.Config:
        return replace(
            like,
            in_features=hidden_size,
            out_features=heads * nsa.head_dim,
            param_init=init or {"weight": _WEIGHT_INIT, "bias": nn.init.zeros_},
            sharding_config=colwise_config(),
        )

    return NSAQKVLinear.Config(
        head_dim=nsa.head_dim,
        wq=linear(nsa.num_heads),
        wk=linear(nsa.num_kv_heads * nsa.num_key_sets),
        wv=linear(nsa.num_kv_heads * nsa.num_value_sets),
    )


def _fill(values: list[float], parameter: Tensor) -> None:
    """Set a parameter, whole or sharded, to ``values``."""
    whole = torch.tensor(values, dtype=parameter.dtype, device=parameter.device)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)
