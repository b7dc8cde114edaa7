"""The examples of the documents run as they stand; links lead somewhere; the figure is current."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import rank_pool
from tests.repository.figures import load_figure

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md", "launch/**/*.md")
    for path in ROOT.glob(pattern)
)
OPTIONAL = {
    "deepspeed": "deepspeed",
    "huggingface": "transformers",
    "megatron": "megatron",
    "ring": "ring_flash_attn",
    "torchtitan": "torchtitan",
}
# Megatron needs GPUs; without them its calls of torch.cuda are answered by the CPU.
WITHOUT_GPUS = "from tests.adapters.megatron import shim\n\nshim.install()\n"
# Compares what its examples return as well, on one and on two ranks.
RUN_ELSEWHERE = {"docs/adapters/huggingface.md": "tests/adapters/huggingface/test_docs.py"}


def _examples(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = {
    document: examples
    for document in DOCUMENTS
    if document not in RUN_ELSEWHERE and (examples := _examples(document))
}
# Those of a document are typed one after another; one that makes a process group is a program.
ONE_RANK = {
    document: code
    for document, examples in EXAMPLES.items()
    if (code := [example for example in examples if "init_process_group" not in example])
}
TWO_RANKS = {
    f"{document}-{number}": example
    for document, examples in EXAMPLES.items()
    for number, example in enumerate(examples, 1)
    if "init_process_group" in example
}
BY_TORCHRUN = {name for name in TWO_RANKS if name.startswith("README.md")}


def _skip_without_its_package(code: str) -> None:
    for package, module in OPTIONAL.items():
        if f"nsa_dist.adapters.{package}" in code and find_spec(module) is None:
            pytest.skip(f"needs {module}, which is not here")


def test_every_document_with_examples_is_run() -> None:
    adapters = {f"docs/adapters/{name}.md" for name in OPTIONAL}
    assert {"README.md", *adapters} <= EXAMPLES.keys() | RUN_ELSEWHERE.keys()
    assert "README.md" in ONE_RANK
    assert len(TWO_RANKS) >= 4
    for document, test in RUN_ELSEWHERE.items():
        assert len(_examples(document)) >= 3
        assert Path(document).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ONE_RANK)
def test_examples_on_one_rank(document: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in ONE_RANK[document]:
        _skip_without_its_package(code)
        exec(compile(code, f"an example of {document}", "exec"), names)


def _program(example: str) -> str:
    code = TWO_RANKS[example]
    _skip_without_its_package(code)
    megatron_on_cpus = "megatron.core" in code and not torch.cuda.is_available()
    return WITHOUT_GPUS * megatron_on_cpus + code


def run_as_rank(code: str, port: int) -> str:
    """Run a program as one that torchrun starts; what it prints."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # The program makes its own.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    job = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in job.items()}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "an example", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


@pytest.mark.parametrize("example", [x for x in TWO_RANKS if x not in BY_TORCHRUN])
def test_example_on_two_ranks(example: str) -> None:
    """Forked with its imports; each example in ranks of its own, which it changes."""
    code = _program(example)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with rank_pool() as get:
        printed = get(2).run(run_as_rank, code, port)
    assert any("loss" in text for text in printed)


@pytest.mark.parametrize(
    "example",
    [pytest.param(x, marks=() if x in BY_TORCHRUN else pytest.mark.slow) for x in TWO_RANKS],
)
def test_example_by_torchrun(example: str, tmp_path: Path) -> None:
    """In fresh processes, which have imported nothing that the example does not."""
    script = tmp_path / "two_ranks.py"
    script.write_text(_program(example), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "loss" in finished.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    # Code is no prose: a call such as f[i](x) looks like a link.
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        where = (ROOT / document).parent / target.split("#")[0]
        assert where.exists(), f"{document} links to {target}"


def test_the_site_has_every_document() -> None:
    """Also where mkdocs, which would say so, is not installed."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [name.removeprefix("docs/") for name in DOCUMENTS if name.startswith("docs/")]
    assert [page for page in pages if not re.search(rf" {page}$", site, re.MULTILINE)] == []


def test_the_figure_of_speed_is_that_of_the_measurements() -> None:
    figure = load_figure("draw_speed")
    rows = figure.measured()
    assert figure.FIGURE.read_text(encoding="utf-8") == figure.draw(rows)
    assert f"![{figure.caption(rows)}](" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_of_results_is_that_of_the_measurements() -> None:
    drawing = load_figure("draw_results")
    text = drawing.DOCUMENT.read_text(encoding="utf-8")
    if not drawing.NUMBERS.exists():
        assert "has not run on a GPU yet" in text
        assert not list(drawing.HERE.glob("trained_*"))
        return
    numbers = drawing.read_numbers()
    for name, figure in drawing.figures(numbers).items():
        assert (drawing.HERE / f"{name}.svg").read_text(encoding="utf-8") == figure
    assert drawing.document(text, drawing.tables(numbers)) == text


def test_the_tables_of_a_small_model_are_those_of_the_measurements() -> None:
    drawing = load_figure("draw_results")
    text = drawing.SMALL_DOCUMENT.read_text(encoding="utf-8")
    numbers = drawing.read_numbers(drawing.SMALL_NUMBERS)
    for name, figure in drawing.small_figures(numbers).items():
        assert (drawing.HERE / f"{name}.svg").read_text(encoding="utf-8") == figure
    assert drawing.document(text, drawing.small_tables(numbers)) == text
