"""Comparing two sets of numbers so that the comparison cannot be fooled.

A missing key, another shape, a non-finite number or nothing to compare is a difference, never a skip
(facts behind this: docs/parity.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diptych.engine import Tensors


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity on which two sides disagree. value: by how much (inf where they cannot be compared)."""

    name: str
    value: float
    limit: float
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g} above {self.limit:.1e} ({self.detail})"


def max_abs(
    name: str, a: np.ndarray, b: np.ndarray, *, limit: float, mask: np.ndarray | None = None
) -> list[Difference]:
    """The largest absolute difference of two arrays, over `mask` where given; [] when it is within `limit`."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return [Difference(name=name, value=np.inf, limit=limit, detail=f"shapes {a.shape} and {b.shape}")]
    seen = np.ones(a.shape, bool) if mask is None else np.broadcast_to(mask, a.shape)
    if not seen.any():
        return [Difference(name=name, value=np.inf, limit=limit, detail="nothing to compare")]
    error = np.where(seen, np.abs(a.astype(np.float64) - b.astype(np.float64)), 0.0)
    error = np.where(np.isfinite(error), error, np.inf)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    if error[worst] <= limit:
        return []
    index = tuple(int(i) for i in worst)
    return [
        Difference(name=name, value=float(error[worst]), limit=limit, detail=f"at {index}: {a[worst]!r}, {b[worst]!r}")
    ]


def relative_l2(name: str, a: np.ndarray, b: np.ndarray, *, limit: float) -> list[Difference]:
    """|a - b| / |a| in float64; [] when it is within `limit`. Two all-zero arrays are equal."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return [Difference(name=name, value=np.inf, limit=limit, detail=f"shapes {a.shape} and {b.shape}")]
    norm = float(np.linalg.norm(a))
    distance = float(np.linalg.norm(a - b))
    error = 0.0 if distance == 0 else distance / norm if norm > 0 else np.inf
    if error <= limit:
        return []
    return [Difference(name=name, value=float(error), limit=limit, detail=f"norms {norm:.4g}, {np.linalg.norm(b):.4g}")]


def tensors(name: str, a: Tensors, b: Tensors, *, limit: float) -> list[Difference]:
    """Every tensor's relative L2; a tensor that only one side has is a difference."""
    found = _unmatched(name, a, b, limit)
    for key in sorted(a.keys() & b.keys()):
        found += relative_l2(f"{name}/{key}", a[key], b[key], limit=limit)
    return found


def metrics(
    name: str, a: Mapping[str, float], b: Mapping[str, float], *, limit: float, floor: float = 0.0
) -> list[Difference]:
    """Every metric's |a - b| / max(|a|, |b|), differences up to `floor` (absolute) let pass; unmatched names count."""
    found = _unmatched(name, a, b, limit)
    for key in sorted(a.keys() & b.keys()):
        distance = abs(a[key] - b[key])
        scale = max(abs(a[key]), abs(b[key]))
        error = 0.0 if distance <= floor else distance / scale
        if not error <= limit:
            found.append(Difference(name=f"{name}/{key}", value=error, limit=limit, detail=f"{a[key]!r}, {b[key]!r}"))
    return found


def _unmatched(name: str, a: Mapping, b: Mapping, limit: float) -> list[Difference]:
    lost = sorted(a.keys() ^ b.keys())
    if not a and not b:
        return [Difference(name=name, value=np.inf, limit=limit, detail="nothing to compare")]
    return [Difference(name=f"{name}/{key}", value=np.inf, limit=limit, detail="only on one side") for key in lost]
