"""Sequences that someone else splits, unknown to the model, are refused on every rank alike."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.adapters.huggingface.small_models import stated_splits_on_rank
from tests.distributed.ranks import Ranks
from tests.traps.mutation import Replaced, catches

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ROOT = Path(__file__).resolve().parents[3]

TRAINER = """
import os
import sys

import deepspeed
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from transformers import Trainer, TrainingArguments

from tests.adapters.huggingface.small_models import some_tokens, sparse_model

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
places = torch.arange(32)
rows = [{"input_ids": x, "labels": x, "position_ids": places} for x in some_tokens(8, 32)]
handler = DeepSpeedSequenceParallelConfig(
    sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
)
arguments = TrainingArguments(
    sys.argv[1],
    max_steps=1,
    per_device_train_batch_size=1,
    report_to=[],
    save_strategy="no",
    parallelism_config=ParallelismConfig(sp_size=2, sp_handler=handler),
    deepspeed={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
try:
    Trainer(sparse_model("llama"), arguments, train_dataset=rows).train()
except ValueError as error:
    print(f"rank {os.environ['RANK']}: {error}")
"""


def not_looked_at(accelerate: Any) -> None:
    return None


@catches(
    "a part of a sequence taken for a whole one",
    "sizes that accelerate states are not looked at",
    Replaced("nsa_dist.adapters.huggingface:_accelerate", not_looked_at),
)
@pytest.mark.skipif(not HAS_ACCELERATE, reason="needs accelerate")
def test_sizes_that_others_state(ranks_of: Callable[[int], Ranks]) -> None:
    for answer in ranks_of(2).run(stated_splits_on_rank):
        assert answer.pop("nothing stated") == ""
        assert answer.pop("cp_size, use_group(None)") == ""
        assert answer.pop("cp_size, use_group(group)") == ""
        assert answer.pop("context_parallel is over") == ""
        assert answer.keys() == {"cp_size", "sp_size", "context_parallel"}
        for option, message in answer.items():
            assert option in message, message
            assert "must be 1 without a call of use_group, got 2" in message, message
            assert "use_group" in message, message


@pytest.mark.slow
@pytest.mark.skipif(not (HAS_ACCELERATE and HAS_DEEPSPEED), reason="needs accelerate, deepspeed")
def test_the_trainer_with_ulysses(tmp_path: Path) -> None:
    """DeepSpeed's ALST as the Trainer starts it."""
    script = tmp_path / "train.py"
    script.write_text(TRAINER, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    for rank in range(2):
        told = f"rank {rank}: sp_size of accelerate's ParallelismConfig must be 1"
        assert told in finished.stdout
