"""Compile kernels without a GPU: `make compile-all`.

Holds what record.py says and exits with 1 where it does not hold. `--short` takes the short list,
`--write` writes what these compiles spill into the record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The interpreter would take the place of the compiler. Triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import triton

from tests.ops.triton.compiled import record
from tests.ops.triton.compiled.compiling import Compiled, compile_all
from tests.ops.triton.compiled.launches import Launch
from tests.ops.triton.compiled.lists import distinct, full_list, short_list

PROGRESS = 500


def main() -> int:
    parser = argparse.ArgumentParser(prog="make compile-all", description=__doc__)
    parser.add_argument("--short", action="store_true", help="only what the tests compile")
    parser.add_argument("--write", action="store_true", help="write their spills into the record")
    parser.add_argument("--report", type=Path, help="where the tests want to have it written")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    version, pinned = triton.__version__, record.pinned_version()
    if arguments.write and version != pinned:
        parser.error(f"--write needs triton {pinned}, found {version}")

    entries = short_list() if arguments.short else full_list()
    launches = distinct(entries)
    print(f"triton {version}: {len(launches)} compiles for {len(entries)} launches", flush=True)
    started, count = time.perf_counter(), 0

    def done(launch: Launch, compiled: Compiled) -> None:
        nonlocal count
        count += 1
        if count % PROGRESS == 0:
            print(f"{count} of {len(launches)}", flush=True)

    def compile_again(doubtful: Sequence[Launch]) -> list[Compiled]:
        return compile_all(doubtful, arguments.workers, lambda launch, compiled: None)

    results = compile_all(launches, arguments.workers, done)
    compiled = dict(zip(launches, results, strict=True))
    if not arguments.write:
        compiled = record.fewest_spills(entries, compiled, record.read(), compile_again)
    print(f"compiled in {time.perf_counter() - started:.0f} s")

    spills = record.spills(entries, compiled)
    if arguments.write:
        allowed = {key: spill for key, spill in spills.items() if not record.must_not_spill(key)}
        if arguments.short:
            here = {record.Key.of(entry) for entry in entries}
            allowed |= {key: spill for key, spill in record.read().items() if key not in here}
        record.write(allowed)
        print(f"{record.FILE.name}: {len(allowed)} launches spill")
    known = record.read()
    found = record.defects(entries, compiled, known)
    if arguments.report:
        keys = [record.Key.of(entry)._asdict() for entry in entries]
        report = {"compiles": len(launches), "launches": keys, "defects": found}
        arguments.report.write_text(json.dumps(report), encoding="utf-8")
    if version != pinned:
        print(f"spills are not compared: the record is of triton {pinned}")
        found = [defect for defect in found if defect.rule != "record"]
    elif not arguments.short:
        less = [
            key for key in known if key not in spills or spills[key].spill_bytes < known[key][0]
        ]
        if less:
            print(f"{len(less)} recorded launches spill less now: --write records that")
    for defect in found:
        print(f"{defect.rule}: {defect.text}")
    print(f"{len(found)} defects")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
