"""Do the experiment of docs/results.md again: sparse and dense attention, trained on the same text.

    python launch/reproduce.py --out proof                # one GPU
    python launch/reproduce.py --out tried --tiny True    # the same steps at a toy's size, on a CPU
    python launch/reproduce.py --out small --small True   # from dense to sparse alone, on a CPU

It prepares text, trains, converts, judges, and writes the numbers to OUT/numbers, each by the
program that a user would call. What is there already is left out, and a training that was stopped
is resumed, so that the same line goes on. With several GPUs each has a model, and what can begin
begins: conversions once the dense model is trained, a judgement once its model is, speeds where a
GPU is free. Numbers are written at the end, also where ``--seconds`` are over or a program fails.
``docs/figures/draw_results.py`` draws them.

The text is what every machine with torch has: the Python sources of the standard library and of
the installed packages. A document is consecutive files of one package. Whole packages are held
apart for validation.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import csv
import hashlib
import json
import math
import os
import platform
import site
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import tyro

from launch.model import Decoder
from launch.processes.mistakes import BAD_INPUT, end, read_once
from launch.processes.stopping import STOPPED
from launch.processes.tasks import Task, do_tasks
from launch.settings import Settings, from_toml
from nsa_dist.checks import check

ROOT = Path(__file__).resolve().parents[1]
MOST, LEAST = 1 << 18, 1 << 14
"""Bytes of a document."""
VALIDATION_SHARE = 0.02
"""Of all text, in whole packages."""
VALIDATED = "validation_loss"
GRACE = 30.0
"""Seconds in which a program that is stopped can save its state."""
BYTES = 256
"""Tokens of the tokenizer."""
Step = Literal["data", "train", "convert", "evaluate", "speed", "numbers"]
TRAINED = ("train", "convert", "evaluate", "speed")
"""Steps that train models or judge them."""
Model = Literal["dense", "nsa", "hybrid"]


@dataclass(frozen=True)
class ReproduceOptions:
    """Do the experiment of docs/results.md again.

    Args:
        out: folder for everything: text, tokens, runs, what was judged, numbers.
        steps: what to do.
        models: which of the three are trained from drawn weights in "train"; dense is what is
            converted.
        tiny: a toy's sizes and a part of the text, to see on a CPU that all steps run.
        small: a small model and a part of the text, from dense to sparse alone, on a CPU.
        shorten: divides the number of training steps.
        jobs: programs at a time on a GPU in "convert" and "evaluate", whose times are not reported.
        seconds: stop after so long, with what is there by then; 0: no limit.
        program_seconds: stop each program after so long; 0: no limit.
        speed_lengths: tokens of a stream in "speed".
    """

    out: Path = Path("proof")
    steps: tuple[Step, ...] = ("data", "train", "convert", "evaluate", "speed", "numbers")
    models: tuple[Model, ...] = ("dense", "nsa", "hybrid")
    tiny: bool = False
    small: bool = False
    shorten: int = 1
    jobs: int = 4
    seconds: int = 0
    program_seconds: int = 0
    speed_lengths: tuple[int, ...] = (16384, 32768, 65536)


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        name: of its folder.
        config: of its file in ``configs``, behind "proof_".
        steps: of training.
        start: the run whose weights it begins with.
        options: what it has otherwise than that file.
    """

    name: str
    config: str
    steps: int
    start: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


TINY: Mapping[str, Any] = {
    "model.layers": 2,
    "model.hidden-size": 32,
    "attention.num-heads": 4,
    "attention.head-dim": 8,
    "attention.compress-block": 8,
    "attention.compress-stride": 4,
    "attention.select-block": 8,
    "attention.num-selected": 4,
    "attention.window": 16,
    "data.length": 256,
    "run.device": "cpu",
    "run.validation-streams": 2,
}
"""Options of every run with ``--tiny True``."""
TINY_OF = {
    "dense": {"model.mlp-hidden": 128},
    "nsa": {"model.mlp-hidden": 96},
    "hybrid": {"model.mlp-hidden": 112, "model.dense-every": 2},
    "stage1": {"model.mlp-hidden": 128},
    "distill": {"model.mlp-hidden": 128},
    "stage2": {"model.mlp-hidden": 128},
}
"""The same by config."""
SMALL: Mapping[str, Any] = {
    "model.layers": 2,
    "model.hidden-size": 128,
    "model.mlp-hidden": 384,
    "attention.num-heads": 4,
    "attention.head-dim": 32,
    "attention.compress-block": 8,
    "attention.compress-stride": 4,
    "attention.select-block": 16,
    "attention.num-selected": 6,
    "attention.window": 64,
    "data.length": 1024,
    "run.device": "cpu",
    "run.validation-streams": 16,
}
"""Options of every run with ``--small True``."""
SMALL_OF = {
    "dense": {"data.global-batch": 4, "data.micro-batch": 4, "optimizer.lr": 2e-3},
}
"""The same by config."""
JUDGED_BY_CHOICE = ("converted", "stage1", "distilled")
"""Runs between a dense model and a sparse one, of which the choice of blocks alone is judged."""
UNTRAINED = {"optimizer.lr": 1e-12}
"""What makes a step leave all weights as they are."""
AS_STAGES = {
    "data.global-batch": 1,
    "data.micro-batch": 1,
    "optimizer.lr": 3e-4,
    "optimizer.warmup-steps": 5,
    "run.validate-every": 5,
    "run.log-every": 5,
}
"""What makes a run with a config of drawn weights go on as ``proof_stage2`` does."""
GATES = {
    "start_window": (-10.0, -10.0, 10.0),
    "start_selected": (-10.0, 10.0, -10.0),
    "start_mostly_selected": (-10.0, 1.5, -1.5),
    "start_means": (-2.95, 0.0, 0.0),
}
"""First gate logits (compressed, selected, window) that are tried beside those of the configs."""


def first_runs(options: ReproduceOptions) -> list[Run]:
    """The runs that begin with drawn weights."""
    most = 400 if options.small else 600
    steps = 4 if options.tiny else max(most // options.shorten, 1)
    names = ("dense",) if options.small else options.models
    return [Run(name, name, steps) for name in names]


def conversions(options: ReproduceOptions) -> list[list[Run]]:
    """Chains of runs that begin with the dense model's weights, and see equally many tokens."""
    most = 81 if options.small else 60
    steps = 3 if options.tiny else max(most // options.shorten, 3)
    stage1 = Run("stage1", "stage1", steps // 3, "dense")
    starts = [
        [Run(name, "stage1", 1, "dense", {"attention.gate-init": gates})]
        for name, gates in GATES.items()
    ]
    return [
        [stage1, Run("stage2", "stage2", steps - steps // 3, "stage1")],
        [
            Run("distilled", "distill", steps // 3, "dense"),
            Run("distilled_all", "stage2", steps - steps // 3, "distilled"),
        ],
        [Run("at_once", "stage2", steps, "dense")],
        [Run("dense_more", "dense", steps, "dense", AS_STAGES)],
        [Run("converted", "stage1", 1, "dense", UNTRAINED)],
        *([] if options.small else starts),
    ]


def all_runs(options: ReproduceOptions) -> list[Run]:
    """The runs that are judged or that others start from, whatever is to be done now."""
    first = first_runs(replace(options, models=("dense", "nsa", "hybrid")))
    return [*first, *(run for chain in conversions(options) for run in chain)]


def speed_runs(options: ReproduceOptions) -> list[Run]:
    """A few steps of as many tokens at each length."""
    if options.small:
        return []
    lengths = (256, 512) if options.tiny else options.speed_lengths
    runs = []
    for length in lengths:
        streams = max(max(lengths) // length, 1)
        sizes = {"data.length": length, "data.global-batch": streams, "data.micro-batch": streams}
        few = {"run.validate-every": 0, "run.validation-streams": 1}
        for name in ("dense", "nsa"):
            steps = 2 if options.tiny else 40
            runs.append(Run(f"speed_{name}_{length}", name, steps, options={**sizes, **few}))
    return runs


class Experiment:
    """The steps, in the folders of one experiment."""

    def __init__(self, options: ReproduceOptions) -> None:
        self.options, self.out = options, options.out
        self.began, self.late = time.perf_counter(), list[str]()
        self.on_cpu = options.tiny or options.small
        self.gpus = [] if self.on_cpu else visible_gpus()

    def do(self) -> None:
        """The steps that were asked for.

        Raises:
            ValueError: where a program ended with an error, naming the file of what it printed;
                after all others.
        """
        try:
            if "data" in self.options.steps:
                self.say("data")
                self.prepare()
            tasks = self.tasks()
            if tasks:
                self.say(", ".join(step for step in self.options.steps if step in TRAINED))
            self.late += do_tasks(tasks, self.gpus, self.options.jobs)
        finally:
            if "numbers" in self.options.steps:
                self.write_numbers()
        self.say("done")

    def tasks(self) -> list[Task]:
        """What trains and judges models in the steps that were asked for, the most urgent first."""
        options, tasks = self.options, list[Task]()
        chains = conversions(options)
        if "train" in options.steps:
            tasks += [self.training(run, alone=True) for run in first_runs(options)]
        if "convert" in options.steps:
            # The longest chains first.
            chains.sort(key=len, reverse=True)
            tasks += [self.training(run) for chain in chains for run in chain]
        if "evaluate" in options.steps:
            coming = {task.name for task in tasks}
            known = {run.name: run for run in all_runs(options)}
            names = ["nsa", "hybrid", "stage2", "distilled_all", "at_once", *JUDGED_BY_CHOICE]
            if not options.small:
                names += ["dense", "dense_more"]
            for name in names:
                if name in coming or (name in known and (self.out / name).is_dir()):
                    act = partial(self.judge, known[name])
                    tasks.append(Task(f"judged_{name}", act, frozenset({name})))
        if "speed" in options.steps:
            tasks += [self.training(run, alone=True) for run in speed_runs(options)]
        return tasks

    def training(self, run: Run, *, alone: bool = False) -> Task:
        """What trains a run."""
        return Task(run.name, partial(self.train, run), frozenset({run.start}), alone)

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        print(f"{time.perf_counter() - self.began:7.1f} s  {text}", flush=True)

    def prepare(self) -> None:
        """Write documents, and the tokens of them."""
        text = self.out / "text"
        if not text.exists():
            write_documents(text, only_standard_library=self.on_cpu)
        for name, target, held_out in (
            ("training", "tokens", ("--held-out", "0")),
            ("validation", "tokens_validation", ()),
        ):
            if not (self.out / target / "prepared.json").exists():
                where = (str(text / name), "--out", str(self.out / target), *held_out)
                self.call(target, "prepare_data.py", *where)

    def train(self, run: Run, gpu: str) -> bool:
        """Train a run if it was not.

        Returns:
            Whether it came to its end; not where the run that it starts from did not.
        """
        if self.is_trained(run):
            return True
        starts = {other.name: other for other in all_runs(self.options)}
        if run.start and not self.is_trained(starts[run.start]):
            self.late.append(run.name)
            return False
        return self.call(run.name, "train.py", *self.command(run), gpu=gpu)

    def is_trained(self, run: Run) -> bool:
        """Whether it came to its last validation."""
        validated = {
            line["step"] for line in read_metrics(self.out / run.name) if VALIDATED in line
        }
        return run.steps in validated

    def command(self, run: Run) -> list[str]:
        """The words of a run's command line behind the program."""
        options: dict[str, Any] = {
            "data.path": self.out / "tokens",
            "data.validation-path": self.out / "tokens_validation",
            "run.folder": self.out / run.name,
            "run.start-from": self.out / run.start if run.start else "",
            "run.steps": run.steps,
        }
        if list((self.out / run.name).glob("checkpoints/step_*")):
            options |= {"run.start-from": "", "run.resume": True}
        if self.options.tiny:
            options |= {**TINY, **TINY_OF[run.config]}
        if self.options.small:
            options |= {**SMALL, **SMALL_OF.get(run.config, {})}
        options |= run.options
        values = {
            name: value if isinstance(value, tuple) else (value,) for name, value in options.items()
        }
        found = [word for name, value in values.items() for word in (f"--{name}", *map(str, value))]
        return [str(ROOT / "configs" / f"proof_{run.config}.toml"), *found]

    def judge(self, run: Run, gpu: str) -> bool:
        """Loss by position, choices, and needles, hidden in the first validation document.

        Returns:
            Whether it came to its end; not where the run did not.
        """
        if not self.is_trained(run):
            self.late.append(f"judged_{run.name}")
            return False
        lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
        few: tuple[str, ...] = ()
        kinds: tuple[str, ...] = ("loss", "choice", "needle", "multi_needle")
        if self.options.tiny:
            lengths = (256,)
            few = ("--samples", "1", "--documents", "2", "--device", "cpu")
        elif self.options.small:  # It finds no needle.
            lengths, few, kinds = (1024,), ("--documents", "16", "--device", "cpu"), ("choice",)
        target = self.out / "judged" / run.name
        own = ("choice",) if run.name in JUDGED_BY_CHOICE else kinds
        if (target / f"{own[-1]}.csv").exists():
            return True
        text = min((self.out / "text" / "validation").glob("*.txt"))
        words = (str(self.out / run.name), "--out", str(target), "--tasks", *own)
        words += ("--haystack", str(text), "--lengths", *map(str, lengths), *few)
        return self.call(f"judged_{run.name}", "evaluate.py", *words, gpu=gpu)

    def call(self, name: str, program: str, *words: str, gpu: str = "") -> bool:
        """Run a program of ``launch``; what it prints goes to a file.

        Returns:
            Whether it came to its end; not if its time was over, or all time before.

        Raises:
            ValueError: if it ends with an error.
        """
        began, log = time.perf_counter(), self.out / f"{name}.log"
        limits = [self.options.program_seconds or math.inf]
        if self.options.seconds:
            limits.append(self.began + self.options.seconds - began)
        if min(limits) <= 0:
            self.late.append(name)
            return False
        line = [sys.executable, str(ROOT / "launch" / program), *words]
        where = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                line, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **where}
            )
            try:
                status = process.wait(None if min(limits) == math.inf else min(limits))
            except subprocess.TimeoutExpired:
                self.late.append(name)
                end_in_order(process)
                return False
        check(status == 0, program, f"status {status}", f"without an error (see {log})")
        self.say(f"  {program}: {name}, {time.perf_counter() - began:.1f} s")
        return True

    def write_numbers(self) -> None:
        """What was measured, as CSV files and one of JSON, in OUT/numbers."""
        curves, validations, runs = list[Any](), list[Any](), dict[str, Any]()
        for file in sorted(self.out.glob("*/metrics.jsonl")):
            settings = from_toml(file.parent / "settings.toml")
            lines = read_metrics(file.parent)
            found = curves_of(file.parent.name, settings, lines)
            if not found[0]:
                continue  # It was stopped before its first step.
            curves += found[0]
            validations += found[1]
            runs[file.parent.name] = about_run(settings, *found)
        write_csv(self.out / "numbers" / "curves.csv", curves)
        write_csv(self.out / "numbers" / "validation.csv", validations)
        for kind in ("loss", "choice", "needle", "multi_needle"):
            rows = []
            for file in sorted(self.out.glob(f"judged/*/{kind}.csv")):
                with file.open(newline="", encoding="utf-8") as opened:
                    rows += [{"run": file.parent.name, **row} for row in csv.DictReader(opened)]
            write_csv(self.out / "numbers" / f"{kind}.csv", rows)
        folders = {"training": "tokens", "validation": "tokens_validation"}
        data = {
            name: about_data(self.out / folder)
            for name, folder in folders.items()
            if (self.out / folder / "prepared.json").exists()
        }
        about = {**about_machine(), "data": data, "runs": runs}
        path = self.out / "numbers" / "experiment.json"
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def end_in_order(process: subprocess.Popen[bytes]) -> None:
    """Stop a program whose time is over; a training saves its state."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def packages(only_standard_library: bool) -> dict[str, list[Path]]:
    """Python files of each package in order, by the package's name. A file whose text was there
    already is left out, and so are files that are larger than a document."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    folders = [standard]
    if not only_standard_library:
        paths = [*site.getsitepackages(), sysconfig.get_paths()["purelib"]]
        folders += [Path(path) for path in dict.fromkeys(paths) if Path(path).is_dir()]
    found, seen = dict[str, list[Path]](), set[bytes]()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).parts
            if "site-packages" in parts or "dist-packages" in parts or not file.is_file():
                continue
            text = file.read_bytes()
            digest = hashlib.sha256(text).digest()
            if 0 < len(text) < MOST and digest not in seen:
                seen.add(digest)
                name = parts[0] if len(parts) > 1 else f"modules of {folder.name}"
                found.setdefault(name, []).append(file)
    return found


def documents(files: Iterable[Path]) -> list[bytes]:
    """Texts of files in a row, each below its name, of ``LEAST`` to ``MOST`` bytes."""
    made, parts, size = list[bytes](), list[bytes](), 0
    for file in [*files, None]:
        text = b"" if file is None else b"# " + file.name.encode() + b"\n" + file.read_bytes()
        if file is None or size + len(text) > MOST:
            if size >= LEAST:
                made.append(b"".join(parts))
            parts, size = [], 0
        parts.append(text)
        size += len(text)
    return made


def write_documents(folder: Path, *, only_standard_library: bool) -> None:
    """Write documents into a folder's ``training`` and ``validation``; it appears when whole."""
    by_package = {name: documents(files) for name, files in packages(only_standard_library).items()}
    sizes = {name: sum(map(len, texts)) for name, texts in by_package.items() if texts}
    room, held = VALIDATION_SHARE * sum(sizes.values()), set[str]()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= room:
            held.add(name)
            room -= sizes[name]
    unfinished = folder.with_name(f"{folder.name}.partial")
    for name in sizes:
        kind = "validation" if name in held else "training"
        (unfinished / kind).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(by_package[name]):
            (unfinished / kind / f"{name.replace(' ', '_')}_{number:03}.txt").write_bytes(text)
    unfinished.replace(folder)
    print(f"{sum(sizes.values()):,} bytes; for validation {', '.join(sorted(held))}", flush=True)


Rows = list[dict[str, Any]]


def read_metrics(folder: Path) -> Rows:
    """What a run logged, line by line; without a last line that was cut off."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curves_of(
    name: str, settings: Settings, lines: Iterable[Mapping[str, Any]]
) -> tuple[Rows, Rows]:
    """Losses of a run by step, tokens and seconds, in training and in validations.

    Seconds are those of steps alone; the first step has the compilation of kernels. A run that was
    stopped and goes on compiles again, in a step that it logs alone: such a step counts as long as
    a usual one.
    """
    a_step = settings.data.global_batch * settings.data.length
    lines, each = list(lines), "time_metrics/end_to_end(s)"
    logged = [0, *(line["step"] for line in lines if "mean_loss" in line)]
    alone = {step for before, step in pairwise(logged) if before == step - 1 > 0}
    usual = [
        line[each] for line in lines if "mean_loss" in line and line["step"] not in {1, *alone}
    ]
    seconds, done, losses, validations = 0.0, 0, list[Any](), list[Any]()
    for line in lines:
        step = line["step"]
        where = {"run": name, "step": step, "tokens": step * a_step}
        if "mean_loss" in line:
            again = step in alone and usual
            took = min(line[each], statistics.median(usual)) if again else line[each]
            seconds += (step - done) * took
            done = step
            row = {**where, "seconds": round(seconds, 3), "loss": round(line["mean_loss"], 5)}
            speeds = {"tokens_per_second": round(line["tokens_per_second"])}
            share = {"mfu": round(line.get("mfu(%)", 0.0), 2)}
            losses.append({**row, **speeds, **share, "peak_memory": line["peak_memory"]})
        elif VALIDATED in line:
            loss = round(line[VALIDATED], 5)
            validations.append({**where, "seconds": round(seconds, 3), "loss": loss})
    return losses, validations


def about_run(settings: Settings, losses: Rows, validations: Rows) -> dict[str, Any]:
    """A run's size and results. The speed is that of all steps after the first logged line."""
    with torch.device("meta"):
        parameters = list(
            Decoder(replace(settings, parallel=type(settings.parallel)()), BYTES).parameters()
        )
    first, last = losses[0], losses[-1]
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "steps": last["step"],
        "tokens": last["tokens"],
        "length": settings.data.length,
        "seconds": last["seconds"],
        "first_step_seconds": first["seconds"],
        "peak_memory": last["peak_memory"],
        "validation_loss": last_validation(settings, validations),
    }
    if len(losses) > 1:
        time_of_rest = last["seconds"] - first["seconds"]
        found["tokens_per_second"] = round((last["tokens"] - first["tokens"]) / time_of_rest)
    return found


def last_validation(settings: Settings, validations: Rows) -> float | None:
    """The loss at the end of a run; None if it has not come there."""
    ended = bool(validations) and validations[-1]["step"] == settings.run.steps
    return validations[-1]["loss"] if ended else None


def about_data(folder: Path) -> dict[str, Any]:
    """How much text there is."""
    table = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    parts = [shard[part] for shard in table["shards"] for part in ("training", "held_out")]
    return {"documents": sum(x[0] for x in parts), "tokens": sum(x[1] for x in parts)}


def about_machine() -> dict[str, Any]:
    """When and where it was measured."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file with the keys of the first row as its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_options(options: ReproduceOptions) -> None:
    """Refuse numbers with which nothing can be done.

    Raises:
        ValueError: naming the option.
    """
    for option in ("shorten", "jobs"):
        check(getattr(options, option) >= 1, option, getattr(options, option), "at least 1")
    for option in ("seconds", "program_seconds"):
        check(getattr(options, option) >= 0, option, getattr(options, option), "at least 0")
    check(not (options.tiny and options.small), "small", options.small, "False with tiny")
    check(bool(options.steps), "steps", options.steps, "one or more of them")
    for length in options.speed_lengths:
        check(length >= 2, "speed_lengths", length, "at least 2")


def main(arguments: Sequence[str] | None = None) -> None:
    line = (tyro.conf.FlagConversionOff,)
    options = read_once(lambda: tyro.cli(ReproduceOptions, args=arguments, config=line))
    try:
        check_options(options)
        options.out.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(options)
        experiment.do()
    except (OSError, ValueError) as error:
        end("reproduce.py", error, BAD_INPUT)
    if experiment.late:
        names = ", ".join(experiment.late)
        print(f"reproduce.py: not done: {names}; the same line goes on", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
