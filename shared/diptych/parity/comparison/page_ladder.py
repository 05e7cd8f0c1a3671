"""The comparison of two traces as one page: ladder, heat maps, error against magnitude, tokens, settings of both.

No script, no network: HTML, inline SVG and CSS, in light and in dark. Titles (hover) hold the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diptych.parity.comparison.expanded import Expanded
from diptych.parity.comparison.ladder import Comparison, StepResult
from diptych.parity.comparison.page_colors import STYLE, level
from diptych.parity.comparison.page_scatter import scatter_section
from diptych.parity.comparison.page_tokens import token_section
from diptych.parity.comparison.terminal import about, account, line_of
from diptych.parity.steps import LADDER
from diptych.parity.trace import Trace
from diptych.run.page import details, header, page, settings, table, tile

MAX_COLUMNS = 60  # steps in a heat map; more are shown by the worst of neighbours
MAX_ROWS = 120  # arrays in a heat map; more are left out, the worst kept
GROUPS = ("gradient", "first", "second", "weights")


def ladder_page(found: Comparison, expanded: Expanded | None, a: Trace, b: Trace) -> str:
    """The whole page."""
    names = [str(one.get("name", "?")) for one in found.producers]
    title = f"{names[0]} and {names[1]}: {'the same' if found.code == 0 else 'different'}"
    sides = zip("AB", found.names, found.producers, strict=True)
    facts = [(side, f"{name}: {about(producer)}") for side, name, producer in sides]
    shown = _shown_step(found, expanded)
    body = [
        f"<style>{STYLE}</style>",
        header(title, facts),
        f'<section class="tiles">{"".join(_tiles(found, expanded))}</section>',
        _remarks(found),
        "<h2>The ladder</h2>",
        '<p class="lead">Every number that a step hands to the next, in the order in which an error travels. '
        "Error over limit; the worst step of each rung.</p>",
        _ladder(found),
        _first(expanded),
        "<h2>Rung by step</h2>",
        '<p class="lead">Error over limit. Everything above 1 is red.</p>',
        _legend(),
        _rungs_by_step(found),
        _layers_by_step(found),
        _tensors(shown) if shown is not None else "",
        scatter_section(expanded, shown, a, b),
        token_section(shown, a, b) if shown is not None else "",
        _near_ties(found),
        "<h2>Settings of both sides</h2>",
        _settings(found),
        "<footer>Relative L2: |a − b| / |a| of one array, in float64. A near-tie is a token that rounding explains: "
        "its draw lay within the noise of a boundary. Made by diptych parity compare.</footer>",
    ]
    return page(title, "\n".join(part for part in body if part))


def _shown_step(found: Comparison, expanded: Expanded | None) -> StepResult | None:
    """The step whose arrays are drawn: that of the first red rung, else the one that is nearest to its limits."""
    if expanded is not None and expanded.step.is_deep:
        return expanded.step
    deep = [step for step in found.steps if step.is_deep]  # a step of rl has tokens to show
    return max(
        deep,
        key=lambda step: (step.stage == "rl", max((r.worst.over for r in step.rungs if r.worst), default=0.0)),
        default=None,
    )


def _tiles(found: Comparison, expanded: Expanded | None) -> list[str]:
    red = sum(bool(step.red) for step in found.steps)
    deep = sum(step.is_deep for step in found.steps)
    worst = "no rung is red"
    where = "within every limit"
    if expanded is not None:
        worst, where = expanded.rung.rung.title, f"{expanded.step.name}: {expanded.finding.name}"
    return [
        tile("verdict", "different" if found.code else "the same", f"{red} of {len(found.steps)} steps are red"),
        tile("first red rung", worst, where),
        tile("compared", f"{found.count:,}", f"numbers in {len(found.steps)} steps, {deep} with arrays"),
        tile("near-ties", str(len(found.near_ties)), "tokens that rounding explains"),
        tile("limits", found.precision, found.replay or "both ran free"),
    ]


def _remarks(found: Comparison) -> str:
    items = [f'<li class="bad">{escape(one)}</li>' for one in found.differences]
    items += [f"<li>{escape(one)}</li>" for one in found.notes]
    return f'<ul class="remarks">{"".join(items)}</ul>' if items else ""


def _ladder(found: Comparison) -> str:
    rows = []
    for rung in LADDER:
        status, text = line_of(found, rung)
        number, _, rest = text.partition("  ")  # two spaces, as on the terminal
        if status == "skipped":
            number, rest = "", text
        rows.append(
            f'<tr><td><span class="chip {status}">{status}</span></td><td>{escape(rung.title)}</td>'
            f'<td class="number">{escape(number)}</td><td class="wrap">{escape(rest)}</td></tr>'
        )
    head = "<tr><th></th><th>rung</th><th class='number'>error / limit</th><th>worst</th></tr>"
    return (
        f'<div class="scroll"><table class="ladder"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _first(expanded: Expanded | None) -> str:
    if expanded is None:
        return ""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in account(expanded))
    return (
        f"<h2>First red rung: {escape(expanded.rung.rung.title)}, {escape(expanded.step.name)}</h2>"
        f'<dl class="account">{lines}</dl>'
    )


def _legend() -> str:
    names = ("up to 0.1", "up to 1", "up to 10", "up to 1000", "more", "no limit would do")
    keys = "".join(f'<span class="key"><i class="cell c-{i}"></i>{name}</span>' for i, name in enumerate(names))
    return (
        f'<div class="keys below legend">{keys}<span class="key"><i class="cell c-none"></i>not recorded</span></div>'
    )


Cell = tuple[float | None, str]  # error over limit, None where there is nothing; what hovering says


def heat_map(rows: Sequence[tuple[str, Sequence[Cell]]], columns: Sequence[str]) -> str:
    """A grid of coloured cells with names on the left and column names below."""
    lines = []
    for name, cells in rows:
        drawn = "".join(f'<i class="cell {level(over)}" title="{escape(text)}"></i>' for over, text in cells)
        lines.append(
            f'<span class="row-name" title="{escape(name)}">{escape(name)}</span><span class="cells">{drawn}</span>'
        )
    few = " few" if len(columns) <= 12 else ""  # wide enough for every name
    ticks = "".join(f"<i>{escape(one)}</i>" for one in _ticks(columns))
    return (
        f'<figure class="wide heat{few}" style="--n:{len(columns)}">{"".join(lines)}'
        f'<span></span><span class="cells ticks">{ticks}</span></figure>'
    )


def _ticks(columns: Sequence[str]) -> list[str]:
    """Names that have room: a stage at its first column, then the numbers of every so many-th."""
    every = max(1, math.ceil(len(columns) / 16))
    found: list[str] = []
    since = every  # columns since the last name
    for index, column in enumerate(columns):
        stage, _, number = column.partition(" ")
        is_new = index == 0 or columns[index - 1].partition(" ")[0] != stage
        shown = column if is_new or not number[:1].isdigit() else number if since >= every else ""
        since = (0 if len(shown) > 5 else 1) if shown else since + 1  # long names take the room of two
        found.append(shown)
    return found


def _bins(steps: Sequence[StepResult]) -> list[list[StepResult]]:
    """Neighbouring steps of one stage, at most MAX_COLUMNS bins in all."""
    stages = list(dict.fromkeys(step.stage for step in steps))
    size = max(1, math.ceil(len(steps) / max(1, MAX_COLUMNS - len(stages))))
    found = []
    for stage in stages:
        own = [step for step in steps if step.stage == stage]
        found += [own[start : start + size] for start in range(0, len(own), size)]
    return found


def _column(steps: Sequence[StepResult]) -> str:
    several = "" if len(steps) == 1 else f"–{steps[-1].step}"
    return f"{steps[0].stage} {steps[0].step}{several}"


def _rungs_by_step(found: Comparison) -> str:
    bins = _bins(found.steps)
    rows = []
    for rung in LADDER:
        cells: list[Cell] = []
        for steps in bins:
            ones = [(step, one) for step in steps for one in step.rungs if one.rung is rung and one.worst is not None]
            if not ones:
                cells.append((None, f"{_column(steps)}: not recorded"))
                continue
            step, worst = max(ones, key=lambda one: one[1].worst.over if one[1].worst else 0.0)
            cells.append((worst.worst.over if worst.worst else None, f"{step.name}: {worst.worst}"))
        rows.append((rung.title, cells))
    return heat_map(rows, [_column(steps) for steps in bins])


def _layer(name: str) -> str:
    """The place of a parameter: ROLE, layer number, or what stands before and behind the layers."""
    role, _, tensor = name.split("/", 2)
    numbers = [part for part in tensor.split(".") if part.isdigit()]
    if numbers:
        return f"{role} layer {numbers[0]}"
    return f"{role} {tensor.rsplit('.', 1)[0].rsplit('.', 1)[-1]}"


def _layers_by_step(found: Comparison) -> str:
    """Gradients, the worst of each layer, over the steps."""
    deep = [step for step in found.steps if step.is_deep]
    bins = _bins(deep)
    worst: dict[str, dict[int, Cell]] = {}
    for index, steps in enumerate(bins):
        for step in steps:
            for rung in step.rungs:
                for one in rung.findings if rung.rung.name == "gradients" else ():
                    cells = worst.setdefault(_layer(one.name), {})
                    if index not in cells or one.over > (cells[index][0] or 0.0):
                        cells[index] = (one.over, f"{step.name}: {one}")
    if not worst:
        return ""
    rows = [
        (name, [cells.get(index, (None, f"{_column(steps)}: not recorded")) for index, steps in enumerate(bins)])
        for name, cells in sorted(worst.items(), key=lambda one: _place(one[0]))
    ]
    return (
        "<h2>Layer by step</h2>"
        '<p class="lead">Gradients of the probe batch: the worst array of each layer, error over limit.</p>'
        + heat_map(rows, [_column(steps) for steps in bins])
    )


def _tensors(step: StepResult) -> str:
    """Every parameter of one step: gradient, moments, new weights."""
    cells: dict[str, dict[str, Cell]] = {}
    for rung in step.rungs:
        for one in rung.findings:
            parts = one.name.split("/", 2)
            if len(parts) == 3 and parts[1] in GROUPS:
                cells.setdefault(f"{parts[0]} {parts[2]}", {})[parts[1]] = (one.over, str(one))
    if not cells:
        return ""
    order = sorted(cells, key=_place)
    left_out = ""
    if len(order) > MAX_ROWS:
        kept = sorted(order, key=lambda name: -max(over or 0.0 for over, _ in cells[name].values()))[:MAX_ROWS]
        left_out = f" The worst {MAX_ROWS} of {len(order)} are shown."
        order = [name for name in order if name in set(kept)]
    rows = [(name, [cells[name].get(group, (None, "not recorded")) for group in GROUPS]) for name in order]
    return (
        f"<h2>Arrays of {escape(step.name)}</h2>"
        f'<p class="lead">Error over limit of each parameter\'s gradient, moments and new value.{left_out}</p>'
        + heat_map(rows, ("gradient", "first moment", "second moment", "new weights")).replace(
            '"wide heat"', '"wide heat few"'
        )
    )


def _place(name: str) -> tuple:
    """Roles, then layers in the order of the forward pass as far as names tell it."""
    role, _, tensor = name.partition(" ")
    numbers = [int(part) for part in tensor.replace(" ", ".").split(".") if part.isdigit()]
    before = 0 if any(part in tensor for part in ("embed", "wte", "wpe", "tok")) else 1 if numbers else 2
    return role, before, numbers[:1], tensor


def _near_ties(found: Comparison) -> str:
    ties = found.near_ties
    if not ties:
        return ""
    rows = [
        [step.name, str(tie.row), str(tie.position), str(tie.tokens[0]), str(tie.tokens[1]), f"{tie.margin:.2e}"]
        for step, tie in ties
    ]
    return details(
        f"{len(ties)} near-ties", table(["step", "row", "position", "A", "B", "margin"], rows, numeric=(1, 2, 3, 4, 5))
    )


def _settings(found: Comparison) -> str:
    """What both sides were computed of and with; rows that differ first."""
    sides = [
        dict(settings({"producer": dict(producer), **_without_recipe(provenance)}))
        for producer, provenance in zip(found.producers, found.provenances, strict=True)
    ]
    names = list(dict.fromkeys((*sides[0], *sides[1])))
    rows = [[name, *(side.get(name, "not known") for side in sides)] for name in names]
    differ = [row for row in rows if row[1] != row[2]]
    equal = [row for row in rows if row[1] == row[2]]
    parts = [table(["setting", "A", "B"], differ, kind="settings")] if differ else ["<p>No setting differs.</p>"]
    parts.append(details(f"{len(equal)} settings that are equal", table(["setting", "A", "B"], equal, kind="settings")))
    for side, provenance in zip("AB", found.provenances, strict=True):
        if provenance.get("recipe"):
            parts.append(details(f"recipe of {side}", f"<pre>{escape(str(provenance['recipe']))}</pre>"))
    return "".join(parts)


def _without_recipe(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name != "recipe"}
