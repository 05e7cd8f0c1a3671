"""Sampled tokens of two sides: the same text up to near-ties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from diptych.parity.comparison.findings import Finding, NearTie, Terms, first_true, join, number
from diptych.parity.trace import Step


def drawn(a: Step, b: Step, terms: Terms) -> tuple[np.ndarray | None, tuple[NearTie, ...], list[Finding]]:
    """How far each row's sampled tokens are the same text (bool, True before the first flip); the flips that noise
    explains, and those that it does not. None where the sides' samples cannot be laid side by side."""
    needed = ("response/tokens", "response/mask")
    sides = [[side.tensors.get(name) for name in needed] for side in (a, b)]
    if any(one is None for side in sides for one in side):
        return None, (), []
    (tokens_a, mask_a), (tokens_b, mask_b) = [[one.values for one in side if one is not None] for side in sides]
    if len({one.shape for one in (tokens_a, mask_a, tokens_b, mask_b)}) > 1 or tokens_a.ndim != 2:
        return None, (), []
    if tokens_a.dtype != tokens_b.dtype or mask_a.dtype != bool or mask_b.dtype != bool or not tokens_a.size:
        return None, (), []
    margins = [side.tensors.get("response/margins") for side in (a, b)]
    differs = (mask_a != mask_b) | (mask_a & mask_b & (tokens_a != tokens_b))
    prefix = np.cumsum(differs, axis=1) == 0
    ties, flips = [], []
    for row in np.flatnonzero(differs.any(axis=1)):
        at = (int(row), int(differs[row].argmax()))
        pair = (int(tokens_a[at]), int(tokens_b[at]))
        known = [one.values for one in margins if one is not None and one.values.shape == tokens_a.shape]
        margin = min((float(one[at]) for one in known), default=math.nan)
        if len(known) == 2 and margin <= terms.noise and mask_a[at] and mask_b[at]:
            ties.append(NearTie(row=at[0], position=at[1], tokens=pair, margin=margin))
        else:
            why = "margins are not known" if math.isnan(margin) else f"margin {margin:.3g}, noise {terms.noise:.1e}"
            if not (mask_a[at] and mask_b[at]):
                why = f"the response of {'B' if mask_a[at] else 'A'} has ended before"
            flips.append(
                Finding(
                    name="response/tokens",
                    error=1.0,
                    limit=0.0,
                    index=at,
                    pair=(float(pair[0]), float(pair[1])),
                    detail=f"first flip of the row, no near-tie: {why}",
                )
            )
    return prefix, tuple(ties), flips


def drawn_finding(name: str, a: Step, b: Step, prefix: np.ndarray, flipped: list[Finding]) -> Finding:
    """Sampled tokens, their mask and their ends: equal but for rows that part at a near-tie."""
    count = int(a.array("response/mask").sum())
    if not count:
        return Finding(name=name, error=math.inf, limit=0.0, detail="nothing to compare")
    if name == "response/tokens":
        if not flipped:
            return Finding(name=name, error=0.0, limit=0.0, count=count)
        return replace(
            flipped[0],
            error=float(len(flipped)),
            count=count,
            detail=join(f"{len(flipped)} of {len(prefix)} rows part", flipped[0].detail),
        )
    x, y = a.array(name), b.array(name)
    if x.shape != y.shape or x.dtype != y.dtype:
        return Finding(name=name, error=math.inf, limit=0.0, detail=f"{x.dtype} {x.shape} and {y.dtype} {y.shape}")
    rows = np.asarray(prefix.all(axis=1))  # a row that parts is told of once, by its first flip
    differs = (x != y) & (rows if x.ndim == 1 else rows[:, None])
    error = float(differs.sum())
    index = first_true(differs) if error else None
    pair = None if index is None else (number(x[index]), number(y[index]))
    detail = f"{int(error)} differ" if error else ""
    return Finding(name=name, error=error, limit=0.0, index=index, pair=pair, count=int(x.size), detail=detail)
