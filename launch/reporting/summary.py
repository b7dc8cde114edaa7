"""The result of a run, and the summary that it prints."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.reporting.health import Health, finite_mean
from launch.reporting.report import Report, show_bytes
from launch.settings import Settings
from nsa_kernels import get_backend


@dataclass(frozen=True)
class Result:
    """How a run ended; the same on every rank, but for its clock.

    Args:
        losses: nats a token of each step, before its update, from the first step of this process,
            at most the latest ``history.KEPT``.
        grad_norms: of the same steps, the global gradient norm before clipping; not finite where
            the update was skipped.
        validation_loss: nan where the run was stopped before it.
        stopped: whether a signal ended the run before its end; all steps done are saved.
        received: bytes moved in the last step by kind, over all layers and ranks.
        saving: seconds of the run in which it waited for checkpoints.
    """

    folder: Path
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    validation_loss: float
    unigram_loss: float
    tokens_per_second: float
    received: dict[str, int]
    seconds: float
    saving: float
    sample: str
    stopped: bool


def attention_name(settings: Settings, device: torch.device) -> str:
    """The attention of the run, with the backend that computes it."""
    if settings.model.attention != "nsa":
        return settings.model.attention
    every = settings.model.dense_every
    hybrid = f", one layer in {every} dense" if every else ""
    return f"nsa ({get_backend(settings.model.backend, device).name} backend{hybrid})"


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
        # Escape sequences that the model made must not reach the terminal.
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
    rows["seconds"] = f"{result.seconds:.1f}, of which checkpoints {result.saving:.1f}"
    rows["folder"] = str(result.folder)
    if result.stopped:
        rows["stopped"] = "by a signal; all steps are saved, run.resume = true goes on from there"
    report.summary(rows)
