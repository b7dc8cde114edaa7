"""Compiles launches for their GPUs in processes of their own, and reads what ptxas says of them."""

from __future__ import annotations

import io
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import NamedTuple

import triton
from triton import knobs

from tests.ops.triton.compiled.launches import Launch

# Bytes that a program may have; columns of tensor memory.
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_LIMIT = 512
# A dot of two 16-bit tiles that was not turned into a wgmma: rows, depth, dtype.
PLAIN_DOT = re.compile(r"tt\.dot .* : tensor<(\d+)x(\d+)x(bf16|f16), ")


class Compiled(NamedTuple):
    """spill_bytes: of stores and loads; shared: bytes; tensor_memory: columns.

    wgmma: instructions in the PTX; serialized: whether ptxas let each wait for the one before.
    tall_dots: 16-bit dots of 64 rows or more that are no wgmma. error: "" or why there is no code.
    """

    spill_bytes: int
    registers: int
    shared: int
    tensor_memory: int
    wgmma: int
    serialized: bool
    tall_dots: int
    seconds: float
    error: str


def compile_launch(launch: Launch) -> Compiled:
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # What comes from the cache has no log.
    log = io.StringIO()
    started = time.perf_counter()
    try:
        with redirect_stdout(log):
            made = triton.compile(launch.source, launch.target, launch.options)
    except Exception as error:  # Whatever the compiler raises is the finding.
        seconds = time.perf_counter() - started
        return Compiled(0, 0, 0, 0, 0, False, 0, seconds, f"{type(error).__name__}: {error}")
    text = log.getvalue()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    registers = re.findall(r"Used (\d+) registers", text)
    assert len(spills) == 2 and len(registers) == 1, text
    tall = [rows for rows, _, _ in PLAIN_DOT.findall(made.asm["ttgir"]) if int(rows) >= 64]
    return Compiled(
        spill_bytes=sum(map(int, spills)),
        registers=int(registers[0]),
        shared=made.metadata.shared,
        tensor_memory=made.metadata.tmem_size or 0,
        wgmma=made.asm["ptx"].count("wgmma.mma_async.sync"),
        serialized="wgmma.mma_async instructions are serialized" in text,
        tall_dots=len(tall),
        seconds=time.perf_counter() - started,
        error="",
    )


_launches: Sequence[Launch] = ()


def _compile_number(number: int) -> tuple[int, Compiled]:
    return number, compile_launch(_launches[number])


def compile_all(
    launches: Sequence[Launch], workers: int, done: Callable[[Launch, Compiled], None]
) -> list[Compiled]:
    """In the order of launches; `done` hears of each as it comes."""
    global _launches
    _launches = launches  # Forked workers find them there: kernels cannot be sent to a process.
    results: dict[int, Compiled] = {}
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for number, compiled in pool.imap_unordered(_compile_number, range(len(launches))):
                results[number] = compiled
                done(launches[number], compiled)
    return [results[number] for number in range(len(launches))]
