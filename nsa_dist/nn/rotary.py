"""Rotary position embedding with the usual context extensions.

Angles, the products of positions and frequencies, are float64; cos and sin are rounded once, to
float32. At position 131072 a float32 angle would be wrong by up to 8e-3 radians.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_dist.config import RotaryConfig


def inverse_frequencies(config: RotaryConfig, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, float64 [rotary_dim / 2], on the CPU.

    Sources: arXiv 2104.09864 (none), Llama 3.1's published scaling (llama3), arXiv 2309.00071
    section 3.2 (yarn).
    """
    dim = config.rotary_dim(head_dim)
    cpu = torch.device("cpu")  # The default device may be another.
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=cpu) / dim
    frequency = config.theta**-exponent
    if config.scaling == "none":
        return frequency
    stretched = frequency / config.factor
    if config.scaling == "linear":
        return stretched
    if config.scaling == "llama3":
        turns = config.original_max_positions * frequency / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * stretched

    def pair_of(turns: float) -> float:
        """The (fractional) index of the pair with this many turns over the original context."""
        span = config.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(config.theta))

    first = max(math.floor(pair_of(config.beta_fast)), 0)
    last = min(math.ceil(pair_of(config.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device=cpu)
    stretch = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return stretch * stretched + (1 - stretch) * frequency


def rotary_cos_sin(config: RotaryConfig, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotated pair at ``positions``.

    Args:
        positions: integer [...], any device.

    Returns:
        float32 [..., rotary_dim / 2] each, on the device of ``positions``; under yarn both are
        multiplied by the attention factor.
    """
    # Apple's GPUs have no float64; all other devices that torch trains on do.
    frequency = inverse_frequencies(config, head_dim).to(positions.device)
    angle = positions.to(torch.float64)[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    if config.scaling == "yarn":
        factor = config.attention_factor
        if factor is None:
            factor = 0.1 * math.log(config.factor) + 1.0
        cos, sin = cos * factor, sin * factor
    return cos.float(), sin.float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + r/2}) of the first r channels; the others stay as they are.

    Args:
        x: [..., heads, D].
        cos, sin: float32 [..., r/2], one row for all heads of a token.

    Returns:
        A tensor like ``x``, computed in float32 (float64 for float64) and rounded once.
    """
    half = cos.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[..., None, :].to(compute), sin[..., None, :].to(compute)
    first, second = x[..., :half].to(compute), x[..., half : 2 * half].to(compute)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), dim=-1)
