"""Hugging Face folders: dense weights by torchtitan's adapter, gates and compressors by ours.

Names are those of a model converted by ``nsa_dist.adapters.huggingface``. torchtitan's adapters
drop what they do not know without a word, when they write and when they read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.common.rope import ComplexRoPE
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
from torchtitan.tools.logging import logger

from nsa_dist.checks import check

_OURS = re.compile(r"layers\.(\d+)\.attention\.(gate|k_compressor|v_compressor)\.(\w+)")
_OURS_HF = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(gate\.proj|k_compressor|v_compressor)\.(\w+)"
)


@cache
def nsa_adapter(dense: type[BaseStateDictAdapter] | None) -> type[BaseStateDictAdapter] | None:
    """The adapter of a model with Native Sparse Attention, from that of its dense model."""
    if dense is None:
        return None

    class NSAStateDictAdapter(dense):  # type: ignore[valid-type, misc]
        """Keeps gates and compressors; reads a dense folder as well, which leaves them as drawn."""

        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            self._check_holds()
            ours = {name: x for name, x in state_dict.items() if _OURS.fullmatch(name)}
            rest = {name: x for name, x in state_dict.items() if name not in ours}
            found: dict[str, Any] = super().to_hf(rest)
            for name, value in ours.items():
                layer, module, parameter = _OURS.fullmatch(name).groups()  # type: ignore[union-attr]
                if module == "k_compressor":
                    value = self._reordered(value, int(layer), parameter, to_halves)
                module = "gate.proj" if module == "gate" else module
                new = f"model.layers.{layer}.self_attn.{module}.{parameter}"
                found[new] = value
                files = self.fqn_to_index_mapping
                if files is not None:
                    files[new] = files[f"model.layers.{layer}.self_attn.q_proj.weight"]
            self._asked = found
            return found

        def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
            self._check_holds()
            ours = {name: x for name, x in hf_state_dict.items() if _OURS_HF.fullmatch(name)}
            rest = {name: x for name, x in hf_state_dict.items() if name not in ours}
            found: dict[str, Any] = super().from_hf(rest)
            for name, value in ours.items():
                layer, module, parameter = _OURS_HF.fullmatch(name).groups()  # type: ignore[union-attr]
                if module == "k_compressor":
                    value = self._reordered(value, int(layer), parameter, to_pairs)
                found[f"layers.{layer}.attention.{module.split('.')[0]}.{parameter}"] = value
            return found

        def get_hf_storage_reader(
            self, path: str, from_quantized: bool = False
        ) -> HuggingFaceStorageReader:
            """As torchtitan's. It is asked for between ``to_hf``, which makes what is to be filled,
            and the reading: weights that a dense folder lacks are taken out of that.

            Raises:
                ValueError: if the folder has some of the gates and compressors, and lacks others.
            """
            reader = super().get_hf_storage_reader(path, from_quantized)
            wanted = {name for name in self._asked if _OURS_HF.fullmatch(name)}
            missing = sorted(wanted - reader.read_metadata().state_dict_metadata.keys())
            if missing and len(missing) < len(wanted):
                raise ValueError(
                    "folder must be of a dense model, or have every gate and compressor, got "
                    f"{path} without {missing[0]}"
                )
            if missing:
                logger.info(f"Gates and compressors stay as drawn: {path} is of a dense model")
            for name in missing:
                del self._asked[name]
            return reader

        def _check_holds(self) -> None:
            nsa = self.model_config.layers[0].attention.nsa
            must = "False for Hugging Face folders, whose models have one K and V"
            check(not nsa.independent_kv, "independent_kv", nsa.independent_kv, must)

        def _reordered(self, value: Tensor, layer: int, name: str, order: Order) -> Tensor:
            attention = self.model_config.layers[layer].attention
            if not isinstance(attention.rope, ComplexRoPE.Config):  # It rotates halves itself.
                return value
            return reorder(value, attention.nsa.compress, name, attention.nsa.head_dim, order)

    NSAStateDictAdapter.__name__ = NSAStateDictAdapter.__qualname__ = f"NSA{dense.__name__}"
    return NSAStateDictAdapter


def to_halves(x: Tensor, dim: int) -> Tensor:
    """Channels that rotary rotates as pairs (0, 1), ... to first halves before second ones."""
    return x.unflatten(dim, (-1, 2)).transpose(dim - 1, dim).flatten(dim - 1, dim)


def to_pairs(x: Tensor, dim: int) -> Tensor:
    """The inverse of ``to_halves``."""
    return x.unflatten(dim, (2, -1)).transpose(dim - 1, dim).flatten(dim - 1, dim)


Order = Callable[[Tensor, int], Tensor]


def reorder(parameter: Tensor, kind: str, name: str, width: int, order: Order) -> Tensor:
    """A parameter of a key compressor with its channels in another order.

    torchtitan's Llama rotates neighbouring channels and transformers rotates halves, so that the
    keys that are compressed have their channels in one order or the other.

    Args:
        kind: ``NSAConfig.compress``.
        name: the parameter, as in ``BlockCompressor``.
        width: D.
        order: ``to_halves`` or ``to_pairs``.
    """
    if isinstance(parameter, DTensor):  # A shard may end within a pair.
        whole = [Replicate()] * parameter.device_mesh.ndim
        parameter = parameter.redistribute(parameter.device_mesh, whole)
    if name in ("down", "weight"):  # Rows are channels.
        parameter = order(parameter, -2)
    if name == "up" or (name, kind) == ("weight", "linear"):  # Columns are (row, channel).
        parameter = order(parameter.unflatten(-1, (-1, width)), -1).flatten(-2)
    if name in ("position", "query"):
        parameter = order(parameter, -1)
    return parameter
