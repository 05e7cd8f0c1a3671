"""What two arrays' difference means: never a mean alone, never cosine alone (facts in docs/parity.md).

Every function takes a (side A), b (side B) of one shape and a bool mask of that shape (None: everywhere), and measures
in float64 unless it says otherwise. Non-finite numbers give NaN or infinity here; the ladder calls them red before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Mask = np.ndarray | None


def ulp_distance(a: np.ndarray, b: np.ndarray, mask: Mask = None) -> tuple[int, tuple[int, ...]]:
    """The largest distance in units in the last place of the coarser dtype (how many of its numbers lie between), and
    where. -0 and 0 are the same number."""
    coarse = min((a.dtype, b.dtype), key=lambda one: one.itemsize)
    unsigned = np.dtype(f"u{coarse.itemsize}")
    top = unsigned.type(1 << (8 * coarse.itemsize - 1))

    def ordered(values: np.ndarray) -> np.ndarray:
        """Unsigned integers in the order of the floats that the bits mean."""
        bits = np.ascontiguousarray(values.astype(coarse)).view(unsigned).reshape(values.shape)
        return np.where(bits & top, top - (bits & ~top), top + bits)

    x, y = ordered(a), ordered(b)
    apart = np.where(_seen(a, mask), np.where(x > y, x - y, y - x), unsigned.type(0))
    index = _index(apart)
    return int(apart[index]), index


def absolute(a: np.ndarray, b: np.ndarray, mask: Mask = None) -> tuple[float, tuple[int, ...], float]:
    """Largest |a - b|, where, and the root of the mean square over the mask."""
    seen = _seen(a, mask)
    distance = np.where(seen, np.abs(_wide(a) - _wide(b)), 0.0)
    index = _index(distance)
    return float(distance[index]), index, float(np.sqrt(np.sum(distance**2) / max(1, seen.sum())))


def relative_l2(a: np.ndarray, b: np.ndarray, mask: Mask = None) -> float:
    """|a - b| / |a|; 0 where both are equal, inf where only a is 0."""
    seen = _seen(a, mask)
    x, y = np.where(seen, _wide(a), 0.0), np.where(seen, _wide(b), 0.0)
    apart, norm = float(np.linalg.norm(x - y)), float(np.linalg.norm(x))
    return 0.0 if apart == 0 else apart / norm if norm > 0 else math.inf


def sign_flips(a: np.ndarray, b: np.ndarray, mask: Mask = None) -> float:
    """Share of elements of opposite sign, of those in the mask that are 0 on neither side."""
    counted = _seen(a, mask) & (a != 0) & (b != 0)
    return float(np.sum(counted & (np.sign(a) != np.sign(b))) / max(1, counted.sum()))


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Of two sides' log-probabilities of the same tokens. k1, k3: estimates of KL(A || B), nats per token (Schulman
    2020: k1 = a - b, k3 = exp(b - a) - 1 - (b - a)). mean_error, max_error: exp|a - b| of a token (1: equal). ess:
    effective sample size of the importance weights exp(a - b), as a share of the tokens (1: equal weights)."""

    k1: float
    k3: float
    mean_error: float
    max_error: float
    ess: float


def divergence(a: np.ndarray, b: np.ndarray, mask: Mask = None) -> Divergence:
    """How far apart two policies are, seen through their log-probabilities of the same tokens."""
    gap = (_wide(a) - _wide(b))[_seen(a, mask)]
    with np.errstate(over="ignore"):
        error = np.exp(np.abs(gap))
        # Weights are divided by the largest before they are squared: the share does not change, nothing overflows.
        weights = np.exp(gap - gap.max())
        k3 = np.mean(np.exp(-gap) - 1 + gap)
    return Divergence(
        k1=float(gap.mean()), k3=float(k3), mean_error=float(error.mean()), max_error=float(error.max()),
        ess=float(weights.sum() ** 2 / np.sum(weights**2) / len(gap)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How many of `total` decisions the sides take differently. margin: the largest distance to the boundary, on the
    nearer side, among them: flips with margins within noise are near-ties."""

    flips: int
    total: int
    margin: float
    index: tuple[int, ...] | None


def clip_flips(
    a: np.ndarray,
    b: np.ndarray,
    *,
    old_logprobs: np.ndarray,
    advantages: np.ndarray,
    clip_range: float,
    mask: Mask = None,
) -> Flips:
    """Tokens whose policy term is clipped on one side only. A term is clipped where the ratio exp(logprobs - old) is
    above 1 + clip_range with a positive advantage, or below 1 - clip_range with a negative one. Margins are distances
    of the ratio to that edge."""
    ratios = [np.exp(_wide(side) - _wide(old_logprobs)) for side in (a, b)]
    edge = np.where(advantages > 0, 1 + clip_range, 1 - clip_range)
    beyond = [np.where(advantages > 0, ratio > edge, ratio < edge) & (advantages != 0) for ratio in ratios]
    return _flips(beyond[0] != beyond[1], np.minimum(*(np.abs(ratio - edge) for ratio in ratios)), _seen(a, mask))


def top_k_flips(a: np.ndarray, b: np.ndarray, *, k: int = 1, mask: Mask = None) -> Flips:
    """Rows of logits [..., vocabulary] whose k largest are other tokens on the other side, by value then by index (k 1:
    argmax). Margins: the gap between the k-th and the next, the smaller of both sides'. mask: [...]."""
    if not 0 < k < a.shape[-1]:
        raise ValueError(f"k must lie in 1..{a.shape[-1] - 1}, got {k}")
    orders = [np.argsort(-_wide(side), axis=-1, kind="stable") for side in (a, b)]
    chosen = [np.sort(order[..., :k], axis=-1) for order in orders]
    gaps = []
    for side, order in zip((a, b), orders, strict=True):
        edge = np.take_along_axis(_wide(side), order[..., k - 1 : k + 1], axis=-1)
        gaps.append(edge[..., 0] - edge[..., 1])
    return _flips((chosen[0] != chosen[1]).any(axis=-1), np.minimum(*gaps), _seen(gaps[0], mask))


def passing_limit(error: float) -> float:
    """The smallest limit of two digits that lets `error` pass."""
    if error == 0 or not math.isfinite(error):
        return error
    scale = 10.0 ** (math.floor(math.log10(error)) - 1)
    limit = float(f"{math.ceil(error / scale) * scale:.1e}")
    return limit if limit >= error else float(f"{(math.ceil(error / scale) + 1) * scale:.1e}")


def _flips(flipped: np.ndarray, margins: np.ndarray, seen: np.ndarray) -> Flips:
    flipped = flipped & seen
    if not flipped.any():
        return Flips(flips=0, total=int(seen.sum()), margin=0.0, index=None)
    known = np.where(np.isnan(margins), np.inf, margins)  # a margin that is not known explains nothing
    index = _index(np.where(flipped, known, -1.0))
    return Flips(flips=int(flipped.sum()), total=int(seen.sum()), margin=float(known[index]), index=index)


def _seen(a: np.ndarray, mask: Mask) -> np.ndarray:
    if mask is None:
        return np.ones(a.shape, bool)
    if mask.shape != a.shape:
        raise ValueError(f"a mask of {list(mask.shape)} for an array of {list(a.shape)}: nothing is broadcast here")
    return mask


def _wide(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float64)


def _index(a: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(a.argmax()), a.shape))
