"""Does a preference model mean its probabilities? Calibration of sigmoid(margin), in NumPy float64.

A reward model says that the chosen answer of a pair is preferred with probability p = sigmoid(margin), margin being the
chosen score less the rejected one (Bradley and Terry 1952). Which answer is called "chosen" is the outcome itself, so a
pair enters as a classifier's decision: it prefers the answer with the higher score, with confidence sigmoid(|margin|),
and is right where that is the chosen one. At a margin of 0 it is half right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs whose confidence lies in [low, high), the last bin with its upper edge. confidence, accuracy: their means;
    None where there is no pair."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def preference_probability(margins: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """sigmoid(margin), float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -margins.astype(np.float64)))


def reliability(margins: Float[np.ndarray, " pairs"], *, num_bins: int) -> list[Bin]:
    """Confidence against accuracy in `num_bins` bins of equal width over [0.5, 1]."""
    confidence = preference_probability(np.abs(margins))
    right = np.where(margins == 0, 0.5, margins > 0).astype(np.float64)
    place = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for index in range(num_bins):
        inside = place == index
        count = int(inside.sum())
        bins.append(
            Bin(
                low=0.5 + index / (2 * num_bins),
                high=0.5 + (index + 1) / (2 * num_bins),
                count=count,
                confidence=float(confidence[inside].mean()) if count else None,
                accuracy=float(right[inside].mean()) if count else None,
            )
        )
    return bins


def expected_calibration_error(bins: list[Bin]) -> float:
    """sum over bins of count / pairs |accuracy - confidence| (Naeini et al. 2015; Guo et al. 2017, eq. 3)."""
    pairs = sum(one.count for one in bins)
    return sum(
        one.count / pairs * abs(one.accuracy - one.confidence)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    )


def brier_score(margins: Float[np.ndarray, " pairs"]) -> float:
    """mean of (1 - sigmoid(margin))^2 over pairs (Brier 1950, for one of two outcomes): 0 is perfect, 0.25 a coin's."""
    return float(np.mean((1.0 - preference_probability(margins)) ** 2))
