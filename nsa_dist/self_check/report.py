"""The report of a self-check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor of one layer is from that of one rank.

    Attributes:
        layer: name of the module.
        tensor: "positions" (of the layer's tokens, against the sharding), "blocks" (chosen ones),
            "out", "grad of q", "grad of k, window", "grad of k_compressor.up" and so on.
        difference: relative; the largest over the largest value of one rank's tensor. Of positions
            and blocks the share of tokens, and of tokens and KV heads, that differ.
        limit: what rounding explains; more is wrong.
        where: number of the group's rank with the largest difference.
    """

    layer: str
    tensor: str
    difference: float
    limit: float
    where: int

    @property
    def ok(self) -> bool:
        """Whether the difference is within the limit. NaN is not."""
        return self.difference <= self.limit


@dataclass(frozen=True)
class ParallelReport:
    """What ``check_parallel`` found, equal on all ranks of a group.

    Attributes:
        ranks: of the group.
        queries: how many were compared, of how many.
        differences: of every tensor of every layer, layers in the order of forward.
    """

    ranks: int
    queries: tuple[int, int]
    differences: tuple[TensorDifference, ...]

    @property
    def ok(self) -> bool:
        """Whether all differences are within their limits."""
        return not self.failures

    @property
    def failures(self) -> tuple[TensorDifference, ...]:
        """Differences past their limits."""
        return tuple(found for found in self.differences if not found.ok)

    @property
    def largest(self) -> dict[str, TensorDifference]:
        """The largest difference of each tensor over all layers, by its name."""
        found: dict[str, TensorDifference] = {}
        for one in self.differences:
            before = found.get(one.tensor)
            # As an exclusion, so that NaN counts as large.
            if before is None or not one.difference <= before.difference:
                found[one.tensor] = one
        return found

    def raise_if_different(self) -> None:
        """Raise ValueError with the first wrong tensor of each wrong layer, if there is any."""
        first: dict[str, TensorDifference] = {}
        for one in self.failures:
            first.setdefault(one.layer, one)
        if first:
            told = "; ".join(
                f"{one.tensor} of {layer} differs by {one.difference:.1e} on rank {one.where}, "
                f"rounding explains {one.limit:.1e}"
                for layer, one in first.items()
            )
            raise ValueError(f"layers must compute on {self.ranks} ranks what one computes: {told}")

    def __str__(self) -> str:
        layers = dict.fromkeys(one.layer for one in self.differences)
        done, total = self.queries
        verdict = "no layer differs" if self.ok else "WRONG"
        what = f"{len(layers)} attention layers on {self.ranks} ranks against one"
        lines = [f"{what}, {done:,} of {total:,} queries compared: {verdict}"]
        rows: list[tuple[str, ...]] = [("tensor", "largest difference", "limit", "layer", "rank")]
        rows += [_row(one) for one in self.largest.values()]
        lines += _aligned(rows)
        if not self.ok:
            lines.append("past the limit:")
            lines += _aligned([_row(one) for one in self.failures])
        return "\n".join(lines)


def _row(one: TensorDifference) -> tuple[str, ...]:
    numbers = (f"{one.difference:.1e}", f"{one.limit:.1e}")
    return (one.tensor, *numbers, one.layer, str(one.where))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
