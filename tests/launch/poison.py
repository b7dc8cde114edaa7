"""Runs whose gradients, losses or weights are spoilt at chosen steps, on any engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from launch import train
from launch.engines.base import Engine, Step
from launch.processes.ranks import Ranks, start_ranks
from launch.seeds import mix_seed
from launch.settings import Settings
from nsa_dist import ShardedBatch
from tests.launch.megatron import _own_processes, _prepare


@dataclass(frozen=True)
class Poison:
    """What is spoilt in a step.

    Args:
        what: "gradient" (one element, in the last norm's backward), "gradients" (all, multiplied
            there), "loss" (added to it, so that its gradient stays), "reported loss" or "weight"
            (one element, after the step).
        rank: the only rank that has it.
        micro: the only micro-batch that has it.
    """

    what: str
    value: float
    rank: int
    micro: int = 0


@dataclass(frozen=True)
class Poisoned:
    """A run's losses and norms, and of each step whether any bit of the state changed."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    changed: tuple[bool, ...]
    validation_loss: float


class PoisonedEngine:
    """An engine, its steps watched and spoilt."""

    def __init__(
        self, engine: Any, settings: Settings, ranks: Ranks, poisons: dict[int, Poison]
    ) -> None:
        self._engine, self._settings, self._ranks = engine, settings, ranks
        self._poisons = poisons
        self._active: Poison | None = None
        self._forwards = 0
        self.changed: list[bool] = []
        model = engine.gpt if settings.parallel.engine == "megatron" else engine.model
        norm = model.decoder.final_layernorm if hasattr(model, "decoder") else model.norm
        if norm is not None:
            norm.register_forward_hook(self._after_norm)
        model.register_forward_hook(self._after_model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _is_now(self, *kinds: str) -> bool:
        poison = self._active
        return poison is not None and poison.what in kinds and poison.micro == self._forwards

    def _after_norm(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if self._is_now("gradient", "gradients") and output.requires_grad:
            poison = self._active
            assert poison is not None

            def spoil(grad: Tensor) -> Tensor:
                if poison.what == "gradients":
                    return grad * poison.value
                grad = grad.clone()
                grad.view(-1)[-1] = poison.value
                return grad

            output.register_hook(spoil)

    def _after_model(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        if self._is_now("loss"):
            assert self._active is not None
            output = output + self._active.value
        self._forwards += 1
        return output

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        seeds = [mix_seed(self._settings.run.seed, s) for s in range(self._settings.run.steps)]
        poison = self._poisons.get(seeds.index(seed) + 1)
        mine = poison is not None and poison.rank == self._ranks.rank
        self._active, self._forwards = poison if mine else None, 0
        before = {name: tensor.detach().clone() for name, tensor in self._engine.tensors()}
        done: Step = self._engine.step(batches, learning_rate, seed)
        after = dict(self._engine.tensors())
        # Moments that are made in a step start as zeros.
        self.changed.append(
            any(
                not torch.equal(tensor, before.get(name, torch.zeros_like(tensor)))
                for name, tensor in after.items()
            )
        )
        if mine and poison is not None and poison.what == "weight":
            next(t for t in after.values() if t.numel()).detach().view(-1)[0] = poison.value
        if poison is not None and poison.what == "reported loss":
            done = replace(done, loss_sum=done.loss_sum + poison.value)
        self._active = None
        return done


@contextmanager
def _poisoned_engines(poisons: dict[int, Poison]) -> Iterator[list[PoisonedEngine]]:
    made: list[PoisonedEngine] = []
    original = train.make_engine

    def make(settings: Settings, vocab_size: int, ranks: Ranks) -> Engine:
        made.append(PoisonedEngine(original(settings, vocab_size, ranks), settings, ranks, poisons))
        return made[-1]  # type: ignore[return-value]

    with mock.patch.object(train, "make_engine", make):
        yield made


def run_poisoned(settings: Settings, poisons: dict[int, Poison]) -> Poisoned:
    """A whole run.

    Args:
        poisons: by step, counted from 1.
    """
    is_megatron = settings.parallel.engine == "megatron"
    if is_megatron or settings.run.device == "cuda":
        _prepare(settings)
    processes = _own_processes() if is_megatron else nullcontext()
    with processes, _poisoned_engines(poisons) as made:
        result = train.train(settings, start_ranks(settings))
    return Poisoned(
        result.losses, result.grad_norms, tuple(made[0].changed), result.validation_loss
    )
