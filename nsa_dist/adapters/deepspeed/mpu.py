"""The ``mpu`` of ``deepspeed.initialize``, which tells DeepSpeed which ranks share a sequence.

DeepSpeed calls its methods by name to learn over which ranks ZeRO shards and by what it divides
gradients. Some methods must be missing: with ``get_data_parallel_group``, ZeRO 3 would shard
weights over the data parallel ranks only.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from nsa_dist.comm.group import GroupLike, context_group


class SequenceParallelMPU:
    """The object that ``make_mpu`` returns.

    Its model parallel group holds this rank only: DeepSpeed sums squared gradient norms over that
    group, and would use all ranks if it were None.
    """

    def __init__(
        self,
        sequence_group: dist.ProcessGroup,
        own_group: dist.ProcessGroup,
        data_parallel_rank: int,
    ) -> None:
        self._sequence_group, self._own_group = sequence_group, own_group
        self._data_parallel_rank = data_parallel_rank

    def initialize_sequence_parallel(self, *_: object, **__: object) -> None:
        """Do nothing. DeepSpeed checks that this method exists before it uses the groups below."""

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._sequence_group

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self._sequence_group)

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence_group)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks over which ZeRO shards: all."""
        group = dist.group.WORLD
        assert group is not None
        return group

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        """The number of replicas: groups of ranks that share a sequence."""
        return dist.get_world_size() // self.get_sequence_parallel_world_size()

    def get_data_parallel_rank(self) -> int:
        """The index of this rank's replica, in the order of their lowest ranks."""
        return self._data_parallel_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._own_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    # Names that DeepSpeed's universal checkpoints use.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def make_mpu(group: GroupLike, *, sequence_dim: str | None = None) -> SequenceParallelMPU:
    """The ``mpu`` for ``deepspeed.initialize``: ``group`` shares a sequence, ZeRO shards over all.

    A collective over all ranks of the job.

    Args:
        group: the ranks that share this rank's sequence, as a process group or one-dimensional
            DeviceMesh; or a DeviceMesh over all ranks with several dimensions.
        sequence_dim: name of the dimension that shares a sequence, for a mesh with several.

    Raises:
        ValueError: on every rank, if torch.distributed is not initialised, or if the groups differ
            in size or do not hold each rank once.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed must be initialised before make_mpu, by "
            "deepspeed.init_distributed() or torch.distributed.init_process_group(), got neither"
        )
    members, problem, process_group = None, None, None
    try:
        process_group = _sequence_group(group, sequence_dim)
        members = dist.get_process_group_ranks(process_group)
    except ValueError as error:
        problem = str(error)
    reports: list[tuple[list[int] | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(reports, (members, problem))
    problem = _problem(reports)
    if problem is not None:
        raise ValueError(problem)
    assert process_group is not None and members is not None
    lowest = sorted({min(ranks) for ranks, _ in reports if ranks is not None})
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return SequenceParallelMPU(process_group, own, lowest.index(min(members)))


def _sequence_group(group: GroupLike, sequence_dim: str | None) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh) and group.ndim > 1:
        names = group.mesh_dim_names
        if names is None or sequence_dim not in names:
            raise ValueError(
                "sequence_dim must be the dimension that shares a sequence, of a DeviceMesh with "
                f"dimensions {names or group.ndim}, got {sequence_dim!r}"
            )
        group = group[sequence_dim]
    elif sequence_dim is not None:
        raise ValueError(
            f"sequence_dim must be None with a single group or dimension, got {sequence_dim!r}"
        )
    if group is None:
        raise ValueError(
            "group must be a process group or DeviceMesh (of this rank alone for sequences that "
            "are not split), got None"
        )
    process_group = context_group(group).process_group
    assert process_group is not None
    return process_group


def _problem(reports: list[tuple[list[int] | None, str | None]]) -> str | None:
    """The error if the ranks' groups do not split the world into equal parts, or None."""
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
    if problems:
        return "; ".join(problems)
    groups = sorted({tuple(ranks) for ranks, _ in reports if ranks is not None})
    sizes = {len(ranks) for ranks in groups}
    if len(sizes) > 1 or sorted(rank for ranks in groups for rank in ranks) != [
        *range(len(reports))
    ]:
        shown = ", ".join(map(str, map(list, groups)))
        return (
            f"groups must be of one size and hold each of the {len(reports)} ranks once, got ranks "
            f"{shown}"
        )
    return None
