"""Which side's operation is wrong: the float64 oracle, with every tap forced to A's.

Forward, the oracle's own value of a tap is the truth about its operation on A's inputs. Backward, move what is read (a
tap, or a weight) by +-h along d = (gradient of A - gradient of B) / length: the oracle's loss plus the sum over all
taps of <A's gradient of the tap, the oracle's own value of it> has the true <gradient, d> as its slope, because of that
sum only what the moved array's readers make changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from diptych.engine import Loss, TrainBatch
from diptych.families.family import ModelConfig, tensor_places
from diptych.parity.blame.search import Culprit, Looked, Sides
from diptych.parity.trace import Trace
from diptych.parity.truth.oracle import evaluate
from diptych.parity.truth.slope import direction, first_step, slope
from diptych.parity.truth.truth import Truth, explained

JUDGED = 4  # culprits, the worst first: each backward one takes a dozen forward passes


def judged(culprits: Sequence[Culprit], looked: Sequence[Looked], a: Trace, b: Trace, limit: float) -> list[Culprit]:
    """The culprits, the worst few with a verdict."""
    places = {one.where: one for one in looked}
    return [
        replace(one, verdict=_verdict(one, places[one.where], a, b, limit)) if index < JUDGED else one
        for index, one in enumerate(culprits)
    ]


def _verdict(culprit: Culprit, one: Looked, a: Trace, b: Trace, limit: float) -> str:
    left, right = a.read(one.stage, one.step), b.read(one.stage, one.step)
    if not one.is_forced:
        return "cannot tell: the second trace is no replay, so its taps are not the work of one operation"
    forced = forced_oracle(Truth(a, left), one)
    if forced is None:
        return "cannot tell: the trace holds no whole weights, or does not say which loss it is"
    sides = Sides(left, right, one.role)
    what = culprit.evidence[0][0]
    if culprit.direction == "forward":
        mine, theirs = (step.array(f"{one.role}/taps/{what}") for step in (left, right))
        return explained(forced.value_error(what, mine), forced.value_error(what, theirs), limit)
    if what.startswith("gradient of weight "):
        return _weight_verdict(culprit, one, forced, sides, limit)
    tap = what.removeprefix("gradient of ")
    gradients = sides.gradient("a", tap), sides.gradient("b", tap)
    along, distance = direction(*gradients)
    found = forced.slope_of_tap(tap, along)
    return _explained(gradients, along, distance, found, limit)


def _explained(gradients, along: np.ndarray, distance: float, found, limit: float) -> str:
    """Errors along the direction, relative to A's gradient."""
    if not found.uncertainty <= 0.1 * distance:
        return "cannot tell: the gradient jumps there (a clip's edge, relu at 0)"
    norm = float(np.linalg.norm(gradients[0])) or 1.0
    errors = [abs(float(np.sum(side * along)) - found.value) / norm for side in gradients]
    return explained(errors[0], errors[1], limit)


def _weight_verdict(culprit: Culprit, one: Looked, forced: ForcedOracle, sides: Sides, limit: float) -> str:
    """The tensor of the operation whose gradient differs most."""
    mine, theirs = sides.a.under(f"{one.role}/gradient"), sides.b.under(f"{one.role}/forced_gradient")
    held = {name for name in mine if name in theirs and forced.holds(name, one, culprit.operations)}
    if not held:
        return "cannot tell: the trace does not hold the weight's gradient on both sides"
    name = max(held, key=lambda name: float(np.linalg.norm(mine[name].astype(np.float64) - theirs[name])))
    gradients = mine[name].astype(np.float64), theirs[name].astype(np.float64)
    along, distance = direction(*gradients)
    return _explained(gradients, along, distance, forced.slope_of_weight(name, along), limit)


@dataclass(frozen=True, kw_only=True)
class ForcedOracle:
    """The oracle of one role in one step, all taps forced to A's. gradients: A's by the taps, 0 on padding."""

    config: ModelConfig
    loss: Loss
    weights: dict[str, np.ndarray]
    batch: TrainBatch
    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    def own(self, values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and what each operation makes of the forced values."""
        made: dict[str, np.ndarray] = {}

        def force(name: str, value: np.ndarray) -> np.ndarray:
            made[name] = value
            return values.get(name, value)

        return evaluate(self.loss, self.config, weights, self.batch, tap=force)["loss"], made

    def value_error(self, tap: str, side: np.ndarray) -> float:
        """|side - truth| / |truth| over real columns."""
        _, made = self.own(self.values, self.weights)
        mask = self.batch.tokens.attention
        distance = np.linalg.norm(side[mask].astype(np.float64) - made[tap][mask])
        return float(distance / (np.linalg.norm(made[tap][mask]) or 1.0))

    def slope_of_tap(self, tap: str, along: np.ndarray):
        middle = self.values[tap]

        def at(step: float):
            return self.own({**self.values, tap: middle + step * along}, self.weights)

        return slope(lambda step: self._difference(at(step), at(-step)), scale=first_step(middle))

    def slope_of_weight(self, name: str, along: np.ndarray):
        middle = self.weights[name]

        def at(step: float):
            return self.own(self.values, {**self.weights, name: middle + step * along})

        return slope(lambda step: self._difference(at(step), at(-step)), scale=first_step(middle))

    def _difference(self, up, down) -> float:
        """Of the loss, and of each tap's share; what nothing moved is exactly 0."""
        shares = [float(np.sum(self.gradients[name] * (up[1][name] - down[1][name]))) for name in self.gradients]
        return up[0] - down[0] + sum(shares)

    def holds(self, tensor: str, one: Looked, names: Sequence[str]) -> bool:
        """Is the tensor among the weights of these operations?"""
        rule, layer, _ = tensor_places(self.config, one.head)[tensor]
        slots = {slot for name in names for slot in one.operations[name].slots}
        return any((slot, layer) in slots for slot in rule.slots)


def forced_oracle(about: Truth, one: Looked) -> ForcedOracle | None:
    """None where the step does not hold the model's weights, or nobody knows the loss."""
    ready, batch, loss = about.ready(one.role, "start/weights"), about.probe(one.role), about.loss(one.role)
    if ready is None or batch is None or loss is None:
        return None
    sides = Sides(about.step, about.step, one.role)
    values = about.step.under(f"{one.role}/taps")
    return ForcedOracle(
        config=ready[0],
        loss=loss,
        weights={name: np.asarray(value, np.float64) for name, value in ready[1].items()},
        batch=batch,
        values={name: np.asarray(value, np.float64) for name, value in values.items()},
        gradients={name: sides.gradient("a", name) for name in values},
    )
