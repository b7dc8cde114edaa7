"""Weights of a dense model as a conversion needs them: whole, plain, and known by their shapes.

DeepSpeed's ZeRO-3 leaves nothing of a parameter but its part on each rank (``deepspeed.zero.Init``,
which transformers' ``from_pretrained`` runs under ``HfDeepSpeedConfig``). Such weights are gathered
for as long as they are read or written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nsa_dist.checks import DTYPES, check


def is_cut(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut a parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Parameters whole on every rank, to be read and written; rank 0's values are kept.

    A collective where ZeRO-3 has cut any of them, else nothing.
    """
    cut = [x for x in parameters if x is not None and is_cut(x)]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0):
        yield


def check_parameter(name: str, parameter: object, shape: tuple[int, ...]) -> None:
    """Raise ValueError for anything but a plain parameter of ``shape``; ZeRO-3 may have cut it."""
    whole = "a whole torch.nn.Parameter (convert before anything splits or quantises it)"
    if type(parameter) is not nn.Parameter:
        kind = type(parameter).__name__
        article = "an" if kind[0] in "AEIOU" else "a"
        raise ValueError(f"{name} must be {whole}, got {article} {kind}")
    check(parameter.dtype in DTYPES, name, parameter.dtype, f"of a dtype in {DTYPES}")
    given = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if given != shape:
        raise ValueError(f"{name} must be {whole} of shape {shape}, got shape {given}")
