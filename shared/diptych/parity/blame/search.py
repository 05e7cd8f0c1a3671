"""From the errors of taps and weights to the operations that made them (`diptych.parity.blame.blame`).

Forward every tap has one maker. Backward the question is which reader of a tap gave the wrong share of its gradient:
the operation whose inputs are wrong and no others; between matrix products that read the same tap, the one whose share
(known from the weights) the error is a multiple of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diptych.engine import Head
from diptych.families.family import ModelConfig
from diptych.families.taps import Depth
from diptych.parity.blame.structure import LOSS, Operation, residual_title, rotary_title, slot_gradients
from diptych.parity.trace import Step

Direction = Literal["forward", "backward"]
SlotKey = tuple[str, int | None]
ALONG = 0.99  # |cosine| from which a gradient's error counts as one operation's share of it, scaled
JUMP = 10.0  # without forcing: an operation whose output is this many times further off than its inputs


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One role in one step of both sides. forward, backward: each tap's error (relative L2); weights: each slot's
    gradient's. is_forced: B's numbers are each the work of one operation."""

    stage: str
    step: int
    role: str
    config: ModelConfig
    head: Head
    depth: Depth
    operations: Mapping[str, Operation]
    forward: Mapping[str, float]
    backward: Mapping[str, float]
    weights: Mapping[SlotKey, float]
    is_forced: bool

    @property
    def where(self) -> str:
        return f"{self.role}, {self.stage} step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """An operation whose own work differs. operations: the taps that name it; several where the numbers fit each of
    them. evidence: (what differs, error), worst first. over: the worst error over the limit. steps: how many of the
    compared steps show it. verdict: which side is wrong, where the truth was asked for."""

    role: str
    where: str
    direction: Direction
    operations: tuple[str, ...]
    layer: int | None
    title: str
    evidence: tuple[tuple[str, float], ...]
    over: float
    steps: int = 1
    verdict: str = ""

    @property
    def text(self) -> str:
        """The operation and what differs, in words."""
        shown = [name for name, _ in self.evidence[:4]]
        more = f" and {len(self.evidence) - 4} more" if len(self.evidence) > 4 else ""
        return f"the {self.direction} of {self.title} ({', '.join(shown)}{more})"


def find_culprits(one: Looked, sides: Sides, limit: float) -> list[Culprit]:
    """The operations of one role in one step whose own work differs by more than the limit."""
    if not one.is_forced:
        return _divergences(one, limit)
    found = _wrong_forward(one, limit)
    explained = {tap for culprit in found for name in culprit.operations for tap in one.operations[name].reads}
    found += _wrong_backward(one, sides, limit, explained)
    blamed = {name for culprit in found for name in culprit.operations}
    return found + _wrong_weights(one, limit, blamed)


@dataclass(frozen=True)
class Sides:
    """The gradients of both sides' taps, and A's weights, in float64."""

    a: Step
    b: Step
    role: str

    def gradient(self, side: Literal["a", "b"], tap: str) -> np.ndarray:
        mask = self.a.array(f"{self.role}/probe/attention").astype(bool)
        values = np.asarray(getattr(self, side).array(f"{self.role}/tap_gradients/{tap}"), np.float64)
        return np.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0.0)

    def weights(self, one: Looked) -> dict[SlotKey, list[np.ndarray]]:
        return slot_gradients(one.config, one.head, self.a.under(f"{self.role}/start/weights"))


def _culprit(
    one: Looked,
    direction: Direction,
    names: Sequence[str],
    evidence: Mapping[str, float],
    limit: float,
    *,
    title: str | None = None,
) -> Culprit:
    ordered = tuple(sorted(evidence.items(), key=lambda item: -item[1]))
    layers = {one.operations[name].layer for name in names}
    return Culprit(
        role=one.role,
        where=one.where,
        direction=direction,
        operations=tuple(names),
        layer=layers.pop() if len(layers) == 1 else None,
        title=title or " or ".join(one.operations[name].title for name in names),
        evidence=ordered,
        over=ordered[0][1] / limit,
    )


def residual_readers(one: Looked) -> dict[tuple[str, str], list[str]]:
    """(x, branch) of each residual sum that has no tap -> the operations that read it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, operation in one.operations.items():
        if len(operation.reads) >= 2 and operation.layer is not None and not name.endswith(".out"):
            pair = operation.reads[:2]
            if not pair[0].startswith(f"layers.{operation.layer}.") and pair[1].startswith("layers."):
                found.setdefault((pair[0], pair[1]), []).append(name)
    for name, operation in one.operations.items():
        if name.endswith(".out") and operation.reads[:2] in found:
            found[operation.reads[0], operation.reads[1]].append(name)
    return found


def _wrong_forward(one: Looked, limit: float) -> list[Culprit]:
    over = {name: error for name, error in one.forward.items() if not error <= limit}
    found = []
    for readers in residual_readers(one).values():
        if len(readers) > 1 and all(name in over for name in readers):
            layer = one.operations[readers[0]].layer
            assert layer is not None
            evidence = {name: over.pop(name) for name in readers}
            found.append(_culprit(one, "forward", readers, evidence, limit, title=residual_title(layer)))
    for layer in range(one.config.num_layers):
        turned = [f"layers.{layer}.{name}_rotated" for name in ("query", "key")]
        if all(name in over for name in turned):
            evidence = {name: over.pop(name) for name in turned}
            found.append(_culprit(one, "forward", turned, evidence, limit, title=rotary_title(layer)))
    return found + [_culprit(one, "forward", [name], {name: error}, limit) for name, error in over.items()]


def _wrong_backward(one: Looked, sides: Sides, limit: float, explained: set[str]) -> list[Culprit]:
    """The operations whose backward explains the gradients that differ: each time the one of whose inputs the largest
    share differs, then most of them."""
    left = {name for name, error in one.backward.items() if not error <= limit} - explained
    found = []
    while left:
        shares = {
            name: (len(hit) / len(set(operation.reads)), len(hit))
            for name, operation in one.operations.items()
            if (hit := left & set(operation.reads))
        }
        best = max(shares.values())
        fitting = [name for name, share in shares.items() if share == best]
        hit = left & set(one.operations[fitting[0]].reads)
        fitting = [name for name in fitting if left & set(one.operations[name].reads) == hit]
        evidence = {f"gradient of {tap}": one.backward[tap] for tap in hit}
        residual = _residual(one, sides, hit)
        if residual is not None:
            found.append(_culprit(one, "backward", residual[0], evidence, limit, title=residual[1]))
        else:
            found.append(_culprit(one, "backward", _narrowed(one, sides, fitting, hit, limit), evidence, limit))
        left -= hit
    return found


def _residual(one: Looked, sides: Sides, hit: set[str]) -> tuple[list[str], str] | None:
    """The sum x + branch, where it alone treats its two parts differently: only the branch's gradient is wrong, or only
    x's and by a multiple of what the sum hands down (which is the branch's gradient)."""
    for (x, branch), readers in residual_readers(one).items():
        if len(readers) == 1:  # then the sum is part of that operation
            continue
        layer = one.operations[readers[0]].layer
        assert layer is not None
        is_skip = hit == {x} and _cosine(_difference(sides, x), sides.gradient("a", branch)) >= ALONG
        if hit == {branch} or is_skip:
            return readers, residual_title(layer)
    return None


def _narrowed(one: Looked, sides: Sides, fitting: list[str], hit: set[str], limit: float) -> list[str]:
    """Of operations that all fit: the matrix product whose share of the gradient the error is a multiple of, else the
    one whose weights' gradient is wrong too, else all."""
    if len(fitting) == 1:
        return fitting
    weights = sides.weights(one)
    tap = sorted(hit)[0]
    scaled = []
    for name in fitting:
        operation = one.operations[name]
        held = weights.get(operation.slots[0], []) if operation.linear and operation.slots else []
        if len(held) == 1:  # (of an adapter there are two, and the weight below is not known)
            made, weight = sides.gradient("a", name), held[0]
            share = np.tensordot(made, np.asarray(weight, np.float64), axes=_pairs(made, weight))
            if _cosine(_difference(sides, tap), share) >= ALONG:
                scaled.append(name)
    heavy = [name for name in fitting if any(one.weights.get(slot, 0.0) > limit for slot in one.operations[name].slots)]
    return next((chosen for chosen in (scaled, heavy) if len(chosen) == 1), fitting)


def _pairs(made: np.ndarray, weight: np.ndarray) -> tuple[list[int], list[int]]:
    """The axes of outputs, of a gradient [B, T, outputs...] and a weight [inputs, outputs...]."""
    return list(range(2, made.ndim)), list(range(1, weight.ndim))


def _difference(sides: Sides, tap: str) -> np.ndarray:
    return sides.gradient("b", tap) - sides.gradient("a", tap)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """|cosine| of the angle between two arrays; 0 where it is none."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return 0.0
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return abs(float(np.sum(a * b))) / lengths if lengths > 0 else 0.0


def _wrong_weights(one: Looked, limit: float, blamed: set[str]) -> list[Culprit]:
    """Operations that nothing else blames, of whose weights the gradient alone differs. A weight that two operations
    hold (tied embeddings) names both."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for key, error in one.weights.items():
        holders = tuple(name for name, operation in one.operations.items() if key in operation.slots)
        if not error <= limit and holders and not set(holders) & blamed:
            slot, layer = key
            what = slot if layer is None else f"layers.{layer}.{slot}"
            found.setdefault(holders, {})[f"gradient of weight {what}"] = error
    return [_culprit(one, "backward", holders, evidence, limit) for holders, evidence in found.items()]


def _divergences(one: Looked, limit: float) -> list[Culprit]:
    """Without forcing: the first operation that is off while its inputs agree; where none is, the one that is furthest
    off for its inputs. Forward, and where all of that agrees, backward."""
    ahead = {name: (one.forward[name], [one.forward[tap] for tap in operation.reads])
             for name, operation in one.operations.items() if name != LOSS}  # fmt: skip
    found = _jump(one, "forward", ahead, limit)
    if found or any(error > limit for error in one.forward.values()):
        return found
    back = {}
    for name, operation in reversed(list(one.operations.items())):
        if operation.reads:
            worst = max(one.backward[tap] for tap in operation.reads)
            back[name] = (worst, [] if name == LOSS else [one.backward[name]])
    return _jump(one, "backward", back, limit)


def _jump(
    one: Looked, direction: Direction, errors: Mapping[str, tuple[float, list[float]]], limit: float
) -> list[Culprit]:
    off = {name: error / max([limit / JUMP, *before])
           for name, (error, before) in errors.items() if not error <= limit}  # fmt: skip
    if not off:
        return []
    name = next((name for name, gain in off.items() if gain >= JUMP), max(off, key=lambda name: off[name]))
    what = name if direction == "forward" else f"gradient of {', '.join(one.operations[name].reads)}"
    return [_culprit(one, direction, [name], {what: errors[name][0]}, limit)]
