"""A run that begins with another run's weights: ``run.start_from``.

Weights alone come along. The run has its own step 0, optimizer state, data, lengths and scaling of
rotary frequencies, so that a model of short contexts is extended to long ones (docs/training.md).
What its weights were trained as must stay.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.engines.fsdp2 import SPEC
from launch.model import SAVED_PREFIX, Decoder
from launch.settings import Settings
from launch.storage.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from launch.storage.manifest import on_main
from nsa_dist.checkpoints.dcp_metadata import read_metadata
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
    for section, free in FREE.items():
        saved, now = (getattr(each, section) for each in (found.settings, settings))
        for option in dataclasses.fields(now):
            if option.name not in free:
                old, new = (getattr(each, option.name) for each in (saved, now))
                must = f"{old!r}, as in the checkpoint {found.path} that the run starts from"
                check(old == new, f"{section}.{option.name}", new, must)
    shapes = saved_shapes(found.path)
    tokens = shapes["embedding.weight"][0]
    must = f"one of {tokens} tokens, as that of the checkpoint {found.path}"
    check(tokens == vocab_size, "data.tokenizer", f"{vocab_size} tokens", must)
    with torch.device("meta"):
        decoder = Decoder(settings, vocab_size)
    own = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    for name in sorted(own.keys() | shapes.keys()):
        must = f"a checkpoint with {name} of shape {own.get(name)}"
        check(own.get(name) == shapes.get(name), OPTION, str(shapes.get(name)), must)


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in a checkpoint of engine fsdp2, by its name in ``Decoder``."""
    return {
        key.removeprefix(SAVED_PREFIX): tuple(stored.size)
        for key, stored in read_metadata(path).state_dict_metadata.items()
        if key.startswith(SAVED_PREFIX) and isinstance(stored, TensorStorageMetadata)
    }
