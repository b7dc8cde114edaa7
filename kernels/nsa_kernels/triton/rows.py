"""Products of rows with a matrix whose bits depend on the row alone.

They are the products of compression blocks, of one row each: tiles of the sum have sizes that
widths and dtype give, whatever the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_kernels.triton.compression.projection import project
from nsa_kernels.triton.shared.arguments import last_dim_contiguous
from nsa_kernels.triton.shared.launch import on_its_device


@torch.no_grad()
@on_its_device
def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `nsa_kernels.backend.MultiplyRows`."""
    rows_N = torch.arange(len(x), device=x.device)
    bias_1O = None if bias is None else bias.float()[None]
    out_N1O = project(last_dim_contiguous(x)[:, None], rows_N, weight.contiguous()[None], bias_1O)
    return out_N1O[:, 0]
