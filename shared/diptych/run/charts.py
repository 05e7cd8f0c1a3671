"""Charts as inline SVG and HTML text: no script, no file, no network. Colours and fonts come from the page's style.

A curve with more points than its width can show is drawn by the smallest and largest value of each bin, so that no
spike is lost. Text that comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MAX_POINTS = 400
MAX_MARKERS = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. color: 1 to 6, an entry of the page's palette. markers: dots with the value as a tooltip.

    wide: a broad, pale stroke on which another curve may lie and both are seen. band: (x, low, high) of a pale area.
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    wide: bool = False
    markers: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(title: str, series: Sequence[Series], *, log: bool = False, note: str = "") -> str:
    """A figure with curves over the step. log: a logarithmic y axis, on which values of 0 have no place.

    Returns "" where there is nothing to draw.
    """
    shown = [_positive(one) if log else one for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return ""
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    ys += [y for one in shown for _, *ends in one.band for y in ends if y > 0 or not log]
    x_axis = _Axis.linear(min(xs), max(xs), count=5, integer=True)
    y_axis = _Axis.logarithmic(min(ys), max(ys)) if log else _Axis.linear(min(ys), max(ys), count=4)

    def at_x(x: float) -> float:
        return LEFT + x_axis.share(x) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True):
        y = f"{at_y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="0.32em" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks:
        x = f"{at_x(tick):.1f}"
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 9}" text-anchor="middle">{number(tick)}</text>')
    for one in shown:
        if one.band and not log:
            around = [(x, high) for x, _, high in one.band] + [(x, low) for x, low, _ in reversed(one.band)]
            path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in around)
            parts.append(f'<polygon class="band c{one.color}" points="{path}"/>')
    for one in shown:
        dots = [(at_x(x), at_y(y)) for x, y in _thin(one.points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in dots)
        parts.append(f'<path class="curve c{one.color}{" wide" if one.wide else ""}" d="{path}"/>')
        if (one.markers or len(one.points) == 1) and len(one.points) <= MAX_MARKERS:
            for x, y in one.points:
                label = escape(f"{one.name}, step {number(x)}: {y:.6g}")
                position = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"'
                parts.append(f'<circle class="dot c{one.color}" {position} r="3.2"><title>{label}</title></circle>')
    keys = "".join(
        f'<span class="key"><i class="c{one.color}{" wide" if one.wide else ""}"></i>{escape(one.name)} '
        f"<b>{number(one.points[-1][1])}</b></span>"
        for one in shown
    )
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    label = escape(f"{title}: " + "; ".join(f"{one.name} ends at {one.points[-1][1]:.6g}" for one in shown))
    return (
        f'<figure><figcaption><span class="title">{escape(title)}</span><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>{note}</figure>'
    )


def share_bar(title: str, parts: Mapping[str, float], *, unit: str) -> str:
    """One bar cut by the parts' shares, largest first, with a legend of values. Returns "" where all are 0."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    segments, keys = [], []
    for index, (name, value) in enumerate(ordered):
        color = index % 6 + 1
        label = escape(f"{name}: {value:.3g} {unit}, {value / total:.0%}")
        segments.append(f'<i class="c{color}" style="flex:{value / total:.4f}" title="{label}"></i>')
        keys.append(
            f'<span class="key"><i class="square c{color}"></i>{escape(name)} '
            f"<b>{number(value)}</b> {escape(unit)} · {value / total:.0%}</span>"
        )
    return (
        f'<figure class="wide"><figcaption><span class="title">{escape(title)}</span>'
        f'<span class="keys">{number(total)} {escape(unit)}</span></figcaption>'
        f'<div class="bar">{"".join(segments)}</div><div class="keys below">{"".join(keys)}</div></figure>'
    )


def number(value: float, *, digits: int = 4) -> str:
    """A number in at most `digits` telling digits (three with an exponent), thousands separated."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000 or value == int(value):
        return f"{value:,.{max(0, digits - 4) if value != int(value) else 0}f}"
    return f"{value:.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """A scale and its ticks. share: 0 at the low end, 1 at the high end."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, *, count: int, integer: bool = False) -> _Axis:
        size = max(abs(low), abs(high))
        if integer:
            high = max(high, low + 1)
        elif high == low:  # a constant: room on either side
            low, high = low - (size * 0.1 or 1.0), high + (size * 0.1 or 1.0)
        elif high - low < 1e-3 * size:  # labels that can be told apart at a glance; less than that is flat
            middle = low + (high - low) / 2
            low, high = min(low, middle - 5e-4 * size), max(high, middle + 5e-4 * size)
        step = _nice_step((high - low) / count)
        if integer:
            step = max(1.0, step)
            first = math.ceil(low / step)
            ticks = [index * step for index in range(first, math.floor(high / step) + 1)]
            return cls(low=low, high=high, ticks=ticks)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [float(f"{index * step:.12g}") for index in range(first, last + 1)]
        return cls(low=first * step, high=last * step, ticks=ticks)

    @classmethod
    def logarithmic(cls, low: float, high: float) -> _Axis:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        every = max(1, math.ceil((last - first) / 5))
        ticks = [10.0**exponent for exponent in range(first, last + 1, every)]
        return cls(low=first, high=last, ticks=ticks, is_log=True)

    def labels(self) -> list[str]:
        """The ticks with as many digits as tell them apart."""
        for digits in range(4, 17):
            texts = [number(tick, digits=digits) for tick in self.ticks]
            if len(set(texts)) == len(texts):
                break
        return texts

    def share(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return (value - self.low) / (self.high - self.low)


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _positive(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if y > 0]
    return Series(
        name=series.name, points=points, color=series.color, wide=series.wide, markers=series.markers,
        band=series.band,
    )  # fmt: skip


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS points: the smallest and largest of each bin, and both ends."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        indices = range(start, min(start + size, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]
