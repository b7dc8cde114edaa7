"""Traps of splitting a sequence over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist import NSABlock, shard_batch
from nsa_dist.comm.group import ContextGroup
from nsa_dist.sharding import IGNORED_LABEL, ShardedBatch
from tests.distributed.layer_case import (
    LayerCase,
    LayerResult,
    assert_results_close,
    run_built_layer,
    run_layer,
)
from tests.distributed.ranks import Ranks
from tests.traps.mutation import Replaced, Rewritten, catches
from tests.traps.seam import SMALL

VOCABULARY, HIDDEN = 11, 24
TOLERANCE = 1e-12
LAYOUTS = ("contiguous", "zigzag", "zigzag_per_document")


@dataclass(frozen=True)
class Batch:
    """Random tokens; ``lengths`` of packed documents or None; the only valid label, if just one."""

    length: int = 120
    lengths: tuple[int, ...] | None = None
    only_label: int | None = None
    layout: str = "zigzag"

    def shard(self, group: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (1, self.length), generator=generator)
        labels = tokens.clone()
        if self.only_label is not None:
            labels.fill_(-100)[0, self.only_label] = tokens[0, self.only_label]
        cu_seqlens = None
        if self.lengths is not None:
            assert sum(self.lengths) == self.length
            cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return shard_batch(
            tokens, cu_seqlens=cu_seqlens, labels=labels, layout=self.layout, group=group
        )


@dataclass(frozen=True)
class Step:
    """Loss, global gradient norm and gradients of one step, and each rank's number of labels."""

    loss: float
    norm: float
    grads: dict[str, Tensor]
    labels: list[int]


class Decoder(nn.Module):
    """Embedding, one block, a map to logits."""

    def __init__(self, layout: str, group: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
        self.block = NSABlock(
            HIDDEN, SMALL, mlp_hidden=32, layout=layout, group=group, dtype=torch.float64
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self.head(self.block(self.embedding(tokens), cu_seqlens=cu_seqlens))


def train_step(batch: Batch, group: Any = None) -> Step:
    """One forward and backward; what ranks contribute is added up."""
    torch.manual_seed(0)
    model = Decoder(batch.layout, group)
    local = batch.shard(group)
    logits = model(local.tokens, local.cu_seqlens)
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), local.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = loss / local.num_targets
    loss.backward()
    total, grads = loss.detach(), {}
    counts = [int((local.labels != -100).sum())]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grads[name] = parameter.grad
    if group is not None:
        for x in (total, *grads.values()):
            dist.all_reduce(x, group=group)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, counts[0], group=group)
        counts = gathered
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return Step(float(total), float(norm), grads, counts)


def train_step_on_rank(batch: Batch) -> Step:
    return train_step(batch, dist.group.WORLD)


def assert_same_step(found: Step, expected: Step) -> None:
    assert abs(found.loss - expected.loss) <= TOLERANCE * expected.loss
    assert abs(found.norm - expected.norm) <= TOLERANCE * expected.norm
    for name, grad in found.grads.items():
        reference = expected.grads[name]
        assert (grad - reference).abs().max() <= TOLERANCE * reference.abs().max(), name


def mean_over_the_own_labels(shard_batch: Any, *args: Any, **options: Any) -> ShardedBatch:
    batch = shard_batch(*args, **options)
    own = max(1, int((batch.labels != IGNORED_LABEL).sum()))
    return replace(batch, num_targets=batch.sharding.context.size * own)


@catches(
    "global grad norm different at cp=1 and cp=4 only with packed documents",
    "the mean is over each rank's own labels, then over ranks",
    Replaced("nsa_dist:shard_batch", mean_over_the_own_labels),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trap_global_grad_norm_differs_with_packed_documents(
    layout: str, ranks_of: Callable[[int], Ranks]
) -> None:
    """Documents' last tokens have no label, so that ranks hold different numbers of labels: loss
    and gradients are divided by the number in the whole batch."""
    lengths = (*[1] * 20, 3, 70, 2, 25)
    for batch in (Batch(layout=layout), Batch(layout=layout, lengths=lengths)):
        expected = train_step(batch)
        for found in ranks_of(4).run(train_step_on_rank, batch):
            assert_same_step(found, expected)
        assert sum(found.labels) == expected.labels[0]
    if layout != "zigzag_per_document":
        assert max(found.labels) > 2 * min(found.labels)


def divided_by_the_own_labels(shard_batch: Any, *args: Any, **options: Any) -> ShardedBatch:
    batch = shard_batch(*args, **options)
    return replace(batch, num_targets=int((batch.labels != IGNORED_LABEL).sum()))


@catches(
    "one valid label in the whole batch",
    "a rank without labels divides 0 by 0",
    Replaced("nsa_dist:shard_batch", divided_by_the_own_labels),
)
@pytest.mark.parametrize("label", [1, 64, 119])
def test_trap_one_valid_label_in_the_whole_batch(
    label: int, ranks_of: Callable[[int], Ranks]
) -> None:
    """Three of four ranks have no label at all, and still the loss and gradients of one rank."""
    batch = Batch(lengths=(50, 7, 63), only_label=label)
    expected = train_step(batch)
    found = ranks_of(4).run(train_step_on_rank, batch)
    assert sorted(found[0].labels) == [0, 0, 0, 1]
    for step in found:
        assert_same_step(step, expected)


def shifted_after_the_cut(
    shard_batch: Any, tokens: Tensor, *, labels: Tensor | None = None, **options: Any
) -> ShardedBatch:
    batch = shard_batch(tokens, labels=labels, **options)
    whole = tokens if labels is None else labels
    return replace(batch, labels=batch.sharding.shard(whole, IGNORED_LABEL).roll(-1, 1))


@catches(
    "labels rolled after sharding",
    "each rank shifts the labels of its own tokens",
    Replaced("nsa_dist:shard_batch", shifted_after_the_cut),
)
def test_trap_labels_rolled_after_sharding() -> None:
    """Each token's label is the next of its document, also where the next is another rank's."""
    lengths = (50, 0, 1, 13, 23)
    tokens = torch.arange(100, 100 + sum(lengths))[None]
    packed = torch.tensor([0, *lengths]).cumsum(0).int()
    for layout, cu_seqlens in itertools.product(LAYOUTS, (None, packed)):
        ends = [sum(lengths)] if cu_seqlens is None else cu_seqlens.tolist()
        seen = 0
        for rank in range(4):
            group = ContextGroup(None, rank, 4)
            batch = shard_batch(tokens, cu_seqlens=cu_seqlens, layout=layout, group=group)
            for token, label in zip(
                batch.tokens[0].tolist(), batch.labels[0].tolist(), strict=True
            ):
                is_last = token - 100 + 1 in ends
                assert label == (-100 if is_last or token == 0 else token + 1)
                seen += token > 0
        assert seen == sum(lengths)


def subgroup_result(case: LayerCase, ranks: list[int], others: list[int]) -> LayerResult | None:
    """``run_layer`` over the group of ``ranks``, while that of ``others`` exists."""
    groups = [dist.new_group(members) for members in (ranks, others) if members]
    if dist.get_rank() not in ranks:
        return None
    layer = case.layer(groups[0])
    assert layer.context.rank == ranks.index(dist.get_rank())
    return run_built_layer(layer, case, groups[0])


def two_groups_result(cases: list[LayerCase], members: list[list[int]]) -> LayerResult:
    """Two groups alive at once, each with data of its own."""
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(g for g, ranks in enumerate(members) if dist.get_rank() in ranks)
    layer = cases[mine].layer(groups[mine])
    assert layer.context.rank == members[mine].index(dist.get_rank())
    return run_built_layer(layer, cases[mine], groups[mine])


@catches(
    "global rank used inside a subgroup",
    "a group's rank is the process's rank",
    Rewritten("nsa_dist.comm:context_group", "dist.get_rank($GROUP)", "dist.get_rank()"),
)
def test_trap_global_rank_used_inside_a_subgroup(ranks_of: Callable[[int], Ranks]) -> None:
    """Ranks 1 and 3 are ranks 0 and 1 of their group; two groups at once do not meet."""
    cases = [LayerCase(lengths=(61, 9, 40)), LayerCase(length=83, layout="contiguous", seed=5)]
    expected = [run_layer(case) for case in cases]
    for case, result in zip(cases, expected, strict=True):
        found = ranks_of(4).run(subgroup_result, case, [1, 3], [])
        assert [x is None for x in found] == [True, False, True, False]
        for x in (found[1], found[3]):
            assert_results_close(x, result, 1e-12)
    members = [[0, 2], [1, 3]]
    found = ranks_of(4).run(two_groups_result, cases, members)
    for rank, x in enumerate(found):
        assert_results_close(x, expected[rank % 2], 1e-12)


def skipped_without_blocks(
    apply_compressor: Any, compressor: Any, x: Tensor, block_rows: Tensor, *rest: Any
) -> Tensor:
    return apply_compressor(compressor, x, block_rows, *rest) if len(block_rows) else x[:0]


@catches(
    "rows or ranks fully masked",
    "a rank without a compression block skips the key compressor",
    Replaced("nsa_dist:apply_compressor", skipped_without_blocks),
)
def test_trap_rank_fully_masked(ranks_of: Callable[[int], Ranks]) -> None:
    """Ranks that hold no compressed block, and whose queries see none, finish with the others."""
    for lengths in ((3, 3, 3, 2, 1, 3, 3, 2, 44), (*[2] * 10, 20, *[1] * 20), (*[3] * 20,)):
        case = LayerCase(lengths=lengths, layout="contiguous")
        assert ranks_of(4).run(parameters_without_gradient, case) == [[]] * 4
        expected = run_layer(case)
        for found in ranks_of(4).run(whole_result, case):
            assert_results_close(found, expected, 1e-12)


def parameters_without_gradient(case: LayerCase) -> list[str]:
    layer = case.layer(dist.group.WORLD)
    x, grad = case.inputs()
    sharding = case.sharding(dist.group.WORLD)
    layer(sharding.shard(x), cu_seqlens=sharding.cu_seqlens).backward(sharding.shard(grad))
    return [name for name, parameter in layer.named_parameters() if parameter.grad is None]


def whole_result(case: LayerCase) -> LayerResult:
    return run_layer(case, dist.group.WORLD)


def repeated_on_rank(case: LayerCase) -> list[bool]:
    """Whether each of some runs gives the first one's bits on this rank."""
    layer = case.layer(dist.group.WORLD)
    results = []
    for _ in range(4):
        results.append(run_built_layer(layer, case, dist.group.WORLD))
        layer.zero_grad()
    first = results[0]
    return [
        torch.equal(result.output, first.output)
        and torch.equal(result.grad_input, first.grad_input)
        and all(torch.equal(g, first.grads[name]) for name, g in result.grads.items())
        for result in results[1:]
    ]


@catches(
    "float32 atomics not repeatable",
    "ranks' shares of a gradient are added in any order",
    Rewritten(
        "nsa_dist.comm.gather:_Send.backward",
        "$PARTS[1:]",
        "$PARTS[1:][torch.randperm(len($PARTS) - 1)]",
        given=("$SUM = $PARTS[0].to($...ARGS, copy=True)",),
    ),
)
def test_trap_float32_sums_over_ranks_not_repeatable(ranks_of: Callable[[int], Ranks]) -> None:
    """Gradients that come from several ranks are added in rank order."""
    config = replace(SMALL, window=60)  # many ranks need the same tokens
    case = LayerCase(config=config, lengths=(110, 40), dtype=torch.float32)
    for found in ranks_of(4).run(repeated_on_rank, case):
        assert all(found)
