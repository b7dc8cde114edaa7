"""Native Sparse Attention for decoders of Hugging Face transformers.

    from nsa_dist.adapters.huggingface import convert_to_nsa, from_pretrained

    model = convert_to_nsa(LlamaForCausalLM.from_pretrained(...), NSAConfig(32, 8, 128))
    model.save_pretrained(folder)
    model = from_pretrained(folder)

``docs/adapters/huggingface.md`` explains training on split sequences, generation and limits.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "transformers must be installed (pip install nsa-dist[huggingface])"
    ) from error

from nsa_dist.adapters.huggingface.attention import NSAAttention
from nsa_dist.adapters.huggingface.auto import register
from nsa_dist.adapters.huggingface.cache import NSACacheLayer
from nsa_dist.adapters.huggingface.convert import convert_to_nsa, from_pretrained
from nsa_dist.adapters.huggingface.heads import register_heads
from nsa_dist.adapters.huggingface.models import (
    FAMILIES,
    NSALlamaConfig,
    NSALlamaForCausalLM,
    NSAQwen3Config,
    NSAQwen3ForCausalLM,
)

register(FAMILIES.values())
register_heads()

__all__ = [
    "FAMILIES",
    "NSAAttention",
    "NSACacheLayer",
    "NSALlamaConfig",
    "NSALlamaForCausalLM",
    "NSAQwen3Config",
    "NSAQwen3ForCausalLM",
    "convert_to_nsa",
    "from_pretrained",
]
