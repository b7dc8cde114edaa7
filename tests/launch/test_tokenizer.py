"""Text to tokens, and what a tokenizer's file may have switched on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.data.tokenizer import ByteTokenizer, make_tokenizer

TEXT = b"red green " * 50


def words(**ids: int) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, **ids}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return inner


def saved(inner: Any, folder: Path, package: str) -> str:
    """Where a tokenizer is kept, as a file or as the folder of a model of transformers."""
    inner.save(str(folder / "tokenizer.json"))
    if package == "tokenizers":
        return str(folder / "tokenizer.json")
    pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "name, package", [("gpt2", "transformers"), ("t.json", "tokenizers")], ids=["name", "file"]
)
def test_a_tokenizer_without_its_package_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"data\.tokenizer must be .*{package}.*, got '{name}'"):
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
    with pytest.raises(
        ValueError, match=r"data\.tokenizer must be 'bytes' for .* not UTF-8, got .* for 'x'"
    ):
        tokenizer.encode(b"\xff", "x")


def test_bytes_that_are_no_text_decode_to_something() -> None:
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
@pytest.mark.parametrize("option", ["truncation", "padding", "truncation and padding"])
def test_truncation_and_padding_are_switched_off_and_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], package: str, option: str
) -> None:
    inner = words(red=1, green=2)
    if "truncation" in option:
        inner.enable_truncation(16)
    if "padding" in option:
        inner.enable_padding(length=640, pad_id=0, pad_token="[UNK]")
    tokenizer = make_tokenizer(saved(inner, tmp_path, package))
    for _ in range(2):
        assert tokenizer.encode(TEXT, "x").tolist() == [1, 2] * 50
    for word in option.split(" and "):
        assert word in tokenizer.note
    assert "switched off" in tokenizer.note
    assert "\n" not in tokenizer.note
    # Nor does transformers warn of texts beyond model_max_length.
    assert "sequence length" not in capfd.readouterr().err


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_a_tokenizer_with_nothing_to_tell(tmp_path: Path, package: str) -> None:
    tokenizer = make_tokenizer(saved(words(red=1, green=2), tmp_path, package))
    assert tokenizer.encode(TEXT, "x").tolist() == [1, 2] * 50
    assert tokenizer.note == ""


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
@pytest.mark.parametrize(
    "largest, dtype",
    [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32)],
)
def test_the_vocabulary_is_the_largest_id_and_one(
    tmp_path: Path, package: str, largest: int, dtype: torch.dtype
) -> None:
    tokenizer = make_tokenizer(saved(words(red=1, green=largest), tmp_path, package))
    assert tokenizer.vocab_size == largest + 1
    tokens = tokenizer.encode(b"green red", "x")
    assert tokens.tolist() == [largest, 1]
    assert tokens.dtype == dtype
    assert tokenizer.encode(b"", "x").numel() == 0
    # An id that is no token, as a model may draw it, does not end the run.
    assert "red" in tokenizer.decode([1, 7, 1])


def test_an_added_token_may_have_the_largest_id(tmp_path: Path) -> None:
    inner = words(red=1, green=20)
    inner.add_special_tokens(["<end>"])
    tokenizer = make_tokenizer(saved(inner, tmp_path, "tokenizers"))
    assert int(tokenizer.encode(b"red <end>", "x").max()) < tokenizer.vocab_size


def test_ids_that_no_embedding_has_are_refused(tmp_path: Path) -> None:
    name = saved(words(red=1, green=2), tmp_path, "tokenizers")
    text = Path(name).read_text()
    assert '"green": 2' in text
    Path(name).write_text(text.replace('"green": 2', f'"green": {2**31}'))
    with pytest.raises(ValueError, match=r"data\.tokenizer must be .*, got .*from 0 to 2147483648"):
        make_tokenizer(name)


def test_a_document_that_a_tokenizer_cannot_encode_is_named(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 0}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = make_tokenizer(saved(inner, tmp_path, "tokenizers"))
    with pytest.raises(ValueError, match=r"data\.tokenizer must be .*document 't\.txt', got .*UNK"):
        tokenizer.encode(b"red blue", "t.txt")


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}', "\x00\xff"], ids=repr)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "words.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer must be 'bytes' or a tokenizer .*, got .*words\.json'"
    ):
        make_tokenizer(str(tmp_path / "words.json"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"data\.tokenizer must be .*a tokenizer that transf"):
        make_tokenizer(str(tmp_path))


def test_code_that_comes_with_a_tokenizer_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is there a question on the terminal, which somebody may answer with yes."""
    pytest.importorskip("transformers")
    marker = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n"
    (tmp_path / "own.py").write_text(code)
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"data\.tokenizer must be .*, got .*contains custom code"):
        make_tokenizer(str(tmp_path))
    assert not marker.exists()
