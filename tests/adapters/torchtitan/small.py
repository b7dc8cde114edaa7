"""A small Llama of torchtitan's, packed rows that need no files, and config functions for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.trainer import Trainer

from nsa_dist.adapters.torchtitan import use_nsa

VOCABULARY = 64
OPTIONS: dict[str, Any] = {
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 8,
    "num_selected": 3,
    "num_local_blocks": 1,
    "window": 16,
    "gate_init": (0.5, 0.0, -0.5),
}


class NoTokenizer(BaseTokenizer):
    """Rows are made of ids."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return VOCABULARY


class PackedRows(BaseDataLoader):
    """Rows of packed documents, or of one, by number: the same rows whoever reads them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        packed: bool = True
        infinite: bool = True  # torchtitan's validator sets it.

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self.packed, self.length, self.rows = config.packed, seq_len, local_batch_size
        self.ranks, self.rank, self.batches = dp_world_size, dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            first = (self.batches * self.ranks + self.rank) * self.rows
            self.batches += 1
            made = [self._row(first + row) for row in range(self.rows)]
            tokens, labels, positions = (torch.stack(x) for x in zip(*made, strict=True))
            yield {"input": tokens, "positions": positions}, labels

    def _row(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(number)
        steps = torch.randint(1, 4, (self.length + 1,), generator=draw)
        ids = steps.cumsum(0) % VOCABULARY
        positions = torch.arange(self.length)
        if self.packed:
            cuts = torch.randperm(self.length - 1, generator=draw)[:3].sort().values + 1
            starts = torch.zeros(self.length, dtype=torch.int64)
            starts[cuts] = cuts
            positions = positions - starts.cummax(0).values
        return ids[:-1], ids[1:], positions

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def dense() -> Trainer.Config:
    """Four layers of width 64, four heads in two groups; rows of 128 tokens, four a step."""
    config = llama3.llama3_debugmodel()
    model = config.model_spec.model
    model.dim, model.vocab_size = 64, VOCABULARY
    model.tok_embeddings.num_embeddings, model.tok_embeddings.embedding_dim = VOCABULARY, 64
    model.norm.normalized_shape = 64
    model.lm_head.in_features, model.lm_head.out_features = 64, VOCABULARY
    model.layers = model.layers[:4]
    for layer in model.layers:
        given, mlp = layer.attention, layer.feed_forward
        rope = given.rope
        rope.dim = 16
        layer.attention = make_gqa_config(
            dim=64,
            n_heads=4,
            n_kv_heads=2,
            wqkv_param_init=llama3_linear_init(),
            wo_param_init=given.wo.param_init,
            inner_attention=given.inner_attention,
            rope=rope,
        )
        layer.feed_forward = make_ffn_config(
            dim=64,
            hidden_dim=96,
            w1_param_init=mlp.w1.param_init,
            w2w3_param_init=mlp.w2.param_init,
        )
        layer.attention_norm.normalized_shape = layer.ffn_norm.normalized_shape = 64
    config.loss.loss_fn.global_vocab_size = VOCABULARY
    config.tokenizer, config.dataloader = NoTokenizer.Config(), PackedRows.Config()
    config.training.local_batch_size, config.training.global_batch_size = 4, 4
    config.training.seq_len, config.training.steps = 128, 20
    config.training.mixed_precision_param = "float32"
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    config.activation_checkpoint = None
    config.validator.enable = False
    config.lr_scheduler.warmup_steps = 0
    config.optimizer = default_adamw(lr=4e-3)
    return config


def llama3_linear_init() -> dict[str, Any]:
    """Initial values of torchtitan's projections."""
    return {"weight": lambda x: torch.nn.init.trunc_normal_(x, std=0.02)}


def sparse() -> Trainer.Config:
    """Separate K, V for each branch."""
    return use_nsa(dense(), **OPTIONS)


def validated() -> Trainer.Config:
    """As ``sparse``, with a validation of two batches after every second step."""
    config = sparse()
    config.validator.enable, config.validator.freq, config.validator.steps = True, 2, 2
    config.validator.dataloader = PackedRows.Config()
    return config


def shared() -> Trainer.Config:
    """One K, V for all branches, and the model's own projection."""
    return use_nsa(dense(), independent_kv=False, compress_per_head=True, **OPTIONS)
