"""A model out of a checkpoint of any engine, whole on one device: what the programs that look at a
model, judge it or carry it away begin with.

    with alone():
        trained = load(Path("runs/mine"))
    model = trained.decoder("cuda")              # or trained.transformers("cuda"), with a cache
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from launch.data.corpus import load_tokenizer
from launch.data.tokenizer import Tokenizer, make_tokenizer
from launch.engines.registry import engine_spec
from launch.model import Decoder, compute_dtype
from launch.settings import Settings
from launch.storage.checkpoint import newest_checkpoint, open_checkpoint
from nsa_dist.checks import check

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "bfloat16", "float32", "float64"]


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model.

    Args:
        path: of its checkpoint.
        step: of its run.
        settings: of its run, for one rank.
        weights: whole, on the CPU, by the names of ``Decoder``, float32 or float64.
    """

    path: Path
    step: int
    settings: Settings
    weights: dict[str, Tensor]

    @property
    def name(self) -> str:
        """The run and the step, for titles."""
        return f"{self.path.resolve().parent.parent.name} step {self.step}"

    @property
    def vocab_size(self) -> int:
        return self.weights["embedding.weight"].shape[0]

    def decoder(self, device: Device = "auto", dtype: Dtype = "auto") -> Decoder:
        """The model of training in eval mode, without a group.

        Raises:
            ValueError: if there is no such device.
        """
        place, kind = self.placed(device, dtype)
        with torch.device("meta"):
            model = Decoder(self.settings, self.vocab_size)
        weights = {name: value.to(place, kind) for name, value in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()

    def transformers(self, device: Device = "auto", dtype: Dtype = "auto") -> Any:
        """The same function as a model of transformers in eval mode, which has a cache.

        Raises:
            ValueError: if there is no such device, transformers is not installed, or has no model
                of these settings.
        """
        check_transformers()
        from launch.hugging_face import build_transformers

        place, kind = self.placed(device, dtype)
        return build_transformers(self.settings, self.weights, place, kind)

    def tokenizer(self, name: str = "") -> Tokenizer:
        """The tokenizer of the run, or of another path to the same one.

        Raises:
            ValueError: if it cannot be loaded, or has more tokens than the model.
        """
        if name:
            tokenizer = make_tokenizer(name, "tokenizer")
        else:
            try:
                tokenizer = load_tokenizer(self.settings.data)
            except ValueError as error:
                raise ValueError(
                    f"{error} (--tokenizer names the run's at another place)"
                ) from None
        must = f"one of at most {self.vocab_size} tokens, the model's vocabulary"
        check(tokenizer.vocab_size <= self.vocab_size, "tokenizer", tokenizer.vocab_size, must)
        return tokenizer

    def placed(self, device: Device, dtype: Dtype) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype of the computation; 'auto' is what training takes."""
        cuda = torch.cuda.is_available()
        kind = device if device != "auto" else ("cuda" if cuda else "cpu")
        check(kind != "cuda" or cuda, "device", kind, "'cpu' where no GPU is usable")
        run = self.settings.run if dtype == "auto" else replace(self.settings.run, dtype=dtype)
        place = torch.device(kind)
        return place, compute_dtype(replace(self.settings, run=run), place)


def check_transformers() -> None:
    """Refuse where transformers is not installed.

    Raises:
        ValueError: with what to install.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "transformers must be installed (pip install nsa-dist[huggingface]), got no package"
        )


def load(path: Path) -> Trained:
    """A model from a run's folder or one of its checkpoints, whatever engine and ranks wrote it, in
    a process group of one.

    Raises:
        ValueError: if there is none, it is not whole, or a file of it holds more than data.
    """
    found = open_checkpoint(newest_checkpoint(path, "CHECKPOINT"), "CHECKPOINT")
    settings = found.settings
    weights = engine_spec(settings.parallel.engine).read_weights(found)
    wide = {
        name: value.to(torch.promote_types(value.dtype, torch.float32))
        for name, value in weights.items()
    }
    return Trained(found.path, found.step, for_one_rank(settings), wide)


def for_one_rank(settings: Settings) -> Settings:
    """A run's settings, for the whole model on one device."""
    default = type(settings.parallel)()
    # Speed and memory of training.
    unset: dict[str, Any] = {"recompute": False, "recompute_part": "block"}
    model = replace(settings.model, **unset, compile=(), loss="pieces")
    return replace(settings, parallel=default, model=model)


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is a process group of one.

    Raises:
        ValueError: under torchrun with more processes, each of which would do the same.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    check(size == "1", "WORLD_SIZE", size, "1: this program is one process")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
