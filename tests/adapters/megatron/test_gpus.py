"""What the CPU cannot answer for: Megatron's random states of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.adapters.megatron.layer_case import differing_starts, fresh_weights
from tests.adapters.megatron.small_gpt import VARIANTS, Layout
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.multi_gpu


@pytest.fixture(scope="module")
def gpus() -> Iterator[Callable[[int], Ranks]]:
    started = {size: Ranks(size, backend="nccl") for size in (1, 2)}
    yield started.__getitem__
    for ranks in started.values():
        ranks.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_starts_from_the_same_weights(
    variant: str, gpus: Callable[[int], Ranks]
) -> None:
    weights = gpus(1).run(fresh_weights, variant, True)[0]
    for layout in (Layout(tp=2, sp=True), Layout(cp=2)):
        for names in gpus(2).run(differing_starts, layout, variant, True, weights):
            # Megatron draws what it splits on each tensor parallel rank apart.
            ours = [n for n in names if layout.tp == 1 or "gate" in n or "compressor" in n]
            assert ours == [], layout
