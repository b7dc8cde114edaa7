"""Conversion of a dense model to a sparse one that initially computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from nsa_dist.adapters.huggingface.checks import (
    check_attention,
    check_config,
    check_layers,
    check_model,
    check_modules,
)
from nsa_dist.adapters.huggingface.decoder import make_runtime
from nsa_dist.adapters.huggingface.heads import HEADS
from nsa_dist.adapters.huggingface.initial_weights import start_from_dense
from nsa_dist.adapters.huggingface.models import FAMILIES, make_attention, write_config
from nsa_dist.checks import check
from nsa_dist.comm.group import ContextGroup, GroupLike
from nsa_dist.config import NSAConfig

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

    The model, its decoder layers, norms, rotary embedding and tied heads stay the same objects with
    their dense weights. New gates start at the constants ``gate_init``, and new compressors at the
    mean of a block. While a document has at most min(window, num_selected * select_block) tokens,
    the selected and the window branch each equal dense attention; with gates of 0.5 the model
    computes the same as before.

    Args:
        model: a dense model of a class in ``families.DENSE``, or a classifier of sequences or
            tokens of these families, on one device.
        config: the attention; heads and widths must be the model's. Leave its ``gate_init`` at the
            default.
        layers: indices of the layers to convert, default all. The others stay dense.
        group: process group or one-dimensional DeviceMesh over which sequences are split, which
            needs a language model and all layers converted; None for one rank.
        layout: "contiguous", "zigzag" or "zigzag_per_document", as given to ``shard_batch``.
        backend: "auto" or a name that ``nsa_kernels.get_backend`` knows.
        gate_init: initial gate logits of (compressed, selected, window).

    Returns:
        ``model``, now of the class ``NSA...`` of its family, such as ``NSALlamaForCausalLM``, with
        a new config, such as ``NSALlamaConfig``. The old config object does not change.

    Raises:
        ValueError: if an argument has a value that is not allowed; the model is then unchanged.
    """
    families = {**FAMILIES, **HEADS}
    check_model(model, families)
    check_config(config, model.config, gate_init)
    chosen = check_layers(layers, model.config)
    check_modules(model, chosen)
    check_attention(config, backend, model.model.layers[chosen[0]].self_attn)
    num_layers, group_is_set = model.config.num_hidden_layers, group is not None
    runtime = make_runtime(group, layout, backend, chosen, num_layers, group_is_set=group_is_set)
    config = replace(config, gate_init=gate_init)

    # Do everything that can fail before the first change of the model.
    sparse, config_type = families[type(model)]
    dense_config = model.config
    new_config = write_config(dense_config, config_type, config, chosen)
    attention = make_attention(model, config, chosen)
    for module in attention.values():
        start_from_dense(module)

    model.__class__ = sparse
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = new_config
            if "name_or_path" in module.__dict__:  # By it PEFT names the base of an adapter.
                module.name_or_path = ""
    model._become_sparse(config, attention, runtime)
    return model


def from_pretrained(
    folder: Any,
    *,
    group: GroupLike | ContextGroup = None,
    layout: str = "zigzag",
    backend: str = "auto",
    **options: Any,
) -> Any:
    """Load a converted model that ``save_pretrained`` wrote.

    Args:
        folder: folder of the saved model, or a name on the Hub.
        group, layout, backend: as in ``convert_to_nsa``; checkpoints do not store them.
        options: for the ``from_pretrained`` of transformers, such as ``dtype`` and ``device_map``.

    Returns:
        A model, such as an ``NSALlamaForCausalLM``, in eval mode; with
        ``output_loading_info=True`` also transformers' loading info.

    Raises:
        ValueError: if the folder has no checkpoint, or the checkpoint of another kind of model.
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
    for option, must in (
        ("tp_plan", "None"),
        ("tp_size", "None"),
        ("distributed_config", "None"),
        ("quantization_config", "None (AutoModelForCausalLM.from_pretrained takes it)"),
    ):
        check(options.get(option) is None, option, options.get(option), must)
    wants_info = options.pop("output_loading_info", False)
    options["output_loading_info"] = True
    model, info = of_type[model_type].from_pretrained(folder, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not info[kind], kind, sorted(info[kind]), "empty (saved weights must fit the model)")
    devices = sorted({str(x) for x in (getattr(model, "hf_device_map", None) or {}).values()})
    check(len(devices) < 2, "device_map", devices, "one device")
    model._use(group, layout, backend, group_is_set=group is not None)
    return (model, info) if wants_info else model


def _some(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}
