"""Liger's kernels on a converted model: the loss and gradients of its own head.

Without a GPU they run in Triton's interpreter, in a process of its own.
"""

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

from tests.adapters.huggingface.small_models import SMALL, read_by, sparse_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def differences() -> dict[str, float]:
    """How far loss and gradients are from those of the model's own head, relative."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = replace(SMALL, num_kv_heads=1)
    batch = {name: x.to(device) for name, x in read_by("padded").items()}
    results = []
    for liger in (False, True):
        model = sparse_model("llama", config).to(device).train()
        model.use_group(None, backend="pytorch")
        if liger:
            apply_liger_kernel_to_llama(model=model)
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: x.grad for name, x in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients})
    own, found = results
    return {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in own.items()}


def test_loss_and_gradients() -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    code = f"from {__name__} import differences; print(max(differences().values()))"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    # float32 sums over a hundred tokens in another order.
    assert float(finished.stdout.split()[-1]) <= 1000 * torch.finfo(torch.float32).eps
