"""What surrounds the attention in a step: weights, activations, projections.

Letters: N local tokens, h hidden size, m width of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from launch.estimating.costs import Rates
from launch.losses import ROWS
from launch.model import Decoder
from launch.settings import Settings
from nsa_dist.plan import Plan

STATE_BYTES = 16
"""Of a weight: float32 itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class ModelCost:
    """The model around the attention, on one rank.

    Attributes:
        layers: blocks.
        recompute: what of each block backward recomputes: "block", "mlp" or "".
        products_ms: of one block's projections and MLP, forward.
        mlp_ms: of its MLP alone.
        head_ms: of the logits, forward.
        state: bytes of weights, gradients and optimizer state, with two gathered blocks.
        block: bytes that a block keeps until backward beside its attention call.
        mlp: of these, what its MLP keeps.
        entry: bytes of a block's input.
        logits: bytes of the logits that exist at one time.
        parameters: of the whole model.
    """

    layers: int
    recompute: str
    products_ms: float
    mlp_ms: float
    head_ms: float
    state: float
    block: float
    mlp: float
    entry: float
    logits: float
    parameters: int

    def step_ms(self, forward: float, backward: float) -> float:
        """A micro-batch, from the attention call's forward and backward."""
        block = forward + backward + 3 * self.products_ms
        block += {"": 0.0, "mlp": self.mlp_ms, "block": forward + self.products_ms}[self.recompute]
        return self.layers * block + 4 * self.head_ms  # The logits are made again in backward.

    def memory(self, kept: float, peak: float) -> float:
        """Bytes at most, from the attention call's."""
        if self.recompute == "block":
            activations = self.layers * self.entry + self.block + peak
        elif self.recompute == "mlp":
            activations = self.layers * (self.block - self.mlp + kept) + self.mlp + peak - kept
        else:
            activations = self.layers * (self.block + kept) + peak - kept
        return self.state + activations + self.logits


def model_cost(
    settings: Settings, vocab_size: int, plan: Plan, rates: Rates, element_size: int
) -> ModelCost:
    """The cost of the run's decoder on the ranks of ``plan``, sharded over these and replicas."""
    model, config = settings.model, settings.attention
    with torch.device("meta"):
        decoder = Decoder(settings, vocab_size)
    parameters = sum(p.numel() for p in decoder.parameters())
    of_block = sum(p.numel() for p in decoder.blocks[0].parameters())
    multiplied = sum(
        p.numel()
        for name, p in decoder.blocks[0].named_parameters()
        if p.ndim == 2 and "compressor" not in name
    )
    tokens = plan.batch * plan.local_length
    heads, groups, hidden = config.num_heads, config.num_kv_heads, model.hidden_size
    elements = 4 * hidden + heads * (config.head_dim + len(config.branches)) + 3 * model.mlp_hidden
    elements += groups * config.num_key_sets * config.head_dim
    elements += groups * config.num_value_sets * config.value_dim
    replicas = max(settings.parallel.dp, 1)
    return ModelCost(
        layers=model.layers,
        # Megatron's recomputed attention has no estimate of its own.
        recompute=("mlp" if model.recompute_part == "mlp" else "block") if model.recompute else "",
        products_ms=2.0 * multiplied * tokens / rates.matmul / 1e9,
        mlp_ms=2.0 * 3 * hidden * model.mlp_hidden * tokens / rates.matmul / 1e9,
        head_ms=2.0 * hidden * vocab_size * tokens / rates.matmul / 1e9,
        state=STATE_BYTES * parameters / (plan.size * replicas) + 2 * of_block * element_size,
        block=elements * tokens * element_size,
        mlp=3.0 * model.mlp_hidden * tokens * element_size,
        entry=hidden * tokens * element_size,
        logits=min(tokens, ROWS) * vocab_size * (element_size + 8),
        parameters=parameters,
    )
