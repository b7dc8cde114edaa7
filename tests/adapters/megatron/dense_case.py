"""A dense model's checkpoint in a sparse model, as ``--load`` reads it.

Functions here run on ranks (``tests.distributed.ranks``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_dist import shard
from tests.adapters.megatron.program_case import arguments, build_by_program
from tests.adapters.megatron.small_gpt import (
    LENGTH,
    VOCABULARY,
    Layout,
    Variant,
    draw_weights,
    megatron,
    transformer_config,
    write_weights,
)

# As long as the window, and as all selected blocks together: both branches see every token.
TOKENS = 16
SHORT_FLAGS = (
    "--nsa-compress-block 4 --nsa-compress-stride 2 --nsa-select-block 4 --nsa-num-selected 4 "
    "--nsa-window 16 --nsa-shared-kv"
)


def _tokens() -> Tensor:
    return torch.arange(7, 7 + 2 * TOKENS).view(2, TOKENS) % VOCABULARY


def save_dense(folder: str) -> Tensor:
    """On one rank: write Megatron's own dense model; its logits."""
    with megatron(Layout()):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        config = transformer_config(Variant())
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        draw_weights(model)
        write_weights(model, folder)
        return model(_tokens(), _tokens(), None).detach()


def load_dense(layout: Layout, folder: str, flags: str, dense: Tensor) -> tuple[set[str], float]:
    """On every rank: what of a sparse model's weights the dense model does not have, and how far
    its logits are from the dense ones, relative to the largest."""
    with megatron(layout):
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing.validation import StrictHandling

        config = transformer_config(Variant(), layout)
        model = build_by_program(arguments(f"{SHORT_FLAGS} {flags}"), config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        state = dist_checkpointing.load(
            model.sharded_state_dict(), folder, strict=StrictHandling.LOG_ALL
        )
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        new = {name for name in missing if not name.endswith("_extra_state")}
        assert all(torch.equal(before[name], dict(model.named_parameters())[name]) for name in new)
        group = parallel_state.get_context_parallel_group()
        tokens, expected = (shard(x, group=group) for x in (_tokens(), dense))
        found = model(tokens, tokens, None, runtime_gather_output=True).detach()
        return new, float((found - expected).abs().max() / dense.abs().max())
