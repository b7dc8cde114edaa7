"""Steps of a run under torch's profiler: a trace to open, and a table of where the time goes.

On GPUs times are those of kernels, on CPUs those of the host in each range. A range that lies in
another one is not counted in that.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.bench.exposed import exposed, merged, message_of, span_of
from launch.bench.table import table
from launch.processes.ranks import Ranks
from launch.settings import RunSettings
from nsa_dist.attention import ranges

STEP = "train.step "
"""What the range of a step begins with in a trace; its number follows."""
OPTIMIZER = "Optimizer.step#"
"""What torch's own range of the optimizer begins with."""
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds a step.

    Attributes:
        total: of the whole step.
        parts: by name and pass, of the attention's operators and the optimizer, whose pass is
            ``forward``.
        running, exposed: by kind of message. On CPUs a message's time is the host's in it, which
            computes nothing meanwhile.
        rest: what else is computed; on CPUs, whatever else the host does.
        idle: in which a GPU does nothing; None on CPUs.
    """

    total: float
    parts: Mapping[tuple[str, str], float]
    running: Mapping[str, float]
    exposed: Mapping[str, float]
    rest: float
    idle: float | None

    def text(self) -> str:
        """Two tables in Markdown."""
        names = list(dict.fromkeys(name for name, _ in self.parts))
        parts = []
        for name in names:
            each = [self.parts.get((name, which), 0.0) for which in PASSES]
            parts.append([name, *map(_ms, each), self._share(sum(each))])
        parts.append(["everything else", _ms(self.rest), "", self._share(self.rest)])
        if self.idle is not None:
            parts.append(["idle", _ms(self.idle), "", self._share(self.idle)])
        kinds = [
            [kind, _ms(ms), _ms(self.exposed[kind]), self._share(self.exposed[kind])]
            for kind, ms in self.running.items()
        ]
        tables = [table(["ms a step", *PASSES, "share"], parts)]
        if kinds:
            tables.append(table(["messages, ms a step", "running", "exposed", "share"], kinds))
        return "\n\n".join(tables)

    def _share(self, ms: float) -> str:
        return f"{ms / self.total:.1%}"


def _ms(value: float) -> str:
    return f"{value:.2f}"


def step_times(events: Iterable[Mapping[str, Any]], steps: int) -> StepTimes:
    """The times of a trace of ``steps`` steps."""
    events = list(events)
    if not any(event.get("cat") == "kernel" for event in events):
        return _of_host(events, steps)
    found = exposed(events, part_of)
    parts = {_key(name): ms / steps for name, ms in found.parts.items()}
    return StepTimes(
        found.total / steps,
        parts,
        {kind: ms / steps for kind, ms in found.running.items()},
        {kind: ms / steps for kind, ms in found.exposed.items()},
        found.compute / steps - sum(parts.values()),
        found.idle / steps,
    )


def part_of(name: str) -> str | None:
    """The part of a step that a range stands for, or None."""
    if name.startswith(ranges.MARK):
        return name.removeprefix(ranges.MARK)
    return "optimizer" if name.startswith(OPTIMIZER) else None


def _key(part: str) -> tuple[str, str]:
    """A part's name in words, and its pass."""
    name = part.removesuffix(ranges.BACKWARD)
    return name.replace("_", " "), PASSES[name != part]


def _of_host(events: Iterable[Mapping[str, Any]], steps: int) -> StepTimes:
    """Of a trace without kernels: what the thread that runs the steps spends in each range."""
    of_threads: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            thread = event.get("pid"), event.get("tid")
            of_threads.setdefault(thread, []).append((*span_of(event), str(event["name"])))
    own: dict[str, float] = {}
    whole = 0.0
    for spans in of_threads.values():
        inside = merged([(start, end) for start, end, name in spans if name.startswith(STEP)])
        if not inside:
            continue  # A thread that runs no step.
        whole += sum(end - start for start, end in inside)
        for name, duration in _own_times(spans, lambda name: _place(name) is not None):
            own[name] = own.get(name, 0.0) + duration
    parts: dict[tuple[str, str], float] = {}
    messages: dict[str, float] = {}
    for name, duration in own.items():
        ms, kind, part = duration / 1e3 / steps, message_of(name), part_of(name)
        if kind is not None:
            messages[kind] = messages.get(kind, 0.0) + ms
        elif part is not None:
            parts[_key(part)] = parts.get(_key(part), 0.0) + ms
    total = whole / 1e3 / steps
    rest = total - sum(parts.values()) - sum(messages.values())
    return StepTimes(total, parts, messages, messages, rest, None)


def _place(name: str) -> str | None:
    return part_of(name) or message_of(name)


def _own_times(
    spans: Iterable[tuple[float, float, str]], counts: Callable[[str], bool]
) -> Iterator[tuple[str, float]]:
    """Each range's name, and its time without that of ranges in it; of one thread."""
    ends: list[float] = []
    opened: list[tuple[str, float]] = []
    for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not counts(name):
            continue
        while opened and ends[-1] <= start:
            ends.pop()
            yield opened.pop()
        if opened:
            outer, own = opened[-1]
            opened[-1] = outer, own - (end - start)
        ends.append(end)
        opened.append((name, end - start))
    yield from opened


class StepProfiler:
    """Records ``run.profile_steps`` steps on this rank, if it is one that does.

    Args:
        folder: of the run; its ``profile`` gets the files.
        first_step: steps that were done when this process began.
        say: prints a line; on rank 0.
    """

    def __init__(
        self,
        run: RunSettings,
        folder: Path,
        ranks: Ranks,
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._ranks, self._say = folder / "profile", ranks, say
        records = run.profile and (ranks.is_main or run.profile_ranks == "all")
        self._first = first_step + run.profile_after + 1 if records else 0
        self._prepares_at = max(self._first - 1, first_step + 1)
        self._last = self._first + run.profile_steps - 1
        self._done = 0
        self._started = False
        self._profile: torch.profiler.profile | None = None
        if self._first and self._last > run.steps:
            say(f"profile: nothing is recorded, as only {run.steps - first_step} steps are left")
            self._first = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps step ``number``, counted from 1. Where it is the last one that is recorded, the
        device is waited for, and files are written."""
        if self._first and number == self._prepares_at:
            self._prepare()
        if self._profile is None or number < self._first:
            yield
            return
        if number == self._first:
            self._start(self._profile)
        with torch.profiler.record_function(f"{STEP}{number}"):
            yield
        self._done = number
        if number == self._last:
            self.end()

    def _prepare(self) -> None:
        """Start what records: on GPUs that takes a while, in the step before the first one."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.prepare_trace()

    def _start(self, profile: torch.profiler.profile) -> None:
        self._started = True
        profile.start_trace()

    def end(self) -> None:
        """Write what was recorded, if anything was and it was not written yet."""
        if self._profile is None:
            return
        if not self._started:  # torch prepares no other one before this one has run.
            self._start(self._profile)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._profile.stop_trace()
        if not self._done:
            self._profile, self._first = None, 0
            return
        path = self._folder / f"rank_{self._ranks.rank:05d}.json.gz"
        steps = self._done - self._first + 1
        which = f"steps {self._first} to {self._done} on rank {self._ranks.rank}"
        try:
            self._folder.mkdir(exist_ok=True)
            events = _write(self._profile, path)
            times = step_times(events, steps)
            text = f"{which}: {times.total:.1f} ms a step\n\n{times.text()}\n"
            path.with_name(f"rank_{self._ranks.rank:05d}.md").write_text(text, encoding="utf-8")
            self._say(f"{text}\ntrace, for https://ui.perfetto.dev: {path}")
        except OSError as error:
            # As of other logs: a full disk ends no run.
            print(f"profile of {which}: not written: {error}", file=sys.stderr, flush=True)
        self._profile, self._first = None, 0


def _write(profile: torch.profiler.profile, path: Path) -> list[dict[str, Any]]:
    """Write a trace, compressed, and return its events."""
    plain = path.with_suffix("")
    try:
        profile.export_chrome_trace(str(plain))
        # torch would compress line by line, as much as it can: the other ranks wait for this.
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        events: list[dict[str, Any]] = json.loads(plain.read_bytes())["traceEvents"]
        return events
    finally:
        plain.unlink(missing_ok=True)
