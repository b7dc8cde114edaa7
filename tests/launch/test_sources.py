"""Documents as they are found, and everything that keeps one from being read."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.data.corpus import load_corpus
from launch.data.sources import find_files, read_documents
from launch.settings import DataSettings


def read_folder(path: Path, pattern: str = "**/*.txt", tokenizer: str = "bytes") -> list[str]:
    """The names of the documents."""
    settings = DataSettings(source="folder", path=str(path), pattern=pattern, tokenizer=tokenizer)
    return [name for name, _ in read_documents(settings)]


def read_lines(path: Path) -> list[tuple[str, bytes]]:
    return list(read_documents(DataSettings(source="jsonl", path=str(path))))


def test_a_folder_gives_its_matching_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/x.txt": "one", "a.txt": "two", "c.md": "no", "empty.txt": ""}.items():
        (tmp_path / name).write_text(text)
    found = list(read_documents(DataSettings(source="folder", path=str(tmp_path))))
    assert found == [("a.txt", b"two"), ("b/x.txt", b"one"), ("empty.txt", b"")]


def test_jsonl_gives_one_field_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"body": "één"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    settings = DataSettings(source="jsonl", path=str(path), field="body")
    found = list(read_documents(settings))
    assert found == [("texts.jsonl:1", "één".encode()), ("texts.jsonl:3", b"two")]
    with pytest.raises(
        ValueError, match=r"data\.field must be a field of .*line 1, \['body'\], got 'text'"
    ):
        list(read_documents(DataSettings(source="jsonl", path=str(path))))
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"data\.path must hold JSON, got .*line 1 "):
        list(read_documents(settings))


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "lone surrogate": (rb'{"text": "a\ud800b"}', r"'text', got a lone surrogate, \\ud800, at .* 2"),
    "byte that is not UTF-8": (
        b'{"text": "a\xffb"}',
        r"JSON in UTF-8, got byte 0xff in .* column 12$",
    ),
    "surrogate in UTF-8's form": (b'{"text": "\xed\xa0\x80"}', "JSON in UTF-8, got byte 0xed in"),
    "Latin-1 in another field": (b'{"text": "a", "by": "\xe9"}', "JSON in UTF-8, got byte 0xe9 in"),
    "null": (b'{"text": null}', "text in the field 'text', got null in"),
    "number": (b'{"text": 3}', "text in the field 'text', got a number in"),
    "truth value": (b'{"text": true}', "text in the field 'text', got a truth value in"),
    "list": (b'{"text": ["a"]}', "text in the field 'text', got a list in"),
    "object": (b'{"text": {"text": "a"}}', "text in the field 'text', got an object in"),
    "line of text": (b'"text"', "objects with the field 'text', got text in"),
    "line of null": (b"null", "objects with the field 'text', got null in"),
    "array around all": (b'[{"text": "a"}]', "objects with the field 'text', got a list in"),
    "deep nesting": (
        b'{"text": "a", "more": ' + b"[" * 100_000,
        "flat objects, got deep nesting in",
    ),
    "cut line": (b'{"text": "a', r"JSON, got .* column 12 \(Invalid control character\)$"),
    "zeros of a hole in the file": (b"\0" * 40, r"JSON, got .* column 1 \(Expecting value\)$"),
    "mark in the middle": (b'\xef\xbb\xbf{"text": "a"}', r"JSON, got .* \(Unexpected UTF-8 BOM"),
    "control character": (
        b'{"text": "a\x01"}',
        r"JSON, got .* column 12 \(Invalid control character",
    ),
}


@pytest.mark.parametrize("line, found", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: bytes, found: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(GOOD + b"\r\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError) as error:
        read_lines(path)
    words = str(error.value)
    assert words.startswith("data.path must hold ") and f"{path} line 4" in words
    assert found in words or re.search(found, words)
    assert "\n" not in words
    words.encode()


def test_of_many_fields_some_are_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({f"key{i:04}": i for i in range(5000)}))
    with pytest.raises(ValueError, match=r"'key0009'\] and 4990 more, got "):
        read_lines(path)


def test_documents_without_a_target_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n' * 50)
    settings = DataSettings(source="jsonl", path=str(path), held_out=0.2)
    with pytest.raises(ValueError, match=r"data\.path must be documents of two tokens or more"):
        load_corpus(settings)


GOOD_FILES = {
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "carriage returns and line feeds": b'{"text": "good"}\r\n',
    "no end of the last line": b'{"text": "good"}',
    "huge number beside it": b'{"text": "good", "id": ' + b"9" * 5000 + b"}\n",
    "not a number beside it": b'{"text": "good", "score": NaN}\n',
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES.keys())
def test_what_other_programs_write_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    assert read_lines(path) == [("texts.jsonl:1", b"good")]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["a\u2028b\u0085c", "\U0001f600", "\x00\x7f"]
    path.write_bytes("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode())
    assert read_lines(path) == [
        (f"texts.jsonl:{i}", text.encode()) for i, text in enumerate(texts, 1)
    ]


BINARY = {
    "gzip": gzip.compress(GOOD),
    "zstd": b"\x28\xb5\x2f\xfd\x04\x00",
    "Parquet": b"PAR1\x15\x04",
    "UTF-16": '{"text": "a"}\n'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", BINARY)
def test_a_file_that_is_no_text_is_told_with_its_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(BINARY[kind])
    with pytest.raises(
        ValueError, match=rf"data\.path must hold .*, got .*texts\.txt.*looks like {kind}; "
    ):
        read_lines(path)


def test_text_for_a_tokenizer_is_utf8(tmp_path: Path) -> None:
    """Bytes are any; other tokenizers read text."""
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    assert read_folder(tmp_path) == ["a.txt"]
    with pytest.raises(
        ValueError, match=r"data\.path must hold text in UTF-8 .*, got byte 0xff in .*a\.txt line 3"
    ):
        read_folder(tmp_path, tokenizer="words.json")
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"one"))
    with pytest.raises(ValueError, match=r"UTF-8 .*, got .*a\.txt line 1; it looks like gzip"):
        read_folder(tmp_path, tokenizer="words.json")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    "make, found",
    [
        (link_to_nothing, "must hold files, got a broken link"),
        (link_to_itself, "must hold files, got a broken link"),
        (os.mkfifo, "must hold files, got a pipe, socket or device"),
        (listening_socket, "must hold files, got a pipe, socket or device"),
    ],
)
def test_what_is_no_file_is_refused_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], found: str
) -> None:
    monkeypatch.chdir(tmp_path)  # The path of a socket is short.
    Path("a.txt").write_text("one")
    make(Path("b.txt"))
    with pytest.raises(ValueError, match=r"data\.path must hold files, got .*: b\.txt") as error:
        read_folder(Path("."))
    assert found in str(error.value)
    # What the pattern leaves out does not matter.
    assert read_folder(Path("."), "a*") == ["a.txt"]
    with pytest.raises(ValueError, match=r"data\.path must "):
        read_lines(Path("b.txt"))


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with open(os.fsencode(tmp_path) + b"/b\xff.txt", "wb") as file:
        file.write(b"two")
    with pytest.raises(
        ValueError, match=r"data\.path must hold files with names in UTF-8.*, got .*b\\udcff\.txt'"
    ):
        read_folder(tmp_path)
    assert read_folder(tmp_path, "a*") == ["a.txt"]


def test_a_line_break_in_a_name_does_not_break_the_error(tmp_path: Path) -> None:
    (tmp_path / "a\nb.txt").write_bytes(b"\xff")
    assert read_folder(tmp_path) == ["a\nb.txt"]
    with pytest.raises(ValueError, match=r"UTF-8 .*, got .*a\\nb\.txt' line 1"):
        read_folder(tmp_path, tokenizer="words.json")


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders too: a glob of pathlib passes over them. Root may read everything: pretend."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    scandir, read_bytes = os.scandir, Path.read_bytes

    def refuse(path: Path, name: str) -> None:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_scandir(path: Path) -> object:
        refuse(path, "closed")
        return scandir(path)

    def guarded_read(path: Path) -> bytes:
        refuse(path, "b.txt")
        return read_bytes(path)

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    with pytest.raises(
        ValueError, match=r"data\.path must be .*, got .*closed \(Permission denied"
    ):
        read_folder(tmp_path)
    assert read_folder(tmp_path, "*.txt") == ["b.txt"]
    monkeypatch.setattr(Path, "read_bytes", guarded_read)
    with pytest.raises(
        ValueError, match=r"data\.path must be .*, got .*b\.txt \(Permission denied"
    ):
        read_folder(tmp_path, "*.txt")


@pytest.mark.parametrize(
    "pattern",
    ["../*", "..", "a/../../*", "**/../x", "/etc/*", "", ".", "/", "**x", "a/b**/c", "a\0b"],
    ids=repr,
)
def test_patterns_that_are_none_or_leave_the_folder_are_refused(
    tmp_path: Path, pattern: str
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.txt").write_text("one")
    (tmp_path / "outside.txt").write_text("two")
    with pytest.raises(ValueError, match=r"data\.pattern must be (a pattern|text without NUL)"):
        read_folder(tmp_path / "inside", pattern)


def test_patterns_match_what_they_say(tmp_path: Path) -> None:
    for name in ("a.txt", "b/a.txt", "b/c/a.txt", "b/.c/.d.txt", "b/c/x.md", "B.txt", "b/[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    for pattern in ("**/*.txt", "*.txt", "b/*", "b/**/*.txt", "*/c/?.txt", "**/c/*", "./b/a.txt"):
        expected = [p.relative_to(tmp_path).as_posix() for p in tmp_path.glob(pattern)]
        expected = sorted({name for name in expected if (tmp_path / name).is_file()})
        assert read_folder(tmp_path, pattern) == expected, pattern
        assert expected
    assert len(read_folder(tmp_path, "**")) == 7
    assert read_folder(tmp_path, "**/**/*.txt") == read_folder(tmp_path, "**/*.txt")
    assert read_folder(tmp_path, "b/[[]x].txt") == ["b/[x].txt"]
    with pytest.raises(
        ValueError, match=r"data\.pattern must be a pattern that files of .*, got '\*\.csv'"
    ):
        read_folder(tmp_path, "*.csv")


def test_links_to_files_are_read_and_linked_folders_where_they_are_named(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "a.txt").write_text("one")
    (inside / "link.txt").symlink_to(outside / "a.txt")
    (inside / "linked").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    assert read_folder(inside) == ["link.txt"]
    assert read_folder(inside, "linked/*.txt") == ["linked/a.txt"]


def test_a_deep_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    assert list(find_files(tmp_path, "**/*.txt")) == ["d/" * 300 + "a.txt"]


@pytest.mark.parametrize("source", ["folder", "jsonl"])
def test_a_path_that_is_not_there_or_of_another_kind_is_refused(
    tmp_path: Path, source: str
) -> None:
    (tmp_path / "file").write_text("one")
    other = tmp_path if source == "jsonl" else tmp_path / "file"
    for path in (tmp_path / "none", other, Path("/dev/null")):
        settings = DataSettings(source=source, path=str(path))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"data\.path must be a .*'{source}'.*, got '{path}'"):
            list(read_documents(settings))
