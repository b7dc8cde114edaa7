"""Checkpoints: folders ``checkpoints/step_00001000``, which either are whole or do not exist.

Each holds what its engine writes (``engines.base.Engine.write``), the settings of its run and a
manifest (manifest.py). It is written under another name and renamed when all of it has reached the
disk, so that a run that is killed leaves the checkpoint before. Data order and dropout follow from
the seed and the step: nothing else is needed to continue exactly.

A run continues from the newest checkpoint whose files match its manifest. Rank 0 finds it, and all
ranks share the reading. Checkpoints from before there were manifests have no ``format`` in their
settings and are accepted unverified, with a warning.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from launch.engines.registry import all_specs, engine_spec
from launch.processes.startup import code_version
from launch.settings import Settings, from_toml, read_toml, to_toml
from launch.storage.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    NewerFormatError,
    check_bytes,
    check_sizes,
    on_main,
    raise_on_all,
    read_manifest,
    sync_folder,
    write_manifest,
    write_text,
)
from nsa_dist.checks import check

SETTINGS = "settings.toml"
_NAME = re.compile(r"step_([0-9]{8})")

# Another model, other data or another seed would make a resumed run a different one. How it is
# spread over ranks, how long it runs and how it is optimised may change.
_FIXED_SECTIONS = ("attention", "rotary", "model")
_FREE_OPTIONS = ("recompute", "recompute_part", "compile", "loss", "backend")
_FIXED_DATA = ("length", "global_batch", "held_out", "weights")
_DATA_BEFORE_DIGESTS = ("source", "path", "pattern", "field", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified.

    Args:
        settings: of the run that wrote it.
        data: digest of that run's tokens; empty for a checkpoint from before there were any.
        passed_over: names of newer ones that are not whole.
    """

    path: Path
    step: int
    settings: Settings
    data: str
    passed_over: tuple[str, ...] = ()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def _companions(path: Path) -> list[Path]:
    """Where engines may keep other forms of a checkpoint: beside it."""
    return [path.with_name(path.name + end) for end in _companion_ends()]


def _companion_ends() -> list[str]:
    return [spec.companion for spec in all_specs() if spec.companion]


def found_steps(folder: Path) -> dict[int, Path]:
    """Folders with the name of a checkpoint, whole or not, by step, oldest first.

    Raises:
        OSError: if the folder exists but cannot be listed.
    """
    try:
        paths = sorted((folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return {}
    return {
        _step_of(path): path
        for path in paths
        if _step_of(path) >= 0 and path.is_dir() and not path.is_symlink()
    }


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder that are whole by names and sizes, oldest first."""
    return [path for path in found_steps(folder).values() if not _problems(path)]


def save_checkpoint(
    write: Callable[[Path, int], None],
    folder: Path,
    step: int,
    settings: Settings,
    data: str,
    passed_over: set[str] | None = None,
) -> Path:
    """Write a checkpoint of the state after ``step`` steps, then remove older ones beyond
    ``run.keep_checkpoints``; collective.

    Args:
        write: as ``engines.base.Engine.write``.
        data: digest of the run's tokens.
        passed_over: names of checkpoints known not to be whole, which are not counted; the name
            of the new checkpoint is removed.

    Raises:
        CheckpointError: on every rank, if it cannot be written. Other checkpoints stay as they are.
    """
    path = checkpoint_path(folder, step)
    partial = path.with_name(f".{path.name}.partial")
    try:
        on_main(lambda: _start(partial))
        problem = None
        try:
            write(partial, step)
        except CheckpointError as error:
            problem = str(error)
        raise_on_all(problem)
        on_main(lambda: write_text(partial / SETTINGS, to_toml(settings)))
        code = code_version() if dist.get_rank() == 0 else ""
        write_manifest(partial, step, settings.parallel.engine, data, code)
        on_main(lambda: _publish(partial, path))
    except CheckpointError as error:
        before, now = on_main(lambda: _give_up(partial))
        room = f"{before:,} bytes were free, {now:,} are without it"
        raise CheckpointError(f"{path}: not written ({error}; {room})") from None
    broken = passed_over or set()
    broken.discard(path.name)
    on_main(lambda: _rotate(folder, step, settings.run.keep_checkpoints, broken))
    return path


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder, or None if the folder has no checkpoint at all.

    Warns of each newer one that is not whole. Collective, the same on every rank.

    Raises:
        ValueError: on every rank, if there are some and none is whole.
    """
    passed_over: dict[str, str] = {}
    for path in on_main(lambda: list(reversed(found_steps(folder).values()))):
        found, problems = _open(path)
        if found is not None:
            return dataclasses.replace(found, passed_over=tuple(passed_over))
        passed_over[path.name] = _shortened(problems)
        if dist.get_rank() == 0:
            warnings.warn(f"{path} is passed over: {passed_over[path.name]}", stacklevel=2)
    if passed_over:
        each = "; ".join(f"{name}: {text}" for name, text in passed_over.items())
        raise ValueError(
            f"run.resume must find a whole checkpoint in {folder}, got {each}; move these away to "
            "start anew"
        )
    return None


def newest_checkpoint(path: Path, option: str) -> Path:
    """The checkpoint that ``path`` is, or the newest whole one (by names and sizes) of the run
    folder that it is.

    Args:
        option: that named it.

    Raises:
        ValueError: if it is neither.
    """
    if (path / "checkpoints").is_dir():
        found = checkpoints(path)
        if found:
            return found[-1]
        names = ", ".join(each.name for each in found_steps(path).values()) or "none"
        raise ValueError(
            f"{option} must be a run with a whole checkpoint, got {str(path)!r} with {names}"
        )
    must = "a run's folder, or one of its folders checkpoints/step_N"
    check((path / SETTINGS).is_file(), option, str(path), must)
    return path


def open_checkpoint(path: Path, option: str) -> Checkpoint:
    """One checkpoint, verified; collective.

    Args:
        option: that named it.

    Raises:
        ValueError: on every rank, naming ``option`` and what is wrong.
    """
    found, problems = _open(path)
    if found is None:
        raise ValueError(
            f"{option} must be a whole checkpoint, got {str(path)!r}: {_shortened(problems)}"
        )
    return found


def resume(folder: Path, settings: Settings, data: str) -> Checkpoint | None:
    """As ``find_checkpoint``, for a run with these settings and tokens to go on from.

    Raises:
        ValueError: on every rank, also if the checkpoint is of another model, other data or another
            seed.
    """
    found = find_checkpoint(folder)
    if found is not None:
        check_same_run(found, settings, data)
    return found


def _open(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """A checkpoint, or what is wrong with it; collective."""

    def glance() -> tuple[list[str], Manifest | None, Settings | None]:
        problems = _problems(path)
        if problems:
            return problems, None, None
        manifest = read_manifest(path) if (path / MANIFEST).exists() else None
        return [], manifest, None if manifest else from_toml(path / SETTINGS)

    problems, manifest, settings = on_main(glance)
    if problems:
        return None, problems
    if manifest is not None:
        problems = check_bytes(path, manifest)
        if problems:
            return None, problems
        settings = on_main(lambda: from_toml(path / SETTINGS))
    elif dist.get_rank() == 0:
        warnings.warn(
            f"{path} is from before checkpoints had manifests: it is read without verification",
            stacklevel=3,
        )
    assert settings is not None
    step = manifest.step if manifest else _step_of(path)
    return Checkpoint(path, step, settings, manifest.data if manifest else ""), []


def _step_of(path: Path) -> int:
    """The step by its name; -1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint by names and sizes.

    Raises:
        NewerFormatError: if it is of a later version of this program.
    """
    try:
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
            if _step_of(path) not in (-1, manifest.step):
                return [f"{MANIFEST} is that of step {manifest.step}"]
            if SETTINGS not in manifest.files:
                return [f"{MANIFEST} lacks {SETTINGS}"]
            return check_sizes(path, manifest)
        if not (path / SETTINGS).exists() or "format" in read_toml(path / SETTINGS):
            return [f"{MANIFEST} is missing"]
        settings = from_toml(path / SETTINGS)
    except NewerFormatError:
        raise
    except (OSError, ValueError) as error:
        return [str(error)]
    if _step_of(path) < 0:
        return [f"{MANIFEST} is missing, and the name does not have the step"]
    # The rule from before manifests: some files were written last.
    last = engine_spec(settings.parallel.engine).last_files
    return [f"{name} is missing" for name in last if not (path / name).exists()]


def _shortened(problems: list[str], most: int = 3) -> str:
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


def _start(partial: Path) -> None:
    """Make an empty folder to write to; removes what killed runs left."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for path in partial.parent.iterdir():
        if _is_left_behind(path):
            _clear(path)
    partial.mkdir()


def _give_up(partial: Path) -> tuple[int, int]:
    """Remove an unfinished checkpoint; returns the bytes that were free before and are now."""
    place = next(p for p in partial.parents if p.exists())
    before = shutil.disk_usage(place).free
    shutil.rmtree(partial, ignore_errors=True)
    return before, shutil.disk_usage(place).free


def _publish(partial: Path, path: Path) -> None:
    """Give a whole checkpoint its name. An older one of that name, not whole, is replaced."""
    replaced = [old for old in (*_companions(path), path) if old.exists() or old.is_symlink()]
    moved = [_move_away(old) for old in replaced]
    partial.rename(path)
    sync_folder(path.parent)
    for old in moved:
        if _is_left_behind(old):
            _clear(old)


def _move_away(path: Path) -> Path:
    """Rename what has a checkpoint's name: ours for removal, anything else to be kept."""
    if _is_ours(path):
        target = path.with_name(f".{path.name}.old")
    else:
        target = path.with_name(f"{path.name}.moved")
        while target.exists() or target.is_symlink():
            target = target.with_name(f"{target.name}.moved")
        warnings.warn(
            f"{path} is not a checkpoint of this program: renamed {target.name}", stacklevel=2
        )
    return path.rename(target)


def _is_left_behind(path: Path) -> bool:
    """Whether a run that was killed left it beside checkpoints."""
    ends = "|".join(map(re.escape, _companion_ends()))
    return re.fullmatch(rf"\.step_[0-9]{{8}}({ends})?\.(partial|old)", path.name) is not None


def _is_ours(path: Path) -> bool:
    """Whether a folder was written as a checkpoint, or is another form of one."""
    if path.is_symlink() or not path.is_dir():
        return False
    for spec in all_specs():
        if spec.companion and path.name.endswith(spec.companion):
            return spec.is_companion(path)
    return any((path / name).exists() for name in (MANIFEST, SETTINGS, ".metadata"))


def _rotate(folder: Path, step: int, keep: int, broken: set[str]) -> None:
    """Remove checkpoints older than the newest ``keep`` up to ``step``; warns if that fails."""
    if not keep:
        return
    try:
        found = found_steps(folder)
        whole = [
            at
            for at, path in found.items()
            # Later ones are not of this run, which continued from an earlier one.
            if at <= step and path.name not in broken and not _problems(path)
        ]
        old = [path for at, path in found.items() if whole and at < whole[-keep:][0]]
    except (OSError, NewerFormatError) as error:
        warnings.warn(f"old checkpoints of {folder} are left ({error})", stacklevel=2)
        return
    for path in (form for step_path in old for form in (*_companions(step_path), step_path)):
        if _is_ours(path):
            try:
                _clear(path.rename(path.with_name(f".{path.name}.old")))
            except OSError as error:
                warnings.warn(f"{path} is left and can be removed ({error})", stacklevel=2)


def _clear(path: Path) -> None:
    """Remove an old checkpoint; warns if that fails."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warnings.warn(f"{path} is left and can be removed ({error})", stacklevel=2)


def check_same_run(found: Checkpoint, now: Settings, data: str) -> None:
    """Refuse to continue a checkpoint with settings or tokens that would make it another run.

    Raises:
        ValueError: naming the option, the checkpoint's value and the new one.
    """
    saved = found.settings
    # Another engine reads what launch/convert.py makes.
    options = ["parallel.engine", "run.seed"]
    options += engine_spec(saved.parallel.engine).fixed_options
    for section in _FIXED_SECTIONS:
        names = (f.name for f in dataclasses.fields(getattr(now, section)))
        options += [f"{section}.{name}" for name in names if name not in _FREE_OPTIONS]
    options += [f"data.{name}" for name in _FIXED_DATA]
    if not found.data:
        options += [f"data.{name}" for name in _DATA_BEFORE_DIGESTS]
    for option in options:
        section, name = option.split(".")
        old, new = (getattr(getattr(settings, section), name) for settings in (saved, now))
        check(old == new, option, new, f"{old!r}, the checkpoint's value")
    if found.data not in ("", data):
        option = "sources" if now.data.sources else "path"
        if saved.data.tokenizer != now.data.tokenizer:
            option = "tokenizer"
        value = repr(getattr(now.data, option) or now.data.source)
        if now.data.validation_path:
            value += f" and data.validation_path = {now.data.validation_path!r}"
        raise ValueError(
            f"data.{option} must give the checkpoint's tokens (digest {found.data[:16]}), got "
            f"{value} with digest {data[:16]}; the same documents and tokenizer may lie elsewhere"
        )
