"""A run's settings: read from TOML, overridden, refused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from launch.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    Settings,
    from_command_line,
    from_toml,
    to_toml,
)
from nsa_dist import NSAConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))
SMALLEST = "[attention]\nnum_heads = 4\nnum_kv_heads = 2\nhead_dim = 8\n"


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return from_toml(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_reads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    settings = from_toml(path)
    assert read(tmp_path, to_toml(settings)) == settings


def test_text_options_survive_a_round_trip(tmp_path: Path) -> None:
    settings = read(tmp_path, SMALLEST + '[run]\nprompt = "a \\"b\\" \\\\ \\n é"\n')
    assert settings.run.prompt == 'a "b" \\ \n é'
    assert read(tmp_path, to_toml(settings)) == settings


def odd_texts(rng: random.Random) -> str:
    """A few characters that files, shells and terminals take for something else."""
    odd = "\x00\x01\x07\b\t\n\x0b\x0c\r\x1b\"#'=[]{}\\\x7f\x80\x85\x9f\xad\u2028\u202e\ud7ff\ue000"
    odd += "\ufeff\ufffe\uffff\U0001f600\U000e0001\U0010ffff nul-- %$"
    return "".join(rng.choice(odd) for _ in range(rng.randint(1, 12)))


def odd_numbers(rng: random.Random) -> float:
    """A positive finite number of any size."""
    few = [5e-324, 2.2250738585072014e-308, 1e-5, 0.1, 1.0, 1e15, 1e16, 1e22, 1.7e308]
    return rng.choice([*few, rng.random() * 10.0 ** rng.randint(-300, 300)])


def test_odd_values_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    """Also over the command line, which takes what it is not given from the file."""
    rng = random.Random(0)
    for index in range(100):
        names = ("pattern", "field", "path", "validation_path")
        texts = {name: "x" + odd_texts(rng).replace("\0", "") for name in names}
        settings = Settings(
            attention=NSAConfig(
                4,
                2,
                8,
                scale=rng.choice([None, odd_numbers(rng)]),
                gate_init=(odd_numbers(rng), -odd_numbers(rng), -0.0),
            ),
            model=ModelSettings(norm_eps=odd_numbers(rng)),
            data=DataSettings(source="folder", tokenizer=texts["path"], **texts),
            optimizer=OptimizerSettings(
                lr=odd_numbers(rng),
                eps=odd_numbers(rng),
                weight_decay=odd_numbers(rng),
                clip=rng.choice([0.0, float("inf"), odd_numbers(rng)]),
            ),
            run=RunSettings(
                prompt=odd_texts(rng),
                folder=texts["path"],
                temperature=odd_numbers(rng),
                seed=rng.choice([0, -1, 2**63 - 1, -(2**63), rng.getrandbits(62)]),
            ),
        )
        text = to_toml(settings)
        assert read(tmp_path, text) == settings
        if index % 40 == 0:
            path = str(tmp_path / "run.toml")
            assert from_command_line([path]) == settings
            options = ["--optimizer.clip", "inf", f"--run.prompt={settings.run.prompt}"]
            again = from_command_line([path, *options])
            assert again.optimizer.clip == float("inf")
            assert again.run == settings.run


def test_settings_of_data_that_has_moved_are_read(tmp_path: Path) -> None:
    settings = read(tmp_path, SMALLEST + '[data]\nsource = "folder"\npath = "/no/longer/there"\n')
    assert settings.data.path == "/no/longer/there"


NO_NUMBERS = [
    (section, option.name)
    for section, kind in (
        ("model", ModelSettings),
        ("data", DataSettings),
        ("optimizer", OptimizerSettings),
        ("run", RunSettings),
    )
    for option in dataclasses.fields(kind)
    if option.type == "float"
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1.0", "1e400"])
@pytest.mark.parametrize("section, option", NO_NUMBERS, ids=".".join)
def test_numbers_that_are_none_are_refused_by_name(
    tmp_path: Path, section: str, option: str, value: str
) -> None:
    text = f"{SMALLEST}[{section}]\n{option} = {value}\n"
    if option == "clip" and value in ("inf", "1e400"):  # 1e400 is inf.
        optimizer = read(tmp_path, text).optimizer
        assert optimizer.clip == float("inf")
        assert optimizer.largest_norm == 0.0  # What engines take for none.
        return
    with pytest.raises(
        ValueError, match=rf"^{section}\.{option} must be .*, got -?(nan|inf|1\.0)$"
    ):
        read(tmp_path, text)


def test_there_are_numbers_to_try() -> None:
    assert ("optimizer", "beta2") in NO_NUMBERS and len(NO_NUMBERS) >= 11


@pytest.mark.parametrize(
    "section, option, value",
    [
        ("run", "folder", "runs/\udcff"),
        ("run", "name", "\ud800"),
        ("run", "prompt", "\udfff"),
        ("data", "path", "\udcff"),
        ("data", "pattern", "\udcff"),
        ("data", "field", "\udcff"),
        ("data", "tokenizer", "\udcff.json"),
        ("model", "backend", "\udcff"),
        ("run", "folder", "a\0b"),
        ("data", "path", "a\0b"),
        ("run", "seed", 2**63),
        ("run", "seed", -(2**63) - 1),
        ("run", "steps", 2**64),
        ("data", "length", 2**31),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(section: str, option: str, value: Any) -> None:
    kinds = {"model": ModelSettings, "data": DataSettings, "run": RunSettings}
    with pytest.raises(ValueError, match=rf"^{section}\.{option} must be .*, got ") as error:
        kinds[section](**{option: value})
    str(error.value).encode()


def test_settings_that_would_read_back_otherwise_are_not_written() -> None:
    settings = Settings(attention=NSAConfig(4, 2, 8), run=RunSettings(steps=True))
    with pytest.raises(ValueError, match=r"run\.steps must be of type int, got True"):
        to_toml(settings)


REFUSED = {
    "integer of thousands of digits": ("[run]\nseed = " + "9" * 5000, "run.toml", "a TOML file"),
    "the same in hexadecimal": (
        "[run]\nseed = 0x" + "f" * 5000,
        "run.seed must be an integer of 64 bits",
        "got an int that is too long to print",
    ),
    "integer beyond every float": (
        "[optimizer]\nlr = 1" + "0" * 400,
        "optimizer.lr must be an integer of at most 64 bits",
        "got 1000",
    ),
    "nested too deep": ("[run]\nseed = " + "[" * 100_000, "run.toml", "must be a TOML file"),
    "truth for a choice of numbers": (
        "[parallel]\nengine = 'deepspeed'\nzero_stage = true\n",
        "parallel.zero_stage must be one of 1, 2, 3",
        "got True",
    ),
    "no UTF-8": ("# \udcff\n", "must be a TOML file", "('utf-8' codec"),
    "beta1": (
        "[optimizer]\nbeta1 = 1.0\n",
        "optimizer.beta1 must be at least 0 and below 1",
        "got 1.0",
    ),
    "eps": ("[optimizer]\neps = 0.0\n", "optimizer.eps must be a positive number", "got 0.0"),
    "a length of 33 bits with its micro-batch": (
        "[data]\nlength = 1073741824\nmicro_batch = 2\nglobal_batch = 2\n",
        "data.length must be at most 1073741823 with data.micro_batch = 2",
        "got 1073741824",
    ),
    "unknown section": (
        "[atention]\nwindow = 1\n",
        "got atention",
        "a section must be one of attention, rotary",
    ),
    "unknown key": ("[data]\nlenght = 64\n", "got data.lenght", "length, global_batch"),
    "unknown key of the attention": ("blocks = 3\n", "got attention.blocks", "select_block"),
    "key outside of a section": ("[run]\nsteps = 1\n[run.more]\na = 1\n", "run.more", "steps"),
    "text for a number": ('[run]\nsteps = "9"\n', "run.steps must be of type int", "got '9'"),
    "truth for a number": ("[run]\nsteps = true\n", "run.steps must be of type int", "got True"),
    "fraction for an integer": ("[run]\nsteps = 9.5\n", "run.steps must be of type int", "got 9.5"),
    "value outside of the choice": ('[model]\nattention = "flash"\n', "model.attention", "dense"),
    "too many gate logits": (
        "gate_init = [1.0, 2.0]\n",
        "attention.gate_init must be 3 values",
        "got [1.0, 2.0]",
    ),
    "attention's own check": ("window = 0\n", "attention.window must be", "at least 1, got 0"),
    "rotary's own check": ("[rotary]\ntheta = 0.5\n", "rotary.theta must be", "above 1, got 0.5"),
    "length": ("[data]\nlength = 1\n", "data.length must be at least 2", "got 1"),
    "held_out": (
        "[data]\nheld_out = 1.0\n",
        "data.held_out must be above 0 and below 1",
        "got 1.0",
    ),
    "missing path": ('[data]\nsource = "folder"\n', "data.path must be an existing path", "got ''"),
    "needless path": ('[data]\npath = "x"\n', "data.path must be empty with", "got 'x'"),
    "needless validation path": (
        '[data]\nvalidation_path = "x"\n',
        "data.validation_path must be empty with data.source = 'stdlib'",
        "got 'x'",
    ),
    "held_out beside validation_path": (
        '[data]\nsource = "folder"\npath = "x"\nvalidation_path = "y"\nheld_out = 0.1\n',
        "data.held_out must be 0.05 with data.validation_path",
        "got 0.1",
    ),
    "held_out of a prepared folder": (
        '[data]\nsource = "prepared"\npath = "x"\nheld_out = 0.1\n',
        "data.held_out must be 0.05 with data.source = 'prepared' (the folder's own holds)",
        "got 0.1",
    ),
    "tokenizer of a prepared folder": (
        '[data]\nsource = "prepared"\npath = "x"\ntokenizer = "t.json"\n',
        "data.tokenizer must be 'bytes' with data.source = 'prepared'",
        "got 't.json'",
    ),
    "verify of text": (
        "[data]\nverify = false\n",
        "data.verify must be True unless data.source = 'prepared'",
        "got False",
    ),
    "micro_batch": (
        "[data]\nglobal_batch = 4\nmicro_batch = 3\n",
        "data.micro_batch must be a divisor of data.global_batch = 4",
        "got 3",
    ),
    "learning rate": (
        "[optimizer]\nlr = 0.0\n",
        "optimizer.lr must be a positive number",
        "got 0.0",
    ),
    "cp": ("[parallel]\ncp = 0\n", "parallel.cp must be at least 1", "got 0"),
    "dp": ("[parallel]\ndp = 0\n", "parallel.dp must be at least 1, or -1", "got 0"),
    "recompute_branches": (
        '[parallel]\nrecompute_branches = ["gather"]\n',
        "parallel.recompute_branches",
        "must be a choice from branches",
    ),
    "fetch": ('[parallel]\nfetch = "all"\n', "parallel.fetch", "full"),
    "exact_gradients": (
        "[parallel]\nexact_gradients = 6\n",
        "parallel.exact_gradients must be 0 or a power of two",
        "got 6",
    ),
    "dry run with exact_gradients": (
        "[parallel]\nexact_gradients = 4\n[run]\ndry_run = true\n",
        "run.dry_run must be False with parallel.exact_gradients, which has no estimate",
        "got True",
    ),
    "layout": ('[parallel]\nlayout = "striped"\n', "parallel.layout", "zigzag"),
    "steps": ("[run]\nsteps = 0\n", "run.steps must be at least 1", "got 0"),
    "temperature": (
        "[run]\ntemperature = 0.0\n",
        "run.temperature must be a positive number",
        "got 0.0",
    ),
    "dense attention in zigzag over two ranks": (
        '[model]\nattention = "dense"\n[parallel]\ncp = 2\n',
        "parallel.layout must be 'contiguous', or 'zigzag_per_document' in bfloat16, with dense",
        "got 'zigzag'",
    ),
    "hybrid model in zigzag over two ranks": (
        "[model]\ndense_every = 2\n[parallel]\ncp = 2\n",
        "parallel.layout must be 'contiguous', or",
        "with dense layers (model.attention, model.dense_every) and parallel.cp = 2, got 'zigzag'",
    ),
    "dense attention in float32 over two ranks": (
        (
            '[model]\nattention = "dense"\n[run]\ndtype = "float32"\n'
            '[parallel]\ncp = 2\nlayout = "zigzag_per_document"\n'
        ),
        "run.dtype must be 'bfloat16', unless parallel.layout = 'contiguous'",
        "got 'float32'",
    ),
    "every layer dense by the pattern": (
        "[model]\ndense_every = 1\n",
        "model.dense_every must be 0, or 2 to model.layers = 4 with model.attention = 'nsa'",
        "got 1",
    ),
    "a pattern longer than the model": (
        "[model]\ndense_every = 5\n",
        "model.dense_every must be 0, or 2 to model.layers = 4",
        "got 5",
    ),
    "a pattern of dense layers": (
        '[model]\nattention = "dense"\ndense_every = 2\n',
        "model.dense_every must be 0, or",
        "with model.attention = 'nsa', got 2",
    ),
    "hybrid model by Megatron": (
        "[model]\ndense_every = 2\n[parallel]\nengine = 'megatron'\n",
        "model.dense_every must be 0 with parallel.engine = 'megatron'",
        "got 2",
    ),
}


@pytest.mark.parametrize("text, first, second", REFUSED.values(), ids=REFUSED.keys())
def test_bad_settings_are_refused_by_name(
    tmp_path: Path, text: str, first: str, second: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, SMALLEST + text)
    assert first in str(error.value)
    assert second.lower() in str(error.value).lower()


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"attention\.num_kv_heads, attention\.head_dim must be set, got"
    ):
        read(tmp_path, "[attention]\nnum_heads = 4\n")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml"):
        from_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"run\.toml"):
        read(tmp_path, "[attention\n")
    with pytest.raises(ValueError, match=r"config must be .*, got None"):
        from_command_line([])


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALLEST + "[run]\nsteps = 5\nseed = 3\n")
    given = ["--run.steps", "7", "--attention.branches", "window", "compressed"]
    given += ["--attention.compress-hidden", "12", "--model.qk-norm", "True", "--run.steps", "8"]
    settings = from_command_line([str(path), *given])
    assert settings.run.steps == 8
    assert settings.run.seed == 3
    assert settings.attention.branches == ("compressed", "window")
    assert settings.attention.compress_hidden == 12
    assert settings.model.qk_norm is True


@pytest.mark.parametrize(
    "given, named",
    [
        (["--run.stepz", "7"], "--run.stepz"),
        (["--run.steps", "many"], "many"),
        (["--attention.num-kv-heads", "3"], "num_kv_heads must be a divisor of num_heads = "),
        (
            ["--parallel.cp", "2", "--model.attention", "dense"],
            "parallel.layout must be 'contiguous'",
        ),
    ],
    ids=["unknown option", "text for a number", "attention's own check", "dense over two ranks"],
)
def test_bad_overrides_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALLEST)
    with pytest.raises(SystemExit) as error:
        from_command_line([str(path), *given])
    assert error.value.code == 2
    output = capsys.readouterr()
    # The message is set in a box, whose lines may break anywhere.
    assert named.replace(" ", "") in "".join((output.out + output.err).split()).replace("│", "")


def test_the_default_run_has_the_sizes_that_make_it_a_test_of_everything() -> None:
    settings = from_toml(REPOSITORY / "configs" / "default.toml")
    attention, length = settings.attention, settings.data.length
    assert length >= 4 * attention.num_selected * attention.select_block
    assert length >= 8 * attention.window
    assert attention.compress_block > attention.compress_stride
    assert attention.num_kv_heads >= 2
    assert attention.independent_kv
    assert settings.model.layers >= 2
    assert settings.model.attention == "nsa"
    assert settings.parallel.cp == 2
