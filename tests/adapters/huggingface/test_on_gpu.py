"""A converted model on one GPU: bfloat16, the Triton backend, training and generation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import NSAConfig

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from nsa_dist.adapters.huggingface import convert_to_nsa, cuda_graphs
from tests.adapters.huggingface.small_models import cast, dense_model, left_padded, some_tokens
from tests.ops.accuracy import assert_2x

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    compress_block=32,
    compress_stride=16,
    select_block=64,
    num_selected=4,
    window=128,
    independent_kv=False,
)
COVERED = CONFIG.num_selected * CONFIG.select_block


def _model(family: str, config: NSAConfig, dtype: torch.dtype, backend: str) -> Any:
    """Made in float64 and rounded, so that all dtypes start alike; gates that let all through."""
    dense = dense_model(
        family,
        dtype=torch.float64,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=4096,
    )
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    model = convert_to_nsa(dense, config, gate_init=(0.0, 0.0, 0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model = cast(model, dtype).to("cuda")
    model.use_group(None, backend=backend)
    return model


def _results(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Logits [tokens, vocabulary] and gradients."""
    out = model(tokens, use_cache=False)
    # A linear function of the logits: its gradient rounds nothing in the dtype under test.
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.logits.shape, generator=generator).to(out.logits)
    out.logits.backward(weight.bfloat16().to(out.logits))
    return {"logits": out.logits.detach().flatten(0, 1)} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_in_bfloat16_by_the_2x_rule(family: str) -> None:
    """On documents whose blocks are all chosen, so that every dtype attends to the same."""
    config = replace(CONFIG, independent_kv=family == "qwen3")
    tokens = some_tokens(2, COVERED).cuda()
    ours, plain, x64 = (
        _results(_model(family, config, dtype, backend), tokens)
        for dtype, backend in (
            (torch.bfloat16, "triton"),
            (torch.bfloat16, "pytorch"),
            (torch.float64, "pytorch"),
        )
    )
    assert ours.keys() == plain.keys() == x64.keys()
    for name in x64:
        assert_2x(ours[name], plain[name], x64[name], torch.bfloat16, name)


def test_prefill_and_whole_forward_have_equal_bits() -> None:
    """Where blocks go unchosen too: the kernels are given positions, not who asks."""
    model = _model("llama", CONFIG, torch.bfloat16, "auto")
    tokens = some_tokens(2, 5 * COVERED + 3).cuda()
    with torch.no_grad():
        cached = model(tokens, use_cache=True).logits
        whole = model(tokens, use_cache=False).logits
    assert torch.equal(cached, whole)


def test_generation_in_bfloat16() -> None:
    """A padded batch, token by token, as near to float64 as a whole forward in plain bfloat16."""
    new, prompts = 64, [some_tokens(1, n, seed=n)[0] for n in (COVERED - 64, 100, 1)]
    tokens, mask = (x.cuda() for x in left_padded(prompts))
    model = _model("llama", CONFIG, torch.bfloat16, "auto")
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    found = model.generate(
        tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    mask = torch.cat((mask, mask.new_ones(3, new)), dim=1)[:, :-1]
    sequences = found.sequences[:, :-1]
    plain, x64 = (
        _model("llama", CONFIG, dtype, "pytorch")(
            sequences, attention_mask=mask, use_cache=False, logits_to_keep=new
        ).logits.detach()
        for dtype in (torch.bfloat16, torch.float64)
    )
    logits = torch.stack(found.logits, dim=1)
    for row in range(3):
        assert_2x(logits[row], plain[row], x64[row], torch.bfloat16, f"row {row}")


def test_greedy_over_the_cache_is_full_recomputation_in_float32() -> None:
    model = _model("qwen3", CONFIG, torch.float32, "auto")
    prompt = some_tokens(1, 2 * COVERED).cuda()
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False}
    found = model.generate(prompt, **options)
    with torch.no_grad():
        logits = model(found[:, :-1], use_cache=False).logits
    assert torch.equal(logits[:, prompt.shape[1] - 1 :].argmax(-1), found[:, prompt.shape[1] :])


@torch.no_grad()
def test_a_step_does_not_wait_for_the_device() -> None:
    model = _model("llama", CONFIG, torch.bfloat16, "triton")
    tokens, mask = left_padded([some_tokens(1, n, seed=n)[0] for n in (300, 170)])
    tokens, mask = tokens.cuda(), mask.cuda()
    cache = DynamicCache(config=model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    step = some_tokens(2, 1).cuda()
    seen = [torch.cat((mask, mask.new_ones(2, n)), dim=1) for n in (1, 2)]
    model(step, attention_mask=seen[0], past_key_values=cache)  # Compiles.
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model(step, attention_mask=seen[1], past_key_values=cache).logits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert found.isfinite().all()


NEW = 3 * CONFIG.select_block + 5
"""Over ends of compression and selection blocks, and of the window where rows are short."""


def _generated(model: Any, lengths: tuple[int, ...], **options: Any) -> tuple[Any, float]:
    """What ``generate`` returns with logits, and its tokens a second."""
    tokens, mask = (x.cuda() for x in left_padded([some_tokens(1, n, seed=n)[0] for n in lengths]))
    torch.manual_seed(5)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    found = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    torch.cuda.synchronize()
    return found, NEW * len(lengths) / (time.perf_counter() - begin)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element for each CUDA graph that ``generate`` made."""
    made: list[None] = []
    capture = cuda_graphs.capture

    def counted(function: Callable[[], Any], device: torch.device) -> Any:
        made.append(None)
        return capture(function, device)

    monkeypatch.setattr(cuda_graphs, "capture", counted)
    return made


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("lengths", [(700,), (3 * COVERED, 100, 7, 1)], ids=["row", "batch"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_steps_of_a_cuda_graph(
    sampled: bool, lengths: tuple[int, ...], backend: str, captured: list[None]
) -> None:
    """Bits of steps without a graph; of a growing cache too, by kernels."""
    family, shared = (
        ("llama", CONFIG) if sampled else ("qwen3", replace(CONFIG, independent_kv=True))
    )
    model = _model(family, shared, torch.bfloat16, backend)
    static: dict[str, Any] = {"cache_implementation": "static", "do_sample": sampled}
    plain, _ = _generated(model, lengths, disable_compile=True, **static)
    assert captured == []
    graphed, speed = _generated(model, lengths, **static)
    assert len(captured) == 1
    growing, growing_speed = _generated(model, lengths, do_sample=sampled)
    assert torch.equal(graphed.sequences, plain.sequences)
    assert torch.equal(torch.stack(graphed.logits), torch.stack(plain.logits))
    if backend == "triton":
        assert torch.equal(graphed.sequences, growing.sequences)
        assert torch.equal(torch.stack(graphed.logits), torch.stack(growing.logits))
    print(f"\n{lengths}: {speed:.0f} tokens/s graphed, {growing_speed:.0f} without, both at first")


@torch.no_grad()
def test_a_replayed_step_does_not_wait_for_the_device(captured: list[None]) -> None:
    model = _model("llama", CONFIG, torch.bfloat16, "triton")
    cache = StaticCache(config=model.config, max_cache_len=400)
    model(some_tokens(2, 300).cuda(), past_key_values=cache)
    steps = cuda_graphs.GraphedSteps(model)
    token = some_tokens(2, 1).cuda()
    for _ in range(3):
        steps(input_ids=token, past_key_values=cache)
    assert len(captured) == 1
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = steps(input_ids=token, past_key_values=cache).logits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert found.isfinite().all()
    assert cache.get_seq_length() == 304


def test_memory_of_a_graph_ends_with_its_generation(captured: list[None]) -> None:
    model = _model("llama", CONFIG, torch.bfloat16, "triton")
    memory = []
    for _ in range(4):
        _generated(model, (700, 30), cache_implementation="static")
        gc.collect()
        torch.cuda.empty_cache()
        memory.append(torch.cuda.memory_reserved())
    assert len(captured) == 4
    assert memory[-1] == memory[1], memory
