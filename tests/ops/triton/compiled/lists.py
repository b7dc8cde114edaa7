"""Which compiles there are: the full list, and the short one that every run of the tests takes.

The full list is no product of all options. What only changes constants of a kernel is varied by
itself at a few widths: the ratio of heads, the lengths of blocks, sums in pieces. Pairs of unequal
widths stand at the ratio 16, and float16, which compiles as bfloat16 does, at equal widths. Cases
that must not spill stand with every GPU, and so do equal widths at the ratio 16; the others, which
take longest, with one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from nsa_kernels.triton.compression.kinds import KINDS
from tests.ops.triton.compiled.cases import RATIOS, WIDTHS, Case
from tests.ops.triton.compiled.launches import TARGETS, Launch, recorded


class Entry(NamedTuple):
    """One launch of a case: the place-th of those of its kernel. What is shared compiles once."""

    case: Case
    place: int
    launch: Launch


def _options(case: Case, **options: int | str) -> Case:
    return replace(case, options=tuple(options.items()))


def _widths(operator: str, dtype: str, ratio: int = 16) -> Iterator[Case]:
    return (Case(operator, dtype, width, width, ratio) for width in WIDTHS)


def _pairs(operator: str) -> Iterator[Case]:
    """Every pair of widths, and every ratio at widths that are padded and that are not."""
    for dtype in ("bf16", "fp32"):
        for key_width in WIDTHS:
            for value_width in WIDTHS:
                yield Case(operator, dtype, key_width, value_width)
        for width in (64, 96, 128, 256) if dtype == "bf16" else (96, 128):
            for ratio in RATIOS:
                yield Case(operator, dtype, width, width, ratio)
    yield from _widths(operator, "fp16")


def _banded() -> Iterator[Case]:
    for operator, far in (("compressed", {"long": 1}), ("window", {"window": 4096})):
        yield from _pairs(operator)
        for dtype in ("bf16", "fp32", "fp16"):
            for case in _widths(operator, dtype):
                yield _options(case, **far)
        for width in (96, 128):
            for ratio in RATIOS:
                yield _options(Case(operator, "bf16", width, width, ratio), **far)
        for width in (64, 96, 128):
            for ratio in RATIOS:
                yield _options(Case(operator, "bf16", width, width, ratio), gate=1)


def _selected() -> Iterator[Case]:
    yield from _pairs("selected")
    for dtype in ("bf16", "fp32"):
        for width in (64, 96, 128, 256):
            case = Case("selected", dtype, width, width)
            for select_block in (16, 32, 64, 128):
                for n in (16, 64):
                    yield _options(case, select_block=select_block, n=n)
            yield _options(replace(case, ratio=1), select_block=128, n=64)
            yield _options(case, gate=1)


def _select() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for ratio in RATIOS:
            yield from _widths("select", dtype, ratio)
        for width in (64, 80, 128, 256):
            for ratio in (1, 4, 16, 32):
                case = Case("select", dtype, width, width, ratio)
                for block, stride, select_block in (
                    (4, 2, 16), (16, 16, 64), (64, 64, 64), (64, 2, 128), (64, 16, 128),
                ):  # fmt: skip
                    yield _options(case, block=block, stride=stride, select_block=select_block)
    yield from _widths("select", "fp16")
    case = Case("select", "bf16", 64, 64)
    for n in (2, 16, 64):
        for far in (10, 60, 100, 200, 400, 1000, 2000, 4000, 5000, 600_000):
            for stride in (16, 32):
                yield _options(case, stride=stride, n=n, far=far)


def _few() -> Iterator[Case]:
    yield from _pairs("few")
    for dtype in ("bf16", "fp32"):
        for width in (64, 128, 256):
            case = Case("few", dtype, width, width)
            for block, stride, select_block in (
                (4, 2, 16), (16, 16, 64), (64, 2, 128), (64, 16, 128),
            ):  # fmt: skip
                yield _options(case, block=block, stride=stride, select_block=select_block)
            yield _options(case, n=64, window=4096)
            yield _options(case, page=16)


def _rows() -> Iterator[Case]:
    for dtype in ("bf16", "fp32", "fp16"):
        for case in _widths("compress", dtype):
            for kind in KINDS:
                for block in (4, 32, 64):
                    yield _options(case, kind=kind, block=block)
                yield _options(case, kind=kind, per_head=1)
        for case in _widths("gather", dtype):
            for block in (4, 32, 64):
                yield _options(case, block=block)
        for case in _widths("combine", dtype):
            for branches in (1, 2, 3):
                yield _options(case, branches=branches)


def full_list() -> list[Entry]:
    cases = dict.fromkeys([*_banded(), *_selected(), *_select(), *_few(), *_rows()])
    found = _entries((case, capability) for case in cases for capability in _targets(case))
    return list(dict.fromkeys([*found, *short_list()]))


def _targets(case: Case) -> tuple[int, ...]:
    small = case.dtype != "fp32" and max(case.key_width, case.value_width) <= 128
    plain = case.key_width == case.value_width and case.ratio == 16 and not case.options
    if small or plain:
        return TARGETS
    # The same one whatever else is in the list: another would need another row of the record.
    return (TARGETS[zlib.crc32(repr(case).encode()) % len(TARGETS)],)


# The GPU and dtype that a width stands with in the short list: each GPU with two widths, and
# float32, which compiles slowly, with a small one.
SHORT = {
    64: (90, "fp32"),
    80: (80, "fp16"),
    96: (100, "bf16"),
    128: (90, "bf16"),
    192: (80, "bf16"),
    256: (100, "bf16"),
}

# Kernels that are written for one generation of GPUs, by the start of their name.
OF_ONE_GPU = {"hopper_": 90}
# Cases with the kernels taken from them: at these widths Hopper has kernels of its own.
SHORT_HOPPER = (
    (Case("selected", "fp16", 64, 64), 90, "selected.hopper_block_dkv"),
    (Case("selected", "bf16", 128, 128, options=(("gate", 1),)), 90, "selected.hopper_block_dkv"),
    (Case("selected", "fp16", 64, 64, options=(("gate", 1),)), 90, "selected.hopper_block_dq"),
    (Case("selected", "bf16", 128, 128, options=(("gate", 1),)), 90, "selected.hopper_block_dq"),
    (Case("selected", "fp16", 64, 64), 90, "selected.hopper_block_forward"),
    (Case("selected", "bf16", 192, 128), 90, "selected.hopper_block_forward"),
    (Case("selected", "bf16", 192, 128, options=(("gate", 1),)), 90, "selected.hopper_block_dq"),
    (Case("selected", "bf16", 192, 128, options=(("gate", 1),)), 90, "selected.hopper_block_dkv"),
    (Case("selected", "bf16", 128, 128), 80, "selected.forward"),
    (Case("selected", "bf16", 128, 128), 80, "selected.dq"),
    (Case("selected", "bf16", 128, 128), 80, "selected.dkv"),
    (Case("compressed", "bf16", 192, 128), 90, "banded.hopper_forward"),
    (Case("window", "bf16", 192, 128), 90, "banded.hopper_forward"),
    (Case("compressed", "fp16", 64, 64), 90, "banded.hopper_forward"),
    (Case("compressed", "bf16", 128, 128), 80, "banded.forward"),
    (Case("compressed", "bf16", 128, 128), 80, "banded.dq"),
    (Case("compressed", "bf16", 128, 128), 80, "banded.dkv"),
    (Case("compressed", "fp16", 64, 64, options=(("gate", 1),)), 90, "banded.hopper_prepare"),
    (Case("compressed", "fp16", 64, 64, options=(("gate", 1),)), 90, "banded.hopper_dq"),
    (Case("compressed", "fp16", 64, 64, options=(("gate", 1),)), 90, "banded.hopper_dkv"),
    (Case("window", "bf16", 128, 128, options=(("gate", 1),)), 90, "banded.hopper_dkv"),
    (Case("compressed", "bf16", 192, 128, options=(("gate", 1),)), 90, "banded.hopper_dq"),
    (Case("compressed", "bf16", 192, 128, options=(("gate", 1),)), 90, "banded.hopper_dkv"),
    (Case("window", "bf16", 192, 128, options=(("gate", 1),)), 90, "banded.hopper_dkv"),
    (Case("select", "fp16", 64, 64), 90, "selection.hopper_score"),
    (Case("select", "bf16", 192, 192), 90, "selection.hopper_score"),
    (Case("select", "bf16", 128, 128), 80, "selection.score"),
)


def of_one_gpu(kernel: str) -> int | None:
    """The compute capability that a kernel is written for, None for all of them."""
    function = kernel.partition(".")[2]
    return next((gpu for start, gpu in OF_ONE_GPU.items() if function.startswith(start)), None)


def short_list() -> list[Entry]:
    """Each kernel for each GPU and at each width; the paper's R and lengths of blocks."""
    found: list[Entry] = []
    for width, (capability, dtype) in SHORT.items():
        cases = [
            _options(Case("compressed", dtype, width, width), long=1),
            Case("selected", dtype, width, width),
            Case("select", dtype, width, width),
            Case("few", dtype, width, width),
            *(
                _options(Case("compress", dtype, width, width), kind=kind)
                for kind in KINDS
                if kind != "mean"
            ),
            Case("combine", dtype, width, width),
        ]
        if width == 128:
            for operator in ("compressed", "window"):
                case = Case(operator, dtype, width, width)
                cases += [case, _options(case, gate=1)]
        seen = set()
        for entry in _entries((case, capability) for case in cases):
            # Of kernels that several kinds of compression share one each.
            once = entry.launch.name.startswith("compression.")
            if not once or entry.launch.name not in seen:
                found.append(entry)
            seen.add(entry.launch.name)
    for case, capability, kernel in SHORT_HOPPER:
        entries = _entries([(case, capability)])
        found += [entry for entry in entries if entry.launch.name == kernel]
    return found


def _entries(calls: Iterable[tuple[Case, int]]) -> list[Entry]:
    entries = []
    for case, capability in calls:
        with recorded(capability) as launches:
            case.run()
        places: dict[str, int] = {}
        for launch in dict.fromkeys(launches):
            place = places[launch.name] = places.get(launch.name, -1) + 1
            entries.append(Entry(case, place, launch))
    return entries


def distinct(entries: Iterable[Entry]) -> list[Launch]:
    """The compiles of the entries, in their order."""
    return list(dict.fromkeys(entry.launch for entry in entries))
