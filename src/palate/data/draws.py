"""Shuffles as Python's `random.Random` draws them, so that splits which other people published can be had again, exactly.

The module `random` itself is not used in this library, because its state is everybody's.
"""

import hashlib
from collections.abc import Iterator

import numpy as np


def python_order(seed: int, n: int) -> list[int]:
    """Where `random.Random(seed).shuffle` puts n things: place i of the shuffled list holds thing `python_order(seed, n)[i]`.

    The Mersenne Twister (Matsumoto and Nishimura 1998), seeded by the 32-bit words of the seed as NumPy's legacy generator is by
    a list, and a Fisher-Yates shuffle from the end. O(n) in Python.
    """
    words = _words(seed)
    out = list(range(n))
    for last in range(n - 1, 0, -1):
        spare = 32 - (last + 1).bit_length()
        place = next(words) >> spare
        while place > last:
            place = next(words) >> spare
        out[last], out[place] = out[place], out[last]
    return out


def of_user(seed: int, user: str) -> int:
    """The seed of one user's draws in the MRM repository: the seed plus MD5 of the id, modulo 2^32."""
    return seed + int(hashlib.md5(user.encode("utf-8", "surrogatepass")).hexdigest(), 16) % 2**32


def _words(seed: int) -> Iterator[int]:
    key = [seed & 0xFFFFFFFF, *([seed >> 32] if seed >> 32 else [])]
    generator = np.random.RandomState(key)  # a list: an array of one word would be taken as a number, which seeds otherwise
    while True:
        yield from np.frombuffer(generator.bytes(256), dtype="<u4").tolist()
