"""The backends that the tests of an operator run over: `backend` is a parameter of the test.

Triton's kernels run natively where there is a GPU, else in Triton's interpreter under a guard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch

from nsa_kernels import get_backend
from nsa_kernels.backend import Backend
from tests.ops.op_cases import case_id

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
if not INTERPRETED:
    # Products of the plain code, which sets the tolerance, are summed in float32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@dataclass(frozen=True)
class BackendOnDevice:
    """A backend, and the device that its tests run on."""

    name: str
    device: str

    @property
    def ops(self) -> Backend:
        return get_backend(self.name)


PYTORCH, TRITON = BackendOnDevice("pytorch", "cpu"), BackendOnDevice("triton", DEVICE)
# A further backend goes in here, and its cases into the tests that name cases for each.
BACKENDS = {backend.name: backend for backend in (PYTORCH, TRITON)}
_WITH_MARKS = type(pytest.param())
_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "triton": [
        pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
        *([] if INTERPRETED else [pytest.mark.gpu]),
    ],
}


def natively_all(interpreted: torch.dtype) -> list[torch.dtype]:
    """Every dtype where there is a GPU; the interpreter is too slow for more than one each time."""
    return [interpreted] if INTERPRETED else DTYPES


def over(names: str, **values: Iterable[Any]) -> pytest.MarkDecorator:
    """The test runs with `backend` and, for each backend, its own values of `names`.

    values: of each backend, a tuple for each run where there are several names, or a `pytest.param`
    of it with marks. A backend that has none takes those of pytorch, if these are given.
    """
    given = {name: list(rows) for name, rows in values.items()}
    params = []
    for name in BACKENDS:
        rows = given.get(name, given.get(PYTORCH.name, []))
        for row in rows:
            own: Collection[Any] = ()
            if isinstance(row, _WITH_MARKS):
                row, own = row.values, row.marks
            row = row if isinstance(row, tuple) and ", " in names else (row,)
            label = "-".join([name, *map(case_id, row)])
            marks = [*_MARKS.get(name, ()), *_marks_of(row, rows), *own]
            params.append(pytest.param(name, *row, id=label, marks=marks))
    return pytest.mark.parametrize(f"backend, {names}", params, indirect=["backend"])


def _marks_of(row: tuple[Any, ...], rows: list[Any]) -> list[pytest.MarkDecorator]:
    """Without a GPU float16 waits for the slow tests where float32 runs on the same values.

    Both are computed in float32 there, and differ in how inputs and results are rounded.
    """
    wider = tuple(torch.float32 if x is torch.float16 else x for x in row)
    repeats = wider != row and (wider in rows or wider[0] in rows)
    return [pytest.mark.slow] if INTERPRETED and repeats else []


def wider_first(dtypes: list[torch.dtype]) -> list[Any]:
    """Values for a test of one backend, with the marks of ``over``."""
    return [pytest.param(x, marks=_marks_of((x,), [(y,) for y in dtypes])) for x in dtypes]


over_all = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=_MARKS.get(name, ())) for name in BACKENDS],
    indirect=True,
)


@contextmanager
def guarded_kernels() -> Iterator[None]:
    """Out-of-bounds accesses, races between programs and int32 overflow of kernels are errors."""
    if not INTERPRETED:
        yield
        return
    from nsa_kernels.triton.selection import choose
    from tests.ops.triton.guard import guarded

    # An operation takes the interpreter as long on one line of scores as on a thousand.
    with mock.patch.object(choose, "LINE_ELEMENTS", 1 << 13), guarded():
        yield
