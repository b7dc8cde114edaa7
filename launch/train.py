"""Train a small language model with its sequence split over ranks.

    torchrun --nproc-per-node=2 launch/train.py configs/default.toml [--section.option value ...]

Runs on GPUs over NCCL and on CPUs over gloo, also as one process without torchrun. What spreads the
model over ranks and runs a step is an engine: FSDP2, Megatron-core or DeepSpeed, by
``parallel.engine`` (launch/engines/).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import dataclasses
import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from launch.data.corpus import Corpus, load_corpus, load_tokenizer, unigram_loss
from launch.data.loader import Loader, StepData, host_data, shard_stream, step_batches
from launch.data.streams import Stream
from launch.engines.base import CopyingEngine, Engine
from launch.engines.registry import engine_spec, make_engine
from launch.estimating.estimates import describe_run
from launch.processes import mistakes
from launch.processes.ranks import Ranks, place_on_machine, start_ranks
from launch.processes.startup import describe, join_store
from launch.processes.stopping import STOPPED, Stopping
from launch.processes.watchdog import Watchdog
from launch.reporting.flops import Speed, StepFlops
from launch.reporting.health import Health, check_state, check_validation, finite_mean
from launch.reporting.history import COMMUNICATION_KINDS, History
from launch.reporting.profile import StepProfiler
from launch.reporting.report import Report
from launch.reporting.stragglers import OwnTime, Stragglers, hosts_of
from launch.reporting.summary import Result, attention_name, peak_memory, summarise
from launch.sampling import check_prompt, sample_text
from launch.seeds import mix_seed
from launch.settings import OptimizerSettings, Settings, from_command_line
from launch.starting import find_start
from launch.storage.background import BackgroundSaver
from launch.storage.checkpoint import Checkpoint, resume, save_checkpoint
from launch.storage.folder import check_folder_options, run_folder, write_settings
from launch.storage.manifest import CheckpointError
from nsa_dist import check_parallel

TRIES = 10
"""How often a checkpoint that could not be written is tried before the next one is due."""


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``min_lr`` x ``lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * cosine)


def train_step(
    engine: Engine,
    data: StepData,
    settings: Settings,
    step: int,
    ranks: Ranks,
    stopping: Stopping,
) -> torch.Tensor:
    """One update from this rank's micro-batches.

    Returns:
        float64 vector, the same on every rank and not waited for: mean loss before the update,
        global gradient norm before clipping, ranks that were asked to stop, the bytes that all
        layers on all ranks received, by ``COMMUNICATION_KINDS``, then the operations of all
        streams.
    """
    engine.reset_communication()
    rate = learning_rate(settings.optimizer, step, settings.run.steps)
    done = engine.step(data.batches, rate, mix_seed(settings.run.seed, step))
    received = engine.communication()
    moved = (received.get(kind, 0) for kind in COMMUNICATION_KINDS)
    local = [stopping.asked, *moved, data.flops / ranks.replica]
    mean = done.loss_sum / done.targets.clamp(min=1)
    sums = ranks.total(torch.cat((mean[None], ranks.put(local))))
    return torch.cat((sums[:1], done.grad_norm.to(sums)[None], sums[1:]))


def validate(
    engine: Engine,
    streams: Sequence[Stream],
    settings: Settings,
    ranks: Ranks,
    stopping: Stopping,
    moves: Callable[[int], None],
) -> float | None:
    """Mean loss over the streams' targets, nats a token; replicas share the streams.

    Args:
        moves: called with the number of each stream before it is read.

    Returns:
        None where a rank was asked to stop.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for first in range(0, len(streams), ranks.dp):
        if ranks.any(stopping.asked):
            return None
        index = first + ranks.dp_rank
        moves(index)
        # Every replica runs every forward; one without a stream left repeats the last, uncounted.
        batch = shard_stream(streams[min(index, len(streams) - 1)], settings, ranks)
        loss = engine.loss(batch)
        if index < len(streams):
            sums += torch.stack((loss, torch.full_like(loss, batch.num_targets / ranks.replica)))
    loss_sum, targets = ranks.total(sums).tolist()
    return loss_sum / max(targets, 1.0)


def held_out_streams(corpus: Corpus, settings: Settings) -> list[Stream]:
    """The streams that validations read, spread evenly over the held-out documents."""
    packed = corpus.held_out.streams(settings.data.length, seed=None)
    count = min(settings.run.validation_streams, packed.per_epoch)
    return [packed[i * packed.per_epoch // count] for i in range(count)]


def start_engine(
    settings: Settings, vocab_size: int, ranks: Ranks
) -> tuple[Engine, Settings, Checkpoint | None]:
    """The engine with its first weights; collective.

    Returns:
        It, the settings with the checkpoint that ``run.start_from`` names, and that checkpoint.
    """
    source = None
    if settings.run.start_from:
        settings, source = find_start(settings, vocab_size)
    return make_engine(settings, vocab_size, ranks), settings, source


class Run:
    """A run in its folder: its data, its engine, and how far it is.

    Every method is collective.

    Attributes:
        done: steps so far, with those of the runs that it continues.
        source: the checkpoint that its first weights are of, if any.
    """

    def __init__(
        self, settings: Settings, ranks: Ranks, corpus: Corpus, folder: Path, stopping: Stopping
    ) -> None:
        self.settings, self.ranks, self.stopping = settings, ranks, stopping
        self.corpus, self.folder = corpus, folder
        streams = corpus.training.streams(settings.data.length, settings.run.seed)
        self.held_out = held_out_streams(corpus, settings)
        self.unigram = unigram_loss(corpus.training, self.held_out, corpus.tokenizer.vocab_size)

        found = resume(folder, settings, corpus.digest) if settings.run.resume else None
        self.engine, self.settings, self.source = start_engine(
            settings, corpus.tokenizer.vocab_size, ranks
        )
        self.done = self.engine.read(found.path) if found else 0
        self.broken_checkpoints = set(found.passed_over) if found else set()
        check_state(self.engine.tensors(), f"that step {self.done} left", ranks)
        write_settings(folder, self.settings)

        count = StepFlops(settings, corpus.tokenizer.vocab_size).of
        self.loader = Loader(
            lambda step: host_data(self.settings, streams, step, ranks, count),
            range(self.done, settings.run.steps),
            settings.data.prefetch,
            ranks.device,
        )
        self.first_step = self.logged = self.done
        self.history = History()
        self.report = Report(settings, folder, active=ranks.is_main, first_step=self.done)
        self.report.unit = corpus.tokenizer.unit
        self.speed = Speed(settings, ranks)
        self.health = Health(settings.optimizer, self.report)
        self.own_time = OwnTime(self.engine.alone, ranks.device)
        self.stragglers = Stragglers(hosts_of(ranks), settings.run.slow_factor, self.report)
        self.profiler = StepProfiler(settings.run, folder, ranks, self.done, self.report.line)
        self.saver = BackgroundSaver(settings.run.timeout)
        self.saving = 0.0
        # The first step whose checkpoint could not be written, since one could; when to try again.
        self.unsaved_since, self.saves_again_at = -1, -1
        self.watchdog = Watchdog(folder, ranks.rank, ranks.size, settings.run.timeout)
        self.tokens, self.seconds, self.mark = 0, 0.0, 0.0

    def run(self, started: float) -> Result:
        """What is left of the run: steps, with what is due between them, and how they ended.

        Args:
            started: when the process began with the run, by ``time.perf_counter``.
        """
        with self.report, self.loader, self.watchdog, self.saver:
            self.introduce()
            self.stopping.steps_begin()
            self.catch_up()
            self.mark = time.perf_counter()
            while self.done < self.settings.run.steps and not self.health.stops:
                self.step()
                saves = self.is_checkpoint_due()
                if saves or self.is_log_due() or self.is_validation_due():
                    self.between_steps(saves)
            self.profiler.end()
            result = self.finish(started)
            summarise(result, self.report, self.settings.run.log_every, self.health)
            return result

    def introduce(self) -> None:
        """Say what is trained on what."""
        settings, report, tokenizer = self.settings, self.report, self.corpus.tokenizer
        if tokenizer.note:
            report.line(tokenizer.note)
        engine = engine_spec(settings.parallel.engine)
        training, device = self.corpus.training, self.ranks.device
        report.line(
            f"{self.engine.parameters:,} parameters; "
            f"{training.num_tokens:,} {report.unit}s in "
            f"{training.num_documents} documents, {self.corpus.held_out.num_documents} held out; "
            f"{engine.describe(settings, self.ranks)} on {device.type}; "
            f"{attention_name(settings, device)} attention; {self.folder}"
        )
        if self.source is not None:
            report.line(f"starts with the weights of step {self.source.step} of {self.source.path}")
        if settings.optimizer.train_only:
            report.line(f"trains only {' and '.join(settings.optimizer.train_only)}")
        if settings.optimizer.distill_dense:
            report.line("the loss of steps is the distance from dense attention")

    def catch_up(self) -> None:
        """Validate where the run before was stopped between a checkpoint and its validation, and
        the weights that another run left."""
        begins = self.done > 0 or self.source is not None
        missing = begins and not self.report.has_validation(self.done)
        if self.is_validation_due() and self.ranks.any(self.ranks.is_main and missing):
            self.health.stops = self.validate() is None

    def step(self) -> None:
        """One optimizer step; the device is not waited for."""
        self.watchdog.now(f"step {self.done + 1}")
        with self.profiler.step(self.done + 1):
            values = train_step(
                self.engine, next(self.loader), self.settings, self.done, self.ranks, self.stopping
            )
        self.own_time.step_ends()
        self.history.add(values)
        self.done += 1
        self.health.add(self.done, values)

    def is_checkpoint_due(self) -> bool:
        every = self.settings.run.checkpoint_every
        due = bool(every and self.done % every == 0) or self.done == self.saves_again_at
        return self.is_last_step() or due

    def is_log_due(self) -> bool:
        return self.done % self.settings.run.log_every == 0 or self.done == self.first_step + 1

    def is_validation_due(self) -> bool:
        every = self.settings.run.validate_every
        return bool(every and self.done % every == 0) and self.done < self.settings.run.steps

    def is_last_step(self) -> bool:
        return self.done == self.settings.run.steps or self.health.stops

    def between_steps(self, saves: bool) -> None:
        """Log the steps since the last time; save and validate if it is time to."""
        self.log()
        if self.settings.run.async_checkpoints and self.ranks.any(self.saver.failed):
            self.finish_saving()
        saves = saves or self.is_last_step()  # Known for this step only now.
        if saves:
            self.save()
        if self.is_validation_due() and not self.health.stops and self.validate() is None:
            # Here, and no step later: a resume does the validation of the step it starts at.
            self.health.stops = True
            if not saves or self.unsaved_since >= 0:
                self.save()
        self.mark, self.logged = time.perf_counter(), self.done

    def log(self) -> None:
        """Log the steps since the last time; waits for the device."""
        self.watchdog.now(f"step {self.done} on the device")
        # `health.add` waited for the step before, so that the device was busy.
        self.health.settle()
        self.history.read()
        elapsed, steps = time.perf_counter() - self.mark, self.done - self.logged
        tokens = steps * self.settings.data.global_batch * self.settings.data.length
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + elapsed
        loss, grad_norm = self.history.last[:2]
        of_ranks = self.ranks.of_all([peak_memory(self.ranks.device), self.own_time.median()])
        peaks, own_times = zip(*of_ranks, strict=True)
        slowest = self.stragglers.judge(self.done, own_times)
        rate = learning_rate(self.settings.optimizer, self.done - 1, self.settings.run.steps)
        self.report.step(
            {
                "step": self.done,
                "loss": loss,
                "mean_loss": finite_mean(self.history.latest_losses(steps)),
                "grad_norm": grad_norm,
                "lr": rate,
                "tokens_per_second": tokens / elapsed,
                "peak_memory": max(peaks),
                **slowest.metrics(),
                **self.speed.metrics(tokens, self.history.latest_flops(steps), elapsed, steps),
            },
            self.history.received(),
            slowest.host,
        )

    def save(self) -> None:
        """Write a checkpoint, or begin to, if the state is sound.

        Raises:
            CheckpointError: on every rank, if it cannot be written and the run ends here.
        """
        began = time.perf_counter()
        self.watchdog.now(f"the checkpoint of step {self.done}")
        check_state(self.engine.tensors(), f"after step {self.done}", self.ranks)
        self.report.sync()
        self.finish_saving()
        self.saves_again_at = -1
        in_background = self.settings.run.async_checkpoints
        engine = cast("CopyingEngine", self.engine)
        save = functools.partial(
            save_checkpoint,
            engine.copied() if in_background else engine.write,
            self.folder,
            self.done,
            self.settings,
            self.corpus.digest,
            self.broken_checkpoints,
        )
        if in_background:
            self.saver.start(save)
        else:
            try:
                save()
            except CheckpointError as error:
                if self.is_last_step():
                    raise
                self.go_on_unsaved(error)
            else:
                self.unsaved_since = -1
        self.saving += time.perf_counter() - began

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is written in the background, if there is one."""
        try:
            if self.saver.finish():
                self.unsaved_since = -1
        except CheckpointError as error:
            self.go_on_unsaved(error)

    def go_on_unsaved(self, error: CheckpointError) -> None:
        """Try again soon: what was trained since the last checkpoint is here alone, and a disk that
        is full may have room by then.

        Raises:
            CheckpointError: ``error``, once the next checkpoint is due and could not be written
                either.
        """
        every = self.settings.run.checkpoint_every
        if self.unsaved_since < 0:
            self.unsaved_since = self.done
        elif self.done - self.unsaved_since >= every and not self.is_last_step():
            raise error
        self.saves_again_at = self.done + max(every // TRIES, 1)
        self.report.not_saved(self.done, str(error), self.saves_again_at)

    def validate(self) -> float | None:
        """Validate and log it; None where a rank was asked to stop."""

        def moves(stream: int) -> None:
            self.watchdog.now(f"stream {stream} of the validation at step {self.done}")

        loss = validate(self.engine, self.held_out, self.settings, self.ranks, self.stopping, moves)
        if loss is not None:
            self.report.validation(self.done, loss, self.unigram)
        return loss

    def finish(self, started: float) -> Result:
        """Validate and sample at the end, unless the run was stopped."""
        validation, text = None, ""
        began = time.perf_counter()
        self.saver.finish()
        self.saving += time.perf_counter() - began
        if not self.health.stops:
            # A run that is resumed with fewer steps is at its checkpoint's.
            validation = self.validate()
        if validation is not None:
            check_validation(validation, self.done)
            self.watchdog.now("the sample")
            text = sample_text(
                self.engine, self.corpus.tokenizer, self.settings, self.ranks, self.stopping
            )
        return Result(
            folder=self.folder,
            losses=tuple(self.history.losses),
            grad_norms=tuple(self.history.grad_norms),
            validation_loss=math.nan if validation is None else validation,
            unigram_loss=self.unigram,
            tokens_per_second=self.tokens / self.seconds if self.tokens else math.nan,
            received=self.history.received(),
            seconds=time.perf_counter() - started,
            saving=self.saving,
            sample=text,
            stopped=self.ranks.any(self.stopping.asked) or self.health.stops,
        )


def train(settings: Settings, ranks: Ranks, stopping: Stopping | None = None) -> Result:
    """The whole run: data, model, steps, checkpoints, validations, sample. Collective."""
    started = time.perf_counter()
    check_folder_options(settings.run)
    corpus = read_corpus(settings, ranks)
    with run_folder(settings, ranks) as folder:
        return Run(settings, ranks, corpus, folder, stopping or Stopping()).run(started)


def read_corpus(settings: Settings, ranks: Ranks) -> Corpus:
    """The run's documents, the same on every rank. Collective."""
    with ranks.agreed():
        corpus = load_corpus(settings.data, place_on_machine())
        check_prompt(settings, corpus.tokenizer)
    must = "the same documents (and Python) on every machine"
    ranks.check_equal("data.source", corpus.digest[:16], must)
    return corpus


def self_check(settings: Settings, ranks: Ranks) -> bool:
    """Compare each NSA layer over its ranks with one rank's, on the run's first micro-batch.

    Rank 0 prints its group's report, and those of other groups that are wrong. Writes nothing.
    Collective.

    Returns:
        Whether all layers of all groups compute what one rank does; the same on every rank.
    """
    one_micro_batch = ranks.dp * settings.data.micro_batch
    data = dataclasses.replace(settings.data, global_batch=one_micro_batch)
    settings = dataclasses.replace(settings, data=data)
    corpus = read_corpus(settings, ranks)
    streams = corpus.training.streams(settings.data.length, settings.run.seed)
    engine, settings, _ = start_engine(settings, corpus.tokenizer.vocab_size, ranks)
    (batch,) = step_batches(settings, streams, 0, ranks)
    report = check_parallel(
        engine.sampler,
        lambda: engine.step([batch], 0.0, mix_seed(settings.run.seed, 0)),
        batch,
        rows=settings.run.self_check_rows or None,
    )
    found = [(report.ok, str(report))] * ranks.size
    dist.all_gather_object(found, found[0])
    if ranks.is_main:
        shown = [text for rank, (right, text) in enumerate(found) if rank == 0 or not right]
        print("\n".join(dict.fromkeys(shown)), flush=True)
        if settings.model.has_dense:
            print("dense layers are not compared", flush=True)
    return all(right for right, _ in found)


def dry_run(settings: Settings, ranks: Ranks) -> None:
    """Print how the run would use its ranks, and what a step costs by estimate. Trains nothing,
    reads no documents and builds no model."""
    with ranks.agreed():
        vocab_size = load_tokenizer(settings.data).vocab_size
        lines = describe_run(settings, ranks.dp, vocab_size)
    if ranks.is_main:
        engine = engine_spec(settings.parallel.engine)
        grid = f"pp {ranks.pp} x dp {ranks.dp} x cp {ranks.cp} x tp {ranks.tp}"
        print(f"{ranks.size} processes on {ranks.device.type}, {grid}, neighbours last")
        print(f"engine: {engine.describe(settings, ranks)}", *lines, sep="\n", flush=True)


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
            status = 0
            if settings.run.dry_run:
                dry_run(settings, ranks)
            elif settings.run.self_check:
                status = 0 if self_check(settings, ranks) else 1
            else:
                status = STOPPED if train(settings, ranks, stopping).stopped else 0
        except (ValueError, FloatingPointError, CheckpointError) as error:
            mistakes.end("train.py", error)
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(status)


if __name__ == "__main__":
    main()
