"""`diptych parity doctor A [B]`: what differs between two setups before any number does, and which traps are set.

A and B are each a recipe, a run directory, a trace or a model directory; what both know is compared, what one alone
knows is said. Differences are grouped, the likeliest to change numbers first, each with what it changes.

Exit code 0: nothing that can change a number differs, and no trap is set. 1: otherwise. 2: A or B cannot be read, or
they have nothing in common to compare. Differences in rounding alone (layout, micro-batches, kernels, versions of
packages, hardware) are notes and do not count: two machines always have some, and every comparison here allows for
them. Names, places and times are listed apart. (Micro-batch sizes are also trap 30, which counts when it is set.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.errors import UserError
from diptych.families.family import read_model
from diptych.parity.doctor.effects import Effect, effect_of, is_beside_the_model, model_effect
from diptych.parity.doctor.setups import Fact, Facts, Setup, read_setup
from diptych.parity.doctor.trap_finding import same
from diptych.parity.doctor.traps import Verdict, look_for_traps

# Likeliest to change numbers first.
GROUPS: Mapping[str, str] = {
    "model": "model config",
    "recipe": "recipe",
    "settings": "settings of the trainers",
    "weights": "weights",
    "data": "data and its order",
    "tokenizer": "tokenizer",
    "precision": "precision",
    "variables": "environment variables",
    "packages": "packages",
    "hardware": "hardware",
    "apart": "names, places, times",
}
_UNSET = "(not set)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """a, b: the values; None where a side has no such key although it would."""

    group: str
    key: str
    a: Fact | None
    b: Fact | None
    effect: Effect
    changes: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """unknown: (group, side that does not know, keys). num_compared: keys that both sides know."""

    a: Setup
    b: Setup | None
    differences: Sequence[Difference]
    unknown: Sequence[tuple[str, str, Sequence[str]]]
    num_compared: int
    traps: Sequence[Verdict]

    def of(self, effect: Effect) -> list[Difference]:
        return [one for one in self.differences if one.effect == effect]

    @property
    def is_well(self) -> bool:
        return not self.of("number") and not any(verdict.state == "SET" for verdict in self.traps)


def command(options: argparse.Namespace) -> int:
    a = read_setup(options.a)
    diagnosis = diagnose(a, None if options.b is None else read_setup(options.b))
    if options.json:
        print(json.dumps(as_json(diagnosis), indent=2, ensure_ascii=False))
    else:
        print(describe(diagnosis))
    return 0 if diagnosis.is_well else 1


def diagnose(a: Setup, b: Setup | None = None) -> Diagnosis:
    """Raises UserError where the two have nothing in common."""
    if b is None:
        return Diagnosis(a=a, b=None, differences=[], unknown=[], num_compared=0, traps=look_for_traps(a))
    differences, unknown, compared = [], [], 0
    for group in GROUPS:
        found, missing, count = _models(a, b) if group == "model" else _group(group, a, b)
        differences += found
        unknown += missing
        compared += count if group not in ("hardware", "apart") else 0
    if not compared:
        raise UserError(f"{a.name} and {b.name} have nothing in common to compare: {_knows(a)}; {_knows(b)}")
    return Diagnosis(
        a=a, b=b, differences=differences, unknown=unknown, num_compared=compared, traps=look_for_traps(a, b)
    )


Found = tuple[Sequence[Difference], Sequence[tuple[str, str, Sequence[str]]], int]


def _group(group: str, a: Setup, b: Setup) -> Found:
    left, right = (_facts(group, setup) for setup in (a, b))
    if group == "settings" and a.recipe is not None and b.recipe is not None:
        return [], [], 0  # the recipes say it
    if group == "weights":
        left, right = _one_kind(left, right)
    differences: list[Difference] = []
    only_left: list[str] = []
    only_right: list[str] = []
    count = 0
    for key in dict.fromkeys([*left, *right]):
        mine, other = left.get(key), right.get(key)
        complete = group == "recipe" and left and right
        if mine is None and not (complete or group in a.complete):
            only_right.append(key)
        elif other is None and not (complete or group in b.complete):
            only_left.append(key)
        else:
            count += 1
            if mine is None or other is None or not same(mine.value, other.value):
                if all(fact is None or fact.value in (None, "") for fact in (mine, other)):
                    continue  # empty, or not set
                effect, changes = effect_of(group, key, a, b)
                differences.append(Difference(group=group, key=key, a=mine, b=other, effect=effect, changes=changes))
    unknown = [(group, side, keys) for side, keys in (("B", only_left), ("A", only_right)) if keys]
    return differences, unknown, count


def _facts(group: str, setup: Setup) -> Facts:
    return setup.facts.get(group, {})


def _one_kind(left: Facts, right: Facts) -> tuple[Facts, Facts]:
    """Checksums of two kinds (their lengths say so) cannot be compared: each gets its kind in its name."""

    def named(facts: Facts, other: Facts) -> Facts:
        return {
            key if key not in other or isinstance(fact.value, int) or len(str(fact.value)) == len(str(other[key].value))
            else f"{key} (checksum of {len(str(fact.value))} digits)": fact
            for key, fact in facts.items()
        }  # fmt: skip

    return named(left, right), named(right, left)


def _models(a: Setup, b: Setup) -> Found:
    """Field by field, role by role; where no role is common, what each starts from."""
    differences: list[Difference] = []
    unknown: list[tuple[str, str, Sequence[str]]] = []
    count = 0
    for role_a, role_b in _roles(a, b):
        left, right = a.models[role_a], b.models[role_b]
        is_same = _reads_the_same(left, right)
        prefix = role_a if role_a == role_b else f"{role_a} / {role_b}"
        for key in dict.fromkeys([*left, *right]):
            mine, other = left.get(key), right.get(key)
            count += 1
            values = [None if fact is None else fact.value for fact in (mine, other)]
            if same(*values):
                continue
            effect, changes = model_effect(key, a, b)
            if effect == "number" and is_same and not is_beside_the_model(key):
                effect, changes = "nothing", "another spelling of the same model"
            differences.append(
                Difference(group="model", key=f"{prefix}: {key}", a=mine, b=other, effect=effect, changes=changes)
            )
    for setup, side in ((a, "B"), (b, "A")):
        paired = {pair[0 if setup is a else 1] for pair in _roles(a, b)}
        missing = [role for role in setup.models if role not in paired]
        if missing:
            unknown.append(("model", side, missing))
    return differences, unknown, count


def _roles(a: Setup, b: Setup) -> list[tuple[str, str]]:
    common = [(role, role) for role in a.models if role in b.models]
    if common or not a.models or not b.models:
        return common
    first = [
        next((r for r in ("policy", "model", "base") if r in setup.models), next(iter(setup.models)))
        for setup in (a, b)
    ]
    return [(first[0], first[1])]


def _reads_the_same(left: Facts, right: Facts) -> bool:
    """Both are of a supported family, and compute the same: fields that are left out have the family's own value."""
    try:
        models = [read_model(_nested(facts)) for facts in (left, right)]
    except UserError:
        return False
    return models[0] == models[1]


def _nested(facts: Facts) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, fact in facts.items():
        *groups, last = key.split(".")
        place = whole
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = fact.value
    return whole


def _knows(setup: Setup) -> str:
    groups = [
        name
        for group, name in GROUPS.items()
        if group != "apart" and (setup.facts.get(group) or (group == "model" and setup.models))
    ]
    return f"{setup.source} knows {', '.join(groups) or 'nothing'}"


# As text and as JSON.


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis as text."""
    a, b = diagnosis.a, diagnosis.b
    lines = [f"A  {a.name}"] + ([] if b is None else [f"B  {b.name}"])
    titles: tuple[tuple[Effect, str], ...] = (
        ("number", "can change numbers"),
        ("rounding", "last digits only: notes, which do not count"),
        ("nothing", "cannot change a number"),
    )
    for effect, title in titles:
        found = diagnosis.of(effect)
        if found:
            lines += ["", f"{title}: {len(found)}", *_difference_lines(found)]
    if diagnosis.unknown:
        lines += ["", "known of one side only, so not compared"]
        lines += [f"  {GROUPS[group]}, not known of {side}: {_some(keys)}" for group, side, keys in diagnosis.unknown]
    return "\n".join([*lines, "", *_trap_lines(diagnosis.traps), "", _summary(diagnosis)])


def _difference_lines(found: Sequence[Difference]) -> Iterator[str]:
    group = None
    for one in found:
        if one.group != group:
            group = one.group
            yield f"  {GROUPS[group]}"
        yield f"    {one.key}: {one.changes}"
        for side, fact in (("A", one.a), ("B", one.b)):
            yield f"      {side}  {_UNSET if fact is None else f'{_short(fact.value)}   {fact.where}'}"


def _trap_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    found = [verdict for verdict in verdicts if verdict.state == "SET"]
    yield f"traps: {len(found)} of {len(verdicts)} set"
    for verdict in found:
        yield f"  {verdict.trap.number:>2}  SET  {verdict.trap.title}"
        for finding in verdict.findings:
            yield f"        {finding.where}: {finding.found}"
            yield f"        write: {finding.instead}"
    for verdict in verdicts:
        if verdict.state != "SET":
            why = f": {verdict.why}" if verdict.why else ""
            yield f"  {verdict.trap.number:>2}  {verdict.state:<14}  {verdict.trap.title}{why}"


def _summary(diagnosis: Diagnosis) -> str:
    differ = len(diagnosis.of("number"))
    traps = sum(verdict.state == "SET" for verdict in diagnosis.traps)
    set_traps = "no trap is set" if not traps else f"{traps} trap{'s are' if traps > 1 else ' is'} set"
    if diagnosis.b is None:
        return set_traps
    differences = (
        "nothing that can change a number differs"
        if not differ
        else f"{differ} difference{'s' if differ > 1 else ''} can change numbers"
    )
    return f"{differences} ({diagnosis.num_compared} facts compared); {set_traps}"


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything, for another program."""
    return {
        "a": diagnosis.a.name,
        "b": None if diagnosis.b is None else diagnosis.b.name,
        "same": diagnosis.is_well,
        "compared": diagnosis.num_compared,
        "differences": [
            {
                "group": one.group, "key": one.key, "effect": one.effect, "changes": one.changes,
                **{side: None if fact is None else {"value": fact.value, "where": fact.where}
                   for side, fact in (("a", one.a), ("b", one.b))},
            }
            for one in diagnosis.differences
        ],
        "unknown": [{"group": group, "side": side, "keys": list(keys)} for group, side, keys in diagnosis.unknown],
        "traps": [
            {
                "number": verdict.trap.number, "title": verdict.trap.title, "state": verdict.state, "why": verdict.why,
                "findings": [vars(finding) for finding in verdict.findings],
            }
            for verdict in diagnosis.traps
        ],
    }  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
