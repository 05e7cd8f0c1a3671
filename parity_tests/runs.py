"""Free-running float64 runs of a recipe, each engine in a process of its own, and the comparison of their metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diptych.parity.compare import metrics
from diptych.parity.comparison.rungs import why_not_compared
from diptych.parity.tolerances import TOLERANCES
from diptych.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def run(recipe: str, engine: str, output: Path, settings: Sequence[str], *, quick: bool = False) -> list[dict]:
    """The logged metrics of a recipe that an engine runs in a process of its own. quick: XLA compiles without its
    expensive passes."""
    command = [sys.executable, "-m", "diptych.cli", "run", f"recipes/{recipe}.yaml", "--engine", engine]
    done = subprocess.run(
        [*command, "--output", str(output), *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"DIPTYCH_PROGRESS": "off", "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output / "metrics.jsonl")


def numbers(row: dict) -> dict[str, float]:
    return {k: v for k, v in row.items() if k not in ("stage", "step") and why_not_compared(k) is None}


def compare(a: list[dict], b: list[dict]) -> list:
    """What differs between two free-running float64 runs."""
    assert [(r["stage"], r["step"]) for r in a] == [(r["stage"], r["step"]) for r in b]
    limit = TOLERANCES["trajectory_relative"].float64
    found = []
    for x, y in zip(a, b, strict=True):
        found += metrics(f"{x['stage']} {x['step']}", numbers(x), numbers(y), limit=limit, floor=1e-12)
    return found
