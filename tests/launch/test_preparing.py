"""Preparing folders: what is read, what is left out, interruptions, the program."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.data import inputs, preparing
from launch.data.corpus import load_corpus
from launch.data.inputs import cut, find_inputs, read_piece
from launch.data.prepared import open_prepared
from launch.data.preparing import PrepareOptions, prepare
from launch.data.sources import read_documents
from launch.settings import DataSettings
from launch.storage.lock import FolderLock
from tests.launch.prepared import prepared, tree, write_jsonl
from tests.launch.processes import TRAIN, started
from tests.launch.test_data import words_json
from tests.launch.test_sources import BAD_LINES
from tests.launch.test_tokenizer import saved, words

PROGRAM = str(Path(TRAIN).with_name("prepare_data.py"))


def documents(folder: Path) -> dict[str, str]:
    """Text of bytes by name, of both splits."""
    found = {}
    opened = open_prepared(str(folder), "data.path")
    for split in ("training", "held_out"):
        documents = opened.split(split)
        for at in range(documents.num_documents):
            name, tokens = documents.document(at)
            assert name not in found
            found[name] = bytes(tokens.tolist()).decode()
    return found


def read_all(path: Path) -> dict[str, str]:
    """The documents of a JSONL file, as training reads them into memory."""
    found = read_documents(DataSettings(source="jsonl", path=str(path)))
    return {name: text.decode() for name, text in found}


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_pieces_of_a_file_have_its_lines_and_their_numbers(tmp_path: Path, size: int) -> None:
    """Wherever it is cut: within a line, at its end, between a carriage return and a line feed."""
    path = write_jsonl(tmp_path / "texts.jsonl", 80)
    pieces = cut("texts.jsonl", path, "text", size)
    pieces = inputs.number(pieces, [inputs.count_lines(piece) for piece in pieces])
    assert (len(pieces) > 5) == (size < 10**6)
    found: list[tuple[str, bytes]] = []
    for piece in pieces:
        found += read_piece(piece, "text", True, broken=fail)
    assert found == list(read_documents(DataSettings(source="jsonl", path=str(path))))


def fail(error: ValueError) -> None:
    raise error


def test_lines_are_counted_where_a_read_ends_between_their_two_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b"1\r\n2\r3\n\r\n4\r\r\n5")
    (piece,) = cut("texts.jsonl", path, "text", 10**6)
    for size in range(1, 12):
        monkeypatch.setattr(inputs, "_BYTES", size)
        assert inputs.count_lines(piece) == 6


def test_every_kind_of_input(tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.txt").write_text("one")
    (folder / "empty.txt").write_text("")
    (folder / "skipped.md").write_text("no")
    (folder / "a" / "y.jsonl").write_text('{"text": "two"}\n\n{"text": ""}\n{"text": "three"}\n')
    (tmp_path / "code.py").write_text("four")
    (tmp_path / "lines.json").write_text('{"text": "five"}\n')
    result = prepared(tmp_path / "out", folder, tmp_path / "code.py", tmp_path / "lines.json")
    assert documents(tmp_path / "out") == {
        "a/x.txt": "one",
        "a/y.jsonl:1": "two",
        "a/y.jsonl:4": "three",
        "code.py": "four",
        "lines.json:1": "five",
    }
    assert (result.broken, result.empty) == (0, 2)
    options = {"pattern": ("*.md", "a/*.txt"), "field": "text"}
    prepared(tmp_path / "others", folder, **options)
    assert documents(tmp_path / "others") == {"skipped.md": "no", "a/x.txt": "one"}


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    with pytest.raises(ValueError, match=r"INPUT must be files with names of their own.*a/x.*b/x"):
        find_inputs([tmp_path / "a", tmp_path / "b"], ["*.txt"])
    assert sorted(find_inputs([tmp_path], ["**/*.txt"])) == ["a/x.txt", "b/x.txt"]


def write_parquet(path: Path, texts: list[Any], rows: int, kind: Any = None) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    column = arrow.array(texts, type=kind)
    table = arrow.table({"id": list(range(len(texts))), "body": column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_gives_a_column(tmp_path: Path, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    types = {
        "string": arrow.string(),
        "large_string": arrow.large_string(),
        "dictionary": arrow.dictionary(arrow.int32(), arrow.string()),
    }
    texts = [None if i % 7 == 3 else f"text {i} é" * (i % 40) for i in range(300)]
    path = write_parquet(tmp_path / "texts.parquet", texts, 40, types[kind])
    result = prepared(tmp_path / "out", path, field="body", shard_mib=0.002)
    assert len(result.metadata.shards) > 2
    expected = {f"texts.parquet:{i}": text for i, text in enumerate(texts, 1) if text}
    assert documents(tmp_path / "out") == expected
    assert result.broken == sum(text is None for text in texts)
    assert result.told[0] == (
        f"INPUT must hold text in the column 'body', got null in {path} row 4"
    )
    with pytest.raises(ValueError, match=r"got null in .*texts\.parquet row 4$"):
        prepared(tmp_path / "strict", path, field="body", strict=True)


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "texts.parquet", ["a", "b"], 40)
    with pytest.raises(
        ValueError, match=r"--field must be a column of .*, \['id', 'body'\], got 'text'"
    ):
        prepared(tmp_path / "out", path)
    with pytest.raises(ValueError, match=r"INPUT must hold text in the column 'id', got int64 in"):
        prepared(tmp_path / "out", path, field="id")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"texts\.parquet \("):
        prepared(tmp_path / "out", path, field="body")
    assert not list((tmp_path / "out").glob("shards"))


def test_a_mistake_before_the_first_shard_can_be_put_right(tmp_path: Path) -> None:
    """With the same --out: nothing was written that another line would contradict."""
    path = write_jsonl(tmp_path / "texts.jsonl", 30)
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--field must be a field of"):
        prepared(out, path, field="body", tokenizer=tokenizer, strict=True)
    prepared(out, path)
    prepared(tmp_path / "other", path)
    assert tree(out) == tree(tmp_path / "other")


def test_parquet_is_refused_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "texts.parquet").write_bytes(b"PAR1")
    must = (
        r"INPUT must be text or JSONL where pyarrow is not installed \(pip install pyarrow\), got"
    )
    with pytest.raises(ValueError, match=must):
        prepared(tmp_path / "out", tmp_path / "texts.parquet")


@pytest.mark.parametrize("line", [line for line, _ in BAD_LINES.values()], ids=BAD_LINES.keys())
def test_a_broken_line_is_left_out_and_told(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "texts.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good + b"\n" + good + line + b"\n" + good)
    result = prepared(tmp_path / "out", path)
    assert documents(tmp_path / "out") == {f"texts.jsonl:{at}": "good" for at in (1, 3, 5)}
    assert result.broken == 1
    (told,) = result.told
    assert f"{path} line 4" in told and told.startswith("INPUT must hold ")
    with pytest.raises(ValueError) as error:
        prepared(tmp_path / "strict", path, strict=True)
    assert str(error.value) == told
    assert not (tmp_path / "strict" / "prepared.json").exists()


def test_of_many_broken_lines_some_are_told(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + "{\n" * 1000)
    result = prepared(tmp_path / "out", path)
    assert result.broken == 1000
    assert len(result.told) == preparing.MOST_TOLD
    path.write_text("{\n" * 1000)
    with pytest.raises(
        ValueError,
        match=r"INPUT must hold documents with some text, got .*1,000 broken records, su",
    ):
        prepared(tmp_path / "none", path)


def test_strict_does_not_take_over_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from a folder that is finished nor from shards that are."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n{\n')
    prepared(tmp_path / "out", path)
    with pytest.raises(ValueError, match=r"must hold JSON, got .*texts\.jsonl line 2 "):
        prepared(tmp_path / "out", path, strict=True)
    monkeypatch.setattr(preparing, "_finish", lambda *_: fail(ValueError("stopped")))
    with pytest.raises(ValueError, match="stopped"):
        prepared(tmp_path / "begun", path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"must hold JSON, got .*texts\.jsonl line 2 "):
        prepared(tmp_path / "begun", path, strict=True)


def test_text_that_a_tokenizer_cannot_read_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("red blue")
    (folder / "bad.txt").write_bytes(b"red\n\xff")
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1, "blue": 2})
    result = prepared(tmp_path / "out", folder, tokenizer=tokenizer)
    assert result.broken == 1
    assert "byte 0xff in" in result.told[0] and "bad.txt line 2" in result.told[0]
    assert "unless --tokenizer = 'bytes'" in result.told[0]
    prepared(tmp_path / "bytes", folder)
    with pytest.raises(ValueError, match=r"bad\.txt line 2$"):
        prepared(tmp_path / "strict", folder, tokenizer=tokenizer, strict=True)


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_the_tokenizer_lies_in_the_folder(tmp_path: Path, package: str) -> None:
    pytest.importorskip(package)
    inner = words(red=1, green=2)
    inner.enable_truncation(2)
    (tmp_path / "given").mkdir()
    tokenizer = saved(inner, tmp_path / "given", package)
    (tmp_path / "texts").mkdir()
    for at in range(20):
        (tmp_path / "texts" / f"{at}.txt").write_text("red green red green")
    notes: list[str] = []
    options = PrepareOptions((tmp_path / "texts",), tmp_path / "out", tokenizer, processes=1)
    prepare(options, lambda progress: notes.append(progress.note))
    assert "truncation to 2 tokens" in notes[0]
    shutil.move(tmp_path / "out", tmp_path / "moved")
    shutil.rmtree(tmp_path / "given")
    corpus = load_corpus(DataSettings(source="prepared", path=str(tmp_path / "moved")))
    stream = corpus.training.streams(8, None)[0]
    assert stream.tokens.tolist() == [[1, 2, 1, 2, 1, 2, 1, 2]]
    assert stream.cu_seqlens.tolist() == [0, 4, 8]
    assert corpus.tokenizer.decode([1, 2]) == "red green"
    # Another one, in its place, does not read these tokens.
    files = open_prepared(str(tmp_path / "moved"), "data.path").metadata.files
    assert set(files) > {"training.counts"}


@pytest.mark.parametrize("stops", range(1, 6))
def test_an_interrupted_preparation_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int
) -> None:
    """Interrupted within a shard; the shards before are not written again."""
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    prepared(tmp_path / "unbroken", path, shard_mib=0.005)
    begun: list[int] = []
    fill = preparing._fill

    def counted(folder: Path, task: Any, stack: Any) -> None:
        begun.append(task.number)
        if len(begun) == stops:
            (folder / "training.tokens").write_text("a part")
            raise KeyboardInterrupt
        fill(folder, task, stack)

    monkeypatch.setattr(preparing, "_fill", counted)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "out", path, shard_mib=0.005)
    assert not (tmp_path / "out" / "prepared.json").exists()
    prepared(tmp_path / "out", path, shard_mib=0.005)
    shards = len(open_prepared(str(tmp_path / "out"), "data.path").metadata.shards)
    assert shards > 5
    assert begun == [*range(stops), *range(stops - 1, shards)]
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")
    # Once more: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepared(tmp_path / "out", path, shard_mib=0.005)
    assert {p: p.stat().st_mtime_ns for p in before if p.is_file()} == {
        p: at for p, at in before.items() if p.is_file()
    }
    assert len(begun) == shards + 1


def test_a_damaged_shard_is_written_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    prepared(tmp_path / "out", path, shard_mib=0.005)
    unbroken = tree(tmp_path / "out")
    begun = tmp_path / "begun"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda *_: fail(ValueError("stopped")))
        with pytest.raises(ValueError, match="stopped"):
            prepared(begun, path, shard_mib=0.005)
    (begun / "shards/000001/training.tokens").write_bytes(b"")
    (begun / "shards/000002/shard.json").write_text("{")
    (begun / "shards/000003/training.index").unlink()
    prepared(begun, path, shard_mib=0.005)
    assert tree(begun) == unbroken


def test_other_options_and_inputs_do_not_go_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 30)
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1})
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda *_: fail(ValueError("stopped")))
        with pytest.raises(ValueError, match="stopped"):
            prepared(out, path)
    others: dict[str, dict[str, Any]] = {
        r"--held-out must be 0\.2, with which .*out was begun \(or .*\), got 0\.3": {
            "held_out": 0.3
        },
        r"--shard-mib must be 256\.0, with which": {"shard_mib": 1.0},
        r"--field must be 'text', with which": {"field": "body"},
        r"--tokenizer must be 'bytes', with which .* got 'tokenizer\.json with SHA-256 ": {
            "tokenizer": tokenizer
        },
    }
    for finished in (False, True):
        for message, options in others.items():
            with pytest.raises(ValueError, match=message):
                prepared(out, path, **options)
        other = write_jsonl(tmp_path / "texts" / "texts.jsonl", 31) if finished else path
        if not finished:
            before = path.stat().st_mtime_ns
            os.utime(path, ns=(before, before + 10**9))
        with pytest.raises(ValueError, match=r"INPUT must be the files that .*out was"):
            prepared(out, other)
        if not finished:
            os.utime(path, ns=(before, before))
            prepared(out, path)
            (tmp_path / "texts").mkdir()
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out must be a new or empty folder.*got .*used'"):
        prepared(used, path)
    assert tree(used).keys() == {"mine.txt"}
    with pytest.raises(ValueError, match=r"--out must be a folder, got .*mine\.txt"):
        prepared(used / "mine.txt", path)


def test_inputs_that_change_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 30)
    fill = preparing._fill

    def append(folder: Path, task: Any, stack: Any) -> None:
        fill(folder, task, stack)
        with path.open("a") as file:
            file.write('{"text": "later"}\n')

    monkeypatch.setattr(preparing, "_fill", append)
    with pytest.raises(ValueError, match=r"INPUT must be files that stay as they are while they"):
        prepared(tmp_path / "out", path)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_a_folder_is_prepared_by_one_program_at_a_time(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 30)
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    assert lock.take()
    with pytest.raises(ValueError, match=r"--out must be a folder that no other program writes \("):
        prepared(tmp_path / "out", path)
    lock.release()
    prepared(tmp_path / "out", path)
    assert not list((tmp_path / "out").glob("run.lock*"))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 30)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing._Writer, "_put", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out/shards/\.000000\.partial'"):
        prepared(tmp_path / "out", path)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "held_out": ({"held_out": 1.5}, r"--held-out must be 0 to 1, got 1\.5"),
    "shard_mib": ({"shard_mib": 0.0}, r"--shard-mib must be 0\.001 to 1,000,000, got 0\.0"),
    "processes": ({"processes": -1}, r"--processes must be at least 0, got -1"),
    "pattern": ({"pattern": ("../*",)}, r"--pattern must be a pattern of files in INPUT, such"),
    "no match": (
        {"pattern": ("*.md",)},
        r"--pattern must be a pattern that files of .* match, got",
    ),
    "tokenizer": (
        {"tokenizer": "no.json"},
        r"--tokenizer must be an existing file, got 'no\.json'",
    ),
    "field": (
        {"field": "body"},
        r"--field must be a field of .*line 1, \['id', 'text'\], got 'body'",
    ),
}


@pytest.mark.parametrize("options, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "texts.jsonl", 3)
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "out", tmp_path / "texts", strict=True, **options)


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"INPUT must be an existing file or folder, got .*none"):
        prepared(tmp_path / "out", tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"INPUT must be one file or folder or more, got 'nothing'"
    ):
        prepared(tmp_path / "out")
    (tmp_path / "texts.jsonl").write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(
        ValueError, match=r"INPUT must hold JSON, got .*looks like gzip; decompress"
    ):
        prepared(tmp_path / "out", tmp_path / "texts.jsonl")


def test_a_folder_within_an_input_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", 3)
    for out in (tmp_path / "out", tmp_path):
        with pytest.raises(ValueError, match=r"--out must be a folder outside of every INPUT, got"):
            prepared(out, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def line(path: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, PROGRAM, str(path), "--out", str(out), *options]


@pytest.mark.slow
def test_processes_write_what_one_writes(tmp_path: Path) -> None:
    """By the program, with a tokenizer, lines cut between shards and a broken one."""
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    with path.open("a") as file:
        file.write("{\n")
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1, "blue": 2})
    options = ["--tokenizer", tokenizer, "--shard-mib", "0.005", "--held-out", "0.2"]
    prepared(tmp_path / "alone", path, tokenizer=tokenizer, shard_mib=0.005)
    spread = line(path, tmp_path / "out", *options, "--processes", "2")
    with started(spread, tmp_path) as process:
        assert process.wait() == 0, process.text
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert "skipped: INPUT must hold JSON, got " in process.text
    assert "left out: 1 broken records, 0 empty documents" in process.text
    strict = line(path, tmp_path / "strict", *options, "--processes", "2", "--strict")
    with started(strict, tmp_path, "strict") as process:
        assert process.wait() == 1
    last = process.text.splitlines()[-1]
    assert last.startswith("prepare_data.py: INPUT must hold JSON, got ") and "line 401" in last


SLOW = """
import sys, time
sys.path[:0] = {paths!r}
from launch.data import preparing
inner = preparing._fill
def slow(folder, task, stack):
    if task.number > 2:
        print("now", flush=True)
        time.sleep(600)
    inner(folder, task, stack)
preparing._fill = slow
from launch.prepare_data import main
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=lambda s: s.name,
)
def test_a_program_that_is_stopped_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    prepared(tmp_path / "unbroken", path, shard_mib=0.005)
    script = tmp_path / "slow.py"
    root = Path(TRAIN).parents[1]
    script.write_text(SLOW.format(paths=[str(root), str(root / "kernels")]))
    options = ["--shard-mib", "0.005", "--held-out", "0.2"]
    slow = [sys.executable, str(script), *line(path, tmp_path / "out", *options)[2:]]
    with started([*slow, "--processes", "1"], tmp_path) as process:
        process.wait_for("now\n")
        process.popen.send_signal(how)
        status = process.wait()
    if how == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 75
        assert "prepare_data.py: stopped; 3 of " in process.text
        assert "shards are finished, the same line goes on" in process.text
    prepared(tmp_path / "out", path, shard_mib=0.005)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_process_outlives_the_program(tmp_path: Path, how: signal.Signals) -> None:
    """Several processes, each in a shard of which they would never end."""
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    script = tmp_path / "slow.py"
    root = Path(TRAIN).parents[1]
    text = SLOW.format(paths=[str(root), str(root / "kernels")])
    # A document after the other, as stopping is asked for between them.
    text = text.replace(
        "time.sleep(600)",
        "[preparing.own_state().add(1 << 20) or time.sleep(0.1) for _ in range(6000)]",
    )
    script.write_text(text)
    options = ["--shard-mib", "0.005", "--held-out", "0.2", "--processes", "2"]
    slow = [sys.executable, str(script), *line(path, tmp_path / "out", *options)[2:]]
    with started(slow, tmp_path) as process:
        process.wait_for("now\n")
        process.popen.send_signal(how)
        process.wait()
        end = multiprocessing.get_context().Event()
        for _ in range(100):
            if not process.alive():
                break
            end.wait(0.1)
        assert not process.alive(), process.text
    with started(line(path, tmp_path / "out", *options), tmp_path) as process:
        assert process.wait() == 0, process.text
    prepared(tmp_path / "unbroken", path, shard_mib=0.005)
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 300)
    seen: list[tuple[int, int, int]] = []
    options = PrepareOptions((path,), tmp_path / "out", shard_mib=0.005, processes=1)
    prepare(options, lambda p: seen.append((p.done, p.total, p.shards_done)))
    size = path.stat().st_size
    assert seen[-1][:2] == (size, size)
    assert seen == sorted(seen)


def test_the_metadata_counts_what_there_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", 100)
    metadata = prepared(tmp_path / "out", path, shard_mib=0.005).metadata
    texts = read_all(path)
    sizes = [metadata.size_of(split) for split in ("training", "held_out")]
    assert sum(documents for documents, _ in sizes) == len(texts)
    assert sum(tokens for _, tokens in sizes) == sum(len(text.encode()) for text in texts.values())
    assert sum(shard.text_bytes for shard in metadata.shards) == sizes[0][1] + sizes[1][1]
    table = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert table["options"] == {
        "tokenizer": "bytes",
        "field": "text",
        "pattern": ["**/*.txt", "**/*.jsonl", "**/*.parquet"],
        "held-out": 0.2,
        "shard-mib": 0.005,
    }
    for shard in metadata.shards:
        for name, (size, _) in shard.files.items():
            assert size > 0, name
    assert torch.iinfo(torch.int64).max > sizes[0][1]
