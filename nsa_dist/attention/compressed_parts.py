"""Compression part by part, for ``exact_gradients``.

Letters: E rows of a buffer with its halo, C compressed tokens of all documents, C_r own ones, G KV
heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nsa_dist.attention.call import Call
from nsa_dist.comm import Work, begin_gather
from nsa_dist.comm.exact import GatherSums, PartSource, WeightSums, home, opened
from nsa_dist.nn.compressor import apply_compressor
from nsa_kernels import Backend


class _InParts:
    """A backend that compresses a part's blocks after another, each with weights of its own.

    So a compressor is called once, as without parts, and who hooks or wraps it sees its weights.

    Args:
        x_EGD: the rows that each part reads.
    """

    def __init__(self, call: Call, x_EGD: Sequence[Tensor]) -> None:
        self._call, self._x = call, x_EGD

    def compress(
        self,
        x: Tensor,
        block_rows: Tensor,
        block: int,
        kind: str,
        params: Mapping[str, Tensor],
    ) -> Tensor:
        """See ``Backend.compress``."""
        call, parts = self._call, self._call.plan.parts
        assert parts is not None
        by_part, reads = parts.blocks, parts.reads["blocks"]
        assert by_part is not None
        learned = [name for name, p in params.items() if p.requires_grad]
        weights = None
        if learned and torch.is_grad_enabled():
            given = [params[name] for name in learned]
            sums = WeightSums(parts, call.channel, given)
            ticket = opened(sums, home(sums, *given))
            weights = PartSource(sums, ticket, tuple(p.detach() for p in given))
        made = []
        for part, rows in enumerate(by_part.split(block_rows)):
            of_part = dict(params)
            if weights is not None:
                of_part.update(zip(learned, weights.of_part(part), strict=True))
            at = rows - reads.rows[part][0]
            made.append(call.backend.compress(self._x[part], at, block, kind, of_part))
        return by_part.join(made)


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
        rotate: what is applied to the compressed keys [C_r, G, Dk] of own blocks.

    Returns:
        A ``Work`` with keys [C, G, Dk] and values [C, G, Dv], to be read by part; no values
        ([C, G, 0]) if only selection reads the keys.
    """
    config, parts, blocks = call.config, call.plan.parts, call.plan.grids["compressed"]
    assert parts is not None
    k_parts, v_parts = zip(*(source.of_part(part) for part in range(len(parts))), strict=True)

    def compressed(compressor: nn.Module, x: Tensor, x_parts: Any) -> Tensor:
        backend = cast(Backend, _InParts(call, x_parts))
        return apply_compressor(compressor, x, blocks.own_rows, config.compress_block, backend)

    k_ext, v_ext = source.tensors
    k = rotate(compressed(k_compressor, k_ext, k_parts))
    if v_compressor is None:
        v = k.new_zeros(*k.shape[:2], 0)
    else:
        v = compressed(v_compressor, v_ext, v_parts)
    sums = GatherSums(blocks, parts, call.channel, k, v)
    ticket = home(sums, k, v)
    gathering = begin_gather(k.detach(), v.detach(), blocks, call.channel)
    return gathering.then(lambda full: PartSource(sums, opened(sums, ticket), full))
