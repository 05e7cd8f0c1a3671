"""A plan as text for one terminal screen, and as a self-contained page with its two pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from diptych.plan.hardware import GiB
from diptych.plan.memory import Parts
from diptych.plan.plan import Plan, assumptions
from diptych.run.page import header, page, table, tile

TERMS = ("compute", "memory", "network")
REPEATED = 1.1  # compiled over traced products, from where on a program is named


def describe(plan: Plan) -> str:
    """The whole plan as text."""
    lines = [*_head(plan), "", *_memory(plan)]
    if plan.programs:
        lines += ["", *_time(plan), "", *_collectives(plan)]
    if plan.counted:
        lines += ["", _agreement(plan)]
    if plan.zero:
        lines += ["", *_zero(plan)]
    if plan.found is not None:
        lines += ["", f"the best of {plan.candidates} layouts that fit by the analytic model:", plan.found.recipe_lines]
    stated = [_wrapped(line) for line in assumptions(plan)]
    return "\n".join([*lines, "", "assumed:", *stated])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 112, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _head(plan: Plan) -> list[str]:
    layout, machine = plan.workload.settings.layout, plan.topology
    verdict = "it fits" if plan.fits else "it does not fit"
    lines = [
        f"{plan.workload.name} on {machine.name} ({machine.num_chips} x {machine.chip.title}): {verdict}",
        f"train mesh {layout.train}, decode mesh {layout.decode}; {plan.workload.compute}, remat "
        f"{plan.workload.settings.remat}",
    ]
    if plan.too_large is not None:
        lines += textwrap.wrap(f"too large: {plan.too_large}", 112, break_on_hyphens=False)
    if plan.rates is not None:
        made = plan.rates
        what = "an iteration" if plan.workload.rollouts is not None else "a step"
        speed = f"{made.generated:,.0f} tokens/s generated, " if made.generated else ""
        price = f"${made.dollars:,.2f} per million {'generated' if made.generated else 'trained'} tokens"
        lines.append(
            f"at best: {made.seconds:.3g} s {what}; {speed}{made.trained:,.0f} tokens/s trained; {price} "
            f"(${made.dollars_per_hour:,.0f} an hour)"
        )
    return lines


def _columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows of cells under one another: the first `left` columns flush left, the others right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory(plan: Plan) -> list[str]:
    limit = dict.fromkeys(plan.memory, plan.topology.chip.memory)
    return memory_table("memory of a device", plan.memory, limit)


def memory_table(title: str, phases: Mapping[str, Parts], limits: Mapping[str, float | None]) -> list[str]:
    """Phases side by side: their parts, in MiB where all is small, their sums and (None: not known) their limits."""
    parts = list(dict.fromkeys(part for one in phases.values() for part in one))
    fullest = max(sum(one.values()) for one in phases.values())
    unit, divisor = ("GiB", GiB) if fullest > GiB / 10 else ("MiB", 2**20)

    def cell(size: float | None) -> str:
        return "" if size is None else f"{size / divisor:.3f}"

    rows = [[f"{title}, {unit}", *phases]]
    for part in parts:
        rows.append([f"  {part}", *(cell(one.get(part)) for one in phases.values())])
    rows.append(["  total", *(cell(sum(one.values())) for one in phases.values())])
    rows.append(["  limit", *(cell(limits[phase]) for phase in phases)])
    return _columns(rows)


def _time(plan: Plan) -> list[str]:
    rows = [["time, s", *TERMS, "at best", "limited by", "TFLOP", "of it again", "GB read, written"]]
    for phase, one in plan.seconds.items():
        work = [program for program in plan.programs if program.phase == phase]
        flops = sum(program.share * program.calls for program in work)
        again = sum((program.flops - program.needed_flops) / program.devices * program.calls for program in work)
        moved = sum(program.hbm * program.calls for program in work)
        rows.append([
            f"  {phase}", *(f"{getattr(one, term):.3g}" for term in TERMS), f"{one.bound:.3g}", one.limit,
            f"{flops / 1e12:.4g}", f"{again / max(flops, 1):.0%}", f"{moved / 1e9:.4g}",
        ])  # fmt: skip
    return _columns(rows) + [
        f"  {one.name}: the compiled program multiplies {one.device_flops / one.share:.1f} times a device's share"
        for one in plan.programs
        if one.share and one.device_flops > REPEATED * one.share
    ]


def _collectives(plan: Plan) -> list[str]:
    found: dict[tuple[str, str, int], list[float]] = {}
    for program in plan.programs:
        for one in program.collectives:
            total = found.setdefault((program.phase, one.kind, one.devices), [0.0, 0.0])
            total[0] += one.count * program.calls
            total[1] += one.bytes * program.calls
    rows = [["collectives", "kind", "devices", "how many", "GB that a device sends"]]
    for (phase, kind, devices), (count, sent) in sorted(found.items(), key=lambda item: -item[1][1]):
        if sent >= 0.01 * max(total[1] for total in found.values()):
            rows.append([f"  {phase}", kind, str(devices), f"{count:,.0f}", f"{sent / 1e9:.4g}"])
    shown = len(rows) - 1
    lines = _columns(rows, left=2)
    if shown < len(found):
        lines.append(f"  ({len(found) - shown} kinds of less than a hundredth of the largest are in --json)")
    return lines


def _agreement(plan: Plan) -> str:
    name, counted, compiled = max(plan.counted, key=lambda one: abs(one[2] / one[1] - 1))
    return (
        f"weights and moments: counted and compiled bytes agree within {abs(compiled / counted - 1):.2%} "
        f"({name}: {counted:,.0f} and {compiled:,.0f} of each device)"
    )


def _zero(plan: Plan) -> list[str]:
    rows = [
        [
            f"DeepSpeed on {plan.num_gpus} x {plan.gpu.name}",
            "GiB of a GPU",
            "of host",
            "fullest",
            "largest part",
            "fits",
            "s",
            "tokens/s",
            "$ / M tokens",
        ]
    ]
    for one in plan.zero:
        part = max(one.parts, key=lambda name: one.parts[name])
        chosen = " (the recipe's)" if one.stage == plan.workload.settings.layout.zero.stage else ""
        rows.append([
            f"  ZeRO stage {one.stage}{chosen}", f"{one.total / GiB:.1f}", f"{one.host / GiB:.1f}", one.phase,
            f"{part} {one.parts[part] / GiB:.1f}",
            "yes" if one.fits else "no", f"{one.rates.seconds:.3g}", f"{one.rates.generated:,.0f}",
            f"{one.rates.dollars:.2f}",
        ])  # fmt: skip
    return _columns(rows)


# The page ----------------------------------------------------------------------------------------------------------


def write_page(plan: Plan, path: Path) -> None:
    """A self-contained HTML page: memory and time as stacked bars, and every table."""
    layout = plan.workload.settings.layout
    facts = [
        ("machine", f"{plan.topology.num_chips} x {plan.topology.chip.title}"), ("train mesh", str(layout.train)),
        ("decode mesh", str(layout.decode)), ("precision", plan.workload.compute),
    ]  # fmt: skip
    fullest = max(sum(parts.values()) for parts in plan.memory.values())
    tiles = [
        tile("Fits", "yes" if plan.fits else "no",
             f"{fullest / GiB:.1f} of {plan.topology.chip.memory / GiB:.1f} GiB of a device at the fullest"),
    ]  # fmt: skip
    if plan.rates is not None:
        made = plan.rates
        tiles += [
            tile("Iteration, at best", f"{made.seconds:.3g} s", "a lower bound: see the assumptions"),
            tile("Generated", f"{made.generated:,.0f} tokens/s", f"{made.trained:,.0f} tokens/s trained"),
            tile("Price", f"${made.dollars:,.2f}", f"per million tokens at ${made.dollars_per_hour:,.0f} an hour"),
        ]
    body = [
        header(f"{plan.workload.name} on {plan.topology.name}", facts),
        f'<div class="tiles">{"".join(tiles)}</div>',
        "" if plan.fits else f"<p>{escape(plan.too_large or '')}</p>",
        "<h2>Memory of a device</h2>", memory_bars(plan),
        "<h2>Time of an iteration</h2>" if plan.seconds else "", time_bars(plan),
        "<h2>In numbers</h2>",
        f"<details open><summary>As printed</summary><pre>{escape(describe(plan))}</pre></details>",
        _programs(plan) if plan.programs else "",
    ]  # fmt: skip
    path.write_text(page(f"Plan: {plan.workload.name} on {plan.topology.name}", "\n".join(body)), encoding="utf-8")


def memory_bars(plan: Plan) -> str:
    """A bar for each phase, cut by parts, with the limit as a line."""
    bars = {phase: {part: size / GiB for part, size in parts.items()} for phase, parts in plan.memory.items()}
    return _stacked("GiB", bars, limit=plan.topology.chip.memory / GiB)


def time_bars(plan: Plan) -> str:
    """Three bars for each phase (compute, memory, network), and a line where the phase is at best."""
    groups = {f"{phase}: {term}": {term: getattr(one, term)} for phase, one in plan.seconds.items() for term in TERMS}
    return _stacked("s", groups, limit=None) if groups else ""


def _stacked(unit: str, bars: Mapping[str, Mapping[str, float]], *, limit: float | None) -> str:
    """Horizontal stacked bars as inline SVG. limit: a line across all of them."""
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    largest = max([*(sum(parts.values()) for parts in bars.values()), limit or 0.0]) or 1.0
    left, width, height, gap = 150, 860, 24, 12
    scale = (width - left - 80) / largest
    drawn: list[str] = []
    for row, (bar, sizes) in enumerate(bars.items()):
        x, y = float(left), row * (height + gap)
        drawn.append(_text(left - 8, y + height / 2, bar, "end"))
        for part, size in sizes.items():
            label = escape(f"{part}: {size:.4g} {unit}")
            drawn.append(
                f'<rect class="c{names.index(part) % 6 + 1}" x="{x:.1f}" y="{y}" width="{size * scale:.1f}" '
                f'height="{height}" fill="var(--c)" opacity="{_shade(names, part)}"><title>{label}</title></rect>'
            )
            x += size * scale
        drawn.append(_text(x + 6, y + height / 2, f"{sum(sizes.values()):.3g} {unit}", "start"))
    bottom = len(bars) * (height + gap)
    if limit is not None:
        at = left + limit * scale
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="-4" y2="{bottom}" style="stroke:var(--c2)"/>')
        drawn.append(_text(at, bottom + 10, f"limit {limit:.4g} {unit}", "middle"))
    keys = "".join(
        f'<span class="key"><i class="square c{index % 6 + 1}" style="opacity:{_shade(names, name)}"></i>'
        f"{escape(name)}</span>"
        for index, name in enumerate(names)
    )
    label = escape("; ".join(f"{bar}: {sum(sizes.values()):.3g} {unit}" for bar, sizes in bars.items()))
    return (
        f'<figure class="wide"><svg viewBox="0 -6 {width} {bottom + 26}" role="img" aria-label="{label}">'
        f'{"".join(drawn)}</svg><div class="keys below">{keys}</div></figure>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" dy="0.32em" text-anchor="{anchor}">{escape(text)}</text>'


def _shade(names: Sequence[str], name: str) -> str:
    """Six colours, then the same ones paler."""
    return f"{1 - 0.35 * (names.index(name) // 6):.2f}"


def _programs(plan: Plan) -> str:
    rows = [
        [
            one.phase, one.name, str(one.calls), f"{one.seconds:.0f}", f"{one.argument / GiB:.3f}",
            f"{one.temporary / GiB:.3f}", f"{one.share / 1e12:.4g}", f"{one.device_flops / 1e12:.4g}",
            f"{one.hbm / 1e9:.4g}", f"{sum(part.bytes for part in one.collectives) / 1e9:.4g}",
        ]
        for one in plan.programs
    ]  # fmt: skip
    columns = (
        "phase", "program", "calls", "compiled in s", "arguments GiB", "temporaries GiB", "TFLOP traced",
        "TFLOP compiled", "GB memory", "GB sent",
    )  # fmt: skip
    return "<h2>Programs</h2><p class='lead'>Of one call on one device.</p>" + table(
        columns, rows, numeric=range(2, 10)
    )
