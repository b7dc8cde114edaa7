"""Dense attention in Megatron's layers, for the comparison of ``megatron_lm.py``.

Megatron's own attention without TransformerEngine keeps a logit for each pair of tokens and takes
no context parallel ranks. This one runs on torch's fused kernels, over ranks as rings of them.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.package_info import MAJOR, MINOR
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nsa_dist.adapters.ring import dense_attention


class FusedDenseAttention(nn.Module):
    """Causal softmax attention of rows, in the place of Megatron's ``DotProductAttention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **__: Any,
    ) -> None:
        super().__init__()
        self.context = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[s, b, heads, width] of this rank's tokens, in zigzag order -> [s, b, heads width]."""
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = dense_attention(q, k, v, layout="zigzag", group=self.context)
        return out.flatten(2).transpose(0, 1).contiguous()


def dense_layer() -> ModuleSpec:
    """Megatron's layer with this attention and RMSNorm."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = FusedDenseAttention
    return spec


def dense_layer_of_stage(config: Any, vp_stage: int | None = None) -> ModuleSpec:
    """``dense_layer`` as releases from 0.19 on call it."""
    return dense_layer()


dense_spec: Any = dense_layer_of_stage if (MAJOR, MINOR) >= (0, 19) else dense_layer()
"""For ``--spec launch.bench.megatron_dense dense_spec``."""
