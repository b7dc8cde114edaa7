"""Native Sparse Attention in torchtitan, by a function of the user's config or by an override.

    from nsa_dist.adapters.torchtitan import use_nsa

    def llama3_8b_nsa():
        return use_nsa(llama3_8b(), window=512)

    torchrun ... -m torchtitan.train --module nsa_dist.adapters.torchtitan --config llama3_8b_nsa
    torchrun ... -m torchtitan.train --module llama3 --config llama3_8b \\
        --override.imports 'nsa_dist.adapters.torchtitan.nsa={"window": 512}'

Context parallel ranks split rows as torchtitan does (``headtail`` is the layout ``zigzag``), tensor
parallel ranks hold whole groups of heads. ``docs/adapters/torchtitan.md`` lists options, limits and
the layout of weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

try:
    import torchtitan  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torchtitan must be installed (pip install nsa-dist[torchtitan])"
    ) from error

from torchtitan.config import override
from torchtitan.models.common.attention import GQAttention
from torchtitan.tools.logging import logger

from nsa_dist.adapters.torchtitan.attention import NSAttention, nsa_attention_config
from nsa_dist.adapters.torchtitan.checks import layout_of
from nsa_dist.adapters.torchtitan.convert import use_nsa

__all__ = ["NSAttention", "nsa", "use_nsa"]


# torchtitan finds an override by the module that defines it, and that is the name users type.
@override(target=GQAttention.Config, description="Native Sparse Attention")
def nsa(
    attention: GQAttention.Config, *, load_balancer: str | None = "headtail", **options: Any
) -> NSAttention.Config:
    """The override of ``--override.imports 'nsa_dist.adapters.torchtitan.nsa={"window": 512}'``.

    An override sees the attention alone and not the run's other options: ``use_nsa`` sees them all.

    Args:
        load_balancer: ``--parallelism.context_parallel_load_balancer``, if it is not its default.
        options: of ``NSAConfig``, except heads and widths, which are the model's.

    Raises:
        ValueError: if an option has a value that is not allowed.
    """
    found = nsa_attention_config(attention, options, layout_of(load_balancer))
    _warn_of_folders()
    return found


@cache  # Once, and not for each layer.
def _warn_of_folders() -> None:
    logger.warning(
        "With this override torchtitan reads and writes Hugging Face folders without the gates and "
        "compressors of Native Sparse Attention; use_nsa in a config function keeps them"
    )
