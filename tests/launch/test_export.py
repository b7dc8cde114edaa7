"""Checkpoints to folders of transformers and back: the same logits, and the same bits back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.convert import convert
from launch.data.corpus import load_corpus
from launch.data.tokenizer import make_tokenizer
from launch.export import ExportOptions, main, run
from launch.loading import alone, load
from launch.settings import to_toml
from launch.storage.checkpoint import newest_checkpoint
from launch.train import held_out_streams, shard_stream
from tests.distributed.ranks import Ranks
from tests.launch.checkpoints import flip, shard
from tests.launch.common import replaced, run_training, same_ranks, tiny
from tests.launch.deepspeed import needs_deepspeed, run_deepspeed
from tests.launch.trained import KINDS, settings_of, write_run

transformers = pytest.importorskip("transformers")
RanksOf = Callable[[int], Ranks]


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_logits_of_its_checkpoint_and_comes_back(
    root: Path, tmp_path: Path, kind: str
) -> None:
    """Past the window and the chosen blocks: 150 tokens, of which 32 are chosen and 12 near."""
    settings = settings_of(root, kind)
    write_run(tmp_path / "run", settings)
    folder = tmp_path / "folder"
    run(ExportOptions(tmp_path / "run", folder))
    with alone():
        trained = load(tmp_path / "run")
    tokens = torch.randint(256, (2, 150))
    expected = logits(trained.decoder("cpu", "float64"), tokens)
    auto = transformers.AutoModelForCausalLM
    found = logits(auto.from_pretrained(folder, dtype=torch.float64), tokens)
    # transformers computes rotary angles in float32, whose error at 150 is 150 * 2^-24.
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * largest
    assert largest > 1
    single = logits(auto.from_pretrained(folder), tokens[:, :20])  # Its own dtype, float32.
    assert (single - expected[:, :20]).abs().max() < 1e-4 * largest

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def é(x):\n\treturn\x00 1"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.do_sample, generation.temperature) == (True, settings.run.temperature)

    (tmp_path / "base.toml").write_text(to_toml(settings_of(root, "nsa")))
    run(ExportOptions(folder, tmp_path / "back", config=tmp_path / "base.toml"))
    with alone():
        back = load(tmp_path / "back")
    assert (back.step, back.path.name) == (0, "step_00000000")
    assert back.weights.keys() == trained.weights.keys()
    for name, weight in trained.weights.items():
        assert torch.equal(back.weights[name], weight), name
    for section in ("model", "rotary"):
        assert getattr(back.settings, section) == getattr(settings, section)
    assert kind == "dense" or back.settings.attention == settings.attention


def test_training_goes_on_from_a_folder(ranks_of: RanksOf, root: Path, tmp_path: Path) -> None:
    """At its loss, and over other ranks."""
    settings = tiny(root, run={"dtype": "float32", "steps": 3, "folder": str(tmp_path / "run")})
    (trained,) = ranks_of(1).run(run_training, settings)
    run(ExportOptions(tmp_path / "run", tmp_path / "folder"))
    (tmp_path / "base.toml").write_text(to_toml(settings))
    run(ExportOptions(tmp_path / "folder", tmp_path / "back", config=tmp_path / "base.toml"))
    more = replaced(settings, "run", folder=str(tmp_path / "back"), resume=True, steps=1)
    more = replaced(more, "parallel", cp=2)
    result, _ = ranks_of(2).run(run_training, replaced(more, "optimizer", lr=1e-9))
    assert math.isclose(result.validation_loss, trained.validation_loss, rel_tol=1e-5)


def held_out_loss(folder: Path) -> float:
    """Mean loss of a loaded model over what its run validates on; in a group of one."""
    trained = load(folder)
    model, corpus = trained.decoder("cpu", "float64"), load_corpus(trained.settings.data)
    total, targets = 0.0, 0
    for stream in held_out_streams(corpus, trained.settings):
        batch = shard_stream(stream, trained.settings, same_ranks())
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        total, targets = total + float(loss), targets + batch.num_targets
    return total / targets


def test_a_checkpoint_of_two_ranks_is_loaded_whole(
    ranks_of: RanksOf, root: Path, tmp_path: Path
) -> None:
    run_ = {"steps": 4, "folder": str(tmp_path / "run")}
    result, _ = ranks_of(2).run(run_training, tiny(root, parallel={"cp": 2}, run=run_))
    (found,) = ranks_of(1).run(held_out_loss, tmp_path / "run")
    assert math.isclose(found, result.validation_loss, rel_tol=1e-9)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_of_deepspeed_is_loaded_whole(
    ranks_of: RanksOf, deepspeed_ranks: RanksOf, root: Path, tmp_path: Path, stage: int
) -> None:
    parallel = {"engine": "deepspeed", "zero_stage": stage, "cp": 2}
    run_ = {"steps": 4, "dtype": "float32", "folder": str(tmp_path / "run")}
    settings = tiny(root, parallel=parallel, run=run_)
    result, _ = deepspeed_ranks(2).run(run_deepspeed, settings)
    (found,) = ranks_of(1).run(held_out_loss, tmp_path / "run")
    assert math.isclose(found, result.validation_loss, rel_tol=1e-5)


def test_a_checkpoint_of_megatron_is_loaded_whole(root: Path, tmp_path: Path) -> None:
    """With the float32 weights behind bfloat16 ones, without Megatron."""
    settings = replaced(settings_of(root, "nsa"), "run", dtype="bfloat16")
    source = write_run(tmp_path / "run", settings)
    with alone():
        there = convert(source, tmp_path / "there")
        expected, found = load(source), load(there)
    assert found.settings.parallel.engine == "fsdp2"
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert found.weights[name].dtype == torch.float32
        assert torch.equal(found.weights[name], weight), name


def test_a_tokenizer_goes_along_without_what_it_adds(root: Path, tmp_path: Path) -> None:
    """And so does its cutting of long texts: training has neither."""
    tokenizers = pytest.importorskip("tokenizers")
    name = str(tmp_path / "tokenizer.json")
    inner = tokenizers.ByteLevelBPETokenizer()._tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["red green blue"] * 9, trainer)
    inner.enable_truncation(3)
    first = "a"  # Not any: a template cannot spell ":" or "$".
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, inner.token_to_id(first))]
    )
    inner.save(name)
    settings = settings_of(root, "nsa", tokenizer=name)
    ours = make_tokenizer(name)
    write_run(tmp_path / "run", settings, ours.vocab_size)
    run(ExportOptions(tmp_path / "run", tmp_path / "folder"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "red green blue window block select"
    assert theirs(text)["input_ids"] == ours.encode(text.encode(), "text").tolist()


def test_the_newest_whole_checkpoint_of_a_run_is_taken(root: Path, tmp_path: Path) -> None:
    settings = replaced(settings_of(root, "nsa"), "run", keep_checkpoints=0)
    for step in (3, 5, 7):
        write_run(tmp_path, settings, step=step)
    shard(tmp_path / "checkpoints" / "step_00000007").unlink()
    assert newest_checkpoint(tmp_path, "SOURCE").name == "step_00000005"
    third = tmp_path / "checkpoints" / "step_00000003"
    assert newest_checkpoint(third, "SOURCE") == third


WRONG = {
    "no folder": ((), "SOURCE must be a run, its checkpoints/step_N, or a folder of transform"),
    "damaged": ((), r"CHECKPOINT must be a whole checkpoint, got .*: __0_0\.distcp is not what"),
    "target": ((), r"TARGET must be a folder that is empty or not there, got "),
    "config": (("--config", "x"), r"config must be left out for a checkpoint, got 'x'"),
    "widths": ((), r"attention\.v_head_dim must be 8 in transformers' models of attention.head_d"),
    "before": ((), r"compress_pre_rope must be False \(the model's rotary embedding gives rotated"),
    "back": ((), r"config must be a TOML file with the data and the run that go on from the fold"),
    "gpt2": ((), r"model_type must be one of llama, nsa_llama, qwen3, nsa_qwen3, got 'gpt2'"),
    "more tokens": (("--tokenizer",), r"tokenizer must be one of at most 40 tokens, the model's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_ends_in_one_sentence(
    case: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = WRONG[case]
    source, target = tmp_path / "run", tmp_path / "target"
    settings = settings_of(root, "nsa")
    vocab_size = 40 if case == "more tokens" else 256
    if case == "more tokens":
        options = ("--tokenizer", "bytes")
    odd = {"widths": {"v_head_dim": 16}, "before": {"compress_pre_rope": True}}
    attention = dataclasses.replace(settings.attention, **odd.get(case, {}))
    path = write_run(source, dataclasses.replace(settings, attention=attention), vocab_size)
    if case == "no folder":
        source = tmp_path / "nothing"
    elif case == "damaged":
        flip(shard(path))
    elif case == "target":
        target.mkdir()
        (target / "mine").touch()
    elif case in ("back", "gpt2"):
        source = tmp_path / "theirs"
        config = transformers.LlamaConfig() if case == "back" else transformers.GPT2Config()
        config.save_pretrained(source)
        (tmp_path / "base.toml").write_text(to_toml(settings))
        options = () if case == "back" else ("--config", str(tmp_path / "base.toml"))
    with pytest.raises(SystemExit) as ended:
        main([str(source), str(target), *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("export.py: ")
    assert re.search(message, line), line
    assert case == "target" or not target.exists()
