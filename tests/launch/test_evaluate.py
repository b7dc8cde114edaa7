"""What is judged: texts of the asked length with what they ask for in them, answers and losses as
full forwards give them, files that say it."""

from __future__ import annotations

import csv
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch.data.tokenizer import ByteTokenizer
from launch.evaluate import EvaluateOptions, main, run
from launch.evaluation import tasks
from launch.evaluation.judge import answer, by_position, choices, losses
from launch.loading import alone, load
from launch.reporting.pictures import curves, heat_map, shade
from nsa_dist import distill_dense
from tests.launch.trained import KINDS, settings_of, write_run

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
SENTENCES = tasks.filler_sentences()


def encode(text: str) -> list[int]:
    return list(text.encode())


def text_of(example: tasks.Example) -> str:
    return bytes(example.tokens).decode()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [400, 1037])
def test_a_needle_lies_where_it_was_asked_for(length: int, depth: float) -> None:
    make = tasks.needle
    example = make(encode, length, depth, random.Random(1), count=3, sentences=SENTENCES)
    text = text_of(example)
    assert len(example.tokens) + len(encode(example.reply)) == length
    found = re.findall(r"The magic number of (\S+) is (\d+)\. ", text)
    (asked,) = re.findall(r"\nThe magic number of (\S+) is$", text)
    assert len(found) == 3 and dict(found)[asked] == example.answers[0] == example.reply[1:]
    place = text.index(f"{asked} is {example.answers[0]}") / length
    # A sentence, the other needles and the question stand on either side of it.
    assert abs(place - depth) < 200 / length


def test_variables_follow_a_chain() -> None:
    example = tasks.variables(encode, 1500, random.Random(2), SENTENCES)
    text = text_of(example)
    assert len(example.tokens) + len(encode(example.reply)) == 1500
    *_, value = re.findall(r"All variables that have the value (\d+) are:", text)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\. ", text):
        values[name] = values.get(source, source)  # A name is defined before it is used.
    holders = [name for name, held in values.items() if held == value]
    assert tuple(holders) == example.answers
    assert example.reply == " " + " ".join(holders)


def test_common_words_are_the_commonest() -> None:
    for length in (8000, 1500):
        example = tasks.common_words(encode, length, random.Random(3))
        text = text_of(example)
        assert length - 100 < len(example.tokens) + len(encode(example.reply)) <= length
        listed = text.split("are:")[1].split("\nThe ten")[0]
        words = re.findall(r"\d+\. ([a-z]+) ", listed)
        counts = {word: words.count(word) for word in set(words)}
        often = sorted(counts, key=lambda word: -counts[word])
        assert set(often[:10]) == set(example.answers)
        assert counts[often[9]] in tasks.COMMON_TIMES and counts[often[10]] == 3


def test_frequent_words_are_the_most_frequent() -> None:
    example = tasks.frequent_words(encode, 3000, random.Random(4))
    words = text_of(example).split("\n")[0].split()
    counts = {word: words.count(word) for word in set(words)}
    assert tuple(sorted(counts, key=lambda word: -counts[word])[:3]) == example.answers
    assert 2900 < len(example.tokens) + len(encode(example.reply)) <= 3000


def test_texts_follow_the_seed_and_tell_a_length_that_is_too_short() -> None:
    for make in (
        lambda length, rng: tasks.needle(encode, length, 0.5, rng, count=2, sentences=SENTENCES),
        lambda length, rng: tasks.variables(encode, length, rng, SENTENCES),
        lambda length, rng: tasks.common_words(encode, length, rng),
        lambda length, rng: tasks.frequent_words(encode, length, rng),
    ):
        one, same, other = (make(2000, random.Random(seed)) for seed in (1, 1, 2))
        assert one == same != other
        with pytest.raises(tasks.TooShortError, match=r"lengths must be at least \d+ tokens more"):
            make(60, random.Random(1))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_losses_are_those_of_full_forwards(
    root: Path, tmp_path: Path, kind: str
) -> None:
    write_run(tmp_path, settings_of(root, kind))
    with alone():
        trained = load(tmp_path)
    decoder = trained.decoder("cpu", "float64")
    model = trained.transformers("cpu", "float64")
    rng = random.Random(5)
    example = tasks.needle(encode, 200, 0.5, rng, count=1, sentences=SENTENCES)
    tokens = list(example.tokens)
    reply = encode(example.reply)
    for _ in range(len(reply)):
        tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    own = ByteTokenizer().decode(tokens[len(example.tokens) :])
    expected = tasks.Example(example.tokens, (own, example.answers[0]), example.reply)
    found = answer(model, expected, reply, ByteTokenizer().decode)
    assert found.text.startswith(own)
    assert found.score == 0.5
    whole = torch.tensor([example.tokens + reply])
    each = F.cross_entropy(decoder(whole)[0, :-1], whole[0, 1:], reduction="none")
    assert math.isclose(found.loss, each[-len(reply) :].mean(), rel_tol=1e-5)
    torch.testing.assert_close(losses(model, whole[0]), each, rtol=1e-5, atol=1e-6)


def test_choices_are_those_of_training(root: Path, tmp_path: Path) -> None:
    """The model of transformers attends as the decoder does, layer by layer."""
    write_run(tmp_path, settings_of(root, "hybrid"))
    with alone():
        trained = load(tmp_path)
    tokens = torch.randint(256, (300,))
    found = choices(trained.transformers("cpu", "float64"), tokens)
    with torch.no_grad(), distill_dense() as expected:
        trained.decoder("cpu", "float64")(tokens[None])
    assert len(found) == len(expected.layers) == 2
    for ours, theirs in zip(found, expected.layers, strict=True):
        for name in ("choice", "output", "captured", "best"):
            assert math.isclose(getattr(ours, name), getattr(theirs, name), rel_tol=1e-5), name


def test_losses_are_averaged_by_position() -> None:
    first, second = torch.arange(1.0, 8).double(), torch.arange(1.0, 4).double()
    spans = by_position([first, second])
    assert [(s.first, s.last, s.targets) for s in spans] == [(1, 1, 2), (2, 3, 4), (4, 7, 4)]
    assert [s.loss for s in spans] == [1.0, 2.5, 5.5]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_is_judged_into_files(root: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", settings_of(root, "hybrid"))
    said: list[str] = []
    options: dict[str, Any] = {"lengths": (160, 600), "depths": (0.0, 1.0), "samples": 1}
    out = tmp_path / "out"
    run(EvaluateOptions(tmp_path / "run", out=out, **options), said.append)
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{end}"
        for name in ("loss", "needle", "multi_needle", "ruler")
        for end in ("csv", "png")
    } | {"choice.csv"}
    for path in out.glob("*.png"):
        assert Image.open(path).size > (200, 100)
    found = rows(out / "needle.csv")
    assert [(r["length"], r["depth"]) for r in found] == [
        ("160", "0"),
        ("160", "1"),
        ("600", "0"),
        ("600", "1"),
    ]
    assert all(0 <= float(r["found"]) <= 1 and float(r["loss"]) > 0 for r in found)
    by_task = {(r["task"], r["length"]): r["loss"] for r in rows(out / "ruler.csv")}
    assert by_task["common_words", "600"] == "" != by_task["variables", "600"]
    told = "common_words, length 600: left out (lengths must be at least"
    assert any(line.startswith(told) for line in said)
    spans = rows(out / "loss.csv")
    assert [row["context_from"] for row in spans][:3] == ["1", "2", "4"]
    chosen = rows(out / "choice.csv")
    assert [row["layer"] for row in chosen] == ["0", "2"]
    assert all(0 < float(row["captured"]) < float(row["best"]) < 1 for row in chosen)
    # The held-out documents are the corpus's: none is cut, as 600 is more than the longest.
    assert int(spans[0]["targets"]) <= 11


def test_documents_and_haystack_of_the_users(root: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", settings_of(root, "dense"))
    text = tmp_path / "text.txt"
    text.write_text("one line\nanother\n" * 30)
    said: list[str] = []
    options = EvaluateOptions(
        tmp_path / "run",
        tasks=("loss", "choice", "needle"),
        lengths=(150,),
        depths=(0.5,),
        text=(text,),
        haystack=text,
        samples=1,
        out=tmp_path / "out",
    )
    run(options, said.append)
    size = len(text.read_bytes())
    assert sum(int(row["targets"]) for row in rows(tmp_path / "out" / "loss.csv")) == size - 4
    assert "on 4 documents" in said[1]
    assert said[2] == "choice: left out (no layer selects blocks)"


def test_a_heat_map_has_the_colour_of_each_value(tmp_path: Path) -> None:
    values = [[0.0, 1.0], [0.5, math.nan]]
    path = tmp_path / "map.png"
    heat_map(path, values, ["a", "b"], ["c", "d"], title="t", names=("rows", "columns"))
    colours = {colour for _, colour in Image.open(path).getcolors(1 << 20)}
    assert {shade(value) for row in values for value in row} <= colours
    curves(path, {"x": [(1, 2.0), (8, math.nan), (64, 1.0)]}, title="t", names=("a", "b"))
    curves(path, {"x": [(4, 2.0)], "none": []}, title="t", names=("a", "b"))


WRONG = {
    "--samples 0": r"samples must be at least 1, got 0",
    "--depths 1.5": r"depths must be from 0 to 1, got 1\.5",
    "--lengths 1": r"lengths must be at least 2, got 1",
    "--needles 1": r"needles must be at least 2",
    "--text nothing": r"text, haystack must be existing files, got 'nothing'",
    "--tasks all": r"invalid choice|all",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_ends_in_one_sentence(
    line: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *line.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(WRONG[line], error) and "Traceback" not in error
