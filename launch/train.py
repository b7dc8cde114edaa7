"""Train a small language model with its sequence split over ranks.

    torchrun --nproc-per-node=2 launch/train.py configs/default.toml [--section.option value ...]

Runs on GPUs over NCCL and on CPUs over gloo, also as one process without torchrun. The loss is the
sum of all targets' cross-entropies over their number, across ranks, replicas and accumulated
micro-batches: how a batch is spread changes no gradient beyond rounding.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from checkpoint import checkpoints, load_checkpoint, save_checkpoint
from data import (
    Corpus,
    PackedStreams,
    Stream,
    Tokenizer,
    join,
    load_corpus,
    mix_seed,
    unigram_loss,
)
from model import Decoder, build_model
from nsa_dist import ShardedBatch, shard_batch
from nsa_kernels import get_backend
from ranks import Ranks, start_ranks
from report import Report, show_bytes
from sampling import sample
from settings import OptimizerSettings, Settings, check, from_command_line, to_toml

# What layers count, and the order in which it is summed over ranks.
COMMUNICATION_KINDS = (
    *("plan", "halo", "gather", "request", "fetch"),
    *("halo_grad", "gather_grad", "fetch_grad"),
)


@dataclass(frozen=True)
class Result:
    """How a run ended; the same on every rank, but for its clock.

    Args:
        losses: nats a token of each step, before its update, from the first step of this process.
        grad_norms: global gradient norm of each step, before clipping.
        received: bytes moved in the last step by kind, over all layers and ranks.
    """

    folder: Path
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    validation_loss: float
    unigram_loss: float
    tokens_per_second: float
    received: dict[str, int]
    seconds: float
    sample: str


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``min_lr`` x ``lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * cosine)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves gains, biases and positions alone."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and not name.endswith("position")]
    others = [p for name, p in named if p.ndim < 2 or name.endswith("position")]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def clip_gradients(model: nn.Module, largest: float) -> torch.Tensor:
    """Scale all gradients down to a global norm of at most ``largest`` (0: leave them).

    Returns:
        The norm before, over every shard on every rank; the same scalar on each.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    assert isinstance(norm, DTensor)
    return norm.full_tensor()


def step_batches(
    settings: Settings, streams: PackedStreams, step: int, ranks: Ranks
) -> Iterator[ShardedBatch]:
    """This rank's shards of its replica's micro-batches of one step.

    The global batch of step s is streams s * global_batch and on; replicas take equal runs of it.
    """
    share = settings.data.global_batch // ranks.dp
    first = step * settings.data.global_batch + ranks.dp_rank * share
    for index in range(first, first + share, settings.data.micro_batch):
        stream = join([streams[i] for i in range(index, index + settings.data.micro_batch)])
        yield shard_stream(stream, settings, ranks)


def shard_stream(stream: Stream, settings: Settings, ranks: Ranks) -> ShardedBatch:
    """A whole stream's part of this context-parallel rank."""
    return shard_batch(
        stream.tokens.to(ranks.device),
        cu_seqlens=stream.cu_seqlens,
        layout=settings.parallel.layout,
        group=ranks.cp_mesh,
    )


def forward_backward(
    model: nn.Module, batches: Sequence[ShardedBatch], ranks: Ranks, seed: int
) -> tuple[torch.Tensor, int]:
    """Gradients of the mean loss over every target of every rank's batches.

    Returns:
        The sum of this rank's losses (float64 scalar, nats) and the number of targets everywhere.
    """
    # Each cp rank reports its replica's whole count.
    local = torch.tensor([sum(batch.num_targets for batch in batches)])
    targets = int(ranks.total(local)) // ranks.cp
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(batches):
        # Dropout's draws follow from the seed, the step and the micro-batch alone.
        torch.manual_seed(mix_seed(seed, "micro-batch", ranks.dp_rank * len(batches) + index))
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        (loss / max(targets, 1)).backward()
        loss_sum += loss.detach()
    return loss_sum, targets


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[ShardedBatch],
    settings: Settings,
    step: int,
    ranks: Ranks,
) -> torch.Tensor:
    """One update from this rank's micro-batches.

    Returns:
        float64 vector, the same on every rank and not waited for: mean loss before the update,
        global gradient norm before clipping, then the bytes that all layers on all ranks received,
        by ``COMMUNICATION_KINDS``.
    """
    model.reset_communication()
    loss_sum, targets = forward_backward(model, batches, ranks, mix_seed(settings.run.seed, step))
    grad_norm = clip_gradients(model, settings.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()
    received = model.communication()
    local = [received.get(kind, 0) for kind in COMMUNICATION_KINDS]
    mean = loss_sum / max(targets, 1)
    sums = ranks.total(torch.cat((mean[None], mean.new_tensor(local))))
    return torch.cat((sums[:1], grad_norm.to(sums)[None], sums[1:]))


@torch.no_grad()
def validate(
    model: nn.Module, streams: Sequence[Stream], settings: Settings, ranks: Ranks
) -> float:
    """Mean loss over the streams' targets, nats a token; replicas share the streams."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    model.eval()
    for first in range(0, len(streams), ranks.dp):
        index = first + ranks.dp_rank
        # Every replica runs every forward; one without a stream left repeats the last, uncounted.
        batch = shard_stream(streams[min(index, len(streams) - 1)], settings, ranks)
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        if index < len(streams):
            sums += torch.stack((loss, torch.full_like(loss, batch.num_targets / ranks.cp)))
    model.train()
    loss_sum, targets = ranks.total(sums).tolist()
    return loss_sum / max(targets, 1.0)


def held_out_streams(corpus: Corpus, settings: Settings) -> list[Stream]:
    """The streams that validations read, spread evenly over the held-out documents."""
    packed = PackedStreams(corpus.held_out, settings.data.length, seed=None)
    count = min(settings.run.validation_streams, packed.per_epoch)
    return [packed[i * packed.per_epoch // count] for i in range(count)]


def choose_folder(settings: Settings, ranks: Ranks) -> Path:
    """The run's folder, the same on every rank.

    Raises:
        ValueError: if it holds another run's checkpoints.
    """
    fresh = f"runs/{settings.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(ranks.from_main(settings.run.folder or fresh))
    check(
        settings.run.resume or not checkpoints(folder),
        "run.folder",
        str(folder),
        "it holds checkpoints; another folder works, or run.resume = true to continue from them",
    )
    return folder


def train(settings: Settings, ranks: Ranks) -> Result:
    """The whole run: data, model, steps, validation, checkpoint, sample. Collective."""
    started = time.perf_counter()
    run = settings.run
    corpus = load_corpus(settings.data)
    ranks.check_equal(
        "data.source", corpus.digest[:16], "the same documents (and Python) on every machine work"
    )
    streams = PackedStreams(corpus.training, settings.data.length, run.seed)
    held_out = held_out_streams(corpus, settings)
    unigram = unigram_loss(corpus.training, held_out, corpus.tokenizer.vocab_size)

    model = build_model(settings, corpus.tokenizer.vocab_size, ranks)
    optimizer = make_optimizer(model, settings.optimizer)
    folder = choose_folder(settings, ranks)
    first_step = load_checkpoint(folder, model, optimizer, settings) if run.resume else 0
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.toml").write_text(to_toml(settings), encoding="utf-8")

    history: list[torch.Tensor] = []
    tokens, seconds = 0, 0.0
    with Report(settings, folder, active=ranks.is_main, first_step=first_step) as report:
        report.unit = corpus.tokenizer.unit
        report.line(
            f"{sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{corpus.training.tokens.numel():,} {report.unit}s in "
            f"{len(corpus.training.names)} documents, {len(corpus.held_out.names)} held out; "
            f"dp {ranks.dp} x cp {ranks.cp} on {ranks.device.type}; "
            f"{attention_name(settings, ranks.device)} attention; {folder}"
        )
        mark, logged = time.perf_counter(), first_step
        for step in range(first_step, run.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings.optimizer, step, run.steps)
            batches = list(step_batches(settings, streams, step, ranks))
            history.append(train_step(model, optimizer, batches, settings, step, ranks))

            done = step + 1
            goes_on = done < run.steps
            validates = goes_on and run.validate_every and done % run.validate_every == 0
            saves = goes_on and run.checkpoint_every and done % run.checkpoint_every == 0
            logs = done % run.log_every == 0 or step == first_step or not goes_on
            if not (logs or validates or saves):
                continue
            # The only wait for the device in the loop.
            recent = torch.stack(history[logged - done :]).tolist()
            new_tokens = len(recent) * settings.data.global_batch * settings.data.length
            elapsed = time.perf_counter() - mark
            tokens, seconds = tokens + new_tokens, seconds + elapsed
            loss, grad_norm, *received = recent[-1]
            report.step(
                {
                    "step": done,
                    "loss": loss,
                    "mean_loss": sum(row[0] for row in recent) / len(recent),
                    "grad_norm": grad_norm,
                    "lr": optimizer.param_groups[0]["lr"],
                    "tokens_per_second": new_tokens / elapsed,
                    "peak_memory": ranks.largest(peak_memory(ranks.device)),
                },
                by_kind(received),
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {done} is {loss}")
            if validates:
                report.validation(done, validate(model, held_out, settings, ranks), unigram)
            if saves:
                save_checkpoint(folder, done, model, optimizer, settings)
            mark, logged = time.perf_counter(), done

        validation = validate(model, held_out, settings, ranks)
        report.validation(run.steps, validation, unigram)
        if first_step < run.steps:
            save_checkpoint(folder, run.steps, model, optimizer, settings)
        text = sample_text(model, corpus.tokenizer, settings, ranks)
        rows = [row.tolist() for row in history]
        result = Result(
            folder=folder,
            losses=tuple(row[0] for row in rows),
            grad_norms=tuple(row[1] for row in rows),
            validation_loss=validation,
            unigram_loss=unigram,
            tokens_per_second=tokens / seconds if tokens else math.nan,
            received=by_kind(rows[-1][2:]) if rows else {},
            seconds=time.perf_counter() - started,
            sample=text,
        )
        summarise(result, report, run.log_every)
    return result


def attention_name(settings: Settings, device: torch.device) -> str:
    """The attention of the run, with the backend that computes it."""
    if settings.model.attention != "nsa":
        return settings.model.attention
    return f"nsa ({get_backend(settings.model.backend, device).name} backend)"


def by_kind(received: Sequence[float]) -> dict[str, int]:
    """Bytes that stand in the order of ``COMMUNICATION_KINDS``, by name."""
    return dict(zip(COMMUNICATION_KINDS, map(int, received), strict=True))


def sample_text(model: Decoder, tokenizer: Tokenizer, settings: Settings, ranks: Ranks) -> str:
    """The prompt and what the model makes of it; collective, the same on every rank."""
    run = settings.run
    if not run.sample_tokens:
        return ""
    continuation = sample(
        model,
        tokenizer.encode(run.prompt.encode(), "run.prompt").tolist(),
        run.sample_tokens,
        ranks,
        layout=settings.parallel.layout,
        temperature=run.temperature,
        seed=mix_seed(run.seed, "sample"),
        window=settings.data.length,
    )
    return run.prompt + tokenizer.decode(continuation)


def peak_memory(device: torch.device) -> float:
    """Bytes: on GPUs the most that tensors took, on CPUs the process's largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def summarise(result: Result, report: Report, recent: int) -> None:
    """Print how the run ended; its last training loss is a mean over ``recent`` steps."""
    if result.sample:
        # Escape sequences of a model's making do not reach the terminal.
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in result.sample)
        report.line(f"--- sample\n{shown}\n---")
    unit, rows = report.unit, {}
    if result.losses:
        last = result.losses[-recent:]
        mean = sum(last) / len(last)
        rows["training loss"] = f"{result.losses[0]:.4f} -> {mean:.4f} (last {len(last)} steps)"
    rows["validation loss"] = f"{result.validation_loss:.4f} nats/{unit}"
    rows["unigram loss"] = f"{result.unigram_loss:.4f} nats/{unit}, same held-out text"
    if result.losses:
        moved = [f"{kind} {show_bytes(size)}" for kind, size in result.received.items() if size]
        rows["speed"] = f"{result.tokens_per_second:,.0f} {unit}s/s"
        rows["bytes moved per step"] = ", ".join(moved) or "none"
    rows["seconds"] = f"{result.seconds:.1f}"
    rows["folder"] = str(result.folder)
    report.summary(rows)


def main() -> None:
    try:
        settings = from_command_line(sys.argv[1:])
        ranks = start_ranks(settings)
    except ValueError as error:
        sys.exit(f"train.py: {error}")
    train(settings, ranks)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
