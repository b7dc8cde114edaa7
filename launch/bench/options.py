"""What the benchmarks run on: sizes, and the blocks that the selected branch is given.

Choices are int32 [S, G, n], as ``Backend.select_blocks`` gives them: drawn at random, or recorded
from a trained model by record_choices.py. Neighbouring tokens of a trained model choose similar
blocks; random choices do not.
"""

from __future__ import annotations

import importlib
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_dist.checks import as_choice, check
from nsa_kernels.backend import BACKENDS

OPERATORS = (
    *("compression", "compressed_attention", "block_selection", "selected_attention"),
    *("window_attention", "combine", "whole"),
)
COMPRESSORS = ("mlp", "mean")
DATA = ("random", "coherent")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Sizes:
    """The stream and the attention of a benchmark.

    Args:
        lengths: tokens of the stream, a run for each.
        documents: documents of equal length that the stream is packed of.
        heads: query heads H.
        kv_heads: KV heads G.
        head_dim: width Dk of queries and keys.
        v_head_dim: width Dv of values.
        compress_block: tokens l of a compression block.
        compress_stride: stride d of compression blocks.
        select_block: tokens l' of a selection block.
        num_selected: chosen blocks n of a query.
        window: sliding window w.
        compress: mlp or mean.
        independent_kv: whether each branch has keys and values of its own.
        data: random, or coherent: neighbouring tokens choose alike (``stream.py``).
        dtype: bfloat16, float16 or float32.
        backend: auto, triton or pytorch.
        repeats_ms: time spent on each measurement; three repeats at least.
        csv: file to write the table to.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    documents: int = 1
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    v_head_dim: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    window: int = 512
    compress: str = "mlp"
    independent_kv: bool = True
    data: str = "random"
    dtype: str = "bfloat16"
    backend: str = "triton"
    repeats_ms: int = 200
    csv: Path | None = None

    def __post_init__(self) -> None:
        check(self.documents >= 1, "documents", self.documents, "at least 1")
        check(bool(self.lengths), "lengths", self.lengths, "one length or more")
        for length in self.lengths:
            must = f"positive multiples of documents = {self.documents}"
            check(length > 0 and length % self.documents == 0, "lengths", length, must)
        as_choice("compress", self.compress, COMPRESSORS)
        as_choice("data", self.data, DATA)
        as_choice("dtype", self.dtype, tuple(DTYPES))
        as_choice("backend", self.backend, tuple(BACKENDS))
        check(self.repeats_ms > 0, "repeats_ms", self.repeats_ms, "at least 1")
        check_folder("csv", self.csv)
        _ = self.config

    @property
    def config(self) -> NSAConfig:
        return NSAConfig(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            compress_block=self.compress_block,
            compress_stride=self.compress_stride,
            select_block=self.select_block,
            num_selected=self.num_selected,
            window=self.window,
            compress=self.compress,
            independent_kv=self.independent_kv,
        )


@dataclass(frozen=True)
class Options(Sizes):
    """Time the attention's operators and the whole attention on one GPU, beside dense attention.

    Args:
        only: operators to run, by name; all when empty.
        choices: npz file with `selected` [layer, group, token, n], timed beside random choices.
        layers: layers of that file; all when empty.
        dense: time torch's dense attention too.
        plot: file to draw time against length to.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """

    only: tuple[str, ...] = ()
    choices: Path | None = None
    layers: tuple[int, ...] = ()
    dense: bool = True
    plot: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only:
            as_choice("only", name, OPERATORS)
        if self.choices is None:
            check(not self.layers, "layers", self.layers, "empty without --choices")
        else:
            check(self.choices.is_file(), "choices", str(self.choices), "an existing file")
            must = "1 with --choices, whose blocks are counted in one document"
            check(self.documents == 1, "documents", self.documents, must)
        check_folder("plot", self.plot)
        must = "left out where matplotlib is not installed (pip install matplotlib)"
        check(not self.plot or find_spec("matplotlib") is not None, "plot", str(self.plot), must)


def check_docs(docs: Path | None, csv: Path | None) -> None:
    """Raise ValueError unless the tables of ``csv`` can go to ``docs``."""
    must = "None, or with csv an existing document that has marks for the name of csv"
    there = docs is None or (csv is not None and docs.is_file())
    check(there, "docs", None if docs is None else str(docs), must)


def check_folder(option: str, path: Path | None) -> None:
    """Refuse an output file whose folder does not exist."""
    there = path is None or path.parent.is_dir()
    check(there, option, str(path), "a file in an existing folder")


def random_choices(
    length: int, config: NSAConfig, device: torch.device | str, documents: int = 1
) -> Tensor:
    """Forced blocks and others at random, int32 [S, G, n], for documents of equal length."""
    size, n = length // documents, config.num_selected
    blocks = -(-size // config.select_block)
    index = torch.arange(blocks, device=device)
    out = torch.full((length, config.num_kv_heads, n), -1, dtype=torch.int32, device=device)
    # A few MiB of scores at a time, whatever the length.
    rows = max(1, (1 << 24) // (blocks * config.num_kv_heads))
    for start in range(0, length, rows):
        t = torch.arange(start, min(start + rows, length), device=device) % size
        own = (t // config.select_block)[:, None, None]
        score = torch.rand(len(t), config.num_kv_heads, blocks, device=device)
        forced = (index < config.num_init_blocks) | (index > own - config.num_local_blocks)
        score = score.masked_fill(forced, 2.0).masked_fill(index > own, -1.0)
        value, best = score.topk(min(n, blocks), dim=-1)
        best = best.masked_fill(value < 0, blocks).sort(-1).values
        best = best.masked_fill(best == blocks, -1)
        out[start : start + len(t), :, : best.shape[-1]] = best
    return out


def choices_of_file(
    config: NSAConfig, path: Path, length: int, layers: tuple[int, ...]
) -> dict[int, Tensor]:
    """`recorded_choices` of a file, for a document of ``length`` tokens and this attention."""
    options = Options(
        lengths=(length,),
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        choices=path,
        layers=layers,
    )
    return recorded_choices(options, length)


def recorded_choices(options: Options, length: int) -> dict[int, Tensor]:
    """Choices of a trained model from ``options.choices``, by layer, int32 [S, G, n] on the CPU.

    Raises:
        ValueError: where the file cannot be read, its tokens, groups or n are not the run's, a
            layer does not exist, or a choice is not one that this selection could make.
    """
    assert options.choices is not None
    path, config = options.choices, options.config
    arrays = _read_npz(path)
    must = f"integers selected [layer, group, token, n] in {path}"
    check("selected" in arrays, "choices", sorted(arrays), must)
    selected = arrays["selected"]
    found = f"{selected.dtype} {list(selected.shape)}"
    check(selected.ndim == 4 and selected.dtype.kind == "i", "choices", found, must)
    expected = [config.num_kv_heads, length, config.num_selected]
    if list(selected.shape[1:]) != expected:
        raise ValueError(
            f"choices must be [group, token, n] = {expected} (--kv-heads, --lengths and "
            f"--num-selected of the run), got {list(selected.shape[1:])} in {path}"
        )
    if "select_block" in arrays:
        block = int(arrays["select_block"])
        must = f"made with --select-block {config.select_block} of the run, in {path}"
        check(block == config.select_block, "choices", block, must)
    layers = options.layers or tuple(range(selected.shape[0]))
    choices = {}
    for layer in layers:
        must = f"0 to {selected.shape[0] - 1} with {path}"
        check(0 <= layer < selected.shape[0], "layers", layer, must)
        chosen = torch.from_numpy(selected[layer].astype("int32")).transpose(0, 1).contiguous()
        bad = first_bad_choice(chosen, config)
        if bad is not None:
            token, group = bad
            must = (
                f"ascending blocks up to the token's own, with that one, as many as there are but "
                f"at most {config.num_selected}, then -1 (with --select-block "
                f"{config.select_block})"
            )
            got = f"{chosen[token, group].tolist()} for token {token} of layer {layer}"
            raise ValueError(f"choices must be {must}, got {got}, group {group} in {path}")
        choices[layer] = chosen
    return choices


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        numpy = importlib.import_module("numpy")
    except ImportError:
        raise ValueError(
            f"choices must be left out where numpy is not installed (pip install numpy), got {path}"
        ) from None
    try:
        with numpy.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"choices must be an npz file, got {path} ({error})") from None


def first_bad_choice(chosen: Tensor, config: NSAConfig) -> tuple[int, int] | None:
    """The first (token, group) of one document whose choice is invalid, or None.

    chosen: integer [S, G, n]. Good are ascending blocks up to the token's own, with that one, as
    many as are eligible but at most n, then -1.
    """
    length, _, n = chosen.shape
    own = (torch.arange(length, device=chosen.device) // config.select_block)[:, None]
    count = (own + 1).clamp(max=n)
    place = torch.arange(n, device=chosen.device)
    filled = (place < count)[:, None]  # [S, 1, n]
    before = torch.nn.functional.pad(chosen[..., :-1], (1, 0), value=-1)
    good = torch.where(filled, chosen > before, chosen == -1).all(-1)
    # Ascending, so that the last one is the largest.
    good &= chosen.gather(-1, (count - 1)[:, None].expand(*chosen.shape[:2], 1))[..., 0] == own
    bad = (~good).nonzero()
    return None if not len(bad) else (int(bad[0, 0]), int(bad[0, 1]))
