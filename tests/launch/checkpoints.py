"""Damage to checkpoints and trouble while they are written, for ranks to go through."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from launch import train
from launch.engines import fsdp2
from launch.settings import Settings
from launch.storage import checkpoint, manifest
from launch.storage.checkpoint import find_checkpoint, resume, save_checkpoint
from launch.storage.manifest import CheckpointError
from launch.train import Result
from tests.launch.common import run_training


def _slow_save(*args: Any, **kwargs: Any) -> Any:
    """``save``, after steps that went on have changed the state."""
    time.sleep(0.5)
    return save(*args, **kwargs)


def run_slowly_saved(settings: Settings) -> Result:
    """A run whose checkpoints take longer to write than its steps to run."""
    with mock.patch.object(fsdp2, "save", _slow_save):
        return run_training(settings)


def fail_while_it_saves(settings: Settings) -> str:
    """Why a run ended whose second step fails before its first checkpoint is written."""
    train_step = train.train_step

    def fail(engine: Any, data: Any, settings: Settings, step: int, *rest: Any) -> Any:
        if step == 1:
            raise FloatingPointError("the second step fails")
        return train_step(engine, data, settings, step, *rest)

    try:
        with mock.patch.object(train, "train_step", fail):
            run_slowly_saved(settings)
    except FloatingPointError as error:
        return str(error)
    return ""


def shard(path: Path) -> Path:
    """A file of a checkpoint with weights in it."""
    return next(
        p for pattern in ("*.distcp", "*optim_states.pt") for p in sorted(path.glob(pattern))
    )


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its own checksum right again."""
    file = path / manifest.MANIFEST
    table = json.loads(file.read_text())
    del table["sha256"]
    change(table)
    file.write_text(json.dumps({**table, "sha256": manifest._checksum(table)}))


def seal(path: Path) -> None:
    """Make a manifest that of the files that lie in the checkpoint's folder now."""
    names = set(manifest._files(path)) - {manifest.MANIFEST}
    files = {name: list(manifest.hash_file(path / name)) for name in names}
    reseal(path, lambda table: table.update(files=files))


def make_old(path: Path) -> None:
    """Turn a checkpoint into one from before there were manifests and formats."""
    (path / manifest.MANIFEST).unlink()
    text = (path / "settings.toml").read_text()
    assert text.startswith("format = 1\n")
    (path / "settings.toml").write_text(text.removeprefix("format = 1\n"))


def older(path: Path) -> Path:
    """The checkpoint before one."""
    return checkpoint.checkpoint_path(path.parents[1], int(path.name[-1]) - 1)


def outside(table: dict[str, Any]) -> None:
    table["files"]["../step_00000001/settings.toml"] = [1, ""]


# What is done to the newest of three checkpoints, and what is said of it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda p: shard(p).unlink(), r"__0_0\.distcp is missing"),
    "empty shard": (
        lambda p: shard(p).write_bytes(b""),
        r"__0_0\.distcp has 0 bytes, [\d,]+ in the manifest",
    ),
    "cut shard": (lambda p: cut(shard(p)), r"__0_0\.distcp has [\d,]+ bytes, [\d,]+ in the"),
    "flipped bit": (lambda p: flip(shard(p)), r"__0_0\.distcp is not what was written: its che"),
    "shard of another checkpoint": (
        lambda p: shutil.copy(shard(older(p)), shard(p)),
        r"__0_0\.distcp is not what was written",
    ),
    "one shard more": (
        lambda p: shutil.copy(shard(p), p / "__9_0.distcp"),
        r"__9_0\.distcp is not in the manifest",
    ),
    "a link for a shard": (
        lambda p: (shard(p).unlink(), (p / "__0_0.distcp").symlink_to(shard(older(p)))),
        r"__0_0\.distcp is a link",
    ),
    "missing metadata": (lambda p: (p / ".metadata").unlink(), r"\.metadata is missing"),
    "flipped bit of the metadata": (lambda p: flip(p / ".metadata"), r"\.metadata is not what"),
    "missing settings": (lambda p: (p / "settings.toml").unlink(), r"settings\.toml is missing"),
    "empty settings": (lambda p: (p / "settings.toml").write_text(""), r"settings\.toml has 0 by"),
    "cut settings": (lambda p: cut(p / "settings.toml"), r"settings\.toml has [\d,]+ bytes"),
    "other settings": (
        lambda p: (p / "settings.toml").write_text(
            (p / "settings.toml").read_text().replace("seed = 0", "seed = 1")
        ),
        r"settings\.toml is not what was written",
    ),
    "missing manifest": (
        lambda p: (p / "manifest.json").unlink(),
        r"manifest\.json is missing",
    ),
    "missing manifest and settings": (
        lambda p: [(p / name).unlink() for name in ("manifest.json", "settings.toml")],
        r"manifest\.json is missing",
    ),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), r"manifest\.json cannot"),
    "cut manifest": (lambda p: cut(p / "manifest.json"), r"manifest\.json cannot be read"),
    "flipped bit of the manifest": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"world_size": 2', '"world_size": 3')
        ),
        r"manifest\.json is not what was written",
    ),
    "a list for a manifest": (lambda p: (p / "manifest.json").write_text("[1]"), r"no format"),
    "manifest of another checkpoint": (
        lambda p: shutil.copy(older(p) / "manifest.json", p),
        r"manifest\.json is that of step 2",
    ),
    "manifest that leads out": (lambda p: reseal(p, outside), r"not a path within the checkpoint"),
    "manifest without settings": (
        lambda p: reseal(p, lambda table: table["files"].pop("settings.toml")),
        r"manifest\.json lacks settings\.toml",
    ),
    "manifest without step": (
        lambda p: reseal(p, lambda table: table.pop("step")),
        r"manifest\.json lacks what a manifest has",
    ),
    "manifest whose data digest is a number": (
        lambda p: reseal(p, lambda table: table.update(data=5)),
        r"manifest\.json lacks what a manifest has",
    ),
    "manifest whose checksum is a number": (
        lambda p: reseal(p, lambda table: table["files"]["settings.toml"].__setitem__(1, 5)),
        r"manifest\.json lacks what a manifest has",
    ),
    "manifest of format 0": (
        lambda p: reseal(p, lambda table: table.update(format=0)),
        r"manifest\.json has the format number 0, which is not one",
    ),
    "a pipe for a manifest": (
        lambda p: ((p / "manifest.json").unlink(), os.mkfifo(p / "manifest.json")),
        r"manifest\.json is not a file",
    ),
    "an empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), r"manifest\.json is missing"),
}


@contextmanager
def collected() -> Iterator[list[str]]:
    """Texts of the warnings within."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts: list[str] = []
        yield texts
    # Not those of Python itself, such as of sockets that wait for the garbage collector.
    texts += [str(found.message) for found in caught if issubclass(found.category, UserWarning)]


def find_damaged(folder: Path, scratch: Path) -> dict[str, tuple[str, list[str]]]:
    """What is found after each kind of damage: the checkpoint's name, and the warnings."""
    found = {}
    for kind, (damage, _) in DAMAGE.items():
        copy = scratch / kind
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
            damage(copy / "checkpoints" / "step_00000003")
        dist.barrier()
        with collected() as told:
            checkpoint_found = find_checkpoint(copy)
        assert checkpoint_found is not None
        found[kind] = checkpoint_found.path.name, told
    return found


def find(folder: Path) -> tuple[str | None, list[str]]:
    """The checkpoint that is found, and the warnings."""
    with collected() as told:
        found = find_checkpoint(folder)
    return (found.path.name if found else None), told


def find_as_rank_0_sees(folder: Path) -> tuple[str | None, list[str]]:
    """As ``find`` where the other ranks' file system shows them the oldest checkpoint alone."""
    if dist.get_rank() == 0:
        return find(folder)
    real = checkpoint.found_steps
    with mock.patch(
        "launch.storage.checkpoint.found_steps", lambda folder: dict([*real(folder).items()][:1])
    ):
        return find(folder)


def try_resume(folder: Path, settings: Settings, data: str) -> str:
    """The name of the checkpoint that a run with these settings and tokens goes on from."""
    found = resume(folder, settings, data)
    assert found is not None
    return found.path.name


def write_small(path: Path, step: int) -> None:
    """Write two files, one of them in a folder, as an engine would write its state."""
    if dist.get_rank() == 0:
        (path / "sub").mkdir()
        for name in ("a.distcp", "sub/b.distcp"):
            (path / name).write_text(f"{name} of step {step}")


def save_small(folder: Path, step: int, settings: Settings, broken: set[str] | None = None) -> None:
    save_checkpoint(write_small, folder, step, settings, "digest", broken)


def save_steps(folder: Path, steps: list[int], settings: Settings) -> list[str]:
    """Save small checkpoints one after another; returns the warnings."""
    with collected() as told:
        for step in steps:
            save_small(folder, step, settings)
    return told


def save_with_trouble(
    folder: Path, steps: list[int], settings: Settings, call: str, number: int
) -> list[str]:
    """As ``save_steps``, while a call that removes or renames old ones fails."""
    inner = getattr(shutil if call == "rmtree" else Path, call)

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if call == "rmtree" or not str(path).endswith(".partial"):
            raise OSError(number, os.strerror(number), str(path))
        return inner(path, *args, **options)

    with mock.patch.object(shutil if call == "rmtree" else Path, call, fail):
        return save_steps(folder, steps, settings)


class Killed(BaseException):
    """Simulates a kill: nothing in the program catches it."""


def kill_at_each_call(folder: Path, scratch: Path, settings: Settings) -> list[tuple[str, str]]:
    """Save step 3 over and over, each time ended before the next change to the file system.

    Returns:
        Of each: the newest checkpoint afterwards, and that after the save was repeated.
    """
    places: list[tuple[Any, str]] = [
        *((Path, name) for name in ("mkdir", "rename", "unlink", "write_text")),
        (shutil, "rmtree"),
        *((os, name) for name in ("fsync",)),
    ]
    results = []
    for kill_at in range(1000):
        copy = scratch / str(kill_at)
        shutil.copytree(folder, copy)
        left = [kill_at]
        ended = False
        with ExitStack() as stack, suppress(Killed):
            for place, name in places:
                counted = _counted(getattr(place, name), left)
                stack.enter_context(mock.patch.object(place, name, counted))
            save_small(copy, 3, settings)
            ended = True
        newest = find_checkpoint(copy)
        assert newest is not None
        save_small(copy, 3, settings)
        again = find_checkpoint(copy)
        assert again is not None
        results.append((newest.path.name, again.path.name))
        assert not [path.name for path in (copy / "checkpoints").glob(".*")]
        if ended:
            return results
    raise AssertionError("no end")


def _counted(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return call(*args, **options)

    return counted


@contextmanager
def small_files_only(rank: int, most: int) -> Iterator[None]:
    """Files of this rank cannot grow beyond ``most`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_with_full_disk(
    run: Callable[[Settings], Result],
    settings: Settings,
    rank: int,
    most: int,
    steps: Container[int] = range(10**8),
) -> str:
    """The error with which a run ends when one rank cannot write its files; empty without one.

    Args:
        most: bytes of a file.
        steps: whose checkpoints meet the full disk.
    """
    real = checkpoint.save_checkpoint

    def save(write: Any, folder: Path, step: int, *args: Any) -> Path:
        with small_files_only(rank, most) if step in steps else nullcontext():
            return real(write, folder, step, *args)

    with mock.patch("launch.train.save_checkpoint", save):
        try:
            run(settings)
        except CheckpointError as error:
            return str(error)
    return ""


def train_and_tell(settings: Settings) -> tuple[Result, list[str]]:
    """A whole run, and the warnings."""
    with collected() as told:
        result = run_training(settings)
    return result, told


BUSY = errno.EBUSY
DENIED = errno.EACCES


def universal_is_whole(path: Path) -> bool:
    """Whether a checkpoint has a universal form."""
    from launch.engines.deepspeed import has_universal

    return has_universal(path)
