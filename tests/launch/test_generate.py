"""Text from a checkpoint: what full forwards give, streamed, drawn as asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import generate as program
from launch.data.tokenizer import ByteTokenizer
from launch.generate import GenerateOptions, Stream, main, run
from launch.loading import alone, load
from tests.launch.trained import KINDS, settings_of, write_run

pytest.importorskip("transformers")
PROMPT = "red green blue window block " * 2


def made(folder: Path, **options: Any) -> str:
    pieces: list[str] = []
    text = run(
        GenerateOptions(folder, **{"prompt": PROMPT, **options}), pieces.append, lambda _: None
    )
    assert "".join(pieces) == text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_full_forwards(root: Path, tmp_path: Path, kind: str) -> None:
    write_run(tmp_path, settings_of(root, kind))
    text = made(tmp_path, max_new_tokens=24, temperature=0, dtype="float64")
    with alone():
        model = load(tmp_path).decoder("cpu", "float64")
    tokens = list(PROMPT.encode())
    for _ in range(24):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    expected = bytes(tokens[len(PROMPT) :]).decode(errors="replace")
    assert text == expected


def test_draws_follow_the_seed_and_the_options(root: Path, tmp_path: Path) -> None:
    write_run(tmp_path, settings_of(root, "shared"))
    greedy = made(tmp_path, max_new_tokens=20, temperature=0)
    drawn = [made(tmp_path, max_new_tokens=20, temperature=2.0, seed=seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    # Each of these leaves the likeliest token alone.
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}):
        assert made(tmp_path, max_new_tokens=20, seed=5, **options) == greedy
    assert made(tmp_path, max_new_tokens=20, temperature=0, repetition_penalty=9.0) != greedy


def test_a_stop_ends_the_text(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, settings_of(root, "nsa"))
    whole = made(tmp_path, max_new_tokens=40, temperature=0)
    stop = whole[9:11]
    expected = whole[: whole.index(stop) + 2]
    asked: list[int] = []
    original = program.generate

    def counted(*arguments: Any) -> Any:
        tokens = original(*arguments)
        asked.append(tokens.numel())
        return tokens

    monkeypatch.setattr(program, "generate", counted)
    assert made(tmp_path, max_new_tokens=40, temperature=0, stop=("never", stop)) == expected
    assert asked[0] < 40


def test_a_stream_waits_for_whole_characters_and_tells_all() -> None:
    text = "naïve 😀 " * 60
    prompt, pieces = "é".encode(), []
    stream = Stream(ByteTokenizer(), list(prompt), pieces.append)
    stream.put(torch.tensor(list(prompt)))
    for token in text.encode():
        stream.put(torch.tensor([token]))
    stream.put(torch.tensor([0xC3]))
    assert "".join(pieces) == text
    stream.end()
    assert "".join(pieces) == stream.text == text + "\ufffd"
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_a_stop_may_come_in_pieces() -> None:
    stream = Stream(ByteTokenizer(), [1], lambda _: None, stops=("END", "ND x"))
    for token in b"\x01" + b"to the END x":
        stream.put(torch.tensor([token]))
    assert (stream.text, stream.ended) == ("to the END", True)


WRONG = {
    "--prompt x --prompt-file y": r"prompt, prompt_file must be some text in one of the two",
    "": r"prompt, prompt_file must be some text in one of the two",
    "--prompt x --max-new-tokens 0": r"max_new_tokens must be at least 1, got 0",
    "--prompt x --temperature nan": r"temperature must be from 0\.0 to 1000000\.0, got nan",
    "--prompt x --top-p 0": r"top_p must be above 0 and at most 1, got 0\.0",
    "--prompt x --temperature 0 --top-k 4": r"top_k must be 0 with temperature = 0, got 4",
    "--prompt-file nothing": r"prompt_file must be a file that can be read, or -, got 'nothing'",
    "--prompt x --dtype float16": r"invalid choice|float16",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_ends_in_one_sentence(
    line: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, settings_of(root, "nsa"))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *line.split()])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert re.search(WRONG[line], captured.err)
    assert "Traceback" not in captured.err and not captured.out


def test_one_process_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    write_run(tmp_path, settings_of(root, "nsa"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE must be 1: this program is one process, got"):
        made(tmp_path)


@pytest.mark.slow
def test_standard_output_is_the_text_alone(root: Path, tmp_path: Path) -> None:
    """By the program, with the prompt on standard input; and a reader that has enough."""
    write_run(tmp_path, settings_of(root, "nsa"))
    text = made(tmp_path, max_new_tokens=30)
    line = [sys.executable, program.__file__, str(tmp_path), "--prompt-file", "-"]
    line += ["--max-new-tokens", "30"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(line, input=PROMPT.encode(), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == text + "\n"
    assert b"step 3 of" in done.stderr
    quoted = " ".join(line[:-2])
    shell = f"printf abc | {quoted} --max-new-tokens 300 | head -c 3"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, env=environment)
    assert len(done.stdout) == 3
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr
