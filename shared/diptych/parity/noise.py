"""`diptych parity run --mode noise`: how far does each engine differ from itself, and is the gap between them larger?

One run is recorded. Each engine replays it as it is and then with something changed that changes no number in exact
arithmetic: half the micro-batch, smaller vocabulary chunks, activations made again, another compilation, other threads,
another layout, and in float64. The largest difference that any of these makes is the floor. A gap between the engines
of up to three floors is noise; beyond, something computes another thing. Where the precision is below float64, both
sides are also measured against a float64 replay: the error budget, and who is further off.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import UserError
from diptych.parity.cli import DIFFERENT, SAME
from diptych.parity.comparison.ladder import vanishing_gradients
from diptych.parity.comparison.rungs import climb
from diptych.parity.steps import LADDER
from diptych.parity.trace import Step, Trace
from diptych.recipe.schema import Recipe

ENOUGH = 3.0  # floors that a gap may have
EXACT = "in float64"
WATCHED = ("sampler", "rewards", "reference", "policy", "values", "gradients", "weights", "next")
BUDGET = ("policy/outputs", "critic/outputs", "model/outputs")


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Something that changes no number in exact arithmetic: settings of the recipe, environment variables."""

    name: str
    engine: str
    settings: tuple[str, ...] = ()
    variables: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """floors: (engine, variation) -> rung -> largest difference from the engine as it is. gaps: rung -> between the
    engines. budget: output -> (rms error of each side against float64, in the order of `engines`)."""

    engines: tuple[str, str]
    precision: str
    floors: Mapping[tuple[str, str], Mapping[str, float]]
    gaps: Mapping[str, float]
    budget: Mapping[str, tuple[float, float]]

    def floor(self, rung: str) -> float:
        return max((found.get(rung, 0.0) for found in self.floors.values()), default=0.0)

    def verdict(self, rung: str) -> str:
        gap, floor = self.gaps[rung], self.floor(rung)
        if gap == 0:
            return "the same bits"
        if floor == 0:
            return "no variation moved a bit: no floor to measure by"
        return f"{gap / floor:.2g} floors: {'noise' if gap <= ENOUGH * floor else 'BEYOND NOISE'}"

    @property
    def code(self) -> int:
        beyond = any("BEYOND" in self.verdict(rung) for rung in self.gaps)
        uneven = any(not 0.5 <= a / b <= 2 for a, b in self.budget.values() if a and b) and self.precision == "bfloat16"
        return DIFFERENT if beyond or uneven or not self.gaps else SAME


def variations(recipe: Recipe) -> list[Variation]:
    """Those that this recipe allows."""
    halves = []
    for stage in recipe.stages:
        size = getattr(recipe, stage).micro_batch_size
        if size % 2 == 0:
            halves.append(f"{stage}.micro_batch_size={size // 2}")
    remat = f"layout.remat={'full' if recipe.layout.remat == 'none' else 'none'}"
    found = []
    for engine in ("jax", "torch"):
        if halves:
            found.append(Variation(name="half the micro-batch", engine=engine, settings=tuple(halves)))
        found.append(Variation(name="smaller vocabulary chunks", engine=engine, settings=("logprob_chunk=96",)))
        found.append(Variation(name="activations", engine=engine, settings=(remat,)))
        if recipe.precision != "float64":  # the engine's own rounding, whatever its order of sums
            found.append(Variation(name=EXACT, engine=engine, settings=("precision=float64",)))
    flags = "--xla_force_host_platform_device_count=2"
    found += [
        Variation(
            name="compiled without optimisation",
            engine="jax",
            variables={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        ),
        Variation(
            name="two CPU devices",
            engine="jax",
            settings=("layout.train.data=2", "layout.decode.data=2"),
            variables={"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        ),
        Variation(name="one thread", engine="torch", variables={"OMP_NUM_THREADS": "1"}),
    ]
    return found


def measure(
    recipe_path: Path, recipe: Recipe, work: Path, *, options: Sequence[str], overrides: Sequence[str]
) -> Noise:
    """Record, replay, and measure."""
    from diptych.parity.side_by_side import SIDES, finished, record_in_process

    def run(name: str, engine: str, more: Sequence[str] = (), variables=None, replay: Path | None = None) -> Trace:
        extra = ["--every", "1"] if replay is None else ["--replay", str(replay)]
        process = record_in_process(
            recipe_path,
            work / name,
            engine=engine,
            overrides=[*overrides, *more],
            options=[*options, *extra],
            variables={"DIPTYCH_PROGRESS": "off"} | dict(variables or {}),
        )
        return finished(process, work / name)

    recorded = run("recorded", SIDES[0])
    own = {side: run(f"{side}-as-it-is", side, replay=recorded.directory) for side in SIDES}
    floors: dict[tuple[str, str], dict[str, float]] = {}
    budget: dict[str, tuple[float, float]] = {}
    for index, one in enumerate(variations(recipe)):
        try:
            other = run(f"{one.engine}-{index}", one.engine, one.settings, one.variables, recorded.directory)
        except UserError as error:
            print(f"noise: {one.engine}, {one.name}: not possible here ({error})")
            continue
        floors[one.engine, one.name] = distances(own[one.engine], other)
        if one.name == EXACT:
            budget = errors_against(other, [own[side] for side in SIDES])
    return Noise(
        engines=SIDES,
        precision=recipe.precision,
        floors=floors,
        gaps=distances(own[SIDES[0]], own[SIDES[1]]),
        budget=budget,
    )


def distances(a: Trace, b: Trace) -> dict[str, float]:
    """rung -> the largest difference over all steps, in the unit of the rung. Raises UserError where something cannot
    be compared at all."""
    anything = {rung.name: math.inf for rung in LADDER if rung.tolerance is not None}
    found: dict[str, float] = {}
    for stage, step in a.steps:
        if (stage, step) not in b:
            raise UserError(f"{b.directory}: has no {stage} step {step}")
        if not a.has_tensors(stage, step):
            continue
        rungs = climb(
            a.read(stage, step),
            b.read(stage, step),
            precision="float32",
            limits=anything,
            mixed=a.producer["precision"] != b.producer["precision"],
            vanishing=vanishing_gradients(a, stage),
        )
        for rung in rungs:
            if rung.rung.name not in WATCHED or rung.worst is None:
                continue
            if not math.isfinite(rung.worst.error):
                raise UserError(f"{a.directory} and {b.directory}: {stage} step {step}: {rung.worst}")
            found[rung.rung.name] = max(found.get(rung.rung.name, 0.0), rung.worst.error)
    return found


def errors_against(truth: Trace, sides: Sequence[Trace]) -> dict[str, tuple[float, float]]:
    """output -> root mean square error of each side over all steps' real tokens, nats or score units."""
    squares: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for step in truth:
        others = [side.read(step.stage, step.step) for side in sides]
        for name in BUDGET:
            if name in step.tensors:
                mask = _mask(step, name)
                right = step.array(name)
                errors = [np.where(mask, one.array(name).astype(np.float64) - right, 0) for one in others]
                key = f"{step.stage}: {name}"
                squares[key] = squares.get(key, np.zeros(len(sides))) + [np.square(error).sum() for error in errors]
                counts[key] = counts.get(key, 0) + int(mask.sum())
    made = {key: np.sqrt(total / counts[key]) for key, total in squares.items()}
    return {key: (float(values[0]), float(values[1])) for key, values in made.items()}


def _mask(step: Step, name: str) -> np.ndarray:
    mask = step.tensors[name].mask
    return np.ones(step.array(name).shape, bool) if mask is None else step.array(mask).astype(bool)


def describe(found: Noise) -> str:
    """The floor of each engine, the gap in floors, the budget."""
    rungs = list(found.gaps)
    width = max([len(f"{engine}: {name}") for engine, name in found.floors] + [24])
    lines = [f"{'largest difference':<{width}}  " + "  ".join(f"{rung:>9}" for rung in rungs)]
    for (engine, name), row in found.floors.items():
        numbers = "  ".join(f"{row.get(rung, 0):>9.1e}" for rung in rungs)
        lines.append(f"{f'{engine}: {name}':<{width}}  {numbers}")
    gaps = "  ".join(f"{found.gaps[rung]:>9.1e}" for rung in rungs)
    lines += [f"{' against '.join(found.engines):<{width}}  {gaps}", ""]
    lines += [f"{rung}: {found.verdict(rung)}" for rung in rungs]
    if found.budget:
        lines += ["", f"root mean square error against float64 ({found.precision}):"]
        for name, (a, b) in found.budget.items():
            ratio = f", ratio {a / b:.2f}" if b else ""
            lines.append(f"  {name}: {found.engines[0]} {a:.2e}, {found.engines[1]} {b:.2e}{ratio}")
    return "\n".join(lines)


def as_json(found: Noise) -> dict[str, Any]:
    return {
        "engines": list(found.engines),
        "precision": found.precision,
        "floors": [
            {"engine": engine, "variation": name, "differences": dict(row)}
            for (engine, name), row in found.floors.items()
        ],
        "gaps": dict(found.gaps),
        "verdicts": {rung: found.verdict(rung) for rung in found.gaps},
        "budget": {name: list(pair) for name, pair in found.budget.items()},
        "code": found.code,
    }


def noise_command(options: argparse.Namespace, recipe: Recipe, work: Path) -> int:
    """`diptych parity run --mode noise`."""
    for name in ("html", "junit"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with --mode noise: it prints a table and writes --json")
    words = [] if options.steps is None else ["--steps", str(options.steps)]
    words += [word for stage in options.stage or () for word in ("--stage", stage)]
    found = measure(options.recipe, recipe, work, options=words, overrides=options.overrides)
    print(describe(found))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    return found.code
