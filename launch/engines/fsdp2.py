"""Training by FSDP2: weights, gradients and optimizer state sharded over all ranks.

The loss is the sum of all targets' cross-entropies over their number, across ranks, replicas and
accumulated micro-batches: how a batch is spread changes no gradient beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.engines.base import (
    Step,
    count_targets,
    is_decayed,
    local_part,
    make_adamw,
    spoil_gradients,
)
from launch.model import build_model
from launch.processes.ranks import Ranks
from launch.seeds import mix_seed
from launch.settings import OptimizerSettings, Settings
from launch.storage.checkpoint import load_state, save_state
from nsa_dist import ShardedBatch


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the rest alone."""
    named = dict(model.named_parameters())
    decayed = {name for name, p in named.items() if is_decayed(name, p)}
    return make_adamw(named.items(), decayed, settings)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients down to a global norm of at most ``largest`` (0: leave them).

    Returns:
        The norm before, over every shard on every rank; the same scalar on each.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    assert isinstance(norm, DTensor)
    return norm.full_tensor()


def forward_backward(
    model: nn.Module, batches: Sequence[ShardedBatch], ranks: Ranks, seed: int
) -> tuple[Tensor, int]:
    """Gradients of the mean loss over every target of every rank's batches.

    Returns:
        The sum of this rank's losses (float64 scalar, nats) and the number of targets everywhere.
    """
    targets = count_targets(batches, ranks)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(batches):
        # Dropout's draws follow from the seed, the step and the micro-batch alone.
        torch.manual_seed(mix_seed(seed, "micro-batch", ranks.dp_rank * len(batches) + index))
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        (spoil_gradients(loss) / max(targets, 1)).backward()
        loss_sum += loss.detach()
    return loss_sum, targets


class Fsdp2Engine:
    """``base.Engine`` by FSDP2."""

    def __init__(self, settings: Settings, vocab_size: int, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.model = build_model(settings, vocab_size, ranks)
        self.sampler: nn.Module = self.model
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.communication = self.model.communication
        self.reset_communication = self.model.reset_communication

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum, targets = forward_backward(self.model, batches, self.ranks, seed)
        grad_norm = clip_gradients(self.model, self.settings.optimizer.largest_norm)
        # Where it is 1, fused AdamW leaves weights, moments and step counts as they are. It reads
        # it on the device: the host does not wait.
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss_sum, targets, grad_norm)

    @torch.no_grad()
    def loss(self, batch: ShardedBatch) -> Tensor:
        self.model.eval()
        loss = self.model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        self.model.train()
        return loss

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, local_part(parameter)
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}: {kind}", local_part(value)

    def write(self, path: Path, step: int) -> None:
        save_state(path, step, self.model, self.optimizer)

    def read(self, path: Path) -> int:
        return load_state(path, self.model, self.optimizer)
