"""What the tables of bad input share: good values to change, and what an error must say.

A case is a call and what its error must say, as "option: part of the value; part of what is
allowed".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_dist import NSAConfig

Case = tuple[Callable[[], Any], str]

HIDDEN, TOKENS = 24, 32
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=4,
    window=9,
)
PRE_ROPE = replace(SMALL, compress_pre_rope=True)
SHARED = replace(SMALL, independent_kv=False)
WINDOW_ONLY = replace(SMALL, branches=("window",))
CUSTOM = replace(SMALL, compress="custom")
CPU = torch.device("cpu")


class Fixed(nn.Module):
    """A custom compressor that returns the same whatever it gets."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, blocks: Tensor) -> Any:
        return self.result


def cu(*boundaries: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(boundaries, dtype=dtype)


def tokens(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (1, TOKENS, HIDDEN)), **options)


def named(**tables: dict[str, Case]) -> dict[str, Case]:
    """All the tables as one, cases named after their table."""
    return {f"{part}:{name}": case for part, t in tables.items() for name, case in t.items()}


def assert_refused(case: Case) -> None:
    call, expected = case
    option, rest = expected.split(": ", 1)
    value, allowed = rest.split("; ", 1)
    with pytest.raises(ValueError, match=r" must .*, got ") as caught:
        call()
    message = str(caught.value)
    subject, rest = message.split(" must ", 1)
    must, got = rest.split(", got ", 1)
    assert subject.endswith(option), message
    assert value in got, message
    assert allowed in must, message
