"""The comparison in Megatron-LM's own script, but for its runs (tests/adapters/megatron)."""

from __future__ import annotations

import csv
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("tyro")

from launch.bench import megatron_lm
from launch.bench.megatron_lm import Case, Comparison, Layout, Log, MegatronOptions, layout_of

SCRIPT = """
from gpt_builders import gpt_builder
from model_provider import model_provider

    pretrain(
        extra_args_provider=add_modelopt_args if has_nvidia_modelopt else None,
    )

if __name__ == "__main__":
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    core = folder / "megatron/core"
    (core / "datasets").mkdir(parents=True)
    (folder / "pretrain_gpt.py").write_text(SCRIPT)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = ''\n")
    (core / "datasets/Makefile").write_text("all:\n")
    return folder


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("one", (1, 1)),
        ("cp4", (1, 4)),
        ("tp2", (2, 1)),
        ("tp2-cp4", (2, 4)),
        ("pp2", (1, 1, 2)),
        ("tp2-pp4-vpp2", (2, 1, 4, 2)),
    ],
)
def test_names_of_layouts(name: str, layout: tuple[int, ...]) -> None:
    assert layout_of(name) == Layout(*layout)


def test_ranks_and_flags_of_a_pipeline() -> None:
    layout = layout_of("cp2-pp4-vpp3")
    assert layout.ranks == 8
    assert " ".join(layout.flags) == (
        "--context-parallel-size 2 --pipeline-model-parallel-size 4 "
        "--num-virtual-stages-per-pipeline-rank 3"
    )


OTHER_NAMES = ("", "cp", "2", "cp0", "cp2-", "cp2-cp4", "cp2-tp2", "ep2", "vpp2", "cp2>", "pp2")


@pytest.mark.parametrize("name", [*OTHER_NAMES, "cp2>cp4>one", "pp2>one"])
def test_other_names_are_refused(name: str, checkout: Path) -> None:
    with pytest.raises(ValueError, match=r"layouts must be .*, got"):
        MegatronOptions(checkout, layouts=(name,))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("checkout", Path("nowhere")),
        ("attentions", ("sliding",)),
        ("precisions", ("float16",)),
        ("steps", 3),
    ],
)
def test_options_are_refused_by_name(option: str, value: object, checkout: Path) -> None:
    given = {"checkout": checkout, option: value}
    with pytest.raises(ValueError, match=f"{option} must be .*, got"):
        MegatronOptions(**given)  # type: ignore[arg-type]


def test_what_needs_more_gpus_is_left_out_by_name(checkout: Path) -> None:
    options = MegatronOptions(checkout, layouts=("cp2", "cp2>cp4", "tp2"), attentions=("dense",))
    found, left = megatron_lm.cases(options, 2)
    assert found == [
        Case("one", "dense", "bfloat16"),
        Case("one", "dense", "float32"),
        Case("cp2", "dense", "bfloat16"),
    ]
    assert left == [
        "dense cp2>cp4: needs 4 GPUs, found 2",
        "dense tp2: dense layers are compared without tpN",
    ]


def test_resumed_runs_begin_with_the_weights_of_the_run_they_are_compared_with(
    checkout: Path,
) -> None:
    """From 0.19 on those are drawn on the GPU."""
    (checkout / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 0\n")
    options = MegatronOptions(checkout, layouts=("cp2", "cp2>cp4"), precisions=("bfloat16",))
    found, _ = megatron_lm.cases(options, 4)
    assert [case.layout for case in found] == ["one", "one>one", "cp2", "cp2>cp4"]
    assert [options.draws_on_gpu(case.layout) for case in found] == [False, True, False, True]
    logs = {case: Log([float(i)] * 10, [1.0] * 10) for i, case in enumerate(found)}
    rows = [megatron_lm.row_of(case, log, logs, options) for case, log in logs.items()]
    assert [row.from_one for row in rows] == [None, None, 2.0, 2.0]
    with pytest.raises(ValueError, match="layouts must be one that begins without tpN"):
        MegatronOptions(checkout, layouts=("tp2>cp2",))


def test_weights_are_drawn_where_the_optimizer_takes_them(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[list[str]] = []

    def start(script: Path, checkout: Path, ranks: int, given: list[str], *_: object) -> mock.Mock:
        flags.append(given)
        return mock.Mock(wait=lambda patience: Log([5.0] * 5, [9.0] * 5))

    monkeypatch.setattr(megatron_lm, "Run", start)
    for minor in (16, 20):
        text = f"MAJOR = 0\nMINOR = {minor}\nPATCH = 0\n"
        (checkout / "megatron/core/package_info.py").write_text(text)
        Comparison(MegatronOptions(checkout), tmp_path).run(Case("cp2>cp4", "sparse", "bfloat16"))
    assert [megatron_lm.DRAWN_ON_CPU in given for given in flags] == [True, True, False, False]
    assert not any("--use-distributed-optimizer" in given for given in flags)


def test_a_checkout_may_be_named_from_where_the_program_is_started(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks run in other folders, and import from it."""
    monkeypatch.chdir(checkout.parent)
    assert MegatronOptions(Path(checkout.name)).checkout == checkout


def test_the_script_is_changed_as_the_documents_show(checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.py"
    megatron_lm.write_script(checkout, path)
    text = path.read_text()
    assert "from nsa_dist.adapters.megatron import add_nsa_args, nsa_gpt_builder" in text
    assert "extra_args_provider=add_nsa_args," in text
    assert "training.get_standard_config_overrides = nsa_config_overrides" in text
    (checkout / "pretrain_gpt.py").write_text(text)
    with pytest.raises(ValueError, match=r"checkout must be one whose pretrain_gpt\.py has once"):
        megatron_lm.write_script(checkout, path)


def _log(*losses: float) -> str:
    return "".join(
        f" [2026-01-01] iteration {i}/ 4 | consumed samples: {i} | "
        f"elapsed time per iteration (ms): {100 + i}.5 | learning rate: 1.0E-03 | "
        f"global batch size: 4 | lm loss: {loss:.6E} | loss scale: 1.0 |\n"
        for i, loss in enumerate(losses)
    )


def test_logs_of_megatron_are_read() -> None:
    """The second is the mean of the first two."""
    log = megatron_lm.read_log("before\n" + _log(5.5, 5.25, 4.5) + "after\n")
    assert log == Log([5.5, 5.0, 4.5], [100.5, 101.5, 102.5])


def test_rows_have_distances_and_rates(checkout: Path) -> None:
    options = MegatronOptions(checkout, steps=4, length=1000, batch=2)
    one, exact, split = (Case(name, "sparse", precision) for name, precision in (
        ("one", "bfloat16"), ("one", "float32"), ("cp2", "bfloat16")
    ))  # fmt: skip
    logs = {
        one: Log([5.0, 4.0, 3.0, 2.0], [900, 9, 9, 50]),
        exact: Log([5.0, 4.0, 3.0, 2.4], [900, 9, 9, 60]),
        split: Log([5.0, 4.0, 3.4, 2.0], [900, 9, 9, 25]),
    }
    rows = [megatron_lm.row_of(case, log, logs, options) for case, log in logs.items()]
    assert [row.from_one for row in rows] == [None, pytest.approx(0.1), pytest.approx(0.1)]
    assert [row.from_float32 for row in rows] == [pytest.approx(0.1), None, pytest.approx(0.2)]
    assert [row.tokens_per_s for row in rows] == pytest.approx([40_000, 2000 / 0.06, 80_000])
    assert rows[0].megatron == "0.16.1"
    text = megatron_lm.markdown(rows, options)
    assert "| sparse, cp2 | 2 | 1.0e-01 | 2.0e-01 | 25.0 | 80,000 | 40,000 |" in text


def test_a_run_that_is_cut_short_is_told_and_the_others_are_rows(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = MegatronOptions(checkout, steps=4)
    logs = {"bfloat16": Log([5.0], [9.0]), "float32": Log([5.0] * 4, [9.0] * 4)}

    def start(self: Comparison, case: Case, *_: object) -> mock.Mock:
        return mock.Mock(wait=lambda patience: logs[case.precision])

    monkeypatch.setattr(Comparison, "_start", start)
    chosen = [Case("one", "sparse", precision) for precision in logs]
    rows, failed = megatron_lm.compare(options, tmp_path, chosen)
    assert [row.precision for row in rows] == ["float32"]
    text = "one sparse bfloat16: the number of steps in its logs must be 4, got [5.0]"
    assert failed == [text]


def test_a_run_that_fails_is_told_with_its_ranks_words(checkout: Path, tmp_path: Path) -> None:
    (checkout / "pretrain_gpt.py").write_text(f"{SCRIPT}    raise SystemExit('no data here')\n")
    options = MegatronOptions(checkout, patience=60)
    comparison = Comparison(options, tmp_path)
    (tmp_path / "pretrain_gpt.py").write_text("raise RuntimeError('no data here')\n")
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*RuntimeError: no data here"):
        comparison.run(Case("one", "sparse", "bfloat16"))


@pytest.mark.parametrize("together", [False, True])
def test_an_interrupt_ends_what_was_started(
    together: bool, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ranks would go on, and hold the GPUs."""
    options = MegatronOptions(checkout, together=together)
    started: list[megatron_lm.Run] = []

    def write_sleeper(_: Path, path: Path) -> None:
        path.write_text("import time\nopen('began', 'w').close()\ntime.sleep(300)\n")

    def interrupted(self: megatron_lm.Run, patience: float) -> Log:
        started.append(self)
        is_last = len(started) == (2 if together else 1)
        while not (self.folder / "began").exists():
            assert self.process.poll() is None
            time.sleep(0.1)
        if is_last:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return waited(self, patience)

    waited = megatron_lm.Run.wait
    monkeypatch.setattr(megatron_lm, "write_script", write_sleeper)
    monkeypatch.setattr(megatron_lm.Run, "wait", interrupted)
    chosen = [Case("one", "sparse", precision) for precision in ("bfloat16", "float32")]
    with pytest.raises(KeyboardInterrupt):
        megatron_lm.compare(options, tmp_path, chosen)
    assert len(started) == (2 if together else 1)
    assert all(run.process.poll() is not None for run in started)


LINES = {
    "one": "one GPU",
    "cp2": "CP 2",
    "cp4": "CP 4",
    "tp2": "TP 2 with sequence parallel",
    "tp2-cp2": "TP 2 with sequence parallel x CP 2",
    "cp2>cp4": "CP 2, from its checkpoint on CP 4",
    "one>pp2": "one GPU, from its checkpoint on PP 2",
    "one>pp2-vpp2": "the same, two interleaved stages a rank",
    "one>cp2-pp2": "the same, CP 2 x PP 2",
}
"""Of the page, by layout."""
COLUMNS = {"0.16.1": (1, 2), "0.20.0": (3, 4)}
"""Cells of a line of the page, by release."""


def test_the_page_shows_the_measurements_that_are_kept() -> None:
    kept = megatron_lm.ROOT / "docs/benchmarks/h200_megatron_lm.csv"
    with kept.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["precision"] == "bfloat16"]
    page = megatron_lm.PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in page if line.startswith("|")]
    lines = {line[0]: line for line in cells}
    shown = 0
    for row in rows:
        if row["tokens_per_s"]:
            told = [float(x.replace(",", "")) for x in lines[row["attention"]][1:]]
            rate = float(row["tokens_per_s"])
            assert told == pytest.approx([float(row["step_ms"]), rate, rate / 4], rel=2e-3)
            continue
        # One GPU's runs that others are compared with have a line where they are no line's twin.
        if row["layout"] == "one>one" or (
            row["layout"] == "one" and (row["layers"] == "4" or row["flags"])
        ):
            continue
        line = lines["4 experts, 2 for a token, CP 2" if row["flags"] else LINES[row["layout"]]]
        distances = row["from_one"], row["from_float32"]
        for at, distance in zip(COLUMNS[row["megatron"]], distances, strict=True):
            if distance:
                assert float(line[at]) == pytest.approx(float(distance), rel=0.05, abs=1e-16)
            else:
                assert line[at] == ""
        shown += 1
    assert shown == 2 * len(LINES) + 1
