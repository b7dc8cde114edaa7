"""Every kernel compiles for every GPU without one, within registers and shared memory.

What is compiled is in lists.py, what holds in record.py. All in processes of their own: in this one
the interpreter stands in the compiler's place.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import triton
from triton import JITFunction

from tests.ops.triton.compiled import record
from tests.ops.triton.compiled.cases import WIDTHS, Case
from tests.ops.triton.compiled.compiling import Compiled
from tests.ops.triton.compiled.launches import TARGETS, Launch, kernel_name
from tests.ops.triton.compiled.lists import Entry, of_one_gpu

ROOT = Path(__file__).resolve().parents[4]
KERNELS = ROOT / "kernels" / "nsa_kernels" / "triton"
MOST_COMPILES = 200
# The first test waits for all compiles, which take much longer where the cores are not its own.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("compiled") / "report.json"
    command = [sys.executable, "-m", "tests.ops.triton.compiled", "--short", "--workers", "2"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    run = subprocess.run(
        [*command, "--report", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert file.exists(), run.stdout + run.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", record.RULES)
def test_short_list(report: dict[str, Any], rule: str) -> None:
    pinned = record.pinned_version()
    if rule == "record" and triton.__version__ != pinned:
        pytest.skip(f"the record is of triton {pinned}, found {triton.__version__}")
    assert [text for found, text in report["defects"] if found == rule] == []


def test_short_list_has_every_kernel_for_every_gpu_and_width(report: dict[str, Any]) -> None:
    targets, widths, dtypes = defaultdict(set), defaultdict(set), defaultdict(set)
    for launch in report["launches"]:
        targets[launch["kernel"]].add(launch["target"])
        widths[launch["kernel"]].add(launch["key_width"])
        dtypes[launch["kernel"]].add(launch["dtype"])
    kernels = [
        kernel_name(path.relative_to(KERNELS).with_suffix("").parts[0], function)
        for path in KERNELS.rglob("*.py")
        for function in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.M)
    ]
    assert len(set(kernels)) == len(kernels)
    assert targets.keys() == set(kernels)
    for name in kernels:
        gpu = of_one_gpu(name)
        assert targets[name] == {f"sm_{x}" for x in ([gpu] if gpu else TARGETS)}, name
        assert widths[name] == set(WIDTHS) if gpu is None else widths[name] >= {64, 128}, name
        assert dtypes[name] == ({"fp32", "bf16", "fp16"} if gpu is None else {"bf16", "fp16"}), name
    assert report["compiles"] <= MOST_COMPILES


def test_record_names_launches_that_may_spill() -> None:
    assert [str(key) for key in record.read() if record.must_not_spill(key)] == []


@pytest.mark.parametrize(
    ("tries", "rules"), [([408], []), ([416, 408], []), ([416] * record.TRIES, ["record"])]
)
def test_spills_are_those_of_the_best_of_several_compiles(
    tries: list[int], rules: list[str]
) -> None:
    def wide() -> None: ...

    kernel = cast(JITFunction, SimpleNamespace(module="nsa_kernels.triton.banded", fn=wide))
    launch = Launch(kernel, 90, "", {}, {}, {}, {})
    entry = Entry(Case("window", "bf16", 192, 128), 0, launch)
    allowed = {record.Key.of(entry): record.Spill(408, 168, 0)}
    left = iter(tries)

    def compiled_again(launches: Sequence[Launch]) -> list[Compiled]:
        return [Compiled(next(left), 168, 0, 0, 0, False, 0, 0.0, "") for _ in launches]

    first = dict(zip([launch], compiled_again([launch]), strict=True))
    best = record.fewest_spills([entry], first, allowed, compiled_again)
    assert [defect.rule for defect in record.defects([entry], best, allowed)] == rules
    assert list(left) == []
