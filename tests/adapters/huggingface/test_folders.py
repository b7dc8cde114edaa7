"""A saved folder loads where people load folders: in processes that never heard of this package."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from nsa_dist.adapters.huggingface import NSALlamaConfig, NSALlamaForCausalLM, convert_to_nsa
from nsa_dist.adapters.huggingface.models import MODELING_FILE
from tests.adapters.huggingface.small_models import (
    SMALL,
    VOCABULARY,
    dense_model,
    some_tokens,
    sparse_model,
)

ROOT = Path(__file__).resolve().parents[3]

FRESH = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, tokens, again = Path(sys.argv[1]), torch.load(sys.argv[2]), sys.argv[3]
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError(f"{auto.__name__} loaded a folder that nobody trusts")
assert AutoTokenizer.from_pretrained(folder)("w3").input_ids == [3]
assert "nsa_dist" not in sys.modules

trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trusted)
assert type(config).__name__ == "NSAQwen3Config", type(config)
assert AutoTokenizer.from_pretrained(folder, **trusted)("w3").input_ids == [3]
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
assert type(model).__module__ == "nsa_dist.adapters.huggingface.models", type(model)
decoder = AutoModel.from_pretrained(folder, **trusted)
assert type(decoder).__name__ == "NSAQwen3Model", type(decoder)
with torch.no_grad():
    logits = model(tokens).logits
    assert torch.equal(model.lm_head(decoder(tokens).last_hidden_state), logits)
torch.save(logits, sys.argv[2])
generate = pipeline("text-generation", model=str(folder), device="cpu", **trusted)
assert generate("w3", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("w3")
model.save_pretrained(again)
"""


def _fresh(script: str, *arguments: object, home: Path) -> None:
    """Run a script in a process of its own, with transformers' cache in ``home``."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(home)},
        stdin=subprocess.DEVNULL,  # Where transformers would ask whether to trust the folder.
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_a_process_that_imports_transformers_alone(tmp_path: Path) -> None:
    model = sparse_model("qwen3", layers=[1])
    folder, again, file = tmp_path / "saved.v1", tmp_path / "again", tmp_path / "tokens.pt"
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    tokens = some_tokens(2, 50)
    torch.save(tokens, file)
    _fresh(FRESH, folder, file, again, home=tmp_path / "home")
    with torch.no_grad():
        assert torch.equal(torch.load(file), model(tokens).logits)
    for name in ("config.json", f"{MODELING_FILE}.py", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("trusted", [False, True])
def test_a_process_that_imports_the_adapter_runs_no_code_of_the_folder(
    trusted: bool, tmp_path: Path
) -> None:
    model = sparse_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / f"{MODELING_FILE}.py").write_text("raise AssertionError\n", encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trusted)
    assert type(config) is NSALlamaConfig
    for auto, made in ((AutoModelForCausalLM, NSALlamaForCausalLM), (AutoModel, type(model.model))):
        assert type(auto.from_pretrained(tmp_path, trust_remote_code=trusted)) is made
        assert type(auto.from_config(config, trust_remote_code=trusted)) is made


def test_what_is_written_beside_the_config(tmp_path: Path) -> None:
    model = sparse_model("llama")
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    text = (tmp_path / f"{MODELING_FILE}.py").read_text(encoding="utf-8")
    assert all(line.startswith("from nsa_dist.") for line in text.splitlines())
    names: dict[str, object] = {}
    exec(text, names)
    classes = {auto: names[path.split(".")[1]] for auto, path in saved["auto_map"].items()}
    assert classes["AutoConfig"] is NSALlamaConfig
    assert classes["AutoModelForCausalLM"] is NSALlamaForCausalLM
    assert classes["AutoModel"] is type(model.model)
    # A loaded config names the same, and Auto classes that mark a class as theirs change nothing.
    NSALlamaConfig.register_for_auto_class()
    NSALlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    NSALlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8")) == saved
    assert sorted(x.name for x in (tmp_path / "again").iterdir()) == [
        "config.json",
        f"{MODELING_FILE}.py",
    ]
    # A config that goes to a file of another name stays alone.
    other = tmp_path / "other"
    other.mkdir()
    model.config.to_json_file(other / "of_a_model.json")
    assert [x.name for x in other.iterdir()] == ["of_a_model.json"]


def test_a_converted_model_has_no_folder(tmp_path: Path) -> None:
    """Not the dense model's: PEFT names it as the base of adapters, TRL loads a reference there."""
    dense_model("llama").save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = convert_to_nsa(dense, SMALL)
    paths = [m.__dict__["name_or_path"] for m in model.modules() if "name_or_path" in m.__dict__]
    assert paths == ["", ""]
    path = pickle.loads(pickle.dumps(model.config))._name_or_path
    assert path == json.loads(json.dumps(path)) == ""
    with pytest.raises(OSError, match=r"none: this model .* save_pretrained, then from_pretrained"):
        AutoConfig.from_pretrained(path)
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert loaded.config._name_or_path == loaded.name_or_path == str(tmp_path / "sparse")
