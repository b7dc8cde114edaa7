"""Generation over a static cache: its steps give what others give, and one graph fits them all.

In the place of CUDA graphs stand recorded ones, which run a step's operators again on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationMixin, StaticCache

from nsa_dist.adapters.huggingface import cuda_graphs
from nsa_dist.adapters.huggingface.cache import NSAStaticCacheLayer
from tests.adapters.huggingface.recorded import Recorded, record_graphs
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    ON_GPU,
    SMALL,
    left_padded,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest
from tests.traps.mutation import Rewritten, catches

NEW = 40
# Before and at the end of the first compression and selection block, and of the window.
LENGTHS = (1, 3, 4, 9, 15)
MODELS: dict[str, tuple[str, Any]] = {
    "llama-independent": ("llama", replace(INDEPENDENT, num_kv_heads=4)),
    "qwen3-shared": ("qwen3", SMALL),
    "llama-without-compressed": ("llama", replace(SMALL, branches=("selected", "window"))),
}


def _model(name: str) -> Any:
    family, config = MODELS[name]
    return sparse_model(
        family, config, dtype=torch.float64, num_key_value_heads=config.num_kv_heads
    )


def _prompts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in lengths])
    return {"inputs": tokens, "attention_mask": mask}


def _generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    return model.generate(return_dict_in_generate=True, **settings)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """``generate`` replays steps as on a GPU; the graphs that were made."""
    return record_graphs(monkeypatch)


@catches(
    "left padding counted as tokens",
    "positions of a static cache's steps are columns",
    Rewritten(
        "nsa_dist.decoding.static:StaticTables.__init__",
        "($B, 1, -start, $COMPRESSED, $SELECTED, $FIRST)",
        "($B, 1, 0, $COMPRESSED, $SELECTED, $FIRST)",
    ),
    case="qwen3-shared",
)
@pytest.mark.parametrize("name", MODELS)
def test_static_cache_gives_what_a_growing_one_gives(name: str) -> None:
    """Over ends of compression and selection blocks and of the window, in a padded batch."""
    model = _model(name)
    expected = _generate(model, **_prompts())
    found = _generate(model, cache_implementation="static", **_prompts())
    layer = found.past_key_values.layers[0]
    assert isinstance(layer, NSAStaticCacheLayer)
    assert layer.rows.capacity == layer.get_max_length() == max(LENGTHS) + NEW - 1
    assert torch.equal(found.sequences, expected.sequences)
    logits = torch.stack(expected.logits)
    rounding = torch.finfo(torch.float32).eps * largest(logits)  # generate rounds them.
    assert largest(torch.stack(found.logits) - logits) <= rounding


@catches(
    "a CUDA graph of another length",
    "the graph has the position of the token with which it was captured",
    Rewritten(
        "nsa_dist.decoding.static:StaticTables.step",
        "self._table_B6 + self._moves_6 * self._past",
        "self._table_B6 + self._moves_6 * past",
    ),
    case="qwen3-shared-greedy",
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"do_sample": True, "num_return_sequences": 2}, id="sampled"),
        pytest.param({"prefill_chunk_size": 5}, id="chunked"),
    ],
)
@pytest.mark.parametrize("name", ["llama-independent", "qwen3-shared"])
def test_one_graph_fits_all_steps(
    name: str, options: dict[str, Any], graphs: list[Recorded]
) -> None:
    """Captured once, at the second step; bits are those of steps without a graph."""
    model = _model(name)
    options = {"cache_implementation": "static", **options, **_prompts()}
    found = _generate(model, **options)
    assert len(graphs) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *_: False)
        expected = _generate(model, **options)
    assert len(graphs) == 1
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    caches = found.past_key_values, expected.past_key_values
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == max(LENGTHS) + NEW - 1
    assert torch.equal(caches[0].layers[1].keys, caches[1].layers[1].keys)


class OnOneDevice(TorchDispatchMode):
    """Fails where an operator takes or makes a tensor of another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, found))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor)}
        assert devices <= {self.device}, (function, devices)
        return found


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_devices_alone(name: str) -> None:
    """On meta nothing has values that a host could read, or shapes could follow from."""
    model = _model(name)
    cache = StaticCache(config=model.config, max_cache_len=64)
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (40, 5)])
    model(tokens, attention_mask=mask, past_key_values=cache)
    model.to("meta")
    for layer in cache.layers:
        for x in ("keys", "values", "compressed_keys", "compressed_values"):
            setattr(layer.rows, x, getattr(layer.rows, x).to("meta"))
    tables = cache.layers[0].tables()
    tables.begin(40)
    step = tokens[:, :1].to("meta")
    with OnOneDevice("meta"):
        found = model(step, position_ids=step, past_key_values=cache, nsa_tables=tables)
    assert found.logits.shape == (2, 1, model.config.vocab_size)


def test_a_graph_ends_with_its_generation(graphs: list[Recorded]) -> None:
    """A cache of one's own is emptied and used again, with other weights and for another batch."""
    model = _model("qwen3-shared")
    cache = StaticCache(config=model.config, max_cache_len=64)
    for lengths in (LENGTHS, LENGTHS, (8, 2)):
        prompts = _prompts(lengths)
        expected = _generate(model, max_new_tokens=12, **prompts)
        found = _generate(model, max_new_tokens=12, past_key_values=cache, **prompts)
        assert torch.equal(found.sequences, expected.sequences)
        cache.reset()
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            model.lm_head.weight.mul_(-1.0)
        model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert len(graphs) == 3


def test_what_a_graph_does_not_give_is_computed_without(graphs: list[Recorded]) -> None:
    """Hidden states, and steps of several tokens."""
    model = _model("qwen3-shared")
    options = {"output_hidden_states": True, "max_new_tokens": 5, **_prompts()}
    found = _generate(model, cache_implementation="static", **options)
    expected = _generate(model, **options)
    assert graphs == []
    for step, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert largest(step[-1] - other[-1]) <= 1e-12 * largest(other[-1])


def test_what_no_graph_can_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a loop over experts that were chosen, of which the host must know."""
    record_graphs(monkeypatch)

    def capture(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    message = "must be one whose steps the host does not wait for .*disable_compile.* not permitted"
    with pytest.raises(RuntimeError, match=message):
        _generate(_model("qwen3-shared"), cache_implementation="static", **_prompts())


def test_a_row_of_padding_alone(graphs: list[Recorded]) -> None:
    """Its first token is the first one that is generated."""
    model = _model("qwen3-shared")
    prompts = _prompts()
    prompts["attention_mask"][1] = 0
    found = _generate(model, cache_implementation="static", **prompts)
    assert len(graphs) == 1
    assert torch.equal(found.sequences, _generate(model, **prompts).sequences)


def test_beam_search_reorders_the_cache_in_place() -> None:
    model = _model("qwen3-shared")
    options = {"num_beams": 3, "output_logits": False, **_prompts()}
    found = _generate(model, cache_implementation="static", **options)
    assert torch.equal(found.sequences, _generate(model, **options).sequences)


@torch.no_grad()
def test_a_cropped_cache_goes_on() -> None:
    model, tokens = _model("llama-independent"), some_tokens(2, 30)
    caches = StaticCache(config=model.config, max_cache_len=40), DynamicCache(config=model.config)
    places, logits = [], []
    for cache in caches:
        for step in (tokens, tokens[:, :1], tokens[:, 1:2]):
            model(step, past_key_values=cache)
        places.append(cache.layers[0].rows.keys.data_ptr())
        cache.crop(-7)
        found = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(3, 15)]
        logits.append(torch.cat(found, dim=1))
    assert caches[0].layers[0].rows.keys.data_ptr() == places[0]
    assert largest(logits[0] - logits[1]) <= 1e-12 * largest(logits[1])


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@torch.no_grad()
def test_steps_of_kernels_have_the_bits_of_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And launch the same programs at every step; a row begins to compress, blocks end."""
    from triton.runtime import interpreter

    from nsa_kernels.triton.decoding import constants
    from tests.ops.triton.guard import fixed_order_dot

    monkeypatch.setattr(constants, "SPLIT", 8)  # Several parts, more of them in a longer cache.
    config = replace(SMALL, **ON_GPU, window=20)
    model = sparse_model("qwen3", config, num_hidden_layers=1)
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (62, 6)])
    launches: list[Any] = []
    run = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        shapes = [(tuple(x.shape), x.stride()) if isinstance(x, Tensor) else x for x in leaves]
        launches.append((self.fn.__name__, self.grid, shapes))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    logits, of_steps = [], []
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=100),
    ):
        model.use_group(None, backend="pytorch")  # Faster than the interpreter.
        model(tokens[:, :59], attention_mask=mask[:, :59], past_key_values=cache)
        model.use_group(None, backend="triton")
        # A static step makes the last block again, with the bits of the same backend.
        with fixed_order_dot():
            model(tokens[:, 59:], attention_mask=mask, past_key_values=cache)
        seen, found = mask, []
        for i in range(3):  # 62 + 2 tokens end a selection block, 6 + 2 a compression block.
            step = some_tokens(2, 1, seed=i)
            seen = torch.cat((seen, torch.ones_like(step)), dim=1)
            launches.clear()
            with fixed_order_dot():
                found.append(model(step, attention_mask=seen, past_key_values=cache).logits)
            of_steps.append(list(launches))
        logits.append(torch.cat(found, dim=1))
    assert torch.equal(*logits)
    growing, static = of_steps[:3], of_steps[3:]
    assert all(step == static[0] for step in static)
    assert any(step != growing[0] for step in growing)
