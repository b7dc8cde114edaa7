"""Reading prepared folders: streams, their order, memory, and damage."""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import local
from launch.data import prepared as module
from launch.data.corpus import Corpus, PackedStreams, load_corpus, load_tokenizer, unigram_loss
from launch.data.permutation import Permutation
from launch.data.prepared import PreparedSplit, open_prepared
from launch.data.preparing import PrepareOptions, prepare
from launch.data.sources import read_documents
from launch.data.streams import Split
from launch.data.tokenizer import ByteTokenizer
from launch.prepare_data import summarise
from launch.settings import DataSettings
from tests.launch.checkpoints import cut, flip
from tests.launch.prepared import prepared, write_jsonl
from tests.launch.test_data import words_json

SMALL = 0.004
"""MiB of a shard: some documents."""


def settings(path: Path, **options: Any) -> DataSettings:
    return DataSettings(source="prepared", path=str(path), **options)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 documents."""
    return write_jsonl(tmp_path_factory.mktemp("lines") / "texts.jsonl", 300)


@pytest.fixture(scope="module")
def in_memory(lines: Path) -> Corpus:
    return load_corpus(DataSettings(source="jsonl", path=str(lines), held_out=0.2))


@pytest.fixture(scope="module")
def folder(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents prepared, in some shards."""
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    result = prepared(folder, lines, shard_mib=SMALL)
    assert len(result.metadata.shards) > 8
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def splits(corpus: Corpus) -> tuple[Split, Split]:
    return corpus.training, corpus.held_out


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_a_permutation_holds_every_item_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        order = [Permutation(size, key)[i] for i in range(size)]
        assert sorted(order) == list(range(size))
    if size > 20:
        assert order != [Permutation(size, 0)[i] for i in range(size)]


def test_a_permutation_of_most_items_is_within_them() -> None:
    size = 2**63 - 25
    found = [Permutation(size, 3)[i] for i in (0, 1, 2, size - 1)]
    assert all(0 <= item < size for item in found) and len(set(found)) == 4
    assert max(found) > 2**59
    with pytest.raises(IndexError):
        Permutation(size, 3)[size]


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_every_item_is_as_likely_at_every_place(size: int) -> None:
    """Within five standard deviations of the binomial distribution."""
    keys = 4000
    counts = collections.Counter(
        (place, Permutation(size, key)[place]) for key in range(keys) for place in range(size)
    )
    expected, deviation = keys / size, (keys / size * (1 - 1 / size)) ** 0.5
    for place, item in itertools.product(range(size), repeat=2):
        assert abs(counts[place, item] - expected) < 5 * deviation, (place, item)


def test_the_same_documents_come_back(folder: Path, in_memory: Corpus) -> None:
    """Names, sides, tokens and counts are those in memory."""
    corpus = load_corpus(settings(folder))
    for found, expected in zip(splits(corpus), splits(in_memory), strict=True):
        assert isinstance(found, PreparedSplit) and not isinstance(expected, PreparedSplit)
        assert found.num_documents == expected.num_documents > 40
        assert found.num_tokens == expected.num_tokens
        for at, name in enumerate(expected.names):  # type: ignore[attr-defined]
            start, stop = expected.starts[at : at + 2]  # type: ignore[attr-defined]
            document = found.document(at)
            assert document[0] == name
            assert torch.equal(document[1], expected.tokens[start:stop].to(torch.int64))  # type: ignore[attr-defined]
    counts = corpus.training.counts(256)
    assert torch.equal(counts, in_memory.training.counts(256))
    assert counts.dtype == torch.float64


def test_the_tokenizer_of_a_run_is_the_folders(folder: Path, tmp_path: Path, lines: Path) -> None:
    assert load_tokenizer(settings(folder)).vocab_size == 256
    words = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1, "blue": 2})
    prepared(tmp_path / "out", lines, tokenizer=words)
    assert load_tokenizer(settings(tmp_path / "out")).vocab_size == 3
    assert load_tokenizer(DataSettings(tokenizer=words)).vocab_size == 3


@pytest.mark.parametrize("length", [2, 37, 64, 1000, 9000])
def test_both_forms_give_the_same_streams_in_file_order(
    folder: Path, in_memory: Corpus, length: int
) -> None:
    """Streams within a shard, at its end, and over several."""
    corpus = load_corpus(settings(folder))
    for found, expected in zip(splits(corpus), splits(in_memory), strict=True):
        if expected.num_tokens < length:
            continue
        ours, theirs = found.streams(length, None), expected.streams(length, None)
        assert ours.per_epoch == theirs.per_epoch
        for index in (*range(min(ours.per_epoch, 60)), ours.per_epoch - 1, ours.per_epoch):
            stream, other = ours[index], theirs[index]
            assert torch.equal(stream.tokens, other.tokens)
            assert torch.equal(stream.cu_seqlens, other.cu_seqlens)
            assert stream.tokens.dtype == torch.int64
            assert stream.cu_seqlens.dtype == torch.int32
    held_out = [corpus.held_out.streams(37, None)[3]]
    assert unigram_loss(corpus.training, held_out, 256) == unigram_loss(
        in_memory.training, [in_memory.held_out.streams(37, None)[3]], 256
    )


def test_a_folder_of_texts_gives_its_streams_too(root: Path, tmp_path: Path) -> None:
    text = DataSettings(source="folder", path=str(root / "documents"), held_out=0.2)
    prepared(tmp_path / "out", root / "documents", shard_mib=SMALL)
    corpus = load_corpus(settings(tmp_path / "out"))
    for found, expected in zip(splits(corpus), splits(load_corpus(text)), strict=True):
        ours, theirs = found.streams(150, None), expected.streams(150, None)
        for index in range(ours.per_epoch):
            assert torch.equal(ours[index].tokens, theirs[index].tokens)
            assert torch.equal(ours[index].cu_seqlens, theirs[index].cu_seqlens)


def ids(tmp_path: Path, size: int) -> str:
    """A ``tokenizer.json`` in which every word of a document is another token."""
    return words_json(tmp_path / "words.json", {"[UNK]": 0, **{f"w{i}": i for i in range(1, size)}})


@pytest.fixture
def unique(tmp_path: Path) -> PreparedSplit:
    """Documents of 1 to 200 tokens, every token another."""
    lengths, words = [1, 40, 3, 7, 200, 12, 1, 9], (f"w{i}" for i in itertools.count(1))
    texts = tmp_path / "texts"
    texts.mkdir()
    for at, length in enumerate(lengths):
        (texts / f"{at}.txt").write_text(" ".join(itertools.islice(words, length)))
    tokenizer = ids(tmp_path, 274)
    prepared(tmp_path / "out", texts, tokenizer=tokenizer, held_out=0.0, shard_mib=0.001)
    return open_prepared(str(tmp_path / "out"), "data.path").split("training")


def test_an_epoch_holds_every_token_once_up_to_the_rest(unique: PreparedSplit) -> None:
    streams, dropped = unique.streams(32, 0), set()
    assert streams.per_epoch == 273 // 32
    for epoch in range(6):
        seen = [streams[epoch * streams.per_epoch + i] for i in range(streams.per_epoch)]
        tokens = torch.cat([s.tokens[0] for s in seen])
        assert tokens.numel() == tokens.unique().numel() == streams.per_epoch * 32
        dropped.add(frozenset(range(1, 274)) - set(tokens.tolist()))
        # Neighbours in the documents are not taken one after another.
        firsts = tokens[::32]
        assert not bool((firsts.diff() % 273 == 32).all())
    # Not the same rest for ever.
    assert len(dropped) > 1


def test_streams_hold_whole_runs_of_documents(unique: PreparedSplit) -> None:
    owner = {
        int(token): at
        for at in range(unique.num_documents)
        for token in unique.document(at)[1].tolist()
    }
    streams = unique.streams(32, 5)
    for index in range(6 * streams.per_epoch):
        stream = streams[index]
        assert stream.tokens.shape == (1, 32)
        bounds = stream.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, 32)
        owners = []
        for start, end in itertools.pairwise(bounds):
            piece = stream.tokens[0, start:end]
            assert end > start
            assert bool((piece.diff() == 1).all())
            owners.append({owner[int(token)] for token in piece})
        assert all(len(o) == 1 for o in owners)
        # A boundary stands only where the document changes.
        assert all(a != b for a, b in itertools.pairwise(owners))


def test_the_order_depends_on_the_seed_and_the_epoch_alone(folder: Path) -> None:
    split = load_corpus(settings(folder)).training
    streams = split.streams(64, 7)
    again = load_corpus(settings(folder)).training.streams(64, 7)
    per_epoch = streams.per_epoch
    for index in (2 * per_epoch + 1, 0, per_epoch, 3, per_epoch - 1):
        assert torch.equal(streams[index].tokens, again[index].tokens)
    other = split.streams(64, 8)
    first = [[s[i].tokens.tolist() for i in range(per_epoch)] for s in (streams, other)]
    assert first[0] != first[1]
    assert first[0] != [streams[per_epoch + i].tokens.tolist() for i in range(per_epoch)]


def test_few_files_are_open_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [load_corpus(settings(folder)).training.streams(64, 7)[i] for i in range(30)]
    monkeypatch.setattr(module, "MOST_OPEN", 3)
    before = len(os.listdir("/proc/self/fd"))
    streams = load_corpus(settings(folder)).training.streams(64, 7)
    for index, stream in enumerate(expected):
        assert torch.equal(streams[index].tokens, stream.tokens)
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize(
    "size, dtype", [(65_536, "<u2"), (65_537, "<u4")], ids=["uint16", "uint32"]
)
def test_tokens_have_the_smaller_dtype_that_holds_the_vocabulary(
    tmp_path: Path, size: int, dtype: str
) -> None:
    numpy = pytest.importorskip("numpy")
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1, "green": size - 1})
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, text in zip(texts, ("red green green", "green red"), strict=True):
        path.write_text(text)
    prepared(tmp_path / "out", *texts, tokenizer=tokenizer, held_out=0.0)
    raw = numpy.fromfile(tmp_path / "out" / "shards" / "000000" / "training.tokens", dtype)
    last = size - 1
    assert raw.tolist() == [1, last, last, last, 1]
    opened = open_prepared(str(tmp_path / "out"), "data.path")
    assert opened.tokenizer().vocab_size == size
    tokens = opened.split("training").streams(5, None)[0].tokens
    assert tokens.tolist() == [[1, last, last, last, 1]]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no prepared.json": (lambda p: (p / "prepared.json").unlink(), r"prepared\.json is missing"),
    "cut prepared.json": (lambda p: cut(p / "prepared.json"), r"prepared\.json cannot be read"),
    "changed prepared.json": (
        lambda p: (p / "prepared.json").write_text(
            (p / "prepared.json").read_text().replace('"vocab_size": 256', '"vocab_size": 257')
        ),
        r"prepared\.json is not what was written: its own checksum differs",
    ),
    "later format": (
        lambda p: (p / "prepared.json").write_text(json.dumps({"format": 2})),
        r"prepared\.json has the format 2, 1 to 1 can be read",
    ),
    "not an object": (
        lambda p: (p / "prepared.json").write_text("[]"),
        r"prepared\.json has the format None",
    ),
    "missing tokens": (
        lambda p: (p / "shards/000003/training.tokens").unlink(),
        r"shards/000003/training\.tokens is missing",
    ),
    "cut tokens": (
        lambda p: cut(p / "shards/000003/training.tokens"),
        r"shards/000003/training\.tokens has [\d,]+ bytes, [\d,]+ in prepared\.json",
    ),
    "flipped bit of tokens": (
        lambda p: flip(p / "shards/000004/training.tokens"),
        r"shards/000004/training\.tokens is not what was written: its checksum differs",
    ),
    "cut index": (
        lambda p: cut(p / "shards/000001/training.index"),
        r"shards/000001/training\.index has [\d,]+ bytes",
    ),
    "flipped bit of the index": (
        lambda p: flip(p / "shards/000001/held_out.index"),
        r"shards/000001/held_out\.index is not what was written",
    ),
    "flipped bit of names": (
        lambda p: flip(p / "shards/000002/training.names"),
        r"shards/000002/training\.names is not what was written",
    ),
    "missing shard": (
        lambda p: shutil.rmtree(p / "shards/000005"),
        r"shards/000005/\w+\.\w+ is missing; .*; and \d+ more",
    ),
    "cut counts": (
        lambda p: cut(p / "training.counts"),
        r"training\.counts has 1,024 bytes, 2,048",
    ),
    "a folder for a file": (
        lambda p: (
            (p / "shards/000000/training.tokens").unlink(),
            (p / "shards/000000/training.tokens").mkdir(),
        ),
        r"shards/000000/training\.tokens is missing",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_by_name(
    copy: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=rf"data\.path must be .*, got '{copy}': {words}"):
        load_corpus(settings(copy))


def test_without_verification_sizes_and_indexes_are_checked(copy: Path) -> None:
    flip(copy / "shards/000004/training.tokens")
    load_corpus(settings(copy, verify=False))
    flip(copy / "shards/000004/training.index")
    with pytest.raises(ValueError, match=r"000004/training\.index is not what was written"):
        load_corpus(settings(copy, verify=False))
    cut(copy / "shards/000003/training.tokens")
    with pytest.raises(ValueError, match=r"000003/training\.tokens has .*; shards/000004/"):
        load_corpus(settings(copy, verify=False))


def test_processes_share_the_files(copy: Path) -> None:
    """What one finds, the others learn in ``Ranks.agreed``."""
    flip(copy / "shards/000004/training.tokens")
    found = []
    for process in range(3):
        try:
            load_corpus(settings(copy), (process, 3))
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1


def test_an_index_that_is_none_is_refused_though_its_checksum_is_right(copy: Path) -> None:
    """As from a program that writes such folders wrongly."""
    path = copy / "shards/000001/training.index"
    numpy = pytest.importorskip("numpy")
    index = numpy.fromfile(path, "<i8")
    for at, value in ((0, 1), (2, index[1]), (len(index) - 1, -1)):
        broken = index.copy()
        broken[at] = value
        broken.tofile(path)
        opened = open_prepared(str(copy), "data.path")
        shard = opened.metadata.shards[1]
        shard.files["training.index"] = module.hash_file(path)  # type: ignore[index]
        with pytest.raises(ValueError, match=r"training\.index does not hold ascending numbers"):
            opened.check_files(verify=False)


def test_tokens_beyond_the_vocabulary_are_named_when_they_are_read(copy: Path) -> None:
    path = copy / "shards/000000/training.tokens"
    content = bytearray(path.read_bytes())
    content[1] = 1
    path.write_bytes(content)
    split = load_corpus(settings(copy, verify=False)).training
    with pytest.raises(ValueError, match=r"data\.path must hold tokens below 256.*000000/training"):
        split.streams(8, None)[0]


def test_other_places_are_refused(tmp_path: Path, root: Path, folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.path must be a folder that prepare_data\.py wrote"
    ):
        load_corpus(settings(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"data\.path must be a folder .*prepared\.json is missing"
    ):
        load_corpus(settings(root / "documents"))
    (tmp_path / "preparing.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.path must be a finished folder \(the line of"):
        load_corpus(settings(tmp_path))
    with pytest.raises(ValueError, match=r"data\.length must be at most the \d+ tokens of the sp"):
        load_corpus(settings(folder)).training.streams(10**6, 0)


def test_a_small_folder_of_which_nothing_is_held_out_is_told(tmp_path: Path) -> None:
    """Before a run refuses it. With few documents the share of hashes may be none of them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("some text")
    for share, told in ((0.001, True), (0.999, False), (0.0, False)):
        options = PrepareOptions((texts,), tmp_path / f"{share}", held_out=share, processes=1)
        words = "\n".join(summarise(prepare(options, lambda progress: None), options))
        assert ("prepare another folder with --held-out above 0.001" in words) == told


def test_a_folder_without_held_out_documents_needs_others(lines: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "all", lines, held_out=0.0)
    with pytest.raises(
        ValueError, match=r"data\.path must be a folder with documents in both splits.*0 held out"
    ):
        load_corpus(settings(tmp_path / "all"))
    other = write_jsonl(tmp_path / "others.jsonl", 50, seed=1)
    prepared(tmp_path / "validation", other)
    both = settings(tmp_path / "all", validation_path=str(tmp_path / "validation"))
    corpus = load_corpus(both)
    # Whatever was held out of it: all of it.
    assert corpus.held_out.num_documents == len(
        list(read_documents(DataSettings(source="jsonl", path=str(other))))
    )
    names = {corpus.held_out.document(at)[0] for at in range(50)}  # type: ignore[attr-defined]
    assert names == {
        name for name, _ in read_documents(DataSettings(source="jsonl", path=str(other)))
    }
    assert corpus.training.num_documents == 300
    prepared(tmp_path / "less", write_jsonl(tmp_path / "less.jsonl", 49, seed=1))
    less = load_corpus(settings(tmp_path / "all", validation_path=str(tmp_path / "less")))
    assert less.digest != corpus.digest


def test_validation_by_another_tokenizer_is_refused(lines: Path, tmp_path: Path) -> None:
    prepared(tmp_path / "bytes", lines)
    first = words_json(tmp_path / "a.json", {"[UNK]": 0, "red": 1, "blue": 2})
    second = words_json(tmp_path / "b.json", {"[UNK]": 0, "red": 2, "blue": 1})
    prepared(tmp_path / "first", lines, tokenizer=first)
    prepared(tmp_path / "second", lines, tokenizer=second)
    for path, other in (("first", "second"), ("bytes", "first"), ("first", "bytes")):
        with pytest.raises(
            ValueError,
            match=r"data\.validation_path must be a folder that was prepared with the to",
        ):
            load_corpus(settings(tmp_path / path, validation_path=str(tmp_path / other)))
    load_corpus(settings(tmp_path / "first", validation_path=str(tmp_path / "first")))


@pytest.mark.parametrize("source", ["folder", "jsonl"])
def test_validation_documents_of_text_are_their_own(
    root: Path, lines: Path, tmp_path: Path, source: Any
) -> None:
    """Nothing of the path is held out, and all of the other is."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("one text of its own")
    (tmp_path / "one.jsonl").write_text('{"text": "one text of its own"}\n')
    paths = {
        "folder": (root / "documents", tmp_path / "texts"),
        "jsonl": (lines, tmp_path / "one.jsonl"),
    }
    path, validation = map(str, paths[source])
    corpus = load_corpus(DataSettings(source=source, path=path, validation_path=validation))
    alone = DataSettings(source=source, path=path)
    assert corpus.training.num_documents == len(list(read_documents(alone)))
    held_out = corpus.held_out
    tokens = held_out.streams(held_out.num_tokens, None)[0].tokens[0]
    assert ByteTokenizer().decode(tokens.tolist()) == "one text of its own"
    assert corpus.digest != load_corpus(alone).digest
    with pytest.raises(ValueError, match=r"data\.path must hold|data\.path must be|data\.pattern"):
        load_corpus(DataSettings(source=source, path=path, validation_path=str(tmp_path / "no")))


def test_documents_in_memory_have_the_streams_and_digests_that_they_had(root: Path) -> None:
    """Of the runs and checkpoints before there were prepared folders."""
    corpus = load_corpus(DataSettings(source="folder", path=str(root / "documents"), held_out=0.2))
    assert corpus.digest[:16] == "fae05113805df9d1"
    streams = corpus.training.streams(150, 0)
    assert isinstance(streams, PackedStreams)
    text = ByteTokenizer().decode(streams[0].tokens[0].tolist())
    assert text[:40] == "gate gate gate blue token blue gate toke"


SPARSE = """
import resource, sys, time
sys.path[:0] = {paths!r}
from launch.data.corpus import load_corpus, unigram_loss
from launch.settings import DataSettings

settings = DataSettings(source="prepared", path={path!r}, verify=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
corpus = load_corpus(settings)
opened = time.perf_counter() - started
streams = corpus.training.streams(131072, 0)
held_out = [corpus.held_out.streams(131072, None)[i] for i in range(4)]
unigram_loss(corpus.training, held_out, 256)
started = time.perf_counter()
for index in range(400):
    assert streams[index * 10**6].tokens.shape == (1, 131072)
read = (time.perf_counter() - started) / 400
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(corpus.training.num_tokens, corpus.training.num_documents, after - before, opened, read)
"""


def sparse_folder(folder: Path, tokens: int, documents: int) -> None:
    """A prepared folder of two shards whose training tokens are holes of a sparse file."""
    numpy = pytest.importorskip("numpy")
    shards, names = [], ("training", "held_out")
    for number, (count, each) in enumerate(((documents, tokens // documents), (100, 10_000))):
        path = module.shard_path(folder, number)
        path.mkdir(parents=True)
        split = names[number]
        with (path / f"{split}.tokens").open("wb") as file:
            file.truncate(2 * count * each)
        with (path / f"{split}.index").open("wb") as file:
            for first in range(0, count + 1, 1 << 20):
                last = min(first + (1 << 20), count + 1)
                file.write((numpy.arange(first, last, dtype="<i8") * each).tobytes())
            file.truncate(2 * 8 * (count + 1))
        (path / f"{split}.names").touch()
        files = {
            f"{split}.tokens": (2 * count * each, ""),
            f"{split}.index": module.hash_file(path / f"{split}.index"),
            f"{split}.names": module.hash_file(path / f"{split}.names"),
        }
        sizes = {"training": (0, 0), "held_out": (0, 0), split: (count, count * each)}
        shards.append(module.Shard(**sizes, empty=0, broken=0, text_bytes=0, files=files))  # type: ignore[arg-type]
    (folder / module.COUNTS).write_bytes(bytes(8 * 256))
    own = {module.COUNTS: module.hash_file(folder / module.COUNTS)}
    module.write_metadata(folder, module.Metadata("bytes", 256, {}, "", own, shards))


@pytest.mark.slow
def test_a_hundred_gigabytes_and_ten_million_documents_take_little_memory(tmp_path: Path) -> None:
    """50 * 10^9 tokens: in memory they would be 50 GB, their starts alone 80 MB."""
    sparse_folder(tmp_path, 50 * 10**9, 10**7)
    size = (tmp_path / "shards/000000/training.tokens").stat().st_size
    assert size == 100 * 10**9
    root = Path(local.__file__).resolve().parents[1]
    text = SPARSE.format(paths=[str(root), str(root / "kernels")], path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    tokens, documents, kib, *_ = map(float, done.stdout.split())
    assert (tokens, documents) == (50 * 10**9, 10**7)
    assert kib < 64 * 1024, done.stdout
