"""Native Sparse Attention in Megatron-core, by a layer spec.

    from nsa_dist.adapters.megatron import get_gpt_layer_nsa_spec

    spec = get_gpt_layer_nsa_spec(nsa_config)     # instead of get_gpt_layer_local_spec()

For Megatron-LM's ``pretrain_gpt.py`` there are a model builder, its flags, and a spec by name:

    from nsa_dist.adapters.megatron import add_nsa_args, nsa_gpt_builder as gpt_builder

Tensor parallel ranks hold whole groups of heads. Context parallel ranks split the sequence in
Megatron's own order: of 2P chunks rank r holds r and 2P-1-r, in packed batches of each document.
``docs/adapters/megatron.md`` lists options, limits and the layout of weights.

Parameters of ``NSASelfAttention``, with h hidden size, d = kv_channels, H heads and G groups of R
heads; *split* means over tensor parallel ranks along the first dimension, by groups; *whole* means
equal on all:

| name | shape | |
|---|---|---|
| ``linear_qkv.weight``, ``.bias`` | [G (R + nk + nv) d, h] | split |
| ``linear_proj.weight``, ``.bias`` | [h, H d] | weight split along dimension 1, bias whole |
| ``q_layernorm.weight`` | [d] | whole |
| ``k_layernorm.weight`` | [d]; [nk, d] with independent K, V | whole |
| ``gate.proj.weight``, ``.bias`` (linear) | [H nb, h], rows (head, branch) | whole |
| ``gate.up.*``, ``gate.down.*`` (mlp) | [gate_hidden, h], [H nb, gate_hidden] | whole |
| ``gate.logits`` (static) | [H, nb] | whole |
| ``core_attention.k_compressor.*``, ``v_compressor.*`` | of ``BlockCompressor`` | whole; a leading
  [G] and split with ``compress_per_head`` |

Rows of ``linear_qkv``, group after group: the R query heads of the group, its nk keys in the order
of ``NSAConfig.key_branches``, its nv values in the order of ``NSAConfig.branches``, d rows each.
With shared K, V both nk and nv are 1, as in Megatron's own ``SelfAttention``: a dense checkpoint
loads, and only gates and compressors are new.
"""

from nsa_dist.adapters.megatron.arguments import add_nsa_args, nsa_config_from_args
from nsa_dist.adapters.megatron.attention import NSACoreAttention, NSASelfAttention
from nsa_dist.adapters.megatron.modules import Norm
from nsa_dist.adapters.megatron.packed import make_packed_seq_params
from nsa_dist.adapters.megatron.program import (
    nsa_config_overrides,
    nsa_gpt_builder,
    nsa_spec,
)
from nsa_dist.adapters.megatron.spec import (
    get_gpt_decoder_block_nsa_spec,
    get_gpt_layer_nsa_spec,
    get_gpt_mtp_block_nsa_spec,
)

__all__ = [
    "NSACoreAttention",
    "NSASelfAttention",
    "Norm",
    "add_nsa_args",
    "get_gpt_decoder_block_nsa_spec",
    "get_gpt_layer_nsa_spec",
    "get_gpt_mtp_block_nsa_spec",
    "make_packed_seq_params",
    "nsa_config_from_args",
    "nsa_config_overrides",
    "nsa_gpt_builder",
    "nsa_spec",
]
