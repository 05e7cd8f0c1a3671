"""What a comparison finds in one step (near-ties, arrays and scalars, rungs), and the terms on which it is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from diptych.engine import Precision
from diptych.errors import UserError
from diptych.parity.steps import Rung
from diptych.parity.tolerances import TOLERANCES

Status = Literal["green", "red", "skipped"]


@dataclass(frozen=True, kw_only=True)
class NearTie:
    """A token that the sides drew differently, the uniform being on a boundary of the cumulative distribution."""

    row: int
    position: int
    tokens: tuple[int, int]
    margin: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One array or scalar of both sides. error: in the unit of its rung's kind (equal: how many elements differ;
    max_abs; relative_l2; metric: relative to the larger), inf where it cannot be compared, and then detail says why.
    index, pair: the worst element and both its values. count: how many numbers were compared."""

    name: str
    error: float
    limit: float
    detail: str = ""
    index: tuple[int, ...] | None = None
    pair: tuple[float, float] | None = None
    count: int = 0

    @property
    def is_red(self) -> bool:
        return not self.error <= self.limit

    @property
    def over(self) -> float:
        """error / limit: above 1 is red (inf where the limit is 0)."""
        if self.error == 0:
            return 0.0
        return math.inf if not math.isfinite(self.error) or self.limit == 0 else self.error / self.limit

    def __str__(self) -> str:
        at = "" if self.index is None else f" at {list(self.index)}"
        values = "" if self.pair is None else f": {self.pair[0]!r} and {self.pair[1]!r}"
        return (
            f"{self.name}: {self.error:.3g} (limit {self.limit:.1e}){at}{values}{self.detail and f' ({self.detail})'}"
        )


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """A line of the ladder for one step. findings: worst first. reason: why it was skipped. notes: what was seen and is
    not red, or was left out and why."""

    rung: Rung
    status: Status
    limit: float
    findings: tuple[Finding, ...] = ()
    near_ties: tuple[NearTie, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Finding | None:
        return self.findings[0] if self.findings else None

    @property
    def red(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.is_red)

    @property
    def count(self) -> int:
        """How many numbers were compared."""
        return sum(one.count for one in self.findings)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a comparison of two producers allows. precision: the coarser of both. limits: other limits by rung name.

    replay: what was given must be equal bit for bit (False: both ran free, given arrays are compared like made ones).
    mixed: the producers' precisions differ, so float32 against float64 is no difference. vanishing: tensors, by role,
    whose gradient is 0 but for rounding (`vanishing_gradients`): measured against the norm of all gradients together;
    their new weights change nothing and are listed, not compared.
    """

    precision: Precision
    limits: Mapping[str, float] = field(default_factory=dict)
    replay: bool = True
    mixed: bool = False
    vanishing: Mapping[str, Collection[str]] = field(default_factory=dict)

    def limit(self, rung: Rung) -> float:
        """Raises UserError where nothing can be compared in this precision."""
        if rung.name in self.limits:
            return self.limits[rung.name]
        return 0.0 if rung.tolerance is None else self.tolerance(rung.tolerance)

    def tolerance(self, name: str) -> float:
        try:
            return TOLERANCES[name].at(self.precision)
        except ValueError as error:
            raise UserError(
                f"{error}: rounding hides bugs there. Record both sides in float32 or float64, or give limits of your "
                f"own, --tolerance RUNG=LIMIT for every rung"
            ) from None

    @property
    def noise(self) -> float:
        """How far probabilities and log-probabilities may honestly be apart."""
        return self.limits["policy"] if "policy" in self.limits else self.tolerance("model")

    def floor(self, rung: Rung) -> float:
        """Absolute: losses and logged means are sums of terms of both signs, differences below it are rounding. 0 for
        other rungs, and with the user's own limits in a precision that has no tolerance."""
        if rung.name not in ("loss", "metrics"):
            return 0.0
        found = TOLERANCES["function" if rung.name == "loss" else "metric_floor"]
        return 0.0 if getattr(found, self.precision) is None else found.at(self.precision)


def first_true(where: np.ndarray) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape))


def is_float(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"  # ml_dtypes' kind is "V"


def number(value: np.generic) -> float:
    return float(value)


def join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
