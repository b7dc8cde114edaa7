"""What the training loop asks of what spreads the model: FSDP2, Megatron or DeepSpeed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.processes.ranks import Ranks
from launch.settings import OptimizerSettings
from nsa_dist import ShardedBatch


@dataclass(frozen=True)
class Step:
    """One update; none, where ``grad_norm`` is not finite: weights and optimizer state stay.

    Args:
        loss_sum: float64 scalar, nats; the sum over all ranks is that of all targets, before the
            update.
        targets: number of targets everywhere.
        grad_norm: scalar, the global norm of the mean loss's gradient before clipping; the same on
            every rank. Not finite if any gradient, or any micro-batch's loss, is not.
    """

    loss_sum: Tensor
    targets: int
    grad_norm: Tensor


class Engine(Protocol):
    """The model and its optimizer on all ranks. Every method is collective.

    Attributes:
        parameters: of the whole model.
        sampler: maps local tokens [1, L] (and ``cu_seqlens``) to local logits [1, L, vocabulary].
    """

    parameters: int
    sampler: nn.Module

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        """One update from this replica's micro-batches, or none, as ``Step`` says."""
        ...

    def loss(self, batch: ShardedBatch) -> Tensor:
        """Sum of the targets' losses, to be added over the ranks of the replica; no gradient."""
        ...

    def communication(self) -> dict[str, int]:
        """Bytes that this rank's attention layers received since the last reset, by kind."""
        ...

    def reset_communication(self) -> None:
        """Start counting anew."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of weights and optimizer state, by names to tell; not copied."""
        ...

    def write(self, path: Path, step: int) -> None:
        """Write the state after ``step`` steps into an empty folder; ``checkpoint.save_checkpoint``
        makes a checkpoint of it.

        Raises:
            CheckpointError: on one rank or more, if it cannot be written. No rank is left waiting.
        """
        ...

    def read(self, path: Path) -> int:
        """Restore the state of a checkpoint that ``checkpoint.resume`` found; the steps done."""
        ...


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether AdamW decays a parameter, by our name or Megatron's: matrices, and not gains, biases,
    positions, logits or queries, be it one set of them or one a head."""
    vector = name.endswith((".position", ".logits", ".query")) or "norm" in name
    return parameter.ndim >= 2 and not vector


def make_adamw(
    named: Iterable[tuple[str, nn.Parameter]], decayed: Container[str], options: OptimizerSettings
) -> torch.optim.AdamW:
    """AdamW that decays the parameters whose names are ``decayed`` and leaves the others alone."""
    named = list(named)
    return torch.optim.AdamW(
        [
            {
                "params": [p for name, p in named if name in decayed],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def spoil_gradients(loss: Tensor) -> Tensor:
    """The same loss; where it is not finite, its gradients are not either.

    So one number, the norm of all gradients, tells every rank of both. Some losses would hide: that
    of a probability of 0 is inf, its gradient finite.
    """
    return loss * (1 + 0 * loss.detach())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Local tensors of an optimizer: what it steps and its state, by names to tell."""
    # DeepSpeed takes parameters out of their groups between the steps.
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(dict.fromkeys([*stepped, *optimizer.state])):
        name = f"the optimizer's tensor {index}"
        yield name, local_part(parameter)
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}: {kind}", local_part(value)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_targets(batches: Sequence[ShardedBatch], ranks: Ranks) -> int:
    """Targets of all replicas' micro-batches. Collective."""
    # Each rank reports its replica's whole count.
    local = torch.tensor([sum(batch.num_targets for batch in batches)])
    return int(ranks.total(local)) // ranks.replica
