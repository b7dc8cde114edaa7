"""Documents, splits and packing."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from data import (
    ByteTokenizer,
    Corpus,
    Documents,
    PackedStreams,
    Stream,
    is_held_out,
    join,
    load_corpus,
    make_tokenizer,
    mix_seed,
    read_documents,
    unigram_loss,
)
from settings import DataSettings


def documents(lengths: list[int]) -> Documents:
    """Documents whose every token is unique."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    names = tuple(f"d{i}" for i in range(len(lengths)))
    return Documents(torch.arange(int(starts[-1]), dtype=torch.int32), starts, names)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(DataSettings())


def test_the_default_source_is_this_pythons_library(corpus: Corpus) -> None:
    names = {*corpus.training.names, *corpus.held_out.names}
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages"}
    assert corpus.training.tokens.numel() > 3_000_000
    assert corpus.held_out.tokens.numel() > 32 * 2048


def test_documents_come_back_from_the_corpus_unchanged(corpus: Corpus) -> None:
    import json.decoder

    splits = (corpus.training, corpus.held_out)
    split = next(s for s in splits if "json/decoder.py" in s.names)
    index = split.names.index("json/decoder.py")
    tokens = split.tokens[split.starts[index] : split.starts[index + 1]]
    assert bytes(tokens.tolist()) == Path(json.decoder.__file__).read_bytes()


def test_held_out_documents_are_never_trained_on(corpus: Corpus) -> None:
    assert not set(corpus.training.names) & set(corpus.held_out.names)
    assert all(is_held_out(name, 0.05) for name in corpus.held_out.names)
    # More held out keeps what was held out, and none of it depends on the other documents.
    assert all(is_held_out(name, 0.2) for name in corpus.held_out.names)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_epoch_holds_every_token_once_up_to_the_rest(seed: int | None) -> None:
    lengths = [1, 40, 3, 7, 200, 12, 1, 9]
    streams = PackedStreams(documents(lengths), 32, seed)
    assert streams.per_epoch == sum(lengths) // 32
    for epoch in range(2):
        seen = [streams[epoch * streams.per_epoch + i] for i in range(streams.per_epoch)]
        tokens = torch.cat([s.tokens[0] for s in seen])
        assert tokens.numel() == tokens.unique().numel() == streams.per_epoch * 32


@pytest.mark.parametrize("seed", [None, 5])
def test_streams_hold_whole_runs_of_documents(seed: int | None) -> None:
    lengths = [1, 40, 3, 7, 200, 12, 1, 9]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    streams = PackedStreams(documents(lengths), 32, seed)
    for index in range(streams.per_epoch):
        stream = streams[index]
        assert stream.tokens.shape == (1, 32)
        assert stream.tokens.dtype == torch.int64
        assert stream.cu_seqlens.dtype == torch.int32
        assert stream.cu_seqlens[0] == 0
        assert stream.cu_seqlens[-1] == 32
        bounds = stream.cu_seqlens.tolist()
        owners = []
        for start, end in itertools.pairwise(bounds):
            piece = stream.tokens[0, start:end]
            assert end > start
            assert bool((piece.diff() == 1).all())
            owners.append(set(owner[piece].tolist()))
        assert all(len(o) == 1 for o in owners)
        # A boundary stands only where the document changes.
        assert all(a != b for a, b in itertools.pairwise(owners))


def test_streams_in_file_order_give_the_documents_back() -> None:
    streams = PackedStreams(documents([30, 50, 16]), 32, None)
    assert torch.cat([streams[i].tokens[0] for i in range(3)]).tolist() == list(range(96))


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    split = documents([20] * 40)
    streams, again = PackedStreams(split, 32, 7), PackedStreams(split, 32, 7)
    per_epoch = streams.per_epoch
    # Random access in any order gives what reading in order gives.
    for index in (2 * per_epoch + 1, 0, per_epoch, 3, per_epoch - 1):
        assert torch.equal(streams[index].tokens, again[index].tokens)
    other_seed = PackedStreams(split, 32, 8)
    assert not torch.equal(streams[0].tokens, other_seed[0].tokens)
    assert not torch.equal(streams[0].tokens, streams[per_epoch].tokens)


def test_joined_streams_keep_their_documents() -> None:
    streams = PackedStreams(documents([30, 50, 16]), 32, None)
    joined = join([streams[0], streams[1]])
    assert joined.tokens[0].tolist() == list(range(64))
    assert joined.cu_seqlens.tolist() == [0, 30, 32, 64]
    assert joined.cu_seqlens.dtype == torch.int32


def test_a_length_beyond_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.length: found 512; at most the 96 tokens"):
        PackedStreams(documents([30, 50, 16]), 512, 0)


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
    with pytest.raises(ValueError, match=r"data\.field: found 'text'.*line 1 has \['body'\]"):
        list(read_documents(DataSettings(source="jsonl", path=str(path))))
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"data\.path: .*line 1 is no JSON"):
        list(read_documents(settings))


def test_a_source_without_both_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("alone")
    with pytest.raises(
        ValueError, match=r"data\.held_out: found 0\.05.*0 documents to train on and 1 held"
    ):
        load_corpus(DataSettings(source="folder", path=str(tmp_path)))


@pytest.mark.parametrize(
    "name, package", [("gpt2", "transformers"), ("t.json", "tokenizers")], ids=["name", "file"]
)
def test_a_tokenizer_without_its_package_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"data\.tokenizer: found '{name}'.*{package}"):
        make_tokenizer(name)


def test_a_tokenizer_file_is_used(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "red": 1, "green": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    tokenizer = make_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode(b"green red blue", "x").tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"data\.tokenizer: document 'x' is not UTF-8"):
        tokenizer.encode(b"\xff", "x")


def test_bytes_that_are_no_text_decode_to_something() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def test_unigram_loss_by_hand() -> None:
    # Counts of 0..3 with one added: 4, 2, 1, 1 of 8. Targets: all but each document's first.
    training = Documents(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 4]), ("d",))
    stream = Stream(torch.tensor([[3, 0, 1, 2, 2]]), torch.tensor([0, 3, 5], dtype=torch.int32))
    expected = (torch.tensor([2.0, 4.0, 8.0]).log().sum() / 3).item()
    assert unigram_loss(training, [stream], 4) == pytest.approx(expected, rel=1e-6)


def test_mixed_seeds_differ_and_stay() -> None:
    assert mix_seed(0, 1) != mix_seed(1, 0) != mix_seed(0, "1", 0)
    assert 0 <= mix_seed(3, "epoch", 4) < 2**63
    assert mix_seed(3, "epoch", 4) == mix_seed(3, "epoch", 4)
