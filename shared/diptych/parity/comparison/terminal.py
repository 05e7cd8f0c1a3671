"""The comparison of two traces on one terminal screen: both producers, one line a rung, the first red rung expanded."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from diptych.parity.comparison.expanded import Expanded
from diptych.parity.comparison.findings import Finding
from diptych.parity.comparison.ladder import Comparison
from diptych.parity.steps import LADDER, Rung

COLORS = {"green": "32", "red": "31", "skipped": "2", "bold": "1"}


def print_comparison(found: Comparison, expanded: Expanded | None) -> None:
    """Colours only on a terminal, and not where NO_COLOR is set (no-color.org)."""
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(format_comparison(found, expanded, colors=colors))


def format_comparison(found: Comparison, expanded: Expanded | None, *, colors: bool = False) -> str:
    """The whole screen as text."""

    def paint(text: str, kind: str) -> str:
        return f"\x1b[{COLORS[kind]}m{text}\x1b[0m" if colors else text

    lines = [
        f"{side}  {name}: {about(producer)}"
        for side, name, producer in zip("AB", found.names, found.producers, strict=True)
    ]
    deep = sum(step.is_deep for step in found.steps)
    how = found.replay or "both ran free"
    lines.append(
        f"   {how}; {len(found.steps)} steps, {deep} with arrays, {found.count:,} numbers, limits of {found.precision}"
    )
    lines += [f"   note: {note}" for note in found.notes]
    lines += [paint(f"   different: {one}", "red") for one in found.differences]
    lines.append("")
    width = max(len(rung.title) for rung in LADDER)
    for rung in LADDER:
        status, text = line_of(found, rung)
        lines.append(f"{paint(f'{status:7}', status)}  {rung.title:{width}}  {text}")
    ties = found.near_ties
    if ties:
        step, tie = ties[0]
        lines.append(
            f"near-ties: {len(ties)} (the first: {step.name}, row {tie.row}, position {tie.position}, tokens "
            f"{tie.tokens[0]} and {tie.tokens[1]}, margin {tie.margin:.1e})"
        )
    if expanded is not None:
        lines += ["", paint(f"first red rung: {expanded.rung.rung.title}, {expanded.step.name}", "bold")]
        lines += [f"  {name:12} {text}" for name, text in account(expanded)]
    lines += ["", paint("different", "red") if found.code else paint("the same", "green")]
    return "\n".join(lines)


def about(producer: Mapping[str, Any]) -> str:
    """A producer in one line: precision and versions."""
    rest = [
        f"{key} {value}" for key, value in producer.items() if key not in ("name", "precision") and _is_plain(value)
    ]
    return ", ".join([str(producer.get("precision", "precision not known")), *rest])[:150]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and bool(str(value)) and len(str(value)) < 40


def line_of(found: Comparison, rung: Rung) -> tuple[str, str]:
    """A rung over all steps: its status, and the worst number over its limit with its step."""
    results = found.of(rung)
    reached = [(step, one) for step, one in results if one.status != "skipped"]
    if not reached:
        reasons = {one.reason for _, one in results} or {"no step was compared"}
        return "skipped", "; ".join(sorted(reasons))
    red = [one for one in reached if one[1].status == "red"]
    step, worst = max(reached, key=lambda one: one[1].worst.over if one[1].worst else 0.0)
    finding = worst.worst
    assert finding is not None
    number = _number(finding, rung)
    at = f"{len(red)} of {len(reached)} steps red; worst " if red else ""
    return ("red" if red else "green"), f"{number}  {at}{step.name}: {finding.name}"


def _number(finding: Finding, rung: Rung) -> str:
    if rung.kind == "equal":
        if finding.error == float("inf"):
            return "cannot be compared"
        return f"{int(finding.error)} differ" if finding.error else "equal"
    if finding.error == float("inf"):
        return "cannot be compared"
    return f"{finding.error:.1e} / {finding.limit:.0e}"


def account(one: Expanded) -> list[tuple[str, str]]:
    """The first red rung as (name, text) lines."""
    finding, place = one.finding, one.place
    more = f" (and {one.others} more of this rung)" if one.others else ""
    lines = [("what", finding.name + more)]
    where = [] if finding.index is None else [f"index {list(finding.index)}"]
    where += [] if place.row is None else [f"row id {place.row}"]
    where += [] if place.position is None else [f"position {place.position}"]
    if place.token is not None:
        where.append(f"token {place.token}" + ("" if place.text is None else f" {place.text!r}"))
    if where:
        lines.append(("where", ", ".join(where)))
    if finding.pair is not None:
        truth = "" if one.truth is None else f", truth {one.truth:.9g}"
        lines.append(("values", f"A {finding.pair[0]:.9g}, B {finding.pair[1]:.9g}{truth}"))
    error = "cannot be compared" if finding.error == float("inf") else f"{finding.error:.3g}, limit {finding.limit:.1e}"
    lines.append(("error", error + (f" ({finding.detail})" if finding.detail else "")))
    if one.measured:
        texts = [f"{name} {value}" for name, value in one.measured]
        for start in range(0, len(texts), 3):
            lines.append(("" if start else "measures", "; ".join(texts[start : start + 3])))
    if one.verdict:
        lines.append(("who", one.verdict))
    for index, cause in enumerate(one.causes):
        lines += [("likely" if index == 0 else "or", cause.says), ("", f"look at: {cause.look}")]
    if one.passing == float("inf"):
        lines.append(("would pass", "with no limit"))
    elif one.rung.rung.kind != "equal":
        lines.append(("would pass", f"--tolerance {one.rung.rung.name}={one.passing:.1e}"))
    return [(name, text) for name, text in lines if text]
