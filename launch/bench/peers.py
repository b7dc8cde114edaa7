"""Time the whole attention beside dense attention and beside flash_nsa, in one process.

    python launch/bench/peers.py FOLDER --lengths 8192 32768 65536 131072 --csv peers.csv

FOLDER is a checkout of Scalable-Flash-Native-Sparse-Attention, whose package is flash_nsa; nothing
of it is part of this project. All three get the same queries, keys and values, random ones and
coherent ones (``stream.py``). Blocks are compressed by their mean and keys and values are shared by
the branches, which both implementations offer.

Ours is checked against float64, as in operators.py, and flash_nsa's output and gradients against
ours; what is wrong is not timed, and the program ends with status 1. Where no flash-attn package is
installed, its window branch runs on torch's FlashAttention-2 kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import tyro
from torch import Tensor

from launch.bench.compare import beside_dense, compare_streams, run_program
from launch.bench.judges import relative_error
from launch.bench.meter import Meter
from launch.bench.operators import measure
from launch.bench.options import DATA, Sizes, check_docs
from launch.bench.problems import problems
from launch.bench.stream import Stream
from launch.bench.table import Row, Shape, described, find, number, pair, table
from launch.bench.work import Peaks
from nsa_dist.checks import as_choice, check

PEER = "flash_nsa"
MOST_DIFFERENCE = 0.1
"""Largest norm of the difference to our result over its norm. Scores are rounded otherwise there,
so a few tokens choose another last block."""


@dataclass(frozen=True)
class PeersOptions(Sizes):
    """Time the whole attention beside dense attention and flash_nsa, in one process.

    Args:
        folder: a checkout that has the package flash_nsa.
        kinds: data to run on, of random and coherent; takes the place of ``data``.
        docs: document that gets the tables, between its marks for the file of ``csv``.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    folder: tyro.conf.Positional[Path] = Path()
    kinds: tuple[str, ...] = DATA
    docs: Path | None = None
    compress: str = "mean"
    independent_kv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            as_choice("kinds", kind, DATA)
        there = (self.folder / PEER / "__init__.py").is_file()
        check(there, "folder", str(self.folder), f"one that has the package {PEER}")
        check(self.compress == "mean", "compress", self.compress, f"mean, which {PEER} has")
        check_docs(self.docs, self.csv)
        check(not self.independent_kv, "independent_kv", True, f"False, as in {PEER}")


def load_peer(options: PeersOptions, bounds: Tensor, size: int) -> Callable[..., Tensor]:
    """flash_nsa's attention: q, k, v, logits of the gates -> out [N, H, Dv].

    Args:
        bounds: int32 [documents + 1] on the GPU.
        size: tokens of a document.

    Raises:
        ImportError: if it, or a package that it needs, cannot be imported.
    """
    sys.path.insert(0, str(options.folder))
    try:
        package = importlib.import_module(PEER)
    finally:
        sys.path.remove(str(options.folder))
    if not any(find_spec(name) for name in ("flash_attn", "flash_attn_interface")):
        module = importlib.import_module(f"{PEER}.modules.hf_level_nsa")

        def window(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
            """Causal attention to a window of keys, of packed documents."""
            return torch.ops.aten._flash_attention_forward(
                *(q, k, v, bounds, bounds, size, size, 0.0, True, False),
                window_size_left=options.window - 1,
                window_size_right=0,
            )[0]

        vars(module)["swa_varlen_func"] = window
    config = options.config
    core = package.HFNSACore(
        package.NSAConfig(
            head_dim=options.head_dim,
            qk_head_dim=options.head_dim,
            v_head_dim=options.v_head_dim,
            num_heads=options.heads,
            num_kv_heads=options.kv_heads,
            kernel_size=options.compress_block,
            stride=options.compress_stride,
            block_size=options.select_block,
            top_n=options.num_selected,
            num_init_blocks=config.num_init_blocks,
            num_local_blocks=config.num_local_blocks,
            window_size=options.window - 1,  # Its windows have one key more.
        )
    )
    return lambda q, k, v, logits: core(q, k, v, logits, bounds)


def results(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], of: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """The output of ``inputs``, and the gradients ``of`` some of them."""
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, of, grad)]


def rows_of(
    stream: Stream, blank: Row, peaks: Peaks, meter: Meter, wrong: list[str]
) -> Iterator[Row]:
    """Dense attention, ours and flash_nsa on one stream; adds messages to ``wrong``."""
    options, length = stream.options, stream.length
    assert isinstance(options, PeersOptions)
    before = len(wrong)
    yield from beside_dense(stream, blank, peaks, meter, wrong)
    if len(wrong) > before:
        return

    (ours,) = problems(stream, torch.empty(0), {}, ("whole",))
    what = f"{length} tokens, {options.data} data"
    q, gates, k, v = ours.inputs
    bounds = torch.arange(options.documents + 1, dtype=torch.int32) * stream.size
    run = load_peer(options, bounds.to(stream.device), stream.size)
    shape = (length, options.heads, options.v_head_dim)
    grad = torch.randn(shape, dtype=stream.dtype, device=stream.device)
    logits = gates.detach().logit().to(stream.dtype).requires_grad_()
    expected = results(ours.run, ours.inputs, (q, k, v), grad)
    error = relative_error(results(run, (q, k, v, logits), (q, k, v), grad), expected)
    del expected  # Before memory is measured.
    if not error <= MOST_DIFFERENCE:
        wrong.append(f"{PEER}, {what}: {error:.1e} from ours, at most {MOST_DIFFERENCE:.1e}")
        return
    row = replace(blank, operator=PEER, choices="random", error=error, limit=MOST_DIFFERENCE)
    yield measure(row, (q, k, v, logits), run, ours.flops, peaks, meter)


def compare(options: PeersOptions, meter: Meter) -> tuple[list[Row], list[str]]:
    """All rows, and messages on wrong results. Prints and writes each row."""
    variants = [
        (replace(options, data=kind), length)
        for length in options.lengths
        for kind in options.kinds
    ]
    return compare_streams(variants, rows_of, meter, options.csv)


def markdown(rows: Sequence[Row]) -> str:
    """A table of every shape: times, and how many times as fast as cuDNN's dense attention."""
    parts = []
    for shape in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == shape]
        parts += [f"### {shape.title()}", described(own), _table(own, shape)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], shape: Shape) -> str:
    head = ["tokens", "cuDNN, ms", "GiB", f"{PEER}, ms", "ratio", "GiB", "ours, ms", "ratio", "GiB"]
    lines = []
    for length in dict.fromkeys(row.length for row in rows):
        blank = Row("", length, "", 0.0, None, shape)
        dense = find(rows, blank, "dense_cudnn")
        cells = [str(length)]
        for name, choices in (("dense_cudnn", ""), (PEER, "random"), ("whole", "random")):
            row = find(rows, blank, name, choices)
            cells.append(pair(row.forward_ms, row.backward_ms) if row else "")
            if name != "dense_cudnn":
                there = row is not None and dense is not None
                cells.append(_ratio(dense, row) if there else "")  # type: ignore[arg-type]
            cells.append(number(row.peak_gib) if row else "")
        lines.append(cells)
    return table(head, lines)


def _ratio(dense: Row, row: Row) -> str:
    return pair(dense.forward_ms / row.forward_ms, dense.both_ms / row.both_ms)


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(PeersOptions, args=arguments)
    run_program("peers.py", options, lambda meter: compare(options, meter), markdown, options.docs)


if __name__ == "__main__":
    main()
