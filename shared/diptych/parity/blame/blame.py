"""`diptych parity blame A B`: which layer, which operation, forward and backward.

B replayed A with every tap forced to A's, so each tap that it recorded is the work of one operation on A's inputs:

    a tap's value differs       the operation that makes it is at fault
    a tap's gradient differs    an operation that *reads* it is: its backward gave the gradient from A's own gradients
    a weight's gradient does    the operation that holds it

Errors are relative L2 under the attention mask, against A. An operation that is wrong forward is wrong backward too;
that is said once. Where B was not forced, all that is left is where inputs still agree and outputs do not: weaker,
because errors of earlier operations run along, and marked so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from diptych.engine import Precision
from diptych.errors import UserError
from diptych.families.taps import Depth, taps
from diptych.parity.blame.search import Culprit, Looked, Sides, SlotKey, find_culprits
from diptych.parity.blame.structure import operations, slot_gradients
from diptych.parity.cli import DIFFERENT, SAME
from diptych.parity.steps import ROLES
from diptych.parity.tolerances import TOLERANCES, coarser
from diptych.parity.trace import Step, Trace
from diptych.parity.truth.truth import Truth
from diptych.run.directory import write_text


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Everything that was found. culprits: the worst first, the same operation of several steps once."""

    names: tuple[str, str]
    precision: Precision
    limit: float
    depth: Depth
    is_forced: bool
    looked: tuple[Looked, ...]
    culprits: tuple[Culprit, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def code(self) -> int:
        return DIFFERENT if self.culprits else SAME


def blame(a: Trace, b: Trace, *, truth: bool = False) -> Blame:
    """Compare the taps of every step that both traces hold. truth: also say which side is wrong, of the worst few.

    Raises UserError where taps are missing, or the sides cannot be compared.
    """
    precision = coarser(_precision(a), _precision(b))
    try:
        limit = TOLERANCES["operation_relative_l2"].at(precision)
    except ValueError as error:
        raise UserError(f"{error}: one operation's rounding hides bugs there") from None
    is_forced = _is_forced(a, b)
    looked = [one for key in a.steps if key in b for one in _look(a, b, *key, is_forced=is_forced)]
    if not looked:
        raise UserError(
            f"{a.directory} and {b.directory} have no step in common that holds taps: record both with --depth layers "
            f"or ops, the second with --replay {a.directory}"
        )
    found = []
    for one in looked:
        sides = Sides(a.read(one.stage, one.step), b.read(one.stage, one.step), one.role)
        found += find_culprits(one, sides, limit)
    merged = _merged(found)
    if truth:
        from diptych.parity.blame.who import judged  # the oracle is only needed here

        merged = judged(merged, looked, a, b, limit)
    return Blame(
        names=(a.name, b.name),
        precision=precision,
        limit=limit,
        depth=looked[0].depth,
        is_forced=is_forced,
        looked=tuple(looked),
        culprits=tuple(merged),
        notes=tuple(_notes(looked, is_forced, b)),
    )


def _precision(trace: Trace) -> Precision:
    found = trace.producer.get("precision")
    if found not in ("float32", "float64", "bfloat16"):
        raise UserError(f"{trace.directory / 'trace.json'}: producer.precision is {found!r}: not known, so no limit is")
    return cast(Precision, found)


def _is_forced(a: Trace, b: Trace) -> bool:
    """Does B replay A? UserError where it is the other way round."""

    def replays(one: Trace, other: Trace) -> bool:
        replay = one.provenance.get("replay")
        return bool(replay) and replay["trace"] == other.fingerprint()

    if replays(a, b):
        raise UserError(f"{a.directory} is a replay of {b.directory}: give the recorded trace first, then its replay")
    return replays(b, a)


def _notes(looked: Sequence[Looked], is_forced: bool, b: Trace) -> list[str]:
    notes = []
    if not is_forced:
        notes.append(
            f"{b.directory} is no replay of the first trace, so no tap was forced: this is only where inputs still "
            "agree and outputs do not, and earlier errors run along. For certainty: record the second with --replay"
        )
    if any(one.depth == "layers" for one in looked):
        notes.append("depth layers names the layer; record both with --depth ops to learn the operation")
    return notes


def _look(a: Trace, b: Trace, stage: str, step: int, *, is_forced: bool) -> list[Looked]:
    """Every role of a step that both sides hold taps of."""
    if not (a.has_tensors(stage, step) and b.has_tensors(stage, step)):
        return []
    left, right = a.read(stage, step), b.read(stage, step)
    found = []
    for role in ROLES:
        mine, theirs = left.under(f"{role}/taps"), right.under(f"{role}/taps")
        if not mine and not theirs:
            continue
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            raise UserError(
                f"{left.name}: {role}: {len(odd)} taps are in one trace only ({', '.join(odd[:3])}): record both sides "
                f"at the same --depth"
            )
        found.append(look(Truth(a, left), left, right, role, is_forced=is_forced))
    return found


def look(about: Truth, a: Step, b: Step, role: str, *, is_forced: bool) -> Looked:
    """The errors of one role's taps. about: knows A's model and loss."""
    config, head = about.config(role), about.head(role)
    if config is None:
        raise UserError(f"{about.trace.directory / 'trace.json'}: models does not say what {role} computes")
    mine = a.under(f"{role}/taps")
    depths: tuple[Depth, ...] = ("ops", "layers")
    depth: Depth | None = next((one for one in depths if mine.keys() == taps(config, head, one).keys()), None)
    if depth is None:
        wanted = taps(config, head, "ops").keys()
        lost = sorted(mine.keys() - wanted) or sorted(taps(config, head, "layers").keys() - mine.keys())
        raise UserError(f"{a.name}: {role}: these are not all the taps of its model (see {', '.join(lost[:3])})")
    loss = about.loss(role)
    balance = loss is not None and loss.balance > 0
    mask = a.array(f"{role}/probe/attention").astype(bool)
    sides = {kind: (a.under(f"{role}/{kind}"), b.under(f"{role}/{kind}")) for kind in ("taps", "tap_gradients")}
    for kind, (ours, theirs) in sides.items():
        if lost := sorted(mine.keys() - (ours.keys() & theirs.keys())):
            raise UserError(f"{a.name}: {role}/{kind}/{lost[0]} is missing on a side: record it again")

    def errors(kind: str) -> dict[str, float]:
        ours, theirs = sides[kind]
        return {name: relative_error(ours[name], theirs[name], mask) for name in mine}

    gradients = b.under(f"{role}/forced_gradient")
    weights = _weight_errors(about, a, gradients, role, mask) if is_forced and gradients else {}
    return Looked(
        stage=a.stage,
        step=a.step,
        role=role,
        config=config,
        head=head,
        depth=depth,
        operations=operations(config, head, depth, balance=balance),
        forward=errors("taps"),
        backward=errors("tap_gradients"),
        weights=weights,
        is_forced=is_forced,
    )


def relative_error(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None, *, scale: float = 0.0) -> float:
    """|a - b| / |a| over the columns of `mask`, in float64; inf for other shapes or numbers that are not finite.

    scale: what to divide by instead where |a| is smaller."""
    if a.shape != b.shape or (mask is not None and a.shape[: mask.ndim] != mask.shape):
        return math.inf
    left, right = (np.asarray(one if mask is None else one[mask], np.float64) for one in (a, b))
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.inf
    distance, norm = float(np.linalg.norm(left - right)), max(float(np.linalg.norm(left)), scale)
    return 0.0 if distance == 0 else distance / norm if norm > 0 else math.inf


def _weight_errors(
    about: Truth, a: Step, gradients: Mapping[str, np.ndarray], role: str, mask: np.ndarray
) -> dict[SlotKey, float]:
    """The error of each slot's gradient, all taps forced on both sides (A's own run is forced by itself).

    A bias's gradient is a sum over columns that may cancel (a key's without positions is 0), so its error is measured
    against the sum of absolute values.
    """
    config, head = about.config(role), about.head(role)
    assert config is not None
    mine = slot_gradients(config, head, a.under(f"{role}/gradient"))
    theirs = slot_gradients(config, head, gradients)
    made = a.under(f"{role}/tap_gradients")
    found = {}
    for key in sorted(mine.keys() | theirs.keys(), key=str):
        slot, layer = key
        tap = f"layers.{layer}.{slot.removesuffix('_bias')}"
        scale = 0.0
        if slot.endswith("_bias") and tap in made:
            scale = float(np.linalg.norm(np.abs(made[tap][mask].astype(np.float64)).sum(axis=0)))
        pairs = list(zip(mine.get(key, []), theirs.get(key, []), strict=False))
        complete = len(mine.get(key, [])) == len(theirs.get(key, [])) > 0
        whole = (np.concatenate([one[side].reshape(-1) for one in pairs]) for side in (0, 1)) if complete else None
        found[key] = math.inf if whole is None else relative_error(*whole, scale=scale)
    return found


def _merged(culprits: Sequence[Culprit]) -> list[Culprit]:
    """The worst first, and each operation of a role once."""
    groups: dict[tuple, list[Culprit]] = {}
    for one in culprits:
        groups.setdefault((one.role, one.direction, one.operations), []).append(one)
    worst = [replace(max(group, key=lambda one: one.over), steps=len(group)) for group in groups.values()]
    return sorted(worst, key=lambda one: -one.over)


def command(options: argparse.Namespace) -> int:
    """`diptych parity blame`."""
    from diptych.parity.blame.report import as_json, as_page, as_text

    found = blame(Trace(options.a), Trace(options.b), truth=options.truth)
    print(as_text(found))
    for path, text in ((options.json, as_json), (options.html, as_page)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text(found))
            print(f"wrote {path}")
    return found.code
