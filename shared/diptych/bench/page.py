"""Results as one self-contained HTML page: bars by phase, rooflines, figures, ratios. No script, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diptych.bench.contest import GROUPS, PHASES
from diptych.bench.intensity import limits
from diptych.bench.results import Figures, Result, figures
from diptych.bench.terminal import (
    ceilings,
    decimals,
    differences,
    figure_rows,
    group_of,
    how,
    pairs,
    ratio_rows,
    setting,
    system,
    warnings,
)
from diptych.run.charts import number
from diptych.run.page import details, header, page, table, tile

COLORS = {"rollout": 1, "score": 2, "update": 3, "": 6}
SHADES = (1.0, 0.7, 0.45, 0.25)  # of the phases of a group, the longest first
ROOFLINE = ("prefill", "decode", "score", "update")  # a point of each is marked by its first letter
STYLE = """
.bars text { fill: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
.bars text.small { fill: var(--soft); font-size: 11.5px; }
.bars rect { fill: var(--c); }
.bars .range { stroke: var(--ink); stroke-width: 1.2; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.6; stroke-linejoin: round; }
.short { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.point { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.letter { fill: var(--card); font-size: 10.5px; font-weight: 700; }
.key i.round { width: 10px; height: 10px; border: 0; border-radius: 50%; background: var(--c); vertical-align: -1px; }
.pair { display: grid; grid-template-columns: minmax(0, max-content) minmax(360px, 1fr); gap: 14px; margin-top: 14px;
  align-items: start; }
.pair th, .pair td { padding: 3px 9px; }
@media (max-width: 900px) { .pair { grid-template-columns: minmax(0, 1fr); } }
p.warning { margin: 10px 0 0; padding: 8px 14px; border-radius: 8px; border: 1px solid var(--c2); font-size: 13.5px; }
p.lead { max-width: 120ch; }
td { white-space: nowrap; }
"""


def bench_page(results: Sequence[Result], *, scaling: str = "") -> str:
    """The whole page. scaling: a section's HTML, escaped already."""
    title = "Benchmarks"
    body = [
        f"<style>{STYLE}</style>",
        header(title, _facts(results)),
        f'<section class="tiles">{"".join(map(_tile, results))}</section>',
        *map(_section, results),
        f"<h2>How cost grows</h2>{scaling}" if scaling else "",
        "<h2>Made by</h2>",
        _commands(results),
        _versions(results),
        "<footer>Each contestant is a process of its own; they take turns, one iteration each. Seconds are medians. "
        "MFU: the products that the mathematics asks for, nothing counted twice, over the best that a plain product "
        "reached on this machine. Made by diptych bench.</footer>",
    ]
    return page(title, "\n".join(part for part in body if part))


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Machine, versions, dates."""
    machines = [one.machine for one in results]
    packages = [one.get("packages", {}) for one in machines]
    versions = [(name, _all(found.get(name) for found in packages)) for name in ("jax", "torch", "deepspeed")]
    return [
        ("date", _all(one.date.split(" ")[0] for one in results)),
        ("system", _all(map(system, results))),
        ("processors", _all(one.get("processors") for one in machines)),
        ("memory", _all(f"{one['memory_gib']} GiB" for one in machines if one.get("memory_gib"))),
        ("Diptych", _all(one.get("diptych") for one in machines)),
        ("Python", _all(one.get("python") for one in machines)),
        *versions,
        *_peer_versions(results),
    ]


def _peer_versions(results: Sequence[Result]) -> list[tuple[str, str]]:
    """A peer's name and the versions that it tells."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for one in result.contestants:
            if one.kind == "peer":
                found.setdefault(one.name, []).append(one.about.get("environment") or {})
    return [
        (name, _all(", ".join(f"{package} {version}" for package, version in one.items()) for one in told))
        for name, told in found.items()
    ]


def _all(values: Iterable[Any]) -> str:
    """Those that there are, each once."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _tile(result: Result) -> str:
    """The fastest engine (or whoever there is), and how it does against the peers."""
    found = {one.name: figures(result, one) for one in result.contestants}
    engines = [one.name for one in result.contestants if one.kind == "engine"]
    best = min(engines or found, key=lambda name: found[name].seconds)
    others = [other for one, other in pairs(result) if one == best]
    times = [f"{found[other].seconds / found[best].seconds:.2f} x as fast as {other}" for other in others]
    return tile(
        f"{result.workload.name}, {setting(result)}",
        f"{best} {number(found[best].seconds, digits=3)} s",
        ", ".join(times),
    )


def _section(result: Result) -> str:
    """One workload: bars, roofline, ratios, figures."""
    found = [figures(result, one) for one in result.contestants]
    names = [one.name for one in result.contestants]
    rows = [[_indented(label), *cells] for label, cells in figure_rows(result)]
    compared = ratio_rows(result)
    parts = [
        f"<h2>{escape(result.workload.name)}, {setting(result)}</h2>",
        f'<p class="lead">{escape(result.workload.describe())}.<br>{escape(how(result))}.</p>',
        _bars(found),
        *(f'<p class="warning">{escape(one)}</p>' for one in warnings(result)),
        *(f'<p class="note">{escape(one)}</p>' for one in differences(result)),
        _ratios(compared),
        '<div class="pair">',
        table(["seconds, if no unit is said", *names], rows, numeric=range(1, len(names) + 1)),
        _roofline(result),
        "</div>",
    ]
    return "\n".join(part for part in parts if part)


def _ratios(compared: Sequence[Sequence[str]]) -> str:
    if not compared:
        return ""
    columns = ["an iteration (least..most of any round)", "rollout", "score", "update", "first", "memory"]
    return (
        "<h3>Times as fast, times as much memory: the other's over one's own</h3>"
        f"{table(columns, compared, numeric=range(1, len(columns)))}"
    )


def _indented(label: str) -> str:
    """Two spaces as one wide one, which HTML keeps."""
    return label.replace("  ", "\u2003")


def _commands(results: Sequence[Result]) -> str:
    commands = "\n".join(dict.fromkeys(one.command for one in results if one.command)) or "no command is known"
    return f'<figure><pre style="border:0">{escape(commands)}</pre></figure>'


def _versions(results: Sequence[Result]) -> str:
    """Everything that is known of the machines and of the contestants."""
    told = {
        f"{one.workload.name}, {setting(one)}, {one.date}": {
            "load": one.load,
            "ceilings": ceilings(one),
            "machine": {**one.machine, "platform": system(one)},
            "contestants": {each.name: each.about for each in one.contestants},
        }
        for one in results
    }
    text = json.dumps(told, indent=1, default=str, ensure_ascii=False)
    return details("Machine, versions, what each contestant says of itself", f"<pre>{escape(text)}</pre>")


def _bars(found: Sequence[Figures]) -> str:
    """A bar for each contestant, stacked by phase in the order of an iteration; whoever tells less has fewer parts."""
    left, width, height, pitch = 110, 1120, 24, 56
    digits = decimals(found)
    scale = (width - left - 110) / max(one.most for one in found)
    order = [*GROUPS, ""]
    told = {phase for one in found for phase, seconds in one.phases.items() if seconds > 0}
    names = sorted(told, key=lambda name: (order.index(group_of(name)), _place(name)))
    shades = {name: _shade(name, found) for name in names}
    drawn: list[str] = []
    for row, one in enumerate(found):
        x, y = float(left), row * pitch
        drawn.append(
            f'<text x="{left - 10}" y="{y + height / 2}" dy="0.34em" text-anchor="end">{escape(one.name)}</text>'
        )
        for phase in names:
            if seconds := max(0.0, one.phases.get(phase, 0.0)):
                label = escape(f"{one.name}, {phase}: {seconds:.{digits}f} s, {seconds / one.seconds:.1%}")
                drawn.append(
                    f'<rect class="c{COLORS[group_of(phase)]}" x="{x:.2f}" y="{y}" width="{seconds * scale:.2f}" '
                    f'height="{height}" opacity="{shades[phase]}"><title>{label}</title></rect>'
                )
                x += seconds * scale
        low, high, middle = left + one.least * scale, left + one.most * scale, y + height / 2
        line = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
        drawn.append(f'<path class="range" d="{line}"/>')
        drawn.append(f'<text x="{max(x, high) + 8:.1f}" y="{middle}" dy="0.34em">{one.seconds:.{digits}f} s</text>')
        parts = [f"{group} {one.groups[group]:.{digits}f}" for group in GROUPS if one.groups[group]]
        rest = sum(one.phases.get(name, 0.0) for name in ("data", "other"))
        text = " · ".join([*parts, f"data and other {rest:.{digits}f}"])
        drawn.append(f'<text class="small" x="{left}" y="{y + height + 14}">{text}</text>')
    keys = "".join(
        f'<span class="key"><i class="square c{COLORS[group_of(name)]}" style="opacity:{shades[name]}"></i>'
        f"{escape(name)}</span>"
        for name in names
    )
    label = escape("; ".join(f"{one.name}: {one.seconds:.{digits}f} s" for one in found))
    return (
        '<figure class="wide"><figcaption><span class="title">Seconds of an iteration, by phase</span>'
        '<span class="keys">medians; the line at the end: least to most</span></figcaption>'
        f'<svg class="bars" viewBox="0 -2 {width} {len(found) * pitch - 12}" role="img" aria-label="{label}">'
        f'{"".join(drawn)}</svg><div class="keys below">{keys}</div></figure>'
    )


def _place(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _shade(phase: str, found: Sequence[Figures]) -> float:
    """A group's longest phase has the full colour; a coarse phase (the group itself) too."""
    group = group_of(phase)
    if phase == group:
        return SHADES[0]
    longest = {name: max(one.phases.get(name, 0.0) for one in found) for name in PHASES if group_of(name) == group}
    rank = sorted(longest, key=lambda name: -longest[name]).index(phase)
    return SHADES[min(rank, len(SHADES) - 1)]


def _roofline(result: Result) -> str:
    """FLOP/s over FLOPs per byte, both logarithmic: the measured roof, and a point for each engine's phases."""
    asked = limits(result.workload, result.ceilings)
    engines = [figures(result, one) for one in result.contestants if one.kind == "engine"]
    if not asked or not engines:
        return ""
    peak, bandwidth = result.ceilings["flops"], result.ceilings["copy_bytes"]
    points = [
        (one.name, color, phase, one.mfu[phase] * peak)
        for color, one in enumerate(engines, 1)
        for phase in ROOFLINE
        if one.mfu.get(phase)
    ]
    ridge = peak / bandwidth
    xs = _Decades.around([*(asked[phase].intensity for _, _, phase, _ in points), ridge / 2, ridge * 4])
    ys = _Decades.around([*(reached for *_, reached in points), peak * 1.3, peak / 15])
    width, height, left, right, top, bottom = 470, 330, 56, 10, 4, 44

    def at(intensity: float, flops: float) -> tuple[float, float]:
        x = left + xs.share(intensity) * (width - left - right)
        return x, height - bottom - ys.share(flops) * (height - top - bottom)

    drawn = _grid(xs, ys, at)
    start = max(10.0**xs.low, 10.0**ys.low / bandwidth)
    corners = [(start, start * bandwidth), (ridge, peak), (10.0**xs.high, peak)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*corner) for corner in corners))
    drawn.append(f'<path class="roof" d="M{path}"/>')
    drawn.append(_tick(width - right, at(ridge, peak)[1] - 6, f"{peak / 1e9:,.0f} GFLOP/s", "end"))
    marks: list[str] = []
    told: dict[str, str] = dict.fromkeys(ROOFLINE, "")
    for name, color, phase, reached in points:
        limit = asked[phase]
        roof = min(peak, limit.intensity * bandwidth)
        x, y = at(limit.intensity, reached)
        text = f"{name}, {phase}: {reached / 1e9:.4g} GFLOP/s at {limit.intensity:.3g} FLOP/byte, {reached / roof:.0%}"
        drawn.append(f'<path class="short" d="M{x:.1f} {at(limit.intensity, roof)[1]:.1f}V{y:.1f}"/>')
        marks.append(
            f'<g><title>{escape(text)} of the roof</title><circle class="point c{color}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="8"/><text class="letter" x="{x:.1f}" y="{y:.1f}" dy="0.34em" text-anchor="middle">'
            f"{phase[0].upper()}</text></g>"
        )
        told[phase] += f" · {escape(name)} <b>{reached / roof:.0%}</b>"
    keys = "".join(
        f'<span class="key"><i class="round c{color}"></i>{escape(one.name)}</span>'
        for color, one in enumerate(engines, 1)
    )
    letters = "".join(
        f'<span class="key"><b>{phase[0].upper()}</b> {phase}, {asked[phase].intensity:.3g} FLOP/byte{text}</span>'
        for phase, text in told.items()
        if text
    )
    label = escape("; ".join(f"{name} {phase}: {reached / 1e9:.3g} GFLOP/s" for name, _, phase, reached in points))
    return (
        f'<figure><figcaption><span class="title">Roofline</span><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(drawn + marks)}</svg>'
        f'<div class="keys below">{letters}</div>'
        f'<p class="note">Shares are of the roof, which was measured: {escape(ceilings(result))}. Bytes are estimated, '
        "the least that a phase moves: weights once a pass, what a layer's products put out written once and read "
        "once, the cache, Adam's state in an update; no attention scores, no logits, nothing elementwise. What stays "
        "in a processor's cache can lie above the slope.</p></figure>"
    )


def _grid(xs: _Decades, ys: _Decades, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """Lines, their labels, the axes' names."""
    left, bottom = at(10.0**xs.low, 10.0**ys.low)
    right, top = at(10.0**xs.high, 10.0**ys.high)
    drawn = []
    for tick in xs.ticks:
        x, _ = at(tick, 10.0**ys.low)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        drawn.append(_tick(x, bottom + 16, number(tick), "middle"))
    for tick in ys.ticks:
        _, y = at(10.0**xs.low, tick)
        drawn.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_tick(left - 7, y + 4, number(tick / 1e9), "end"))
    drawn.append(_tick((left + right) / 2, bottom + 34, "FLOP per byte", "middle"))
    drawn.append(_tick(left - 44, top + 12, "GFLOP/s", "start"))
    return drawn


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


class _Decades:
    """A logarithmic axis. low, high: its ends, as powers of ten; they need not be whole. ticks: 1, 2, 5, 10, ..."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high
        powers = range(math.floor(low), math.ceil(high))
        ticks = [step * 10.0**power for power in powers for step in ((1, 2, 5) if high - low < 2.5 else (1,))]
        self.ticks = [tick for tick in ticks if 10.0**low <= tick <= 10.0**high]

    @classmethod
    def around(cls, values: Sequence[float]) -> _Decades:
        """With a little room on either side."""
        return cls(math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15)

    def share(self, value: float) -> float:
        return (math.log10(value) - self.low) / (self.high - self.low)
