"""Runs by Megatron. On the CPU: for processes that answer for its GPUs, and for no others."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.data.corpus import PackedStreams, load_corpus
from launch.engines.megatron_names import block_from_megatron, rest_to_megatron
from launch.engines.registry import make_engine
from launch.model import Decoder
from launch.processes.ranks import start_ranks
from launch.settings import Settings
from launch.storage.checkpoint import find_checkpoint, save_checkpoint
from launch.train import Result, step_batches, train
from tests.adapters.megatron import shim
from tests.distributed.ranks import MEGATRON, preload
from tests.launch.common import Gradients, first_gradients, replaced

preload(*MEGATRON, "launch.engines.megatron_training")
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core, which is not here"
)


@contextmanager
def _own_processes() -> Iterator[None]:
    """Lets a rank, which is a daemon, start the processes from which Megatron writes."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process = multiprocessing.current_process()
    process._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        process._config["daemon"] = True  # type: ignore[attr-defined]
        filesystem_async._results_queue = None  # Ends the process that served it.


def use_gpus() -> None:
    """Let a rank take the GPU of its number, as under torchrun."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())


def _prepare(settings: Settings) -> None:
    if settings.run.device == "cuda":
        use_gpus()
    else:
        shim.install()


def run_megatron(settings: Settings) -> Result:
    """A whole run."""
    _prepare(settings)
    with _own_processes():
        return train(settings, start_ranks(settings))


def start_engine(settings: Settings, vocab_size: int) -> None:
    """Build the model and its optimizer, no more."""
    _prepare(settings)
    make_engine(settings, vocab_size, start_ranks(settings))


def num_threads() -> int:
    """Of this process, with those of its groups."""
    import psutil

    return psutil.Process().num_threads()


def run_fsdp2_on_gpus(settings: Settings) -> Result:
    use_gpus()
    return train(settings, start_ranks(settings))


def fsdp2_gradients_on_gpus(settings: Settings) -> Gradients:
    """The first step's, on the CPU."""
    use_gpus()
    found = first_gradients(settings)
    return Gradients(found.loss, found.norm, {k: v.cpu() for k, v in found.grads.items()})


def exact_gradients_on_a_gpu(settings: Settings) -> Gradients:
    """The first step's in float64, from the float32 weights that every engine starts with."""
    use_gpus()
    ranks = start_ranks(settings)
    with ranks.device:
        model = Decoder(replaced(settings, "model", backend="pytorch"), 256)
    model.reset_parameters(settings.run.seed)
    model.double()
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    batches = list(step_batches(settings, streams, 0, ranks))
    targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels) / targets
        loss.backward()
        total += float(loss)
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    return Gradients(total, float(norm), grads)


def saved_again(settings: Settings, folder: Path) -> None:
    """Load the newest checkpoint of the run's folder, and write it to another."""
    _prepare(settings)
    ranks = start_ranks(settings)
    engine = make_engine(settings, 256, ranks)
    found = find_checkpoint(Path(settings.run.folder))
    assert found is not None
    step = engine.read(found.path)
    with _own_processes():
        save_checkpoint(engine.write, folder, step, settings, found.data)


def megatron_gradients(settings: Settings) -> Gradients:
    """Gradients of the first step's batch, whole and by our names; for one pipeline stage."""
    from megatron.core import parallel_state

    from launch.engines.megatron_training import MegatronEngine, _forward_loss, run_schedule

    _prepare(settings)
    ranks = start_ranks(settings)
    engine = MegatronEngine(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    batches = list(step_batches(settings, streams, 0, ranks))
    losses = run_schedule(engine.model, batches, _forward_loss, forward_only=False)
    # Each rank has finished its share of each bucket. The name is that of torch since 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in engine.model.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            gather(bucket.grad_data, own, group=group)
    mine = {name: p.main_grad.cpu() for name, p in engine.gpt.named_parameters()}
    parts: list[dict[str, torch.Tensor]] = [{}] * ranks.tp
    dist.all_gather_object(parts, mine, group=parallel_state.get_tensor_model_parallel_group())
    whole = {
        name: _joined(name, [part[name] for part in parts], parameter)
        for name, parameter in engine.gpt.named_parameters()
    }
    grads = {}
    for part in ("embedding", "norm", "head"):
        if rest_to_megatron(part) in whole:
            grads[f"{part}.weight"] = whole.pop(rest_to_megatron(part))
    for at in range(settings.model.layers):
        prefix = f"decoder.layers.{at}."
        layer = {n.removeprefix(prefix): x for n, x in whole.items() if n.startswith(prefix)}
        block = block_from_megatron(layer, settings.attention)
        grads |= {f"blocks.{at}.{name}": grad for name, grad in block.items()}
    targets = sum(batch.num_targets for batch in batches)
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    loss = float(ranks.total(engine._own_sum(losses))) / targets / ranks.dp
    return Gradients(loss, float(norm), grads)


def _joined(name: str, parts: list[torch.Tensor], parameter: Any) -> torch.Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return parts[0]
    if "linear_fc1" in name:
        halves = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves])
    return torch.cat(parts, dim=parameter.partition_dim)
