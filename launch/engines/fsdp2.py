"""Training by FSDP2: weights, gradients and optimizer state sharded over all ranks.

The loss is the sum of all targets' cross-entropies over their number, across ranks, replicas and
accumulated micro-batches: how a batch is spread changes no gradient beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launch.engines.base import (
    MOMENTS,
    EngineSpec,
    Step,
    WholeState,
    count_targets,
    is_decayed,
    local_part,
    make_adamw,
    spoil_gradients,
)
from launch.first_weights import SAVED_PREFIX
from launch.losses import liger_problem
from launch.model import Decoder, build_model
from launch.processes.ranks import Ranks
from launch.seeds import mix_seed
from launch.settings import OptimizerSettings, Settings, from_toml
from launch.storage.checkpoint import SETTINGS, Checkpoint
from launch.storage.manifest import message_group, shared_failure
from nsa_dist import ShardedBatch
from nsa_dist.checkpoints.dcp_metadata import read_metadata
from nsa_dist.checkpoints.safe_load import check_dcp, load, read_tensors
from nsa_dist.checks import check


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW of the weights that are trained; it decays matrices and leaves the rest alone."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = {name for name, p in named.items() if is_decayed(name, p)}
    return make_adamw(named.items(), decayed, settings)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients down to a global norm of at most ``largest`` (0: leave them).

    Returns:
        The norm before, over every shard on every rank; the same scalar on each.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    assert isinstance(norm, DTensor)
    return norm.full_tensor()


def forward_backward(
    model: nn.Module, batches: Sequence[ShardedBatch], ranks: Ranks, seed: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over every target of every rank's batches.

    Returns:
        The sum of this rank's losses (float64 scalar, nats) and the number of targets everywhere
        (int64 scalar); the host waits for neither.
    """
    targets = count_targets(batches, ranks)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(batches):
        # Dropout's draws follow from the seed, the step and the micro-batch alone.
        torch.manual_seed(mix_seed(seed, "micro-batch", ranks.dp_rank * len(batches) + index))
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        (spoil_gradients(loss) / targets.clamp(min=1)).backward()
        loss_sum += loss.detach()
    return loss_sum, targets


class Fsdp2Engine:
    """``base.Engine`` by FSDP2."""

    def __init__(self, settings: Settings, vocab_size: int, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.model = build_model(settings, vocab_size, ranks)
        self.sampler: nn.Module = self.model
        self.alone: Sequence[nn.Module] = self.model.mlps()
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.communication = self.model.communication
        self.reset_communication = self.model.reset_communication
        # On GPUs the copy has pinned memory, which is kept from one checkpoint to the next.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=ranks.device.type == "cuda")

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum, targets = forward_backward(self.model, batches, self.ranks, seed)
        grad_norm = clip_gradients(self.model, self.settings.optimizer.largest_norm)
        # Where it is 1, fused AdamW leaves weights, moments and step counts as they are. It reads
        # it on the device: the host does not wait.
        self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss_sum, targets, grad_norm)

    @torch.no_grad()
    def loss(self, batch: ShardedBatch) -> Tensor:
        self.model.eval()
        loss = self.model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        self.model.train()
        return loss

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, local_part(parameter)
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}: {kind}", local_part(value)

    def write(self, path: Path, step: int) -> None:
        save_state(path, step, state_of(self.model, self.optimizer))

    def copied(self) -> Callable[[Path, int], None]:
        state = self._stager.stage(state_of(self.model, self.optimizer))
        return lambda path, step: save_state(path, step, state)

    def read(self, path: Path) -> int:
        return load_state(path, self.model, self.optimizer)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """``EngineSpec.read_weights``."""
    check_dcp(checkpoint.path)
    saved = read_tensors(checkpoint.path, lambda key: key.startswith(SAVED_PREFIX))
    return {key.removeprefix(SAVED_PREFIX): value for key, value in saved.items()}


def check_settings(settings: Settings) -> None:
    """Refuse what is Megatron's."""
    part = settings.model.recompute_part
    must = "'block' or 'mlp' with parallel.engine = 'fsdp2' (only 'megatron' has 'attention')"
    check(part != "attention", "model.recompute_part", part, must)
    must = "'block' without model.recompute"
    check(part == "block" or settings.model.recompute, "model.recompute_part", part, must)
    must = "'auto', 'bfloat16' or 'float32' with model.loss = 'liger'"
    right = settings.model.loss == "pieces" or settings.run.dtype != "float64"
    check(right, "run.dtype", settings.run.dtype, must)


def check_machine(settings: Settings, device: str) -> None:
    """Refuse a machine without what ``model.loss`` needs."""
    problem = liger_problem(device) if settings.model.loss == "liger" else None
    check(problem is None, "model.loss", settings.model.loss, problem or "")


SPEC = EngineSpec(
    name="fsdp2",
    build=Fsdp2Engine,
    check_settings=check_settings,
    check_machine=check_machine,
    options=(
        "model.compile",
        "model.loss",
        "model.recompute_part",
        "optimizer.distill_dense",
        "optimizer.train_only",
        "parallel.gather_ahead",
        "parallel.reshard_after_forward",
        "run.async_checkpoints",
    ),
    fixed_options=("optimizer.distill_dense", "optimizer.train_only"),
    file_suffixes=(".distcp", ".metadata"),
    last_files=(".metadata",),
    read_weights=read_weights,
)


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint holds beside its step; not copied."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def save_state(path: Path, step: int, state: dict[str, Any]) -> None:
    """Write a state and its step by torch.distributed.checkpoint; collective.

    Raises:
        CheckpointError: on every rank, if it cannot be written.
    """
    with shared_failure():
        save({**state, "step": step}, checkpoint_id=path, process_group=message_group())


def load_state(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore what ``save_state`` wrote in place, whatever dp and cp wrote it; collective.

    Returns:
        The steps done.

    Raises:
        ValueError: on every rank, if it holds more than data; naming the file.
    """
    state = {**state_of(model, optimizer), "step": 0}
    load(state, path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(state["step"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore the weights of a verified checkpoint in place, whatever dp and cp wrote it;
    collective.

    Raises:
        ValueError: if another engine wrote it.
    """
    must = "one of engine 'fsdp2' (launch/convert.py makes one of Megatron's)"
    engine = from_toml(path / SETTINGS).parallel.engine
    check(engine == SPEC.name, "checkpoint", str(path), must)
    state = {"model": get_model_state_dict(model)}
    load(state, path)
    set_model_state_dict(model, state["model"])


def read_whole(checkpoint: Checkpoint) -> WholeState:
    """A verified checkpoint of this engine, whole, in a process group of one.

    Raises:
        ValueError: if a file holds more than data.
    """
    check_dcp(checkpoint.path)
    embedding = read_metadata(checkpoint.path).state_dict_metadata["model.embedding.weight"]
    assert isinstance(embedding, TensorStorageMetadata)
    model, optimizer = _whole_model(checkpoint.settings, embedding.size[0])
    step = load_state(checkpoint.path, model, optimizer)
    named = dict(model.named_parameters())
    return WholeState(
        weights={name: parameter.detach() for name, parameter in named.items()},
        moments={
            kind: {name: optimizer.state[p][kind] for name, p in named.items()} for kind in MOMENTS
        },
        step=step,
        updates=int(optimizer.state[named["embedding.weight"]]["step"]),
        dtype=torch.bfloat16 if checkpoint.settings.run.dtype == "bfloat16" else torch.float32,
    )


def write_whole(path: Path, state: WholeState, settings: Settings) -> None:
    """Write a checkpoint of this engine into an empty folder, in a process group of one."""
    model, optimizer = _whole_model(settings, state.weights["embedding.weight"].shape[0])
    model.load_state_dict(state.weights)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = {kind: state.moments[kind][name].clone() for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(state.updates)), **moments}
    save_state(path, state.step, state_of(model, optimizer))


def _whole_model(settings: Settings, vocab_size: int) -> tuple[Decoder, Optimizer]:
    model = Decoder(settings, vocab_size).float()
    return model, make_optimizer(model, settings.optimizer)
