"""Decoding over the cache gives what a whole forward gives, for every prompt length and batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache

from nsa_dist.adapters.huggingface import NSACacheLayer
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    left_padded,
    some_tokens,
    sparse_model,
)
from tests.distributed.layer_case import largest
from tests.traps.mutation import Rewritten, catches

NEW = 64
SEED = 3  # Of a token after which models write texts of 20 tokens and more.
LENGTHS = range(1, 2 * SMALL.select_block + 1)
# Lengths at and around the edges of compression and selection blocks.
SOME = (1, 3, 4, 5, 8, 9, 16)
MODELS: dict[str, tuple[str, Any, Any]] = {
    "llama-shared": ("llama", SMALL, None),
    "llama-independent": ("llama", replace(INDEPENDENT, num_kv_heads=4), None),
    "qwen3-shared": ("qwen3", SMALL, None),
    "qwen3-independent": ("qwen3", INDEPENDENT, None),
    "qwen3-hybrid": ("qwen3", replace(SMALL, compress="conv1d"), [0]),
    "llama-without-compressed": (
        "llama",
        replace(INDEPENDENT, num_kv_heads=4, branches=("selected", "window")),
        None,
    ),
}
IN_CI = {"llama-independent": (3, 8, 16), "qwen3-shared": SOME, "qwen3-hybrid": (4, 9)}


def _model(name: str) -> Any:
    family, config, layers = MODELS[name]
    return sparse_model(
        family,
        config,
        layers=layers,
        dtype=torch.float64,
        num_key_value_heads=config.num_kv_heads,
    )


def _generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(tokens, **settings)


@functools.cache
def _recomputed(name: str) -> tuple[Tensor, Tensor]:
    """A greedy text from one token on, every token by a forward over all before it, and its logits.

    What follows any beginning of it is the rest: prompts of all lengths have it as reference.
    """
    model, tokens, logits = _model(name), some_tokens(1, 1, seed=SEED), []
    with torch.no_grad():
        for _ in range(max(LENGTHS) + NEW - 1):
            last = model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
            tokens = torch.cat((tokens, last.argmax(-1, keepdim=True)), dim=1)
            logits.append(last)
    return tokens, torch.stack(logits)


@catches(
    "compressed keys not kept up to date",
    "those of earlier steps are forgotten",
    Rewritten(
        "nsa_dist.decoding.cache:_with_room",
        "$ROOM[:, :$USED] = $BUFFER[:, :$USED]",
        "pass",
    ),
    case="qwen3-shared-9",
)
@pytest.mark.parametrize(
    ("name", "length"),
    [
        pytest.param(
            name,
            length,
            marks=() if length in IN_CI.get(name, ()) else pytest.mark.slow,
        )
        for name in MODELS
        for length in LENGTHS
    ],
)
def test_greedy_over_the_cache_is_full_recomputation(name: str, length: int) -> None:
    text, logits = _recomputed(name)
    prompt, end = text[:, :length], length + NEW
    found = _generate(_model(name), prompt, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, text[:, :end])
    logits = logits[length - 1 : end - 1]
    # Tokens may repeat; logits do not. generate rounds them to float32.
    rounding = torch.finfo(torch.float32).eps * largest(logits)
    assert largest(torch.stack(found.logits) - logits) <= rounding


@catches(
    "left padding counted as tokens",
    "a row's blocks start at its first column, not at its first token",
    Rewritten(
        "nsa_dist.adapters.huggingface:plan_cached",
        "plan_step($CONFIG, starts, $PAST, $NEW, $CAPACITY, $DEVICE)",
        "plan_step($CONFIG, (0,) * len(starts), $PAST, $NEW, $CAPACITY, $DEVICE)",
    ),
    case="qwen3-shared-all",
)
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        pytest.param("qwen3-hybrid", SOME, id="qwen3-hybrid"),
        *(
            pytest.param(name, tuple(LENGTHS), id=f"{name}-all", marks=pytest.mark.slow)
            for name in MODELS
        ),
    ],
)
def test_left_padded_batch_is_its_rows(name: str, lengths: tuple[int, ...]) -> None:
    """Prompts of all these lengths in one batch."""
    model = _model(name)
    prompts = [some_tokens(1, n, seed=n)[0] for n in lengths]
    tokens, mask = left_padded(prompts)
    found = _generate(model, tokens, attention_mask=mask)
    for row, prompt in zip(found, prompts, strict=True):
        alone = _generate(model, prompt[None])[0]
        assert torch.equal(row[-NEW:], alone[-NEW:])


@pytest.mark.parametrize("name", ["llama-independent", "qwen3-hybrid"])
@pytest.mark.parametrize("sizes", [(1,) * 12, (7, 1, 4), (2, 10), (12,)])
def test_any_number_of_tokens_at_a_time(name: str, sizes: tuple[int, ...]) -> None:
    """Logits of a prompt taken in pieces, behind padding that outlasts the first of them."""
    model = _model(name)
    rows = [some_tokens(1, n, seed=n)[0] for n in (52, 33)]
    tokens, mask = left_padded(rows)
    cache = DynamicCache(config=model.config)
    pieces, start = [], 0
    with torch.no_grad():
        for size in (sum(sizes), 10, 18, *sizes):
            end = start + size
            piece = model(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
            ).logits
            pieces.append(piece)
            start = end
        whole = model(tokens, attention_mask=mask, use_cache=False).logits
    assert start == tokens.shape[1]
    found = torch.cat(pieces, dim=1)
    shown = mask.bool()
    assert largest((found - whole)[shown]) <= 1e-12 * largest(whole)
    layer = cache.layers[0]
    assert isinstance(layer, NSACacheLayer)
    assert layer.compressed_keys is not None
    assert layer.compressed_keys.shape[:2] == (2, (52 - 4) // 2 + 1)


def test_beam_search_reorders_the_cache() -> None:
    model = _model("qwen3-shared")
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (11, 6)])
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 40, "attention_mask": mask}
    with_cache = _generate(model, tokens, **options)
    without = _generate(model, tokens, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_assisted_generation_crops_the_cache() -> None:
    model, assistant = _model("llama-independent"), sparse_model("llama", dtype=torch.float64)
    prompt = some_tokens(1, 13)
    found = _generate(model, prompt, assistant_model=assistant)
    assert torch.equal(found, _generate(model, prompt))


@pytest.mark.parametrize("keep", [0, 1, 5, 20, 29])
def test_cropped_cache_goes_on(keep: int) -> None:
    model = _model("qwen3-independent")
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (30, 24)])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        cache.crop(keep - 30)
        assert cache.get_seq_length() == keep
        other = some_tokens(2, 25, seed=9)
        tokens = torch.cat((tokens[:, :keep], other), dim=1)
        mask = torch.cat((mask[:, :keep], torch.ones(2, 25, dtype=torch.int64)), dim=1)
        found = model(other, attention_mask=mask, past_key_values=cache).logits
        whole = model(tokens, attention_mask=mask, use_cache=False).logits[:, keep:]
    assert largest(found - whole) <= 1e-12 * largest(whole)


def test_rows_of_a_cache() -> None:
    """What contrastive search and the like ask of a cache: repeat rows, keep some, start anew."""
    model = _model("llama-independent")
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (30, 24)])
    cache = DynamicCache()
    step = some_tokens(3, 9, seed=4)
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        cache.batch_repeat_interleave(2)  # Rows 0, 0, 1, 1.
        cache.batch_select_indices(torch.tensor([True, False, True, True]))  # 0, 1, 1
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        longer = torch.cat((mask[rows], torch.ones_like(step)), dim=1)
        found = model(step, attention_mask=longer, past_key_values=cache).logits
        whole = model(
            torch.cat((tokens[rows], step), dim=1), attention_mask=longer, use_cache=False
        ).logits[:, 30:]
        assert largest(found - whole) <= 1e-12 * largest(whole)
        cache.layers[0].reset()
        assert cache.layers[0].get_seq_length() == 0


def test_sampling_and_several_sequences() -> None:
    model = _model("llama-shared")
    prompt = some_tokens(1, 20)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(
            model.generate(
                prompt,
                do_sample=True,
                num_return_sequences=3,
                max_new_tokens=20,
                use_cache=use_cache,
            )
        )
    assert torch.equal(*results)
