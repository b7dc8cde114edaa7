"""Tiny runs, and the functions that ranks are given to run.

Everything here is called on each of several processes at once, so that it must be importable and
return values that can be sent.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import resource
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from launch.bench.record_choices import Recording, RecordOptions
from launch.bench.record_choices import run as run_recording
from launch.data.corpus import PackedStreams, load_corpus
from launch.engines.fsdp2 import clip_gradients, forward_backward, load_weights
from launch.model import Decoder, build_model
from launch.processes.ranks import Ranks, start_ranks
from launch.processes.startup import join_store
from launch.sampling import sample
from launch.settings import Settings, from_table
from launch.storage.checkpoint import checkpoints
from launch.storage.folder import run_folder, write_settings
from launch.train import Result, shard_stream, step_batches, train
from nsa_dist import shard_batch
from nsa_dist.nn.mlp import SwiGLU

Table = dict[str, dict[str, Any]]

TINY: Table = {
    "model": {"layers": 2, "hidden_size": 32, "mlp_hidden": 48},
    "attention": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "compress_block": 8,
        "compress_stride": 4,
        "select_block": 8,
        "num_selected": 4,
        "window": 12,
    },
    "data": {"source": "folder", "length": 150, "global_batch": 2, "held_out": 0.2},
    "optimizer": {"lr": 3e-3, "warmup_steps": 5},
    "run": {
        "steps": 20,
        "device": "cpu",
        "timeout": 60.0,
        "dtype": "float64",
        "log_every": 50,
        "validation_streams": 3,
        "tensorboard": False,
        "sample_tokens": 0,
    },
}


def tiny(root: Path, **overrides: Mapping[str, Any]) -> Settings:
    """The tiny run on the documents under ``root``, some options of some sections replaced."""
    table = {section: dict(options) for section, options in TINY.items()}
    table["data"]["path"] = str(root / "documents")
    for section, options in overrides.items():
        table.setdefault(section, {}).update(options)
    return from_table(Settings, table)


def replaced(settings: Settings, section: str, **options: Any) -> Settings:
    """``settings`` with some options of one section replaced."""
    new = dataclasses.replace(getattr(settings, section), **options)
    return dataclasses.replace(settings, **{section: new})


def write_documents(root: Path) -> None:
    """Sixty texts of 1 to 400 bytes, each of a few words over and over: easy to learn."""
    words = "red green blue window block select compress gate rank token stream".split()
    rng = random.Random(0)
    folder = root / "documents"
    folder.mkdir(parents=True)
    for index in range(60):
        few = rng.sample(words, 3)
        text = " ".join(rng.choice(few) for _ in range(80))
        (folder / f"{index:02}.txt").write_text(text[: rng.choice((1, 5, 37, 90, 151, 400))])


def run_training(settings: Settings) -> Result:
    """A whole run."""
    return train(settings, start_ranks(settings))


def run_with_slow_rank(settings: Settings, slow: int, seconds: float) -> Result:
    """A whole run in which the MLPs of one rank take longer."""
    forward = SwiGLU.forward

    def slower(mlp: SwiGLU, x: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return forward(mlp, x)

    if torch.distributed.get_rank() != slow:
        return run_training(settings)
    with mock.patch.object(SwiGLU, "forward", slower):
        return run_training(settings)


def run_compiled(settings: Settings) -> tuple[Result, int]:
    """A whole run whose compiled graphs are run as they are; also how many graphs there were."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=keep)):
        return run_training(settings), len(graphs)


def forward_ranges(settings: Settings) -> set[str]:
    """Names of the ranges of a forward."""
    ranks = start_ranks(settings)
    model = build_model(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    (batch, *_) = step_batches(settings, streams, 0, ranks)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=cpu) as profile:
        model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    return {event.name for event in profile.events()}


def kept_bytes(settings: Settings) -> int:
    """What a forward and loss keeps for backward, on this rank."""
    ranks = start_ranks(settings)
    model = build_model(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    (batch, *_) = step_batches(settings, streams, 0, ranks)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
    loss.backward()
    return sum(kept.values())


def start_each(each: list[Settings]) -> None:
    """Start with settings of each rank's own."""
    start_ranks(each[torch.distributed.get_rank()])


def meet(tables: list[dict[str, str]], port: int, **more: str) -> tuple[int, int]:
    """Rank and size of ranks that find each other as torchrun's do."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    job = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in job.items()} | more):
        store, *place = join_store(tables[rank])
    torch.distributed.barrier()  # It may be rank 0's, which would take it along.
    del store
    return tuple(place)


def meet_again(attempts: list[list[dict[str, str]]], port: int) -> list[str]:
    """What each of torchrun's attempts ends with on this rank, one store for all of them."""
    found = []
    for attempt, tables in enumerate(attempts):
        # The last rank is early and the others late.
        torch.distributed.barrier()
        if torch.distributed.get_rank() + 1 < len(tables):
            time.sleep(0.2)
        try:
            agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            meet(tables, port, TORCHELASTIC_RESTART_COUNT=str(attempt), **agent)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def meet_replaced(tables: list[dict[str, str]], port: int) -> tuple[int, int]:
    """As ``meet``, where torchrun restarted rank 0 and the host of the others is a new one."""
    restarts = "1" if torch.distributed.get_rank() == 0 else "0"
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    return meet(tables, port, TORCHELASTIC_RESTART_COUNT=restarts, **agent)


@functools.cache
def same_ranks() -> Ranks:
    """All ranks; their groups are made once."""
    return start_ranks(from_table(Settings, {"attention": TINY["attention"]}))


def hold_folder(settings: Settings, how: str = "") -> tuple[Path, list[str]]:
    """Make the run's folder this one's: which it is, and what lies in it meanwhile."""
    ranks = same_ranks()
    with ExitStack() as stack:
        if how == "rank 0 elsewhere" and ranks.is_main:
            stack.enter_context(mock.patch("launch.storage.lock._machine", return_value="another"))
        if how == "impatient":
            stack.enter_context(mock.patch("launch.storage.folder.STALE_SECONDS", 1.0))
        folder = stack.enter_context(run_folder(settings, ranks))
        torch.distributed.barrier()
        names = sorted(path.name for path in folder.iterdir())
        torch.distributed.barrier()
        assert how != "fail"
    torch.distributed.barrier()
    return folder, names


def hold_folders(settings: Settings, each: list[str]) -> None:
    """As ``hold_folder``, every rank in a working folder of its own."""
    before = Path.cwd()
    os.chdir(each[torch.distributed.get_rank()])
    try:
        with mock.patch("launch.storage.folder.SHARED_SECONDS", 0.3):
            hold_folder(settings)
    finally:
        os.chdir(before)


def put_settings(settings: Settings, room: int = -1) -> None:
    """Write a run's settings, by files of at most ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        write_settings(Path(settings.run.folder), settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def agree(settings: Settings, problems: list[str]) -> str:
    """What a rank that finds its own problem, if any, does with the others."""
    ranks = start_ranks(settings)
    with ranks.agreed():
        if problems[ranks.rank]:
            raise ValueError(problems[ranks.rank])
    return "done"


def full_state(model: Decoder) -> dict[str, torch.Tensor]:
    """Whole weights of a sharded model; collective."""
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def initial_weights(settings: Settings) -> dict[str, torch.Tensor]:
    return full_state(build_model(settings, 256, start_ranks(settings)))


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What one backward left: the mean loss, the global norm, every whole gradient."""

    loss: float
    norm: float
    grads: dict[str, torch.Tensor]


def _gradients(model: Decoder, loss_sum: torch.Tensor, targets: int, ranks: Ranks) -> Gradients:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    norm = clip_gradients(model, 0.0)
    return Gradients(float(ranks.total(loss_sum)) / targets, float(norm), grads)


def first_gradients(settings: Settings) -> Gradients:
    """Gradients of the first step's batch."""
    ranks = start_ranks(settings)
    model = build_model(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    batches = list(step_batches(settings, streams, 0, ranks))
    loss_sum, targets = forward_backward(model, batches, ranks, 0)
    return _gradients(model, loss_sum, int(targets), ranks)


def one_target_gradients(settings: Settings) -> Gradients:
    """Gradients when one token of the whole batch is a target: every other rank has none."""
    ranks = start_ranks(settings)
    model = build_model(settings, 256, ranks)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    stream = streams[0]
    labels = torch.full_like(stream.tokens, -100)
    longest = int(stream.cu_seqlens.diff().argmax())
    column = int(stream.cu_seqlens[longest + 1]) - 2
    labels[0, column] = stream.tokens[0, column]
    batch = shard_batch(
        stream.tokens,
        cu_seqlens=stream.cu_seqlens,
        labels=labels,
        layout=settings.parallel.layout,
        group=ranks.cp_mesh,
    )
    assert batch.num_targets == 1
    loss_sum, targets = forward_backward(model, [batch], ranks, 0)
    assert targets == 1
    return _gradients(model, loss_sum, int(targets), ranks)


def plain_gradients(settings: Settings) -> Gradients:
    """The first step's gradients by autograd alone: nothing sharded or accumulated."""
    ranks = start_ranks(settings)
    model = Decoder(settings, 256).double()
    model.reset_parameters(settings.run.seed)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for index in range(settings.data.global_batch):
        batch = shard_stream(streams[index], settings, ranks)
        total = total + model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        targets += batch.num_targets
    loss = total / targets
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    return Gradients(float(loss), float(norm), grads)


def local_batches(settings: Settings, steps: int) -> list[list[list[int]]]:
    """Tokens that this rank's replica is given: of each step, of each micro-batch."""
    ranks = start_ranks(settings)
    streams = PackedStreams(load_corpus(settings.data).training, settings.data.length, 0)
    return [
        [
            batch.unshard(batch.tokens)[0].tolist()
            for batch in step_batches(settings, streams, step, ranks)
        ]
        for step in range(steps)
    ]


def sampled_and_naive(settings: Settings, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Twelve sampled tokens, and the same draws from the logits of the bare text, unpadded."""
    ranks = start_ranks(settings)
    model = build_model(settings, 256, ranks)
    # Far from uniform, so that logits of another place would choose other tokens.
    options: dict[str, Any] = {"temperature": 0.02, "seed": 3, "window": 70}
    found = sample(model, prompt, 12, ranks, layout=settings.parallel.layout, **options)
    plain = Decoder(settings, 256).double()
    plain.reset_parameters(settings.run.seed)
    generator, naive = torch.Generator().manual_seed(3), list(prompt)
    with torch.no_grad():
        for _ in range(12):
            logits = plain(torch.tensor([naive[-70:]]))[0, -1]
            weights = (logits / 0.02).softmax(-1)
            naive.append(int(torch.multinomial(weights, 1, generator=generator)))
    return found, naive[len(prompt) :]


def record_choices(options: RecordOptions) -> Recording:
    """The choices that ``options`` ask for, and the file."""
    return run_recording(options)


def plain_choices(settings: Settings, text: bytes) -> torch.Tensor:
    """int32 [layer, group, token, n] of the run's newest checkpoint, by unsharded blocks."""
    model = build_model(settings, 256, start_ranks(settings))
    load_weights(checkpoints(Path(settings.run.folder))[-1], model)
    plain = Decoder(settings, 256).double()
    plain.load_state_dict(full_state(model))
    choices = []
    with torch.no_grad():
        x = plain.embedding(torch.tensor([list(text)]))
        for block in plain.blocks:
            x, details = block(x, return_details=True)
            choices.append(details.selected[0].transpose(0, 1))
    return torch.stack(choices)
