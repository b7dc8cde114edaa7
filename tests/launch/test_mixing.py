"""Sources mixed by weight: which stream is of which source, memory, resumes, refusals."""

from __future__ import annotations

import math
import random
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.data.corpus import Corpus, load_corpus
from launch.data.mixing import BLOCK, MixedSplit, MixedStreams, shares
from launch.data.prepared import open_prepared
from launch.data.streams import Stream
from launch.seeds import mix_seed
from launch.settings import DataSettings, Settings, from_table, from_toml, to_toml
from launch.train import Result
from tests.distributed.ranks import RankError, Ranks
from tests.launch.checkpoints import cut
from tests.launch.common import TINY, replaced, run_training, tiny
from tests.launch.prepared import prepared
from tests.launch.test_training import assert_close, broken_off, run

RanksOf = Callable[[int], Ranks]
WEIGHTS = (3.0, 1.0, 0.5)


class Numbered:
    """Streams that say which source and which number they are of."""

    def __init__(self, source: int, per_epoch: int) -> None:
        self.source, self.per_epoch = source, per_epoch

    def __getitem__(self, index: int) -> Stream:
        tokens = torch.tensor([[self.source, index]])
        return Stream(tokens, torch.tensor([0, 2], dtype=torch.int32))


def numbered(weights: Sequence[float], seed: int = 0) -> MixedStreams:
    sources = [Numbered(at, 10**6) for at in range(len(weights))]
    return MixedStreams(sources, shares(weights, "data.weights"), seed)


@pytest.mark.parametrize(
    "weights, expected",
    [
        ((2.0,), [BLOCK]),
        ((3.0, 1.0), [7500, 2500]),
        ((1.0, 1.0, 1.0), [3334, 3333, 3333]),
        ((0.9999, 0.0001), [9999, 1]),
        ((1e308, 1e308), [5000, 5000]),
    ],
    ids=str,
)
def test_shares_add_up(weights: tuple[float, ...], expected: list[int]) -> None:
    assert shares(weights, "data.weights") == expected


def test_a_weight_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.weights\[1\] must be at least 1 / 10,000 of "):
        shares((1.0, 1e-5), "data.weights")


def test_every_stream_of_every_source_comes_once_and_in_its_share() -> None:
    streams = numbered(WEIGHTS)
    found = [streams[i].tokens[0].tolist() for i in range(2 * BLOCK)]
    counts = Counter(source for source, _ in found)
    assert [counts[at] for at in range(3)] == [2 * share for share in streams.places]
    assert len({tuple(each) for each in found}) == 2 * BLOCK
    for source in range(3):
        numbers = sorted(number for at, number in found if at == source)
        assert numbers == list(range(counts[source]))
    # Not only at the end of a block: a hundred streams are near the weights too.
    for first in range(0, 2 * BLOCK, 2500):
        few = Counter(source for source, _ in found[first : first + 500])
        assert abs(few[0] / 500 - WEIGHTS[0] / sum(WEIGHTS)) < 0.08


def test_a_stream_depends_on_nothing_but_seed_and_number() -> None:
    order = random.Random(0).sample(range(10**12), 300)
    forward, backward = numbered(WEIGHTS), numbered(WEIGHTS)
    expected = {i: forward.place_of(i) for i in order}
    assert {i: backward.place_of(i) for i in sorted(order)} == expected
    other = numbered(WEIGHTS, seed=1)
    assert sum(other.place_of(i) == expected[i] for i in order) < 10


def test_memory_does_not_grow_with_streams() -> None:
    """Sources of a trillion streams cost what those of one stream do."""
    tracemalloc.start()
    streams = MixedStreams([Numbered(at, 10**12) for at in range(3)], shares(WEIGHTS, "w"), 0)
    for index in range(0, 10**12, 10**10):
        streams.place_of(index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.fixture(scope="module")
def folders(root: Path) -> list[Path]:
    """Three prepared folders of other documents each, in shards, and one for validation."""
    made = []
    for name, share in (("a", slice(0, 30)), ("b", slice(30, 45)), ("c", slice(45, 54))):
        files = sorted((root / "documents").iterdir())[share]
        prepared(root / "mixed" / name, *files, shard_mib=0.001, held_out=0.0)
        made.append(root / "mixed" / name)
    prepared(root / "mixed" / "own", *sorted((root / "documents").iterdir())[54:])
    return made


def mixed(root: Path, folders: Sequence[Path], **overrides: dict[str, Any]) -> Settings:
    """The tiny run on several folders."""
    data = {
        "source": "prepared",
        "path": "",
        "held_out": 0.05,
        "sources": [str(folder) for folder in folders],
        "weights": list(WEIGHTS[: len(folders)]),
        "validation_path": str(root / "mixed" / "own"),
        "length": 100,
    }
    overrides["data"] = {**data, **overrides.get("data", {})}
    table = {section: dict(options) for section, options in TINY.items()}
    for section, options in overrides.items():
        table.setdefault(section, {}).update(options)
    return from_table(Settings, table)


def corpus_of(settings: Settings) -> Corpus:
    return load_corpus(settings.data)


def test_streams_are_those_of_the_sources(root: Path, folders: list[Path]) -> None:
    settings = mixed(root, folders)
    streams = corpus_of(settings).training.streams(100, seed=5)
    assert isinstance(streams, MixedStreams)
    alone = [
        open_prepared(str(folder), "path").split("training").streams(100, mix_seed(5, "source", at))
        for at, folder in enumerate(folders)
    ]
    seen = set()
    for index in range(40):
        source, number = streams.place_of(index)
        found, expected = streams[index], alone[source][number]
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
        seen.add(source)
    assert seen == {0, 1, 2}


def test_frequencies_are_those_of_the_mixture(root: Path, folders: list[Path]) -> None:
    training = corpus_of(mixed(root, folders)).training
    assert isinstance(training, MixedSplit)
    splits = [open_prepared(str(folder), "path").split("training") for folder in folders]
    assert training.num_tokens == sum(split.num_tokens for split in splits)
    assert training.num_documents == sum(split.num_documents for split in splits) == 54
    found = training.counts(256)
    assert math.isclose(float(found.sum()), training.num_tokens, rel_tol=1e-12)
    expected: Tensor = sum(  # type: ignore[assignment]
        weight / sum(WEIGHTS) * split.counts(256) / split.num_tokens
        for weight, split in zip(WEIGHTS, splits, strict=True)
    )
    assert torch.allclose(found / found.sum(), expected, atol=1e-4)


@pytest.fixture(scope="module")
def unbroken(ranks_of: RanksOf, root: Path, folders: list[Path]) -> tuple[Settings, Result]:
    """A run of two ranks with a checkpoint half way."""
    options = {"steps": 10, "checkpoint_every": 5, "keep_checkpoints": 0}
    options |= {"folder": str(root / "mixed-run")}
    settings = mixed(root, folders, parallel={"cp": 2}, run=options)
    return settings, run(ranks_of(2), settings)


@pytest.mark.parametrize(
    "size, cp",
    [
        pytest.param(2, 2, id="the same"),
        pytest.param(1, 1, id="dp1_cp1"),
        pytest.param(4, 2, id="dp2_cp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_any_ranks(
    ranks_of: RanksOf, root: Path, unbroken: tuple[Settings, Result], size: int, cp: int
) -> None:
    """Of prepared folders, mixed: each is read on from where the checkpoint left it."""
    settings, expected = unbroken
    settings = broken_off(settings, root, f"mixed-resumed-{size}")
    result = run(ranks_of(size), replaced(settings, "parallel", cp=cp))
    if size == 2:
        assert result.losses == expected.losses[5:]
        assert result.validation_loss == expected.validation_loss
    assert_close(result.losses, expected.losses[5:], 1e-10)
    assert math.isclose(result.validation_loss, expected.validation_loss, rel_tol=1e-10)
    assert expected.losses[-1] < expected.losses[0]


def test_another_mixture_is_refused_when_resumed(
    ranks_of: RanksOf, root: Path, folders: list[Path], unbroken: tuple[Settings, Result]
) -> None:
    resumed = replaced(unbroken[0], "run", resume=True)
    moved = root / "mixed" / "moved"
    shutil.copytree(folders[0], moved)
    sources = resumed.data.sources
    for change, message in (
        ({"weights": (1.0, 1.0, 1.0)}, r"data\.weights must be \(3\.0, 1\.0, 0\.5\), the check"),
        ({"sources": sources[::-1]}, r"data\.sources must give the checkpoint's tokens"),
    ):
        with pytest.raises(RankError, match=message):
            ranks_of(2).run(run_training, replaced(resumed, "data", **change))
    # The same documents elsewhere are the same data.
    same = replaced(resumed, "data", sources=(str(moved), *sources[1:]))
    assert corpus_of(same).digest == corpus_of(resumed).digest


@pytest.mark.parametrize("kind", ["cut", "missing", "unfinished", "empty", "short", "vocabulary"])
def test_a_bad_source_is_named(root: Path, folders: list[Path], tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folders[1], bad)
    option = r"data\.sources\[1\] must be"
    message = rf"{option} a whole prepared folder, got '{bad}': "
    if kind == "cut":
        cut(next(bad.rglob("training.tokens")))
        message += r"shards/.*/training\.tokens has .* bytes, .* in prepared\.json"
    elif kind == "missing":
        next(bad.rglob("training.tokens")).unlink()
        message += r"shards/.*/training\.tokens is missing"
    elif kind == "unfinished":
        (bad / "prepared.json").unlink()
        message = rf"{option} a folder that prepare_data\.py wrote, got '{bad}': prepared\.json is"
    elif kind == "empty":
        shutil.rmtree(bad)
        # All of its documents are held out.
        prepared(bad, *sorted((root / "documents").iterdir())[:2], held_out=0.999999)
        message = rf"{option} a folder with a stream of .* \(0 documents, 0 tokens\), got '{bad}'"
    elif kind == "short":
        shutil.rmtree(bad)
        (tmp_path / "one.txt").write_text("few words")
        prepared(bad, tmp_path / "one.txt", held_out=0.0)
        message = rf"{option} a folder with a stream of data\.length = 100 tokens .* \(1 doc"
    else:
        tokenizers = pytest.importorskip("tokenizers")
        words = {"[unk]": 0, "red": 1, "green": 2}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[unk]"))
        tokenizer.save(str(tmp_path / "words.json"))
        shutil.rmtree(bad)
        files = sorted((root / "documents").iterdir())[:20]
        prepared(bad, *files, tokenizer=str(tmp_path / "words.json"))
        message = rf"{option} a folder that was prepared with the tokenizer of data\.sources\[0\]"
    with pytest.raises(ValueError, match=f"^{message}"):
        corpus_of(mixed(root, [folders[0], bad]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": ()}, r"data\.weights must be 2 numbers, one for each of data\.sources, got"),
        ({"weights": (1.0, 0.0)}, r"data\.weights\[1\] must be a positive number, got 0"),
        ({"weights": (1.0, math.nan)}, r"data\.weights\[1\] must be a finite number, got nan"),
        ({"sources": ()}, r"data\.weights must be empty without data\.sources, got"),
        ({"sources": ("a", "")}, r"data\.sources\[1\] must be the path of a prepared folder, got"),
        (
            {"sources": ("a", "a")},
            r"data\.sources\[1\] must be different from all .* 'a'",
        ),
        ({"sources": ("a", "b\0")}, r"data\.sources\[1\] must be text without NUL, got"),
        ({"path": "c"}, r"data\.path must be empty with data\.sources, .*, got 'c'"),
        ({"validation_path": ""}, r"data\.validation_path must be a prepared folder with data\.s"),
        ({"source": "folder"}, r"data\.sources must be empty unless data\.source = 'prepared'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sources_and_weights_belong_together(change: dict[str, Any], message: str) -> None:
    right = DataSettings(
        source="prepared", sources=("a", "b"), weights=(3.0, 1.0), validation_path="c"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(right, **change)


def test_settings_survive_a_round_trip(root: Path, tmp_path: Path) -> None:
    settings = mixed(root, [tmp_path / "a", tmp_path / "b"])
    path = tmp_path / "run.toml"
    path.write_text(to_toml(settings))
    assert from_toml(path) == settings
    assert from_toml(path).data.weights == (3.0, 1.0)
    assert tiny(root).data.sources == ()
