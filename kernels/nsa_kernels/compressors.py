"""The kinds of compressor, phi of Eq. 7 (arXiv 2502.11089), and the parameters of each.

docs/extending.md lists what to touch for another kind.

Letters: l rows of a block, D width, `hidden` the hidden width that the user chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Init = Literal["zero", "mean", "linear"]


class Parameter(NamedTuple):
    """The shape of a parameter without its leading [G], and how training treats it.

    init: `zero`; `mean`: 1/l, so that the sum over a block's rows is their mean; `linear`: uniform
    with the bound of torch's linear layers. decay: whether weight decay acts on it.
    """

    shape: tuple[int, ...]
    init: Init
    decay: bool = True


Parameters = dict[str, Parameter]


def _mlp(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero", decay=False),
        "up": Parameter((hidden, block * width), "linear"),
        "down": Parameter((width, hidden), "linear"),
    }


def _linear(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero", decay=False),
        "weight": Parameter((width, block * width), "linear"),
    }


def _conv1d(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero", decay=False),
        "weight": Parameter((width, block), "mean"),
    }


def _attention_pool(block: int, width: int, hidden: int) -> Parameters:
    return {
        "position": Parameter((block, width), "zero", decay=False),
        "query": Parameter((width,), "zero", decay=False),
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


def undecayed_parameters() -> frozenset[str]:
    """The names of parameters, of any kind, on which weight decay does not act."""
    tables = [kind(1, 1, 1) for kind in COMPRESSORS.values()]
    return frozenset(name for table in tables for name, p in table.items() if not p.decay)


def check_kind(kind: str, kinds: dict[str, object], backend: str) -> None:
    """Raise ValueError unless the backend has this kind."""
    if kind not in kinds:
        must = f"one of {', '.join(map(repr, kinds))} with backend={backend!r}"
        raise ValueError(f"compress must be {must}, got {kind!r}")
