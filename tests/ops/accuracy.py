"""The rule that judges accuracy: at most twice the error of plain PyTorch in the same dtype.

err(x) = max |x - x64| over a tensor, where x64 is the float64 oracle and `plain` is the oracle's
dense code run in the dtype under test, both given the same chosen blocks. A result passes when

    err(ours) <= 2 err(plain) + c eps(dtype) max|x64|,    c = 2 for float32, 0.5 for 16 bits.

In float64 the plain code is the oracle itself, whose difference from itself says nothing about
rounding. There results agree to 1e-12 max|x64|, as for different numbers of ranks, plus three times
the error of the plain code in float32 times eps(float64) / eps(float32), twice for ours and once
for the oracle's: where all of a value cancels, rounding is all there is of it.
Activations are judged for each document and head, so that a large one hides no small one; weights
as a whole. There is no other tolerance and no element is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to run the plain code in for a result of `dtype`: float32 for float64."""
    return torch.float32 if dtype == torch.float64 else dtype


def assert_2x(
    ours: Tensor,
    plain: Tensor,
    x64: Tensor,
    dtype: torch.dtype,
    name: str,
    *,
    cu_seqlens: Sequence[int] | None = None,
    heads: bool = False,
) -> None:
    """Fails naming `name` and the errors when `ours` breaks the rule.

    `dtype` is that of the inputs and sets eps. With cu_seqlens the rows (dimension 0) of each
    document are judged apart, with heads=True the indices of dimension 1 too. Where x64 is not
    finite (the -inf of a query that sees no key), ours and plain must be that value.
    """
    assert ours.shape == plain.shape == x64.shape, (name, ours.shape, plain.shape, x64.shape)
    assert x64.dtype == torch.float64, (name, x64.dtype)
    assert plain.dtype != torch.float64, f"{name}: give the plain code's result in plain_dtype"
    documents = [(0, x64.shape[0])] if cu_seqlens is None else list(pairwise(cu_seqlens))
    for number, (start, end) in enumerate(documents):
        for head in range(x64.shape[1]) if heads else [slice(None)]:
            where = (slice(start, end), head) if heads else slice(start, end)
            label = name if cu_seqlens is None else f"{name}, document {number}"
            label = f"{label}, head {head}" if heads else label
            _judge(ours[where], plain[where], x64[where], dtype, label)


def _judge(ours: Tensor, plain: Tensor, x64: Tensor, dtype: torch.dtype, label: str) -> None:
    if x64.numel() == 0:
        return
    ours, plain = ours.detach().double(), plain.detach().double()
    special = ~x64.isfinite()
    for x, whose in ((ours, "ours"), (plain, "plain")):
        assert torch.equal(x[special], x64[special]), f"{label}: {whose} where x64 is not finite"
    ours, plain, x64 = (x.masked_fill(special, 0.0) for x in (ours, plain, x64))
    eps = torch.finfo(dtype).eps
    largest = x64.abs().max().item()
    error, plain_error = ((x - x64).abs().max().item() for x in (ours, plain))
    if dtype == torch.float64:
        plain_error *= eps / torch.finfo(torch.float32).eps
    times = 3 if dtype == torch.float64 else 2
    units = {torch.float64: 1e-12, torch.float32: 2 * eps}
    slack = units.get(dtype, 0.5 * eps) * largest
    # Written so that NaN fails.
    assert error <= times * plain_error + slack, (
        f"{label}: error {error:.3e}, that of plain {dtype} code {plain_error:.3e}, "
        f"slack {slack:.3e}"
    )
