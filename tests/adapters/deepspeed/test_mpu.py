"""Which ranks DeepSpeed is told of, and what it makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.adapters.deepspeed.small_model import Case, config_of, make_model, prepare
from tests.distributed.ranks import Ranks

pytest.importorskip("deepspeed")

GetRanks = Callable[[int], Ranks]


def members(given: str) -> dict[str, Any]:
    """On every rank: what the mpu of a 2 x 2 grid answers, made from a mesh or a group."""
    from nsa_dist.adapters.deepspeed import make_mpu

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    if given == "mesh":
        mpu = make_mpu(mesh, sequence_dim="sp")
    else:
        mpu = make_mpu(mesh["sp"] if given == "dimension" else mesh["sp"].get_group())
    found = {
        name: getattr(mpu, f"get_{name}")()
        for kind in ("sequence", "sequence_data", "data", "model", "tensor_model")
        for name in (f"{kind}_parallel_world_size", f"{kind}_parallel_rank")
    }
    for kind in ("sequence", "sequence_data", "model"):
        group = getattr(mpu, f"get_{kind}_parallel_group")()
        found[f"{kind}_parallel_group"] = dist.get_process_group_ranks(group)
    # ZeRO 3 would cut weights over it.
    assert not hasattr(mpu, "get_data_parallel_group")
    return found


@pytest.mark.parametrize("given", ["mesh", "dimension", "group"])
def test_sizes_and_ranks_are_those_of_one_mesh_or_group(
    deepspeed_ranks: GetRanks, given: str
) -> None:
    for rank, found in enumerate(deepspeed_ranks(4).run(members, given)):
        assert found == {
            "sequence_parallel_world_size": 2,
            "sequence_parallel_rank": rank % 2,
            "sequence_parallel_group": [0, 1] if rank < 2 else [2, 3],
            "sequence_data_parallel_world_size": 4,
            "sequence_data_parallel_rank": rank,
            "sequence_data_parallel_group": [0, 1, 2, 3],
            "data_parallel_world_size": 2,
            "data_parallel_rank": rank // 2,
            "model_parallel_world_size": 1,
            "model_parallel_rank": 0,
            "model_parallel_group": [rank],
            "tensor_model_parallel_world_size": 1,
            "tensor_model_parallel_rank": 0,
        }


def refused(what: str) -> str:
    from nsa_dist.adapters.deepspeed import make_mpu

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    rank = dist.get_rank()
    arguments: dict[str, Any] = {
        "none": {"group": None},
        "no dimension": {"group": mesh},
        "wrong dimension": {"group": mesh, "sequence_dim": "cp"},
        "too many": {"group": mesh["sp"], "sequence_dim": "sp"},
        "overlapping": {"group": mesh["sp" if rank < 2 else "dp"]},
        "one rank": {"group": mesh["sp"].get_group() if rank else "sp"},
    }[what]
    with pytest.raises(ValueError) as error:
        make_mpu(**arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "what, message",
    [
        ("none", r"group must be a process group or DeviceMesh .*, got None"),
        (
            "no dimension",
            r"sequence_dim must be .* DeviceMesh with dimensions \('dp', 'sp'\), got None",
        ),
        ("wrong dimension", "sequence_dim must be .* DeviceMesh .*, got 'cp'"),
        ("too many", "sequence_dim must be None with a single group or dimension, got 'sp'"),
        (
            "overlapping",
            r"groups must be of one size .* 4 ranks .*, got ranks \[0, 1\], \[0, 2\], \[1, 3\]",
        ),
        ("one rank", "rank 0: group must be a process group .*, got 'sp'"),
    ],
)
def test_groups_that_do_not_fit_are_refused_on_every_rank(
    deepspeed_ranks: GetRanks, what: str, message: str
) -> None:
    for found in deepspeed_ranks(4).run(refused, what):
        assert re.search(message, found), found


def test_without_torch_distributed_it_is_refused() -> None:
    from nsa_dist.adapters.deepspeed import make_mpu

    with pytest.raises(ValueError, match=r"torch\.distributed must be initialised before make_mpu"):
        make_mpu(None)


def loaded_samples() -> list[int]:
    """On every rank: which samples DeepSpeed's own data loader reads."""
    deepspeed = prepare()
    from nsa_dist.adapters.deepspeed import make_mpu

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    mpu = make_mpu(mesh["sp"])
    model = make_model(mpu.get_sequence_parallel_group())
    _, _, loader, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        config=config_of(Case(2, dp=2, cp=2)),
        mpu=mpu,
        training_data=torch.utils.data.TensorDataset(torch.arange(8)),
    )
    return list(loader.data_sampler)


def test_replicas_get_samples_of_their_own_and_ranks_of_one_sequence_the_same(
    deepspeed_ranks: GetRanks,
) -> None:
    first, second, third, fourth = deepspeed_ranks(4).run(loaded_samples)
    assert first == second
    assert third == fourth
    assert sorted(first + third) == list(range(8))


def layer_under_zero_init() -> list[float]:
    """On every rank: the gates' last bias of a layer that ZeRO 3 cuts as it is made."""
    deepspeed = prepare()
    from nsa_dist import NativeSparseAttention, NSAConfig

    found = []
    for gate in ("linear", "mlp"):
        config = NSAConfig(4, 2, 8, gate=gate, gate_init=(0.5, -1.0, 2.0))  # type: ignore[arg-type]
        with deepspeed.zero.Init(config_dict_or_path=config_of(Case(3, cp=2))):
            layer = NativeSparseAttention(16, config)
        bias = (layer.gate.proj if gate == "linear" else layer.gate.down).bias
        with deepspeed.zero.GatheredParameters([bias]):
            found += bias.tolist()
    return found


def test_a_layer_can_be_made_under_zero_init(deepspeed_ranks: GetRanks) -> None:
    assert deepspeed_ranks(2).run(layer_under_zero_init) == [[0.5, -1.0, 2.0] * 8] * 2
