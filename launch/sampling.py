"""Text from a model whose sequence is split over ranks, one full forward a token."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from launch.data.tokenizer import Tokenizer
from launch.engines.base import Engine
from launch.processes.ranks import Ranks
from launch.processes.stopping import Stopping
from launch.seeds import mix_seed
from launch.settings import Settings
from nsa_dist import shard_batch
from nsa_dist.checks import check

PAD_TO = 64
"""Default step in which lengths grow, so that few distinct plans are made."""


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: list[int],
    length: int,
    ranks: Ranks,
    *,
    layout: str,
    temperature: float,
    seed: int,
    window: int,
    pad_to: int = PAD_TO,
    stopping: Stopping | None = None,
) -> list[int]:
    """Continue ``prompt`` by ``length`` tokens; collective, the same tokens on every rank.

    No KV cache: the whole text so far runs through the sharded model for each token. Later tokens
    cannot change earlier ones, so the text is padded at its end.

    Args:
        model: maps local tokens [1, L], with ``cu_seqlens``, to local logits [1, L, vocabulary].
        window: tokens of context at most, the newest ones.
        pad_to: lengths grow in these steps.
        stopping: a rank that is asked to stop ends the text where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    was_training = model.training
    model.eval()
    for _ in range(length):
        if stopping is not None and ranks.any(stopping.asked):
            break
        context = tokens[-window:]
        padded = torch.zeros(1, -(-len(context) // pad_to) * pad_to, dtype=torch.int64)
        padded[0, : len(context)] = torch.tensor(context)
        cu_seqlens = torch.tensor([0, padded.shape[1]], dtype=torch.int32)
        batch = shard_batch(
            padded.to(ranks.device), cu_seqlens=cu_seqlens, layout=layout, group=ranks.cp_mesh
        )
        logits = batch.unshard(model(batch.tokens, cu_seqlens=batch.cu_seqlens))
        last = logits[0, len(context) - 1].double()
        # The largest is subtracted first: others may become -inf, but none becomes NaN.
        weights = ((last - last.max()) / temperature).softmax(-1).cpu()
        choice = torch.multinomial(weights, 1, generator=generator).to(ranks.device)
        # Replicas may differ in the last bits of a logit; one choice keeps them on one text.
        dist.broadcast(choice, src=0)
        tokens.append(int(choice))
    model.train(was_training)
    return tokens[len(prompt) :]


def check_prompt(settings: Settings, tokenizer: Tokenizer) -> None:
    """Refuse a prompt without a token, which could not be continued."""
    prompt = settings.run.prompt
    if settings.run.sample_tokens:
        tokens = tokenizer.encode(prompt.encode(), "run.prompt")
        must = "text of at least one token, unless run.sample_tokens = 0"
        check(tokens.numel() > 0, "run.prompt", prompt, must)


def sample_text(
    engine: Engine, tokenizer: Tokenizer, settings: Settings, ranks: Ranks, stopping: Stopping
) -> str:
    """The prompt and its continuation by the model; collective, the same on every rank."""
    run = settings.run
    if not run.sample_tokens:
        return ""
    continuation = sample(
        engine.sampler,
        tokenizer.encode(run.prompt.encode(), "run.prompt").tolist(),
        run.sample_tokens,
        ranks,
        layout=settings.parallel.layout,
        temperature=run.temperature,
        seed=mix_seed(run.seed, "sample"),
        window=settings.data.length,
        pad_to=math.lcm(PAD_TO, 2 * max(ranks.cp, settings.parallel.exact_gradients) * ranks.tp),
        stopping=stopping,
    )
    return run.prompt + tokenizer.decode(continuation)
