"""The table of family x check that a run of the family tests ends with.

A test notes what it measured with `record_property` (so it survives pytest-xdist); the terminal summary collects.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEY = "family_check"
EXACT = "0"


def note(row: str, check: str, value: float, limit: float) -> tuple[str, tuple[str, str, float, float]]:
    """One measurement as a property of a test: the largest error found, and what it may be."""
    return KEY, (row, check, float(value), float(limit))


def measurements(properties: Iterable[Iterable[tuple[str, Any]]]) -> list[tuple[str, str, float, float]]:
    """All measurements among the properties of many tests."""
    return [tuple(value) for one in properties for name, value in one if name == KEY]  # pyright: ignore[reportReturnType]


def table(found: Iterable[tuple[str, str, float, float]]) -> list[str]:
    """Lines: a row for each family, a column for each check in the order of their first measurement.

    A cell is the largest error of both engines, `0` where everything is equal, with `FAIL` where one was above its
    limit; empty where the check does not apply.
    """
    cells: dict[str, dict[str, str]] = {}
    worst: dict[tuple[str, str], float] = {}
    failed: set[tuple[str, str]] = set()
    for row, check, value, limit in found:
        key = row, check
        worst[key] = max(worst.get(key, 0.0), value)
        if not value <= limit:
            failed.add(key)
        shown = EXACT if worst[key] == 0 else f"{worst[key]:.1e}"
        cells.setdefault(row, {})[check] = f"FAIL {shown}" if key in failed else shown
    checks = list(dict.fromkeys(check for row in cells.values() for check in row))
    if not checks:
        return []
    lines = [["family", *checks], *([row, *(held.get(check, "") for check in checks)] for row, held in cells.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
