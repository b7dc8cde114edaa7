"""Dense causal attention over the ranks and layouts of the NSA layers, by ring-flash-attn.

    from nsa_dist.adapters.ring import DenseBlock

    block = DenseBlock(256, config, mlp_hidden=512, layout="zigzag_per_document", group=group)

for hybrid models, and as what Native Sparse Attention is measured against. On one rank torch's own
dense attention runs and nothing else is needed; on several ``pip install nsa-dist[ring]``.
``docs/adapters/ring.md`` has the layouts, dtypes and what runs where.
"""

from nsa_dist.adapters.ring.attention import DensePlan, dense_attention, get_dense_plan
from nsa_dist.adapters.ring.layer import DenseAttention, DenseBlock

__all__ = ["DenseAttention", "DenseBlock", "DensePlan", "dense_attention", "get_dense_plan"]
