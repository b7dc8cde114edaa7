"""The same weights under the names of ``model.Decoder`` and under those of Megatron's GPT model.

Weights are only moved, never changed. So tensors of the same layout (the optimizer's moments) are
converted in the same way, and back bit for bit. ``docs/adapters/megatron.md`` has the table.

H query heads in G groups of R; nk key sets and nv value sets; d width of a head, h of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa_dist import NSAConfig

# Of a block, ours and Megatron's. Modules with more parameters than one end in a dot.
_SAME = (
    ("attention_norm.weight", "input_layernorm.weight"),
    ("attention.o_proj.weight", "self_attention.linear_proj.weight"),
    ("attention.gate.", "self_attention.gate."),
    ("attention.q_norm.weight", "self_attention.q_layernorm.weight"),
    ("attention.k_compressor.", "self_attention.core_attention.k_compressor."),
    ("attention.v_compressor.", "self_attention.core_attention.v_compressor."),
    ("mlp_norm.weight", "pre_mlp_layernorm.weight"),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_K_NORM = ("attention.k_norm.weight", "self_attention.k_layernorm.weight")
# Of the rest of the model.
_REST = (
    ("embedding.weight", "embedding.word_embeddings.weight"),
    ("norm.weight", "decoder.final_layernorm.weight"),
    ("head.weight", "output_layer.weight"),
)
# Megatron's checkpoints call a norm by the projection that it stands before.
_SAVED = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)


def block_to_megatron(block: Mapping[str, Tensor], config: NSAConfig) -> dict[str, Tensor]:
    """A whole block of ours, by names within it -> Megatron's layer, by names within it."""
    groups, d = config.num_kv_heads, config.head_dim
    rest = dict(block)
    q = rest.pop("attention.q_proj.weight").unflatten(0, (groups, -1, d))  # [G, R, d, h]
    k, v = (
        rest.pop(f"attention.{name}_proj.weight").unflatten(0, (-1, groups, d)).transpose(0, 1)
        for name in "kv"
    )  # [G, sets, d, h]
    halves = [rest.pop(f"mlp.{name}_proj.weight") for name in ("gate", "up")]
    layer = {_QKV: torch.cat((q, k, v), dim=1).flatten(0, 2), _FC1: torch.cat(halves)}
    if _K_NORM[0] in rest:
        weight = rest.pop(_K_NORM[0])
        layer[_K_NORM[1]] = weight if config.independent_kv else weight.squeeze(0)
    return layer | {_renamed(name, _SAME): value for name, value in rest.items()}


def block_from_megatron(layer: Mapping[str, Tensor], config: NSAConfig) -> dict[str, Tensor]:
    """The inverse of ``block_to_megatron``."""
    groups, d = config.num_kv_heads, config.head_dim
    sets = (config.heads_per_group, config.num_key_sets, config.num_value_sets)
    rest = dict(layer)
    q, k, v = rest.pop(_QKV).unflatten(0, (groups, sum(sets), d)).split(sets, dim=1)
    gate, up = rest.pop(_FC1).chunk(2)
    block = {
        "attention.q_proj.weight": q.flatten(0, 2),
        "attention.k_proj.weight": k.transpose(0, 1).flatten(0, 2),
        "attention.v_proj.weight": v.transpose(0, 1).flatten(0, 2),
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }
    if _K_NORM[1] in rest:
        weight = rest.pop(_K_NORM[1])
        block[_K_NORM[0]] = weight if config.independent_kv else weight[None]
    back = tuple((theirs, ours) for ours, theirs in _SAME)
    return block | {_renamed(name, back): value for name, value in rest.items()}


def to_saved(weights: Mapping[str, Tensor], config: NSAConfig, layers: int) -> dict[str, Tensor]:
    """A whole ``Decoder`` by its names -> by the keys of Megatron's distributed checkpoints.

    There layers are stacked: ``decoder.layers.X`` is [layers, ...] of the X of every layer.
    """
    saved = {_renamed(n, _REST): w for n, w in weights.items() if not n.startswith("blocks.")}
    blocks = [block_to_megatron(_within(weights, f"blocks.{i}."), config) for i in range(layers)]
    for name in blocks[0]:
        key = f"decoder.layers.{_renamed(name, _SAVED)}"
        saved[key] = torch.stack([block[name] for block in blocks])
    return saved


def from_saved(saved: Mapping[str, Tensor], config: NSAConfig) -> dict[str, Tensor]:
    """The inverse of ``to_saved``."""
    back = tuple((theirs, ours) for ours, theirs in _REST)
    stacked = _within(saved, "decoder.layers.")
    weights = {
        _renamed(key, back): value
        for key, value in saved.items()
        if not key.startswith("decoder.layers.")
    }
    names = tuple((theirs, ours) for ours, theirs in _SAVED)
    for i in range(next(iter(stacked.values())).shape[0]):
        layer = {_renamed(key, names): value[i] for key, value in stacked.items()}
        block = block_from_megatron(layer, config)
        weights |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return weights


def rest_to_megatron(part: str) -> str:
    """The name in Megatron's model of the weight of a ``Decoder.parts()`` that is not a block."""
    return _renamed(f"{part}.weight", _REST)


def own_part(name: str, whole: Tensor, parameter: Tensor, rank: int, size: int) -> Tensor:
    """What a tensor parallel rank holds of a whole weight, by Megatron's own attributes."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if name.endswith(_FC1):  # Gate and up projection, each split.
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def _within(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in named.items() if n.startswith(prefix)}


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name
