"""NSA's own selector part by part, for ``exact_gradients``.

Letters: N local queries, C compressed tokens of all documents, G KV heads, D widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsa_dist.attention.call import Call
from nsa_dist.comm import Work, begin_gather
from nsa_dist.comm.exact import GatherSums, PartSource, WeightSums, home, opened
from nsa_dist.nn.compressor import apply_compressor


class _Weights:
    """The weights of a compressor for the blocks of a part."""

    def __init__(self, compressor: nn.Module, call: Call) -> None:
        assert call.plan.parts is not None
        self._compressor = compressor
        self._names = [n for n, p in compressor.named_parameters() if p.requires_grad]
        self._source: PartSource | None = None
        if self._names and torch.is_grad_enabled():
            given = dict(compressor.named_parameters())
            weights = [given[name] for name in self._names]
            sums = WeightSums(call.plan.parts, call.channel, weights)
            ticket = opened(sums, home(sums, *weights))
            self._source = PartSource(sums, ticket, tuple(x.detach() for x in weights))

    def of_part(self, part: int) -> nn.Module:
        """The compressor with weights whose gradient is that of a part."""
        if self._source is None:
            return self._compressor
        given = dict(zip(self._names, self._source.of_part(part), strict=True))
        return _WithWeights(self._compressor, given)


class _WithWeights(nn.Module):
    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._run = (module, weights)

    def forward(self, *args: Any) -> Any:
        return functional_call(*self._run, args)


def begin_parts(
    call: Call,
    k_compressor: nn.Module,
    v_compressor: nn.Module | None,
    source: PartSource,
    rotate: Callable[[Tensor], Tensor],
) -> Work[PartSource]:
    """Compress own blocks part by part and begin to gather all ranks'.

    Args:
        source: keys and values [E, G, D].
        rotate: what is applied to the compressed keys of own blocks.

    Returns:
        A ``Work`` with keys [C, G, Dk] and values [C, G, Dv], to be read by part; no values
        ([C, G, 0]) if only selection reads the keys.
    """
    config, parts, blocks = call.config, call.plan.parts, call.plan.grids["compressed"]
    assert parts is not None
    by_part = parts.blocks["compressed"]
    weights = [None if x is None else _Weights(x, call) for x in (k_compressor, v_compressor)]
    made: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part, rows in enumerate(by_part.split(blocks.own_rows)):
        tensors = source.of_part(part)
        for of, x, to in zip(weights, tensors, made, strict=True):
            if of is not None:
                to.append(_compressed(of.of_part(part), x, rows, config.compress_block, call))
    k = rotate(by_part.join(made[0]))
    v = by_part.join(made[1]) if made[1] else k.new_zeros(*k.shape[:2], 0)
    sums = GatherSums(blocks, parts, call.channel, k, v)
    ticket = home(sums, k, v)
    gathering = begin_gather(k.detach(), v.detach(), blocks, call.channel)
    return gathering.then(lambda full: PartSource(sums, opened(sums, ticket), full))


def _compressed(compressor: nn.Module, x: Tensor, rows: Tensor, block: int, call: Call) -> Tensor:
    if isinstance(compressor, _WithWeights):
        made: Tensor = compressor(x, rows, call.backend)
        return made
    return apply_compressor(compressor, x, rows, block, call.backend)
