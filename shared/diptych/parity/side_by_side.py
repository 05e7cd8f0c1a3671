"""`diptych parity run`: both engines from the same bits, in one of three regimes (docs/parity.md).

float64   each engine runs the recipe on its own, in a process of its own; every logged metric within 1e-8, every token
          equal. Is it the same algorithm?
lockstep  both are put on the same weights and moments before every step (`lockstep`), in the recipe's precision. Is
          each step right, and does the error stay where it is?
noise     each engine against itself (`noise`), and the gap between the two in units of that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

from diptych.errors import UserError
from diptych.parity.cli import DIFFERENT, SAME
from diptych.parity.comparison.clips import clip_ranges_of
from diptych.parity.comparison.expanded import explain
from diptych.parity.comparison.ladder import Comparison, StepResult, compare_traces, vanishing_of
from diptych.parity.comparison.reports import write_reports
from diptych.parity.comparison.rungs import climb
from diptych.parity.comparison.terminal import print_comparison
from diptych.parity.lockstep import lockstep
from diptych.parity.provenance import producer, provenance
from diptych.parity.record import load_for_steps
from diptych.parity.steps import LADDER
from diptych.parity.trace import Step, Trace, TraceWriter
from diptych.recipe.schema import Recipe, Stage
from diptych.stages.context import StageContext

SIDES = ("jax", "torch")
GAPS = ("outputs", "logprobs", "values", "next_outputs")  # ends of the names whose gap is followed over the steps


def record_in_process(
    recipe: Path,
    output: Path,
    *,
    engine: str,
    overrides: Sequence[str],
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`diptych parity record` in a process of its own."""
    command = [sys.executable, "-m", "diptych.cli", "parity", "record", str(recipe), "--engine", engine]
    return subprocess.Popen(
        [*command, "-o", str(output), *options, *overrides],
        env=os.environ | dict(variables or {}),
        stderr=subprocess.PIPE if engine != SIDES[0] else None,  # one side's progress is enough
        text=True,
    )


def finished(process: subprocess.Popen[str], output: Path) -> Trace:
    """Its trace. Raises UserError with what it said where it failed."""
    _, said = process.communicate()
    if process.returncode != 0:
        lines = [line for line in (said or "").splitlines() if line.startswith("diptych: ")]
        raise UserError(f"recording {output.name} failed: {(lines or ['see above'])[-1]}")
    return Trace(output)


def free_running(
    recipe: Path, work: Path, *, steps: int | None, stages: Sequence[Stage] | None, overrides: Sequence[str]
) -> tuple[Trace, Trace]:
    """Both engines' float64 runs, side by side in two processes."""
    options = ["--depth", "metrics"]
    options += [] if steps is None else ["--steps", str(steps)]
    options += [word for stage in stages or () for word in ("--stage", stage)]
    running = [
        record_in_process(
            recipe, work / side, engine=side, overrides=[*overrides, "precision=float64"], options=options
        )
        for side in SIDES
    ]
    try:
        a, b = (finished(one, work / side) for one, side in zip(running, SIDES, strict=True))
    finally:
        for one in running:
            if one.poll() is None:
                one.kill()
    return a, b


def in_lockstep(recipe: Recipe, work: Path, *, stages: Sequence[Stage] | None) -> tuple[Comparison, Trace, Trace]:
    """Every step compared; of the first, the last and the reddest both sides' traces are kept in `work`."""
    results: list[StepResult] = []
    places = {rung.name: index for index, rung in enumerate(LADDER)}
    with ExitStack() as files:
        writers: dict[str, TraceWriter] = {}
        last: list[Step] = []
        reddest = len(LADDER)  # the place of the first red rung so far: `Comparison.first` is of its first step

        def keep(pair: Sequence[Step]) -> None:
            for side, step in zip(SIDES, pair, strict=True):
                writers[side].add(step)

        def begin(leader: StageContext, follower: StageContext) -> None:
            for side, context in zip(SIDES, (leader, follower), strict=True):
                if side not in writers:
                    about = provenance(context, recipe, stages=recipe.stages, depth="tensors", every=1, replay=None)
                    writer = TraceWriter(work / side, producer=producer(context), provenance=about)
                    writers[side] = files.enter_context(writer)

        def compare(a: Step, b: Step) -> None:
            nonlocal reddest
            vanishing = vanishing_of(writers[SIDES[0]].provenance, a.stage)
            rungs = climb(a, b, precision=recipe.precision, vanishing=vanishing, clips=clip_ranges_of(recipe))
            found = StepResult(stage=a.stage, step=a.step, is_deep=True, rungs=tuple(rungs))
            results.append(found)
            place = min((places[one.rung.name] for one in found.red), default=len(LADDER))
            if len(results) == 1 or place < reddest:
                keep((a, b))
                last.clear()
            else:
                last[:] = [a, b]
            reddest = min(reddest, place)

        lockstep(recipe, work=work / "runs", compare=compare, engines=SIDES, stages=stages, begin=begin)
        if last:
            keep(last)
    a, b = (Trace(work / side) for side in SIDES)
    return replace(compare_traces(a, b, replay="B replays A"), steps=tuple(results)), a, b


def gaps_of(results: Sequence[StepResult]) -> dict[str, list[float]]:
    """stage -> the largest gap of a log-probability, value or score, step by step."""
    return {
        stage: [_gap(one) for one in results if one.stage == stage]
        for stage in dict.fromkeys(one.stage for one in results)
    }


def growth(gaps_by_stage: Mapping[str, Sequence[float]]) -> tuple[bool, str]:
    """Does the gap of the model's outputs grow over the steps? Red where the last third's mean is more than twice the
    first third's *and* the rank correlation with the step is significant (Spearman, one-sided, p < 0.01): neither noise
    nor a drift within it counts."""
    lines, grows = [], False
    for stage, found in gaps_by_stage.items():
        gaps = np.asarray(found)
        if len(gaps) < 9 or not gaps.any():
            continue
        third = len(gaps) // 3
        early, late = gaps[:third].mean(), gaps[-third:].mean()
        constant = bool((gaps == gaps[0]).all())
        p = 1.0 if constant else float(stats.spearmanr(np.arange(len(gaps)), gaps, alternative="greater")[1])  # pyright: ignore
        is_growing = bool(late > 2 * early and p < 0.01)
        grows |= is_growing
        lines.append(
            f"{stage}: largest gap of a log-probability, value or score over {len(gaps)} steps {gaps.max():.2g}; mean "
            f"of the first third {early:.2g}, of the last {late:.2g} (p {p:.2g}): "
            f"{'GROWING' if is_growing else 'not growing'}"
        )
    return grows, "\n".join(lines)


def _gap(result: StepResult) -> float:
    errors = [
        one.error for rung in result.rungs for one in rung.findings if one.name.split("/")[-1] in GAPS
    ]  # fmt: skip
    return max(errors, default=0.0)


def command(options: argparse.Namespace) -> int:
    """`diptych parity run`."""
    with ExitStack() as cleaning:
        work = options.output
        if work is None:
            work = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="diptych-parity-")))
        elif work.exists() and any(work.iterdir()):
            raise UserError(f"{work}: is there already; name a new directory")
        recipe = load_for_steps(options.recipe, options.overrides, options.steps)
        if options.mode == "noise":
            from diptych.parity.noise import noise_command

            return noise_command(options, recipe, work)
        grows, about_growth = False, ""
        if options.mode == "float64":
            a, b = free_running(
                options.recipe, work, steps=options.steps, stages=options.stage, overrides=options.overrides
            )
            found = compare_traces(a, b)
        else:
            found, a, b = in_lockstep(recipe, work, stages=options.stage)
            grows, about_growth = growth(gaps_of(found.steps))
        expanded = explain(found, a, b, truth=None)
        print_comparison(found, expanded)
        if about_growth:
            print(about_growth)
        write_reports(found, expanded, a, b, html=options.html, json_path=options.json, junit=options.junit)
        return DIFFERENT if found.code or grows else SAME
