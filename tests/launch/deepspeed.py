"""Runs by DeepSpeed, on CPUs and on GPUs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from launch.data.corpus import PackedStreams, load_corpus
from launch.engines.base import count_targets
from launch.processes.ranks import start_ranks
from launch.settings import Settings
from launch.train import Result, step_batches, train
from tests.distributed.ranks import DEEPSPEED, preload
from tests.launch.common import Gradients, replaced
from tests.launch.megatron import use_gpus

preload(*DEEPSPEED)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which is not here"
)


def run_deepspeed(settings: Settings) -> Result:
    """A whole run."""
    if settings.run.device == "cuda":
        use_gpus()
    return train(settings, start_ranks(settings))


def deepspeed_gradients(settings: Settings) -> Gradients:
    """Gradients of the first step's batch, whole, on the CPU."""
    from deepspeed.utils import safe_get_full_grad

    from launch.engines.deepspeed_training import DeepSpeedEngine
    from nsa_dist.adapters.deepspeed import scale_loss

    if settings.run.device == "cuda":
        use_gpus()
    ranks = start_ranks(settings)
    engine = DeepSpeedEngine(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    batches = list(step_batches(settings, streams, 0, ranks))
    targets = int(count_targets(batches, ranks))
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for index, batch in enumerate(batches):
        loss = engine.deepspeed(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        engine.deepspeed.backward(scale_loss(engine.deepspeed, loss, targets))
        total += loss.detach()
        if index < len(batches) - 1:
            engine.deepspeed.step()
    grads = {
        name: safe_get_full_grad(p).detach().cpu().clone()
        for name, p in engine.model.named_parameters()
    }
    norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt()
    return Gradients(float(ranks.total(total)) / targets, float(norm), grads)


def broken_off(settings: Settings, root: Path, name: str, last: str) -> Settings:
    """The run as if it had ended before its last checkpoint; the settings that go on with it."""
    shutil.copytree(settings.run.folder, root / name)
    shutil.rmtree(root / name / "checkpoints" / last)
    return replaced(settings, "run", folder=str(root / name), resume=True)
