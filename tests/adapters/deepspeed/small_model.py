"""A small model with ``NSADistributedAttention`` under DeepSpeed, on ranks, and without it on one.

Every rank makes the whole batch from a seed and keeps its part: streams of unlike lengths, packed,
with few targets, of which some ranks have none.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nsa_dist import NSAConfig, ShardedBatch, shard_batch

VOCABULARY, HIDDEN, LAYERS = 32, 16, 2
DOCUMENTS = ((40, 24), (64,), (8, 72), (48,))
SMALL = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block=4,
    compress_stride=2,
    select_block=4,
    num_selected=4,
    window=5,
    independent_kv=False,
    gate="static",
)


@dataclass(frozen=True)
class Case:
    """How a model is trained.

    Args:
        streams: in an optimizer step; replicas share them, and take theirs one after another.
        zero: more options of ``zero_optimization``.
        options: more options of the config.
        adam: AdamW in the place of SGD.
        targets: whether there are any.
        mpu: whether DeepSpeed is given one.
        compute: dtype of activations, that of the parameters unless set.
    """

    stage: int = 0
    dp: int = 1
    cp: int = 1
    dtype: torch.dtype = torch.float32
    streams: int = 2
    lr: float = 10.0
    adam: bool = False
    layout: str = "contiguous"
    targets: bool = True
    mpu: bool = True
    compute: torch.dtype | None = None
    zero: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def size(self) -> int:
        return self.dp * self.cp


class Linear(nn.Linear):
    """A linear map in its input's dtype, whatever the weight's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Layer(nn.Module):
    """A residual layer of attention between projections."""

    def __init__(self, group: Any, layout: str) -> None:
        super().__init__()
        from nsa_dist.adapters.deepspeed import NSADistributedAttention

        config = SMALL
        self.q = Linear(HIDDEN, config.num_heads * config.head_dim, bias=False)
        self.kv = Linear(HIDDEN, 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.out = Linear(config.num_heads * config.head_dim, HIDDEN, bias=False)
        self.attention = NSADistributedAttention(config, group, layout=layout)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (SMALL.num_heads, -1))
        k, v = self.kv(x).unflatten(-1, (2 * SMALL.num_kv_heads, -1)).chunk(2, dim=2)
        return x + self.out(self.attention(q, k, v, 0, cu_seqlens=cu_seqlens).flatten(2))


class Model(nn.Module):
    """Token ids and labels to the sum of losses."""

    def __init__(
        self,
        group: Any = None,
        layout: str = "contiguous",
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.compute = compute
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(group, layout) for _ in range(LAYERS))
        self.head = Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        x = x.to(self.compute or x.dtype)
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        logits = self.head(x).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def make_model(
    group: Any = None, layout: str = "contiguous", compute: torch.dtype | None = None
) -> Model:
    """The same weights everywhere, none of them zero."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        model = Model(group, layout, compute)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def streams(count: int, step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, labels, cu_seqlens) of a step; few labels count, in one half of the stream."""
    generator = torch.Generator().manual_seed(11 + step)
    for index in range(count):
        lengths = DOCUMENTS[index % len(DOCUMENTS)]
        tokens = torch.randint(VOCABULARY, (1, sum(lengths)), generator=generator)
        labels = tokens.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3 * (index + 1)] = -100
        half = slice(0, sum(lengths) // 2) if index % 2 else slice(sum(lengths) // 2, None)
        labels[:, half] = -100
        yield tokens, labels, torch.tensor([0, *lengths]).cumsum(0).int()


def batches(case: Case, group: DeviceMesh | None, step: int) -> list[ShardedBatch]:
    """This rank's part of its replica's streams; all of all streams without a group."""
    share = case.streams if group is None else case.streams // case.dp
    first = 0 if group is None else dist.get_rank() // case.cp * share
    return [
        shard_batch(
            tokens,
            labels=labels if case.targets else torch.full_like(labels, -100),
            cu_seqlens=bounds,
            group=group,
            layout=case.layout,
        )
        for tokens, labels, bounds in list(streams(case.streams, step))[first : first + share]
    ]


def prepare() -> Any:
    """deepspeed, quiet, and without an extension that it would compile on CPUs."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # As every launcher sets it.
    deepspeed.utils.groups.mpu = None  # Of an earlier model in this process.
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def config_of(case: Case, universal: bool = False) -> dict[str, Any]:
    # Buffers of a bucket's size, which is two gigabytes by default, are filled in these processes.
    zero = {"stage": case.stage, "reduce_bucket_size": 2048, **dict(case.zero)}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.streams // case.dp,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
        **dict(case.options),
    }
    if case.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return config


class Run:
    """A model under DeepSpeed on this rank. Collective."""

    def __init__(self, case: Case, universal: bool = False) -> None:
        deepspeed = prepare()
        from nsa_dist.adapters.deepspeed import make_mpu

        self.case = case
        self.mesh = init_device_mesh("cpu", (case.dp, case.cp), mesh_dim_names=("dp", "sp"))
        self.mpu = make_mpu(self.mesh, sequence_dim="sp")
        group = self.mpu.get_sequence_parallel_group()
        self.model = make_model(group, case.layout, case.compute)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), case.lr)
        if case.adam:
            # Groups of unlike options and sizes.
            named = dict(self.model.named_parameters())
            matrices = [p for name, p in named.items() if name.endswith("weight")]
            others = [p for name, p in named.items() if not name.endswith("weight")]
            optimizer = torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": 0.3},
                    {"params": others, "weight_decay": 0.0},
                ],
                case.lr,
            )
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=config_of(case, universal),
            mpu=self.mpu if case.mpu else None,
        )

    def step(self, step: int = 0) -> float:
        """One update; the mean loss before it."""
        from nsa_dist.adapters.deepspeed import count_targets, scale_loss

        own = batches(self.case, self.mesh["sp"], step)
        targets = count_targets(own, self.mpu)
        total = torch.zeros((), dtype=torch.float64)
        for batch in own:
            loss = self.engine(batch.tokens, batch.labels, batch.cu_seqlens)
            self.engine.backward(scale_loss(self.engine, loss, targets))
            self.engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / max(targets, 1)

    def weights(self) -> dict[str, Tensor]:
        """Whole float32 weights on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self.model.named_parameters():
            whole = safe_get_full_fp32_param(parameter) if self.case.stage else None
            found[name] = (parameter if whole is None else whole).detach().clone()
        return found


def stepped(case: Case) -> tuple[float, dict[str, Tensor]]:
    """On every rank: the loss and the weights after one step."""
    run = Run(case)
    loss = run.step()
    return loss, run.weights()


def plain_step(case: Case, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The same by autograd alone on one rank, the weights and their update in float32 at least."""
    whole = make_model().to(torch.promote_types(dtype, torch.float32))
    model = make_model(compute=case.compute).to(dtype)
    total, targets = 0.0, 0
    for batch in batches(case, None, 0):
        loss = model(batch.tokens, batch.labels, batch.cu_seqlens)
        loss.backward()
        total, targets = total + float(loss.detach()), targets + batch.num_targets
    weights = {}
    for (name, parameter), own in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert own.grad is not None
        weights[name] = parameter.detach() - case.lr * own.grad.to(parameter) / max(targets, 1)
    return total / max(targets, 1), weights


def run_command(command: str) -> None:
    """A command that an error names, by this Python."""
    program, *arguments = command.split()
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
