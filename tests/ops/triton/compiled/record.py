"""What compiles must hold, and the committed record of those that spill registers.

spills.csv has a row for every launch of the full list that spills, with the triton of
constraints.txt; what has no row spills nothing. Other versions allocate registers differently.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.ops.triton.compiled.compiling import SHARED_LIMITS, TENSOR_MEMORY_LIMIT, Compiled
from tests.ops.triton.compiled.launches import Launch
from tests.ops.triton.compiled.lists import Entry

FILE = Path(__file__).with_name("spills.csv")
CONSTRAINTS = Path(__file__).parents[4] / "constraints.txt"
# ptxas is no function of its input: it spills by where the system happens to load it. Of one kernel
# the same PTX spilled 408 bytes, and 416 in one run of seven. Without random addresses it was 408
# each time, but not every system lets a process ask for that.
TRIES = 8


class Key(NamedTuple):
    """A launch in words. launch: which one of the case's launches of this kernel."""

    kernel: str
    target: str
    dtype: str
    key_width: int
    value_width: int
    ratio: int
    case: str
    launch: int

    @classmethod
    def of(cls, entry: Entry) -> Key:
        case, launch = entry.case, entry.launch
        widths = (case.key_width, case.value_width)
        target = f"sm_{launch.capability}"
        return cls(launch.name, target, case.dtype, *widths, case.ratio, case.label, entry.place)

    def __str__(self) -> str:
        widths = f"{self.key_width}x{self.value_width}"
        which = f"{self.kernel} for {self.target}, {self.dtype} {widths}, R={self.ratio}"
        return f"{which}, {self.case} [{self.launch}]"


NUMBERS = ("key_width", "value_width", "ratio", "launch")


class Spill(NamedTuple):
    spill_bytes: int
    registers: int
    shared_bytes: int


def pinned_version() -> str:
    found = re.search(r"^triton==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, CONSTRAINTS
    return found[1]


def read() -> dict[Key, Spill]:
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    record = {}
    for row in rows:
        words = {name: row[name] for name in Key._fields}
        numbers = {name: int(words.pop(name)) for name in NUMBERS}
        key = Key(**words, **numbers)
        assert key not in record, key
        record[key] = Spill(*(int(row[name]) for name in Spill._fields))
    return record


def write(spills: Mapping[Key, Spill]) -> None:
    with FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Key._fields, *Spill._fields))
        writer.writerows((*key, *spills[key]) for key in sorted(spills))


def spills(entries: Iterable[Entry], compiled: Mapping[Launch, Compiled]) -> dict[Key, Spill]:
    found = {}
    for entry in entries:
        made = compiled[entry.launch]
        if made.spill_bytes:
            found[Key.of(entry)] = Spill(made.spill_bytes, made.registers, made.shared)
    return found


# Kernels whose accumulators leave too few registers at any tile, and in which cases: they may spill
# a little, outside the loops that matter or a word or two there, and the record says how much.
MAY_SPILL = {"selected.hopper_block_dkv": "", "banded.hopper_forward": "long=1"}


def must_not_spill(key: Key) -> bool:
    narrow = key.dtype != "fp32" and max(key.key_width, key.value_width) <= 128
    may = key.kernel in MAY_SPILL and MAY_SPILL[key.kernel] in key.case
    return narrow and not may


class Defect(NamedTuple):
    """rule: one of RULES; text: where it does not hold, and by how much."""

    rule: str
    text: str


# compiles: there is code. memory: shared and tensor memory suffice. wgmma: on sm_90, 16-bit dots of
# 64 rows or more are one, and none waits for the one before. no_spills: see `must_not_spill`.
# record: what may spill spills no more than the record says.
RULES = ("compiles", "memory", "wgmma", "no_spills", "record")


def allowed_bytes(key: Key, record: Mapping[Key, Spill]) -> int:
    return 0 if must_not_spill(key) or key not in record else record[key].spill_bytes


def fewest_spills(
    entries: Sequence[Entry],
    compiled: Mapping[Launch, Compiled],
    record: Mapping[Key, Spill],
    compile_again: Callable[[Sequence[Launch]], Sequence[Compiled]],
) -> dict[Launch, Compiled]:
    """`compiled`, but the best of TRIES compiles where the first spills more than is allowed."""
    best = dict(compiled)
    for _ in range(TRIES - 1):
        too_many = [
            entry.launch
            for entry in entries
            if best[entry.launch].spill_bytes > allowed_bytes(Key.of(entry), record)
        ]
        if not too_many:
            break
        doubtful = list(dict.fromkeys(too_many))
        for launch, made in zip(doubtful, compile_again(doubtful), strict=True):
            best[launch] = min(best[launch], made, key=lambda x: x.spill_bytes)
    return best


def defects(
    entries: Iterable[Entry], compiled: Mapping[Launch, Compiled], record: Mapping[Key, Spill]
) -> list[Defect]:
    found = []
    for entry in entries:
        key, made, capability = Key.of(entry), compiled[entry.launch], entry.launch.capability
        if made.error:
            found.append(Defect("compiles", f"{key}: {made.error}"))
            continue
        if made.shared > SHARED_LIMITS[capability]:
            found.append(Defect("memory", f"{key}: {made.shared} bytes of shared memory"))
        if made.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(Defect("memory", f"{key}: {made.tensor_memory} columns"))
        if made.serialized:
            found.append(Defect("wgmma", f"{key}: every wgmma waits for the one before"))
        if capability == 90 and made.tall_dots:
            found.append(Defect("wgmma", f"{key}: {made.tall_dots} dots are no wgmma"))
        allowed = allowed_bytes(key, record)
        if made.spill_bytes and must_not_spill(key):
            found.append(Defect("no_spills", f"{key}: {made.spill_bytes} bytes"))
        elif made.spill_bytes > allowed:
            text = f"{key}: {made.spill_bytes} bytes, recorded are {allowed}"
            found.append(Defect("record", text))
    return found
