"""Run Megatron-LM's own pretrain_gpt.py by layout: losses beside one GPU's, and tokens a second.

    python launch/bench/megatron_lm.py CHECKOUT
    python launch/bench/megatron_lm.py CHECKOUT --length 131072 --layers 8 --hidden 2048 \\
        --ffn 5632 --heads 32 --head-dim 128 --batch 1 --steps 8 --precisions \\
        --attentions sparse dense --layouts cp2 cp4

CHECKOUT is one of Megatron-LM; nothing of it is part of this project. The script runs with the two
lines changed that docs/adapters/megatron.md shows, on data that Megatron makes up, with its
distributed optimizer and both of its overlaps, and from weights drawn on the CPU, so that every
layout starts from the same ones.

A layout is named by its ranks: ``cp2``, ``tp2`` (with sequence parallelism), ``tp2-cp2``, ``one``;
``cp2>cp4`` saves a checkpoint in the middle and goes on at the second layout, which may be a
pipeline: ``one>pp2-vpp2`` has two stages on each of two ranks. Those that need more GPUs than there
are, are left out by name. Losses are compared step by step with one GPU's in bfloat16 and, where it
runs, in float32: the distance of one GPU's bfloat16 from float32 is the measure for that of a
layout.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import contextlib
import os
import re
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro

from launch.bench.options import check_docs, check_folder
from launch.bench.table import number, table, write_fields, write_numbers
from nsa_dist.checks import as_choice, check

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/adapters/megatron.md"
ATTENTIONS = ("sparse", "dense")
PRECISIONS = ("bfloat16", "float32")
GRACE = 10.0
"""Seconds in which torchrun is to end its ranks."""
WARM_UP = 3
"""Steps that are not timed: kernels are compiled in the first."""

COMMON = """
    --mock-data --tokenizer-type NullTokenizer --micro-batch-size 1
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --lr 1e-3 --log-interval 1 --eval-iters 0
    --eval-interval 1000 --seed 7 --transformer-impl local --attention-dropout 0 --hidden-dropout 0
    --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-create-attention-mask-in-dataloader
    --calculate-per-token-loss --distributed-timeout-minutes 2
""".split()
DRAWN_ON_CPU = "--use-cpu-initialization"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
DENSE = "--spec launch.bench.megatron_dense dense_spec".split()


class Layout(NamedTuple):
    """Ranks over which heads (tensor parallel), the sequence (context parallel) and the layers
    (pipeline parallel) are split, and the stages of a rank of the pipeline."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def flags(self) -> list[str]:
        split = ["--context-parallel-size", str(self.cp)]
        if self.tp > 1:
            split += ["--tensor-model-parallel-size", str(self.tp), "--sequence-parallel"]
        if self.pp > 1:
            split += ["--pipeline-model-parallel-size", str(self.pp)]
        if self.vpp > 1:
            split += ["--num-virtual-stages-per-pipeline-rank", str(self.vpp)]
        return split


def layout_of(name: str) -> Layout:
    """The layout with a name such as ``tp2-cp2``.

    Raises:
        ValueError: if it is no such name.
    """
    sizes = dict(re.findall(r"([a-z]+)(\d+)", name))
    known = {part: int(sizes[part]) for part in Layout._fields if part in sizes}
    spelled = "-".join(f"{part}{size}" for part, size in known.items()) or "one"
    must = "one, or of tpN, cpN, ppN, vppN in this order, joined by -; > joins two of these"
    check(name == spelled and 0 not in known.values(), "layouts", name, must)
    layout = Layout(**known)
    check(layout.vpp == 1 or layout.pp > 1, "layouts", name, "one that has ppN where it has vppN")
    return layout


class Case(NamedTuple):
    """A run of the comparison: of one part, or of two joined by a checkpoint."""

    layout: str
    attention: str
    precision: str

    @property
    def parts(self) -> list[Layout]:
        return [layout_of(part) for part in self.layout.split(">")]

    @property
    def ranks(self) -> int:
        return max(part.ranks for part in self.parts)


@dataclass(frozen=True)
class MegatronOptions:
    """Run Megatron-LM's pretrain_gpt.py by layout, and compare losses and times.

    Args:
        checkout: folder of Megatron-LM.
        layouts: to compare with one GPU: of tpN, cpN, ppN, vppN, joined by -; two joined by > are a
            run that goes on from the first one's checkpoint.
        attentions: sparse, and dense on torch's fused kernels (no tpN).
        precisions: of one GPU's runs: bfloat16, float32. Layouts run in bfloat16.
        together: start all runs at once, for their losses alone; times are left out.
        length: tokens of a sequence.
        batch: sequences of a step.
        steps: optimizer steps.
        layers: layers of the model.
        hidden: hidden size.
        ffn: hidden size of the MLPs.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: width of a head.
        vocabulary: tokens of the vocabulary.
        flags: more of Megatron's and of this attention's flags, for all runs, as
            --flags="--nsa-window 256".
        patience: seconds that a run may take.
        keep: folder, new or empty, that gets scripts, logs and checkpoints.
        csv: file to write the table to.
        docs: document that gets the table, between its marks for the file of ``csv``.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    checkout: tyro.conf.Positional[Path] = Path()
    layouts: tuple[str, ...] = ("cp2", "cp4", "tp2", "tp2-cp2", "cp2>cp4")
    attentions: tuple[str, ...] = ("sparse",)
    precisions: tuple[str, ...] = PRECISIONS
    together: bool = False
    length: int = 1024
    batch: int = 4
    steps: int = 10
    layers: int = 2
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 255
    flags: str = ""
    patience: int = 600
    keep: Path | None = None
    csv: Path | None = None
    docs: Path | None = None

    def __post_init__(self) -> None:
        # Ranks run in folders of their own.
        object.__setattr__(self, "checkout", self.checkout.resolve())
        there = (self.checkout / "pretrain_gpt.py").is_file()
        check(there, "checkout", str(self.checkout), "a folder that has pretrain_gpt.py")
        for name in self.layouts:
            parts = [layout_of(part) for part in name.split(">")]
            check(len(parts) <= 2, "layouts", name, "at most two layouts joined by >")
            check(
                parts[0].pp == 1, "layouts", name, f"one>{name}: stages draw weights of their own"
            )
            alike = parts[0].tp == 1 or not self.draws_on_gpu(name)
            must = "one that begins without tpN: Megatron draws weights by rank there from 0.19 on"
            check(alike, "layouts", name, must)
        for name in self.attentions:
            as_choice("attentions", name, ATTENTIONS)
        for name in self.precisions:
            as_choice("precisions", name, PRECISIONS)
        check(self.steps > WARM_UP, "steps", self.steps, f"at least {WARM_UP + 1}")
        empty = self.keep is None or not self.keep.exists() or not any(self.keep.iterdir())
        check(empty, "keep", str(self.keep), "a new or an empty folder")
        check_folder("csv", self.csv)
        check_docs(self.docs, self.csv)

    @property
    def model(self) -> list[str]:
        """Flags of the model and its batches."""
        sizes = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "num-query-groups": self.kv_heads,
            "kv-channels": self.head_dim,
            "vocab-size": self.vocabulary,
            "seq-length": self.length,
            "max-position-embeddings": self.length,
            "global-batch-size": self.batch,
            "train-iters": self.steps,
        }
        flags = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
        return [*COMMON, "--group-query-attention", *flags, *self.flags.split()]

    def draws_on_gpu(self, layout: str) -> bool:
        """Runs that resume use Megatron's plain optimizer, since the distributed one cannot without
        TransformerEngine or apex. From 0.19 on weights drawn on the CPU would stay there for it."""
        return ">" in layout and version(self.checkout) >= (0, 19)

    def baseline(self, case: Case, precision: str) -> Case:
        """One GPU's run from the weights that this case begins with."""
        layout = "one>one" if self.draws_on_gpu(case.layout) else "one"
        return Case(layout, case.attention, precision)


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        layout, attention, precision: what ran.
        ranks: processes.
        layers, hidden, heads, kv_heads, head_dim, length, batch: sizes, as in the options.
        flags: more of the run's flags.
        losses: of each step, joined by blanks.
        from_one: mean over the steps of |loss - one GPU's in bfloat16|, with the same attention.
        from_float32: the same distance from one GPU's losses in float32.
        step_ms: median time of a step after the first three, of the slowest rank.
        tokens_per_s: of all ranks.
        gpu, torch, megatron: the GPU's name, torch's version, the checkout's megatron-core.
    """

    layout: str
    attention: str
    precision: str
    ranks: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    batch: int
    flags: str
    losses: str
    from_one: float | None = None
    from_float32: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    gpu: str = ""
    torch: str = ""
    megatron: str = ""


def documented_changes() -> list[str]:
    """The two changes of pretrain_gpt.py that the documents show: the two lines, weight decay."""
    section = PAGE.read_text(encoding="utf-8").split("## In pretrain_gpt.py")[1].split("\n## ")[0]
    return re.findall(r"^```diff\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def changed(script: str, diffs: Sequence[str]) -> str:
    """A script after such changes.

    Raises:
        ValueError: if it does not have a line that changes, or has it twice.
    """
    for diff in diffs:
        for block in diff.strip("\n").split("\n\n"):
            lines = block.split("\n")
            before = "\n".join(x[1:] for x in lines if not x.startswith("+"))
            after = "\n".join(x[1:] for x in lines if not x.startswith("-"))
            must = f"one whose pretrain_gpt.py has once: {before}"
            check(script.count(before) == 1, "checkout", f"{script.count(before)} times", must)
            script = script.replace(before, after)
    return script


def write_script(checkout: Path, path: Path) -> None:
    """The checkout's pretrain_gpt.py with the documents' changes."""
    text = (checkout / "pretrain_gpt.py").read_text(encoding="utf-8")
    path.write_text(changed(text, documented_changes()), encoding="utf-8")


class Run:
    """A started run of a script of Megatron-LM. Its ranks write files; the words of a run that
    fails are told.

    Args:
        script: to run.
        checkout: of Megatron-LM.
        ranks: processes, of which rank r has the r-th GPU.
        flags: of the script.
        folder: of its files, new or empty.
        runner: what Python runs the script by: arguments before its name.
    """

    def __init__(
        self,
        script: Path,
        checkout: Path,
        ranks: int,
        flags: Sequence[str],
        folder: Path,
        runner: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        paths = [*map(str, (checkout, ROOT, ROOT / "kernels")), os.environ.get("PYTHONPATH", "")]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        torchrun += ["--log-dir", str(folder), "--redirects", "3"]
        with (folder / "torchrun.out").open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *torchrun, *runner, str(script), *flags],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "OMP_NUM_THREADS": "1",
                    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
                    "TORCHDYNAMO_DISABLE": "1",  # Compiling takes longer than a run.
                    "PYTHONFAULTHANDLER": "1",  # Stacks at SIGABRT.
                },
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self, patience: float) -> Log:
        """What it logged, once it has ended.

        Args:
            patience: seconds.

        Raises:
            RuntimeError: with the words of each rank, if it failed or took longer.
        """
        try:
            ended = f"ended with {self.process.wait(patience)}"
        except subprocess.TimeoutExpired:
            ended = f"still ran after {patience} s; where each rank was is at the end of its stderr"
            for rank in self._ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.end()
        said = {path: path.read_text(errors="replace") for path in self._files()}
        if self.process.returncode != 0:
            parts = [f"== {path.relative_to(self.folder)}\n{_tail(x)}" for path, x in said.items()]
            raise RuntimeError("\n".join([ended, *parts]))
        return read_log("\n".join(said.values()))

    def end(self) -> None:
        """Torchrun ends its ranks; if it does not, as where it had just started them, they are."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            for pid in (*self._ranks(), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def _ranks(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def _files(self) -> list[Path]:
        """Of torchrun, which names the rank that failed first, and of each rank."""
        return [self.folder / "torchrun.out", *sorted(self.folder.rglob("std*.log"))]


class Log(NamedTuple):
    """Losses of the steps, and their times in ms."""

    losses: list[float]
    times: list[float]


def read_log(text: str) -> Log:
    """What Megatron logs after each step of one run.

    It starts its means anew after each log but the first: what it logs second is the mean of two
    steps.
    """
    steps = re.findall(
        r"elapsed time per iteration \(ms\): ([\d.]+) .*? lm loss: ([-+.\deE]+)", text
    )
    losses = [float(loss) for _, loss in steps]
    if len(losses) > 1:
        losses[1] = 2 * losses[1] - losses[0]
    return Log(losses, [float(time) for time, _ in steps])


def _tail(text: str) -> str:
    """A rank's first error, and its last words."""
    began = text.find("Traceback (most recent call last)")
    if began < 0 or began >= len(text) - 6000:
        return text[-6000:]
    return f"{text[began : began + 4000]}\n...\n{text[max(began + 4000, len(text) - 2000) :]}"


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean of |a - b| over the steps."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def cases(options: MegatronOptions, gpus: int) -> tuple[list[Case], list[str]]:
    """The runs of a comparison, one GPU's first, and what is left out and why."""
    found: list[Case] = []
    left: list[str] = []
    for attention in options.attentions:
        split = []
        for name in options.layouts:
            case = Case(name, attention, "bfloat16")
            if case.ranks > gpus:
                left.append(f"{attention} {name}: needs {case.ranks} GPUs, found {gpus}")
            elif attention == "dense" and any(part.tp > 1 for part in case.parts):
                left.append(f"{attention} {name}: dense layers are compared without tpN")
            else:
                split.append(case)
        for precision in options.precisions:
            ones = [options.baseline(case, precision) for case in split]
            found += dict.fromkeys(ones or [Case("one", attention, precision)])
        found += split
    return found, left


class Comparison:
    """Starts the runs of a comparison.

    Args:
        folder: of scripts, logs and checkpoints.
        optimizer: flags of runs that neither save nor load.
        runner: what Python runs the scripts by (``Run``).
    """

    def __init__(
        self,
        options: MegatronOptions,
        folder: Path,
        *,
        optimizer: Sequence[str] = OPTIMIZER,
        runner: Sequence[str] = (),
    ) -> None:
        self.options, self.folder = options, folder
        self.optimizer, self.runner = optimizer, runner
        self._started: list[Run] = []
        self.sparse = folder / "pretrain_gpt.py"
        write_script(options.checkout, self.sparse)
        # Once, before runs beside each other would.
        helpers = options.checkout / "megatron/core/datasets"
        subprocess.run(["make", "-C", str(helpers)], check=True, stdout=subprocess.DEVNULL)

    def run(self, case: Case) -> Log:
        """Start a case and wait for it.

        Raises:
            RuntimeError: if a part fails, or logs other steps than it must.
        """
        log, steps = self._parts(case), self.options.steps
        if len(log.losses) != steps:
            raise RuntimeError(f"the number of steps in its logs must be {steps}, got {log.losses}")
        return log

    def _parts(self, case: Case) -> Log:
        parts = case.parts
        if len(parts) == 1:
            return self._start(case, parts[0], self.optimizer, "").wait(self.options.patience)
        half = self.options.steps // 2
        saved = str(self.folder / _name(case) / "checkpoint")
        plain = ["--ckpt-format", "torch_dist"]
        first = [*plain, "--save", saved]
        first += ["--save-interval", str(half), "--exit-interval", str(half)]
        then = [*plain, "--load", saved]
        log = self._start(case, parts[0], first, "first").wait(self.options.patience)
        rest = self._start(case, parts[1], then, "then").wait(self.options.patience)
        return Log(log.losses + rest.losses, log.times + rest.times)

    def _start(self, case: Case, layout: Layout, flags: Sequence[str], part: str) -> Run:
        sparse = case.attention == "sparse"
        script = self.sparse if sparse else self.options.checkout / "pretrain_gpt.py"
        flags = [*self.options.model, *layout.flags, *flags, *([] if sparse else DENSE)]
        if not self.options.draws_on_gpu(case.layout):
            flags.append(DRAWN_ON_CPU)
        if case.precision == "bfloat16":
            flags.append("--bf16")
        folder = self.folder / _name(case) / part
        run = Run(script, self.options.checkout, layout.ranks, flags, folder, self.runner)
        self._started.append(run)
        return run

    def close(self) -> None:
        """End the runs that have not ended."""
        for run in self._started:
            run.end()


def _name(case: Case) -> str:
    return "_".join(case).replace(">", "_then_")


def row_of(case: Case, log: Log, known: dict[Case, Log], options: MegatronOptions) -> Row:
    """A row of the table; ``known`` has one GPU's runs."""

    def distance(precision: str) -> float | None:
        other = known.get(options.baseline(case, precision))
        return None if other is None or other is log else difference(log.losses, other.losses)

    timed = not options.together and ">" not in case.layout
    step_ms = statistics.median(log.times[WARM_UP:]) if timed else None
    tokens = options.batch * options.length
    return Row(
        *case,
        case.ranks,
        options.layers,
        options.hidden,
        options.heads,
        options.kv_heads,
        options.head_dim,
        options.length,
        options.batch,
        options.flags,
        " ".join(f"{loss:.6f}" for loss in log.losses),
        distance("bfloat16"),
        distance("float32"),
        step_ms,
        tokens / step_ms * 1000 if step_ms else None,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        torch.__version__,
        ".".join(map(str, version(options.checkout))),
    )


def version(checkout: Path) -> tuple[int, ...]:
    """Of the checkout's megatron-core, as (0, 16, 1)."""
    text = (checkout / "megatron/core/package_info.py").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", text, flags=re.MULTILINE))
    return tuple(int(numbers[name]) for name in ("MAJOR", "MINOR", "PATCH"))


def compare(
    options: MegatronOptions, folder: Path, chosen: Sequence[Case]
) -> tuple[list[Row], list[str]]:
    """All rows, and messages on runs that failed. Prints each row."""
    comparison = Comparison(options, folder)
    logs: dict[Case, Log] = {}
    failed: list[str] = []

    def note(case: Case) -> None:
        try:
            logs[case] = comparison.run(case)
            print(f"{' '.join(case)}: {logs[case].losses}", flush=True)
        except RuntimeError as error:
            failed.append(f"{' '.join(case)}: {error}")

    with ThreadPoolExecutor(len(chosen) if options.together else 1) as pool:
        try:
            list(pool.map(note, chosen))
        except BaseException:  # An interrupt: threads wait for runs, and the pool for threads.
            pool.shutdown(wait=False, cancel_futures=True)
            comparison.close()
            raise
    rows = [row_of(case, logs[case], logs, options) for case in chosen if case in logs]
    return rows, failed


def markdown(rows: Sequence[Row], options: MegatronOptions) -> str:
    """The table, and what it is of."""
    first = rows[0]
    head = ["", "GPUs", "from one GPU", "from float32", "ms a step", "tokens/s", "a GPU"]
    lines = []
    for row in rows:
        name = f"{row.attention}, {row.layout}"
        cells = [
            name if row.precision == "bfloat16" else f"{name}, {row.precision}",
            f"{row.ranks}",
        ]
        cells += [f"{x:.1e}" if x is not None else "" for x in (row.from_one, row.from_float32)]
        rate = row.tokens_per_s
        cells += [number(row.step_ms)]
        cells += [f"{x:,.0f}" if x else "" for x in (rate, rate and rate / row.ranks)]
        lines.append(cells)
    what = (
        f"{first.gpu or 'CPU'}, torch {first.torch}, Megatron-LM with megatron-core "
        f"{first.megatron}; {options.layers} layers of hidden size {options.hidden}, "
        f"{options.heads} heads in {options.kv_heads} groups of width {options.head_dim}, "
        f"{options.batch} sequences of {options.length:,} tokens a step, {options.steps} steps; "
        "mean difference of losses"
    )
    return f"{what}.\n\n{table(head, lines)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(MegatronOptions, args=arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    gpus = torch.cuda.device_count()
    if not gpus:
        sys.exit("megatron_lm.py: the machine must have an NVIDIA GPU, got no CUDA device")
    chosen, left = cases(options, gpus)
    for line in left:
        print(f"left out: {line}")
    with contextlib.ExitStack() as stack:
        folder = options.keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rows, failed = compare(options, folder.resolve(), chosen)
        except ValueError as error:
            sys.exit(f"megatron_lm.py: {error}")
    if rows:
        print(f"\n{markdown(rows, options)}")
        if options.csv is not None:
            write_fields(options.csv, rows)
            if options.docs is not None:
                write_numbers(options.docs, markdown(rows, options), options.csv.name)
    if failed:
        sys.exit("megatron_lm.py: runs that failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
