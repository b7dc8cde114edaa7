"""The processes of a run, and what they agree on.

Ranks form a pp x dp x cp x tp grid, neighbours last: tp ranks share each block, cp ranks a
sequence, dp replicas the batch, pp stages the blocks. With FSDP2 and DeepSpeed tp and pp are 1, and
weights, gradients and optimizer state are sharded over the whole grid, flattened.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from launch.engines.registry import engine_spec
from launch.processes.startup import compare_in_group, describe, join_store, judge, show_values
from launch.settings import Settings
from nsa_dist.checks import check


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among all of them.

    Args:
        cp_mesh: the ranks that share this rank's sequence, one axis.
        flat_mesh: all ranks, one axis, in the grid's order.
    """

    rank: int
    size: int
    device: torch.device
    dp: int
    dp_rank: int
    cp: int
    cp_rank: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    cp_mesh: DeviceMesh
    flat_mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Ranks that work on one stream."""
        return self.size // self.dp

    def put(self, values: Sequence[float]) -> Tensor:
        """float64 vector on this rank's device, without waiting for it."""
        pinned = self.device.type == "cuda"
        host = torch.tensor(values, dtype=torch.float64, pin_memory=pinned)
        return host.to(self.device, non_blocking=True)

    def total(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on every rank. Does not change ``values``."""
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        result = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(result, dist.ReduceOp.MAX)
        return float(result)

    def of_all(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, equally many, on every rank. Waits for the device."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        rows: list[list[float]] = torch.stack(found).tolist()
        return rows

    def any(self, yes: bool) -> bool:
        """Whether ``yes`` is true on any rank; the same on every rank. Waits for the device."""
        return self.largest(float(yes)) > 0

    def from_main(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Wraps what each rank does alone, such as reading files. Collective when it ends.

        Raises:
            ValueError: on every rank, with the message, if any rank raised it; so no rank waits
                for one that failed.
        """
        own: ValueError | None = None
        try:
            yield
        except ValueError as error:
            own = error
        found: list[dict[str, str]] = [{}] * self.size
        dist.all_gather_object(found, {} if own is None else {"problem": str(own)})
        verdict = judge(found)
        if verdict:
            raise ValueError(verdict) from own

    def check_equal(self, option: str, value: str, must: str) -> None:
        """Refuse, on every rank, a value that differs between ranks."""
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, value)
        if len(set(found)) > 1:
            raise ValueError(f"{option} must be {must}, got {show_values(found)}")


def start_ranks(settings: Settings) -> Ranks:
    """Join the process group that torchrun describes, or one of this process alone.

    An existing process group is used.

    Raises:
        ValueError: on every rank, if a device is not there, the grid does not have the number of
            processes, or ranks were started with other options or other code.
    """
    problem = ""
    try:
        kind, device, dp = check_place(settings)
    except ValueError as error:
        # It may be on one rank only: every rank raises it.
        problem, kind = str(error), ""
    if dist.is_initialized():
        compare_in_group(describe(settings, problem, kind))
    else:
        store, rank, size = join_store(describe(settings, problem, kind))
        backend = "nccl" if kind == "cuda" else "gloo"
        device_id = device if kind == "cuda" else None
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            device_id=device_id,
            timeout=timedelta(seconds=settings.run.timeout),
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    cp, tp, pp = settings.parallel.cp, settings.parallel.tp, settings.parallel.pp
    grid = init_device_mesh(kind, (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
    flat = init_device_mesh(kind, (size,), mesh_dim_names=("dp_cp",))
    # A mesh makes its groups with torch's own timeout, whatever the default group's is.
    for group in (*grid.get_all_groups(), flat.get_group()):
        _set_pg_timeout(timedelta(seconds=settings.run.timeout), group)
    return Ranks(
        rank=rank,
        size=size,
        device=device,
        dp=dp,
        dp_rank=rank // (cp * tp) % dp,
        cp=cp,
        cp_rank=rank // tp % cp,
        tp=tp,
        tp_rank=rank % tp,
        pp=pp,
        pp_rank=rank // (dp * cp * tp),
        cp_mesh=grid["cp"],
        flat_mesh=flat,
    )


def place_on_machine() -> tuple[int, int]:
    """Number of this process on its machine, and of the run's processes there, by torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_place(settings: Settings) -> tuple[str, torch.device, int]:
    """Check that this process has what the settings need, without asking other ranks.

    Returns:
        The device's type, the device, and the number of replicas.

    Raises:
        ValueError: naming the option.
    """
    cuda = torch.cuda.is_available()
    kind = settings.run.device if settings.run.device != "auto" else ("cuda" if cuda else "cpu")
    check(kind != "cuda" or cuda, "run.device", kind, "'cpu' where no GPU is usable")
    local_rank, processes = place_on_machine()
    device = torch.device(kind)
    if kind == "cuda":
        gpus = torch.cuda.device_count()
        must = f"'cpu' with {processes} processes on {gpus} GPUs (each needs a GPU of its own)"
        check(processes <= gpus, "run.device", kind, must)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized():
        size = dist.get_world_size()
    check_dense(settings, kind)
    parallel = settings.parallel
    cp, dp, tp, pp = parallel.cp, parallel.dp, parallel.tp, parallel.pp
    engine_spec(parallel.engine).check_machine(settings, kind)
    replica = tp * pp * cp
    must = f"a divisor of the {size} processes"
    if replica == cp:
        check(size % cp == 0, "parallel.cp", cp, must)
    check(size % replica == 0, "parallel.tp x pp x cp", f"{tp} x {pp} x {cp}", must)
    must = f"-1 or {size} // (tp x pp x cp) = {size // replica}"
    check(dp in (-1, size // replica), "parallel.dp", dp, must)
    dp = size // replica
    batch, micro = settings.data.global_batch, settings.data.micro_batch
    must = f"a multiple of dp x data.micro_batch = {dp * micro}"
    check(batch % (dp * micro) == 0, "data.global_batch", batch, must)
    return kind, device, dp


def check_dense(settings: Settings, kind: str) -> None:
    """Refuse dense layers over several ranks if what they need is missing."""
    if not settings.model.has_dense or settings.parallel.cp == 1:
        return
    there = importlib.util.find_spec("ring_flash_attn") is not None
    must = "1 with dense layers where ring-flash-attn is not installed (pip install nsa-dist[ring])"
    check(there, "parallel.cp", settings.parallel.cp, must)
    # What "auto" stands for is known only here.
    wrong = (kind, settings.run.dtype) == ("cpu", "auto")
    must = "'bfloat16' with dense layers on the CPU, unless parallel.layout = 'contiguous'"
    right = not wrong or settings.parallel.layout == "contiguous"
    check(right, "run.dtype", settings.run.dtype, must)
