"""Documents, splits and packing."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.data.corpus import (
    Corpus,
    Documents,
    PackedStreams,
    is_held_out,
    load_corpus,
    unigram_loss,
)
from launch.data.streams import Stream, join
from launch.seeds import mix_seed
from launch.settings import DataSettings


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
    with pytest.raises(
        ValueError, match=r"data\.length must be at most the 96 tokens of the split, got 512"
    ):
        PackedStreams(documents([30, 50, 16]), 512, 0)


def test_a_source_without_both_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("alone")
    with pytest.raises(
        ValueError,
        match=r"data\.held_out must be .*0 documents to train on and 1 held.*, got 0\.05",
    ):
        load_corpus(DataSettings(source="folder", path=str(tmp_path)))


def test_unigram_loss_by_hand() -> None:
    # Counts of 0..3 with one added: 4, 2, 1, 1 of 8. Targets: all but each document's first.
    training = Documents(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 4]), ("d",))
    stream = Stream(torch.tensor([[3, 0, 1, 2, 2]]), torch.tensor([0, 3, 5], dtype=torch.int32))
    expected = (torch.tensor([2.0, 4.0, 8.0]).log().sum() / 3).item()
    assert unigram_loss(training, [stream], 4) == pytest.approx(expected, rel=1e-6)


def words_json(path: Path, ids: dict[str, int]) -> str:
    """Write a ``tokenizer.json`` with these words; its path."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path.parent.mkdir(exist_ok=True)
    inner.save(str(path))
    return str(path)


def write_lines(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


TEXTS = [f"red {'green ' * (i % 7)}red" for i in range(40)]


def test_the_digest_is_of_names_tokens_and_the_vocabulary(tmp_path: Path) -> None:
    ids = {"[UNK]": 0, "red": 1, "green": 2}
    data = write_lines(tmp_path / "texts.jsonl", TEXTS)
    here = DataSettings(
        source="jsonl", path=data, tokenizer=words_json(tmp_path / "words.json", ids), held_out=0.2
    )

    def digest(path: str = here.path, tokenizer: str = here.tokenizer) -> str:
        settings = DataSettings(source="jsonl", path=path, tokenizer=tokenizer, held_out=0.2)
        return load_corpus(settings).digest

    same = digest()
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(path, tmp_path / "moved") for path in (here.path, here.tokenizer)]
    assert digest(*moved) == same
    swapped = {"[UNK]": 0, "red": 2, "green": 1}
    others = {
        "another tokenizer of the same size": digest(
            tokenizer=words_json(tmp_path / "b.json", swapped)
        ),
        "a larger vocabulary": digest(
            tokenizer=words_json(tmp_path / "c.json", {**ids, "blue": 3})
        ),
        "bytes": digest(tokenizer="bytes"),
        "another text": digest(write_lines(tmp_path / "d" / "texts.jsonl", ["green", *TEXTS[1:]])),
        "another order": digest(write_lines(tmp_path / "e" / "texts.jsonl", TEXTS[::-1])),
        "a document less": digest(write_lines(tmp_path / "f" / "texts.jsonl", TEXTS[:-1])),
        # The name decides which documents are held out.
        "another name": digest(write_lines(tmp_path / "other.jsonl", TEXTS)),
    }
    assert len({same, *others.values()}) == 1 + len(others), others


def test_the_digest_of_a_folder_does_not_hold_its_path(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "documents", tmp_path / "elsewhere")
    first, second = (
        load_corpus(DataSettings(source="folder", path=str(path), held_out=0.2))
        for path in (root / "documents", tmp_path / "elsewhere")
    )
    assert first.digest == second.digest
    moved = tmp_path / "elsewhere" / "00.txt"
    moved.rename(moved.with_name("first.txt"))
    settings = DataSettings(source="folder", path=str(tmp_path / "elsewhere"), held_out=0.2)
    assert load_corpus(settings).digest != first.digest


def test_ids_with_holes_are_within_the_vocabulary(tmp_path: Path) -> None:
    """The vocabulary is the largest id + 1, not the number of words."""
    tokenizer = words_json(tmp_path / "words.json", {"[UNK]": 0, "red": 1, "green": 40_000})
    data = write_lines(tmp_path / "texts.jsonl", TEXTS)
    settings = DataSettings(source="jsonl", path=data, tokenizer=tokenizer, held_out=0.2)
    corpus = load_corpus(settings)
    vocab_size = corpus.tokenizer.vocab_size
    assert vocab_size == 40_001
    assert corpus.training.tokens.dtype == torch.int32
    assert int(corpus.training.tokens.max()) == 40_000
    torch.nn.Embedding(vocab_size, 1)(corpus.training.tokens)
    streams = [PackedStreams(corpus.held_out, 8, None)[0]]
    assert 0 < unigram_loss(corpus.training, streams, vocab_size) < 11


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(
        ValueError, match=r"data\.path must be documents with some text, got .*empty\.jsonl'"
    ):
        load_corpus(DataSettings(source="jsonl", path=str(tmp_path / "empty.jsonl")))


def test_mixed_seeds_differ_and_stay() -> None:
    assert mix_seed(0, 1) != mix_seed(1, 0) != mix_seed(0, "1", 0)
    assert 0 <= mix_seed(3, "epoch", 4) < 2**63
    assert mix_seed(3, "epoch", 4) == mix_seed(3, "epoch", 4)
