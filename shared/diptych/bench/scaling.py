"""How cost grows: a workload at half, once and twice each of its sizes, a power law through the seconds.

`seconds = a size^k`, k by least squares on logarithms: 1 is proportional; below 1, something was there to be shared
out; above, attention, caches that no longer fit, or a mistake. `doubled` is the dearest doubling. Processes: the same
work by one and by two, each on cores of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.bench.contest import GROUPS, contest, cores_of, engine, file_name, race
from diptych.bench.results import Result, figures
from diptych.bench.work import write_work
from diptych.bench.workloads import Workload
from diptych.errors import UserError
from diptych.run.page import table

FACTORS = (0.5, 1.0, 2.0)
AXES = ("batch", "prompt", "answer", "layers", "width")
PARTS = ("iteration", *GROUPS)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One engine's seconds along one axis. sizes: of the axis. seconds: part -> medians, in the order of sizes."""

    engine: str
    workload: str
    axis: str
    sizes: Sequence[int]
    seconds: Mapping[str, Sequence[float]]

    def exponent(self, part: str = "iteration") -> float:
        """k of seconds = a size^k, by least squares on logarithms."""
        return exponent(self.sizes, self.seconds[part])

    def doubled(self, part: str = "iteration") -> float:
        """The dearest doubling: seconds at twice a size over seconds at it."""
        found = self.seconds[part]
        pairs = [
            found[j] / found[i]
            for i, small in enumerate(self.sizes)
            for j, large in enumerate(self.sizes)
            if large == 2 * small and found[i] > 0
        ]
        return max(pairs)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def grown(work: Workload, axis: str, factor: float) -> Workload:
    """The workload with one size multiplied. UserError where that is no whole number."""
    size = getattr(work, axis) * factor
    if size != int(size) or size < 1:
        raise UserError(f"{work.name}: {axis} {getattr(work, axis)} cannot be multiplied by {factor}")
    changes: dict[str, Any] = {axis: int(size), "name": f"{work.name} {axis} {int(size)}"}
    if axis == "width":  # heads of one size
        changes["heads"] = max(1, int(work.heads * factor))
    return replace(work, **changes)


def scaled(
    work: Workload, axis: str, *, engines: Sequence[str], threads: int, rounds: int, warm_up: int, output: Path
) -> list[Curve]:
    """Both engines' curves along an axis, each size a contest."""
    points = [grown(work, axis, factor) for factor in FACTORS]
    found: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in engines}
    for point in points:
        cores = cores_of(threads)
        with tempfile.TemporaryDirectory(prefix="diptych-bench-") as folder:
            write_work(point, Path(folder))
            sides = [
                engine(name, Path(folder), threads=threads, cores=cores,
                       log=output / "logs" / f"{file_name(point.name)}-{name}.log")
                for name in engines
            ]  # fmt: skip
            with contest(sides):
                measured = race(sides, rounds=rounds, warm_up=warm_up)
        result = Result(workload=point, threads=threads, contestants=measured)
        for one in measured:
            seen = figures(result, one)
            for part in PARTS:
                found[one.name][part].append(seen.seconds if part == "iteration" else seen.groups[part])
            print(f"{point.name}: {one.name} {seen.seconds:.3f} s", file=sys.stderr, flush=True)
    sizes = [getattr(point, axis) for point in points]
    return [Curve(engine=name, workload=work.name, axis=axis, sizes=sizes, seconds=found[name]) for name in engines]


def by_processes(
    work: Workload, *, engines: Sequence[str], threads: int, rounds: int, warm_up: int, output: Path
) -> list[Curve]:
    """The same work by one process and by two, each on cores of its own."""
    curves = []
    for name in engines:
        seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        for count in (1, 2):
            with tempfile.TemporaryDirectory(prefix="diptych-bench-") as folder:
                write_work(work, Path(folder))
                one = engine(
                    name, Path(folder), threads=threads, cores=cores_of(threads * count), processes=count,
                    log=output / "logs" / f"{file_name(work.name)}-{name}-{count}p.log",
                )  # fmt: skip
                with contest([one]):
                    (measured,) = race([one], rounds=rounds, warm_up=warm_up)
            seen = figures(Result(workload=work, threads=threads, contestants=[measured]), measured)
            for part in PARTS:
                seconds[part].append(seen.seconds if part == "iteration" else seen.groups[part])
            print(f"{work.name}: {name}, {count} process{'es' * (count > 1)} {seen.seconds:.3f} s", file=sys.stderr)
        curves.append(Curve(engine=name, workload=work.name, axis="processes", sizes=[1, 2], seconds=seconds))
    return curves


def scaling_command(options: argparse.Namespace, works: Sequence[Workload]) -> int:
    """`diptych bench --scaling`."""
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    everything: list[Curve] = []
    how = {
        "engines": options.engine, "threads": options.threads[0], "rounds": options.rounds,
        "warm_up": options.warm_up, "output": options.output,
    }  # fmt: skip
    for work in works:
        curves: list[Curve] = []
        path = options.output / f"scaling-{file_name(work.name)}.json"
        for axis in options.scaling:
            curves += by_processes(work, **how) if axis == "processes" else scaled(work, axis, **how)
            path.write_text(json.dumps([asdict(one) for one in curves], indent=1) + "\n", encoding="utf-8")
        everything += curves
    print(scaling_markdown(everything))
    return 0


def read_curves(path: Path) -> list[Curve]:
    """What `scaling_command` wrote. UserError where the file is something else."""
    try:
        return [Curve(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a result of diptych bench --scaling ({error})") from None


COLUMNS = (
    "workload", "axis", "engine", "sizes", "seconds", "exponent", "of rollout, score, update", "dearest doubling",
)  # fmt: skip


def scaling_rows(curves: Sequence[Curve]) -> list[list[str]]:
    """Cells under `COLUMNS`: seconds of an iteration, exponents, and the dearest doubling."""
    return [
        [
            one.workload, one.axis, one.engine, ", ".join(map(str, one.sizes)),
            ", ".join(f"{value:.3g}" for value in one.seconds["iteration"]), f"{one.exponent():.2f}",
            ", ".join(f"{one.exponent(part):.2f}" for part in GROUPS if all(v > 0 for v in one.seconds[part])),
            f"{one.doubled():.2f}",
        ]
        for one in curves
    ]  # fmt: skip


def scaling_markdown(curves: Sequence[Curve]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *scaling_rows(curves)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaling_html(curves: Sequence[Curve]) -> str:
    return table(COLUMNS, scaling_rows(curves), numeric=range(4, len(COLUMNS)))
