"""What the benchmark counts as useful work, and how long a GPU could take for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from launch.bench.options import OPERATORS, random_choices
from launch.bench.work import Peaks, count_pairs, fewest_bytes, operator_flops
from nsa_kernels.reference import selected_mask, window_mask
from tests.launch.bench.test_bench import SMALL


@pytest.mark.parametrize("length, documents", [(90, 1), (90, 3), (7, 1), (33, 1)])
def test_pairs_are_those_of_the_masks(length: int, documents: int) -> None:
    options = replace(SMALL, lengths=(length,), documents=documents)
    size = length // documents
    choices = random_choices(size, options.config, "cpu")
    seen = sum(4 * i + 7 <= t for t in range(size) for i in range(max(0, (size - 8) // 4 + 1)))
    pairs = count_pairs(options, length)
    assert pairs.compressed == documents * seen
    of_groups = selected_mask(choices, 16).sum(dim=(0, 2)).tolist()
    assert [documents * count for count in of_groups] == [pairs.selected, pairs.selected]
    assert pairs.window == documents * int(window_mask(size, 20, torch.device("cpu")).sum())
    assert pairs.dense == documents * sum(t + 1 for t in range(size))


def test_flops_are_those_of_the_products() -> None:
    flops, pairs = operator_flops(SMALL, 90), count_pairs(SMALL, 90)
    # Rows times inner times columns of every product, twice: H = 4, Dk = 16, Dv = 32.
    for name, count in (
        ("compressed_attention", pairs.compressed),
        ("selected_attention", pairs.selected),
        ("window_attention", pairs.window),
        ("dense", pairs.dense),
    ):
        assert flops[name].forward == 2 * 4 * count * (16 + 32)
        assert flops[name].backward == 2 * 4 * count * (16 + 32 + 32 + 16 + 16)
    assert flops["block_selection"].forward == 2 * 4 * pairs.compressed * 16
    blocks = len([i for i in range(90) if 4 * i + 8 <= 90])
    keys = 2 * 2 * blocks * (8 * 16 * 32 + 32 * 16)
    values = 2 * 2 * blocks * (8 * 32 * 64 + 64 * 32)
    assert flops["compression"].forward == keys
    assert flops["compression"].backward == 2 * keys
    parts = [flops[name] for name in OPERATORS if name != "whole"]
    assert flops["whole"].forward == sum(part.forward for part in parts) + values
    assert flops["whole"].backward == sum(part.backward for part in parts) + 2 * values
    equal = operator_flops(replace(SMALL, v_head_dim=16), 90)["window_attention"]
    assert equal.backward == 2.5 * equal.forward


def test_the_floor_is_of_products_or_of_bytes() -> None:
    peaks = Peaks(tflops=500.0, tbytes=4.0)
    assert peaks.floor_ms(1e12, 4e9) == (2.0, "products")
    assert peaks.floor_ms(1e12, 4e10) == (10.0, "bytes")
    a, b = torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)
    assert fewest_bytes([a, b], a) == (60 + 14 + 60, 2 * 74 + 60)


# Whether a result is right.
