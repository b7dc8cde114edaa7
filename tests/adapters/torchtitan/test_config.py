"""Configs and checkpoints of torchtitan with Native Sparse Attention, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import BlockCompressor, NSAConfig
from nsa_kernels import get_backend
from tests.adapters.torchtitan.conftest import MISSING

if not MISSING:
    from tests.adapters.torchtitan import shim  # noqa: F401

    # isort: split

    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3
    from torchtitan.models.llama3 import config_registry as llama3
    from torchtitan.models.qwen3 import config_registry as qwen3
    from torchtitan.tools.logging import logger
    from torchtitan.trainer import Trainer

    from nsa_dist.adapters import torchtitan
    from nsa_dist.adapters.torchtitan import NSAttention, config_registry, nsa, use_nsa
    from nsa_dist.adapters.torchtitan.state_dict import reorder, to_halves, to_pairs
    from tests.adapters.torchtitan import small

pytestmark = pytest.mark.slow  # torchtitan's import alone takes ten seconds.


def with_options(**options: Any) -> Callable[[], Any]:
    return lambda: use_nsa(small.dense(), **{**small.OPTIONS, **options})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "other-heads": (
        lambda: use_nsa(small.dense(), NSAConfig(8, 2, 16)),
        "num_heads must be the model's 4, got 8",
    ),
    "options-beside-a-config": (
        lambda: use_nsa(small.dense(), NSAConfig(4, 2, 16), window=8),
        "options must be none beside an NSAConfig, got ['window']",
    ),
    "custom": (with_options(compress="custom"), "compress must be one of the built-in kinds"),
    "pre-rope": (with_options(compress_pre_rope=True), "compress_pre_rope must be False"),
    "value-width": (
        lambda: use_nsa(small.dense(), NSAConfig(4, 2, 16, v_head_dim=8)),
        "v_head_dim must be None or head_dim = 16 under torchtitan, got 8",
    ),
    "gate": (with_options(gate="mlp"), "gate must be 'linear' under torchtitan, got 'mlp'"),
    "heads-as-options": (
        with_options(num_heads=4),
        "option of NSAConfig must be one of branches, compress, ",
    ),
    "latent-attention": (
        lambda: use_nsa(deepseek_v3.deepseek_v3_debugmodel()),
        "layers.0.attention must be a GQAttention.Config, got ",
    ),
    "fused-collectives": (
        lambda: use_nsa(llama3.llama3_debugmodel_dist_gemm()),
        "tp_gemm_backend must be 'default' with Native Sparse Attention",
    ),
    "no-config": (lambda: use_nsa(None), "config must be a Trainer.Config of torchtitan, got None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(ValueError) as raised:
        make()
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("llama3_debugmodel_nsa", "llama3_debugmodel"),
        ("llama3_8b_nsa", "llama3_8b"),
        ("llama3_70b_nsa", "llama3_70b"),
        ("qwen3_14b_nsa", "qwen3_14b"),
        ("qwen3_32b_nsa", "qwen3_32b"),
    ],
)
def test_configs_of_the_registry(name: str, dense: str) -> None:
    """Every layer of the model has the attention, and nothing else of the run is changed."""
    config = getattr(config_registry, name)()
    model = built(config)
    attentions = [layer.attention for layer in model.layers.values()]
    assert all(isinstance(attention, NSAttention) for attention in attentions)
    given = getattr(llama3 if dense.startswith("llama3") else qwen3, dense)()
    assert len(attentions) == len(given.model_spec.model.layers)
    given.training.disable_cuda_graphs = True
    for part in ("training", "optimizer", "parallelism", "activation_checkpoint", "checkpoint"):
        assert getattr(config, part) == getattr(given, part), part


def built(config: Trainer.Config, device: str = "meta") -> Any:
    """The model of a config, on one rank."""
    spec = config.model_spec
    assert spec is not None
    spec.model.update_from_config(config=config)
    with torch.device(device):
        model = spec.model.build()
    model.verify_module_protocol()
    if device == "cpu":
        with torch.no_grad():
            model.init_weights()
    return model


def test_initial_gates() -> None:
    model = built(small.sparse(), "cpu")
    for layer in model.layers.values():
        bias = layer.attention.gate.bias.view(4, 3)
        assert torch.equal(bias, torch.tensor(small.OPTIONS["gate_init"]).expand(4, 3))


def test_positions_of_another_batch_in_the_same_tensor_make_another_plan() -> None:
    layers = [layer.attention for layer in built(small.sparse(), "cpu").layers.values()]
    q, positions = torch.zeros(1, 64, 4, 16), torch.arange(64)[None]
    first = layers[0]._plan(q, positions)
    assert first.longest == 64 and layers[1]._plan(q, positions) is first
    positions[0, 32:] -= 32
    second = layers[0]._plan(q, positions)
    assert second.longest == 32 and layers[1]._plan(q, positions) is second
    positions.data[0, 16:32] -= 16  # As messages of torch.distributed write: torch does not count.
    assert layers[1]._plan(q, positions).documents.max() == 2


def shared(**options: Any) -> Trainer.Config:
    config = small.dense()
    for layer in config.model_spec.model.layers:
        layer.attention.rope = replace(layer.attention.rope, scaling="none", theta=10000.0)
    return use_nsa(config, independent_kv=False, **{**small.OPTIONS, **options})


KINDS = ["mlp", "linear", "conv1d", "attention_pool", "mean"]


@pytest.mark.parametrize("per_head", [False, True], ids=["", "per-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reordered_compressor_compresses_reordered_keys(kind: str, per_head: bool) -> None:
    if kind == "mean" and per_head:
        pytest.skip("has no weights")
    config = NSAConfig(
        4, 2, 6, compress=kind, compress_block=4, compress_stride=2, compress_per_head=per_head
    )
    ours, theirs = (BlockCompressor(config, 6, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for (name, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            x.normal_()
            y.copy_(reorder(x, kind, name, 6, to_halves))
            assert torch.equal(reorder(y, kind, name, 6, to_pairs), x)
    keys = torch.randn(12, 2, 6, dtype=torch.float64)
    rows, backend = torch.arange(0, 9, 2), get_backend("pytorch")
    expected = to_halves(ours(keys, rows, backend), -1)
    found = theirs(to_halves(keys, -1), rows, backend)
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_converted_transformers_model(kind: str) -> None:
    """Weights through ``to_hf`` into the model of the Hugging Face adapter, and back."""
    pytest.importorskip("transformers")  # Not among what torchtitan needs.
    from transformers import LlamaConfig, LlamaForCausalLM

    from nsa_dist.adapters.huggingface import convert_to_nsa

    config = shared(compress=kind)
    model = built(config, "cpu")
    adapter = config.model_spec.state_dict_adapter(config.model_spec.model, None)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for name, x in weights.items():
        if "compressor" in name:
            x.add_(0.1 * torch.randn_like(x))
    model.load_state_dict(weights)
    folder = adapter.to_hf(dict(weights))
    back = adapter.from_hf(dict(folder))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) for name, x in weights.items())

    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=model.norm.eps or 1e-6,
            tie_word_embeddings=False,
        )
    )
    nsa = replace(config.model_spec.model.nsa, gate_init=(0.0, 0.0, 0.0))
    sparse = convert_to_nsa(dense, nsa)  # Its gates start as the conversion says.
    missing, unexpected = sparse.load_state_dict(folder, strict=False)
    assert (missing, unexpected) == ([], [])
    tokens = torch.randint(64, (2, 100))
    positions = torch.arange(100).expand(2, -1)
    with torch.no_grad():
        expected = sparse(tokens).logits
        found = model(tokens, positions.contiguous())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def written(tmp_path: Path, leave_out: Callable[[str], bool]) -> tuple[Any, dict[str, Tensor]]:
    """An adapter, and the weights of a model of which a folder lacks some."""
    config = shared()
    weights = {name: x.clone() for name, x in built(config, "cpu").state_dict().items()}
    adapter = config.model_spec.state_dict_adapter(config.model_spec.model, None)
    folder = {name: x.contiguous() for name, x in adapter.to_hf(dict(weights)).items()}
    kept = {name: x.clone() for name, x in folder.items() if not leave_out(name)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return adapter, weights


def read(adapter: Any, path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchtitan's checkpoint manager reads a folder: into other weights of the same shapes."""
    asked = adapter.to_hf({name: torch.zeros_like(x) for name, x in weights.items()})
    reader = adapter.get_hf_storage_reader(str(path))
    dcp.load(asked, storage_reader=reader, no_dist=True)
    found: dict[str, Tensor] = adapter.from_hf(asked)
    return found


def test_a_folder_is_read_back(tmp_path: Path) -> None:
    adapter, weights = written(tmp_path, lambda name: False)
    found = read(adapter, tmp_path, weights)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], x) for name, x in weights.items())


def test_a_dense_folder_leaves_gates_and_compressors(tmp_path: Path) -> None:
    adapter, weights = written(tmp_path, lambda name: "gate.proj" in name or "compressor" in name)
    found = read(adapter, tmp_path, weights)
    ours = {name for name in weights if ".gate." in name or "compressor" in name}
    assert found.keys() == weights.keys() - ours
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_folder_without_some_of_them_is_refused(tmp_path: Path) -> None:
    adapter, weights = written(tmp_path, lambda name: "v_compressor" in name)
    with pytest.raises(ValueError, match="folder must be of a dense model, or have every gate"):
        read(adapter, tmp_path, weights)


def test_separate_keys_have_no_folder() -> None:
    config = small.sparse()
    weights = built(config, "cpu").state_dict()
    adapter = config.model_spec.state_dict_adapter(config.model_spec.model, None)
    with pytest.raises(ValueError, match="independent_kv must be False for Hugging Face folders"):
        adapter.to_hf(weights)


def test_an_override_tells_that_folders_lose_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    layers = small.dense().model_spec.model.layers
    torchtitan._warn_of_folders.cache_clear()
    monkeypatch.setattr(logger, "warning", told.append)
    for layer in layers:
        nsa(layer.attention, **small.OPTIONS)
    assert len(told) == 1
    assert "Hugging Face folders without the gates and compressors" in told[0]
