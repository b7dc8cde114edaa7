"""A step over the cache: what it reads and writes, and what it leaves to others."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from nsa_dist.adapters.huggingface.batch import assert_starts, read_mask
from nsa_dist.adapters.huggingface.cache import NSACacheLayer
from nsa_dist.decoding.cache import capacity_for
from nsa_dist.plan.grid import num_blocks
from tests.adapters.huggingface.small_models import (
    ON_GPU,
    SMALL,
    left_padded,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest
from tests.ops.accuracy import assert_2x
from tests.traps.mutation import Rewritten, catches


class Elements(TorchDispatchMode):
    """Counts the elements that operators write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            for x in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(x, Tensor):
                    self.written += x.numel()
        return found


def _filled(model: Any, length: int) -> DynamicCache:
    """A cache of any ``length`` tokens, whose keys and values are random."""
    cache = DynamicCache(config=model.config)
    model(some_tokens(1, 8), past_key_values=cache)
    generator = torch.Generator().manual_seed(length)
    for layer in cache.layers:
        assert isinstance(layer, NSACacheLayer)
        rows, capacity = layer.rows, capacity_for(length + 1, 0)
        rows.length, rows.capacity = length, capacity
        for name in ("keys", "values", "compressed_keys", "compressed_values"):
            of = num_blocks(capacity, rows.config) if "compressed" in name else capacity
            old = getattr(rows, name)
            new = torch.randn(1, of, *old.shape[2:], generator=generator).to(old)
            setattr(rows, name, new)
    return cache


@torch.no_grad()
@catches(
    "a step over all cached rows",
    "all rows are copied before some are gathered",
    Rewritten("nsa_kernels.pytorch:_gather", "rows.index_select(0, $INDEX)", "(rows + 0)[$INDEX]"),
)
def test_a_step_grows_by_compressed_tokens_alone() -> None:
    """From 1K to 16K tokens: by the new ones' keys and values, and some numbers for each head."""
    blocks = {"compress_block": 32, "compress_stride": 16, "select_block": 64}
    config = replace(SMALL, window=128, **blocks)
    model, written, lengths = sparse_model("llama", config), [], (1024, 16384)
    for length in lengths:
        cache = _filled(model, length)
        with Elements() as elements:
            model(some_tokens(1, 1), past_key_values=cache)
        written.append(elements.written)
    first, last = (num_blocks(length, config) for length in lengths)
    numbers = 2 * config.num_kv_heads * config.head_dim + 12 * config.num_heads
    assert written[1] - written[0] <= len(cache.layers) * (last - first) * numbers, written


@torch.no_grad()
@catches(
    "a cache that is copied at every step",
    "room is made for the new token alone",
    Rewritten("nsa_dist.decoding.cache:capacity_for", "$LENGTH <= $CAPACITY", "$LENGTH < 0"),
)
def test_tokens_are_written_in_place() -> None:
    model = sparse_model("llama")
    cache = DynamicCache(config=model.config)
    model(some_tokens(1, 40), past_key_values=cache)
    rows = cache.layers[0].rows
    names = ("keys", "values", "compressed_keys", "compressed_values")
    before = [getattr(rows, name).data_ptr() for name in names]
    assert rows.capacity == 64
    for step in range(24):
        model(some_tokens(1, 1, seed=step), past_key_values=cache)
        assert before == [getattr(rows, name).data_ptr() for name in names]
    model(some_tokens(1, 1), past_key_values=cache)
    assert rows.capacity == capacity_for(65, 64) == 128


def test_a_graph_keeps_the_rows_that_it_saved() -> None:
    model = sparse_model("llama", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)  # so that no key needs a gradient
    tokens = some_tokens(1, 30)

    def gradient(cache: Any, after: Any) -> Tensor:
        model.zero_grad()
        logits = [model(x, past_key_values=cache).logits for x in tokens.split((20, 7, 3), dim=1)]
        after()
        torch.cat(logits, dim=1).square().sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def more() -> None:
        cache.crop(-5)
        for step in range(4):
            model(some_tokens(1, 1, seed=step), past_key_values=cache)

    found = gradient(cache, more)
    model.zero_grad()
    model(tokens, use_cache=False).logits.square().sum().backward()
    whole = model.model.layers[0].self_attn.q_proj.weight.grad
    assert largest(found - whole) <= 1e-12 * largest(whole)


def test_what_inference_mode_cached_goes_on_outside_of_it() -> None:
    model = sparse_model("llama", dtype=torch.float64)
    tokens = some_tokens(1, 33)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens[:, :30], past_key_values=cache)
    with torch.no_grad():
        found = model(tokens[:, 30:], past_key_values=cache).logits
        whole = model(tokens, use_cache=False).logits[:, 30:]
    assert largest(found - whole) <= 1e-12 * largest(whole)


@torch.no_grad()
def test_what_lies_behind_the_tokens_is_never_read() -> None:
    model = sparse_model("qwen3", dtype=torch.float64)
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (30, 11)])
    cache = DynamicCache(config=model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    soiled = copy.deepcopy(cache)
    for layer in soiled.layers:
        rows = layer.rows
        rows.keys[:, 30:], rows.values[:, 30:] = torch.nan, torch.nan
        for b, start in enumerate(rows.starts):
            blocks = num_blocks(30 - start, SMALL)
            rows.compressed_keys[b, blocks:] = torch.nan
            rows.compressed_values[b, blocks:] = torch.nan
    mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.int64)), dim=1)
    step = some_tokens(2, 3, seed=5)
    found, expected = (
        model(step, attention_mask=mask, past_key_values=x).logits for x in (soiled, cache)
    )
    assert torch.equal(found, expected)


@torch.no_grad()
def test_transformers_sees_the_tokens() -> None:
    model = sparse_model("llama")
    cache = DynamicCache(config=model.config)
    model(some_tokens(2, 13), past_key_values=cache)
    layer = cache.layers[0]
    assert layer.is_initialized
    assert layer.keys.shape == layer.values.shape == (2, SMALL.num_kv_heads, 13, SMALL.head_dim)
    assert layer.get_mask_sizes(4) == (17, 0)
    with pytest.raises(ValueError, match="past_key_values must be filled by calls"):
        layer.update(layer.keys, layer.values)
    with pytest.raises(ValueError, match="keys of past_key_values must be written by calls"):
        layer.keys = layer.keys


def test_a_device_judges_a_mask_as_the_host_does() -> None:
    """All masks of one row and five columns."""
    for values in itertools.product((0, 1), repeat=5):
        mask = torch.tensor([values])
        try:
            ranges = read_mask(mask, 1, 5)
        except ValueError:
            starts = None
        else:
            starts = 0 if ranges is None else ranges[0][0]
        for start in range(4):
            if starts == start:
                assert_starts(mask, (start,))
                continue
            with pytest.raises(RuntimeError, match="attention_mask must be one"):
                assert_starts(mask, (start,))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@torch.no_grad()
def test_steps_by_kernels_for_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a left padded batch, of which one row begins to compress."""
    from nsa_kernels import triton

    config = replace(SMALL, **ON_GPU)
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (41, 5)])
    steps = (some_tokens(2, 1, seed=5), some_tokens(2, 3, seed=6), some_tokens(2, 1, seed=7))
    calls = []
    few = triton.attend_few

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(q))
        return few(q, *args, **kwargs)

    monkeypatch.setattr(triton, "attend_few", counted)

    def logits(backend: str, dtype: torch.dtype) -> Tensor:
        model = sparse_model("qwen3", config, dtype=dtype, num_hidden_layers=1)
        cache, seen, found = DynamicCache(config=model.config), mask, []
        model.use_group(None, backend="pytorch")  # Faster than the interpreter.
        model(tokens, attention_mask=mask, past_key_values=cache)
        model.use_group(None, backend=backend)
        for step in steps:
            seen = torch.cat((seen, torch.ones_like(step)), dim=1)
            found.append(model(step, attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(found, dim=1).flatten(0, 1)

    ours = logits("triton", torch.float32)
    assert calls == [2, 6, 2]  # queries
    plain, exact = logits("pytorch", torch.float32), logits("pytorch", torch.float64)
    assert len(calls) == 3
    assert_2x(ours, plain, exact, torch.float32, "logits of steps")
