"""Small random models of both families, dense and converted; nothing is downloaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRANSFORMERS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa_dist import NSAConfig, ShardedBatch, shard_batch
from nsa_dist.adapters.huggingface import convert_to_nsa

VOCABULARY = 97
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    window=16,
    independent_kv=False,
)
INDEPENDENT = replace(SMALL, independent_kv=True)
# What Triton's kernels take at least.
ON_GPU: dict[str, Any] = {"compress_block": 8, "compress_stride": 4, "select_block": 16}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def cast(model: Any, dtype: torch.dtype) -> Any:
    """As from_pretrained(dtype=...): parameters alone, not the float32 frequencies of rotary."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def dense_model(
    family: str,
    *,
    rope: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random model in eval mode."""
    model_type, config_type = FAMILIES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": SMALL.num_heads,
        "num_key_value_heads": SMALL.num_kv_heads,
        "head_dim": SMALL.head_dim,
        "max_position_embeddings": 256,
        "rope_parameters": copy.deepcopy(ROPES[rope]),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return randomised(cast(model_type(config_type(**(values | options))).eval(), dtype))


def randomised(model: Any) -> Any:
    """The model with weights so large that logits and choices are not all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            elif "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def sparse_model(
    family: str,
    config: NSAConfig = SMALL,
    *,
    layers: Any = None,
    group: Any = None,
    layout: str = "zigzag",
    trained: bool = True,
    **options: Any,
) -> Any:
    """A converted model; with ``trained`` its new weights are as if training had moved them."""
    options = {"num_key_value_heads": config.num_kv_heads, **options}
    model = convert_to_nsa(dense_model(family, **options), config, layers, group, layout=layout)
    if trained:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name and "self_attn" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(0.5 * noise)
                elif "compressor" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter), alpha=0.2)
    return model


def some_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """[batch, length], without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, T] of rows [T_b], padded on the left with token 0."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat((x.new_zeros(longest - len(x)), x)) for x in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(x) for x in rows]).long()
    return tokens, mask


DOCUMENTS = (37, 5, 61, 1, 24)


def loss_of(model: nn.Module, batch: ShardedBatch) -> Tensor:
    """This rank's share of a split batch's loss."""
    found: Tensor = model(
        batch.tokens,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        labels=batch.labels,
        shift_labels=batch.labels,
        num_items_in_batch=batch.num_targets,
    ).loss
    return found


def gradients(
    family: str,
    config: NSAConfig,
    layout: str,
    dtype: torch.dtype,
    packed: bool,
    split: bool,
    recompute: bool = False,
    sharded: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient of one batch, over all ranks if ``split``; ``sharded`` by FSDP2."""
    group = dist.group.WORLD if split else None
    model = sparse_model(family, config, group=group, layout=layout, dtype=dtype).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
            # gloo has no scaled sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int() if packed else None
    tokens = some_tokens(1, sum(DOCUMENTS)) if packed else some_tokens(2, 75)
    batch = shard_batch(tokens, cu_seqlens=bounds, layout=layout, group=group)
    loss = loss_of(model, batch)
    loss.backward()
    grads = {}
    total = loss.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    if split:
        for whole in [*([] if sharded else grads.values()), total]:
            dist.all_reduce(whole)
    return float(total), grads


def gradients_on_rank(*args: Any, **kwargs: Any) -> tuple[float, dict[str, Tensor]] | None:
    """As ``gradients``; on rank 0 alone, to spare the pipes."""
    result = gradients(*args, **kwargs)
    return result if dist.get_rank() == 0 else None


def read_by(batch: str) -> dict[str, Tensor]:
    """A batch as a collator makes it, of whole rows: input_ids, labels and what marks documents."""
    if batch == "packed":
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        tokens = some_tokens(1, sum(DOCUMENTS))
        labels = torch.where(positions == 0, -100, tokens)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}
    tokens = some_tokens(2, 64)
    if batch == "rows":
        return {"input_ids": tokens, "labels": tokens}
    # TRL pads positions with zeros.
    is_token = torch.arange(64) < torch.tensor([[64], [27]])
    return {
        "input_ids": torch.where(is_token, tokens, 0),
        "labels": torch.where(is_token, tokens, -100),
        "position_ids": torch.where(is_token, torch.arange(64), 0),
        "attention_mask": is_token.long(),
    }


def batch_gradients(
    family: str, config: NSAConfig, batch: str, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient of a batch of ``read_by``, on one rank."""
    model = sparse_model(family, config, dtype=dtype).train()
    loss = model(**read_by(batch)).loss
    loss.backward()
    return float(loss.detach()), {name: x.grad for name, x in model.named_parameters()}


def context_parallel_gradients(
    family: str, config: NSAConfig, batch: str, dtype: torch.dtype, balanced: bool, counted: bool
) -> tuple[float, dict[str, Tensor]] | None:
    """As ``batch_gradients``, of a batch that torch's context_parallel splits; on rank 0.

    The sum over ranks where targets are ``counted`` by the caller, else the mean.
    """
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    model = sparse_model(family, config, dtype=dtype).train()
    inputs = read_by(batch)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    inputs["shift_labels"] = shifted.clone()
    buffers = list(inputs.values())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    before, _cp_options.enable_load_balance = _cp_options.enable_load_balance, balanced
    try:
        with context_parallel(
            mesh,
            buffers=buffers,
            buffer_seq_dims=[1] * len(buffers),
            no_restore_buffers=set(buffers),
        ):
            targets = (shifted != -100).sum() if counted else None
            loss = model(**inputs, num_items_in_batch=targets).loss
            loss.backward()
    finally:
        _cp_options.enable_load_balance = before
    total, grads = loss.detach(), {name: x.grad for name, x in model.named_parameters()}
    for whole in (*grads.values(), total):
        dist.all_reduce(whole)
        whole /= 1 if counted else dist.get_world_size()
    return (float(total), grads) if dist.get_rank() == 0 else None


def refusals_on_rank() -> dict[str, str]:
    """Errors of bad calls over two ranks, by the option that they name."""
    group, rank = dist.group.WORLD, dist.get_rank()
    model = sparse_model("llama", group=group)
    batch = shard_batch(some_tokens(1, 64), group=group)
    ones = torch.ones_like(batch.tokens)
    hole = torch.where(torch.arange(32) == 3, 0, ones)
    positions = batch.position_ids
    anew = positions % 7
    documents = torch.tensor([0, 16, 64], dtype=torch.int32)
    calls: dict[str, dict[str, Any]] = {
        "attention_mask, with a hole": {"attention_mask": hole},
        "attention_mask, on one rank only": {"attention_mask": ones if rank else None},
        "attention_mask, of the whole": {"attention_mask": ones.repeat(1, 2)},
        "attention_mask, with documents": {"attention_mask": hole, "cu_seqlens": documents},
        "use_cache": {"use_cache": True},
        "past_key_values": {"past_key_values": DynamicCache()},
        "position_ids, of contiguous shards": {"position_ids": torch.arange(32)[None] + 32 * rank},
        "position_ids, wrong on rank 1": {"position_ids": positions + rank},
        "position_ids, on one rank only": {"position_ids": None if rank else positions},
        "position_ids, of documents in two rows": {
            "input_ids": batch.tokens.repeat(2, 1),
            "position_ids": anew.repeat(2, 1),
        },
        "shift_labels": {"labels": batch.labels, "num_items_in_batch": batch.num_targets},
        "num_items_in_batch": {"labels": batch.labels, "shift_labels": batch.labels},
        "cu_seqlens, of the shard": {"cu_seqlens": torch.tensor([0, 32], dtype=torch.int32)},
        "cu_seqlens, on one rank only": {"cu_seqlens": documents if rank else None},
    }
    found = {}

    def refusal(call: Callable[[], Any]) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    for name, options in calls.items():
        options = {"input_ids": batch.tokens, **options}
        found[name] = refusal(lambda options=options: model(**options))
    model(batch.tokens)  # And the next good call works.
    per_document = sparse_model("llama", group=group, layout="zigzag_per_document")
    found["cu_seqlens, which the layout needs"] = refusal(
        lambda: per_document(batch.tokens, position_ids=anew)
    )
    found["layers"] = refusal(lambda: sparse_model("llama", layers=[0], group=group))
    found["past_key_values, of generate"] = refusal(
        lambda: model.generate(batch.tokens, max_new_tokens=2)
    )
    classifier = convert_to_nsa(
        LlamaForSequenceClassification(dense_model("llama").config), SMALL, group=group
    )
    found["sequences"] = refusal(lambda: classifier(batch.tokens))
    return found


def stated_splits_on_rank() -> dict[str, str]:
    """Errors of a model on a part of a sequence, by what states that it is one; two ranks."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
    from accelerate.utils import TorchDynamoPlugin
    from torch.distributed.tensor.experimental import context_parallel

    model = sparse_model("llama").train()
    whole, group = some_tokens(1, 64), dist.group.WORLD
    part = whole.chunk(2, dim=1)[dist.get_rank()].contiguous()
    places = torch.arange(64)[None].chunk(2, dim=1)[dist.get_rank()].contiguous()

    def refusal(tokens: Tensor, **options: Any) -> str:
        try:
            with torch.no_grad():
                model(tokens, **options)
        except ValueError as error:
            return str(error)
        return ""

    found = {"nothing stated": refusal(part, position_ids=places)}
    for option in ("cp_size", "sp_size"):
        sizes = ParallelismConfig(**{option: 2})
        # What Accelerator makes: it itself takes these sizes for no CPU.
        AcceleratorState(
            cpu=True,
            parallelism_config=sizes,
            dynamo_plugin=TorchDynamoPlugin(),
            _from_accelerator=True,
        )
        try:
            found[option] = refusal(part, position_ids=places)
            model.eval()
            found[f"{option}, evaluation of whole rows"] = refusal(part)
            found[f"{option}, evaluation of parts"] = refusal(part, shift_labels=part)
            found[f"{option}, evaluation of a later part"] = refusal(part, position_ids=places)
            model.train()
            if option == "cp_size":
                model.use_group(None)
                found["cp_size, use_group(None)"] = refusal(part, position_ids=places)
                model.use_group(group, layout="contiguous")
                found["cp_size, use_group(group)"] = refusal(part, position_ids=places)
                model = sparse_model("llama").train()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    mesh = init_device_mesh("cpu", (2,))
    positions = torch.arange(64)[None]
    with context_parallel(mesh, buffers=[whole, positions], buffer_seq_dims=[1, 1]):
        found["labels"] = refusal(whole, shift_labels=whole)
        found["context_parallel"] = refusal(whole, position_ids=positions)
        model = sparse_model("llama", layers=[1]).train()
        found["layers"] = refusal(whole, position_ids=positions)
    found["context_parallel is over"] = refusal(whole, position_ids=positions)
    return found
