"""The examples of the README run as they stand, and the links of the documents lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md", "launch/**/*.md")
    for path in ROOT.glob(pattern)
)


def _examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


ONE_RANK = [code for code in _examples() if "init_process_group" not in code]
OPTIONAL = {"deepspeed": "deepspeed", "huggingface": "transformers", "ring": "ring_flash_attn"}
TWO_RANKS = [code for code in _examples() if "init_process_group" in code]


def _skip_without_its_package(code: str) -> None:
    for package, module in OPTIONAL.items():
        if f"nsa_dist.adapters.{package}" in code and find_spec(module) is None:
            pytest.skip(f"needs {module}, which is not here")


def test_readme_shows_both_ways() -> None:
    assert ONE_RANK
    assert TWO_RANKS


@pytest.mark.parametrize("index", range(len(ONE_RANK)))
def test_example_on_one_rank(index: int) -> None:
    _skip_without_its_package(ONE_RANK[index])
    exec(compile(ONE_RANK[index], f"README.md, example {index}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("index", range(len(TWO_RANKS)))
def test_example_on_two_ranks(index: int, tmp_path: Path) -> None:
    _skip_without_its_package(TWO_RANKS[index])
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS[index], encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
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
