"""Small settings and exact comparison for cases whose numbers are worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_kernels.reference import ReferenceOptions


def small(**changes) -> ReferenceOptions:
    """One head of width 1, blocks of 4 every 2, selection blocks of 4, the mean as compressor."""
    options = {
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "num_selected": 2,
        "num_init_blocks": 1,
        "num_local_blocks": 1,
        "window": 3,
        "compress": "mean",
    }
    return ReferenceOptions(**{**options, **changes})


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, double(expected), rtol=0, atol=atol)
