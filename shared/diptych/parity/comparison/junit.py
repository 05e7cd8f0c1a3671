"""A comparison for machines: as JSON, and as JUnit XML with a test case for each rung and step."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from diptych.parity.comparison.expanded import Expanded
from diptych.parity.comparison.findings import RungResult
from diptych.parity.comparison.ladder import Comparison
from diptych.parity.comparison.terminal import account


def as_json(found: Comparison, expanded: Expanded | None) -> dict[str, Any]:
    """Everything that was found. Numbers that JSON does not have are written as words ("inf", "nan")."""
    first = None
    if expanded is not None:
        first = {
            "stage": expanded.step.stage, "step": expanded.step.step, "rung": expanded.rung.rung.name,
            "finding": asdict(expanded.finding), "place": asdict(expanded.place), "measured": dict(expanded.measured),
            "truth": expanded.truth, "verdict": expanded.verdict, "passing": expanded.passing,
            "causes": [{"key": one.key, "says": one.says, "look": one.look} for one in expanded.causes],
        }  # fmt: skip
    return _writable(
        {
            "format": "diptych-parity", "version": 1, "same": found.code == 0, "names": found.names,
            "producers": found.producers, "precision": found.precision, "replay": found.replay,
            "numbers": found.count, "differences": found.differences, "notes": found.notes,
            "steps": [
                {"stage": one.stage, "step": one.step, "arrays": one.is_deep, "rungs": [_rung(r) for r in one.rungs]}
                for one in found.steps
            ],
            "first": first,
        }
    )  # fmt: skip


def _rung(rung: RungResult) -> dict[str, Any]:
    return {
        "rung": rung.rung.name, "status": rung.status, "reason": rung.reason, "limit": rung.limit,
        "findings": [asdict(one) for one in rung.findings], "near_ties": [asdict(one) for one in rung.near_ties],
        "notes": rung.notes,
    }  # fmt: skip


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _writable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def as_junit(found: Comparison, expanded: Expanded | None) -> str:
    """JUnit XML: a suite for each step, a case for each rung; what only one side has is a suite of its own."""
    root = ElementTree.Element("testsuites", name="diptych parity")
    counts = [0, 0, 0]
    if found.differences:
        suite = ElementTree.SubElement(root, "testsuite", name="steps of both sides")
        for one in found.differences:
            case = ElementTree.SubElement(suite, "testcase", classname="diptych.parity.steps", name=one)
            ElementTree.SubElement(case, "failure", message=one, type="different").text = one
        _count(suite, counts, tests=len(found.differences), failures=len(found.differences))
    for step in found.steps:
        suite = ElementTree.SubElement(root, "testsuite", name=step.name)
        for rung in step.rungs:
            where = f"diptych.parity.{step.stage}"
            case = ElementTree.SubElement(suite, "testcase", classname=where, name=f"{step.name}: {rung.rung.title}")
            if rung.status == "skipped":
                ElementTree.SubElement(case, "skipped", message=rung.reason)
            elif rung.status == "red":
                message = _clean(str(rung.red[0]))
                failure = ElementTree.SubElement(case, "failure", message=message, type="different")
                lines = [str(one) for one in rung.red[:50]]
                lines += [f"and {len(rung.red) - 50} more"] if len(rung.red) > 50 else []
                if expanded is not None and rung is expanded.rung:
                    lines += ["", *(f"{name}: {text}" for name, text in account(expanded))]
                failure.text = _clean("\n".join(lines))
            if rung.notes:
                ElementTree.SubElement(case, "system-out").text = _clean("\n".join(rung.notes))
        statuses = [rung.status for rung in step.rungs]
        _count(
            suite, counts, tests=len(statuses), failures=statuses.count("red"), skipped=statuses.count("skipped")
        )  # fmt: skip
    for name, value in zip(("tests", "failures", "skipped"), counts, strict=True):
        root.set(name, str(value))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _count(suite: ElementTree.Element, counts: list[int], *, tests: int, failures: int, skipped: int = 0) -> None:
    for index, (name, value) in enumerate((("tests", tests), ("failures", failures), ("skipped", skipped))):
        suite.set(name, str(value))
        counts[index] += value
    suite.set("errors", "0")


def _clean(text: str) -> str:
    """XML has no control characters, not even escaped ones."""
    return "".join(
        c if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff" and not "\ud800" <= c <= "\udfff") else "?"
        for c in text
    )
