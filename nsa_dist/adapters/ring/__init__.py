"""Dense causal attention over the ranks and layouts of the NSA layers, by ring-flash-attn.

    from nsa_dist.adapters.ring import DenseBlock

    block = DenseBlock(256, config, mlp_hidden=512, layout="zigzag_per_document", group=group)

for hybrid models, and as the baseline in benchmarks. On one rank it is torch's own dense attention;
several ranks need ``pip install nsa-dist[ring]``. ``docs/adapters/ring.md`` lists layouts, dtypes
and hardware.
"""

from nsa_dist.adapters.ring.attention import DensePlan, dense_attention, get_dense_plan
from nsa_dist.adapters.ring.layer import DenseAttention, DenseBlock

__all__ = ["DenseAttention", "DenseBlock", "DensePlan", "dense_attention", "get_dense_plan"]
