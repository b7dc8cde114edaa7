"""Look inside a trained model: which blocks each token chose, and its gates.

    python launch/inspect_attention.py CHECKPOINT TEXT --out FOLDER

CHECKPOINT is a run's folder (its newest checkpoint) or one of its ``checkpoints/step_N``, of any
engine; TEXT is a file. FOLDER gets ``choices.png`` (a map for each layer and group of heads:
queries down, blocks across), ``gates.png`` (the gates of each branch over positions) and
``attention.html``, one page that needs nothing else: click a token, and its blocks light up.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Import from the checkout, not from this file's folder.
    folder, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    others = [path for path in sys.path if Path(path).resolve() != folder]
    sys.path[:] = [str(root), str(root / "kernels"), *others]

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from launch.data.sources import read_file
from launch.data.tokenizer import Tokenizer
from launch.details import recorded
from launch.loading import Device, Dtype, Trained, alone, load
from launch.model import Decoder
from launch.processes.mistakes import BAD_INPUT, end, read_once
from launch.reporting.pictures import check_pictures, panels
from nsa_dist import NativeSparseAttention
from nsa_dist.attention.functional import NSADetails
from nsa_dist.checks import check

PAGE = Path(__file__).parent / "reporting" / "attention_page.html"
MAP = 256
"""Pixels of a map of choices on either side."""
BAND, WIDE = 16, 512
"""Pixels of a layer's gates, down and across."""
MOST = 48 << 20
"""Bytes of choices in a page at most."""


@dataclass(frozen=True)
class InspectOptions:
    """Which blocks each token of a text chose, and its gates.

    Args:
        checkpoint: a run's folder or its checkpoints/step_N.
        text: a file.
        length: tokens of it that are read, from the beginning.
        layers: that are shown, counted from 0; all sparse ones when none is given.
        out: folder to write to.
        tokenizer: of the run, where it lies elsewhere now.
        device: auto takes cuda where there is a GPU.
        dtype: of the model; auto as in training.
    """

    checkpoint: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[Path]
    length: int = 2048
    layers: tuple[int, ...] = ()
    out: Path = Path("attention")
    tokenizer: str = ""
    device: Device = "auto"
    dtype: Dtype = "auto"


@dataclass(frozen=True, eq=False)
class Inside:
    """What layers did on a document of T tokens.

    Args:
        layers: which, counted from 0.
        selected: int16 [layer, T, group, n], blocks ascending and then -1.
        gates: float32 [layer, T, group, branch], the mean over the heads of a group.
        loss: mean over the document's targets, nats.
    """

    layers: tuple[int, ...]
    selected: Tensor
    gates: Tensor
    loss: float


def shown_layers(options: InspectOptions, trained: Trained) -> tuple[int, ...]:
    """The layers to show.

    Raises:
        ValueError: for others than the model's sparse ones, or if it has none that choose.
    """
    model, branches = trained.settings.model, trained.settings.attention.branches
    sparse = tuple(layer for layer in range(model.layers) if not model.is_dense(layer))
    must = "of a run with sparse layers"
    check(bool(sparse), "CHECKPOINT", f"model.attention = {model.attention!r}", must)
    must = "of a run with 'selected' in attention.branches"
    check("selected" in branches, "CHECKPOINT", branches, must)
    chosen = options.layers or sparse
    check(set(chosen) <= set(sparse), "layers", chosen, f"some of the sparse layers, {sparse}")
    return tuple(sorted(set(chosen)))


@torch.no_grad()
def look(model: Decoder, tokens: Tensor, layers: Sequence[int], groups: int) -> Inside:
    """Run a model over a document, tokens int64 [T], and keep what its sparse layers did."""

    def take(details: NSADetails) -> tuple[Tensor, Tensor]:
        assert details.selected is not None
        gates = details.gates[0].float().unflatten(1, (groups, -1)).mean(2)
        return details.selected[0].to(torch.int16).cpu(), gates.cpu()

    place = model.embedding.weight.device
    labels = F.pad(tokens[1:], (0, 1), value=-100).to(place)
    with recorded(model, take) as kept:
        # With labels no [T, vocabulary] of logits is made.
        loss = float(model(tokens[None].to(place), labels=labels[None]))
    sparse = [
        i
        for i, block in enumerate(model.blocks)
        if isinstance(block.attention, NativeSparseAttention)
    ]
    which = [sparse.index(layer) for layer in layers]
    selected, gates = (torch.stack([kept[i][part] for i in which]) for part in (0, 1))
    return Inside(tuple(layers), selected, gates, loss / max(1, tokens.numel() - 1))


def token_texts(tokenizer: Tokenizer, tokens: Tensor) -> list[str]:
    """What each token stands for; the bytes of a character of several are written as numbers."""
    texts = []
    for token in tokens.tolist():
        text = tokenizer.decode([token])
        is_part = "\ufffd" in text or not text
        texts.append(f"⟨{token:02x}⟩" if is_part else text)
    return texts


def choice_map(selected: Tensor, select_block: int) -> Tensor:
    """Shares of queries that chose each block, of those that may: float [MAP, MAP]; NaN above the
    diagonal.

    Args:
        selected: integer [T, n] of one layer and group.
    """
    length = selected.shape[0]
    blocks = -(-length // select_block)
    chosen = torch.zeros(length, blocks + 1)
    chosen.scatter_(1, selected.long().where(selected >= 0, blocks), 1.0)
    may = torch.arange(blocks) * select_block <= torch.arange(length)[:, None]
    both = torch.stack((chosen[:, :blocks], may.float()))[None]
    # Rows by means, where there are more than pixels; everything else by the nearest.
    if length > MAP:
        both = F.adaptive_avg_pool2d(both, (MAP, blocks))
    share, allowed = F.interpolate(both, (MAP, MAP))[0]
    return share / allowed


def draw(inside: Inside, trained: Trained, out: Path, unit: str) -> None:
    """choices.png and gates.png."""
    attention = trained.settings.attention
    groups, size, branches = attention.num_kv_heads, attention.select_block, attention.branches
    maps = [
        (f"layer {layer}, group {group}", choice_map(inside.selected[i, :, group], size))
        for i, layer in enumerate(inside.layers)
        for group in range(groups)
    ]
    panels(
        out / "choices.png",
        maps,
        columns=groups,
        title=f"Chosen blocks, {trained.name}",
        note=f"queries down, blocks of {size} {unit}s across; darker: more queries chose it",
    )
    gates = inside.gates.mean(2)  # [layer, T, branch]
    least, most = float(gates.min()), float(gates.max())
    scaled = ((gates - least) / max(most - least, 1e-6)).unbind(2)
    panels(
        out / "gates.png",
        [(f"{branch} branch", gate_map(x)) for branch, x in zip(branches, scaled, strict=True)],
        columns=1,
        title=f"Gates, {trained.name}",
        note=f"layers {', '.join(map(str, inside.layers))} down, {gates.shape[1]:,} {unit}s "
        f"across; white {least:.2f}, dark {most:.2f}",
    )


def gate_map(gates: Tensor) -> Tensor:
    """Gates of one branch [layer, T] as pixels: bands of layers, means over positions."""
    layers, length = gates.shape
    rows = gates[None, None]
    if length > WIDE:
        rows = F.adaptive_avg_pool2d(rows, (layers, WIDE))
    return F.interpolate(rows, (layers * BAND, WIDE))[0, 0]


def page(inside: Inside, trained: Trained, texts: list[str], title: str) -> str:
    """The page, one document of HTML that needs no other file."""
    attention = trained.settings.attention
    data = {
        "title": title,
        "tokens": texts,
        "layers": list(inside.layers),
        "groups": attention.num_kv_heads,
        "n": inside.selected.shape[-1],
        "size": attention.select_block,
        "branches": list(attention.branches),
        "chosen": _base64(inside.selected.numpy().astype("<i2")),
        "gates": _base64((inside.gates * 255).round().to(torch.uint8).numpy()),
    }
    # No text ends the element that holds it.
    written = json.dumps(data).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", written)


def _base64(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode()


def run(options: InspectOptions, say: Callable[[str], Any] = print) -> Inside:
    """Load, look, write.

    Raises:
        ValueError: naming the option, what it must be and its value.
    """
    check(options.length >= 2, "length", options.length, "at least 2")
    check(options.text.is_file(), "TEXT", str(options.text), "an existing file")
    check_pictures()
    with alone():
        trained = load(options.checkpoint)
    layers = shown_layers(options, trained)
    tokenizer, attention = trained.tokenizer(options.tokenizer), trained.settings.attention
    text = read_file(options.text, "TEXT")
    tokens = tokenizer.encode(text, str(options.text)).to(torch.int64)[: options.length]
    check(tokens.numel() >= 2, "TEXT", str(options.text), "a file of two tokens or more")
    size = 2 * len(layers) * tokens.numel() * attention.num_kv_heads * attention.num_selected
    must = f"{MOST * options.length // size or 1} at most with {len(layers)} layers (see --layers)"
    check(size <= MOST, "length", options.length, must)
    model = trained.decoder(options.device, options.dtype)
    inside = look(model, tokens, layers, attention.num_kv_heads)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(inside, trained, options.out, tokenizer.unit)
    title = f"{options.text.name}: blocks that {trained.name} chose"
    written = page(inside, trained, token_texts(tokenizer, tokens), title)
    (options.out / "attention.html").write_text(written, encoding="utf-8")
    say(
        f"step {trained.step} of {trained.path}: {inside.loss:.4f} nats/{tokenizer.unit} on "
        f"{tokens.numel():,} {tokenizer.unit}s of {options.text}; {options.out} has choices.png, "
        "gates.png and attention.html"
    )
    return inside


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_once(lambda: tyro.cli(InspectOptions, args=arguments))
    try:
        run(options)
    except (OSError, ValueError) as error:
        end("inspect_attention.py", error, BAD_INPUT)


if __name__ == "__main__":
    main()
