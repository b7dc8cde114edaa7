"""Generation over a static cache: its steps give what others give, and one graph fits them all.

There is no GPU here. In the place of a CUDA graph stands ``Recorded``, which runs the operators of
a step again on the same tensors, as a graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from nsa_dist.adapters.huggingface import (
    NSALlamaForCausalLM,
    NSAQwen3ForCausalLM,
    cuda_graphs,
)
from nsa_dist.adapters.huggingface.cache import NSAStaticCacheLayer
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


HOST_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique",
}
"""Operators that read a tensor on the host, make one from the host's, or give shapes by values."""


class Recorded(TorchDispatchMode):
    """Records the operators of a function; ``replay`` runs them on the same tensors again.

    What they write to tensors that were there before is undone, as a capture computes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in HOST_READS, f"a step reads a tensor on the host: {name}"
        given = zip(function._schema.arguments, args, strict=False)
        for x in [x for of, x in given if of.is_write] + tree_leaves(kwargs.get("out")):
            if isinstance(x, Tensor):
                self._before.append((x, x.clone()))
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        return found

    def undo(self) -> None:
        for x, values in reversed(self._before):
            x.copy_(values)
        self._before.clear()

    def replay(self) -> None:
        for function, args, kwargs, found in self.calls:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


@contextmanager
def _no_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What reads values on the host without an operator fails."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step reads a tensor on the host")

    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, refused)
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """``generate`` replays steps as on a GPU; the graphs that were made."""
    made: list[Recorded] = []

    def capture(function: Callable[[], Any], _: torch.device) -> tuple[Callable[[], None], Any]:
        made.append(Recorded())
        with _no_values(monkeypatch), made[-1]:
            found = function()
        made[-1].undo()
        return made[-1].replay, found

    monkeypatch.setattr(cuda_graphs, "capture", capture)

    def is_static(_: Any, arguments: dict[str, Any], __: Any) -> bool:
        return isinstance(arguments["past_key_values"], StaticCache)

    for model in (NSALlamaForCausalLM, NSAQwen3ForCausalLM):
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", is_static)
    return made


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
        patch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: False)
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
