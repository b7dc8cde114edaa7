"""Record the blocks that a trained model chooses on a text, for operators.py --choices.

    python launch/bench/record_choices.py runs/NAME-TIME --text FILE [FILE ...] --length 32768

The texts, end to end, are one document. The file has `selected` [layer, group, token, n], int16 or
int32, blocks ascending and then -1, a layer for each that is not dense, and `select_block`, the
tokens of a block. Under torchrun the document is split over all processes, for lengths that one GPU
does not hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from launch.bench.options import first_bad_choice
from launch.data.corpus import load_tokenizer
from launch.data.sources import read_file
from launch.details import recorded
from launch.engines.fsdp2 import load_weights
from launch.model import Decoder, build_model
from launch.processes.mistakes import end, read_once
from launch.processes.ranks import Ranks, start_ranks
from launch.settings import Settings, from_toml
from launch.storage.checkpoint import checkpoints, open_checkpoint
from nsa_dist import shard_batch
from nsa_dist.attention.functional import NSADetails
from nsa_dist.checks import check

LAYOUT: Literal["zigzag_per_document"] = "zigzag_per_document"
"""Of one document it is zigzag; dense layers of hybrid models work with it too."""


@dataclass(frozen=True)
class RecordOptions:
    """Record the blocks that a trained model chooses on a text.

    Args:
        folder: a run's folder, with checkpoints.
        text: files that make the document, end to end.
        length: tokens to read; all when None. May be more than the model was trained on.
        step: the checkpoint's step; the newest when None.
        out: npz file to write.
        device: auto takes cuda where there is a GPU.
        dtype: of the forward; auto as in training.
    """

    folder: tyro.conf.Positional[Path]
    text: tuple[Path, ...]
    length: int | None = None
    step: int | None = None
    out: Path = Path("choices.npz")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"


@dataclass(frozen=True, eq=False)
class Recording:
    """What a model chose.

    Args:
        selected: int32 [layer, group, token, n] on the CPU.
        loss: mean over the document's targets, nats a token.
    """

    selected: Tensor
    loss: float


def find_checkpoint(options: RecordOptions) -> tuple[Path, Settings]:
    """The checkpoint's folder and its run's settings, for one document over all processes.

    Raises:
        ValueError: if there is no such checkpoint, or its model chooses no blocks.
    """
    found = {int(path.name.removeprefix("step_")): path for path in checkpoints(options.folder)}
    check(bool(found), "folder", str(options.folder), "a run's folder with a whole checkpoint")
    step = max(found) if options.step is None else options.step
    check(step in found, "step", step, f"one of {', '.join(map(str, sorted(found)))}")
    settings = from_toml(found[step] / "settings.toml")
    kind, branches = settings.model.attention, settings.attention.branches
    must = "of a run with model.attention = 'nsa'"
    check(kind == "nsa", "folder", kind, must)
    must = "of a run with 'selected' in attention.branches"
    check("selected" in branches, "folder", branches, must)
    return found[step], settings


def read_tokens(options: RecordOptions, settings: Settings) -> Tensor:
    """int64 [1, length], the first tokens of the texts.

    Raises:
        ValueError: if a file cannot be read, or the texts have fewer tokens.
    """
    for path in options.text:
        check(path.is_file(), "text", str(path), "existing files")
    text = b"".join(read_file(path, "text") for path in options.text)
    tokens = load_tokenizer(settings.data).encode(text, str(options.text[0]))
    most = tokens.numel()
    length = most if options.length is None else options.length
    check(most > 0, "text", ", ".join(map(str, options.text)), "files with some text")
    check(0 < length <= most, "length", length, f"1 to {most}, the tokens of the text")
    return tokens[:length].to(torch.int64)[None]


@torch.no_grad()
def record(model: Decoder, tokens: Tensor, ranks: Ranks) -> Recording:
    """The choices of every layer on one document, tokens int64 [1, T]; collective."""
    bounds = torch.tensor([0, tokens.shape[1]], dtype=torch.int32)
    batch = shard_batch(
        tokens.to(ranks.device), cu_seqlens=bounds, layout=LAYOUT, group=ranks.cp_mesh
    )
    model.eval()

    def chosen(details: NSADetails) -> Tensor:
        assert details.selected is not None  # find_checkpoint refuses models without it.
        return details.selected

    with recorded(model, chosen) as choices:
        # With labels no [T, vocabulary] of logits is made.
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
    # One layer's at a time on the device: [1, T, G, n] -> [G, T, n].
    layers = [batch.unshard(each)[0].transpose(0, 1).cpu() for each in choices]
    mean = float(ranks.total(loss)) / max(batch.num_targets, 1)
    return Recording(torch.stack(layers), mean)


def write_choices(path: Path, selected: Tensor, select_block: int) -> None:
    """The npz file, int16 where that holds every block; parent folders are made."""
    import numpy

    small = int(selected.max()) <= torch.iinfo(torch.int16).max
    array = selected.to(torch.int16 if small else torch.int32).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # numpy would add a suffix to a name.
        numpy.savez_compressed(file, selected=array, select_block=numpy.int64(select_block))


def run(options: RecordOptions) -> Recording:
    """Load, read, record and write; collective, the same on every rank.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    path, settings = find_checkpoint(options)
    tokens = read_tokens(options, settings)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        world = dist.get_world_size()
    settings = replace(
        settings,
        parallel=replace(settings.parallel, cp=world, dp=1, layout=LAYOUT),
        data=replace(settings.data, global_batch=1, micro_batch=1),
        run=replace(settings.run, device=options.device, dtype=options.dtype, start_from=""),
    )
    ranks = start_ranks(settings)
    ranks.check_equal("step", path.name, "a checkpoint that every process sees")
    open_checkpoint(path, "folder")
    tokenizer = load_tokenizer(settings.data)
    if ranks.is_main and tokenizer.note:
        print(tokenizer.note)
    model = build_model(settings, tokenizer.vocab_size, ranks)
    load_weights(path, model)
    recording = record(model, tokens, ranks)
    for layer, selected in enumerate(recording.selected):
        bad = first_bad_choice(selected.transpose(0, 1), settings.attention)
        assert bad is None, f"layer {layer} chose otherwise than it may at (token, group) {bad}"
    if ranks.is_main:
        write_choices(options.out, recording.selected, settings.attention.select_block)
        size = list(recording.selected.shape)
        print(
            f"{path}: {recording.loss:.4f} nats/token on {tokens.numel():,} tokens; "
            f"{options.out} has selected [layer, group, token, n] = {size}"
        )
    return recording


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(RecordOptions, args=arguments))
    try:
        run(options)
    except ValueError as error:
        end("record_choices.py", error)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
