"""Dropout whose mask depends on the token, not on the rank that holds it."""

from __future__ import annotations

import torch
from torch import Tensor

# Odd constants of the splitmix64 generator, as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 words."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)


def token_dropout(
    x: Tensor, p: float, seed: Tensor, documents: Tensor, positions: Tensor
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1/(1-p).

    The mask is a hash of (seed, document, position, channel), so it is the same on every rank and
    in every layout.

    Args:
        x: [N, width].
        seed: int64 scalar, equal on all ranks.
        documents, positions: int64 [N].
    """
    token = _mix(_mix(seed + _GOLDEN * (documents + 1)) + _GOLDEN * (positions + 1))
    channel = torch.arange(1, x.shape[-1] + 1, device=x.device)
    bits = _shift_right(_mix(token[:, None] + _GOLDEN * channel), 32)
    keep = bits >= int(p * (1 << 32))
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def drop_tokens(x: Tensor, p: float, documents: Tensor, positions: Tensor) -> Tensor:
    """``token_dropout`` of a layer's output, with a seed from torch's CPU generator.

    Args:
        x: [B, L, width].
        documents, positions: int64 [B * L].
    """
    seed = torch.randint(1 << 62, (), device="cpu").to(x.device)
    dropped = token_dropout(x.flatten(0, 1), p, seed, documents, positions)
    return dropped.unflatten(0, x.shape[:2])
