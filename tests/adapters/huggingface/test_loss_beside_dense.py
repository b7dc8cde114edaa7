"""What a conversion costs past the length that it covers: losses of a small trained model.

The model reads the standard library's sources as bytes. Every document length is a table row: the
loss of the same bytes by the dense model, by the converted one as it starts, and by one whose
blocks are chosen without regard to the query (compressors that give zeros, so that all scores are
equal and the first blocks win).
"""

from __future__ import annotations

import copy
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_dist import NSAConfig

pytest.importorskip("transformers")

from nsa_dist.adapters.huggingface import convert_to_nsa
from tests.adapters.huggingface.small_models import FAMILIES

CONFIG = NSAConfig(
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=8,
    window=128,
    independent_kv=False,
)
COVERED = min(CONFIG.window, CONFIG.num_selected * CONFIG.select_block)
LENGTHS = (COVERED, 2 * COVERED, 4 * COVERED, 8 * COVERED)
STEPS = 400


def _text() -> Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(x.read_bytes() for x in files)), dtype=torch.uint8)


def _rows(text: Tensor, generator: torch.Generator, batch: int, length: int) -> Tensor:
    starts = torch.randint(len(text) - length, (batch,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts]).long()


def _trained(text: Tensor) -> Any:
    model_type, config_type = FAMILIES["qwen3"]
    torch.manual_seed(0)
    model = model_type(
        config_type(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            max_position_embeddings=8 * COVERED,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = _rows(text, generator, 4, 8 * COVERED)
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _loss(model: Any, text: Tensor, length: int) -> float:
    """Mean over the second half of each row, where there is a past to attend to."""
    rows = _rows(text, torch.Generator().manual_seed(2), 16, length)
    labels = rows.clone()
    labels[:, : length // 2] = -100
    return float(model(rows, labels=labels, use_cache=False).loss)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_loss_past_the_covered_length() -> None:
    text = _text()
    held_out = len(text) // 20
    dense = _trained(text[:-held_out])
    converted = convert_to_nsa(copy.deepcopy(dense), CONFIG)
    blind = copy.deepcopy(converted)
    with torch.no_grad():
        for name, parameter in blind.named_parameters():
            if "k_compressor" in name:
                parameter.zero_()
    print("\ntokens  dense   converted  difference  first blocks")
    losses = {}
    for length in LENGTHS:
        losses[length] = [_loss(x, text[-held_out:], length) for x in (dense, converted, blind)]
        a, b, c = losses[length]
        print(f"{length:6}  {a:.4f}  {b:.4f}     {b - a:+.4f}     {c - a:+.4f}")
    # As everywhere: equal where all is covered.
    assert abs(losses[COVERED][1] - losses[COVERED][0]) <= 1e-3 * losses[COVERED][0]
    # And past it block means choose better than no look at the query does.
    for length in LENGTHS[2:]:
        assert losses[length][1] < losses[length][2]
