"""Megatron-LM's own ``pretrain_gpt.py`` with the change that the documents show.

The script is of a checkout of Megatron-LM, not of the package megatron-core:

    MEGATRON_LM=folder pytest --run-slow tests/adapters/megatron/test_pretrain_gpt.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
CHECKOUT = os.environ.get("MEGATRON_LM", "")
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHECKOUT, reason="needs MEGATRON_LM, a checkout of Megatron-LM"),
]

SMALL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-layers 2 --hidden-size 64
    --ffn-hidden-size 96 --swiglu --disable-bias-linear --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels 32 --normalization RMSNorm
    --qk-layernorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 4
    --train-iters 5 --lr 1e-3 --log-interval 1 --eval-iters 0 --eval-interval 1000 --seed 7
    --transformer-impl local --attention-dropout 0 --hidden-dropout 0 --no-rope-fusion
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-create-attention-mask-in-dataloader --use-cpu-initialization --calculate-per-token-loss
    --nsa-compress-block 8 --nsa-compress-stride 4 --nsa-select-block 16 --nsa-num-selected 4
    --nsa-window 32
"""
ON_CPUS = "--distributed-backend gloo --clip-grad 0 --no-bias-swiglu-fusion"
ON_GPUS = """
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --train-iters 50 --seq-length 1024 --max-position-embeddings 1024
"""
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "cp2": (2, "--context-parallel-size 2"),
    "cp4": (4, "--context-parallel-size 4"),
    "tp2-sp": (2, TP2),
    "tp2-cp2-sp": (4, f"{TP2} --context-parallel-size 2"),
}


def changed(script: str, diffs: list[str]) -> str:
    """A script after the changes of the documents, whose lines must be in it."""
    for diff in diffs:
        for block in diff.strip("\n").split("\n\n"):
            lines = block.split("\n")
            before = "\n".join(x[1:] for x in lines if not x.startswith("+"))
            after = "\n".join(x[1:] for x in lines if not x.startswith("-"))
            assert script.count(before) == 1, block
            script = script.replace(before, after)
    return script


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pretrain_gpt.py`` as the documents change it."""
    page = (ROOT / "docs/adapters/megatron.md").read_text(encoding="utf-8")
    section = page.split("## In pretrain_gpt.py")[1].split("\n## ")[0]
    diffs = re.findall(r"^```diff\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert len(diffs) == 2  # The two lines, and weight decay.
    text = (Path(CHECKOUT) / "pretrain_gpt.py").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("script") / "pretrain_gpt.py"
    path.write_text(changed(text, diffs), encoding="utf-8")
    return path


def run(script: Path, ranks: int, flags: str, folder: Path) -> list[float]:
    """Losses of the steps."""
    paths = [CHECKOUT, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    on_cpus = ["-m", "tests.adapters.megatron.pretrain_on_cpus"]
    program = [*([] if GPUS else on_cpus), str(script)]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(ranks), *program, *f"{SMALL} {flags}".split()]
        + ([] if GPUS else ON_CPUS.split()),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "TORCHDYNAMO_DISABLE": "0" if GPUS else "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = finished.stdout + finished.stderr
    assert finished.returncode == 0, said[-8000:]
    return [float(x) for x in re.findall(r"lm loss: (\S+)", said)]


Losses = dict[str, list[float]]


@pytest.fixture(scope="module")
def known(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Of one process, and on GPUs of two data parallel ones."""
    folder = tmp_path_factory.mktemp("known")
    if not GPUS:
        return {"one": run(script, 1, "", folder)}
    return {"one": run(script, 1, ON_GPUS, folder), "dp2": run(script, 2, ON_GPUS, folder)}


def _difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.skipif(GPUS > 0, reason="float32 on CPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_cpus(layout: str, script: Path, known: Losses, tmp_path: Path) -> None:
    """float32: within 1e-5 of one process, by the rule for training runs."""
    ranks, flags = LAYOUTS[layout]
    assert len(known["one"]) == 5
    assert run(script, ranks, flags, tmp_path) == pytest.approx(known["one"], rel=1e-5)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_gpus(layout: str, script: Path, known: Losses, tmp_path: Path) -> None:
    """bfloat16: as far from one GPU as two data parallel ones are, twice at most."""
    ranks, flags = LAYOUTS[layout]
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, found {GPUS}")
    found = run(script, ranks, f"{flags} {ON_GPUS}", tmp_path)
    assert len(found) == 50
    assert _difference(found, known["one"]) <= 2 * _difference(known["dp2"], known["one"])
