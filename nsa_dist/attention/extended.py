"""Keys and values of a call with their halos, and where their gradients go.

Letters: N local tokens, E rows of a buffer with its halo, G KV heads, D widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from nsa_dist.attention.call import Call
from nsa_dist.attention.in_parts import Source
from nsa_dist.comm import Work, begin_halo
from nsa_dist.comm.exact import PartSource, SetSums, home, opened


class Extended(Mapping[str, tuple[Tensor, Tensor]]):
    """K [E, G, Dk] and V [E, G, Dv] of each set with its halo; shared sets are sent once.

    All halos begin to travel at once. A set is waited for when it is first read.
    """

    def __init__(
        self, call: Call, keys_NGD: Mapping[str, Tensor], values_NGD: Mapping[str, Tensor]
    ) -> None:
        self._first: dict[str, str] = {}
        self._works: dict[str, Work[tuple[Tensor, Tensor]]] = {}
        self._finished: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[str, SetSums] = {}
        self._tickets: dict[str, Tensor] = {}
        for name, k in keys_NGD.items():
            v = values_NGD.get(name)
            same = [o for o in self._works if keys_NGD[o] is k and values_NGD.get(o) is v]
            self._first[name] = same[0] if same else name
            if same:
                continue
            if v is None:  # Keys that only select blocks have no values.
                v = k.new_zeros(*k.shape[:2], 0)
            halo = call.plan.halos[name]
            if call.plan.parts is not None:
                sums = self._sums_of(call, name, k, v)
                self._sums[name] = sums
                self._tickets[name] = home(sums, k, v)
                k, v = k.detach(), v.detach()
            self._works[name] = begin_halo(k, v, halo, call.channel)

    def _sums_of(self, call: Call, name: str, k: Tensor, v: Tensor) -> SetSums:
        """Where the gradients of a set go with ``exact_gradients``."""
        config, parts = call.config, call.plan.parts
        assert parts is not None
        used = {
            "compressed": config.uses_compression,
            "selected": "selected" in config.branches,
            "window": "window" in config.branches,
        }
        reads = [x for x in used if used[x] and (not config.independent_kv or x == name)]
        by_part = [x for x in reads if x != "selected"]
        selects = "selected" in reads
        return SetSums(call.plan.halos[name], parts, call.channel, by_part, selects, k, v)

    def sums(self, name: str) -> tuple[SetSums, Tensor]:
        """With ``exact_gradients``: where the gradients of a set go, and its readers' ticket."""
        _ = self[name]
        first = self._first[name]
        return self._sums[first], self._tickets[first]

    def source(self, name: str, reader: str) -> Source:
        """The set, for a branch that reads it."""
        return self.by_part(name, reader) if self._sums else self[name]

    def by_part(self, name: str, reader: str) -> PartSource:
        """The same with ``exact_gradients``."""
        return PartSource(*self.sums(name), self[name], reader)

    def requires_grad(self, name: str) -> bool:
        """Whether a set gets gradients."""
        if self._sums:
            return self.sums(name)[1].requires_grad
        return self[name][0].requires_grad

    def finish(self) -> None:
        """Wait for the sets that were not read yet."""
        for name in self:
            _ = self[name]

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        first = self._first[name]
        if first not in self._finished:
            self._finished[first] = self._works[first].finish()
            if self._sums:
                self._tickets[first] = opened(self._sums[first], self._tickets[first])
        return self._finished[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)
