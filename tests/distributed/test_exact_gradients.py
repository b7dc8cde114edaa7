"""With ``exact_gradients`` gradients of the operator have the same bits over 1, 2, 4, ... ranks."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist import (
    BRANCHES,
    NativeSparseAttention,
    NSAConfig,
    RotaryConfig,
    check_parallel,
    make_sharding,
)
from nsa_dist.attention.plan_cache import get_plan
from nsa_dist.comm.collectives import begin_all_to_all
from nsa_dist.comm.exact import Sums
from nsa_dist.comm.group import context_group
from nsa_dist.comm.tree_sums import PartSums, tree_sum
from nsa_dist.plan.build import build_plan
from nsa_dist.plan.layout import make_layout
from nsa_dist.plan.parts import parts_layout
from nsa_kernels.autograd import BranchPasses
from nsa_kernels.compressors import COMPRESSORS
from tests.distributed.exact_case import (
    PACKED,
    SMALL,
    Case,
    differing,
    drawn,
    gradients,
    gradients_on_rank,
)
from tests.distributed.ranks import RankError, Ranks

LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")
SPLITS = {
    f"{layout}-{name}-{dtype}": Case(layout=layout, lengths=lengths, dtype=getattr(torch, dtype))
    for layout in LAYOUTS
    for name, lengths in (("one-document", None), ("packed", PACKED))
    for dtype in ("bfloat16", "float32")
}


def with_config(case: Case, **changes: Any) -> Case:
    return replace(case, config=replace(case.config, **changes))


BASE = Case(lengths=PACKED)
OPTIONS = {
    "shared-kv": with_config(replace(BASE, shared=True), independent_kv=False),
    "shared-kv-per-document": with_config(
        replace(BASE, shared=True, layout="zigzag_per_document"), independent_kv=False
    ),
    "two-rows": Case(batch=2, length=80),
    "two-rows-contiguous": Case(batch=2, length=80, layout="contiguous"),
    "fetched-again": replace(BASE, options={"fetch_again": True}),
    "kept": replace(BASE, options={"fetch_again": False}),
    "all-fetched": replace(BASE, options={"fetch": "full"}),
    "recomputed": replace(
        BASE, options={"recompute_branches": ("window", "selected", "compressed")}
    ),
    "checkpointed": replace(BASE, checkpoint=True, options={"fetch_again": True}),
    "window-longer-than-parts": with_config(BASE, window=70),
    "blocks-longer-than-parts": with_config(
        BASE, compress_block=32, compress_stride=8, select_block=32, num_selected=3
    ),
    "linear-per-head": with_config(BASE, compress="linear", compress_per_head=True),
    "conv1d-unrotated": with_config(
        replace(BASE, options={"rotary": RotaryConfig()}), compress="conv1d", compress_pre_rope=True
    ),
    "attention-pool": with_config(BASE, compress="attention_pool"),
    "mean": with_config(BASE, compress="mean"),
    "one-head-a-group": with_config(BASE, num_kv_heads=8),
    "selected-only": with_config(BASE, branches=("selected",)),
    "window-only": with_config(BASE, branches=("window",)),
    "compressed-only": with_config(BASE, branches=("compressed",)),
    "no-tokens": Case(length=0),
    "short-documents": replace(BASE, lengths=(8, 16, 0, 8), layout="zigzag_per_document"),
}
CASES = SPLITS | OPTIONS


@functools.cache
def single_rank(case_name: str) -> dict[str, Tensor]:
    return gradients(CASES[case_name])


RUNS = [(name, size) for name in SPLITS for size in (2, 4)] + [(name, 4) for name in OPTIONS]


@pytest.mark.parametrize(("name", "size"), RUNS, ids=lambda x: str(x))
def test_bits_are_those_of_one_rank(name: str, size: int, ranks_of: Callable[[int], Ranks]) -> None:
    found = ranks_of(size).run(gradients_on_rank, CASES[name])[0]
    assert differing(found, single_rank(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", SPLITS)
def test_bits_up_to_eight_ranks(name: str, size: int, ranks_of: Callable[[int], Ranks]) -> None:
    case = replace(SPLITS[name], most_ranks=8)
    if case.lengths is not None:
        case = replace(case, lengths=tuple(2 * n for n in case.lengths))
    found = ranks_of(size).run(gradients_on_rank, case)[0]
    assert differing(found, gradients(case)) == []


def leaf(x: Any) -> Any:
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().requires_grad_() if floating else x


def passes_of(ops: Any, calls: Counter[str]) -> dict[str, BranchPasses]:
    """What a backend has whose forward is the same however queries are taken together, as that of
    these bfloat16 cases is."""

    def passes(branch: str) -> BranchPasses:
        function = getattr(ops, f"{branch}_attention")

        def forward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
            calls[f"{branch} forward"] += 1
            with torch.no_grad():
                o, lse = function(*arguments, **options)
            return o, lse, lse + 1.0

        def backward(
            dq: Tensor,
            do: Tensor,
            gate: Tensor,
            results: tuple[Tensor, ...],
            *arguments: Any,
            **options: Any,
        ) -> tuple[Tensor, ...]:
            calls[f"{branch} backward"] += 1
            o, lse, more = results
            given = [leaf(x) for x in (gate, *arguments)]
            with torch.enable_grad():
                again, lse_again, summand = function(*given[1:], **options, gate=given[0])
            torch.testing.assert_close(o, again)  # The rows of these queries.
            torch.testing.assert_close(lse, lse_again)
            assert torch.equal(more, lse + 1.0)
            of = [x for x in given[1:] if isinstance(x, Tensor) and x.requires_grad]
            of_q, *grads, dgate = torch.autograd.grad(summand, [*of, given[0]], do)
            assert dq.is_contiguous()
            dq.copy_(of_q)
            return *grads, dgate.float()

        return BranchPasses(forward, backward)

    return {branch: passes(branch) for branch in BRANCHES}


def gradients_by_passes(case: Case, group: Any = None) -> tuple[dict[str, Tensor], Counter[str]]:
    """``gradients`` with a forward of all queries at once, and how often its passes ran."""
    calls: Counter[str] = Counter()
    passes = partial(passes_of, calls=calls)
    with mock.patch("nsa_dist.attention.in_parts.branch_passes", passes):
        return gradients(case, group), calls


def by_passes_on_rank(case: Case) -> tuple[dict[str, Tensor] | None, Counter[str]]:
    found, calls = gradients_by_passes(case, dist.group.WORLD)
    return found if dist.get_rank() == 0 else None, calls


BY_PASSES = [
    *(name for name in SPLITS if name.endswith("bfloat16")),
    *("shared-kv", "fetched-again", "recomputed", "checkpointed", "window-longer-than-parts"),
    *("blocks-longer-than-parts", "selected-only", "no-tokens", "short-documents"),
]


@pytest.mark.parametrize("name", BY_PASSES)
def test_bits_where_forward_runs_once(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    """They are also those of a forward that runs by part."""
    (found, calls), *_ = ranks_of(4).run(by_passes_on_rank, CASES[name])
    assert found is not None
    assert differing(found, single_rank(name)) == []
    if name == "zigzag-packed-bfloat16":
        again, one = gradients_by_passes(CASES[name])
        assert differing(again, single_rank(name)) == []
        heads = SMALL.num_kv_heads
        forward = {"compressed forward": 1, "selected forward": heads, "window forward": 1}
        assert {k: n for k, n in calls.items() if "forward" in k} == forward
        assert {k: n for k, n in one.items() if "forward" in k} == forward
        # Two of the eight parts of a rank of four; all of one rank.
        assert (calls["window backward"], one["window backward"]) == (2, 8)
        assert (calls["selected backward"], one["selected backward"]) == (2 * heads, 8 * heads)


@pytest.mark.parametrize("lengths", [None, PACKED], ids=["one-document", "packed"])
def test_without_the_option_the_order_of_sums_shows(
    lengths: tuple[int, ...] | None, ranks_of: Callable[[int], Ranks]
) -> None:
    """The inputs tell an order from another in every kind of gradient that is a sum over ranks."""
    case = Case(lengths=lengths, dtype=torch.float32, most_ranks=0)
    found = ranks_of(2).run(gradients_on_rank, case)[0]
    shown = differing(found, gradients(case))
    sums = {f"{x} {branch}" for x in "kv" for branch in ("compressed", "selected", "window")}
    assert sums | {"k_compressor.up", "v_compressor.down"} <= set(shown)


def broken_gradients_on_rank(case: Case) -> dict[str, Tensor] | None:
    """The chunks of ranks are added one after another, as without parts."""
    from nsa_dist.comm import exact

    def in_a_row(summand: Callable[[int], Tensor | None], first: int, end: int) -> Tensor | None:
        total = None
        for s in range(first, end):
            x = summand(s)
            total = x if total is None else total if x is None else total.add_(x)
        return total

    right = exact.tree_sum
    exact.tree_sum = in_a_row
    try:
        return gradients_on_rank(case)
    finally:
        exact.tree_sum = right


def test_another_order_of_chunks_is_noticed(ranks_of: Callable[[int], Ranks]) -> None:
    name = "zigzag-one-document-float32"
    found = ranks_of(4).run(broken_gradients_on_rank, CASES[name])[0]
    shown = differing(found, single_rank(name))
    assert {"k compressed", "k selected", "v selected", "k_compressor.up"} <= set(shown)


def test_layouts_of_whole_rows_agree_too() -> None:
    """They have the same parts."""
    found = single_rank("contiguous-packed-float32")
    assert differing(found, single_rank("zigzag-packed-float32")) == []
    whole = single_rank("zigzag-one-document-float32")
    assert differing(whole, single_rank("zigzag_per_document-one-document-float32")) == []


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_right(layout: str, size: int, ranks_of: Callable[[int], Ranks]) -> None:
    """Against the usual order on one rank, to rounding."""
    case = Case(layout=layout, lengths=PACKED, dtype=torch.float64)
    expected = gradients(replace(case, most_ranks=0))
    found = gradients(case) if size == 1 else ranks_of(size).run(gradients_on_rank, case)[0]
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= 1e-12 * x.abs().max(), name


def test_bfloat16_is_as_accurate_as_without() -> None:
    """Against float64 by the same inputs: the 2x rule, with the usual order in place of plain."""
    case = Case()
    usual, found = (
        gradients(replace(case, most_ranks=0)),
        single_rank("zigzag-one-document-bfloat16"),
    )
    reference = reference_of(case)
    for name, x in reference.items():
        allowed = 2 * (usual[name].double() - x).abs().max()
        allowed += 0.5 * torch.finfo(torch.bfloat16).eps * x.abs().max()
        assert (found[name].double() - x).abs().max() <= allowed, name


def reference_of(case: Case) -> dict[str, Tensor]:
    """The gradients of the same bfloat16 inputs in float64."""
    from tests.distributed import exact_case

    inputs, grad, compressors = drawn(case)
    wide = [x.double() for x in inputs], grad.double(), [x.double() for x in compressors]
    right = exact_case.drawn
    exact_case.drawn = lambda _: wide
    try:
        return gradients(replace(case, most_ranks=0, dtype=torch.float64))
    finally:
        exact_case.drawn = right


def nodes(x: Tensor) -> Iterator[str]:
    seen, waiting = set(), [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield type(node).__name__
        waiting += [following for following, _ in node.next_functions]


def nodes_and_kinds_on_rank(case: Case) -> tuple[set[str], set[str]]:
    layer = NativeSparseAttention(
        24, case.config, group=dist.group.WORLD, exact_gradients=case.most_ranks
    )
    out = layer(torch.randn(1, case.length // dist.get_world_size(), 24, requires_grad=True))
    found = set(nodes(out))
    out.sum().backward()
    return found, set(layer.communication.received)


def test_without_the_option_nothing_is_added(ranks_of: Callable[[int], Ranks]) -> None:
    ours = {"_OfPartBackward", "_HomeBackward", "_OpenedBackward", "_InPartsBackward"}
    found, kinds = ranks_of(2).run(nodes_and_kinds_on_rank, Case(most_ranks=0))[0]
    usual = {"_HomeBackward"}  # The fetch has a node of that name.
    assert found & ours <= usual and "weight_grad" not in kinds
    found, kinds = ranks_of(2).run(nodes_and_kinds_on_rank, Case())[0]
    assert found >= ours and "weight_grad" in kinds


def kinds_on_rank(case: Case) -> list[str]:
    """The messages of backward, as they begin."""
    kinds = []

    def begin(*args: Any, **kwargs: Any) -> Any:
        kinds.append(args[4])
        return begin_all_to_all(*args, **kwargs)

    with mock.patch("nsa_dist.comm.exact.begin_all_to_all", begin):
        gradients(case, dist.group.WORLD)
    return kinds


def test_messages_keep_their_order_on_every_rank(ranks_of: Callable[[int], Ranks]) -> None:
    expected = ["fetch_grad"] * 2 + ["gather_grad", "weight_grad", "weight_grad"]
    for kinds in ranks_of(4).run(kinds_on_rank, Case(lengths=PACKED)):
        assert [kind for kind in kinds if kind != "halo_grad"] == expected
        assert kinds.count("halo_grad") == 3


def checked_on_rank(case: Case) -> list[str]:
    """What the self-check finds in a layer that is compared with one rank in the usual order."""
    layer = NativeSparseAttention(
        24, case.config, group=dist.group.WORLD, exact_gradients=case.most_ranks
    )
    sharding = make_sharding(case.length, group=dist.group.WORLD)
    x = sharding.shard(torch.randn(1, case.length, 24))
    report = check_parallel(layer, lambda: layer(x).square().sum().backward(), sharding)
    report.raise_if_different()
    return list(report.largest)


def test_the_self_check_finds_it_right(ranks_of: Callable[[int], Ranks]) -> None:
    names, _ = ranks_of(2).run(checked_on_rank, Case(dtype=torch.float32))
    assert {"grad of k, selected", "grad of v_compressor.up"} <= set(names)


def test_a_compiled_layer_gives_the_same() -> None:
    layer = NativeSparseAttention(24, SMALL, exact_gradients=2)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(1, 64, 24)
    found = []
    for run in (layer, compiled):
        layer.zero_grad()
        run(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert differing(*found) == []


def two_backwards_on_rank(case: Case) -> list[str]:
    """Names of gradients that a second backward through the graph does not double."""
    layer = NativeSparseAttention(
        24, case.config, group=dist.group.WORLD, exact_gradients=case.most_ranks
    )
    x = torch.randn(1, case.length // dist.get_world_size(), 24, requires_grad=True)
    out = layer(x).sum()
    out.backward(retain_graph=True)
    tensors = {"x": x, **dict(layer.named_parameters())}
    once = {name: t.grad.clone() for name, t in tensors.items() if t.grad is not None}
    out.backward()
    return [n for n, g in once.items() if not torch.equal(tensors[n].grad, 2 * g)]


def test_a_graph_may_run_backward_twice(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(2).run(two_backwards_on_rank, Case(dtype=torch.float32)) == [[], []]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_reads_few_rows(layout: str, size: int) -> None:
    """Of one document: its own, and as many before or after as a window or a block reaches."""
    cut = make_layout(layout, size)
    plan = build_plan(SMALL, cut, size - 1, size, 1, 320, None, exact_gradients=4)
    assert plan.parts is not None
    part = 320 // 8
    for reader, more in (("window", SMALL.window - 1), ("blocks", SMALL.compress_block - 1)):
        for first, end in plan.parts.reads[reader].rows:
            assert part <= end - first <= part + more
    compressed = plan.grids["compressed"]
    last = [end for _, end in plan.parts.reads["compressed"].rows]
    assert last == sorted(set(last)) and last[-1] <= compressed.total
    if size == 1:
        assert plan.parts.fetches == (False,) * 8
        assert [end for _, end in plan.parts.reads["selected"].rows] == list(range(40, 321, 40))
    elif layout != "contiguous":
        # The last of two ranks has the middle of the document, that of four the middle too.
        assert plan.parts.fetches == (True,) * (8 // size)


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward-alone"])
def test_a_graph_ends_without_the_garbage_collector(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of a transfer share an object, which must not refer to a node of its own."""
    made: list[weakref.ref[Sums]] = []
    start = Sums.__init__

    def note(self: Sums, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        start(self, *arguments)

    monkeypatch.setattr(Sums, "__init__", note)
    layer = NativeSparseAttention(32, SMALL, exact_gradients=8, layout="contiguous")
    x = torch.randn(1, 256, 32, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        out = layer(x)
        if backward:
            out.sum().backward()
        del out
        assert made and all(sums() is None for sums in made)
    finally:
        gc.enable()


def test_sums_of_parts_do_not_depend_on_their_arrival() -> None:
    values = [torch.tensor([x]) for x in (1e8, 1.0, -1e8, 1.0, 3e7, -1.0, 1e-3, 5.0)]
    context = context_group(None)
    plan = get_plan(
        SMALL,
        "zigzag",
        context,
        batch=1,
        local_length=16,
        cu_seqlens=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        exact_gradients=4,
    )
    assert plan.parts is not None and len(plan.parts) == 8
    totals = set()
    for order in ((0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0), (3, 6, 0, 5, 1, 7, 2, 4)):
        sums = PartSums(plan.parts)
        for part in order:
            sums.put(part, values[part].clone())
        (total,) = sums.take((1,), values[0])
        totals.add(total.item())
    tree = tree_sum(lambda s: values[s].clone(), 0, 8)
    assert tree is not None and totals == {tree.item()}
    assert sum(x.item() for x in values) != tree.item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_are_whole_parts(layout: str, size: int) -> None:
    cut, parts = make_layout(layout, size), parts_layout(layout, 4)
    assert parts.multiple % cut.multiple == 0
    assert (parts.multiple // cut.multiple).bit_count() == 1


def test_padding_is_the_same_over_any_ranks() -> None:
    bounds = torch.tensor([0, 5, 5, 30], dtype=torch.int32)
    padded = make_sharding(30, cu_seqlens=bounds, exact_gradients=4)
    assert padded.padded_length == 32 and padded.cu_seqlens is not None
    assert padded.cu_seqlens.tolist() == [0, 5, 5, 30, 32]
    padded = make_sharding(30, cu_seqlens=bounds, layout="zigzag_per_document", exact_gradients=4)
    assert padded.cu_seqlens is not None
    assert padded.cu_seqlens.tolist() == [0, 8, 8, 40]


REFUSED: dict[str, tuple[Case, str]] = {
    "length": (
        Case(length=156),
        "sequence length must be a multiple of 8 with exact_gradients=4 and layout 'zigzag'",
    ),
    "document": (
        Case(lengths=(20, 60), layout="zigzag_per_document"),
        "(make_sharding(exact_gradients=) pads to it), got 20 (document 0)",
    ),
    "not a power of two": (
        Case(most_ranks=6),
        "exact_gradients must be 0 or a power of two, got 6",
    ),
    "more ranks": (
        Case(most_ranks=1),
        "group size must be a power of two up to exact_gradients = 1",
    ),
    "two levels of links": (
        Case(options={"ranks_per_node": 2}),
        "ranks_per_node must be None or 1 with exact_gradients (a node's sums would follow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused_on_every_rank(
    name: str, ranks_of: Callable[[int], Ranks]
) -> None:
    case, message = REFUSED[name]
    for ok, text in ranks_of(2).try_run(gradients_on_rank, case):
        assert not ok and message in text


def unlike_on_rank(case: Case) -> None:
    gradients(replace(case, most_ranks=4 if dist.get_rank() else 2), dist.group.WORLD)


def test_ranks_must_give_the_same_value(ranks_of: Callable[[int], Ranks]) -> None:
    with pytest.raises(RankError, match="exact_gradients must be equal on all ranks"):
        ranks_of(2).run(unlike_on_rank, Case())


def test_own_compressors_and_selectors_are_refused() -> None:
    module = torch.nn.Identity()
    config = replace(SMALL, compress="custom")
    with pytest.raises(ValueError, match="exact_gradients must be 0 with compress='custom'"):
        NativeSparseAttention(
            24, config, k_compressor=module, v_compressor=module, exact_gradients=2
        )


def test_gqa_groups_of_one_and_many_are_covered() -> None:
    assert SMALL.heads_per_group == 4
    assert CASES["one-head-a-group"].config.heads_per_group == 1
    assert isinstance(SMALL, NSAConfig)


# --- Triton kernels -------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
FEW_HEADS = NSAConfig(
    2,
    1,
    16,
    compress_block=8,
    compress_stride=4,
    select_block=16,
    num_selected=3,
    window=20,
)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs run the larger cases")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_of_kernels(dtype: torch.dtype, ranks_of: Callable[[int], Ranks]) -> None:
    case = Case(FEW_HEADS, lengths=(24, 40), dtype=dtype, backend="triton", most_ranks=2)
    found = ranks_of(2).run(gradients_on_rank, case)[0]
    assert differing(found, gradients(case)) == []


LARGE = NSAConfig(32, 2, 128, num_selected=8, window=200)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("compress", list(COMPRESSORS))
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_do_not_depend_on_the_gpus(
    dtype: torch.dtype, layout: str, packed: bool, compress: Any, gpus: Ranks
) -> None:
    config = replace(LARGE, compress=compress)
    lengths = (1496, 8, 32, 3504, 80) if packed else None
    case = Case(config, layout, lengths, 1, 5120, dtype, "cuda", "triton")
    found = gpus.run(gradients_on_rank, case)[0]
    assert differing(found, gradients(case)) == []
    assert all(bool(x.isfinite().all()) for x in found.values())


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["fetched-again", "all-fetched", "recomputed", "shared-kv"])
def test_bits_of_options_on_gpus(name: str, gpus: Ranks) -> None:
    small = OPTIONS[name]
    config = replace(LARGE, independent_kv=small.config.independent_kv)
    case = replace(
        small, config=config, lengths=(1496, 8, 32, 3504, 80), device="cuda", backend="triton"
    )
    found = gpus.run(gradients_on_rank, case)[0]
    assert differing(found, gradients(replace(case, options={}))) == []
