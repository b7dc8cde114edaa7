"""Seeds that follow from others."""

from __future__ import annotations

import hashlib


def mix_seed(*parts: int | str) -> int:
    """One seed of several values, 63 bits: neighbouring values give unrelated seeds."""
    head = hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]
    return int.from_bytes(head, "big") >> 1
