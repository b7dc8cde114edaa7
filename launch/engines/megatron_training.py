"""Training by Megatron-core: its schedule, DDP, optimizer and checkpoints around the same decoder.

The weights start as those of ``model.Decoder`` at the same seed, and the loss is the sum of all
targets' cross-entropies over their number: at any sizes a run follows that of FSDP2 up to rounding.
The optimizer is Megatron's distributed one, with float32 main weights.

Megatron keeps its groups and random state in the process: one engine lives at a time.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # A dozen warnings about packages that are not installed.
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import (
        OptimizerConfig,
        ParamKey,
        ParamWithNamePredicate,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nsa_dist.adapters.megatron import get_gpt_decoder_block_nsa_spec, make_packed_seq_params

from launch.engines.base import Step, count_targets, is_decayed, optimizer_tensors, spoil_gradients
from launch.engines.megatron_names import block_to_megatron, own_part, rest_to_megatron
from launch.model import Decoder, compute_dtype
from launch.processes.ranks import Ranks
from launch.settings import OptimizerSettings, Settings
from launch.storage.manifest import shared_failure
from nsa_dist import ShardedBatch
from nsa_dist.checkpoints.safe_load import check_dcp, weights_only
from nsa_dist.checks import check


def start_megatron(settings: Settings, ranks: Ranks) -> None:
    """Megatron's groups over all ranks, in the order of ``Ranks``, and its random state."""
    parallel = settings.parallel
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=settings.run.timeout / 60,
    )
    found = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    assert found == (ranks.tp_rank, ranks.cp_rank, ranks.dp_rank, ranks.pp_rank)
    model_parallel_cuda_manual_seed(settings.run.seed, force_reset_rng=True)


def transformer_config(settings: Settings, ranks: Ranks) -> TransformerConfig:
    """Megatron's description of the decoder and of its layout."""
    model, attention, parallel = settings.model, settings.attention, settings.parallel
    dtype = compute_dtype(settings, ranks.device)
    recompute: dict[str, Any] = {}
    if model.recompute and model.recompute_part == "attention":
        recompute = {"recompute_granularity": "selective"}
    elif model.recompute:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_kv_heads,
        kv_channels=attention.head_dim,
        ffn_hidden_size=model.mlp_hidden,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=ranks.device.type == "cpu",
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        # Packed streams are padded by document, to lengths of their own.
        variable_seq_lengths=parallel.pp > 1,
        moe_token_dispatcher_type="alltoall",  # No experts; the default excludes the above.
        **recompute,
    )


@torch.no_grad()
def draw_weights(
    model: GPTModel, decoder: Decoder, settings: Settings, ranks: Ranks
) -> dict[str, Tensor]:
    """Set the weights of this rank's part to those that ``decoder`` draws from the seed.

    Only one part's full weights exist at a time, as in ``model.build_model``.

    Args:
        decoder: on the meta device.

    Returns:
        What was set, before rounding to the model's dtype, by the model's names.
    """
    parts, seed = dict(decoder.parts()), settings.run.seed
    parameters = dict(model.named_parameters())
    own = {}

    def draw(part_name: str) -> dict[str, Tensor]:
        part = parts[part_name].to_empty(device=ranks.device)
        decoder.reset_part(part_name, part, seed)
        weights = {name: p.detach().clone() for name, p in part.named_parameters()}
        part.to("meta")
        return weights

    def keep(name: str, whole: Tensor) -> None:
        part = own_part(name, whole, parameters[name], ranks.tp_rank, ranks.tp)
        own[name] = part.contiguous()
        parameters[name].copy_(own[name])

    for at, layer in enumerate(model.decoder.layers):
        weights = draw(f"blocks.{layer.layer_number - 1}")
        for name, whole in block_to_megatron(weights, settings.attention).items():
            keep(f"decoder.layers.{at}.{name}", whole)
    for part_name in ("embedding", "norm", "head"):
        name = rest_to_megatron(part_name)
        if name in parameters:
            # The last stage has a copy of tied embeddings.
            source = part_name if part_name in parts else "embedding"
            keep(name, draw(source)["weight"])
    assert own.keys() == parameters.keys()
    return own


def make_optimizer(
    model: DistributedDataParallel, settings: OptimizerSettings, config: TransformerConfig
) -> Any:
    """Megatron's AdamW over ``model``, which decays what that of FSDP2 decays."""
    others = ParamWithNamePredicate(name="not a matrix", fn=lambda p, name: not is_decayed(name, p))
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.largest_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [model],
        config_overrides={ParamKey(with_name_predicate=others): ParamGroupOverride(wd_mult=0.0)},
        use_gloo_process_groups=False,
    )


class MegatronEngine:
    """``base.Engine`` by Megatron-core.

    Raises:
        ValueError: if tensor parallel ranks cannot share the vocabulary.
    """

    def __init__(self, settings: Settings, vocab_size: int, ranks: Ranks) -> None:
        must = f"a divisor of the vocabulary's {vocab_size} tokens"
        check(vocab_size % ranks.tp == 0, "parallel.tp", ranks.tp, must)
        start_megatron(settings, ranks)
        self.settings, self.ranks = settings, ranks
        config = self.config = transformer_config(settings, ranks)
        self.gpt = GPTModel(
            config,
            get_gpt_decoder_block_nsa_spec(
                config, settings.attention, backend=settings.model.backend
            ),
            vocab_size=vocab_size,
            max_sequence_length=settings.data.length * settings.data.micro_batch,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            rotary_base=settings.rotary.theta,
            share_embeddings_and_output_weights=settings.model.tie_embeddings,
        ).to(ranks.device)
        with torch.device("meta"):
            decoder = Decoder(settings, vocab_size).float()
        self.parameters = sum(p.numel() for p in decoder.parameters())
        weights = draw_weights(self.gpt, decoder, settings, ranks)

        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                use_distributed_optimizer=True,
            ),
            Float16Module(config, self.gpt) if config.bf16 else self.gpt,
        )
        # Over tp ranks they send messages.
        self.alone: Sequence[nn.Module] = [
            m for m in self.model.modules() if isinstance(m, MLP) and ranks.tp == 1
        ]
        self.sampler: nn.Module = WholeLogits(self.model, vocab_size, ranks)
        config.no_sync_func = self.model.no_sync
        config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = make_optimizer(self.model, settings.optimizer, config)
        # Main weights would otherwise start from the rounded ones.
        self.optimizer.reload_model_params(weights)
        self.updates = 0

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.settings.optimizer.weight_decay * group["wd_mult"]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_schedule(self.model, batches, _forward_loss, forward_only=False)
        grad_norm = self._update()
        targets = count_targets(batches, self.ranks)
        return Step(self._own_sum(losses), targets, torch.tensor(grad_norm))

    def _update(self) -> float:
        """Megatron's ``step`` in parts. The last part is left out if the norm is not finite.

        Returns:
            The global gradient norm, for which Megatron waits.
        """
        (optimizer,) = self.optimizer.chained_optimizers
        optimizer.prepare_grads()
        largest = self.settings.optimizer.largest_norm
        norm = optimizer.clip_grad_norm(largest) if largest else optimizer.get_grad_norm()
        if math.isfinite(norm):
            self.optimizer.step_with_ready_grads()
            self.updates += 1
        return float(norm)

    @torch.no_grad()
    def loss(self, batch: ShardedBatch) -> Tensor:
        self.model.eval()
        losses = run_schedule(self.model, [batch], _forward_loss, forward_only=True)
        self.model.train()
        return self._own_sum(losses)

    def _own_sum(self, losses: Sequence[Tensor]) -> Tensor:
        """This rank's share of the loss sum: of tp ranks with equal losses, the first counts."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.tp_rank == 0:
            for loss in losses:  # Empty on all stages except the last.
                total += loss
        return total

    def communication(self) -> dict[str, int]:
        received: dict[str, int] = {}
        for layer in self.gpt.decoder.layers:
            counter = layer.self_attention.core_attention.communication
            for kind, size in counter.received.items():
                received[kind] = received.get(kind, 0) + size
        return received

    def reset_communication(self) -> None:
        for layer in self.gpt.decoder.layers:
            layer.self_attention.core_attention.communication.reset()

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        """Weights and moments as Megatron's descriptions of shards, each parameter whole.

        Megatron's own optimizer state is not used. It also holds options, which this run sets, and
        without TransformerEngine it does not exist before a step.
        """
        model = self.gpt.sharded_state_dict(
            metadata={}
        )  # It writes into the dict that it is given.
        # Empty here: they belong to TransformerEngine's FP8.
        model = {k: v for k, v in model.items() if not k.endswith("_extra_state")}
        (optimizer,) = self.optimizer.chained_optimizers
        state = optimizer.sharded_param_state_fully_reshardable(
            model, is_loading=is_loading, metadata={}
        )
        return {"model": model, "optimizer": state}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.gpt.named_parameters()
        (optimizer,) = self.optimizer.chained_optimizers
        yield from optimizer_tensors(optimizer.optimizer)

    def _set_updates(self, optimizer: Any) -> None:
        """Let Megatron's optimizer count its updates as this engine does."""
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            for moments in optimizer.optimizer.state.values():
                moments["step"] = torch.tensor(float(self.updates))
        else:  # Of TransformerEngine or apex.
            for group in optimizer.param_groups:
                group["step"] = self.updates

    def write(self, path: Path, step: int) -> None:
        if not self.updates:  # All steps so far were skipped: no update has made the moments.
            (optimizer,) = self.optimizer.chained_optimizers
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            self._set_updates(optimizer)
        state = {**self._state(is_loading=False), "step": step, "updates": self.updates}
        with shared_failure():
            dist_checkpointing.save(state, str(path))

    def read(self, path: Path) -> int:
        """See ``base.Engine``. Any tp, cp, pp and dp may have written it. Before the first step.

        Raises:
            ValueError: if it holds more than data.
        """
        (optimizer,) = self.optimizer.chained_optimizers
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        # Megatron reads these by pickle, without a check.
        check_dcp(path, "common.pt")
        with weights_only():
            state = dist_checkpointing.load(self._state(is_loading=True), str(path))
        step = int(state["step"])
        missing, unexpected = self.gpt.load_state_dict(state["model"], strict=False)
        assert all(name.endswith("_extra_state") for name in missing), missing
        assert not unexpected, unexpected
        optimizer.load_parameter_state_from_fully_reshardable(state["optimizer"])
        # Checkpoints without this number are of runs that skipped no step.
        self.updates = int(state.get("updates", step))
        self._set_updates(optimizer)
        return step


class WholeLogits(nn.Module):
    """Local tokens to local logits over the whole vocabulary, on every rank."""

    def __init__(self, model: nn.Module, vocab_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.vocab_size, self.ranks = model, vocab_size, ranks

    @torch.no_grad()
    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        """[1, L] -> [1, L, vocabulary], float32."""
        packed = make_packed_seq_params(cu_seqlens)
        forward = functools.partial(_forward_logits, tokens, packed)
        found = run_schedule(self.model, [None], forward, forward_only=True)
        if self.ranks.pp == 1:
            return found[0]
        shape = (*tokens.shape, self.vocab_size)
        logits = found[0] if found else torch.empty(shape, device=tokens.device)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logits, last, group=parallel_state.get_pipeline_model_parallel_group())
        return logits


def run_schedule(
    model: nn.Module, batches: Sequence[Any], forward: Any, *, forward_only: bool
) -> list[Tensor]:
    """Run Megatron's schedule over micro-batches: forward, backward, reduced gradients.

    Returns:
        What ``forward``'s second value reports of each micro-batch; empty except on the last stage.
    """
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        # Not read: lengths differ, and stages send them to each other.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_loss(
    batches: Iterator[ShardedBatch], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    batch = next(batches)
    assert batch.cu_seqlens is not None
    packed: PackedSeqParams = make_packed_seq_params(batch.cu_seqlens)
    output = model(
        batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=packed
    )
    return output, functools.partial(_loss_sum, batch.labels)


def _loss_sum(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum to differentiate, its number of targets, and the sum to report.

    Args:
        losses: float32 [1, L], cross-entropy of each token.
    """
    is_target = labels != -100
    loss = losses.masked_fill(~is_target, 0).sum(dtype=torch.float64)
    return spoil_gradients(loss), is_target.sum().int(), loss.detach()


def _forward_logits(
    tokens: Tensor, packed: PackedSeqParams, _: Iterator[None], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    positions = torch.zeros_like(tokens)  # Not read: rotary follows from the documents.
    output = model(tokens, positions, None, packed_seq_params=packed, runtime_gather_output=True)

    def report(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits.sum(), torch.ones((), dtype=torch.int, device=logits.device), logits.float()

    return output, report
