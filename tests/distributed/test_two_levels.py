"""The fetch over nodes of several ranks: once a node, then shared inside it.

Nodes are emulated: ``ranks_per_node`` says which ranks of one machine are one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nsa_dist import (
    BRANCHES,
    BlockCompressor,
    NativeSparseAttention,
    NSAConfig,
    make_sharding,
    native_sparse_attention,
)
from nsa_dist.comm import collectives, fetch, two_levels
from nsa_dist.comm import hosts as hosts_module
from nsa_dist.comm.nodes import Nodes, nodes_of_neighbours
from nsa_kernels.reference import ReferenceOptions, nsa_reference
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    run_built_layer,
    run_layer,
    token_owners,
    variants,
)
from tests.distributed.ranks import Ranks
from tests.distributed.test_communication import padded_length
from tests.distributed.test_layer_behaviour import assert_2x_of_plain
from tests.distributed.test_order import Recorder as MessageRecorder
from tests.ops.accuracy import assert_2x

RanksOf = Callable[[int], Ranks]

HEADS = 4
PACKED = (1, 60, 3, 97, 0, 45, 11)
CASE = variants(LayerCase(lengths=PACKED), num_kv_heads=HEADS, num_heads=2 * HEADS)
LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
SPLITS = {"2x2": (4, 2), "2x4": (8, 4), "4x2": (8, 2)}
"""Nodes x ranks of each, as (ranks, ranks of a node)."""
OPTIONS: dict[str, dict[str, Any]] = {
    "kept": {"fetch_again": False},
    "fetched-again": {"fetch_again": True},
    "recomputed": {"fetch_again": True, "recompute_branches": BRANCHES},
}
CASES = {
    f"{layout}-{name}": replace(CASE, layout=layout, lengths=lengths)
    for layout in LAYOUTS
    for name, lengths in (("one-document", None), ("packed", PACKED))
}
EMPTY = {
    "nobody-fetches": (40,) * 4,
    "one-fetches": (40, 40, 60, 20),
    "ranks-without-tokens": (3, 1),
}
"""Documents in contiguous chunks."""


def equal(a: LayerResult, b: LayerResult) -> bool:
    tensors = [(a.output, b.output), (a.grad_input, b.grad_input)]
    tensors += [(a.grads[name], b.grads[name]) for name in a.grads]
    return all(torch.equal(x, y) for x, y in tensors)


# --- bytes ----------------------------------------------------------------------------------------

COUNTED = replace(CASE, lengths=(16, 128, 16))


@dataclass
class Counted:
    """Choices of the whole stream, and what one rank received and sent, in bytes by kind."""

    selected: Tensor
    received: dict[str, int]
    far: dict[str, int]
    far_sent: dict[str, int]


def counted(case: LayerCase, ranks_per_node: int, options: dict[str, Any]) -> Counted:
    return counted_layer(
        case.layer(dist.group.WORLD, ranks_per_node=ranks_per_node, **options), case
    )


def counted_layer(layer: NativeSparseAttention, case: LayerCase) -> Counted:
    layer.communication.reset()
    result = run_built_layer(layer, case, dist.group.WORLD)
    assert result.selected is not None
    counter = layer.communication
    return Counted(
        result.selected,
        dict(counter.received),
        dict(counter.received_between_nodes),
        dict(counter.sent_between_nodes),
    )


def chosen_tokens(selected: Tensor, case: LayerCase, size: int) -> list[dict[tuple[int, ...], int]]:
    """Of each rank, the tokens of the blocks that it chose, by (head, document, block, owner)."""
    owner, select = token_owners(case, size), case.config.select_block
    assert case.cu_seqlens is not None
    found: list[dict[tuple[int, ...], int]] = [{} for _ in range(size)]
    for d, start in enumerate(case.cu_seqlens[:-1].tolist()):
        for t, rank in enumerate(owner[d]):
            for g in range(HEADS):
                for j in set(selected[0, start + t, g].tolist()) - {-1}:
                    tokens = min(select, padded_length(case, size, d) - j * select)
                    found[rank][g, d, j, owner[d][j * select]] = tokens
    return found


def carried_for(chosen: list[dict[tuple[int, ...], int]], nodes: Nodes, rank: int) -> list[int]:
    """Tokens that each rank of a node wants of a carrier, and that the carrier fetches for all."""
    carries, union = set(nodes.counterparts(rank)) - {rank}, {}
    found = []
    for mate in nodes.mates(rank):
        wanted = {key: n for key, n in chosen[mate].items() if key[-1] in carries}
        found.append(sum(wanted.values()))
        union |= wanted
    return [*found, sum(union.values())]


def expected_tokens(chosen: list[dict[tuple[int, ...], int]], nodes: Nodes, rank: int) -> list[int]:
    """What a rank receives of its node's owners, of other nodes, and shared by its node."""
    wanted = chosen[rank]
    near = sum(n for key, n in wanted.items() if key[-1] != rank and nodes.together(key[-1], rank))
    carries = set(nodes.counterparts(rank)) - {rank}
    *_, far = carried_for(chosen, nodes, rank)
    shared = sum(
        n
        for key, n in wanted.items()
        if not nodes.together(key[-1], rank) and key[-1] not in carries
    )
    return [near, far, shared]


COUNTED_QUICKLY = {("contiguous", "2x2"), ("zigzag", "4x2"), ("zigzag_per_document", "2x4")}


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        pytest.param(*case, marks=[] if case in COUNTED_QUICKLY else pytest.mark.slow)
        for case in itertools.product(LAYOUTS, SPLITS)
    ],
)
def test_a_block_crosses_nodes_once_for_all_who_chose_it(
    layout: str, split: str, ranks_of: RanksOf
) -> None:
    (size, ranks_per_node), case = SPLITS[split], replace(COUNTED, layout=layout)
    nodes = nodes_of_neighbours(ranks_per_node, size)
    assert nodes is not None
    found = ranks_of(size).run(counted, case, ranks_per_node, {"fetch_again": False})
    chosen = chosen_tokens(found[0].selected, case, size)
    width = (case.config.head_dim + case.config.value_dim) * case.dtype.itemsize
    for rank, one in enumerate(found):
        near, far, shared = expected_tokens(chosen, nodes, rank)
        assert one.received["fetch"] == width * (near + far)
        assert one.far["fetch"] == width * far
        assert one.received["share"] == width * shared
        assert one.far["share"] == one.far["share_grad"] == 0
        # Gradients return by the way that the blocks came.
        assert one.far_sent["fetch_grad"] == one.far["fetch"]
        assert one.far["fetch_grad"] == one.far_sent["fetch"]
    assert sum(one.received["share"] for one in found) > 0
    assert sum(one.received["share_grad"] for one in found) > 0
    if size == 8:  # Ranks of a node choose in part alike; of fewer, all want the same.
        of_carriers = [carried_for(chosen, nodes, rank) for rank in range(size)]
        assert any(max(of_mates) < union < sum(of_mates) for *of_mates, union in of_carriers)


def test_bytes_between_nodes_are_counted_on_one_level_too(ranks_of: RanksOf) -> None:
    """``fetch="full"`` stays on one level, beside which two are compared."""
    nodes = nodes_of_neighbours(2, 4)
    assert nodes is not None
    full = ranks_of(4).run(counted, COUNTED, 2, {"fetch": "full", "fetch_again": False})
    two = ranks_of(4).run(counted, COUNTED, 2, {"fetch_again": False})
    for rank, (one, by_nodes) in enumerate(zip(full, two, strict=True)):
        assert "share" not in one.received and "request" not in one.received
        # Each kind between nodes is a part of all that was received; halos and gathers as before.
        assert all(one.far[kind] <= one.received[kind] for kind in one.far)
        assert one.received["gather"] == by_nodes.received["gather"]
        others = 4 - len(nodes.mates(rank))
        assert one.far["gather"] * 3 == one.received["gather"] * others
    far = sum(one.far["fetch"] for one in full)
    assert sum(one.received["fetch"] for one in full) > far
    assert far > sum(one.far["fetch"] for one in two) > 0


# --- bits and accuracy ----------------------------------------------------------------------------


def same_bits(case: LayerCase, ranks_per_node: int) -> tuple[bool, bool, LayerResult | None]:
    """Whether two levels give the forward bits of one, whether their gradients' bits are the same
    again and with each option for memory, and on rank 0 the result."""
    group = dist.group.WORLD
    one_level = run_layer(case, group, ranks_per_node=1)
    results = [
        run_layer(case, group, ranks_per_node=ranks_per_node, **options)
        for options in OPTIONS.values()
    ]
    recomputed = replace(case, checkpoint=True)
    results.append(run_layer(recomputed, group, ranks_per_node=ranks_per_node))
    forward = torch.equal(results[0].output, one_level.output)
    repeats = all(equal(one, results[0]) for one in results[1:])
    return forward, repeats, results[0] if dist.get_rank() == 0 else None


QUICK = {("zigzag-packed", "2x2"), ("contiguous-packed", "2x2"), ("zigzag-one-document", "4x2")}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, SPLITS)
    ],
)
def test_two_levels_change_no_bit_of_forward(name: str, split: str, ranks_of: RanksOf) -> None:
    size, ranks_per_node = SPLITS[split]
    found = ranks_of(size).run(same_bits, CASES[name], ranks_per_node)
    assert all(forward and repeats for forward, repeats, _ in found)
    assert_results_close(found[0][2], run_layer(CASES[name]), 1e-12)


def result_of(case: LayerCase, ranks_per_node: int, options: dict[str, Any]) -> LayerResult | None:
    result = run_layer(case, dist.group.WORLD, ranks_per_node=ranks_per_node, **options)
    return result if dist.get_rank() == 0 else None


@pytest.mark.parametrize("split", ["2x2", pytest.param("4x2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_float32_is_within_twice_plain_error(layout: str, split: str, ranks_of: RanksOf) -> None:
    (size, ranks_per_node), case = SPLITS[split], replace(CASE, layout=layout, dtype=torch.float32)
    assert_2x_of_plain(case, ranks_of(size).run(result_of, case, ranks_per_node, {})[0])


def bfloat16_gradients(ranks_per_node: int) -> tuple[dict[str, Tensor], Tensor]:
    """Whole gradients of keys and values [T, G, D] that every rank reads, and the choices."""
    group, inputs = dist.group.WORLD, bfloat16_inputs()
    sharding = make_sharding(BFLOAT16_LENGTH, layout="zigzag", group=group)
    local = {name: sharding.shard(x[None]).requires_grad_() for name, x in inputs.items()}
    out, details = native_sparse_attention(
        *(local[name] for name in ("q", "k", "v", "gates")),
        BlockCompressor(BFLOAT16, BFLOAT16.head_dim).bfloat16(),
        config=BFLOAT16,
        group=group,
        ranks_per_node=ranks_per_node,
        return_details=True,
    )
    out.backward(sharding.shard(inputs["grad"][None]))
    grads = {name: sharding.unshard(local[name].grad)[0] for name in ("q", "k", "v")}
    assert details.selected is not None
    return grads, sharding.unshard(details.selected)[0]


BFLOAT16_LENGTH = 256
BFLOAT16 = NSAConfig(
    4,
    2,
    16,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=6,
    window=8,
    compress="mean",
    branches=("selected",),
    independent_kv=False,
)


def bfloat16_inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    heads = {"q": 4, "k": 2, "v": 2, "grad": 4}
    drawn = {name: torch.randn(BFLOAT16_LENGTH, n, 16) for name, n in heads.items()}
    drawn["gates"] = torch.rand(BFLOAT16_LENGTH, 4, 1)
    return {name: x.bfloat16() for name, x in drawn.items()}


@pytest.mark.parametrize("split", ["2x2", "4x2"])
def test_bfloat16_is_within_twice_plain_error(split: str, ranks_of: RanksOf) -> None:
    """A carrier rounds what it adds once more than one level does."""
    size, ranks_per_node = SPLITS[split]
    ours, selected = ranks_of(size).run(bfloat16_gradients, ranks_per_node)[0]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = {name: x.to(dtype).requires_grad_() for name, x in bfloat16_inputs().items()}
        result = nsa_reference(
            *(inputs[name] for name in ("q", "k", "v", "gates")),
            ReferenceOptions.from_config(BFLOAT16),
            selected=selected,
        )
        result.output.backward(inputs["grad"].detach())
        found.append({name: inputs[name].grad for name in ("q", "k", "v")})
    plain, exact = found
    for name, grad in ours.items():
        assert_2x(grad, plain[name], exact[name], torch.bfloat16, name, heads=True)


# --- ranks with nothing, several groups, other nodes ----------------------------------------------


@pytest.mark.parametrize("name", EMPTY)
def test_ranks_that_have_nothing_finish_with_the_others(name: str, ranks_of: RanksOf) -> None:
    case = replace(CASE, lengths=EMPTY[name], layout="contiguous")
    found = ranks_of(4).run(result_of, case, 2, {"fetch_again": True})
    assert_results_close(found[0], run_layer(case), 1e-12)


def groups_at_once(case: LayerCase) -> bool:
    """Layers of two groups with other nodes, whose forwards and backwards alternate."""
    pairs = [[0, 2], [1, 3]]
    mesh = DeviceMesh("cpu", pairs, mesh_dim_names=("node", "local"))
    layers = [
        case.layer(dist.new_group(), ranks_per_node=2),
        case.layer(mesh),
        case.layer(dist.group.WORLD, ranks_per_node=1),
    ]
    sharding, (x, grad) = case.sharding(dist.group.WORLD), case.inputs()
    expected = [run_built_layer(layer, case, dist.group.WORLD) for layer in layers]
    inputs = [sharding.shard(x).requires_grad_() for _ in layers]
    outputs = [
        layer(local, cu_seqlens=sharding.cu_seqlens)
        for layer, local in zip(layers, inputs, strict=True)
    ]
    same = True
    for local, out, wanted in zip(inputs, outputs, expected, strict=True):
        out.backward(sharding.shard(grad))
        assert local.grad is not None
        same &= torch.equal(sharding.unshard(out), wanted.output)
        same &= torch.equal(sharding.unshard(local.grad), wanted.grad_input)
        same &= torch.equal(wanted.output, expected[-1].output)
    return same


def test_groups_with_other_nodes_at_once(ranks_of: RanksOf) -> None:
    assert all(ranks_of(4).run(groups_at_once, CASE))


def far_over_mesh(case: LayerCase) -> Counted:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    return counted_layer(case.layer(mesh, fetch_again=False), case)


def far_by_hosts(case: LayerCase, hosts: tuple[str, ...]) -> tuple[Counted, int]:
    """As if ranks were on these hosts; and how often the group's ranks told each other."""
    group, told = dist.new_group(), []

    def host_name() -> str:
        told.append(1)
        return hosts[dist.get_rank()]

    original, hosts_module.host_name = hosts_module.host_name, host_name  # type: ignore[assignment]
    try:
        for _ in range(2):
            found = counted_layer(case.layer(group, fetch_again=False), case)
    finally:
        hosts_module.host_name = original
    return found, len(told)


def test_a_mesh_of_nodes_and_hosts_say_who_is_together(ranks_of: RanksOf) -> None:
    expected = ranks_of(4).run(counted, COUNTED, 2, {"fetch_again": False})
    assert any(one.received["share"] for one in expected)
    for one, wanted in zip(ranks_of(4).run(far_over_mesh, COUNTED), expected, strict=True):
        assert (one.received, one.far) == (wanted.received, wanted.far)
    found = ranks_of(4).run(far_by_hosts, COUNTED, ("a", "a", "b", "b"))
    for (one, told), wanted in zip(found, expected, strict=True):
        assert (one.received, one.far) == (wanted.received, wanted.far)
        assert told == 1


def by_several_hosts(case: LayerCase) -> list[Counted]:
    """On one host, alone, unequally many, and some alone."""
    return [far_by_hosts(case, tuple(hosts))[0] for hosts in ("aaaa", "abcd", "aaab", "aabc")]


def test_one_level_where_hosts_make_no_second(ranks_of: RanksOf) -> None:
    for found in ranks_of(4).run(by_several_hosts, replace(COUNTED, lengths=(24, 40))):
        assert all("share" not in one.received and not one.far for one in found)


# --- the order of messages ------------------------------------------------------------------------


def kinds_of_messages(case: LayerCase, again: bool) -> tuple[list[str], list[str]]:
    layer = case.layer(dist.group.WORLD, ranks_per_node=2, fetch_again=again)
    recorder = MessageRecorder()
    layer.setup = replace(layer.setup, counter=recorder)
    sharding, (x, grad) = case.sharding(dist.group.WORLD), case.inputs()
    out = layer(sharding.shard(x).requires_grad_(), cu_seqlens=sharding.cu_seqlens)
    passed = len(recorder.messages)
    out.backward(sharding.shard(grad))
    kinds = [kind for kind, *_ in recorder.messages]
    return kinds[:passed], kinds[passed:]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "fetched-again"])
def test_order_of_messages(again: bool, ranks_of: RanksOf) -> None:
    fetch, back = ["fetch", "share"], ["share_grad", "fetch_grad"]
    for forward, backward in ranks_of(4).run(kinds_of_messages, CASE, again):
        requests = ["request", "request"]
        assert forward == ["plan", *["halo"] * 3, "gather", *requests, *fetch * HEADS]
        middle = back * HEADS
        if again:
            middle = [*fetch * 2, *(back + fetch) * (HEADS - 2), *back * 2]
        assert backward == ["plan", *middle, "gather_grad", *["halo_grad"] * 3]


LATE_AT = ("request", "share", "share_grad", "fetch_grad")
"""Where each of four ranks is late."""


def late_result(case: LayerCase) -> bool:
    """Whether bits stay where ranks are late at the messages of two levels."""
    group = dist.group.WORLD
    options = {"ranks_per_node": 2, "fetch_again": True}
    expected, original = run_layer(case, group, **options), two_levels.begin_all_to_all

    def begin(*args: Any, **given: Any) -> Any:
        if args[-1] == LATE_AT[dist.get_rank()]:
            time.sleep(0.1)
        return original(*args, **given)

    two_levels.begin_all_to_all = begin  # type: ignore[assignment]
    try:
        return equal(run_layer(case, group, **options), expected)
    finally:
        two_levels.begin_all_to_all = original


def test_a_late_rank_changes_no_bit(ranks_of: RanksOf) -> None:
    assert all(ranks_of(4).run(late_result, CASE))


# --- refusals -------------------------------------------------------------------------------------


def refusals(case: LayerCase) -> list[str]:
    """Errors of a layer, of the function, of a mesh, and of ranks that differ."""
    group, found = dist.group.WORLD, []
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    other = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    rank = dist.get_rank()
    calls: list[Callable[[], Any]] = [
        lambda: case.layer(group, ranks_per_node=3),
        lambda: case.layer(group, ranks_per_node=True),
        lambda: case.layer(mesh, ranks_per_node=2),
        lambda: case.layer(other),
        lambda: run_layer(case, group, ranks_per_node=2 if rank else 1),
        lambda: native_sparse_attention(
            *[torch.ones(1, 4, 2, 2)] * 4,
            config=case.config,
            group=group,
            ranks_per_node=3 if rank == 3 else 2,
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    return found


def test_nodes_that_do_not_fit_are_refused_on_every_rank(ranks_of: RanksOf) -> None:
    must = (
        "ranks_per_node must be None or a divisor of the group's 4 ranks (1, one level, where "
        "nodes have unequally many), got "
    )
    for found in ranks_of(4).run(refusals, CASE):
        assert found[:2] == [f"{must}3", f"{must}True"]
        assert found[2] == (
            "ranks_per_node must be None with a DeviceMesh of ('node', 'local'), which says it "
            "itself, got 2"
        )
        assert found[3] == (
            'group must be a process group, a one-dimensional DeviceMesh such as mesh["cp"], one '
            "with dimensions ('node', 'local'), or None, got a mesh with dimensions ('dp', 'cp')"
        )
        assert "ranks_per_node must be equal on all ranks, got rank 0: 1, rank 1: 2" in found[4]
        assert f"rank 3: {must}3" in found[5]


# --- on GPUs, over NCCL, whose streams are real ---------------------------------------------------

CYCLES = 20_000_000
"""About ten milliseconds, longer than anything that a small case computes."""


def bits_on_gpus(case: LayerCase) -> tuple[bool, bool, bool]:
    """Whether the forward has the bits of one level, whether gradients repeat with each option
    for memory, and whether bits stay where devices are late at messages and memory is reused."""
    forward, repeats, _ = same_bits(case, 2)
    group, options = dist.group.WORLD, {"ranks_per_node": 2, "fetch_again": True}
    expected, original = run_layer(case, group, **options), collectives.begin_all_to_all
    begun: list[str] = []

    def late(*args: Any, **given: Any) -> Any:
        if len(begun) % dist.get_world_size() == dist.get_rank():
            torch.cuda._sleep(CYCLES)
        begun.append(args[-1])
        work = original(*args, **given)
        torch.cuda._sleep(CYCLES // 10)
        for _ in range(3):
            torch.full((args[0].numel() + 64,), float("nan"), device="cuda")
        return work

    for module in (fetch, two_levels):
        module.begin_all_to_all = late  # type: ignore[attr-defined]
    try:
        same = equal(run_layer(case, group, **options), expected)
    finally:
        for module in (fetch, two_levels):
            module.begin_all_to_all = original  # type: ignore[attr-defined]
    return forward, repeats, same and {"share", "share_grad"} <= {*begun}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("gpus", [4], indirect=True, ids="{}_ranks".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_over_nccl(layout: str, gpus: Ranks) -> None:
    case = replace(CASE, layout=layout, dtype=torch.float32, device="cuda")
    assert gpus.run(bits_on_gpus, case) == [(True, True, True)] * 4


@pytest.mark.multi_gpu
@pytest.mark.parametrize("gpus", [4], indirect=True, ids="{}_ranks".format)
def test_bytes_over_nccl(gpus: Ranks) -> None:
    case = replace(COUNTED, device="cuda")
    found = gpus.run(counted, case, 2, {"fetch_again": False})
    nodes = nodes_of_neighbours(2, 4)
    assert nodes is not None
    chosen = chosen_tokens(found[0].selected.cpu(), case, 4)
    width = (case.config.head_dim + case.config.value_dim) * case.dtype.itemsize
    for rank, one in enumerate(found):
        near, far, shared = (width * n for n in expected_tokens(chosen, nodes, rank))
        assert (one.received["fetch"], one.far["fetch"]) == (near + far, far)
        assert one.received["share"] == shared
