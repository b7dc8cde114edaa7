"""Judge a trained model: what it loses by position, what it finds in long texts.

    python launch/evaluate.py CHECKPOINT --lengths 4096 16384 --out FOLDER

CHECKPOINT is a run's folder (its newest checkpoint) or one of its ``checkpoints/step_N``, of any
engine, with sparse, dense or both kinds of layers. FOLDER gets a CSV file and a picture for each
task. The model runs on one device, with a cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import csv
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from launch.data.corpus import load_corpus
from launch.data.sources import read_file
from launch.data.tokenizer import Tokenizer
from launch.evaluation import tasks
from launch.evaluation.judge import Answer, answer, by_position, choices, losses
from launch.loading import Device, Dtype, Trained, alone, check_transformers, load
from launch.processes.mistakes import BAD_INPUT, end, read_once
from launch.reporting.pictures import check_pictures, curves, heat_map
from nsa_dist.checks import check

Task = Literal[
    "loss", "choice", "needle", "multi_needle", "variables", "common_words", "frequent_words"
]
RULER = ("variables", "common_words", "frequent_words")
MOST_STREAMS = 256
"""Held-out streams among which the longest documents are looked for."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Judge a trained model.

    Args:
        checkpoint: a run's folder or its checkpoints/step_N.
        tasks: loss: by position in held-out documents; choice: share of dense attention in the
            blocks that sparse layers choose there; needle, multi_needle: a number in a long text,
            alone or among others; variables, common_words, frequent_words: RULER's tasks.
        lengths: tokens of the texts, question and answer included; a quarter of the run's
            data.length, a half and all of it when none is given.
        depths: where a needle lies, 0 for the beginning and 1 for the end.
        samples: texts of each length and depth.
        needles: in a text of multi_needle.
        documents: whose losses and choices are taken, the longest.
        text: files that are the documents instead of those the run held out.
        haystack: a text between whose lines needles and variables are hidden; else sentences that
            say nothing.
        out: folder to write to.
        seed: of all texts.
        tokenizer: of the run, where it lies elsewhere now.
        device: auto takes cuda where there is a GPU.
        dtype: of the model; auto as in training.
    """

    checkpoint: tyro.conf.Positional[Path]
    tasks: tuple[Task, ...] = (
        "loss",
        "choice",
        "needle",
        "multi_needle",
        "variables",
        "common_words",
        "frequent_words",
    )
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    needles: int = 4
    documents: int = 32
    text: tuple[Path, ...] = ()
    haystack: Path | None = None
    out: Path = Path("evaluation")
    seed: int = 0
    tokenizer: str = ""
    device: Device = "auto"
    dtype: Dtype = "auto"


def check_options(options: EvaluateOptions) -> None:
    """Refuse values with which nothing can be judged.

    Raises:
        ValueError: naming the option.
    """
    for option in ("samples", "documents"):
        check(getattr(options, option) >= 1, option, getattr(options, option), "at least 1")
    check(options.needles >= 2, "needles", options.needles, "at least 2 (needle has one)")
    check(bool(options.tasks), "tasks", options.tasks, "one or more of them")
    check(bool(options.depths), "depths", options.depths, "one or more numbers from 0 to 1")
    for depth in options.depths:
        check(0 <= depth <= 1, "depths", depth, "from 0 to 1")
    for length in options.lengths:
        check(length >= 2, "lengths", length, "at least 2")
    for path in (*options.text, *([options.haystack] if options.haystack else [])):
        check(path.is_file(), "text, haystack", str(path), "existing files")


class Judge:
    """A loaded model with what its texts are made of, and the files that are written.

    Args:
        say: takes a line of the results.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        trained: Trained,
        model: Any,
        tokenizer: Tokenizer,
        say: Callable[[str], Any],
    ) -> None:
        self.options, self.trained, self.model, self.say = options, trained, model, say
        self.tokenizer = tokenizer
        length = trained.settings.data.length
        self.lengths = options.lengths or (length // 4, length // 2, length)
        text = ""
        if options.haystack is not None:
            text = read_file(options.haystack, "haystack").decode("utf-8", "replace")
        self.sentences = tasks.filler_sentences(text)
        self.title = trained.name

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text.encode(), "a task").tolist()
        return tokens

    def ask(self, make: Callable[[random.Random], tasks.Example], name: str) -> tuple[float, float]:
        """Mean score and loss over the samples of one kind of text; NaN where it does not fit."""
        answers: list[Answer] = []
        for sample in range(self.options.samples):
            try:
                example = make(random.Random(f"{self.options.seed} {name} {sample}"))
            except tasks.TooShortError as error:
                self.say(f"{name}: left out ({error})")
                return math.nan, math.nan
            reply = self.encode(example.reply)
            answers.append(answer(self.model, example, reply, self.tokenizer.decode))
        count = len(answers)
        score, loss = sum(a.score for a in answers) / count, sum(a.loss for a in answers) / count
        self.say(f"{name}: found {score:.2f}, loss {loss:.3f} nats/{self.tokenizer.unit}")
        return score, loss

    def write(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A CSV file; numbers that are measured have six digits, and NaN is left out."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        with (self.options.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in rows:
                shown = [f"{x:.6g}" if isinstance(x, float) else x for x in row]
                writer.writerow(["" if x == "nan" else x for x in shown])

    def loss(self) -> None:
        """Losses by position: loss.csv, loss.png."""
        found = [losses(self.model, document) for document in self.documents()]
        spans = by_position(found)
        self.write(
            "loss",
            ("context_from", "context_to", "targets", "loss"),
            [(s.first, s.last, s.targets, s.loss) for s in spans],
        )
        total, count = sum(float(x.sum()) for x in found), sum(x.numel() for x in found)
        unit = self.tokenizer.unit
        self.say(
            f"loss: {total / count:.4f} nats/{unit} on {len(found)} documents, {count:,} targets"
        )
        curves(
            self.options.out / "loss.png",
            {self.title: [(s.first, s.loss) for s in spans]},
            title="Loss by position in the document",
            names=(f"{unit}s before (first of a span that doubles)", f"nats a {unit}"),
        )

    def choice(self) -> None:
        """Dense attention in the chosen blocks, by layer, the mean over documents: choice.csv."""
        layers = getattr(self.model.model, "nsa_layers", ())
        branches = self.trained.settings.attention.branches
        if not layers or "selected" not in branches:
            self.say("choice: left out (no layer selects blocks)")
            return
        found = [choices(self.model, document) for document in self.documents()]
        rows = list[tuple[Any, ...]]()
        for at, layer in enumerate(layers):
            calls = [document[at] for document in found]
            values = (
                torch.stack([getattr(call, name) for call in calls]).nanmean().item()
                for name in ("captured", "best", "choice", "output")
            )
            rows.append((layer, *values))
        self.write("choice", ("layer", "captured", "best", "choice", "output"), rows)
        captured, best = (sum(row[i] for row in rows) / len(rows) for i in (1, 2))
        self.say(
            f"choice: {captured:.3f} of dense attention is in the chosen blocks, {best:.3f} in the "
            f"best ones, on {len(found)} documents"
        )

    def documents(self) -> list[Tensor]:
        """The longest documents, int64 [T] each, cut at the longest of ``lengths``.

        Raises:
            ValueError: if there is none with a target.
        """
        longest, most = max(self.lengths), self.options.documents
        if self.options.text:
            texts = (read_file(path, "text") for path in self.options.text)
            read = [self.tokenizer.encode(text, "text").to(torch.int64) for text in texts]
            pieces = [piece for tokens in read for piece in tokens.split(longest)]
        else:
            pieces = list(self._held_out(longest))
        pieces = [piece for piece in pieces if piece.numel() > 1]
        check(bool(pieces), "text", "none", "files with documents of two tokens or more")
        return sorted(pieces, key=lambda piece: -piece.numel())[:most]

    def _held_out(self, longest: int) -> Iterator[Tensor]:
        try:
            corpus = load_corpus(self.trained.settings.data)
        except ValueError as error:
            raise ValueError(f"{error} (--text names other documents)") from None
        length = min(longest, corpus.held_out.num_tokens)
        streams = corpus.held_out.streams(length, None)
        count = min(streams.per_epoch, MOST_STREAMS)
        for i in range(count):
            stream = streams[i * streams.per_epoch // count]
            yield from stream.tokens[0].split(stream.cu_seqlens.diff().tolist())

    def needles(self, name: str, count: int) -> None:
        """Retrieval over lengths and depths: NAME.csv, NAME.png."""
        rows, scores = list[tuple[Any, ...]](), dict[tuple[float, int], float]()
        for length in self.lengths:
            for depth in self.options.depths:

                def make(
                    rng: random.Random, length: int = length, depth: float = depth
                ) -> tasks.Example:
                    return tasks.needle(
                        self.encode, length, depth, rng, count=count, sentences=self.sentences
                    )

                score, loss = self.ask(make, f"{name}, length {length:,}, depth {depth:g}")
                rows.append((length, depth, self.options.samples, score, loss))
                scores[depth, length] = score
        self.write(name, ("length", "depth", "samples", "found", "loss"), rows)
        heat_map(
            self.options.out / f"{name}.png",
            [[scores[depth, length] for length in self.lengths] for depth in self.options.depths],
            [f"{depth:g}" for depth in self.options.depths],
            [f"{length:,}" for length in self.lengths],
            title=f"{name}: found, {self.title}",
            names=("depth", f"{self.tokenizer.unit}s"),
        )

    def ruler(self, chosen: Sequence[str]) -> None:
        """RULER's tasks over lengths: ruler.csv, ruler.png."""
        rows, scores = list[tuple[Any, ...]](), list[list[float]]()
        for name in chosen:
            scores.append([])
            for length in self.lengths:

                def make(
                    rng: random.Random, name: str = name, length: int = length
                ) -> tasks.Example:
                    if name == "variables":
                        return tasks.variables(self.encode, length, rng, self.sentences)
                    if name == "common_words":
                        return tasks.common_words(self.encode, length, rng)
                    return tasks.frequent_words(self.encode, length, rng)

                score, loss = self.ask(make, f"{name}, length {length:,}")
                rows.append((name, length, self.options.samples, score, loss))
                scores[-1].append(score)
        self.write("ruler", ("task", "length", "samples", "found", "loss"), rows)
        heat_map(
            self.options.out / "ruler.png",
            scores,
            list(chosen),
            [f"{length:,}" for length in self.lengths],
            title=f"RULER's tasks: found, {self.title}",
            names=("task", f"{self.tokenizer.unit}s"),
        )


def run(options: EvaluateOptions, say: Callable[[str], Any] = print) -> None:
    """Load a model and do the tasks.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    check_options(options)
    check_pictures()
    check_transformers()
    with alone():
        trained = load(options.checkpoint)
    tokenizer = trained.tokenizer(options.tokenizer)
    model = trained.transformers(options.device, options.dtype)
    judge = Judge(options, trained, model, tokenizer, say)
    say(f"step {trained.step} of {trained.path}, {model.dtype} on {model.device.type}")
    if "loss" in options.tasks:
        judge.loss()
    if "choice" in options.tasks:
        judge.choice()
    for name, count in (("needle", 1), ("multi_needle", options.needles)):
        if name in options.tasks:
            judge.needles(name, count)
    chosen = [name for name in RULER if name in options.tasks]
    if chosen:
        judge.ruler(chosen)
    say(f"written to {options.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(EvaluateOptions, args=arguments))
    try:
        run(options, lambda line: print(line, flush=True))
    except (OSError, ValueError) as error:
        end("evaluate.py", error, BAD_INPUT)


if __name__ == "__main__":
    main()
