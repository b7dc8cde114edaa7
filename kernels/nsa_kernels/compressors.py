"""The kinds of compressor, phi of Eq. 7 (arXiv 2502.11089), and the parameters of each.

To add a kind, add its parameters here, its forward and backward to pytorch/compression.py under the
same name, and its oracle to reference.py. Kernels in triton/compression/kinds.py may follow: until
then the Triton backend refuses the kind by name.

Letters: l rows of a block, D width, `hidden` the hidden width that the user chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Init = Literal["zero", "mean", "linear"]


class Parameter(NamedTuple):
    """The shape of a parameter without its leading [G], and its initial values.

    init: `zero`; `mean`: 1/l, so that the sum over a block's rows is their mean; `linear`: uniform
    with the bound of torch's linear layers.
    """

    shape: tuple[int, ...]
    init: Init


Parameters = dict[str, Parameter]


def _mlp(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero"),
        "up": Parameter((hidden, block * width), "linear"),
        "down": Parameter((width, hidden), "linear"),
    }


def _linear(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero"),
        "weight": Parameter((width, block * width), "linear"),
    }


def _conv1d(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero"),
        "weight": Parameter((width, block), "mean"),
    }


def _attention_pool(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero"),
        "query": Parameter((width,), "zero"),
    }


def _mean(block: int, width: int, hidden: int) -> Parameters:
    return {}


# (l, D, hidden) -> the parameters by name, in the order in which backends take them. A kind with
# parameters has `position` [l, D] among them, whose dimensions tell weights per head from shared.
COMPRESSORS: dict[str, Callable[[int, int, int], Parameters]] = {
    "mlp": _mlp,
    "linear": _linear,
    "conv1d": _conv1d,
    "attention_pool": _attention_pool,
    "mean": _mean,
}


def parameter_names(kind: str) -> tuple[str, ...]:
    """The names of a kind's parameters, in the order in which backends take them."""
    return tuple(COMPRESSORS[kind](1, 1, 1))


def check_kind(kind: str, kinds: dict[str, object], backend: str) -> None:
    """Raise ValueError unless the backend has this kind."""
    if kind not in kinds:
        must = f"one of {', '.join(map(repr, kinds))} with backend={backend!r}"
        raise ValueError(f"compress must be {must}, got {kind!r}")
