"""The adapter says what it needs, and leaves transformers as it is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[3]

UNTOUCHED = """
import importlib
import sys
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

NAMES = (
    "cache_utils masking_utils modeling_utils modeling_layers generation.utils "
    "models.llama.modeling_llama models.qwen3.modeling_qwen3 models.llama.configuration_llama "
    "models.auto.modeling_auto models.auto.configuration_auto"
).split()
MODULES = {name: importlib.import_module(f"transformers.{name}") for name in NAMES}
AUTO = MODULES["models.auto.modeling_auto"]


def seen():
    found = {}
    for where, module in MODULES.items():
        for name, value in vars(module).items():
            found[where, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                for key, inner in vars(value).items():
                    if callable(inner) or isinstance(inner, (str, bool, tuple)):
                        found[where, name, key] = repr(inner)
    registries = {
        "layers of caches": MODULES["cache_utils"].DYNAMIC_LAYER_TYPE_MAPPING,
        "layers of static caches": MODULES["cache_utils"].STATIC_LAYER_TYPE_MAPPING,
        "masks": MODULES["masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        "attention": MODULES["modeling_utils"].ALL_ATTENTION_FUNCTIONS._global_mapping,
        "configs": MODULES["models.auto.configuration_auto"].CONFIG_MAPPING._extra_content,
        "models": AUTO.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content,
        "decoders": AUTO.MODEL_MAPPING._extra_content,
        "classifiers": AUTO.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content,
        "classifiers of tokens": AUTO.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING._extra_content,
        "names of models": AUTO.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    # Entries of our own names are all that is added.
    adapter = sys.modules.get("nsa_dist.adapters.huggingface.models")
    ours = () if adapter is None else [x for pair in adapter.FAMILIES.values() for x in pair]
    types = {x.model_type for x in ours if hasattr(x, "model_type")}
    own = {*ours, *types, *(f"fsdp_{x}" for x in types)}
    return found | {
        name: repr(sorted(map(str, ((k, v) for k, v in x.items() if k not in own))))
        for name, x in registries.items()
    }


# What models write into their own classes when they are made.
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
             num_attention_heads=1, num_key_value_heads=1)
LlamaForCausalLM(LlamaConfig(**sizes)), Qwen3ForCausalLM(Qwen3Config(**sizes))
before = seen()
from tests.adapters.huggingface.small_models import some_tokens, sparse_model

for family in ("llama", "qwen3"):
    model = sparse_model(family)
    model(some_tokens(1, 30), labels=some_tokens(1, 30)).loss.backward()
    model.generate(some_tokens(1, 5), max_new_tokens=3)
after = seen()
assert len(before) > 300, len(before)
changed = {name for name in before | after if before.get(name) != after.get(name)}
assert changed == set(), changed
"""


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "nsa_dist.adapters.huggingface"
    for name in [x for x in sys.modules if x.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    importlib.import_module("nsa_dist")
    with pytest.raises(ModuleNotFoundError, match=r"pip install nsa-dist\[huggingface\]"):
        importlib.import_module(package)


def test_transformers_stays_as_it_is() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-c", UNTOUCHED],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
