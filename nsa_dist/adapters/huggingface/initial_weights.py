"""Initial weights of gates and compressors: of a conversion, and where a checkpoint lacks them.

transformers builds a model that it loads without memory, and asks ``_init_weights`` for what the
checkpoint does not have. Its own draws linear layers and leaves parameters that it does not know as
they are, which is whatever the memory held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.weights import whole
from nsa_dist.nn.compressor import BlockCompressor
from nsa_dist.nn.gates import LogitLinear, StaticGate
from nsa_dist.nn.norm import SetNorm


@torch.no_grad()
def start_from_dense(attention: NSAAttention) -> None:
    """Set gates to the constants ``gate_init``, and compressors to the mean of a block."""
    gate: Any = attention.gate
    compressors = [x for x in (attention.k_compressor, attention.v_compressor) if x is not None]
    with whole(x for module in (gate, *compressors) for x in module.parameters()):
        gate.start_as_constant()
        for compressor in compressors:
            compressor.start_as_mean()


@torch.no_grad()
def start_missing(module: nn.Module, beside: nn.Module) -> None:
    """Initialise a module of this attention unless transformers has loaded it; leave others alone.

    transformers calls this for modules with parameters of their own, not for those that hold them.

    Args:
        beside: a module of the dense model. Where it is loaded, gates and compressors start as in a
            conversion; in a model that is all new as their constructors set them.
    """
    ours: Any = module
    if not isinstance(module, (LogitLinear, StaticGate, BlockCompressor, SetNorm)):
        return
    if _is_loaded(module):
        return
    if isinstance(module, SetNorm) or not _is_loaded(beside):
        ours.reset_parameters()
    elif isinstance(module, BlockCompressor):
        ours.start_as_mean()
    else:
        ours.start_as_constant()


def _is_loaded(module: nn.Module) -> bool:
    return all(getattr(x, "_is_hf_initialized", False) for x in module.parameters())
