"""A Llama-like decoder whose attention is NSA, dense or both, and its sharding over ranks.

Dimension letters: B rows, L local tokens, T tokens, H query heads, G KV heads, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from launch.first_weights import read_part
from launch.losses import IGNORED, sum_by_liger, sum_in_pieces
from launch.processes.ranks import Ranks
from launch.seeds import mix_seed
from launch.settings import FETCH_AGAIN, STAGES, Settings
from nsa_dist import NativeSparseAttention, NSABlock, distill_dense
from nsa_dist.adapters.ring import DenseAttention, DenseBlock
from nsa_dist.nn.mlp import SwiGLU


class Decoder(nn.Module):
    """Token embedding, blocks, a last norm, and the map to logits.

    Args:
        settings: ``model``, ``attention``, ``rotary``, options of ``parallel``,
            ``optimizer.train_only``, ``optimizer.distill_dense`` and ``run.start_from`` are read.
        vocab_size: number of tokens.
        group: ranks that share the sequence, or None.
    """

    def __init__(
        self, settings: Settings, vocab_size: int, *, group: DeviceMesh | None = None
    ) -> None:
        super().__init__()
        model = settings.model
        self.start_from = settings.run.start_from
        self.loss_sum = sum_by_liger if model.loss == "liger" else sum_in_pieces
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        dense = DenseBlock
        parallel = settings.parallel
        sparse = functools.partial(
            NSABlock,
            backend=model.backend,
            fetch_again=FETCH_AGAIN[parallel.fetch_again],
            recompute_branches=parallel.recompute_branches,
            fetch=parallel.fetch,
            ranks_per_node=(parallel.ranks_per_node or None) if group is not None else None,
            exact_gradients=parallel.exact_gradients,
        )
        blocks: list[Callable[..., nn.Module]] = [
            dense if model.is_dense(layer) else sparse for layer in range(model.layers)
        ]
        self.blocks = nn.ModuleList(
            block(
                model.hidden_size,
                settings.attention,
                mlp_hidden=model.mlp_hidden,
                norm_eps=model.norm_eps,
                bias=model.bias,
                qk_norm=model.qk_norm,
                rotary=settings.rotary,
                dropout=model.dropout,
                layout=parallel.layout,
                group=group,
            )
            for block in blocks
        )
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.head = None
        if not model.tie_embeddings:
            self.head = nn.Linear(model.hidden_size, vocab_size, bias=False)
        trained = [part for each in settings.optimizer.train_only for part in STAGES[each]]
        if trained:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(any(part in name for part in trained))
        self.distills = settings.optimizer.distill_dense

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of local tokens, or the sum of their losses.

        Args:
            tokens: int64 [B, L], this rank's shard.
            cu_seqlens: int32 on the CPU, document boundaries of the whole stream.
            labels: int64 [B, L], each token's target; -100: none.

        Returns:
            [B, L, vocabulary] in the computation's dtype; with ``labels`` the sum of the targets'
            cross-entropies, float64 scalar, nats. In training with ``optimizer.distill_dense`` it
            is the number of targets times the mean of the sparse layers' distances from dense
            attention (``nsa_dist.DenseDistillation.loss``).
        """
        if self.distills and self.training and labels is not None:
            return self._distil(tokens, cu_seqlens, (labels != IGNORED).sum())
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cu_seqlens=cu_seqlens)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if labels is None:
            return F.linear(x, weight)
        return self.loss_sum(x.flatten(0, 1), weight, labels.flatten())

    def _distil(self, tokens: Tensor, cu_seqlens: Tensor | None, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        # Of the blocks, which FSDP2 shards by themselves, and not of the model, which is running.
        with distill_dense(self.blocks) as distilled:
            for block in self.blocks:
                x = block(x, cu_seqlens=cu_seqlens)
        return distilled.loss.double() * targets

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise every part from the seed; each part's draws depend on no other part."""
        for name, part in self.parts():
            self.reset_part(name, part, seed)

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The parts that are materialised, initialised and sharded one at a time, by name."""
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        rest = [("embedding", self.embedding), ("norm", self.norm), ("head", self.head)]
        return blocks + [(name, part) for name, part in rest if part is not None]

    @torch.no_grad()
    def reset_part(self, name: str, part: nn.Module, seed: int) -> None:
        """Initialise one of ``parts()`` in place, leaving the random state as it was: from the
        seed, or with the weights of the checkpoint ``run.start_from``.

        Raises:
            ValueError: if that cannot be read.
        """
        if self.start_from:
            read_part(part, name, Path(self.start_from))
            return
        device = next(part.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix_seed(seed, "weights", name))
            part.reset_parameters()  # type: ignore[operator]
            if part is self.embedding or part is self.head:
                nn.init.normal_(part.weight, std=0.02)

    def mlps(self) -> list[nn.Module]:
        """The MLP of each block."""
        return [block.mlp for block in self.blocks]  # type: ignore[misc]

    def communication(self) -> dict[str, int]:
        """Bytes this rank has received since the last reset, by kind, over all layers."""
        received: dict[str, int] = {}
        for layer in self._attention_layers():
            for kind, size in layer.communication.received.items():
                received[kind] = received.get(kind, 0) + size
        return received

    def reset_communication(self) -> None:
        """Set the counts to zero."""
        for layer in self._attention_layers():
            layer.communication.reset()

    def _attention_layers(self) -> Iterator[NativeSparseAttention | DenseAttention]:
        kinds = (NativeSparseAttention, DenseAttention)
        return (m for m in self.modules() if isinstance(m, kinds))


def build_model(settings: Settings, vocab_size: int, ranks: Ranks) -> Decoder:
    """The decoder of this run, its weights drawn from the seed and sharded over all ranks.

    Only one block's full weights exist at a time: the model is built on the meta device, then each
    part is materialised whole on every rank, initialised, and cut. So the weights depend on neither
    dp nor cp. With ``run.start_from`` they are those of that checkpoint.
    """
    dtype = compute_dtype(settings, ranks.device)
    mixed = dtype == torch.bfloat16
    with torch.device("meta"):
        model = Decoder(settings, vocab_size, group=ranks.cp_mesh)
        model = model.to(torch.float32 if mixed else dtype)
    policy = MixedPrecisionPolicy()
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard = functools.partial(fully_shard, mesh=ranks.flat_mesh, mp_policy=policy)
    for name, part in model.parts():
        part.to_empty(device=ranks.device)
        model.reset_part(name, part, settings.run.seed)
        compile_parts(part, settings.model.compile)
        if name.startswith("blocks."):
            if settings.model.recompute:
                # Inside FSDP's hooks: a recomputed forward finds the weights gathered.
                again: Any = part.mlp if settings.model.recompute_part == "mlp" else part
                again.forward = functools.partial(checkpoint, again.forward, use_reentrant=False)
            shard(part, reshard_after_forward=settings.parallel.reshard_after_forward)
    shard(model)
    gather_ahead(list(model.blocks), settings.parallel.gather_ahead)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each rank's loss is its own sum over the global number of targets, so gradients add.
            # Forced, as gloo has no premultiplied sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def compile_parts(part: nn.Module, names: Sequence[str]) -> None:
    """Compile parts of a block, or a norm, in place (``model.compile``); at their first call.

    What is around the attention's call stays as it is: plans and messages are the host's.
    """
    kinds: dict[str, type[nn.Module]] = {"norms": nn.RMSNorm, "mlp": SwiGLU}
    compiled = tuple(kind for name, kind in kinds.items() if name in names)
    for module in part.modules():
        if isinstance(module, compiled):
            # Not the module itself: its hooks stay outside.
            module.forward = torch.compile(module.forward)
        if "projections" in names and isinstance(module, NativeSparseAttention | DenseAttention):
            module.compile_projections()


def gather_ahead(blocks: Sequence[nn.Module], count: int) -> None:
    """Have FSDP2 gather the weights of ``count`` blocks while those before them compute.

    By itself it gathers a block's weights when the host comes to it. Forward the host waits for the
    device in every attention over ranks, and would come too late.
    """
    if count:
        for at, block in enumerate(blocks):
            assert isinstance(block, FSDPModule)
            block.set_modules_to_forward_prefetch(_sharded(blocks[at + 1 : at + 1 + count]))
            block.set_modules_to_backward_prefetch(_sharded(blocks[max(at - count, 0) : at][::-1]))


def _sharded(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    return [block for block in blocks if isinstance(block, FSDPModule)]


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype of forward; with bfloat16, weights and reductions stay float32."""
    name = settings.run.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[name]
