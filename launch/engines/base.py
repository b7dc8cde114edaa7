"""What the programs ask of an engine, which spreads the model over ranks and runs its steps.

An engine is an ``EngineSpec``, which says what it is before anything is built and can be imported
where the engine's library is not installed, and an ``Engine``, which the spec builds.
``registry.py`` has a row for each. The programs find engines there; only ``convert.py``, the way
back of ``export.py`` and the recording of choices name one, whose files they read or write.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.processes.ranks import Ranks
from launch.settings import OptimizerSettings, Settings
from launch.storage.checkpoint import Checkpoint
from nsa_dist import ShardedBatch
from nsa_kernels.compressors import undecayed_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


def _accepts(*_: Any) -> None:
    """The check of an engine that refuses nothing."""


def _has_no_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The reading of an engine whose checkpoints only itself can read."""
    engine = checkpoint.settings.parallel.engine
    raise ValueError(
        f"parallel.engine must be one whose checkpoints can be read whole, got {engine!r} "
        f"in {checkpoint.path}"
    )


def grid(settings: Settings, ranks: Ranks) -> str:
    """How replicas and context parallel ranks form a grid, such as 'dp 2 x cp 4'."""
    return f"dp {ranks.dp} x cp {ranks.cp}"


@dataclass(frozen=True)
class EngineSpec:
    """An engine before it is built.

    Args:
        name: the value of ``parallel.engine``.
        build: settings, size of the vocabulary, ranks -> the engine with initial weights;
            collective. What it needs of the engine's library is imported in it.
        check_settings: raises ValueError, naming the option, for settings that this engine cannot
            run anywhere.
        check_machine: the same for settings and a device, "cuda" or "cpu", that it cannot run here.
        describe: settings, ranks -> how it uses the ranks, in a few words.
        options: options that not every engine has, but this one. Engines without them refuse all
            values except the default.
        fixed_options: those of them that a resumed run cannot change.
        file_suffixes: ends of the names of files that it reads in a checkpoint. A file with such a
            name that is not in the manifest makes the checkpoint invalid.
        last_files: files that it writes last. Checkpoints from before manifests are whole if they
            have these.
        companion: end of the name of a folder beside a checkpoint, which holds it in another form
            and is renamed and removed with it; empty if there is none.
        is_companion: whether a folder of that name is one.
        read_weights: whole weights of a verified checkpoint, by the names of ``model.Decoder``, on
            the CPU, float32 where it has them, in a process group of one. Raises ValueError if a
            file holds more than data, or this engine's checkpoints cannot be read so.
    """

    name: str
    build: Callable[[Settings, int, Ranks], Engine]
    check_settings: Callable[[Settings], None] = _accepts
    check_machine: Callable[[Settings, str], None] = _accepts
    describe: Callable[[Settings, Ranks], str] = grid
    options: tuple[str, ...] = ()
    fixed_options: tuple[str, ...] = ()
    file_suffixes: tuple[str, ...] = ()
    last_files: tuple[str, ...] = ()
    companion: str = ""
    is_companion: Callable[[Path], bool] = Path.is_dir
    read_weights: Callable[[Checkpoint], dict[str, Tensor]] = _has_no_weights


@dataclass(frozen=True)
class Step:
    """The result of one step. If ``grad_norm`` is not finite, weights and optimizer state stayed.

    Args:
        loss_sum: float64 scalar, nats; the sum over all ranks is that of all targets, before the
            update.
        targets: number of targets everywhere, integer scalar; as all of these not waited for.
        grad_norm: scalar, the global norm of the mean loss's gradient before clipping; the same on
            every rank. Not finite if any gradient, or any micro-batch's loss, is not.
    """

    loss_sum: Tensor
    targets: Tensor
    grad_norm: Tensor


class Engine(Protocol):
    """The model and its optimizer on all ranks. Every method is collective.

    Attributes:
        parameters: of the whole model.
        alone: parts of this rank's model whose forward waits for no other rank and is as much work
            on each; empty if there are none.
        sampler: maps local tokens [1, L] (and ``cu_seqlens``) to local logits [1, L, vocabulary].
    """

    alone: Sequence[nn.Module]
    parameters: int
    sampler: nn.Module

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        """One step from this replica's micro-batches."""
        ...

    def loss(self, batch: ShardedBatch) -> Tensor:
        """Sum of the targets' losses, to be added over the ranks of the replica; no gradient."""
        ...

    def communication(self) -> dict[str, int]:
        """Bytes that this rank's attention layers received since the last reset, by kind."""
        ...

    def reset_communication(self) -> None:
        """Set the counts to zero."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of weights and optimizer state, by names for messages; not copied."""
        ...

    def write(self, path: Path, step: int) -> None:
        """Write the state after ``step`` steps into an empty folder; ``checkpoint.save_checkpoint``
        makes a checkpoint of it.

        Raises:
            CheckpointError: on one rank or more, if it cannot be written. No rank is left waiting.
        """
        ...

    def read(self, path: Path) -> int:
        """Restore the state of a checkpoint that ``checkpoint.resume`` found.

        Returns:
            The number of steps done.
        """
        ...


class CopyingEngine(Engine, Protocol):
    """An engine with the option ``run.async_checkpoints``."""

    def copied(self) -> Callable[[Path, int], None]:
        """Copy the state to the CPU's memory.

        Returns:
            As ``write``, of the copy, for a thread of its own. The next copy takes its place.
        """
        ...


@dataclass(frozen=True, eq=False)
class WholeState:
    """Weights and AdamW's state of a checkpoint, each tensor whole, by the names of
    ``model.Decoder``.

    Args:
        weights: what the optimizer steps.
        moments: by ``MOMENTS``, then as the weights.
        updates: of the optimizer; fewer than ``step`` where some were skipped.
        dtype: what the weights are rounded to in forward, if the checkpoint says so.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    step: int
    updates: int
    dtype: torch.dtype


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether AdamW decays a parameter, by our name or Megatron's. It decays matrices, but not
    gains, biases, gate logits and what the table of compressors exempts. Those are matrices too if
    each head has its own."""
    last = name.rpartition(".")[2]
    vector = last == "logits" or last in undecayed_parameters() or "norm" in name
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
    """The same loss, whose gradients are not finite if the loss is not.

    So the norm of all gradients shows both to every rank. A loss can be inf with finite gradients:
    that of a probability of 0.
    """
    return loss * (1 + 0 * loss.detach())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Local tensors of an optimizer: what it steps and its state, by names for messages."""
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


def count_targets(batches: Sequence[ShardedBatch], ranks: Ranks) -> Tensor:
    """Targets of all replicas' micro-batches, int64 scalar on this rank's device, which is not
    waited for. Collective."""
    # Each rank reports its replica's whole count.
    local = sum(batch.num_targets for batch in batches)
    total = ranks.total(torch.full((), local, dtype=torch.int64, device=ranks.device))
    return total // ranks.replica
