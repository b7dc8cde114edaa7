"""The order of a call's messages, as ``nsa_dist.attention.flow`` states it; and one-shot works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nsa_dist import CommunicationCounter
from nsa_dist.comm import Work
from tests.distributed.layer_case import SMALL, LayerCase, variants
from tests.distributed.ranks import Ranks

Message = tuple[str, int, int]


class Recorder(CommunicationCounter):
    """Keeps each message as (kind, bytes sent, bytes received), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def add(self, kind: str, sent: int, received: int) -> None:
        super().add(kind, sent, received)
        self.messages.append((kind, sent, received))


def messages(case: LayerCase) -> tuple[list[Message], list[Message]]:
    """This rank's messages of a forward and of its backward."""
    layer = case.layer(dist.group.WORLD)
    recorder = Recorder()
    layer.setup = replace(layer.setup, counter=recorder)
    x, grad = case.inputs()
    sharding = case.sharding(dist.group.WORLD)
    local = sharding.shard(x).requires_grad_()

    def forward(local: torch.Tensor) -> torch.Tensor:
        return layer(local, cu_seqlens=sharding.cu_seqlens)

    if case.checkpoint:
        out = torch.utils.checkpoint.checkpoint(forward, local, use_reentrant=False)
    else:
        out = forward(local)
    passed = len(recorder.messages)
    out.backward(sharding.shard(grad))
    return recorder.messages[:passed], recorder.messages[passed:]


FETCHES = SMALL.num_kv_heads
BASE = LayerCase(lengths=(60, 97, 45))
CASES = {
    "independent": (BASE, ["halo"] * 3 + ["gather", "request"] + ["fetch"] * FETCHES),
    "contiguous": (
        variants(BASE, layout="contiguous"),
        ["halo"] * 3 + ["gather", "request"] + ["fetch"] * FETCHES,
    ),
    "shared": (
        variants(BASE, independent_kv=False),
        ["halo", "gather", "request"] + ["fetch"] * FETCHES,
    ),
    "window-only": (variants(BASE, branches=("window",)), ["halo"]),
    "compressed-only": (variants(BASE, branches=("compressed",)), ["halo", "gather"]),
    # The keys that choose are not the window's, and have a halo of their own.
    "without-compressed": (
        variants(BASE, branches=("selected", "window")),
        ["halo"] * 3 + ["gather", "request"] + ["fetch"] * FETCHES,
    ),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_messages_come_in_the_stated_order(
    name: str, size: int, ranks_of: Callable[[int], Ranks]
) -> None:
    case, kinds = CASES[name]
    for forward, backward in ranks_of(size).run(messages, case):
        assert [kind for kind, *_ in forward] == ["plan", *kinds]
        # Backward is forward in reverse. A request has none.
        returned = [m for m in reversed(forward[1:]) if m[0] != "request"]
        assert [kind for kind, *_ in backward] == ["plan", *(f"{m[0]}_grad" for m in returned)]
        for (kind, sent, received), (_, back, forth) in zip(returned, backward[1:], strict=True):
            # Each set's halo and each head's blocks return by the way they came.
            assert kind == "gather" or (back, forth) == (received, sent)


def test_recomputation_sends_the_forward_again(ranks_of: Callable[[int], Ranks]) -> None:
    case = variants(BASE, checkpoint=True)
    for forward, backward in ranks_of(2).run(messages, case):
        again = backward[: len(forward)]
        # What the last saved tensor does not need is not run again.
        assert again == forward
        kinds = [f"{kind}_grad" for kind, *_ in reversed(forward[1:]) if kind != "request"]
        assert [kind for kind, *_ in backward[len(forward) :]] == ["plan", *kinds]


def test_a_work_is_finished_once() -> None:
    waited: list[int] = []

    def wait() -> int:
        waited.append(1)
        return 3

    work = Work(wait).then(lambda x: x + 1)
    assert not waited
    assert work.finish() == 4
    with pytest.raises(RuntimeError, match=r"must be finished once"):
        work.finish()
    assert waited == [1]
    done = Work.done("here")
    assert done.finish() == "here"
    with pytest.raises(RuntimeError, match=r"must be finished once"):
        done.finish()
