"""The core on ranks against the functional form on one: the same tensors, the same bits.

A tensor parallel rank is compared with the functional form of its own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nsa_dist import BlockCompressor, NSAConfig, native_sparse_attention, shard
from tests.adapters.megatron.small_gpt import Layout, Variant, megatron, transformer_config

TRITON = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    compress_block=4,
    compress_stride=2,
    select_block=16,
    num_selected=3,
    num_local_blocks=1,
    window=20,
)
DOCUMENTS = (56, 8, 32)  # Multiples of 2 CP.


def core_bits(layout: Layout, packed: bool, changes: dict[str, Any]) -> bool:
    """On every rank: whether its part of the output is that of the functional form."""
    with megatron(layout):
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.enums import AttnMaskType

        from nsa_dist.adapters.megatron import NSACoreAttention, make_packed_seq_params
        from nsa_dist.adapters.megatron.packed import for_layer
        from tests.ops.triton.guard import fixed_order_dot

        nsa = replace(TRITON, **changes)
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        config = transformer_config(Variant(nsa), layout, params_dtype=torch.float32)
        core = NSACoreAttention(
            config,
            1,
            AttnMaskType.causal,
            "self",
            nsa_config=nsa,
            backend="triton",
            pg_collection=groups,
        )
        torch.manual_seed(3)
        rows, length, dim = (1 if packed else 2), sum(DOCUMENTS), nsa.head_dim
        q = torch.randn(rows, length, nsa.num_heads, dim)
        k = torch.randn(nsa.num_key_sets, rows, length, nsa.num_kv_heads, dim)
        v = torch.randn(nsa.num_value_sets, rows, length, nsa.num_kv_heads, dim)
        logits = torch.randn(rows, length, nsa.num_heads, len(nsa.branches))
        bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int() if packed else None
        name = "zigzag_per_document" if packed else "zigzag"
        wholes = [BlockCompressor(nsa, dim) for _ in range(2)]
        size, rank = groups.tp.size(), groups.tp.rank()
        compressors = [core.k_compressor, core.v_compressor]
        for own, whole in zip(compressors, wholes, strict=True):
            if own is None:
                continue
            for part, parameter in zip(own.parameters(), whole.parameters(), strict=True):
                torch.nn.init.normal_(parameter, std=0.3)
                per_head = nsa.compress_per_head
                part.data.copy_(parameter.chunk(size)[rank] if per_head else parameter)
        q, logits = (x.chunk(size, dim=2)[rank] for x in (q, logits))
        k, v = (x.chunk(size, dim=3)[rank] for x in (k, v))

        def mine(x: torch.Tensor) -> torch.Tensor:
            """[b, s, ...] -> own tokens, [s, b, ...]."""
            x = shard(x, cu_seqlens=bounds, layout=name, group=groups.cp)
            return x.transpose(0, 1)

        def by_branch(x: torch.Tensor, branches: tuple[str, ...]) -> Any:
            return dict(zip(branches, x, strict=True)) if nsa.independent_kv else x[0]

        with fixed_order_dot(), torch.no_grad():
            expected = native_sparse_attention(
                q,
                by_branch(k, nsa.key_branches),
                by_branch(v, nsa.branches),
                torch.sigmoid(logits),
                *compressors,
                config=core.nsa_config,
                cu_seqlens=bounds,
                backend="triton",
            )
            assert isinstance(expected, torch.Tensor)
            groups_of_logits = logits.unflatten(2, (core.nsa_config.num_kv_heads, -1)).flatten(3)
            value = torch.cat([*map(mine, v), mine(groups_of_logits)], dim=-1)
            given = [mine(q), torch.cat([mine(x) for x in k], dim=2), value]
            if packed:
                given = [x.squeeze(1) for x in given]
            params = None
            if bounds is not None:
                params = for_layer(make_packed_seq_params(bounds), name, length, q.device)
            out = core(*given, None, packed_seq_params=params)
        expected = mine(expected).flatten(2)
        return torch.equal(out, expected.squeeze(1) if packed else expected)
