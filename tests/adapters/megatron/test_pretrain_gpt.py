"""Megatron-LM's own ``pretrain_gpt.py`` with the change that the documents show.

The script is of a checkout of Megatron-LM, not of the package megatron-core:

    MEGATRON_LM=folder pytest --run-slow tests/adapters/megatron/test_pretrain_gpt.py
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
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
STEPS = 10
ON_GPUS = f"""
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --train-iters {STEPS} --seq-length 1024 --max-position-embeddings 1024
    --distributed-timeout-minutes 2
"""
# Seconds for a run: a row of four GPUs is to take less than 60.
PATIENCE = 150 if GPUS else 600
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
    # Once, before runs beside each other would.
    subprocess.run(["make", "-C", f"{CHECKOUT}/megatron/core/datasets"], check=True)
    return path


class Run:
    """A started run of the script. Its ranks write files; what they say is shown if it fails.

    Args:
        ranks: processes, of which rank r has the GPU r.
        folder: of its files, new or empty.
    """

    def __init__(self, script: Path, ranks: int, flags: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        paths = [CHECKOUT, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        on_cpus = ["-m", "tests.adapters.megatron.pretrain_on_cpus"]
        program = [*([] if GPUS else on_cpus), str(script)]
        with (folder / "torchrun.out").open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                + ["--nproc-per-node", str(ranks), "--log-dir", str(folder), "--redirects", "3"]
                + [*program, *f"{SMALL} {flags}".split()]
                + ([] if GPUS else ON_CPUS.split()),
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "OMP_NUM_THREADS": "1",
                    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
                    "TORCHDYNAMO_DISABLE": "1",  # Compiling takes longer than a run.
                    "PYTHONFAULTHANDLER": "1",  # Stacks at SIGABRT.
                },
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def losses(self) -> list[float]:
        """Of the steps, once it has ended."""
        try:
            ended = f"ended with {self.process.wait(PATIENCE)}"
        except subprocess.TimeoutExpired:
            ended = f"still ran after {PATIENCE} s; where each rank was is at the end of its stderr"
            for rank in self._ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.end()
        said = {path: path.read_text(errors="replace") for path in self._files()}
        if self.process.returncode != 0:
            parts = [f"== {path.relative_to(self.folder)}\n{_tail(x)}" for path, x in said.items()]
            pytest.fail("\n".join([ended, *parts]), pytrace=False)
        return [float(x) for text in said.values() for x in re.findall(r"lm loss: (\S+)", text)]

    def end(self) -> None:
        """Torchrun ends its ranks."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def _ranks(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def _files(self) -> list[Path]:
        """Of torchrun, which names the rank that failed first, and of each rank."""
        return [self.folder / "torchrun.out", *sorted(self.folder.rglob("std*.log"))]


def _tail(text: str) -> str:
    """A rank's first error, and its last words."""
    began = text.find("Traceback (most recent call last)")
    if began < 0 or began >= len(text) - 6000:
        return text[-6000:]
    return f"{text[began : began + 4000]}\n...\n{text[max(began + 4000, len(text) - 2000) :]}"


Runs = dict[str, Run]


@pytest.fixture(scope="module")
def known(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Of one process; on GPUs also in float32. They run beside the tests' own."""
    folder = tmp_path_factory.mktemp("known")
    flags = {"one": f"{ON_GPUS} --bf16", "exact": ON_GPUS} if GPUS else {"one": ""}
    runs = {name: Run(script, 1, each, folder / name) for name, each in flags.items()}
    yield runs
    for each in runs.values():
        each.end()


def _difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.skipif(GPUS > 0, reason="float32 on CPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_cpus(layout: str, script: Path, known: Runs, tmp_path: Path) -> None:
    """float32: within 1e-5 of one process, by the rule for training runs."""
    ranks, flags = LAYOUTS[layout]
    one = known["one"].losses()
    assert len(one) == 5
    assert Run(script, ranks, flags, tmp_path / layout).losses() == pytest.approx(one, rel=1e-5)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_gpus(layout: str, script: Path, known: Runs, tmp_path: Path) -> None:
    """bfloat16: by the 2x rule, as near to float32 as one GPU's, whose mean distance it may have
    twice. Data parallel ranks would be no measure: they round what one GPU rounds."""
    ranks, flags = LAYOUTS[layout]
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} CUDA devices, found {GPUS}")
    split = Run(script, ranks, f"{flags} {ON_GPUS} --bf16", tmp_path / layout)
    try:
        one, exact = (known[name].losses() for name in ("one", "exact"))
        found = split.losses()
    finally:
        split.end()
    print(f"{layout}: {found}\none: {one}\nfloat32: {exact}")
    assert len(exact) == STEPS
    assert _difference(found, exact) <= 2 * _difference(one, exact)
