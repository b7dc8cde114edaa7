"""A small GPT model under Megatron's own schedule, DDP and gradient finalisation, on any layout.

Functions here run on ranks (``tests.distributed.ranks``). float64 throughout, so that layouts agree
to rounding. Every rank makes the whole batch from a seed and keeps its part.
"""

from __future__ import annotations

import functools
import multiprocessing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_dist import NSAConfig, ShardedBatch, shard_batch
from tests.adapters.megatron import shim
from tests.distributed.layer_case import largest

VOCABULARY, HIDDEN, LAYERS, LENGTH, MICROBATCHES = 48, 32, 2, 64, 4
# Multiples of 2 CP for every layout here.
DOCUMENTS = (24, 8, 32)
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=4,
    num_selected=4,
    window=5,
)


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions; data parallelism is what is left of the ranks."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    sp: bool = False


@dataclass(frozen=True)
class Variant:
    """What the model computes."""

    nsa: NSAConfig = SMALL
    normalization: str = "RMSNorm"
    qk_layernorm: bool = False
    bias: bool = False
    layers: tuple[int, ...] | None = None
    mtp: int | None = None


VARIANTS = {
    "independent-mlp": Variant(qk_layernorm=True),
    "shared-per-head": Variant(
        replace(
            SMALL,
            independent_kv=False,
            compress="linear",
            compress_per_head=True,
            gate="static",
            gate_init=(0.5, -0.5, 0.0),
        ),
        normalization="LayerNorm",
        bias=True,
    ),
    "mlp-gate-conv1d": Variant(
        replace(SMALL, compress="conv1d", gate="mlp", branches=("selected", "window"))
    ),
}
SHORT = "long-blocks"
"""With ``SHORT_DOCUMENTS`` nothing is ever compressed."""
SHORT_DOCUMENTS = (8,) * 8
PREDICTS_MORE = "multi-token prediction"
ALL_VARIANTS = VARIANTS | {
    SHORT: Variant(replace(SMALL, compress_block=16, compress_stride=8, select_block=16)),
    PREDICTS_MORE: Variant(mtp=2),
}


@dataclass(frozen=True)
class Case:
    """One run.

    stream: whether a packed batch is split as one stream, and not by document.
    """

    variant: str = "independent-mlp"
    layout: Layout = Layout()
    packed: bool = False
    recompute: str = "none"
    steps: int = 0
    documents: tuple[int, ...] = DOCUMENTS
    stream: bool = False


@contextmanager
def megatron(layout: Layout) -> Iterator[None]:
    """Megatron's groups for ``layout`` over all ranks, and its random state."""
    warnings.simplefilter("ignore")  # Of what is not installed beside it.
    if dist.get_backend() == "gloo":
        shim.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,  # Those that are made are gloo's.
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron drops its groups; their threads would go on.
        for group in set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}:
            dist.destroy_process_group(group)


def transformer_config(variant: Variant, layout: Layout = Layout(), **options: Any) -> Any:
    """A TransformerConfig with the heads and widths of the variant."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **dict(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=variant.nsa.num_heads,
            num_query_groups=variant.nsa.num_kv_heads,
            kv_channels=variant.nsa.head_dim,
            ffn_hidden_size=40,
            gated_linear_unit=True,
            activation_func=F.silu,
            normalization=variant.normalization,
            qk_layernorm=variant.qk_layernorm,
            add_bias_linear=variant.bias,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            calculate_per_token_loss=True,
            mtp_num_layers=variant.mtp,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
            pipeline_dtype=torch.float64,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sp,
        )
        | options
    )


def build_model(config: Any, variant: Variant, engine: bool = False) -> nn.Module:
    """This rank's stage of the model, of TransformerEngine's modules with ``engine``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    from nsa_dist.adapters.megatron import (
        get_gpt_decoder_block_nsa_spec,
        get_gpt_mtp_block_nsa_spec,
    )

    # Its widths and dtype are no Triton kernel's, on GPUs either.
    block = get_gpt_decoder_block_nsa_spec(
        config,
        variant.nsa,
        layers=variant.layers,
        backend="pytorch",
        use_transformer_engine=engine,
    )
    mtp = None if variant.mtp is None else get_gpt_mtp_block_nsa_spec(config, block)
    model = GPTModel(
        config,
        block,
        mtp_block_spec=mtp,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        parallel_output=False,
        share_embeddings_and_output_weights=False,
    )
    if variant.mtp is not None:
        model.compute_language_model_loss = _token_losses  # Megatron's is float32.
    return model


def _token_losses(labels: Tensor, logits: Tensor) -> Tensor:
    """[b, s] and [s, b, vocabulary] to [b, s]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), reduction="none")
    return losses.view(logits.shape[:2]).T


def recompute_options(kind: str) -> dict[str, Any]:
    return {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[kind]


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Weights whose softmaxes have something to choose, all of them away from their start."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1 or "compressor" in name or "norm" in name or "logits" in name:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise * (2.0 if "qkv" in name else 1.0) / parameter.shape[-1] ** 0.5)


def whole_name(name: str) -> str:
    """The name in a model of one stage."""
    from megatron.core import parallel_state

    first, rest = 0, name
    if ".layers." in name:
        before, _, rest = name.partition(".layers.")
        number, _, rest = rest.partition(".")
        first = parallel_state.get_pipeline_model_parallel_rank() * (
            LAYERS // parallel_state.get_pipeline_model_parallel_world_size()
        )
        return f"{before}.layers.{int(number) + first}.{rest}"
    return rest


def own_part(name: str, whole: Tensor, parameter: Tensor) -> Tensor:
    """What this tensor parallel rank holds of a whole weight, by Megatron's own attributes."""
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if "linear_fc1" in name:  # The gate's rows and the values', each split.
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=parameter.partition_dim)[rank]


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(own_part(name, weights[whole_name(name)], parameter))


def microbatch(number: int, case: Case, group: Any) -> ShardedBatch:
    """This context parallel rank's part of one microbatch; its targets are unevenly spread."""
    generator = torch.Generator().manual_seed(number)
    length = sum(case.documents) if case.packed else LENGTH
    rows = 1 if case.packed else 2
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[:, 3 : 3 + 5 * number] = -100
    documents = None
    if case.packed:
        documents = torch.tensor([0, *case.documents]).cumsum(0).int()
    layout = "zigzag_per_document" if case.packed and not case.stream else "zigzag"
    return shard_batch(tokens, cu_seqlens=documents, labels=labels, layout=layout, group=group)


def forward_step(
    batches: Iterator[ShardedBatch], model: nn.Module
) -> tuple[Tensor, functools.partial[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    from nsa_dist.adapters.megatron import make_packed_seq_params

    batch = next(batches)
    packed = None
    if batch.cu_seqlens is not None:
        packed = make_packed_seq_params(batch.cu_seqlens, layout=batch.sharding.layout)
    given: Any = {"packed_seq_params": packed}
    config: Any = model.config
    if config.mtp_num_layers is None:
        logits = model(batch.tokens, batch.position_ids, None, **given)
        return logits, functools.partial(_loss, batch.labels)
    is_target = batch.labels != -100
    given |= {"labels": batch.labels.clamp(min=0), "loss_mask": is_target.double()}
    losses = model(batch.tokens, batch.position_ids, None, **given)
    return losses, functools.partial(_sum_of_losses, is_target)


def _sum_of_losses(is_target: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = (losses * is_target).sum()
    return loss, is_target.sum().int(), {"loss": loss.detach()}


def _loss(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    count = (labels != -100).sum().int()
    return loss, count, {"loss": loss.detach()}


class Run:
    """A model of this layout, wrapped, with the whole weights loaded into it.

    Args:
        weights: None to draw them.
        engine: of TransformerEngine's modules.
        options: of the TransformerConfig.
    """

    def __init__(
        self,
        case: Case,
        weights: dict[str, Tensor] | None,
        *,
        engine: bool = False,
        **options: Any,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.case = case
        variant = ALL_VARIANTS[case.variant]
        options = recompute_options(case.recompute) | options
        self.config = transformer_config(variant, case.layout, **options)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.model = build_model(self.config, variant, engine)
        if weights is None:
            draw_weights(self.model)
        else:
            load_weights(self.model, weights)
        # Overlap aborts where a parameter got no gradient.
        buckets = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=5000)
        self.ddp = DistributedDataParallel(self.config, buckets, self.model)
        self.config.no_sync_func = self.ddp.no_sync
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.cp_group = parallel_state.get_context_parallel_group()

    def step(self) -> Tensor:
        """Forward and backward of all microbatches; the loss summed over all ranks' tokens."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.zero_grad_buffer()
        numbers = range(self.dp_rank, MICROBATCHES, self.dp_size)
        batches = [microbatch(number, self.case, self.cp_group) for number in numbers]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=sum(self.case.documents) if self.case.packed else LENGTH,
            micro_batch_size=1 if self.case.packed else 2,
            forward_only=False,
        )
        total = torch.zeros((), dtype=torch.float64)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            total += sum(x["loss"] for x in losses)
        dist.all_reduce(total)
        return total

    def grads(self) -> dict[str, Tensor]:
        return {name: p.main_grad.clone() for name, p in self.model.named_parameters()}

    def train(self) -> None:
        """Steps of Megatron's Adam, the first on the gradients that are there."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        options = OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=0.0, params_dtype=torch.float64
        )
        adam = get_megatron_optimizer(options, [self.ddp], use_gloo_process_groups=False)
        for at in range(self.case.steps):
            if at:
                self.step()
            adam.step()


def run_whole(case: Case) -> tuple[float, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """On one rank: the loss, the weights, every gradient, and the weights after ``case.steps``."""
    with megatron(Layout()):
        run = Run(replace(case, layout=Layout(), recompute="none"), None)
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        loss = run.step()
        grads = run.grads()
        run.train()
        trained = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        return float(loss), weights, grads, trained


def run_split(
    case: Case, weights: dict[str, Tensor], grads: dict[str, Tensor], trained: dict[str, Tensor]
) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """On every rank: the loss, and the error, the largest element and that of the whole module for
    each parameter's gradient and, with ``case.steps``, for its weight after them."""
    with megatron(case.layout):
        run = Run(case, weights)
        loss = run.step()
        found = {name: (grad, grads) for name, grad in run.grads().items()}
        if case.steps:
            run.train()
            found |= {
                f"{name} trained": (p.detach(), trained) for name, p in run.model.named_parameters()
            }
        parameters = dict(run.model.named_parameters())
        errors = {}
        for label, (value, wholes) in found.items():
            name = label.removesuffix(" trained")
            whole = wholes[whole_name(name)]
            expected = own_part(name, whole, parameters[name])
            module = whole_name(name).rpartition(".")[0]
            of_module = max(largest(x) for n, x in wholes.items() if n.rpartition(".")[0] == module)
            errors[label] = (largest(value - expected), largest(whole), of_module)
        return float(loss), errors


def write_weights(model: Any, folder: str) -> None:
    """On every rank: write the model's weights as Megatron's distributed checkpoints are."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron writes from processes of its own, which a daemon such as a rank may not start.
    process = multiprocessing.current_process()
    process._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        dist_checkpointing.save(model.sharded_state_dict(), folder)
    finally:
        process._config["daemon"] = True  # type: ignore[attr-defined]
        filesystem_async._results_queue = None  # Ends the process that served it.


def save_checkpoint(case: Case, weights: dict[str, Tensor], folder: str) -> None:
    """On every rank: write a model of these weights."""
    with megatron(case.layout):
        write_weights(Run(case, weights).model, folder)


def load_checkpoint(case: Case, weights: dict[str, Tensor], folder: str) -> list[str]:
    """On every rank: read them into a model of other weights; names of those that differ then."""
    from megatron.core import dist_checkpointing

    with megatron(case.layout):
        run = Run(case, None)
        for parameter in run.model.parameters():
            parameter.data.fill_(float("nan"))
        state = dist_checkpointing.load(run.model.sharded_state_dict(), folder)
        run.model.load_state_dict(state)
        return [
            name
            for name, parameter in run.model.named_parameters()
            if not torch.equal(parameter, own_part(name, weights[whole_name(name)], parameter))
        ]
