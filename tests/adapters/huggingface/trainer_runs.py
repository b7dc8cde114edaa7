"""Runs of transformers' Trainer, as a program: one process, DeepSpeed's ALST (sp), torch's cp, or
whole rows on each rank (ddp, fsdp, zero).

    torchrun --nproc-per-node=2 trainer_runs.py '{"mode": "sp", "out": "run.pt", ...}'

Rank 0 writes the losses of steps and of evaluations, and the weights after them, to ``out``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from nsa_dist.adapters.huggingface.distillation import (
    DistillationTrainer,
    train_new_weights_only,
)
from tests.adapters.huggingface.small_models import (
    INDEPENDENT,
    SMALL,
    dense_model,
    some_tokens,
    sparse_model,
)

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
LENGTH = 64
ROOT = Path(__file__).resolve().parents[3]


def rows(kind: str) -> list[dict[str, Tensor]]:
    """Samples; labels of some are in one half alone, so that ranks have none or unlike numbers."""
    found = []
    for i, tokens in enumerate(some_tokens(12, LENGTH)):
        labels, places = tokens.clone(), torch.arange(LENGTH)
        labels[: (0, 40, 13)[i % 3]] = -100
        row = {"input_ids": tokens, "labels": labels, "position_ids": places}
        if kind == "masked":
            end = LENGTH - 5 * (i % 4)
            row["attention_mask"] = (places < end).long()
            row["labels"] = torch.where(places < end, labels, -100)
        elif kind == "packed":
            start = 9 + 11 * (i % 4)
            row["position_ids"] = torch.where(places < start, places, places - start)
            row["labels"][start] = -100
        found.append(row)
    return found


def build(settings: dict[str, Any]) -> Any:
    config = INDEPENDENT if settings.get("independent_kv") else SMALL
    heads = settings.get("kv_heads", config.num_kv_heads)
    if settings.get("dense"):
        model = dense_model("llama", num_key_value_heads=heads)
    else:
        model = sparse_model("llama", replace(config, num_kv_heads=heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)  # Steps of training that do not magnify rounding.
    if settings.get("float64"):
        model.double().use_group(None, backend="pytorch")  # No kernels take float64.
    return model


def arguments(settings: dict[str, Any], folder: Path) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": settings.get("steps", 3),
        "per_device_train_batch_size": settings.get("batch", 2),
        "per_device_eval_batch_size": settings.get("batch", 2),
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.get("rate", 0.02),
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": settings.get("steps", 3),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        # With DeepSpeed accelerate asks DeepSpeed for the device.
        "use_cpu": settings["mode"] not in ("sp", "zero") and not torch.cuda.is_available(),
        **settings.get("options", {}),
    }
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if settings["mode"] == "sp":
        from accelerate.parallelism_config import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        )
        options["parallelism_config"] = ParallelismConfig(sp_size=size, sp_handler=handler)
        if settings.get("stage", 2) < 3:
            # Gradients are then sp_size times those of the loss, for dense models too.
            options["learning_rate"] /= size
        stage = {"stage": settings.get("stage", 2)}
        options["deepspeed"] = {**DEEPSPEED, "zero_optimization": stage}
        if not torch.cuda.is_available():
            options["eval_strategy"] = "no"  # accelerate gathers numbers as gloo refuses to.
    elif settings["mode"] == "cp":
        from accelerate.parallelism_config import ParallelismConfig

        options["parallelism_config"] = ParallelismConfig(cp_size=size)
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2}
    elif settings["mode"] == "fsdp":
        options["fsdp"] = True
        options["fsdp_config"] = {"version": 2, **settings.get("fsdp", {})}
    elif settings["mode"] == "zero":
        if not torch.cuda.is_available():
            options["eval_strategy"] = "no"  # As above.
        stage = {"stage": settings["stage"], **settings.get("zero", {})}
        options["deepspeed"] = {**DEEPSPEED, "zero_optimization": stage}
    return TrainingArguments(str(folder), **options)


def take_cpus_for_devices() -> None:
    """accelerate has FSDP2, and so cp, for accelerators alone; torch has it on CPUs too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def take_processes_of_deepspeed() -> None:
    """accelerate takes DeepSpeed's processes on CPUs for one each, of the same data."""
    from accelerate.state import PartialState

    PartialState._shared_state["num_processes"] = dist.get_world_size()
    PartialState._shared_state["process_index"] = dist.get_rank()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole, on the CPU. A collective."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().cpu().clone()
        elif hasattr(parameter, "full_tensor"):
            found[name] = parameter.detach().full_tensor().cpu()
        else:
            found[name] = parameter.detach().cpu().clone()
    return found


def train(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Losses of steps and of evaluations, and the weights after them."""
    if settings["mode"] in ("sp", "zero") and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    options = arguments(settings, folder)
    if settings["mode"] in ("cp", "fsdp") and options.device.type == "cpu":
        take_cpus_for_devices()
    if settings["mode"] == "zero" and options.device.type == "cpu":
        take_processes_of_deepspeed()
    data, model = rows(settings.get("rows", "rows")), build(settings)
    make = Trainer
    if settings.get("distil"):
        train_new_weights_only(model)
        make = DistillationTrainer
    size, times = settings.get("batch", 2), settings.get("repeats", 1)
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    trainer = make(
        model,
        options,
        train_dataset=[row for batch in batches for _ in range(times) for row in batch],
        eval_dataset=data[:4],
        data_collator=DataCollatorWithFlattening() if settings.get("flatten") else None,
    )
    trainer.train()
    history = trainer.state.log_history
    return {
        "losses": [x["loss"] for x in history if "loss" in x],
        "evaluations": [x["eval_loss"] for x in history if "eval_loss" in x],
        "weights": weights(trainer.model),
    }


def over_ranks(folder: Path, processes: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What this program writes, run by so many processes."""
    out = folder / "run.pt"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [sys.executable, *command, __file__, json.dumps({**settings, "out": str(out)})],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return torch.load(out)


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = Path(settings["out"])
    result = train(settings, out.parent / "run")
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(result, out)


if __name__ == "__main__":
    main()
