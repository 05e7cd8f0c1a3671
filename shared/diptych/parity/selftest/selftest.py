"""`diptych parity selftest`: plant bugs in one side of the user's own setup, and see which checks see them.

One side records a few steps of the recipe; the other replays them once for every bug. A bug that no check sees, a check
that sees no bug, and an alarm where nothing was planted are each an error: then the checks prove nothing here.

A recipe with a new model runs on heated weights (`heat`): initial ones hide bugs. The gate before the first rollout
(`stages.gate`) is a check too; where it stops a bug, the replay goes on without it, to see what else would.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path

from diptych.engine import ENGINES, missing_packages
from diptych.errors import InvariantError, UserError
from diptych.parity.comparison.clips import clip_ranges_of
from diptych.parity.comparison.ladder import vanishing_gradients
from diptych.parity.comparison.rungs import climb
from diptych.parity.record import load_for_steps, record, recorded_models
from diptych.parity.recorder import StepRecorder
from diptych.parity.selftest.bugs import BUGS, Bug
from diptych.parity.selftest.heat import heat
from diptych.parity.selftest.planting import NotApplicable
from diptych.parity.steps import LADDER
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Step, Trace
from diptych.recipe.schema import Recipe, Stage
from diptych.run.progress import Progress
from diptych.stages.pipeline import prepare, run_stages
from diptych.weights.huggingface import read_checkpoint, write_checkpoint

STEPS = 2
GATE = "gate"
CHECKS = (*(rung.name for rung in LADDER), GATE)
"""The ladder's rungs and the gate; beside them, for comparison, what proves next to nothing: the PPO loss on a side's
own fresh log-probabilities, where the ratio is 1 whatever the model computes."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What saw a bug. seen: check -> its worst finding in words. reason: why it was not planted (then nothing is)."""

    bug: str
    what: str
    stage: str
    seen: Mapping[str, str] = field(default_factory=dict)
    naive: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """detections: a line for each bug. clean: runs without a bug; alarms: what went red in them. blind: checks that saw
    nothing although every bug was planted."""

    engines: tuple[str, str]
    precision: str
    detections: tuple[Detection, ...]
    clean: int
    alarms: tuple[str, ...]
    blind: tuple[str, ...]

    @property
    def planted(self) -> tuple[Detection, ...]:
        return tuple(one for one in self.detections if not one.reason)

    @property
    def unseen(self) -> tuple[Detection, ...]:
        return tuple(one for one in self.planted if not one.seen)

    @property
    def code(self) -> int:
        return int(bool(self.unseen or self.alarms or self.blind))


def selftest(
    recipe: Recipe,
    *,
    work: Path,
    engines: tuple[str, str],
    bugs: Sequence[Bug] = BUGS,
    clean: int = 3,
    every_check: bool = True,
    say: Callable[[str], None] = lambda _line: None,
) -> SelfTest:
    """engines: the one that records, and the one that gets the bugs. clean: how many seeds without a bug. every_check:
    a check that no bug turned red is an error (only sensible with all bugs)."""
    stages = recipe.stages
    alarms: list[str] = []
    with Progress(clean + len(bugs), "selftest") as bar:
        for number in range(max(clean, 1)):
            with _quiet():
                seeded = hot(replace(recipe, seed=recipe.seed + number), work / f"hot-{number}", engines[0])
                output = work / f"recorded-{number}"
                trace = record(seeded, engine=engines[0], output=output, every=1, stages=stages, fresh=True)
            if number == 0:
                base, recorded = seeded, trace
            if number < clean:
                seen = _replay(seeded, trace, engines[1], work / f"clean-{number}", stages, bug=None)
                alarms += [f"seed {seeded.seed}: {name}: {words}" for name, words in seen.seen.items()]
                bar.advance()
        detections = []
        for index, bug in enumerate(bugs):
            found = _detect(base, recorded, engines[1], work / f"bug-{index}", bug)
            say(f"{bug.name}: {found.reason or ', '.join(found.seen) or 'NOT SEEN'}")
            detections.append(found)
            bar.advance()
    shown = {check for one in detections for check in one.seen}
    blind = tuple(check for check in CHECKS if check not in shown and _exists(check, stages)) if every_check else ()
    return SelfTest(
        engines=engines,
        precision=recipe.precision,
        detections=tuple(detections),
        clean=clean,
        alarms=tuple(alarms),
        blind=blind,
    )


def hot(recipe: Recipe, work: Path, engine: str) -> Recipe:
    """The recipe on heated weights where its model is new; trained weights stay what they are."""
    if recipe.model.new is None:
        return recipe
    context = prepare(recipe, engine_name=engine, output=work / "run", stages=recipe.stages[:1])
    origin = context.tokenizer_directory
    checkpoint = heat(read_checkpoint(origin, precision="float32"), recipe.seed)
    write_checkpoint(work / "model", checkpoint, tokenizer_directory=origin)
    return replace(recipe, model=replace(recipe.model, new=None, path=str(work / "model")))


def _exists(check: str, stages: Sequence[Stage]) -> bool:
    of_rl = ("sampler", "rewards", "reference", "kl", "returns", "advantages", "values", GATE)
    return check not in of_rl or "rl" in stages


def _detect(recipe: Recipe, recorded: Trace, engine: str, work: Path, bug: Bug) -> Detection:
    if bug.stage not in recipe.stages:
        return Detection(bug=bug.name, what=bug.what, stage=bug.stage, reason=f"the recipe has no stage {bug.stage}")
    try:
        return _replay(recipe, recorded, engine, work, (bug.stage,), bug=bug)
    except NotApplicable:
        return Detection(bug=bug.name, what=bug.what, stage=bug.stage, reason="nothing here to plant it in")


def _replay(
    recipe: Recipe, recorded: Trace, engine: str, work: Path, stages: Sequence[Stage], *, bug: Bug | None
) -> Detection:
    """Replay the recorded steps with the bug planted: which checks went red."""
    seen: dict[str, str] = {}
    naive = False

    def compare(step: Step) -> None:
        nonlocal naive
        given = recorded.read(step.stage, step.step)
        # A replayed side's own fresh loss is compared with the recorded side's: both would be -mean(advantage).
        naive |= _fresh_loss_differs(given, step)
        vanishing = vanishing_gradients(recorded, step.stage)
        sides = _without_fresh(given), _without_fresh(step)
        clips = clip_ranges_of(recipe)
        for rung in climb(*sides, precision=recipe.precision, vanishing=vanishing, clips=clips):
            if rung.status == "red" and rung.rung.name not in seen:
                seen[rung.rung.name] = f"{step.name}: {rung.worst}"

    def run(recipe: Recipe, output: Path) -> None:
        started = recorded_models(recipe, recorded.directory / "run", stages)
        context = prepare(started, engine_name=engine, output=output, stages=stages)
        recorder = StepRecorder(compare, seed=recipe.seed, source=_known(recorded), fresh=True)
        with nullcontext(context) if bug is None else bug.plants(context) as planted:
            if planted is None:
                raise NotApplicable
            run_stages(replace(planted, recorder=recorder), stages)

    with _quiet():
        try:
            run(recipe, work / "with-gate")
        except InvariantError as error:
            seen[GATE] = str(error).splitlines()[0]
            run(replace(recipe, rollout=replace(recipe.rollout, gate=False)), work / "without-gate")
    name, what = ("", "") if bug is None else (bug.name, bug.what)
    return Detection(bug=name, what=what, stage=stages[0], seen=seen, naive=naive)


def _known(recorded: Trace) -> Callable[[str, int], Step | None]:
    return lambda stage, step: recorded.read(stage, step) if (stage, step) in recorded else None


def _fresh_loss_differs(a: Step, b: Step) -> bool:
    name = "policy/fresh_loss"
    if name not in a.metrics or name not in b.metrics:
        return False
    return not abs(a.metrics[name] - b.metrics[name]) <= TOLERANCES["function"].at("float32") * 10


def _without_fresh(step: Step) -> Step:
    return replace(step, metrics={name: value for name, value in step.metrics.items() if "fresh_loss" not in name})


@contextmanager
def _quiet() -> Iterator[None]:
    """The runs inside say nothing; what stops one is an error of its own."""
    before = os.environ.get("DIPTYCH_PROGRESS")
    os.environ["DIPTYCH_PROGRESS"] = "off"
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DIPTYCH_PROGRESS"]
        else:
            os.environ["DIPTYCH_PROGRESS"] = before


def command(options: argparse.Namespace) -> int:
    """`diptych parity selftest`."""
    victim = options.engine or "torch"
    other = next((name for name in ENGINES if name != victim and not missing_packages(name)), victim)
    chosen = [bug for bug in BUGS if not options.bug or bug.name in options.bug]
    unknown = set(options.bug) - {bug.name for bug in BUGS}
    if unknown:
        raise UserError(f"--bug {min(unknown)}: there is no such bug; there are {', '.join(bug.name for bug in BUGS)}")
    if options.clean < 0:
        raise UserError(f"--clean {options.clean}: not below 0")
    recipe = load_for_steps(options.recipe, options.overrides, STEPS)
    with tempfile.TemporaryDirectory(prefix="diptych-selftest-") as work:
        found = selftest(
            recipe,
            work=Path(work),
            engines=(other, victim),
            bugs=chosen,
            clean=options.clean,
            every_check=not options.bug,
            say=lambda line: print(f"selftest: {line}", file=sys.stderr, flush=True),
        )
    from diptych.parity.selftest.report import as_json, describe, markdown

    print(describe(found))
    if options.markdown is not None:
        options.markdown.write_text(markdown(found), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    return found.code
