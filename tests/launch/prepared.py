"""Prepared folders for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from launch.data.preparing import PrepareOptions, Result, prepare


def prepared(out: Path, *inputs: Path, **options: Any) -> Result:
    """Prepare a folder in this process."""
    options = {"processes": 1, "held_out": 0.2, **options}
    return prepare(PrepareOptions(inputs=inputs, out=out, **options), lambda progress: None)


def write_jsonl(path: Path, lines: int, seed: int = 0) -> Path:
    """Lines of a few to a few hundred bytes, with blank ones and all ends of lines between."""
    rng = random.Random(seed)
    words = "red green blue window block select compress gate rank token stream één".split()
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("\ufeff")
        for _ in range(lines):
            text = " ".join(rng.choices(words, k=rng.randint(1, 40)))
            file.write(json.dumps({"id": 1, "text": text}, ensure_ascii=rng.random() < 0.5))
            file.write(rng.choice(["\n", "\n", "\r\n", "\r", "\n\n", "\r\r\n"]))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
