"""Weights of a dense model, gathered and checked for a conversion.

Under ZeRO-3 each rank holds only its part of a parameter (``deepspeed.zero.Init``, which
transformers' ``from_pretrained`` uses under ``HfDeepSpeedConfig``). Such weights are gathered while
they are read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nsa_dist.checks import DTYPES, check, type_name


def is_cut(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has sharded a parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Gather parameters on every rank for reading and writing; rank 0's values are kept.

    A collective if ZeRO-3 has sharded any of them; otherwise it does nothing.
    """
    cut = [x for x in parameters if x is not None and is_cut(x)]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0):
        yield


def check_parameter(name: str, parameter: object, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless it is a plain parameter of ``shape``; ZeRO-3 may have sharded it."""
    must = "a whole torch.nn.Parameter (convert before anything splits or quantises it)"
    if type(parameter) is not nn.Parameter:
        raise ValueError(f"{name} must be {must}, got {type_name(parameter)}")
    check(parameter.dtype in DTYPES, name, parameter.dtype, f"of a dtype in {DTYPES}")
    given = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if given != shape:
        raise ValueError(f"{name} must be {must} of shape {shape}, got shape {given}")
