"""Keyed randomness: every draw is named by what it is for, never by when it was made (law 5).

NumPy's counter-based Philox 4x64 takes a 128-bit key and a 256-bit counter. The key is a hash of (seed, purpose); the
counter's high words are (step, row) and its low words run over positions. So the draw for one (row, position) is the
same in any batch, any order, any layout, either engine, and after any resume.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_WORD = 2**64


def key(seed: int, purpose: str) -> np.ndarray:
    """The 128-bit Philox key of (seed, purpose): two uint64 words, the same on every machine and Python version."""
    digest = hashlib.blake2b(f"{seed}\x1f{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").copy()


def generator(seed: int, purpose: str, *, step: int = 0, row: int = 0) -> np.random.Generator:
    """A generator at the start of the stream of (seed, purpose, step, row). Streams never overlap."""
    if not (0 <= step < _WORD and 0 <= row < _WORD):
        raise ValueError(f"step and row are unsigned 64-bit counters, got step={step}, row={row}")
    counter = np.array([0, 0, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key(seed, purpose), counter=counter))


def uniforms(
    seed: int, purpose: str, *, step: int, rows: Sequence[int] | Int[np.ndarray, " rows"], num_positions: int
) -> Float[np.ndarray, "rows positions"]:
    """One uniform in [0, 1) for each (row id, position): float32 [rows, positions].

    The values are multiples of 2**-24, so float32 and float64 hold the very same numbers and an engine of either
    precision draws from the same ones. Position p of a row does not depend on `num_positions`.
    """
    draws = np.empty((len(rows), num_positions), dtype=np.float32)
    for index, row in enumerate(rows):
        bits = generator(seed, purpose, step=step, row=int(row)).bit_generator.random_raw(num_positions)
        draws[index] = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return draws


def permutation(seed: int, purpose: str, size: int, *, step: int = 0) -> Int[np.ndarray, " size"]:
    """A permutation of range(size) for (seed, purpose, step), int64."""
    return generator(seed, purpose, step=step).permutation(size)


def normal(seed: int, purpose: str, shape: Sequence[int], *, std: float) -> Float[np.ndarray, "..."]:
    """Initial weights: float32 normal with mean 0 and standard deviation `std`, named by `purpose`."""
    return (generator(seed, purpose).standard_normal(tuple(shape), dtype=np.float64) * std).astype(np.float32)
