"""Choices recorded from a checkpoint are those that the model makes, and the bench takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch import local
from launch.bench.options import Options, recorded_choices
from launch.bench.record_choices import (
    RecordOptions,
    find_checkpoint,
    main,
    read_tokens,
    write_choices,
)
from launch.settings import Settings
from tests.distributed.ranks import Ranks
from tests.launch.common import plain_choices, record_choices, replaced, run_training, tiny

numpy = pytest.importorskip("numpy")
RanksOf = Callable[[int], Ranks]
LENGTH = 333
# The attention of ``tiny``.
SIZES = dict(heads=4, kv_heads=2, compress_block=8, compress_stride=4, select_block=8)


@pytest.fixture(scope="module")
def trained(ranks_of: RanksOf, root: Path) -> Settings:
    """A run of a few steps on two ranks, with a checkpoint, and a text in two files beside it."""
    options = {"steps": 4, "folder": str(root / "recorded"), "checkpoint_every": 2}
    settings = tiny(root, parallel={"cp": 2}, run=options)
    ranks_of(2).run(run_training, settings)
    (root / "a.txt").write_text("the first of two texts, " * 9)
    (root / "b.txt").write_text("and the second of them. " * 9)
    return settings


@pytest.fixture
def options(trained: Settings, root: Path, tmp_path: Path) -> RecordOptions:
    return RecordOptions(
        folder=Path(trained.run.folder),
        text=(root / "a.txt", root / "b.txt"),
        length=LENGTH,
        out=tmp_path / "sub" / "choices.npz",
        device="cpu",
        dtype="float64",
    )


@pytest.mark.parametrize("size", [1, 2])
def test_the_file_has_what_the_model_chooses(
    ranks_of: RanksOf, trained: Settings, options: RecordOptions, size: int
) -> None:
    """Longer than the model was trained on, and no multiple of anything."""
    recording = ranks_of(size).run(record_choices, options)[0]
    text = b"".join(path.read_bytes() for path in options.text)[:LENGTH]
    alone = replaced(trained, "parallel", cp=1)
    (expected,) = ranks_of(1).run(plain_choices, alone, text)
    with numpy.load(options.out) as file:
        assert file["selected"].dtype == numpy.int16
        assert int(file["select_block"]) == 8
        found = torch.from_numpy(file["selected"]).int()
    assert found.shape == (2, 2, LENGTH, 4)
    assert torch.equal(found, expected)
    assert torch.equal(recording.selected, expected)
    # The forced blocks are not all: layers differ, and groups do.
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[:, 0], found[:, 1])
    # A model of a few steps is a little better than one that knows nothing.
    assert 1.0 < recording.loss < 5.6

    bench = Options(lengths=(LENGTH,), choices=options.out, num_selected=4, **SIZES)
    loaded = recorded_choices(bench, LENGTH)
    assert list(loaded) == [0, 1]
    for layer, choices in loaded.items():
        assert choices.dtype == torch.int32
        assert torch.equal(choices, expected[layer].transpose(0, 1))


def test_blocks_beyond_int16_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "choices"
    for last, dtype in ((32767, numpy.int16), (32768, numpy.int32)):
        selected = torch.tensor([0, last, -1]).view(1, 1, 1, 3)
        write_choices(path, selected, 64)
        with numpy.load(path) as file:
            assert file["selected"].dtype == dtype
            assert file["selected"].flatten().tolist() == [0, last, -1]


def refused(options: RecordOptions, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = [str(options.folder), "--text", *map(str, options.text)]
    arguments += ["--out", str(options.out), "--device", "cpu"]
    for name in ("length", "step"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    capsys.readouterr()
    return str(error.value)


def test_what_does_not_work_is_refused_by_name(
    options: RecordOptions, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = (
        (
            {"folder": tmp_path},
            f"folder must be a run's folder with a whole checkpoint, got '{tmp_path}'",
        ),
        ({"step": 3}, "step must be one of 2, 4, got 3"),
        ({"text": (tmp_path / "none",)}, f"text must be existing files, got '{tmp_path / 'none'}'"),
        ({"text": (empty,)}, f"text must be files with some text, got '{empty}'"),
        ({"length": 433}, "length must be 1 to 432, the tokens of the text, got 433"),
        ({"length": 0}, "length must be 1 to 432, the tokens of the text, got 0"),
    )
    for change, message in cases:
        text = refused(replace(options, **change), capsys)
        assert text.startswith(f"record_choices.py: {message}")
    assert not options.out.exists()


def test_models_that_choose_nothing_are_refused(options: RecordOptions, tmp_path: Path) -> None:
    step = find_checkpoint(options)[0]
    copy = tmp_path / "run" / "checkpoints" / step.name
    copy.mkdir(parents=True)
    (copy / ".metadata").touch()
    settings = (step / "settings.toml").read_text()
    changes = (
        ('attention = "nsa"', 'attention = "dense"', "model.attention = 'nsa', got 'dense'"),
        (
            '["compressed", "selected", "window"]',
            '["window"]',
            "'selected' in attention.branches, got ",
        ),
    )
    for old, new, message in changes:
        assert old in settings
        # Without format it needs no manifest.
        changed = settings.replace("format = 1", "").replace("cp = 2", "cp = 1")
        changed = changed.replace(old, new)
        (copy / "settings.toml").write_text(changed)
        with pytest.raises(ValueError, match=f"folder must be of a run with {message}"):
            find_checkpoint(replace(options, folder=tmp_path / "run"))


def test_all_tokens_are_read_unless_told(options: RecordOptions) -> None:
    settings = find_checkpoint(options)[1]
    assert read_tokens(replace(options, length=None), settings).shape == (1, 432)
    assert read_tokens(options, settings).shape == (1, LENGTH)


@pytest.mark.slow
def test_the_program_from_the_command_line(options: RecordOptions, tmp_path: Path) -> None:
    program = Path(local.__file__).parent / "bench" / "record_choices.py"
    line = [sys.executable, str(program), str(options.folder), "--text", *map(str, options.text)]
    line += ["--device", "cpu", "--out", "found.npz"]
    environment = local.environment()
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "found.npz has selected [layer, group, token, n] = [2, 2, 432, 4]" in done.stdout
    with numpy.load(tmp_path / "found.npz") as file:
        assert file["selected"].shape == (2, 2, 432, 4)
