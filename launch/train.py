"""Train a small language model with its sequence split over ranks.

    torchrun --nproc-per-node=2 launch/train.py configs/default.toml [--section.option value ...]

Runs on GPUs over NCCL and on CPUs over gloo, also as one process without torchrun. What spreads the
model over ranks and runs a step is an engine: FSDP2, Megatron-core or DeepSpeed, by
``parallel.engine`` (launch/engines/).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # This file's folder makes way for the packages of its checkout.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import io
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record

from launch.data.corpus import (
    Corpus,
    PackedStreams,
    Stream,
    join,
    load_corpus,
    unigram_loss,
)
from launch.data.tokenizer import Tokenizer
from launch.engines.base import Engine
from launch.engines.registry import engine_spec, make_engine
from launch.processes import mistakes
from launch.processes.ranks import Ranks, start_ranks
from launch.processes.startup import describe, join_store
from launch.processes.stopping import STOPPED, Stopping
from launch.reporting.health import Health, check_state, check_validation, finite_mean
from launch.reporting.history import History
from launch.reporting.report import Report, show_bytes
from launch.sampling import PAD_TO, sample
from launch.seeds import mix_seed
from launch.settings import OptimizerSettings, Settings, check, from_command_line
from launch.storage.checkpoint import resume, save_checkpoint
from launch.storage.folder import check_folder_options, run_folder, write_settings
from launch.storage.manifest import CheckpointError
from nsa_dist import ShardedBatch, shard_batch
from nsa_kernels import get_backend

# What layers count, and the order in which it is summed over ranks.
COMMUNICATION_KINDS = (
    *("plan", "halo", "gather", "request", "fetch"),
    *("halo_grad", "gather_grad", "fetch_grad", "ring", "ring_grad"),
)


@dataclass(frozen=True)
class Result:
    """How a run ended; the same on every rank, but for its clock.

    Args:
        losses: nats a token of each step, before its update, from the first step of this process,
            but no more than the latest ``history.KEPT``.
        grad_norms: of the same steps, the global gradient norm before clipping; not finite where
            the update was skipped.
        validation_loss: nan where the run was stopped before it.
        stopped: whether a signal ended the run before its end; all steps done are saved.
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
    stopped: bool


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``min_lr`` x ``lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * cosine)


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
    tokens, cu_seqlens, labels = stream.tokens, stream.cu_seqlens, stream.tokens
    if settings.parallel.sequence_parallel:
        # Tensor parallel ranks share each rank's tokens: one more document fills up, without
        # targets. Others are filled up by the layout, zigzag_per_document.
        lengths = -(-cu_seqlens.diff() // (2 * ranks.cp)) * 2 * ranks.cp
        fill = -int(lengths.sum()) % (2 * ranks.cp * ranks.tp)
        if fill:
            tokens = F.pad(tokens, (0, fill))
            labels = F.pad(labels, (0, fill), value=-100)
            cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + fill))
    return shard_batch(
        tokens.to(ranks.device),
        cu_seqlens=cu_seqlens,
        labels=labels.to(ranks.device),
        layout=settings.parallel.layout,
        group=ranks.cp_mesh,
    )


def train_step(
    engine: Engine,
    batches: Sequence[ShardedBatch],
    settings: Settings,
    step: int,
    ranks: Ranks,
    stopping: Stopping,
) -> torch.Tensor:
    """One update from this rank's micro-batches.

    Returns:
        float64 vector, the same on every rank and not waited for: mean loss before the update,
        global gradient norm before clipping, ranks that were asked to stop, then the bytes that all
        layers on all ranks received, by ``COMMUNICATION_KINDS``.
    """
    engine.reset_communication()
    rate = learning_rate(settings.optimizer, step, settings.run.steps)
    done = engine.step(batches, rate, mix_seed(settings.run.seed, step))
    received = engine.communication()
    local = [stopping.asked, *(received.get(kind, 0) for kind in COMMUNICATION_KINDS)]
    mean = done.loss_sum / max(done.targets, 1)
    sums = ranks.total(torch.cat((mean[None], mean.new_tensor(local))))
    return torch.cat((sums[:1], done.grad_norm.to(sums)[None], sums[1:]))


def validate(
    engine: Engine,
    streams: Sequence[Stream],
    settings: Settings,
    ranks: Ranks,
    stopping: Stopping,
) -> float | None:
    """Mean loss over the streams' targets, nats a token; replicas share the streams.

    Returns:
        None where a rank was asked to stop.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for first in range(0, len(streams), ranks.dp):
        if ranks.any(stopping.asked):
            return None
        index = first + ranks.dp_rank
        # Every replica runs every forward; one without a stream left repeats the last, uncounted.
        batch = shard_stream(streams[min(index, len(streams) - 1)], settings, ranks)
        loss = engine.loss(batch)
        if index < len(streams):
            sums += torch.stack((loss, torch.full_like(loss, batch.num_targets / ranks.replica)))
    loss_sum, targets = ranks.total(sums).tolist()
    return loss_sum / max(targets, 1.0)


def held_out_streams(corpus: Corpus, settings: Settings) -> list[Stream]:
    """The streams that validations read, spread evenly over the held-out documents."""
    packed = PackedStreams(corpus.held_out, settings.data.length, seed=None)
    count = min(settings.run.validation_streams, packed.per_epoch)
    return [packed[i * packed.per_epoch // count] for i in range(count)]


def train(settings: Settings, ranks: Ranks, stopping: Stopping | None = None) -> Result:
    """The whole run: data, model, steps, checkpoint, validation, sample. Collective."""
    started = time.perf_counter()
    check_folder_options(settings.run)
    with ranks.agreed():
        corpus = load_corpus(settings.data)
        check_prompt(settings, corpus.tokenizer)
    ranks.check_equal(
        "data.source", corpus.digest[:16], "the same documents (and Python) on every machine work"
    )
    with run_folder(settings, ranks) as folder:
        return run_steps(settings, ranks, corpus, folder, stopping or Stopping(), started)


def run_steps(
    settings: Settings,
    ranks: Ranks,
    corpus: Corpus,
    folder: Path,
    stopping: Stopping,
    started: float,
) -> Result:
    """Everything after the data, in a folder that is this run's."""
    run = settings.run
    streams = PackedStreams(corpus.training, settings.data.length, run.seed)
    held_out = held_out_streams(corpus, settings)
    unigram = unigram_loss(corpus.training, held_out, corpus.tokenizer.vocab_size)

    found = resume(folder, settings, corpus.digest) if run.resume else None
    engine = make_engine(settings, corpus.tokenizer.vocab_size, ranks)
    first_step = engine.read(found.path) if found else 0
    broken = set(found.passed_over) if found else set()
    check_state(engine.tensors(), f"that step {first_step} left", ranks)
    write_settings(folder, settings)

    spec = engine_spec(settings.parallel.engine)
    history = History()
    tokens, seconds = 0, 0.0
    with Report(settings, folder, active=ranks.is_main, first_step=first_step) as report:
        report.unit = corpus.tokenizer.unit
        if corpus.tokenizer.note:
            report.line(corpus.tokenizer.note)
        report.line(
            f"{engine.parameters:,} parameters; "
            f"{corpus.training.tokens.numel():,} {report.unit}s in "
            f"{len(corpus.training.names)} documents, {len(corpus.held_out.names)} held out; "
            f"{spec.describe(settings, ranks)} on {ranks.device.type}; "
            f"{attention_name(settings, ranks.device)} attention; {folder}"
        )
        health = Health(settings.optimizer, report)

        def save(done: int) -> None:
            check_state(engine.tensors(), f"after step {done}", ranks)
            report.sync()
            save_checkpoint(engine.write, folder, done, settings, corpus.digest, broken)

        def log_validation(done: int) -> float | None:
            loss = validate(engine, held_out, settings, ranks, stopping)
            if loss is not None:
                report.validation(done, loss, unigram)
            return loss

        def validates_after(done: int) -> bool:
            return bool(run.validate_every) and done % run.validate_every == 0 and done < run.steps

        stopping.steps_begin()
        # A run may have been stopped after a checkpoint and before the validation of its step.
        missing = first_step > 0 and not report.has_validation(first_step)
        if validates_after(first_step) and ranks.any(ranks.is_main and missing):
            health.stops = log_validation(first_step) is None
        done = logged = first_step
        mark = time.perf_counter()
        while done < run.steps and not health.stops:
            batches = list(step_batches(settings, streams, done, ranks))
            values = train_step(engine, batches, settings, done, ranks, stopping)
            history.add(values)
            done += 1
            health.add(done, values)
            saves = bool(run.checkpoint_every) and done % run.checkpoint_every == 0
            ends = done == run.steps or health.stops
            logs = done % run.log_every == 0 or done == first_step + 1
            if not (logs or saves or ends or validates_after(done)):
                continue
            # Waits for this step; `health.add` waited for the one before, and the device was busy.
            health.settle()
            history.read()
            elapsed = time.perf_counter() - mark
            new_tokens = (done - logged) * settings.data.global_batch * settings.data.length
            tokens, seconds = tokens + new_tokens, seconds + elapsed
            loss, grad_norm, _, *received = history.last
            report.step(
                {
                    "step": done,
                    "loss": loss,
                    "mean_loss": finite_mean(history.latest_losses(done - logged)),
                    "grad_norm": grad_norm,
                    "lr": learning_rate(settings.optimizer, done - 1, run.steps),
                    "tokens_per_second": new_tokens / elapsed,
                    "peak_memory": ranks.largest(peak_memory(ranks.device)),
                },
                by_kind(received),
            )
            saves = saves or done == run.steps or health.stops
            if saves:
                save(done)
            if validates_after(done) and not health.stops and log_validation(done) is None:
                # Here, and no step later: a resume does the validation of the step it starts at.
                health.stops = True
                if not saves:
                    save(done)
            mark, logged = time.perf_counter(), done

        validation, text = None, ""
        if not health.stops:
            # A run that is resumed with fewer steps is at its checkpoint's.
            validation = log_validation(done)
        if validation is not None:
            check_validation(validation, done)
            text = sample_text(engine, corpus.tokenizer, settings, ranks, stopping)
        result = Result(
            folder=folder,
            losses=tuple(history.losses),
            grad_norms=tuple(history.grad_norms),
            validation_loss=math.nan if validation is None else validation,
            unigram_loss=unigram,
            tokens_per_second=tokens / seconds if tokens else math.nan,
            received=by_kind(history.last[3:]) if history.last else {},
            seconds=time.perf_counter() - started,
            sample=text,
            stopped=ranks.any(stopping.asked) or health.stops,
        )
        summarise(result, report, run.log_every, health)
    return result


def attention_name(settings: Settings, device: torch.device) -> str:
    """The attention of the run, with the backend that computes it."""
    if settings.model.attention != "nsa":
        return settings.model.attention
    every = settings.model.dense_every
    hybrid = f", one layer in {every} dense" if every else ""
    return f"nsa ({get_backend(settings.model.backend, device).name} backend{hybrid})"


def by_kind(received: Sequence[float]) -> dict[str, int]:
    """Bytes that stand in the order of ``COMMUNICATION_KINDS``, by name."""
    return dict(zip(COMMUNICATION_KINDS, map(int, received), strict=True))


def check_prompt(settings: Settings, tokenizer: Tokenizer) -> None:
    """Refuse a prompt that the sample at the end could not continue."""
    prompt = settings.run.prompt
    if settings.run.sample_tokens:
        tokens = tokenizer.encode(prompt.encode(), "run.prompt")
        works = "text of at least one token works, or run.sample_tokens = 0"
        check(tokens.numel() > 0, "run.prompt", prompt, works)


def sample_text(
    engine: Engine, tokenizer: Tokenizer, settings: Settings, ranks: Ranks, stopping: Stopping
) -> str:
    """The prompt and what the model makes of it; collective, the same on every rank."""
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
        pad_to=math.lcm(PAD_TO, 2 * ranks.cp * ranks.tp),
        stopping=stopping,
    )
    return run.prompt + tokenizer.decode(continuation)


def peak_memory(device: torch.device) -> float:
    """Bytes: on GPUs the most that tensors took, on CPUs the process's largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def summarise(result: Result, report: Report, recent: int, health: Health) -> None:
    """Print how the run ended; its last training loss is a mean over ``recent`` steps."""
    if result.sample:
        # Escape sequences of a model's making do not reach the terminal.
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in result.sample)
        report.line(f"--- sample\n{shown}\n---")
    unit, rows = report.unit, {}
    if result.losses:
        last = result.losses[-recent:]
        mean = finite_mean(last)
        rows["training loss"] = f"{result.losses[0]:.4f} -> {mean:.4f} (last {len(last)} steps)"
    if not math.isnan(result.validation_loss):
        rows["validation loss"] = f"{result.validation_loss:.4f} nats/{unit}"
        rows["unigram loss"] = f"{result.unigram_loss:.4f} nats/{unit}, same held-out text"
    if result.losses:
        moved = [f"{kind} {show_bytes(size)}" for kind, size in result.received.items() if size]
        rows["speed"] = f"{result.tokens_per_second:,.0f} {unit}s/s"
        rows["bytes moved per step"] = ", ".join(moved) or "none"
    if health.skipped:
        which = ", also in the last step" if health.in_a_row else ""
        rows["skipped updates"] = f"{health.skipped}{which}"
    rows["seconds"] = f"{result.seconds:.1f}"
    rows["folder"] = str(result.folder)
    if result.stopped:
        rows["stopped"] = "by a signal; all steps are saved, run.resume = true goes on from there"
    report.summary(rows)


def start() -> tuple[Ranks, Settings]:
    """Join the other ranks with the command line's settings.

    Raises:
        ValueError: on every rank, for a mistake of any.
    """
    try:
        settings = from_command_line(sys.argv[1:])
    except ValueError as error:
        # May be so on one rank only, which has another file: raised there as on the others.
        join_store(describe(None, str(error)))
        raise
    return start_ranks(settings), settings


@record
def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What an encoding lacks, in a path or a sample, does not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    with Stopping() as stopping:
        try:
            ranks, settings = start()
            result = train(settings, ranks, stopping)
        except (ValueError, FloatingPointError, CheckpointError) as error:
            mistakes.end("train.py", error)
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(STOPPED if result.stopped else 0)


if __name__ == "__main__":
    main()
