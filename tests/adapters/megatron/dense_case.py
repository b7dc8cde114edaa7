"""Dense models and sparse ones that compute the same: by ``--load``, by option of Megatron.

Functions here run on ranks (``tests.distributed.ranks``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nsa_dist import shard, shard_batch
from tests.adapters.megatron.program_case import arguments, build_by_program
from tests.adapters.megatron.small_gpt import (
    DOCUMENTS,
    LENGTH,
    SMALL,
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


@dataclass(frozen=True)
class Option:
    """Options of Megatron that change what attention computes, and that layers leave to it.

    config, model: of the TransformerConfig, and of GPTModel.
    later: of the TransformerConfig, for classes of configs that this release has elsewhere.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)


OPTIONS = {
    "plain": Option(),
    "rotary_interleaved": Option({"rotary_interleaved": True}),
    "rotary_percent": Option(model={"rotary_percent": 0.5}),
    "seq_len_interpolation_factor": Option(model={"seq_len_interpolation_factor": 2.0}),
    "rope_scaling": Option(model={"rope_scaling": True, "rope_scaling_factor": 4.0}),
    "yarn": Option(
        model={"position_embedding_type": "yarn"},
        later={
            "yarn_rotary_scaling_factor": 4.0,
            "yarn_original_max_position_embeddings": 16,
            "yarn_beta_fast": 32.0,
            "yarn_beta_slow": 1.0,
            "yarn_mscale": 1.0,
            "yarn_mscale_all_dim": 0.0,
            "yarn_correction_range_round_to_int": True,
        },
    ),
    "no rotary": Option(model={"position_embedding_type": "none"}),
    "learned_absolute": Option(model={"position_embedding_type": "learned_absolute"}),
    "no_rope_freq": Option({"no_rope_freq": [0, 1]}),
    "softmax_scale": Option({"softmax_scale": 0.7}),
    "qk_layernorm": Option({"qk_layernorm": True, "layernorm_epsilon": 0.1}),
    "qk_l2_norm": Option({"qk_l2_norm": True}),
    "add_qkv_bias": Option({"add_qkv_bias": True}),
}


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


def _of_option(
    option: Option, layout: Layout, *, dense: bool = False, length: int = LENGTH
) -> torch.nn.Module:
    """A model of dense layers, or one whose layers are dense attention up to ``length`` tokens."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from nsa_dist.adapters.megatron import get_gpt_decoder_block_nsa_spec

    config = transformer_config(Variant(), layout, **option.config)
    for name, value in option.later.items():
        setattr(config, name, value)
    nsa = replace(
        SMALL,
        independent_kv=False,
        branches=("selected", "window"),
        window=length,
        num_selected=length // SMALL.select_block,
        scale=config.softmax_scale,
    )
    block = get_gpt_decoder_block_nsa_spec(
        config,
        nsa,
        layers=(0, 0) if dense else None,
        backend="pytorch",
        qk_l2_norm=config.qk_l2_norm,
    )
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH}
    given = {"position_embedding_type": "rope", "parallel_output": False} | option.model
    model = GPTModel(config, block, **sizes, **given, share_embeddings_and_output_weights=False)
    draw_weights(model)
    for name, parameter in model.named_parameters():
        if ".gate." in name:  # Half of each branch.
            torch.nn.init.zeros_(parameter)
    return model


def from_dense_by_option() -> dict[str, tuple[Tensor, float, float]]:
    """On one rank, by option: dense logits, and how far those of a model that sees every token are
    from them, and the gradients of its embeddings, relative to the largest."""
    found = {}
    hidden = torch.ones(TOKENS, TOKENS).tril()[None, None] < 0.5
    positions = torch.arange(TOKENS).expand(2, TOKENS)
    with megatron(Layout()):
        for name, option in OPTIONS.items():
            sparse: Any = _of_option(option, Layout(), length=TOKENS)
            dense: Any = _of_option(option, Layout(), dense=True)
            missing, _ = dense.load_state_dict(sparse.state_dict(), strict=False)
            assert all(key.endswith("_extra_state") for key in missing), missing
            results = []
            for model, mask in ((dense, hidden), (sparse, None)):
                logits = model(_tokens(), positions, mask)
                logits.square().sum().backward()
                results.append((logits.detach(), model.embedding.word_embeddings.weight.grad))
            errors = (
                float((x - y).abs().max() / x.abs().max()) for x, y in zip(*results, strict=True)
            )
            found[name] = (results[0][0], *errors)
    return found


POSITIONS = ("rotary_interleaved", "yarn", "learned_absolute", "no_rope_freq")
"""Options that need the right positions of packed documents."""


def documents_by_option(layout: Layout, split: str) -> dict[str, float]:
    """On every rank, by option: how far the logits of a packed batch that is split in this way are
    from those of its documents alone, relative to the largest."""
    from nsa_dist.adapters.megatron import make_packed_seq_params

    tokens = torch.arange(5, 5 + LENGTH)[None] * 7 % VOCABULARY
    bounds = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0).int()
    found: dict[str, Any] = {}
    with megatron(layout):
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        batch = shard_batch(tokens, cu_seqlens=bounds, layout=split, group=group)
        packed = make_packed_seq_params(batch.cu_seqlens, layout=split)
        rows = shard_batch(torch.arange(LENGTH)[None], cu_seqlens=bounds, layout=split, group=group)
        for name in POSITIONS:
            model = _of_option(OPTIONS[name], layout)
            found[name] = model(batch.tokens, batch.position_ids, None, packed_seq_params=packed)
    with megatron(Layout()):
        for name in POSITIONS:
            model = _of_option(OPTIONS[name], Layout())
            alone = [
                model(part, torch.arange(part.shape[1])[None], None)
                for part in tokens.split(DOCUMENTS, dim=1)
            ]
            expected = torch.cat(alone, dim=1)[:, rows.tokens[0]]
            found[name] = float((found[name] - expected).abs().max() / expected.abs().max())
    return found
