"""Liger's forward of a language model on a converted one: its own loss and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("liger_kernel")

from tests.adapters.huggingface.small_models import INDEPENDENT, ON_GPU, read_by, sparse_model

ROOT = Path(__file__).resolve().parents[3]


def differences(device: str, **kernels: bool) -> dict[str, float]:
    """How far loss and gradients are from those of the model's own forward, relative."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    results = []
    for liger in (False, True):
        model = sparse_model("llama", replace(INDEPENDENT, **ON_GPU)).to(device).train()
        batch = {name: x.to(device) for name, x in read_by("padded").items()}
        if liger:
            apply_liger_kernel_to_llama(model=model, **kernels)
            batch["skip_logits"] = not kernels  # Without kernels the loss is transformers'.
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients})
    own, found = results
    return {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in own.items()}


def test_the_forward_without_kernels() -> None:
    """Which reads the batch in the decoder, as it does with them."""
    found = differences("cpu", rope=False, rms_norm=False, swiglu=False)
    assert max(found.values()) == 0.0, found


@pytest.mark.gpu
def test_the_forward_with_kernels() -> None:
    """In a process of its own: Liger replaces functions of transformers."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    code = f"from {__name__} import differences; print(max(differences('cuda').values()))"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # float32 sums over a hundred tokens in another order.
    assert float(finished.stdout.split()[-1]) <= 1000 * torch.finfo(torch.float32).eps
