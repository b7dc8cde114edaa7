"""Training by DeepSpeed: ZeRO 1 to 3 over all ranks around the same decoder.

The weights start as those of ``model.Decoder`` at the same seed, and the loss is the sum of all
targets' cross-entropies over their number: at any stage and sizes a run follows that of FSDP2 up to
rounding. Under bfloat16 the weights that the optimizer steps, sums and reductions are float32.

DeepSpeed keeps groups in the process: one engine lives at a time.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_set_full_fp32_param

from launch.engines.base import (
    Step,
    count_targets,
    is_decayed,
    make_adamw,
    optimizer_tensors,
    spoil_gradients,
)
from launch.engines.deepspeed import has_universal, universal_of
from launch.model import Decoder, compute_dtype
from launch.processes.ranks import Ranks
from launch.seeds import mix_seed
from launch.settings import Settings
from launch.storage.manifest import CheckpointError, on_main
from nsa_dist import ShardedBatch
from nsa_dist.adapters.deepspeed import load_checkpoint, make_mpu, scale_loss
from nsa_dist.checks import check

LARGEST_BUCKET = 500_000_000
"""Elements that are reduced together at most; DeepSpeed's default."""


def deepspeed_config(settings: Settings, dtype: torch.dtype, dp: int, size: int) -> dict[str, Any]:
    """DeepSpeed's description of the run.

    Args:
        size: elements of the model; DeepSpeed allocates a whole bucket.
    """
    data = settings.data
    return {
        "train_micro_batch_size_per_gpu": data.micro_batch,
        "gradient_accumulation_steps": data.global_batch // (dp * data.micro_batch),
        "gradient_clipping": settings.optimizer.largest_norm,
        "zero_optimization": {
            "stage": settings.parallel.zero_stage,
            "reduce_bucket_size": min(size, LARGEST_BUCKET),
            # Vectors stay whole on every rank.
            "stage3_param_persistence_threshold": settings.model.hidden_size,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1 << 30,
    }


class DeepSpeedEngine:
    """``base.Engine`` by DeepSpeed.

    Raises:
        ValueError: if DeepSpeed's device is not the run's.
    """

    def __init__(self, settings: Settings, vocab_size: int, ranks: Ranks) -> None:
        _prepare(ranks)
        self.settings, self.ranks = settings, ranks
        parallel = settings.parallel
        with torch.device("meta"):
            decoder = Decoder(settings, vocab_size).float()
        self.parameters = sum(p.numel() for p in decoder.parameters())
        dtype = compute_dtype(settings, ranks.device)
        config = deepspeed_config(settings, dtype, ranks.dp, self.parameters)
        mpu = make_mpu(ranks.cp_mesh)
        # Cut as they are made: no rank ever has all of the weights.
        with deepspeed.zero.Init(
            config_dict_or_path=config, mpu=mpu, enabled=parallel.zero_stage == 3
        ):
            self.model = Decoder(settings, vocab_size, group=ranks.cp_mesh)
        if settings.model.recompute:
            for block in self.model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(self.model, decoder, settings),
            config=config,
            mpu=mpu,
        )
        draw_weights(self.model, decoder, settings, ranks)
        self.sampler: nn.Module = self.deepspeed
        # ZeRO 3 gathers weights within them.
        self.alone: Sequence[nn.Module] = self.model.mlps() if parallel.zero_stage < 3 else []
        # A rank that raises while writing would leave the others in DeepSpeed's barrier.
        self._write_errors: list[Exception] = []
        writer = self.deepspeed.checkpoint_engine
        writer.save = self._keep_errors(writer.save)
        self.deepspeed._copy_recovery_script = self._keep_errors(
            self.deepspeed._copy_recovery_script
        )
        self.communication = self.model.communication
        self.reset_communication = self.model.reset_communication

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        counted = count_targets(batches, self.ranks)
        targets = int(counted)  # DeepSpeed scales by a number.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, batch in enumerate(batches):
            # As with FSDP2: dropout's draws follow from the seed and the micro-batch alone.
            at = self.ranks.dp_rank * len(batches) + index
            torch.manual_seed(mix_seed(seed, "micro-batch", at))
            loss = self.deepspeed(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
            self.deepspeed.backward(scale_loss(self.deepspeed, spoil_gradients(loss), targets))
            # At the last one DeepSpeed leaves the update out where the norm is not finite, and
            # gives it as inf.
            self.deepspeed.step()
            loss_sum += loss.detach()
        return Step(loss_sum, counted, torch.as_tensor(self.deepspeed.get_global_grad_norm()))

    @torch.no_grad()
    def loss(self, batch: ShardedBatch) -> Tensor:
        self.deepspeed.eval()
        loss = self.deepspeed(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        self.deepspeed.train()
        return loss

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter)
        yield from optimizer_tensors(self.deepspeed.optimizer.optimizer)

    def _keep_errors(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **options: Any) -> Any:
            try:
                return call(*args, **options)
            except (OSError, RuntimeError) as error:
                self._write_errors.append(error)
                return None

        return keep

    def write(self, path: Path, step: int) -> None:
        self._write_errors.clear()
        self.deepspeed.save_checkpoint(
            str(path.parent), tag=path.name, client_state={"step": step}, save_latest=False
        )
        if self._write_errors:
            raise CheckpointError(f"rank {self.ranks.rank}: {self._write_errors[0]!r}")

    def read(self, path: Path) -> int:
        """See ``base.Engine``. Needs as many ranks as wrote it, or its universal form.

        Raises:
            ValueError: if the checkpoint is of another number of ranks, with the command that
                converts it; or if its universal form is not whole.
        """
        universal = on_main(lambda: has_universal(path))
        self.deepspeed._config.load_universal_checkpoint = universal
        if universal:
            path = universal_of(path)
        _, state = load_checkpoint(self.deepspeed, path.parent, path.name)
        return int(state["step"])


def _prepare(ranks: Ranks) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = get_accelerator().device_name()
    must = f"{device!r}, DeepSpeed's device (DS_ACCELERATOR=cpu in the environment changes it)"
    check(device == ranks.device.type, "run.device", ranks.device.type, must)
    # DeepSpeed asks for it, also without a launcher.
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    if device == "cpu":
        # DeepSpeed would compile this extension for half a minute; nothing here needs it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_optimizer(model: Decoder, decoder: Decoder, settings: Settings) -> torch.optim.AdamW:
    """AdamW over ``model`` that decays what that of FSDP2 decays.

    Args:
        decoder: the same on the meta device; those of ``model`` may have lost their shapes.
    """
    decayed = {name for name, p in decoder.named_parameters() if is_decayed(name, p)}
    return make_adamw(model.named_parameters(), decayed, settings.optimizer)


@torch.no_grad()
def draw_weights(model: Decoder, decoder: Decoder, settings: Settings, ranks: Ranks) -> None:
    """Set the weights under ``deepspeed.initialize`` to those that ``decoder`` draws from the seed.

    The float32 weights behind bfloat16 ones would otherwise start from the rounded ones. Only one
    part's full weights exist at a time, as in ``model.build_model``.

    Args:
        decoder: on the meta device.
    """
    cut = settings.parallel.zero_stage == 3
    parameters = dict(model.named_parameters())
    for part_name, part in decoder.parts():
        part.to_empty(device=ranks.device)
        decoder.reset_part(part_name, part, settings.run.seed)
        for name, whole in part.named_parameters():
            parameter = parameters[f"{part_name}.{name}"]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=cut):
                parameter.copy_(whole)
            safe_set_full_fp32_param(parameter, whole.detach())
        part.to("meta")
