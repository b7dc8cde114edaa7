"""``launch/reproduce.py``, and the figures and tables that are drawn from what it writes."""

from __future__ import annotations

import csv
import json
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from launch.model import Decoder
from launch.processes.tasks import Task, do_tasks
from launch.reproduce import (
    JUDGED_BY_CHOICE,
    LEAST,
    MOST,
    Experiment,
    ReproduceOptions,
    about_run,
    check_options,
    conversions,
    curves_of,
    documents,
    first_runs,
    read_metrics,
)
from launch.settings import from_toml
from tests.launch.processes import TRAIN, started
from tests.repository.figures import load_figure

ROOT = Path(TRAIN).parents[1]
CONFIGS = ROOT / "configs"


def test_the_models_have_equally_many_weights_and_the_same_run() -> None:
    """To three thousandths; what differs is the attention, and the SwiGLU that makes up for it."""
    sizes, runs = {}, {}
    for name in ("dense", "nsa", "hybrid"):
        settings = from_toml(CONFIGS / f"proof_{name}.toml")
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Decoder(settings, 256).parameters())
        runs[name] = (settings.data, settings.optimizer, settings.rotary, settings.run.steps)
    assert len({repr(run) for run in runs.values()}) == 1
    assert max(sizes.values()) < 1.003 * min(sizes.values())
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, size in sizes.items():
        assert f"{size:,} weights (`configs/proof_{name}.toml`)" in text


def test_the_stages_see_five_per_cent_of_the_dense_tokens() -> None:
    def tokens(name: str) -> int:
        settings = from_toml(CONFIGS / f"proof_{name}.toml")
        return settings.run.steps * settings.data.global_batch * settings.data.length

    for first in ("stage1", "distill"):
        assert tokens(first) + tokens("stage2") <= 0.05 * tokens("dense")


def test_documents_are_files_in_a_row_within_their_bounds(tmp_path: Path) -> None:
    sizes = [9000, 9000, MOST - 9000, 10, 200_000, 70_000, 300]
    files = [tmp_path / f"{number}.py" for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(file.name[:1].encode() * size)
    made = documents(files)
    assert [sorted(set(re.findall(rb"# (\d)\.py\n", text))) for text in made] == [
        [b"0", b"1"],
        [b"2", b"3"],
        [b"4"],
        [b"5", b"6"],
    ]
    assert all(LEAST <= len(text) <= MOST for text in made)
    assert documents(files[:1]) == []


@pytest.mark.parametrize(
    "option, value",
    [("jobs", 0), ("shorten", 0), ("steps", ()), ("speed_lengths", (1,)), ("seconds", -1)],
)
def test_bad_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be"):
        check_options(ReproduceOptions(**{option: value}))


def test_one_size_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"^small must be False with tiny"):
        check_options(ReproduceOptions(tiny=True, small=True))


def test_programs_are_stopped_in_time_and_their_errors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    for name, text in {
        "sleeps": "import time; time.sleep(60)",
        "fails": "print('a reason'); raise SystemExit(3)",
        "ends": "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])",
    }.items():
        (tmp_path / "launch" / f"{name}.py").write_text(text)
    monkeypatch.setattr("launch.reproduce.ROOT", tmp_path)
    experiment = Experiment(ReproduceOptions(out=tmp_path, tiny=True, program_seconds=2))
    assert not experiment.call("one", "sleeps.py")
    with pytest.raises(ValueError, match=r"^fails\.py must be without an error \(see .*two\.log"):
        experiment.call("two", "fails.py")
    assert "a reason" in (tmp_path / "two.log").read_text()
    assert experiment.call("three", "ends.py", gpu="5")
    assert (tmp_path / "three.log").read_text() == "5\n"
    over = Experiment(ReproduceOptions(out=tmp_path, tiny=True, seconds=1))
    over.began -= 1
    assert not over.call("four", "ends.py")
    assert (experiment.late, over.late) == (["one"], ["four"])


def test_each_gpu_has_so_many_tasks_at_a_time_or_one_alone() -> None:
    now, most, alone = Counter[str](), Counter[str](), list[bool]()
    lock = threading.Lock()

    def act(gpu: str, timed: bool) -> bool:
        with lock:
            now[gpu] += 1
            most[gpu] = max(most[gpu], now[gpu])
            if timed:
                alone.append(now[gpu] == 1)
        time.sleep(0.05)
        with lock:
            alone.extend([now[gpu] == 1] * timed)
            now[gpu] -= 1
        return True

    tasks = [
        Task(f"{number}", partial(act, timed=number > 8), alone=number > 8) for number in range(12)
    ]
    assert do_tasks(tasks, ["0", "1"], 2) == []
    assert most == {"0": 2, "1": 2} and alone == [True] * 6
    most.clear()
    assert do_tasks([replace(task, alone=True) for task in tasks[:3]], [], 4) == []
    assert most == {"": 1}


def test_tasks_begin_once_those_before_them_came_to_their_end() -> None:
    done = list[str]()
    last = threading.Event()

    def act(gpu: str, name: str) -> bool:
        if name == "slow":  # Others go on meanwhile.
            assert last.wait(10)
        done.append(name)
        if name == "after_dense":
            last.set()
        if name == "fails":
            raise ValueError("a reason")
        return name != "cut_short"

    def task(name: str, *after: str) -> Task:
        return Task(name, partial(act, name=name), frozenset(after))

    tasks = [
        task("slow"),
        task("cut_short"),
        task("never", "cut_short"),
        task("never_either", "never"),
        task("dense"),
        task("after_dense", "dense", "is_not_to_be_done"),
    ]
    assert do_tasks(tasks, ["0"], 2) == ["never", "never_either"]
    assert done == ["cut_short", "dense", "after_dense", "slow"]
    last.clear()
    with pytest.raises(ValueError, match=r"^a reason$"):
        do_tasks([task("fails"), task("not", "fails"), *tasks], ["0"], 2)
    assert done[4:] == ["fails", "cut_short", "dense", "after_dense", "slow"]


def test_with_four_gpus_nothing_waits_that_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions begin beside NSA's training; the free GPU takes a speed; timed runs are alone."""
    seconds = {"nsa": 0.6, "hybrid": 0.6, "dense": 0.3}
    began, ended, places = dict[str, float](), dict[str, float](), dict[str, str]()

    def call(self: Experiment, name: str, program: str, *words: str, gpu: str = "") -> bool:
        began[name], places[name] = time.perf_counter(), gpu
        time.sleep(seconds.get(name, 0.05))
        ended[name] = time.perf_counter()
        run = self.out / name
        if program == "train.py":
            run.mkdir()
            steps = int(words[words.index("--run.steps") + 1])
            line = json.dumps({"step": steps, "validation_loss": 1.0})
            (run / "metrics.jsonl").write_text(f"{line}\n")
        return True

    monkeypatch.setattr("launch.reproduce.visible_gpus", lambda: list("0123"))
    monkeypatch.setattr(Experiment, "call", call)
    (tmp_path / "text" / "validation").mkdir(parents=True)
    (tmp_path / "text" / "validation" / "a.txt").touch()
    steps = ("train", "convert", "evaluate", "speed")
    experiment = Experiment(ReproduceOptions(out=tmp_path, steps=steps, speed_lengths=(65536,)))
    experiment.do()
    assert not experiment.late
    assert {places[name] for name in ("dense", "nsa", "hybrid")} == {"0", "1", "2"}
    assert places["speed_dense_65536"] == places["speed_nsa_65536"] == "3"
    assert ended["dense"] < began["stage1"] < ended["stage1"] < began["stage2"]
    assert max(ended[name] for name in ("stage2", "judged_dense", "judged_stage2")) < ended["nsa"]
    assert ended["nsa"] < began["judged_nsa"]
    for timed in ("dense", "nsa", "hybrid", "speed_dense_65536", "speed_nsa_65536"):
        for other in began:
            if other != timed and places[other] == places[timed]:
                assert ended[other] <= began[timed] or ended[timed] <= began[other]


def test_nothing_starts_from_or_judges_a_model_whose_training_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ReproduceOptions(out=tmp_path, tiny=True, steps=("convert", "evaluate"))
    called = list[str]()
    monkeypatch.setattr(Experiment, "call", lambda self, name, *words, gpu="": called.append(name))
    dense, *_ = first_runs(options)
    (tmp_path / "dense" / "checkpoints" / "step_00000002").mkdir(parents=True)
    metrics = tmp_path / "dense" / "metrics.jsonl"
    metrics.write_text('{"step": 2, "validation_loss": 1.0}\n')
    experiment = Experiment(options)
    experiment.do()
    assert called == []
    chains = {run.name for chain in conversions(options) for run in chain}
    judged = {"stage2", "distilled_all", "at_once", "dense", "dense_more", *JUDGED_BY_CHOICE}
    assert set(experiment.late) == chains | {f"judged_{name}" for name in judged}
    with metrics.open("a") as file:
        print(json.dumps({"step": dense.steps, "validation_loss": 1.0}), file=file)
    (tmp_path / "text" / "validation").mkdir(parents=True)
    (tmp_path / "text" / "validation" / "a.txt").touch()
    Experiment(options).do()
    assert {"stage1", "at_once", "judged_dense"} <= set(called)
    assert "stage2" not in called  # Its first stage did not come to its end.


def test_a_resumed_run_is_not_charged_with_its_second_compilation(tmp_path: Path) -> None:
    """Nor does a line end the experiment that a kill cut off."""

    def line(step: int, seconds: float) -> str:
        values = {"mean_loss": 1.0, "tokens_per_second": 1.0, "peak_memory": 1}
        return json.dumps({"step": step, "time_metrics/end_to_end(s)": seconds, **values})

    settings = from_toml(CONFIGS / "proof_dense.toml")
    lines = [(1, 50.0), (10, 0.2), (14, 0.2), (15, 40.0), (20, 0.2), (30, 0.3)]
    text = "".join(f"{line(*each)}\n" for each in lines)
    (tmp_path / "metrics.jsonl").write_text(text + line(40, 0.2)[:20])
    losses, _ = curves_of("dense", settings, read_metrics(tmp_path))
    seconds = [50.0, 51.8, 52.6, 52.8, 53.8, 56.8]
    assert [row["seconds"] for row in losses] == pytest.approx(seconds)
    tokens = 29 * settings.data.global_batch * settings.data.length
    about = about_run(settings, losses, [])
    assert about["tokens_per_second"] == pytest.approx(tokens / 6.8, abs=1)


def test_a_stopped_training_is_resumed(tmp_path: Path) -> None:
    options = ReproduceOptions(out=tmp_path, tiny=True)
    experiment = Experiment(options)
    (stage, _), *_ = conversions(options)
    begins = experiment.command(stage)
    assert str(tmp_path / "dense") in begins and "--run.resume" not in begins
    (tmp_path / "stage1" / "checkpoints" / "step_00000000").mkdir(parents=True)
    again = experiment.command(stage)
    assert str(tmp_path / "dense") not in again and "--run.resume" in again
    metrics = tmp_path / "stage1" / "metrics.jsonl"
    for step in (0, stage.steps):
        assert not experiment.is_trained(stage)
        metrics.write_text(json.dumps({"step": step, "validation_loss": 1.0}) + "\n")
    assert experiment.is_trained(stage)


@pytest.mark.slow
def test_all_steps_at_a_toys_size_and_their_figures(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "launch" / "reproduce.py"), "--out", "tried"]
    for _ in range(2):  # The second time everything is there.
        with started([*line, "--tiny", "True"], tmp_path, "reproduce") as process:
            assert process.wait() == 0, process.text
    assert "train.py" not in process.text and "not done" not in process.text
    numbers = tmp_path / "tried" / "numbers"
    about = json.loads((numbers / "experiment.json").read_text())
    stage = about["runs"]["stage1"]
    assert 0 < stage["trained_parameters"] < stage["parameters"]
    assert about["runs"]["stage2"]["trained_parameters"] == stage["parameters"]
    with (numbers / "needle.csv").open(newline="") as file:
        judged = {row["run"] for row in csv.DictReader(file)}
    sparse = {"nsa", "hybrid", "stage2", "distilled_all", "at_once"}
    assert judged == sparse | {"dense", "dense_more"}
    with (numbers / "choice.csv").open(newline="") as file:
        chosen = {row["run"] for row in csv.DictReader(file)}
    assert chosen == sparse | {"converted", "stage1", "distilled"}

    drawing = load_figure("draw_results")
    found = drawing.read_numbers(numbers)
    for text in drawing.figures(found).values():
        assert ElementTree.fromstring(text).tag.endswith("svg")
    page = drawing.DOCUMENT.read_text(encoding="utf-8")
    written = drawing.document(page, drawing.tables(found))
    assert "| dense | 47,296 |" in written
    assert "| as converted: compressors are means |" in written
    assert drawing.document(written, drawing.tables(found)) == written
