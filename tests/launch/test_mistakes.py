"""A user's error is printed once, whatever the number of ranks, and ends all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from launch.settings import Settings, to_toml
from tests.distributed.ranks import Ranks
from tests.launch.common import agree, replaced, tiny
from tests.launch.test_tokenizer import saved, words

LAUNCH = Path(local.__file__).parent
RanksOf = Callable[[int], Ranks]


def start(
    settings: Settings, folder: Path, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``train.py`` on two ranks, as torchrun starts it."""
    (folder / "run.toml").write_text(to_toml(settings))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*line, str(LAUNCH / "train.py"), str(folder / "run.toml"), *options],
        cwd=folder,
        env={**local.environment(), **variables},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_a_bad_line_is_told_once_over_all_ranks(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "\\ud800"}\n')
    data = {"source": "jsonl", "path": str(path), "global_batch": 2}
    done = start(tiny(root, data=data), tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("must hold Unicode text in the field 'text', got a lone") == 1
    assert f"in {path} line 2" in done.stderr
    assert (done.stdout + done.stderr).count("data.path") == 1
    # torchrun's own traceback names none of our files.
    assert f'File "{LAUNCH}' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("store", ["of_the_agents", "of_rank_0"])
@pytest.mark.parametrize("option", ["--run.stepz", "--optimizer.lr", "--help"])
def test_what_tyro_says_is_told_once_over_all_ranks(
    root: Path, tmp_path: Path, option: str, store: str
) -> None:
    settings = tiny(root, data={"global_batch": 2})
    options = [option] if "help" in option else [option, "nan"]
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(store == "of_rank_0"))}
    done = start(settings, tmp_path, *options, **apart)
    assert (done.returncode == 0) == (option == "--help")
    told = {"--help": "show this help message", "--run.stepz": "Unrecognized options: --run.stepz"}
    text = done.stdout + done.stderr
    assert text.count(told.get(option, "optimizer.lr must be a finite number, got nan")) == 1


@pytest.mark.slow
def test_what_is_switched_off_of_a_tokenizer_is_told_once(root: Path, tmp_path: Path) -> None:
    inner = words(red=1, green=2)
    inner.enable_truncation(3)
    tokenizer = saved(inner, tmp_path, "tokenizers")
    settings = tiny(root, data={"tokenizer": tokenizer, "global_batch": 2, "length": 64})
    settings = replaced(settings, "run", steps=1, prompt="red", folder=str(tmp_path / "run"))
    done = start(settings, tmp_path)
    assert done.returncode == 0, done.stderr
    note = f"data.tokenizer: truncation to 3 tokens of '{tokenizer}' switched off"
    assert (done.stdout + done.stderr).count(note) == 1


def test_a_prompt_of_no_token_is_refused_before_the_run(root: Path, tmp_path: Path) -> None:
    from launch.data.tokenizer import make_tokenizer
    from launch.sampling import check_prompt

    tokenizer = make_tokenizer(saved(words(red=1), tmp_path, "tokenizers"))
    settings = tiny(root, run={"prompt": " \n", "sample_tokens": 4})
    with pytest.raises(
        ValueError, match=r"run\.prompt must be text of at least one token.*, got ' \\n'"
    ):
        check_prompt(settings, tokenizer)
    check_prompt(replaced(settings, "run", sample_tokens=0), tokenizer)


def test_a_mistake_of_one_rank_is_raised_on_every_rank(ranks_of: RanksOf, root: Path) -> None:
    ranks, settings = ranks_of(2), tiny(root)

    def words_of(problems: list[str]) -> set[str]:
        answers = ranks.try_run(agree, settings, problems)
        assert not any(ok for ok, _ in answers)
        return {text.strip().splitlines()[-1] for _, text in answers}

    assert ranks.run(agree, settings, ["", ""]) == ["done"] * 2
    (told,) = words_of(["", "a is wrong"])
    assert told.endswith("ValueError: a is wrong (on rank 1)")
    (told,) = words_of(["b is wrong", "a is wrong"])
    assert told.endswith("ValueError: b is wrong (on rank 0); a is wrong (on rank 1)")
    (told,) = words_of(["a is wrong"] * 2)
    assert told.endswith("ValueError: a is wrong")
