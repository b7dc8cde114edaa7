"""From a dense model to a sparse one that starts as it: see ``convert_to_nsa``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.checks import (
    check_attention,
    check_config,
    check_layers,
    check_model,
    check_modules,
)
from nsa_dist.adapters.huggingface.models import (
    FAMILIES,
    make_attention,
    make_runtime,
    write_config,
)
from nsa_dist.adapters.huggingface.weights import whole
from nsa_dist.checks import check
from nsa_dist.comm.group import ContextGroup, GroupLike
from nsa_dist.config import NSAConfig
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.gates import LinearGate, MLPGate

GATE_INIT = (-10.0, 0.0, 0.0)
"""Gate logits of (compressed, selected, window): 0.5 + 0.5 + 4.5e-5, one dense attention."""


def convert_to_nsa(
    model: Any,
    config: NSAConfig,
    layers: Iterable[int] | None = None,
    group: GroupLike | ContextGroup = None,
    *,
    layout: str = "zigzag",
    backend: str = "auto",
    gate_init: tuple[float, float, float] = GATE_INIT,
) -> Any:
    """Replace the attention of a dense model by Native Sparse Attention, in place.

    Dense weights stay, whatever holds them: decoder layers, norms, rotary embedding, tied heads and
    the model itself are the objects that they were. Gates are new and start as the constants
    ``gate_init``; compressors are new and start as the mean of a block. While a document has at
    most min(window, num_selected * select_block) tokens, the selected and the window branch are
    each the dense attention, with gates of 0.5, so that the model computes what it did.

    Args:
        model: a ``LlamaForCausalLM`` or ``Qwen3ForCausalLM``, on one device.
        config: what is computed; its heads and widths are the model's. Its ``gate_init`` is that
            of this function.
        layers: indices of the layers to convert; all when None. The others stay dense.
        group: process group or one-dimensional DeviceMesh over which sequences are split; None for
            one rank. Then all layers must be converted.
        layout: "contiguous", "zigzag" or "zigzag_per_document", as given to ``shard_batch``.
        backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.
        gate_init: initial gate logits of (compressed, selected, window).

    Returns:
        ``model``, now a ``NSALlamaForCausalLM`` or ``NSAQwen3ForCausalLM``, its config one of
        ``NSALlamaConfig`` or ``NSAQwen3Config``. The config object that it had is left as it is.

    Raises:
        ValueError: naming the option, the value found and the values that work; the model is then
            as it was.
    """
    check_model(model, FAMILIES)
    check_config(config, model.config, gate_init)
    chosen = check_layers(layers, model.config)
    check_modules(model, chosen)
    check_attention(config, backend, model.model.layers[chosen[0]].self_attn)
    layers_in_all, told = model.config.num_hidden_layers, group is not None
    runtime = make_runtime(group, layout, backend, chosen, layers_in_all, told=told)
    config = replace(config, gate_init=gate_init)

    # All that can fail comes before the first change of the model.
    sparse, config_type = FAMILIES[type(model)]
    dense_config = model.config
    new_config = write_config(dense_config, config_type, config, chosen)
    attention = make_attention(model, config, chosen)
    for module in attention.values():
        start_from_dense(module)

    model.__class__ = sparse
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = new_config
    model._become_sparse(config, attention, runtime)
    return model


@torch.no_grad()
def start_from_dense(attention: NSAAttention) -> None:
    """Set gates to the constants of ``gate_init``, and compressors to the mean of a block."""
    gate = attention.gate
    compressors = [x for x in (attention.k_compressor, attention.v_compressor) if x is not None]
    with whole(x for module in (gate, *compressors) for x in module.parameters()):
        if isinstance(gate, LinearGate):
            gate.proj.weight.zero_()
        elif isinstance(gate, MLPGate):
            gate.down.weight.zero_()
        for compressor in compressors:
            _start_as_mean(compressor)


def _start_as_mean(compressor: BlockCompressor) -> None:
    """conv1d, attention_pool and mean start so by themselves."""
    dim, block = compressor.dim, compressor.block
    parameters = dict(compressor.named_parameters())
    if compressor.kind == "linear":
        _set_mean(parameters["weight"], dim, block, 1.0)
    elif compressor.kind == "mlp":
        # silu(a) - silu(-a) = a: the first 2D hidden channels give the mean, the others nothing.
        up, down = parameters["up"], parameters["down"]
        _set_mean(up[..., :dim, :], dim, block, 1.0)
        _set_mean(up[..., dim : 2 * dim, :], dim, block, -1.0)
        down.zero_()
        channel = torch.arange(dim, device=down.device)
        down[..., channel, channel] = 1.0
        down[..., channel, dim + channel] = -1.0


def _set_mean(weight: Tensor, dim: int, block: int, sign: float) -> None:
    """Fill [..., D, l * D], columns (row of the block, channel), with sign times the mean."""
    channel = torch.arange(dim, device=weight.device)
    weight.zero_()
    weight.unflatten(-1, (block, dim))[..., channel, :, channel] = sign / block


def from_pretrained(
    folder: Any,
    *,
    group: GroupLike | ContextGroup = None,
    layout: str = "zigzag",
    backend: str = "auto",
    **options: Any,
) -> Any:
    """Load what ``save_pretrained`` of a converted model has written.

    Args:
        folder: where it was saved, or a name on the Hub.
        group, layout, backend: as of ``convert_to_nsa``; a checkpoint does not hold them.
        options: for the ``from_pretrained`` of transformers, such as ``dtype`` and ``device_map``.

    Returns:
        A ``NSALlamaForCausalLM`` or ``NSAQwen3ForCausalLM`` in eval mode; with
        ``output_loading_info=True`` a pair of it and what transformers tells of the loading.

    Raises:
        ValueError: for a folder that is not there or is empty, and for a checkpoint that is no
            converted model's, naming its model_type.
    """
    of_type: dict[str, Any] = {config.model_type: model for model, config in FAMILIES.values()}
    where = Path(folder) / "config.json"
    if not where.is_file():
        names = ("revision", "cache_dir", "local_files_only", "token", "subfolder")
        must = "a folder that save_pretrained wrote, or a name on the Hub"
        try:
            file = cached_file(folder, "config.json", **_some(options, names))
        except OSError as error:
            raise ValueError(
                f"folder must be {must}, got {str(folder)!r}, which neither this machine nor the "
                f"Hub has ({error})"
            ) from error
        if file is None:
            raise ValueError(f"folder must be {must}, got {str(folder)!r} without a config.json")
        where = Path(file)
    model_type = json.loads(where.read_text(encoding="utf-8")).get("model_type")
    check(
        model_type in of_type,
        "model_type",
        model_type,
        f"one of {sorted(of_type)} (load a dense model with transformers and convert it with "
        "convert_to_nsa)",
    )
    for option in ("tp_plan", "tp_size", "distributed_config", "quantization_config"):
        check(options.get(option) is None, option, options.get(option), "None")
    wants_info = options.pop("output_loading_info", False)
    options["output_loading_info"] = True
    model, info = of_type[model_type].from_pretrained(folder, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not info[kind], kind, sorted(info[kind]), "empty (saved weights must fit the model)")
    devices = sorted({str(x) for x in (getattr(model, "hf_device_map", None) or {}).values()})
    check(len(devices) < 2, "device_map", devices, "one device")
    model._use(group, layout, backend, told=group is not None)
    return (model, info) if wants_info else model


def _some(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}
