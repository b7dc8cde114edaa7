"""What travels while what computes, and what is kept for backward: the schedule of the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from nsa_dist import BRANCHES, CommunicationCounter
from nsa_dist.comm import fetch, gather, halo
from nsa_kernels import pytorch
from tests.distributed.layer_case import SMALL, LayerCase, LayerResult, run_layer, variants
from tests.distributed.ranks import Ranks
from tests.distributed.test_order import Recorder

HEADS = 4
CASE = variants(LayerCase(lengths=(60, 97, 45)), num_kv_heads=HEADS, num_heads=2 * HEADS)


# --- what stands between the beginning and the end of a transfer ----------------------------------


class Log:
    """What one rank does, in order: 'begin fetch', 'end fetch', 'selected', 'selected_grad', ..."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def while_travelling(self, kind: str) -> list[list[str]]:
        """For each transfer of a kind, what is computed between its beginning and its end."""
        begun = [at for at, step in enumerate(self.steps) if step == f"begin {kind}"]
        ended = [at for at, step in enumerate(self.steps) if step == f"end {kind}"]
        assert len(begun) == len(ended)
        return [
            [step for step in self.steps[a:b] if " " not in step]
            for a, b in zip(begun, ended, strict=True)
        ]


class _Logged(torch.autograd.Function):
    """The identity, whose backward logs that the branch's own comes next."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, name: str, log: Log) -> Tensor:
        ctx.name, ctx.log = name, log
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.steps.append(f"{ctx.name}_grad")
        return grad, None, None


@contextmanager
def logged() -> Iterator[Log]:
    """Logs messages and branches of the PyTorch backend."""
    log = Log()
    branches = ("window_attention", "compressed_attention", "selected_attention", "compress")
    places: list[tuple[Any, str]] = [(pytorch, name) for name in branches]
    places += [(module, "begin_all_to_all") for module in (halo, gather, fetch)]
    places.append((gather, "begin_all_gather"))
    originals = [getattr(module, name) for module, name in places]

    def branch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        name = name.removesuffix("_attention")

        def call(*args: Any, **options: Any) -> Any:
            log.steps.append(name)
            found = original(*args, **options)
            if isinstance(found, Tensor):
                return _Logged.apply(found, name, log)
            *others, last = found
            if "gate" in options:  # The gradient comes through the summand.
                return *others, _Logged.apply(last, name, log)
            return _Logged.apply(found[0], name, log), *found[1:]

        return call

    def transfer(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            kind = args[-1]
            log.steps.append(f"begin {kind}")
            work = original(*args, **options)

            def ended(result: Any) -> Any:
                log.steps.append(f"end {kind}")
                return result

            return work.then(ended)

        return call

    for (module, name), original in zip(places, originals, strict=True):
        of_branch = module is pytorch
        setattr(module, name, branch(name, original) if of_branch else transfer(original))
    try:
        yield log
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def travelling(case: LayerCase, again: bool) -> dict[str, list[list[str]]]:
    layer = case.layer(dist.group.WORLD, fetch_again=again)
    sharding = case.sharding(dist.group.WORLD)
    x, grad = case.inputs()
    local = sharding.shard(x).requires_grad_()
    kinds = ("halo", "gather", "request", "fetch", "fetch_grad", "gather_grad", "halo_grad")
    with logged() as log:
        layer(local, cu_seqlens=sharding.cu_seqlens).backward(sharding.shard(grad))
    return {kind: log.while_travelling(kind) for kind in kinds}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "fetched-again"])
def test_transfers_travel_behind_computation(again: bool, ranks_of: Callable[[int], Ranks]) -> None:
    for found in ranks_of(2).run(travelling, CASE, again):
        # Compression, of keys and of values, needs the first halo and hides the others.
        assert found["halo"] == [[], ["compress"] * 2, ["compress"] * 2]
        assert found["request"] == [["window"]]
        first, *others = found["fetch"][:HEADS]
        assert first == []
        assert others == [["selected"]] * (HEADS - 1)
        # Gradients of the last head come first. Those of the first head, which are the last, have
        # what is left of the branches.
        *middle, last = found["fetch_grad"]
        assert middle == [["selected_grad"]] * (HEADS - 1)
        assert last == ["window_grad", "compressed_grad"]
        assert len(found["gather_grad"]) == 1
        *_, of_compressed = found["halo_grad"]
        assert of_compressed == []
        assert found["halo_grad"][:-1] == [["compress_grad"] * 2] * 2
        if again:
            first, *others = found["fetch"][HEADS:]
            assert first == []
            assert others == [["selected_grad"]] * (HEADS - 1)
        else:
            assert len(found["fetch"]) == HEADS


# --- less memory, the same bits -------------------------------------------------------------------

MEMORY: dict[str, dict[str, Any]] = {
    "fetched-again": {"fetch_again": True},
    "recomputed": {"fetch_again": False, "recompute_branches": BRANCHES},
    "both": {"fetch_again": True, "recompute_branches": BRANCHES},
    "full": {"fetch_again": True, "fetch": "full"},
}
PACKED = replace(CASE, lengths=(1, 60, 3, 97, 0, 45, 11), dtype=torch.float32)
CASES = {
    "packed": PACKED,
    "one-document": replace(CASE, lengths=None, dtype=torch.float32),
    "shared-kv": variants(PACKED, independent_kv=False),
    "recomputation": replace(PACKED, checkpoint=True),
    "selected-only": variants(PACKED, branches=("selected",)),
    # Most ranks have no token.
    "few-tokens": replace(PACKED, lengths=(3, 1), layout="contiguous"),
    # Every document is on one rank: no rank fetches anything.
    "nothing-to-fetch": replace(PACKED, lengths=(40,) * 4, layout="contiguous"),
}


def same_bits(a: LayerResult, b: LayerResult) -> bool:
    tensors = [(a.output, b.output), (a.grad_input, b.grad_input)]
    tensors += [(a.grads[name], b.grads[name]) for name in a.grads]
    return all(torch.equal(x, y) for x, y in tensors)


def with_less_memory(case: LayerCase) -> dict[str, bool]:
    """Which of the options give the bits of none."""
    group = dist.group.WORLD
    expected = run_layer(case, group, fetch_again=False)
    found = {}
    for name, given in MEMORY.items():
        branches = given.get("recompute_branches", ())
        used = tuple(branch for branch in branches if branch in case.config.branches)
        options = {**given, "recompute_branches": used}
        found[name] = same_bits(run_layer(case, group, **options), expected)
    return found


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) for name in CASES] + [("packed", 1), ("packed", 4), ("recomputation", 4)],
)
def test_options_for_memory_change_no_bit(
    name: str, size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    for found in ranks_of(size).run(with_less_memory, CASES[name]):
        assert found == dict.fromkeys(MEMORY, True)


def of_all_visible(case: LayerCase) -> tuple[list[str], dict[int, int], dict[int, int]]:
    """Kinds of messages of a forward, and bytes by head, of all visible blocks and of chosen."""
    recorder = Recorder()
    layers = [case.layer(dist.group.WORLD, fetch=fetch) for fetch in ("full", "chosen")]
    layers[0].setup = replace(layers[0].setup, counter=recorder)
    sharding = case.sharding(dist.group.WORLD)
    local = sharding.shard(case.inputs()[0])
    for layer in layers:
        layer(local, cu_seqlens=sharding.cu_seqlens)
    kinds = [kind for kind, *_ in recorder.messages]
    return kinds, dict(recorder.fetched_per_head), dict(layers[1].communication.fetched_per_head)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_per_document"])
def test_all_visible_blocks_without_a_request(
    layout: str, ranks_of: Callable[[int], Ranks]
) -> None:
    few = variants(replace(PACKED, layout=layout), num_selected=4)
    all_chosen = variants(few, num_selected=16)  # Each query chooses all that it sees.
    for case in (few, all_chosen):
        for kinds, full, chosen in ranks_of(2).run(of_all_visible, case):
            assert kinds == ["plan", *["halo"] * 3, "gather", *["fetch"] * HEADS]
            assert all(full[g] >= chosen[g] for g in range(HEADS))
            assert (full == chosen) or case is few


def backwards(case: LayerCase, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the input, kept and fetched again, in an unusual backward."""
    sharding = case.sharding(dist.group.WORLD)
    x, grad = case.inputs()
    grad = sharding.shard(grad)
    found = []
    for options in ({"fetch_again": False}, MEMORY["both"]):
        layer = case.layer(dist.group.WORLD, **options)
        local = sharding.shard(x).requires_grad_()

        def forward(local: Tensor, layer: nn.Module = layer) -> Any:
            return layer(local, cu_seqlens=sharding.cu_seqlens)

        if name == "twice":
            out = forward(local)
            grads = [torch.autograd.grad(out, local, grad, retain_graph=True)[0] for _ in range(3)]
            assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
        elif name == "moved-to-host":
            with save_on_cpu():
                out = forward(local)
            grads = [*torch.autograd.grad(out, local, grad)]
        elif name == "two-forwards":
            first, second = forward(local), forward(2 * local)
            grads = [torch.autograd.grad(out, local, grad)[0] for out in (first, second)]
        elif name == "queries-alone":
            # The messages of backward are those of graphs alike on all ranks.
            for parameter in layer.parameters():
                parameter.requires_grad_(False)
            layer.q_proj.weight.requires_grad_()
            out = forward(local.detach())
            grads = [*torch.autograd.grad(out, layer.q_proj.weight, grad)]
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = forward(local)
            grads = [*torch.autograd.grad(out, local, grad.to(out.dtype))]
        found.append(grads)
    return found[0], found[1]


@pytest.mark.parametrize(
    "name", ["twice", "moved-to-host", "two-forwards", "queries-alone", "autocast"]
)
def test_unusual_backwards(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    for kept, again in ranks_of(2).run(backwards, PACKED, name):
        assert all(map(torch.equal, kept, again))
        assert all(float(grad.abs().max()) > 0 for grad in kept)


def messages_again(case: LayerCase) -> tuple[list[str], dict[str, int]]:
    layer = case.layer(dist.group.WORLD, fetch_again=True)
    recorder = Recorder()
    layer.setup = replace(layer.setup, counter=recorder)
    sharding = case.sharding(dist.group.WORLD)
    x, grad = case.inputs()
    out = layer(sharding.shard(x).requires_grad_(), cu_seqlens=sharding.cu_seqlens)
    passed, forward = len(recorder.messages), recorder.received["fetch"]
    out.backward(sharding.shard(grad))
    received = {"forward": forward, "both": recorder.received["fetch"]}
    return [kind for kind, *_ in recorder.messages[passed:]], received


def test_order_of_messages_when_blocks_are_fetched_again(
    ranks_of: Callable[[int], Ranks],
) -> None:
    for kinds, received in ranks_of(2).run(messages_again, CASE):
        fetches = ["fetch", "fetch", *["fetch_grad", "fetch"] * (HEADS - 2), *["fetch_grad"] * 2]
        assert kinds == ["plan", *fetches, "gather_grad", *["halo_grad"] * 3]
        assert received["both"] == 2 * received["forward"] > 0


# --- what is kept for backward --------------------------------------------------------------------


def kept_bytes(case: LayerCase, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that autograd keeps for backward, and bytes of all heads' fetched blocks."""
    layer = case.layer(dist.group.WORLD, **options)
    counter = CommunicationCounter()
    layer.setup = replace(layer.setup, counter=counter)
    sharding = case.sharding(dist.group.WORLD)
    x, _ = case.inputs()
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = layer(sharding.shard(x).requires_grad_(), cu_seqlens=sharding.cu_seqlens)
    assert out.requires_grad
    return sum(s.nbytes() for s in storages.values()), counter.received["fetch"]


def test_fetched_blocks_are_not_kept(ranks_of: Callable[[int], Ranks]) -> None:
    ranks = ranks_of(2)
    kept = ranks.run(kept_bytes, CASE, {"fetch_again": False})
    again = ranks.run(kept_bytes, CASE, {"fetch_again": True})
    by_default = ranks.run(kept_bytes, CASE, {})
    for (with_blocks, fetched), (without, same), default in zip(
        kept, again, by_default, strict=True
    ):
        assert fetched == same > 0
        assert with_blocks - without == fetched
        assert default == (without, fetched)
    few = replace(CASE, config=SMALL)
    assert ranks.run(kept_bytes, few, {}) == ranks.run(kept_bytes, few, {"fetch_again": False})


def blocks_in_memory(case: LayerCase) -> tuple[list[int], list[int]]:
    """How many KV heads' fetched blocks there are when each head is attended to; and in backward
    how many of all heads' there are when a head's gradients begin to return."""
    group = dist.group.WORLD
    layer = case.layer(group, fetch_again=True)
    sharding = case.sharding(group)
    x, grad = case.inputs()
    sizes: list[torch.UntypedStorage] = []
    found: tuple[list[int], list[int]] = ([], [])
    attention, new_buffer = pytorch.selected_attention, fetch._Exchange.new_buffer

    def there() -> int:
        return sum(storage.nbytes() > 0 for storage in sizes)

    def attend(*args: Any, **options: Any) -> Any:
        found[0].append(there())
        return attention(*args, **options)

    def made(exchange: Any, like: Tensor) -> Tensor:
        buffer = new_buffer(exchange, like)
        sizes.append(buffer.untyped_storage())
        return buffer

    begin = fetch.begin_all_to_all

    def returned(*args: Any, **options: Any) -> Any:
        if args[-1] == "fetch_grad":
            found[1].append(there())
        return begin(*args, **options)

    pytorch.selected_attention, fetch._Exchange.new_buffer = attend, made  # type: ignore
    fetch.begin_all_to_all = returned
    try:
        out = layer(sharding.shard(x).requires_grad_(), cu_seqlens=sharding.cu_seqlens)
        assert there() == 0
        out.backward(sharding.shard(grad))
    finally:
        pytorch.selected_attention, fetch._Exchange.new_buffer = attention, new_buffer  # type: ignore
        fetch.begin_all_to_all = begin
    return found


def test_only_heads_in_flight_hold_fetched_blocks(ranks_of: Callable[[int], Ranks]) -> None:
    for forward, backward in ranks_of(2).run(blocks_in_memory, CASE):
        assert forward == [2] * (HEADS - 1) + [1]
        # ``blocks_in_memory`` holds what autograd has let go: one more each time.
        assert backward == [2, 3, 4, 4]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fetch_again": 1}, "fetch_again must be True, False or None, got 1"),
        (
            {"recompute_branches": ("window", "gather")},
            r"recompute_branches must be a choice from branches = \(.*\) without repeats, got \(",
        ),
        ({"fetch": "all"}, r"fetch must be one of \('chosen', 'full'\), got 'all'"),
        ({"recompute_branches": "window"}, "recompute_branches must be a choice from branches"),
    ],
    ids=["fetch_again", "unknown-branch", "fetch", "a-name"],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASE.layer(**options)


def told_apart(case: LayerCase) -> str:
    with pytest.raises(ValueError) as error:
        run_layer(case, dist.group.WORLD, fetch_again=dist.get_rank() == 0)
    return str(error.value)


def test_ranks_must_fetch_again_alike(ranks_of: Callable[[int], Ranks]) -> None:
    for message in ranks_of(2).run(told_apart, PACKED):
        must = "fetch_again must be equal on all ranks, got rank 0: True, rank 1: False"
        assert must in message


# --- torch.compile --------------------------------------------------------------------------------


def compiled(case: LayerCase) -> bool:
    sharding = case.sharding(dist.group.WORLD)
    x, grad = case.inputs()
    found = []
    for compiles in (False, True):
        layer = case.layer(dist.group.WORLD, **MEMORY["both"])
        run = torch.compile(layer, backend="aot_eager") if compiles else layer
        local = sharding.shard(x).requires_grad_()
        for _ in range(2):
            out = run(local, cu_seqlens=sharding.cu_seqlens)
            out.backward(sharding.shard(grad))
        found += [out.detach(), local.grad, *(p.grad for p in layer.parameters())]
    half = len(found) // 2
    pairs = zip(found[:half], found[half:], strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.slow
def test_a_compiled_layer_over_ranks(ranks_of: Callable[[int], Ranks]) -> None:
    assert all(ranks_of(2).run(compiled, replace(PACKED, dtype=torch.float64)))
