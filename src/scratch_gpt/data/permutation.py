"""A shuffle of ``range(size)`` that is computed instead of stored: microseconds per index, no memory at any size.

A keyed Feistel network over the digits of a mixed-radix number (Black and Rogaway, 2002, "Ciphers with Arbitrary Finite
Domains"): an index is ``left * columns + right``, and each round adds a hash of one digit to the other. Every round is
invertible, so the composition is a bijection of ``range(rows * columns)``. Results beyond ``size`` are enciphered again
(cycle walking), which leaves a bijection of ``range(size)``. ``rows * columns`` exceeds ``size`` by less than one row,
so this is rare.
"""

import hashlib
import math

ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """Maps each index of ``range(size)`` to a different value of it, in an order determined by ``key``."""

    def __init__(self, size: int, *key: int | str):
        self.size = size
        self.rows = math.isqrt(size - 1) + 1 if size > 1 else 1
        self.columns = -(-size // self.rows)
        self._keys = [random_integer(*key, number) for number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        assert 0 <= index < self.size
        index = self._encipher(index)
        while index >= self.size:
            index = self._encipher(index)
        return index

    def _encipher(self, index: int) -> int:
        left, right = divmod(index, self.columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + _mix(left ^ key)) % self.columns
            else:
                left = (left + _mix(right ^ key)) % self.rows
        return left * self.columns + right


def random_integer(*key: int | str) -> int:
    """Return a 64-bit hash of ``key``, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """Mix the bits of a 64-bit integer with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
