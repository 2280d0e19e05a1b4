"""Randomness is keyed, never streamed: every draw names what it is for, so no draw depends on what was drawn before.

A resumed run, another world size and another micro-batch size therefore see the same numbers.
"""

from __future__ import annotations

import hashlib
import random


def key(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed for one purpose and index, the same on every machine. `key(0, "shuffle", epoch)`."""
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *index: int | str) -> random.Random:
    """A standard-library generator seeded by `key`; for shuffles and choices in plain Python."""
    return random.Random(key(seed, purpose, *index))


def permutation(n: int, seed: int, purpose: str, *index: int | str) -> list[int]:
    """A keyed permutation of range(n)."""
    order = list(range(n))
    generator(seed, purpose, *index).shuffle(order)
    return order
