"""A run's settings: read from TOML, overridden, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import Settings, from_command_line, from_toml, to_toml

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.toml"))
SMALLEST = "[attention]\nnum_heads = 4\nnum_kv_heads = 2\nhead_dim = 8\n"


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return from_toml(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_reads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    settings = from_toml(path)
    assert read(tmp_path, to_toml(settings)) == settings


def test_text_options_survive_a_round_trip(tmp_path: Path) -> None:
    settings = read(tmp_path, SMALLEST + '[run]\nprompt = "a \\"b\\" \\\\ \\n é"\n')
    assert settings.run.prompt == 'a "b" \\ \n é'
    assert read(tmp_path, to_toml(settings)) == settings


REFUSED = {
    "unknown section": ("[atention]\nwindow = 1\n", "atention", "sections: attention, rotary"),
    "unknown key": ("[data]\nlenght = 64\n", "data.lenght: found 64", "length, global_batch"),
    "unknown key of the attention": ("blocks = 3\n", "attention.blocks: found 3", "select_block"),
    "key outside of a section": ("[run]\nsteps = 1\n[run.more]\na = 1\n", "run.more", "steps"),
    "text for a number": ('[run]\nsteps = "9"\n', "run.steps: found '9'", "type int"),
    "truth for a number": ("[run]\nsteps = true\n", "run.steps: found True", "type int"),
    "fraction for an integer": ("[run]\nsteps = 9.5\n", "run.steps: found 9.5", "type int"),
    "value outside of the choice": ('[model]\nattention = "flash"\n', "model.attention", "dense"),
    "too many gate logits": ("gate_init = [1.0, 2.0]\n", "attention.gate_init", "3 values work"),
    "attention's own check": ("window = 0\n", "attention.window: found 0", "at least 1"),
    "rotary's own check": ("[rotary]\ntheta = 0.5\n", "rotary.theta: found 0.5", "above 1"),
    "length": ("[data]\nlength = 0\n", "data.length: found 0", "1 or more"),
    "held_out": ("[data]\nheld_out = 1.0\n", "data.held_out: found 1.0", "held_out < 1"),
    "missing path": ('[data]\nsource = "folder"\n', "data.path: found ''", "Path"),
    "needless path": ('[data]\npath = "x"\n', "data.path: found 'x'", "no path"),
    "micro_batch": (
        "[data]\nglobal_batch = 4\nmicro_batch = 3\n",
        "data.micro_batch: found 3",
        "divisor of data.global_batch = 4",
    ),
    "learning rate": ("[optimizer]\nlr = 0.0\n", "optimizer.lr: found 0.0", "positive"),
    "cp": ("[parallel]\ncp = 0\n", "parallel.cp: found 0", "1 or more"),
    "dp": ("[parallel]\ndp = 0\n", "parallel.dp: found 0", "-1"),
    "layout": ('[parallel]\nlayout = "striped"\n', "parallel.layout", "zigzag"),
    "steps": ("[run]\nsteps = 0\n", "run.steps: found 0", "1 or more"),
    "temperature": ("[run]\ntemperature = 0.0\n", "run.temperature: found 0.0", "positive"),
    "dense attention in zigzag over two ranks": (
        '[model]\nattention = "dense"\n[parallel]\ncp = 2\n',
        "parallel.layout: found 'zigzag'",
        "'zigzag_per_document' in bfloat16 and 'contiguous' in every run.dtype work",
    ),
    "hybrid model in zigzag over two ranks": (
        "[model]\ndense_every = 2\n[parallel]\ncp = 2\n",
        "parallel.layout: found 'zigzag'",
        "'contiguous' in every run.dtype work with dense layers",
    ),
    "dense attention in float32 over two ranks": (
        (
            '[model]\nattention = "dense"\n[run]\ndtype = "float32"\n'
            '[parallel]\ncp = 2\nlayout = "zigzag_per_document"\n'
        ),
        "run.dtype: found 'float32'",
        "'bfloat16', or parallel.layout = 'contiguous', works",
    ),
    "every layer dense by the pattern": (
        "[model]\ndense_every = 1\n",
        "model.dense_every: found 1",
        "0, or with attention 'nsa' 2 to layers = 4, works",
    ),
    "a pattern longer than the model": (
        "[model]\ndense_every = 5\n",
        "model.dense_every: found 5",
        "2 to layers = 4, works",
    ),
    "a pattern of dense layers": (
        '[model]\nattention = "dense"\ndense_every = 2\n',
        "model.dense_every: found 2",
        "0, or with attention 'nsa'",
    ),
    "hybrid model by Megatron": (
        "[model]\ndense_every = 2\n[parallel]\nengine = 'megatron'\n",
        "model.dense_every: found 2",
        "0 works with parallel.engine = 'megatron'",
    ),
}


@pytest.mark.parametrize("text, found, works", REFUSED.values(), ids=REFUSED.keys())
def test_bad_settings_are_refused_by_name(
    tmp_path: Path, text: str, found: str, works: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, SMALLEST + text)
    assert found in str(error.value)
    assert works.lower() in str(error.value).lower()


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention\.num_kv_heads, attention\.head_dim: not set"):
        read(tmp_path, "[attention]\nnum_heads = 4\n")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml"):
        from_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"run\.toml"):
        read(tmp_path, "[attention\n")
    with pytest.raises(ValueError, match=r"config: found None"):
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
        (["--attention.num-kv-heads", "3"], "num_kv_heads: found 3"),
        (["--parallel.cp", "2", "--model.attention", "dense"], "parallel.layout: found 'zigzag'"),
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
