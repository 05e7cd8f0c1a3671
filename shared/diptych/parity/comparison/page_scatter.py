"""Error against magnitude of one array, both axes logarithmic: rounding follows the line of one ulp, a bug does not."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from diptych.parity.comparison.expanded import Expanded
from diptych.parity.comparison.ladder import StepResult
from diptych.parity.comparison.patterns import where_counted
from diptych.parity.trace import Step, Trace

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 360, 56, 40, 12
MAX_POINTS = 1500


def scatter_section(expanded: Expanded | None, shown: StepResult | None, a: Trace, b: Trace) -> str:
    """Of the first red array; where nothing is red, of the array that is nearest to its limit."""
    if shown is None:
        return ""
    left, right = a.read(shown.stage, shown.step), b.read(shown.stage, shown.step)
    name = _name(expanded, shown, left, right)
    if name is None:
        return ""
    limit = None
    if expanded is not None and expanded.rung.rung.kind == "max_abs":
        limit = expanded.finding.limit
    return scatter(name, left, right, limit=limit, where=shown.name)


def _name(expanded: Expanded | None, shown: StepResult, a: Step, b: Step) -> str | None:
    red = () if expanded is None else expanded.rung.red
    everything = sorted((one for rung in shown.rungs for one in rung.findings), key=lambda one: -one.over)
    for one in (*red, *everything):
        if one.name in a.tensors and one.name in b.tensors:
            x, y = a.array(one.name), b.array(one.name)
            if x.shape == y.shape and x.dtype.kind == "f" and y.dtype.kind == "f" and (x != y).any() and x.size > 1:
                return one.name
    return None


def scatter(name: str, a: Step, b: Step, *, limit: float | None, where: str) -> str:
    """The figure. limit: drawn as a level line where the limit is absolute. Elements that are equal have no place on a
    logarithmic axis: they are counted below. At most 1500 points, the largest errors always among them."""
    seen = where_counted(a, b, name)
    x, y = (side.array(name).astype(np.float64)[seen] for side in (a, b))
    kept = np.isfinite(x) & np.isfinite(y)
    size, error = np.abs(x), np.abs(x - y)
    drawn = np.flatnonzero(kept & (error > 0) & (size > 0))
    if not len(drawn):
        return ""
    total = len(drawn)
    if total > MAX_POINTS:
        order = drawn[np.argsort(-error[drawn], kind="stable")]
        rest = order[100:]
        drawn = np.concatenate([order[:100], rest[:: math.ceil(len(rest) / (MAX_POINTS - 100))]])
    eps = float(np.finfo(min((a.array(name).dtype, b.array(name).dtype), key=lambda one: one.itemsize)).eps)
    lows, highs = _decades(size[drawn]), _decades(np.append(error[drawn], [limit] if limit else []))

    def at(value: float, error_: float) -> tuple[float, float]:
        p = (math.log10(value) - lows[0]) / (lows[1] - lows[0])
        q = (math.log10(error_) - highs[0]) / (highs[1] - highs[0])
        return LEFT + p * (WIDTH - LEFT - EDGE), HEIGHT - BOTTOM - q * (HEIGHT - BOTTOM - EDGE)

    parts = [*_axes(lows, highs, at)]
    ends = [(10.0**edge, eps * 10.0**edge) for edge in lows]
    (x1, y1), (x2, y2) = (at(*end) for end in ends)
    parts.append(
        f'<clipPath id="plot"><rect x="{LEFT}" y="{EDGE}" width="{WIDTH - LEFT - EDGE}" '
        f'height="{HEIGHT - BOTTOM - EDGE}"/></clipPath>'
        f'<line class="ulp" clip-path="url(#plot)" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    )
    if limit:
        level = at(10.0 ** lows[0], limit)[1]
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{level:.1f}" y2="{level:.1f}"/>')
    worst = int(drawn[error[drawn].argmax()])
    for index in [*(i for i in drawn if i != worst), worst]:
        cx, cy = at(float(size[index]), float(error[index]))
        text = escape(f"A {x[index]:.9g}, B {y[index]:.9g}, |a - b| {error[index]:.3g}")
        kind = "point worst" if index == worst else "point"
        radius = 5 if index == worst else 2.6
        parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}"><title>{text}</title></circle>')
    equal, lost = int((kept & (error == 0)).sum()), int((~kept).sum())
    notes = [f"{len(drawn):,} of {total:,} unequal elements are drawn", f"{equal:,} are equal"]
    notes += [f"{lost:,} are not finite"] if lost else []
    lines = "dotted: one ulp" + ("; dashed: the limit" if limit else "")
    return (
        f"<h2>Error against magnitude</h2>"
        f'<p class="lead">{escape(name)}, {escape(where)}: |a − b| over |a|. Rounding lies along the line of one ulp; '
        f"what lies far above it has a cause.</p>"
        f'<figure class="wide scatter"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="error against magnitude of {escape(name)}">{"".join(parts)}</svg>'
        f'<p class="note">{escape("; ".join(notes))}. {lines}.</p></figure>'
    )


def _decades(values: np.ndarray) -> tuple[int, int]:
    low, high = math.floor(math.log10(float(values.min()))), math.ceil(math.log10(float(values.max())))
    return low, max(high, low + 1)


def _axes(lows: tuple[int, int], highs: tuple[int, int], at) -> list[str]:
    parts = []
    for decade in range(highs[0], highs[1] + 1, max(1, (highs[1] - highs[0]) // 6)):
        level = at(10.0 ** lows[0], 10.0**decade)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{level:.1f}" dy="0.32em" text-anchor="end">1e{decade}</text>'
        )
    for decade in range(lows[0], lows[1] + 1, max(1, (lows[1] - lows[0]) // 8)):
        place = at(10.0**decade, 10.0 ** highs[0])[0]
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">1e{decade}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - EDGE}" y="{HEIGHT - 6}" text-anchor="end">|a|</text>'
        f'<text class="tick" x="{LEFT + 4}" y="{EDGE + 8}">|a − b|</text>'
    )
    return parts
