"""Compare layouts by simulation: how much is fetched, and how evenly the work is spread.

    python launch/bench/splits.py --ranks 4 32 128 --choices coherent choices.npz
    python launch/bench/splits.py --documents 60000 3000 1000 1000 500 36 --ranks 4 8

Needs no GPU and no ranks: what a rank fetches follows from what its queries choose, and its work
from their positions. Work is useful operations, forward and backward. docs/distributed.md has the
tables.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import get_args

import torch
import tyro
from torch import Tensor

from launch.bench.options import check_folder, choices_of_file
from launch.bench.table import table
from launch.bench.work import Pairs, keys_at
from launch.estimating.choices import Choices, carried_tokens, fetched_tokens, full_gather_tokens
from launch.estimating.costs import call_flops
from launch.processes.mistakes import end, read_once
from nsa_dist import NSAConfig
from nsa_dist.checks import as_choice, check
from nsa_dist.comm.nodes import nodes_of_neighbours
from nsa_dist.plan.layout import LayoutName, chunk_starts, make_layout
from nsa_dist.plan.stream import Stream, cut_at

LAYOUTS = get_args(LayoutName)
OTHERS = ("contiguous_balanced", "whole_documents")
"""Splits that no layout makes, for comparison: contiguous chunks of equal work, and each document
on one rank, the largest first to the rank with the least work. Ranks hold unequal numbers of
tokens."""
HOW = get_args(Choices)
COLUMNS = (
    *("ranks", "layout", "choices", "of a gather, mean", "of a rank"),
    *("between nodes", "once a node"),
    *("work", "compressed", "selected", "window", "tokens", "padding"),
)


@dataclass(frozen=True)
class SplitsOptions:
    """Compare layouts by simulation: how much is fetched, and how evenly the work is spread.

    Args:
        documents: tokens of each document of the stream, in order.
        ranks: that share the stream, lines for each.
        layouts: of nsa_dist, contiguous_balanced (chunks of equal work), or whole_documents (each
            on one rank).
        choices: how queries choose blocks: all, random, coherent, or an npz file of
            record_choices.py, of one document, whose layers have a line each.
        layers: of that file; all when empty.
        node: neighbouring ranks of a node, for what crosses nodes.
        heads: query heads H.
        kv_heads: KV heads G.
        head_dim: width of queries, keys and values.
        compress_block: tokens l of a compression block.
        compress_stride: stride d of compression blocks.
        select_block: tokens l' of a selection block.
        num_selected: chosen blocks n of a query.
        window: sliding window w.
        csv: file to write the table to.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    documents: tuple[int, ...] = (32768,)
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    layouts: tuple[str, ...] = (*LAYOUTS, *OTHERS)
    choices: tuple[str, ...] = ("coherent",)
    layers: tuple[int, ...] = ()
    node: int = 8
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512
    csv: Path | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "ranks", "layouts", "choices"):
            check(bool(getattr(self, name)), name, (), "one value or more")
        for name in ("documents", "ranks"):
            values = getattr(self, name)
            check(min(values) >= 1, name, values, "at least 1")
        for layout in self.layouts:
            as_choice("layouts", layout, (*LAYOUTS, *OTHERS))
        for how in self.choices:
            known = how in HOW or Path(how).is_file()
            check(known, "choices", how, f"one of {', '.join(HOW)} or an npz file")
            must = f"one document with a file of choices, {how}"
            check(how in HOW or len(self.documents) == 1, "documents", self.documents, must)
        files = any(how not in HOW for how in self.choices)
        check(files or not self.layers, "layers", self.layers, "empty without a file of choices")
        check(self.node >= 1, "node", self.node, "at least 1")
        check_folder("csv", self.csv)
        _ = self.config

    @property
    def config(self) -> NSAConfig:
        return NSAConfig(
            self.heads,
            self.kv_heads,
            self.head_dim,
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
        )


@dataclass(frozen=True)
class SplitRow:
    """What one split of the stream costs.

    Args:
        share_mean, share_most: fetched tokens over those of a gather of all keys and values, mean
            of the ranks and of the rank with the most.
        far, far_once: of the mean share what comes from other nodes, if each rank fetches for
            itself, and if a node fetches a block once; None where ranks are on one node, or nodes
            have no equal number of ranks, at least two.
        work, compressed, selected, window: the largest work of a rank over the mean, less 1, in all
            and of each branch; that of the compressed one includes the choice of blocks.
        tokens: the same of tokens.
        padding: tokens that the layout adds, over those of the documents.
    """

    ranks: int
    layout: str
    choices: str
    share_mean: float
    share_most: float
    far: float | None
    far_once: float | None
    work: float
    compressed: float
    selected: float
    window: float
    tokens: float
    padding: float


def work_of_tokens(config: NSAConfig, boundaries: Tensor) -> dict[str, Tensor]:
    """Useful operations of each query of a stream, float64 [S], by branch."""
    lengths = boundaries.diff()
    positions = torch.arange(int(boundaries[-1])) - boundaries[:-1].repeat_interleave(lengths)
    nothing = dict.fromkeys(("compressed", "selected", "window", "dense"), 0)
    work = {}
    for branch, keys in keys_at(config, positions).items():
        if branch in config.branches:
            flops = call_flops(config, Pairs(**(nothing | {branch: 1})), 0).values()
            work[branch] = keys.double() * sum(one.forward + one.backward for one in flops)
    return work


def split(config: NSAConfig, layout: str, size: int, documents: Sequence[int]) -> Stream:
    """The stream over ``size`` ranks, padded as the layout needs.

    Raises:
        ValueError: if the stream is shorter than the ranks are many.
    """
    lengths = torch.tensor(documents)
    if layout in LAYOUTS:
        cut = make_layout(layout, size)
        if cut.per_document:
            lengths = -(-lengths // cut.multiple) * cut.multiple
        rest = -int(lengths.sum()) % cut.multiple
        if rest:  # Padding is a document of its own.
            lengths = torch.cat((lengths, torch.tensor([rest])))
    boundaries = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    total = int(boundaries[-1])
    check(total >= size, "documents", tuple(documents), f"{size} tokens or more for as many ranks")
    if layout in LAYOUTS:
        return cut_at(*chunk_starts(cut, 1, total, boundaries.int()), boundaries, size)
    before = torch.cat(
        (
            torch.zeros(1, dtype=torch.float64),
            sum(work_of_tokens(config, boundaries).values(), torch.zeros(total)).cumsum(0),
        )
    )
    if layout == "contiguous_balanced":
        starts = torch.searchsorted(before, before[-1] / size * torch.arange(size))
        return cut_at(starts, torch.arange(size), boundaries, size)
    of_documents = before[boundaries].diff()
    owners, held = torch.zeros(len(lengths), dtype=torch.int64), torch.zeros(size).double()
    for document in of_documents.argsort(descending=True, stable=True).tolist():
        owners[document] = held.argmin()
        held[owners[document]] += of_documents[document]
    return cut_at(boundaries[:-1], owners, boundaries, size)


def over_mean(of_tokens: Tensor, stream: Stream, size: int) -> float:
    """The largest sum of a rank over the mean, less 1."""
    before = torch.cat((of_tokens.new_zeros(1), of_tokens.cumsum(0)))
    of_runs = before[stream.run_end] - before[stream.run_start]
    of_ranks = of_tokens.new_zeros(size).index_add(0, stream.run_rank, of_runs)
    return float(of_ranks.max() / of_ranks.mean()) - 1


def recorded(options: SplitsOptions, path: Path) -> dict[str, Tensor]:
    """The choices of a file, int32 [S, G, n], by its name and the layer's number."""
    layers = choices_of_file(options.config, path, options.documents[0], options.layers)
    return {f"{path.stem} layer {layer}": chosen for layer, chosen in layers.items()}


def between_nodes(
    options: SplitsOptions, stream: Stream, by_owner: Tensor, chosen: Choices | Tensor
) -> tuple[float | None, float | None]:
    """Tokens that a rank fetches of other nodes, mean of the ranks: by itself, and for its node.

    Args:
        by_owner: tokens that each rank fetches of each owner, [P, owner].
    """
    size, node = len(by_owner), options.node
    nodes = None if size % node else nodes_of_neighbours(node, size)
    if nodes is None:
        return None, None
    places = torch.tensor(nodes.of_rank)
    far = by_owner * (places[:, None] != places)
    carried = carried_tokens(options.config, stream, nodes, chosen)
    return float(far.sum()) / size, float(carried.sum()) / size


def rows(options: SplitsOptions) -> list[SplitRow]:
    """A line for each number of ranks, layout and way to choose.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    config, found = options.config, []
    ways: dict[str, Choices | Tensor] = {}
    for how in options.choices:
        ways |= {how: how} if how in HOW else recorded(options, Path(how))  # type: ignore[dict-item]
    for size in options.ranks:
        for layout in options.layouts:
            stream = split(config, layout, size, options.documents)
            boundaries = torch.cat((stream.doc_start, torch.tensor([stream.total])))
            work = work_of_tokens(config, boundaries)
            spread = {name: over_mean(of, stream, size) for name, of in work.items()}
            total: Tensor = sum(work.values(), torch.zeros(stream.total))
            gather = full_gather_tokens(stream, size) * config.num_kv_heads
            for name, how_chosen in ways.items():
                chosen = how_chosen
                if isinstance(chosen, Tensor):  # Padding chooses nothing.
                    chosen = torch.nn.functional.pad(
                        chosen, (0, 0, 0, 0, 0, stream.total - len(chosen)), value=-1
                    )
                by_owner = fetched_tokens(config, stream, size, chosen).sum(2)
                fetched = by_owner.sum(1)
                share = fetched / max(gather, 1)
                far, far_once = between_nodes(options, stream, by_owner, chosen)
                found.append(
                    SplitRow(
                        size,
                        layout,
                        name,
                        float(share.mean()),
                        float(share.max()),
                        None if far is None else far / max(gather, 1),
                        None if far_once is None else far_once / max(gather, 1),
                        over_mean(total, stream, size),
                        **spread,
                        tokens=over_mean(torch.ones(stream.total), stream, size),
                        padding=stream.total / sum(options.documents) - 1,
                    )
                )
    return found


def markdown(found: Sequence[SplitRow]) -> str:
    """The table: shares of a gather, and of work and tokens the largest over the mean."""
    lines = []
    for row in found:
        shares = [f"{share:.2f}" for share in (row.share_mean, row.share_most)]
        values: Mapping[str, float] = asdict(row)
        crossing = ["" if x is None else f"{x:.2f}" for x in (row.far, row.far_once)]
        spread = [f"{values[name]:.1%}" for name in COLUMNS[7:]]
        lines.append([str(row.ranks), row.layout, row.choices, *shares, *crossing, *spread])
    return table(COLUMNS, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(SplitsOptions, args=arguments))
    try:
        found = rows(options)
    except ValueError as error:
        end("splits.py", error)
    print(markdown(found))
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(SplitRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)


if __name__ == "__main__":
    main()
