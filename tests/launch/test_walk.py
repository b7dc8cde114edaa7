"""The README's way from a folder of text to a model that others load, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADING = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import nsa_dist.adapters.huggingface
model = AutoModelForCausalLM.from_pretrained("my_model")
tokenizer = AutoTokenizer.from_pretrained("my_model")
batch = tokenizer("import ", return_tensors="pt")
print(repr(tokenizer.decode(model.generate(**batch, do_sample=False, max_new_tokens=20)[0])))
"""


def lines_of(page: str) -> list[str]:
    """The block of five commands of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"((?:^    python launch/.*\n){5})", text, flags=re.MULTILINE)
    return [line.strip() for line in block.splitlines()]


def test_the_pages_show_the_same_lines() -> None:
    assert lines_of("README.md") == lines_of("docs/programs.md")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_a_folder_of_text_to_a_model_that_others_load(tmp_path: Path) -> None:
    """In less than ten minutes on two free cores, from a copy of what a clone has."""
    pytest.importorskip("transformers")
    checkout = tmp_path / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("launch", "nsa_dist", "kernels", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=skipped)
    texts = checkout / "my_texts"
    texts.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:120]:
        shutil.copy(path, texts / f"{path.stem}.txt")
    shutil.copy(library / "argparse.py", texts / "one.txt")

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    said: dict[str, str] = {}
    for line in lines_of("README.md"):
        words = shlex.split(line)
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=checkout,
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        said[Path(words[1]).stem] = done.stdout
    assert len(said["generate"]) > 100
    assert "my_model: NSALlamaForCausalLM" in said["export"]
    for name in ("choices.png", "gates.png", "attention.html"):
        assert (checkout / "picture" / name).stat().st_size > 1000
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        cwd=checkout,
        env={**environment, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "import " in done.stdout
