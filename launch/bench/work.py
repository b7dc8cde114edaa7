"""How much useful work an operator does, and how long a GPU could take for it.

Useful are the matrix products over the (query, key) pairs that the definition asks for, two
operations a multiplication and addition: Q K^T and P V forward, 2 (Dk + Dv) a pair and query head;
Q K^T again, dO V^T, P^T dO, dS K and dS^T Q backward, 2 (3 Dk + 2 Dv), which is 2.5 times forward
for equal widths; the scores that blocks are chosen by 2 Dk; a compressor's two products forward,
twice that backward. What a kernel computes beyond that, masked pairs and recomputation included,
counts as time only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.bench.options import Sizes
from nsa_dist import NSAConfig


@dataclass(frozen=True)
class Flops:
    """Useful operations of one call, forward and backward."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Pairs:
    """(query, key) pairs of one head over the whole stream, by branch."""

    compressed: int
    selected: int
    window: int
    dense: int


def count_pairs(options: Sizes, length: int) -> Pairs:
    """Pairs in the definition. Their number does not depend on which blocks are selected."""
    one = pairs_at(options.config, torch.arange(length // options.documents))
    counts = one.compressed, one.selected, one.window, one.dense
    return Pairs(*(options.documents * count for count in counts))


def pairs_at(config: NSAConfig, positions: Tensor) -> Pairs:
    """Pairs of the queries at these positions of their documents, int64 [N]."""
    return Pairs(**{name: int(count.sum()) for name, count in keys_at(config, positions).items()})


def keys_at(config: NSAConfig, positions: Tensor) -> dict[str, Tensor]:
    """Keys that each of these queries meets, int64 [N] by name of ``Pairs``."""
    t, select = positions, config.select_block
    blocks = (t - config.compress_block + 1) // config.compress_stride + 1
    # The own block is always chosen, and the only one that the query sees a part of.
    chosen = (t // select + 1).clamp(max=config.num_selected) - 1
    return {
        "compressed": blocks.clamp(min=0),
        "selected": chosen * select + t % select + 1,
        "window": (t + 1).clamp(max=config.window),
        "dense": t + 1,
    }


def attention_flops(options: Sizes, pairs: int) -> Flops:
    """A softmax attention with this number of pairs for each query head."""
    dk, dv, head_pairs = options.head_dim, options.v_head_dim, float(options.heads * pairs)
    return Flops(2 * (dk + dv) * head_pairs, 2 * (3 * dk + 2 * dv) * head_pairs)


def compression_flops(options: Sizes, length: int, width: int) -> Flops:
    """The ``mlp`` compressor of keys or values of that width, gradients of its weights included.

    A mean multiplies nothing.
    """
    if options.compress == "mean":
        return Flops(0.0, 0.0)
    config, size = options.config, length // options.documents
    blocks = max(0, (size - config.compress_block) // config.compress_stride + 1)
    tokens = options.documents * blocks * options.kv_heads
    hidden = config.compress_hidden or 2 * width
    forward = 2.0 * tokens * hidden * (config.compress_block + 1) * width
    return Flops(forward, 2 * forward)


def operator_flops(options: Sizes, length: int) -> dict[str, Flops]:
    """Operations by operator, and those of ``dense`` attention on the same stream."""
    pairs = count_pairs(options, length)
    flops = {
        "compression": compression_flops(options, length, options.head_dim),
        "compressed_attention": attention_flops(options, pairs.compressed),
        "block_selection": Flops(2.0 * options.head_dim * options.heads * pairs.compressed, 0.0),
        "selected_attention": attention_flops(options, pairs.selected),
        "window_attention": attention_flops(options, pairs.window),
        "combine": Flops(0.0, 0.0),
    }
    values = compression_flops(options, length, options.v_head_dim)
    whole = sum(flops.values(), start=values)
    return flops | {"whole": whole, "dense": attention_flops(options, pairs.dense)}


def fewest_bytes(inputs: Iterable[Tensor], output: Tensor) -> tuple[int, int]:
    """Bytes that any implementation moves, forward and backward: each tensor once.

    Backward reads the inputs and the output's gradient and writes the inputs' gradients.
    """
    read = sum(x.numel() * x.element_size() for x in inputs)
    written = output.numel() * output.element_size()
    return read + written, 2 * read + written


@dataclass(frozen=True)
class Peaks:
    """Measured peak rates of this GPU: TFLOP/s of a large matrix product in the run's dtype,
    and TB/s of a copy, bytes read and bytes written."""

    tflops: float
    tbytes: float

    def floor_ms(self, flops: float, size: float) -> tuple[float, str]:
        """Milliseconds for these operations and bytes at these rates, and which of the two takes
        longer: "products" or "bytes"."""
        products, moved = flops / self.tflops / 1e9, size / self.tbytes / 1e9
        return (products, "products") if products >= moved else (moved, "bytes")
