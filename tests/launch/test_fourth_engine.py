"""An engine of one file, this one, and one row of the registry trains, saves and resumes."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.engines.base import (
    EngineSpec,
    Step,
    count_targets,
    is_decayed,
    make_adamw,
    optimizer_tensors,
    spoil_gradients,
)
from launch.engines.registry import ENGINES
from launch.model import Decoder, compute_dtype
from launch.processes.ranks import Ranks, start_ranks
from launch.seeds import mix_seed
from launch.settings import Settings
from launch.storage.checkpoint import find_checkpoint
from launch.storage.manifest import on_main
from launch.train import Result, train
from nsa_dist import ShardedBatch
from nsa_dist.checks import check
from tests.distributed.ranks import Ranks as Pool
from tests.launch.checkpoints import find
from tests.launch.common import replaced, run_training, tiny

RanksOf = Callable[[int], Pool]
STATE = "whole.state"


class ReplicatedEngine:
    """``base.Engine`` with all weights on every rank, whose gradients are added."""

    def __init__(self, settings: Settings, vocab_size: int, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        dtype = compute_dtype(settings, ranks.device)
        with ranks.device:
            self.model = Decoder(settings, vocab_size, group=ranks.cp_mesh).to(dtype)
        self.model.reset_parameters(settings.run.seed)
        self.sampler: nn.Module = self.model
        self.alone = self.model.mlps()
        named = dict(self.model.named_parameters())
        decayed = {name for name, p in named.items() if is_decayed(name, p)}
        self.optimizer = make_adamw(named.items(), decayed, settings.optimizer)
        self.parameters = sum(p.numel() for p in named.values())
        self.communication = self.model.communication
        self.reset_communication = self.model.reset_communication

    def step(self, batches: Sequence[ShardedBatch], learning_rate: float, seed: int) -> Step:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        targets = count_targets(batches, self.ranks)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for index, batch in enumerate(batches):
            place = self.ranks.dp_rank * len(batches) + index
            torch.manual_seed(mix_seed(seed, "micro-batch", place))
            loss = self.model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
            (spoil_gradients(loss) / targets.clamp(min=1)).backward()
            loss_sum += loss.detach()
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad)
        largest = self.settings.optimizer.largest_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss_sum, targets, norm)

    @torch.no_grad()
    def loss(self, batch: ShardedBatch) -> Tensor:
        self.model.eval()
        loss = self.model(batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels)
        self.model.train()
        return loss

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from optimizer_tensors(self.optimizer)

    def write(self, path: Path, step: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
        }
        on_main(lambda: torch.save(state, path / STATE))

    def read(self, path: Path) -> int:
        state = torch.load(path / STATE, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def check_settings(settings: Settings) -> None:
    must = "False with parallel.engine = 'replicated'"
    check(not settings.model.tie_embeddings, "model.tie_embeddings", True, must)


def check_machine(settings: Settings, device: str) -> None:
    check(device == "cpu", "run.device", device, "'cpu'")


SPEC = EngineSpec(
    name="replicated",
    build=ReplicatedEngine,
    check_settings=check_settings,
    check_machine=check_machine,
    describe=lambda settings, ranks: f"replicated over {ranks.size}",
    file_suffixes=(".state",),
)


def registered() -> Any:
    """Within it the registry has a fourth row."""
    return mock.patch.dict(ENGINES, {SPEC.name: __name__})


@pytest.fixture
def row() -> Iterator[None]:
    with registered():
        yield


def run_replicated(settings: Settings) -> tuple[Result, str]:
    """A whole run, and what it prints."""
    with registered(), redirect_stdout(io.StringIO()) as printed:
        return train(settings, start_ranks(settings)), printed.getvalue()


def find_replicated(folder: Path) -> tuple[str | None, list[str]]:
    with registered():
        return find(folder)


def parallel_of(folder: Path) -> str:
    """The engine that a run's newest checkpoint says it is of."""
    with registered():
        found = find_checkpoint(folder)
        assert found is not None
        return found.settings.parallel.engine


@pytest.mark.usefixtures("row")
def test_it_trains_saves_and_resumes(ranks_of: RanksOf, root: Path) -> None:
    run = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 0, "sample_tokens": 4}
    cp, folder = {"cp": 2}, root / "replicated"
    settings = tiny(root, parallel=cp, run={**run, "folder": str(root / "beside-replicated")})
    expected, *_ = ranks_of(2).run(run_training, settings)
    run["folder"] = str(folder)
    settings = tiny(root, parallel={**cp, "engine": "replicated"}, run=run)
    (found, printed), *_ = ranks_of(2).run(run_replicated, settings)
    for ours, fsdp2 in zip(found.losses, expected.losses, strict=True):
        assert math.isclose(ours, fsdp2, rel_tol=1e-10)
    assert found.received == expected.received
    assert "replicated over 2 on cpu" in printed
    assert set(ranks_of(2).run(parallel_of, folder)) == {"replicated"}

    half = root / "replicated-half"
    shutil.copytree(folder, half)
    shutil.rmtree(half / "checkpoints" / "step_00000006")
    resumed = replaced(settings, "run", folder=str(half), resume=True)
    (again, _), *_ = ranks_of(2).run(run_replicated, resumed)
    assert again.losses == found.losses[3:]
    assert again.validation_loss == found.validation_loss

    # Its files are known to the verification: no other one that it would read may lie there.
    newest = half / "checkpoints" / "step_00000006"
    shutil.copy(newest / STATE, newest / "more.state")
    (name, told), *_ = ranks_of(2).run(find_replicated, half)
    assert name == "step_00000003"
    assert "more.state is not in the manifest" in told[0]


@pytest.mark.usefixtures("row")
@pytest.mark.parametrize(
    "section, options, message",
    [
        (
            "model",
            {"tie_embeddings": True},
            r"model\.tie_embeddings must be False with .*, got True",
        ),
        (
            "parallel",
            {"tp": 2},
            r"parallel\.tp must be 1 with .*'replicated' \(only 'megatron' has .*, got 2",
        ),
        ("parallel", {"zero_stage": 1}, r"parallel\.zero_stage must be 3 with .*, got 1"),
    ],
    ids=["its own check", "an option of Megatron", "an option of DeepSpeed"],
)
def test_what_it_cannot_do_is_refused(
    root: Path, section: str, options: dict[str, Any], message: str
) -> None:
    settings = tiny(root, parallel={"engine": "replicated"})
    with pytest.raises(ValueError, match=message):
        replaced(settings, section, **options)


@pytest.mark.usefixtures("row")
def test_a_machine_that_it_cannot_run_on_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.device must be 'cpu', got 'cuda'"):
        SPEC.check_machine(tiny(root, parallel={"engine": "replicated"}), "cuda")


def test_an_engine_without_a_row_is_refused(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"parallel\.engine must be one of .*'deepspeed', got 'replicated'"
    ):
        tiny(root, parallel={"engine": "replicated"})
