"""How a model of transformers answers, and what it loses where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.evaluation.tasks import Example
from nsa_dist import LayerDistillation, distill_dense

ROWS = 4096
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class Answer:
    """How an example was answered.

    Args:
        score: fraction of the example's answers that the greedy continuation holds.
        loss: mean over the tokens of the reply, given those before, nats.
        text: the continuation.
    """

    score: float
    loss: float
    text: str


@torch.no_grad()
def answer(
    model: Any, example: Example, reply: Sequence[int], decode: Callable[[list[int]], str]
) -> Answer:
    """Judge a model by one example; the text runs through it once.

    Args:
        reply: tokens of the example's reply. The continuation is half as long again.
    """
    device = model.device
    prompt = torch.tensor([example.tokens], device=device)
    expected = torch.tensor([list(reply)], device=device)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    cache, first = out.past_key_values, out.logits[:, -1:]
    logits = [first]
    if expected.shape[1] > 1:
        logits.append(model(expected[:, :-1], past_key_values=cache, use_cache=True).logits)
        cache.crop(-(expected.shape[1] - 1))
    rows = torch.cat(logits, dim=1)[0]
    loss = F.cross_entropy(rows.to(_wide(rows)), expected[0])
    token, made = first[0, -1].argmax(), list[int]()
    for _ in range(len(reply) + len(reply) // 2 + 1):
        made.append(int(token))
        step = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        token = step.logits[0, -1].argmax()
    text = decode(made)
    found = sum(each in text for each in example.answers)
    return Answer(found / len(example.answers), float(loss), text)


@torch.no_grad()
def losses(model: Any, tokens: Tensor) -> Tensor:
    """Loss of each token but the first of a document, int64 [T] -> float64 [T - 1] on the CPU,
    nats."""
    tokens = tokens.to(model.device)
    states = model.model(tokens[None], use_cache=False).last_hidden_state[0, :-1]
    targets = tokens[1:]
    parts = []
    for x, labels in zip(states.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.lm_head(x)
        parts.append(F.cross_entropy(logits.to(_wide(logits)), labels, reduction="none"))
    return torch.cat(parts).double().cpu()


@torch.no_grad()
def choices(model: Any, tokens: Tensor) -> list[LayerDistillation]:
    """How far each sparse layer is from dense attention over a document, int64 [T]; every layer
    sees the dense model's states."""
    with distill_dense() as found:
        model.model(tokens[None].to(model.device), use_cache=False)
    return found.layers


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Span:
    """What was lost on targets with ``first`` to ``last`` tokens of their document before them."""

    first: int
    last: int
    targets: int
    loss: float


def by_position(documents: Iterable[Tensor]) -> list[Span]:
    """Mean losses in spans that double: 1, 2-3, 4-7, ...

    Args:
        documents: of each the losses that ``losses`` gives.
    """
    sums: list[float] = []
    counts: list[int] = []
    for values in documents:
        power = 0
        # Entry i is of a target with i + 1 tokens before it.
        while (begin := (1 << power) - 1) < values.numel():
            if power == len(sums):
                sums.append(0.0)
                counts.append(0)
            part = values[begin : (2 << power) - 1]
            sums[power] += float(part.sum())
            counts[power] += part.numel()
            power += 1
    return [
        Span(1 << power, (2 << power) - 1, count, total / count)
        for power, (total, count) in enumerate(zip(sums, counts, strict=True))
    ]
