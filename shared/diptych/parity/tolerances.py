"""Every tolerance that a run or a test uses, in one table, each with its reason (law 9).

The rungs are those of docs/parity.md. Values are absolute unless the name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diptych.engine import Precision


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """limit by precision, and why it is what it is; None: nothing is compared in it. bfloat16 is for run-time
    invariants only: it cannot tell a right computation from a slightly wrong one."""

    float64: float
    float32: float | None = None
    bfloat16: float | None = None
    reason: str

    def at(self, precision: Precision) -> float:
        limit = {"float64": self.float64, "float32": self.float32, "bfloat16": self.bfloat16}[precision]
        if limit is None:
            raise ValueError(f"no tolerance in {precision} ({self.reason}): compare in float32 or float64")
        return limit


def coarser(a: Precision, b: Precision) -> Precision:
    """Whichever of the two has fewer digits: what numbers of both can agree to."""
    digits: Mapping[Precision, int] = {"bfloat16": 8, "float32": 24, "float64": 53}  # binary ones
    return a if digits[a] <= digits[b] else b


TOLERANCES: Mapping[str, Tolerance] = {
    "function": Tolerance(
        float64=1e-12, float32=1e-6, reason="one formula in two array libraries: a few ulp of elementwise functions"
    ),
    "model": Tolerance(
        float64=1e-12, float32=2e-5, reason="log-probabilities of small models: 1e-6 to 5e-6 measured in float32"
    ),
    "frequencies_relative": Tolerance(
        float64=1e-5,
        float32=1e-5,
        reason="rotary frequencies and embedding scales: transformers makes them in float32 (powers of theta "
        "lose digits), the hinge in float64, rounded once",
    ),
    "gradient_relative_l2": Tolerance(
        float64=1e-11, float32=2e-5, reason="worst tensor: 1e-6 measured in float32, 1e-15 in float64"
    ),
    "probe_gradient_relative_l2": Tolerance(
        float64=1e-11,
        float32=1e-4,
        reason="gradients of the ladder's probe batch, whose ratios leave 1: each token's share has the ratio's "
        "relative error, which is the gap of its log-probability (trained models: 1e-5), and shares of both signs "
        "cancel. Worst of 21,198 tensors in 738 lockstep steps: 2.8e-5; planted bugs: 1e-3 and more",
    ),
    "operation_relative_l2": Tolerance(
        float64=1e-12,
        float32=1e-5,
        reason="one operation on the other side's inputs, forward or backward: sums over a width or a row's columns",
    ),
    "optimizer": Tolerance(
        float64=1e-13, float32=1e-7, reason="parameters and moments after identical gradients: 7e-8 after ten steps"
    ),
    "moment_relative_l2": Tolerance(
        float64=1e-11,
        float32=5e-5,
        reason="moments after one lockstep step: linear in the gradient (second: twice), whose shares cancel: 2.1e-5 "
        "in one of 300 steps of an RNN",
    ),
    "weights_relative_l2": Tolerance(
        float64=1e-11,
        float32=5e-5,
        reason="weights after one lockstep step: Adam amplifies rounding where |g| is near eps, so per tensor, not per "
        "element",
    ),
    "step_relative": Tolerance(
        float64=1e-9,
        float32=1e-3,
        reason="what one step did to a tensor as a multiple of itself (another learning rate) and of the weights "
        "(weight decay, in units of the learning rate), beyond rounding: sums over a tensor, where rounding averages "
        "out",
    ),
    "own_update": Tolerance(
        float64=1e-6,
        float32=1e-3,
        reason="a side's new weights against the update that its own moments make, relative to the update's length, "
        "the weights' rounding taken off: the quotient of two moments loses digits; 2e-5 measured in float32",
    ),
    "trajectory_relative": Tolerance(
        float64=1e-8, float32=1e-5, reason="float64 runs free, 1.7e-10 after 300 steps; float32 only in lockstep"
    ),
    "gradient_share": Tolerance(
        float64=1e-3,
        float32=1e-3,
        bfloat16=1e-3,
        reason="no tolerance: the share of the whole gradient's norm that a tensor's error is at least measured "
        "against. The limit times it is the last digit of a float32 of the whole's size. The reward loss's "
        "gradient for a last bias is such a remainder: 6e-6 of the whole, 4.3e-4 off in one of 300 steps",
    ),
    "norm_relative": Tolerance(
        float64=1e-8,
        float32=5e-5,
        reason="norm of a step's gradients, in lockstep in float32: no closer than its tensors; 1.8e-5 in one of 300 "
        "steps of an RNN",
    ),
    "metric_floor": Tolerance(
        float64=1e-12,
        float32=5e-6,
        reason="absolute: a logged mean of outputs that are up to 1e-5 apart may itself be near 0; 1.8e-6 measured",
    ),
    "decode": Tolerance(
        float64=1e-12, float32=2e-5, reason="decode with a cache against the training forward, same weights and engine"
    ),
    "layout": Tolerance(
        float64=1e-9,
        reason="another mesh, process count, micro-batch or packing sums in another order: at most 2e-15 measured, "
        "9e-12 across processes",
    ),
    # Run-time invariants: wider than the tests, because they hold for models of any size. What they catch (wrong
    # positions, masks, stale weights, active dropout) is orders of magnitude larger. In bfloat16 the quickstart's
    # sampler and trainer differ by up to 0.03 nats.
    "first_ratio": Tolerance(
        float64=1e-9,
        float32=1e-3,
        bfloat16=0.3,
        reason="ratio of the first update to the log-probabilities just scored, minus 1",
    ),
    "reference_kl": Tolerance(
        float64=1e-9, float32=1e-3, bfloat16=0.3, reason="log-ratio to the reference while the weights are still equal"
    ),
    "sampler_gap": Tolerance(
        float64=1e-9,
        float32=1e-3,
        bfloat16=0.3,
        reason="sampler's log-probability against the training forward's, same weights: in every iteration, and at the "
        "gate, where it also says which greedy tokens are near-ties",
    ),
    "memory_relative": Tolerance(
        float64=0.05,
        float32=0.05,
        bfloat16=0.05,
        reason="planned over measured bytes of weights, states and gradients: partitions are padded; 2% measured",
    ),
}
