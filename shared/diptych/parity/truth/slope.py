"""A derivative along a direction from values alone: central differences, extrapolated to step 0 (Ridders 1982).

The oracle has no backward pass. What decides between two gradients is the slope of the loss along the direction in
which they differ; in float64 a handful of forward passes give it to nine digits or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SHRINK = 4.0  # from one step size to the next
LEVELS = 6
FIRST_STEP = 0.05  # of the root mean square of what is moved, for a direction of length 1
SMALLEST_SCALE = 0.02  # of tensors that are zero, or nearly
ENOUGH = 1e-11  # relative error at which no further step is tried


class Slope(NamedTuple):
    """value: the derivative. uncertainty: how far off it may be (absolute); large at a kink (a clip's edge, relu at 0)
    that lies within the smallest step."""

    value: float
    uncertainty: float


def slope(difference: Callable[[float], float], *, scale: float) -> Slope:
    """The derivative of F at 0 from `difference(h)` = F(h) - F(-h). scale: the first step size.

    Neville's tableau over shrinking steps; of all its entries the one that agrees best with its neighbours.
    """
    best = Slope(np.nan, np.inf)
    previous: list[float] = []
    step = scale
    for _ in range(LEVELS):
        row = [difference(step) / (2 * step)]
        factor = 1.0
        for column, older in enumerate(previous):
            factor *= SHRINK**2
            row.append((factor * row[column] - older) / (factor - 1))
            uncertainty = max(abs(row[-1] - row[-2]), abs(row[-1] - older))
            if uncertainty < best.uncertainty:
                best = Slope(row[-1], uncertainty)
        if best.uncertainty <= ENOUGH * abs(best.value):
            break
        previous = row
        step /= SHRINK
    return best


def first_step(moved: np.ndarray) -> float:
    """The first step size for moving this array along a direction of length 1."""
    root_mean_square = float(np.sqrt(np.mean(np.asarray(moved, np.float64) ** 2))) if moved.size else 0.0
    return FIRST_STEP * max(root_mean_square, SMALLEST_SCALE)


def direction(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """(a - b) / |a - b| in float64, and |a - b|; zeros where they are equal."""
    distance = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    length = float(np.linalg.norm(distance))
    return (distance / length if length > 0 else distance), length
