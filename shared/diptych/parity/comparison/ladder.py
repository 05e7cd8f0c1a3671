"""`diptych parity compare`: two traces, rung by rung: whether they are the same, where they part, who is wrong.

    a, b = Trace(Path("a")), Trace(Path("b"))
    found = compare_traces(a, b)
    found.code           0 the same, 1 different
    found.first          the first red rung and its step; explain(found, a, b) says the rest about it

Steps that both recorded with arrays are walked up the whole ladder; of the others, what both logged is compared. Where
one side replays the other every step stands on its own, so the lowest red rung of all comes first; sides that both ran
free carry their errors on, so the earliest red step does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, get_args

from diptych.engine import Precision
from diptych.errors import UserError
from diptych.families.family import ModelConfig, read_model
from diptych.families.family import tensor_rules as rules_of
from diptych.parity.comparison.clips import clip_ranges
from diptych.parity.comparison.findings import Finding, NearTie, RungResult
from diptych.parity.comparison.rungs import climb
from diptych.parity.steps import LADDER, ROLES, Rung, rung_of
from diptych.parity.tolerances import coarser
from diptych.parity.trace import Step, Trace

__all__ = ["Comparison", "Finding", "NearTie", "RungResult", "StepResult", "climb", "command", "compare_traces"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step of both sides. is_deep: its arrays were compared; False: only what the run logged."""

    stage: str
    step: int
    is_deep: bool
    rungs: tuple[RungResult, ...]

    @property
    def name(self) -> str:
        return f"{self.stage} step {self.step}"

    @property
    def red(self) -> tuple[RungResult, ...]:
        return tuple(one for one in self.rungs if one.status == "red")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two traces. names: of both. differences: what only one side has. notes: what to know before any number.

    replay: "A replays B", "B replays A", "both replay one trace", or "" (both ran free).
    """

    names: tuple[str, str]
    producers: tuple[Mapping[str, Any], Mapping[str, Any]]
    provenances: tuple[Mapping[str, Any], Mapping[str, Any]]
    precision: Precision
    replay: str
    steps: tuple[StepResult, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def code(self) -> int:
        """0 the same, 1 different."""
        return int(bool(self.differences) or any(step.red for step in self.steps))

    @property
    def first(self) -> tuple[StepResult, RungResult] | None:
        """The red rung to look at first; None where none is red."""
        red = [(step, rung) for step in self.steps for rung in step.red]
        if not red:
            return None
        place = {rung.name: index for index, rung in enumerate(LADDER)}
        return min(red, key=lambda one: place[one[1].rung.name]) if self.replay else red[0]

    def of(self, rung: Rung) -> list[tuple[StepResult, RungResult]]:
        """The rung's results in every step."""
        return [(step, one) for step in self.steps for one in step.rungs if one.rung is rung]

    @property
    def near_ties(self) -> list[tuple[StepResult, NearTie]]:
        return [(step, tie) for step in self.steps for rung in step.rungs for tie in rung.near_ties]

    @property
    def count(self) -> int:
        """How many numbers were compared."""
        return sum(rung.count for step in self.steps for rung in step.rungs)


def compare_traces(
    a: Trace, b: Trace, *, limits: Mapping[str, float] | None = None, replay: str | None = None
) -> Comparison:
    """Walk every common step. limits: other limits by rung name. replay: as in `Comparison`; None: as the traces tell.

    Raises UserError where nothing can be compared: no step in common, no number in common, no tolerance.
    """
    precisions = (_precision(a), _precision(b))
    precision = coarser(*precisions)
    replay = _replay(a, b) if replay is None else replay
    common = [key for key in a.steps if key in b]
    if not common:
        raise UserError(
            f"{a.directory} and {b.directory} have no step in common ({_stages(a)} against {_stages(b)}): nothing to "
            f"compare; record the same stages, with the same --every"
        )
    results = []
    for stage, step in common:
        is_deep = a.has_tensors(stage, step) and b.has_tensors(stage, step)
        sides = (a.read(stage, step), b.read(stage, step)) if is_deep else _logged(a, b, stage, step)
        if not is_deep and not any(side.metrics for side in sides):
            continue
        if replay and (a.provenance.get("foreign") or b.provenance.get("foreign")):
            sides = _without_their_log(*sides)
        rungs = climb(
            *sides,
            precision=precision,
            limits=limits,
            replay=bool(replay),
            mixed=precisions[0] != precisions[1],
            vanishing=vanishing_gradients(a, stage),
            clips=clip_ranges(b if replay == "A replays B" else a),
        )
        results.append(StepResult(stage=stage, step=step, is_deep=is_deep, rungs=tuple(rungs)))
    found = Comparison(
        names=(a.name, b.name),
        producers=(a.producer, b.producer),
        provenances=(a.provenance, b.provenance),
        precision=precision,
        replay=replay,
        steps=tuple(results),
        differences=tuple(_unmatched(a, b, common, replay)),
        notes=tuple(_notes(a, b, replay, results)),
    )
    if not found.count and not any(step.red for step in results):
        raise UserError(f"{a.directory} and {b.directory}: not one number in common: nothing was compared")
    return found


def vanishing_gradients(trace: Trace, stage: str) -> dict[str, set[str]]:
    """`vanishing_of` the models that a trace tells of."""
    return vanishing_of(trace.provenance, stage, where=str(trace.directory / "trace.json"))


def vanishing_of(provenance: Mapping[str, Any], stage: str, *, where: str = "provenance") -> dict[str, set[str]]:
    """Tensors, by role, whose gradient is 0 in exact arithmetic: key biases where nothing turns or caps the logits add
    the same number to every logit of a softmax. {} where the trace does not say what its models are."""
    found: dict[str, set[str]] = {}
    models = provenance.get("models") or {}
    for role in ROLES:
        about = models.get(stage if role == "model" else role)
        if about and about.get("config"):
            found[role] = _vanishing(read_model(about["config"], where=where))
    return found


def _vanishing(model: ModelConfig) -> set[str]:
    if getattr(model, "ropes", ()) or not getattr(model, "attention_bias", False):
        return set()
    rules = [rule for rule in rules_of(model, "lm") if rule.slots == ("key_bias",)]
    return {name for rule in rules for layer in rule.layers(model) for name in rule.names(model, layer)}


def _precision(trace: Trace) -> Precision:
    found: Any = trace.producer.get("precision")
    if found not in get_args(Precision):
        raise UserError(
            f"{trace.directory / 'trace.json'}: producer.precision is {found!r}, it must be one of "
            f"{', '.join(get_args(Precision))}: without it no limit is known"
        )
    return found


def _replay(a: Trace, b: Trace) -> str:
    of_a, of_b = ((one.provenance.get("replay") or {}).get("trace") for one in (a, b))
    if of_b is not None and of_b == a.fingerprint():
        return "B replays A"
    if of_a is not None and of_a == b.fingerprint():
        return "A replays B"
    return "both replay one trace" if of_a is not None and of_a == of_b else ""


def _logged(a: Trace, b: Trace, stage: str, step: int) -> tuple[Step, Step]:
    """A step of both with what the runs logged alone: scalars of the rungs come with arrays. Where one side has arrays
    and the other has none, the first leaves out what it logged of later updates (`diptych.parity.steps`): then what
    both have is compared."""
    sides = [
        {n: v for n, v in one.metrics(stage, step).items() if rung_of(n) is None and not _of_update(n)}
        for one in (a, b)
    ]
    if a.has_tensors(stage, step) != b.has_tensors(stage, step):
        sides = [
            {name: value for name, value in side.items() if name in sides[0] and name in sides[1]} for side in sides
        ]
    first, second = (Step(stage=stage, step=step, metrics=side) for side in sides)
    return first, second


def _without_their_log(a: Step, b: Step) -> tuple[Step, Step]:
    """What another trainer logged by its own names is not for a replay to know."""
    first, second = (
        changed(side, metrics={n: v for n, v in side.metrics.items() if rung_of(n) is not None or n in other.metrics})
        for side, other in ((a, b), (b, a))
    )
    return first, second


def _of_update(name: str) -> bool:
    role, _, rest = name.partition("/")
    return role in ROLES and rest.startswith("update/")


def _unmatched(a: Trace, b: Trace, common: list[tuple[str, int]], replay: str) -> Iterable[str]:
    """Stages and steps that only one side has. A replay passes over the steps of which the other has no arrays, and may
    be of some stages only: those are none."""
    for side, one, other in (("A", a, b), ("B", b, a)):
        lost: dict[str, list[int]] = {}
        passed_over = replay == f"{'B' if side == 'A' else 'A'} replays {side}"
        wanted = other.provenance.get("stages")
        for stage, step in one.steps:
            if passed_over and wanted is not None and stage not in wanted:
                continue
            if (stage, step) not in other and not (passed_over and not one.has_tensors(stage, step)):
                lost.setdefault(stage, []).append(step)
        for stage, steps in lost.items():
            whole = not any(key[0] == stage for key in common)
            yield f"only {side} has {f'stage {stage}' if whole else f'{stage} step {_few(steps)}'}"


def _notes(a: Trace, b: Trace, replay: str, results: list[StepResult]) -> Iterable[str]:
    doctor = f"diptych parity doctor {a.directory} {b.directory}"
    if _precision(a) != _precision(b):
        yield f"A computed in {_precision(a)}, B in {_precision(b)}: limits are those of the coarser"
    if not replay:
        yield "neither side replays the other: each rung inherits the errors of those before it (record --replay)"
    recipes = [one.provenance.get("recipe") for one in (a, b)]
    if None in recipes:
        yield f"the recipe of {'A' if recipes[0] is None else 'B'} is not known"
    elif recipes[0] != recipes[1]:
        yield f"recipes differ: {doctor} says in what"
    models = [one.provenance.get("models") or {} for one in (a, b)]
    for role in models[0].keys() & models[1].keys():
        sides = [side[role] for side in models]
        for what, read in (("config", read_model), ("weights", str)):  # what labels are called changes no number
            known = [side[what] for side in sides if side and side.get(what)]
            if len(known) == 2 and read(known[0]) != read(known[1]):
                yield f"model {role}: {what} of A and B differ: {doctor}"
    if not any(one.is_deep for one in results):
        yield "no step has arrays on both sides: only what the runs logged was compared (record --depth tensors)"


def _stages(trace: Trace) -> str:
    counts: dict[str, list[int]] = {}
    for stage, step in trace.steps:
        counts.setdefault(stage, []).append(step)
    return "; ".join(f"{stage} {_few(steps)}" for stage, steps in counts.items()) or "no step at all"


def _few(steps: Collection[int]) -> str:
    ordered = sorted(steps)
    shown = ", ".join(map(str, ordered[:4]))
    return shown if len(ordered) <= 4 else f"{shown} and {len(ordered) - 4} more"


def tolerances_of(settings: Collection[str]) -> dict[str, float]:
    """RUNG=LIMIT settings of the command line, checked."""
    known = {rung.name: rung for rung in LADDER}
    found: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--tolerance {setting}: write RUNG=LIMIT, for example policy=1e-4")
        if name not in known:
            raise UserError(f"--tolerance {setting}: no rung {name!r}; rungs are {', '.join(known)}")
        if known[name].kind == "equal":
            raise UserError(f"--tolerance {setting}: {known[name].title} are equal or not; there is no limit to set")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not (0 < limit < math.inf):
            raise UserError(f"--tolerance {setting}: the limit must be a positive number, not {text!r}")
        if name in found:
            raise UserError(f"--tolerance {setting}: {name} is given twice")
        found[name] = limit
    return found


def command(options: argparse.Namespace) -> int:
    """`diptych parity compare A B [--truth [TRACE]] [--tolerance RUNG=LIMIT] [--html] [--json] [--junit]`."""
    from diptych.parity.comparison.expanded import explain
    from diptych.parity.comparison.reports import write_reports
    from diptych.parity.comparison.terminal import print_comparison

    limits = tolerances_of(options.tolerance)
    a, b = Trace(options.a), Trace(options.b)
    found = compare_traces(a, b, limits=limits)
    expanded = explain(found, a, b, truth=options.truth)
    print_comparison(found, expanded)
    write_reports(found, expanded, a, b, html=options.html, json_path=options.json, junit=options.junit)
    return found.code
