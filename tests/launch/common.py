"""Tiny runs, and processes to run them in."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import random
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from settings import Settings, from_table

TINY: dict[str, dict[str, Any]] = {
    "model": {"layers": 2, "hidden_size": 32, "mlp_hidden": 48},
    "attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "compress_block": 8,
        "compress_stride": 4,
        "select_block": 8,
        "num_selected": 4,
        "window": 12,
    },
    "data": {"source": "folder", "length": 120, "global_batch": 2, "held_out": 0.2},
    "optimizer": {"lr": 3e-3, "warmup_steps": 5},
    "run": {
        "steps": 20,
        "device": "cpu",
        "dtype": "float64",
        "log_every": 50,
        "validation_streams": 3,
        "tensorboard": False,
        "sample_tokens": 0,
    },
}


def tiny(root: Path, **overrides: Mapping[str, Any]) -> Settings:
    """The tiny run on the documents under ``root``, some sections' options replaced."""
    table = {section: dict(options) for section, options in TINY.items()}
    table["data"]["path"] = str(root / "documents")
    for section, options in overrides.items():
        table.setdefault(section, {}).update(options)
    return from_table(Settings, table)


def write_documents(root: Path) -> None:
    """Sixty texts of 1 to 400 bytes, each of a few words over and over: easy to learn."""
    words = "red green blue window block select compress gate rank token stream".split()
    rng = random.Random(0)
    folder = root / "documents"
    folder.mkdir(parents=True)
    for index in range(60):
        few = rng.sample(words, 3)
        text = " ".join(rng.choice(few) for _ in range(80))
        (folder / f"{index:02}.txt").write_text(text[: rng.choice((1, 5, 37, 90, 151, 400))])


def _child(rank: int, size: int, store: str, out: str, case: Callable[..., Any], root: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
        torch.save(case(root), f"{out}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{out}/{rank}.error").write_text(traceback.format_exc())
        raise


def run_ranks(size: int, case: Callable[[Path], Any], root: Path) -> list[Any]:
    """What ``case(root)`` returns on each of ``size`` gloo processes, in rank order."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as out:
        arguments = (size, f"{out}/store", out, case, root)
        processes = [context.Process(target=_child, args=(r, *arguments)) for r in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = [path.read_text() for path in sorted(Path(out).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert all(process.exitcode == 0 for process in processes)
        return [torch.load(f"{out}/{r}.pt", weights_only=False) for r in range(size)]


def replace(settings: Settings, section: str, **options: Any) -> Settings:
    """``settings`` with some options of one section replaced."""
    new = dataclasses.replace(getattr(settings, section), **options)
    return dataclasses.replace(settings, **{section: new})
