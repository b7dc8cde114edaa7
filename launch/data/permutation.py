"""A random order of any number of items that is computed, not stored.

A Feistel network over two halves of k bits, with a keyed hash as its round function, permutes 4^k
numbers. Of those the network is applied again to what falls outside the items ("cycle walking"), so
that what remains is a permutation of the items: fewer than four steps on average.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
"""

from __future__ import annotations

import hashlib

from nsa_dist.checks import check

_ROUNDS = 8


class Permutation:
    """A permutation of 0 to ``size`` - 1, in constant memory.

    Args:
        size: items, 1 to 2^63.
        key: chooses the permutation, 0 to 2^64 - 1.
    """

    def __init__(self, size: int, key: int) -> None:
        check(1 <= size <= 1 << 63, "size", size, "1 to 2^63")
        check(0 <= key < 1 << 64, "key", key, "0 to 2^64 - 1")
        self.size = size
        self._bits = max(1, -(-(size - 1).bit_length() // 2))
        self._mask = (1 << self._bits) - 1
        self._key = key.to_bytes(8, "little")

    def __getitem__(self, index: int) -> int:
        """The item at a place.

        Raises:
            IndexError: if there is no such place.
        """
        if not 0 <= index < self.size:
            raise IndexError(index)
        while True:
            index = self._network(index)
            if index < self.size:
                return index

    def _network(self, value: int) -> int:
        left, right = value >> self._bits, value & self._mask
        for number in range(_ROUNDS):
            data = right.to_bytes(8, "little") + bytes([number])
            mixed = hashlib.blake2b(data, digest_size=8, key=self._key).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & self._mask)
        return left << self._bits | right
