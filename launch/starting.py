"""A run that begins with another run's weights: ``run.start_from``.

Weights alone come along. The run has its own step 0, optimizer state, data, lengths and scaling of
rotary frequencies, so that a model of short contexts is extended to long ones (docs/training.md).
What its weights were trained as must stay, except that dense layers may become sparse ones.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from launch.engines.fsdp2 import SPEC
from launch.first_weights import saved_shapes
from launch.model import Decoder
from launch.settings import Settings
from launch.storage.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from launch.storage.manifest import on_main
from nsa_dist import NSAConfig
from nsa_dist.checks import check

OPTION = "run.start_from"

FREE = {
    "attention": (
        *("select_block", "num_selected", "num_init_blocks", "num_local_blocks", "window"),
        "gate_init",
    ),
    "rotary": (
        *("theta", "scaling", "factor", "original_max_positions", "attention_factor"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    ),
    "model": ("backend", "compile", "dropout", "loss", "recompute", "recompute_part"),
}
"""Options that may differ from the checkpoint's: no weight has another shape or meaning by them."""
OF_DENSE = ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "scale")
"""What dense layers read of ``attention``."""
LARGEST_COMPRESSED_GATE, FARTHEST_SUM = 0.05, 0.02
"""Bounds of the first gates of a layer that was dense: of the compressed branch, and of how far the
sum of the others is from 1."""


def find_start(settings: Settings, vocab_size: int) -> tuple[Settings, Checkpoint]:
    """The settings with ``run.start_from`` as the path of a checkpoint, which was verified and fits
    them, and that checkpoint. Collective.

    Args:
        vocab_size: of the run's tokenizer.

    Raises:
        ValueError: on every rank, naming the option, if there is no whole checkpoint, or it is of
            another model.
    """
    path = on_main(lambda: newest_checkpoint(Path(settings.run.start_from), OPTION))
    found = open_checkpoint(path, OPTION)
    on_main(lambda: check_fits(found, settings, vocab_size))
    run = dataclasses.replace(settings.run, start_from=str(found.path))
    return dataclasses.replace(settings, run=run), found


def check_fits(found: Checkpoint, settings: Settings, vocab_size: int) -> None:
    """Refuse a checkpoint whose weights are not those of the run's model.

    Raises:
        ValueError: naming the option, the checkpoint's value and the run's.
    """
    engine = found.settings.parallel.engine
    must = f"a checkpoint of engine {SPEC.name!r} (launch/convert.py makes one of Megatron's)"
    check(engine == SPEC.name, OPTION, f"{found.path} of {engine!r}", must)
    free = dict(FREE)
    if becomes_sparse(found.settings, settings):
        free["model"] += ("attention", "dense_every")
        check_conversion(settings.attention)
    if found.settings.model.attention == "dense":
        names = (field.name for field in dataclasses.fields(NSAConfig))
        free["attention"] = tuple(name for name in names if name not in OF_DENSE)
    for section, options in free.items():
        saved, now = (getattr(each, section) for each in (found.settings, settings))
        for option in dataclasses.fields(now):
            if option.name not in options:
                old, new = (getattr(each, option.name) for each in (saved, now))
                must = f"{old!r}, as in the checkpoint {found.path} that the run starts from"
                check(old == new, f"{section}.{option.name}", new, must)
    shapes = saved_shapes(found.path)
    tokens = shapes["embedding.weight"][0]
    must = f"one of {tokens} tokens, as that of the checkpoint {found.path}"
    check(tokens == vocab_size, "data.tokenizer", f"{vocab_size} tokens", must)
    # Layers that become sparse are dense in the checkpoint.
    model = found.settings.model
    of_checkpoint = Settings(attention=settings.attention, rotary=settings.rotary, model=model)
    with torch.device("meta"):
        decoder = Decoder(of_checkpoint, vocab_size)
    own = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    for name in sorted(own.keys() | shapes.keys()):
        must = f"a checkpoint with {name} of shape {own.get(name)}"
        check(own.get(name) == shapes.get(name), OPTION, str(shapes.get(name)), must)


def becomes_sparse(saved: Settings, now: Settings) -> bool:
    """Whether layers are dense in a checkpoint and sparse in a run, and none is the other way
    round, which cannot be."""
    layers = range(min(saved.model.layers, now.model.layers))
    pairs = [(saved.model.is_dense(layer), now.model.is_dense(layer)) for layer in layers]
    return (True, False) in pairs and (False, True) not in pairs


def check_conversion(config: NSAConfig) -> None:
    """Refuse an attention that would not begin as the dense one where all keys are covered.

    Raises:
        ValueError: naming the option.
    """
    case = "where dense layers of the checkpoint that the run starts from become sparse"
    must = f"all with 'selected' and 'window', which begin as dense attention, {case}"
    given = config.branches
    check({"selected", "window"} <= set(given), "attention.branches", given, must)
    least = 2 * max(config.head_dim, config.value_dim)
    must = f"None or at least 2 * attention.head_dim = {least} (compressors begin as means) {case}"
    hidden = config.compress_hidden
    check(hidden is None or hidden >= least, "attention.compress_hidden", hidden, must)
    compressed, selected, window = ((1 + math.tanh(x / 2)) / 2 for x in config.gate_init)
    must = (
        f"logits whose sigmoids are at most {LARGEST_COMPRESSED_GATE} (compressed) and add up to 1 "
        f"(selected and window), such as [-4.0, 0.0, 0.0], {case}"
    )
    fits = abs(selected + window - 1) <= FARTHEST_SUM
    fits = fits and ("compressed" not in given or compressed <= LARGEST_COMPRESSED_GATE)
    check(fits, "attention.gate_init", config.gate_init, must)
