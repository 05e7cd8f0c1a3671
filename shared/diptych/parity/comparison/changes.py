"""What one optimizer step did to a tensor, for faults that the new weights hide, because they lie below their limit.

With w the weights before, u the change on one side and d what the other side's new weights have more: d along u is a
step of another size (learning rate, bias correction), d along w a shrinking (weight decay). Both are sums over the
whole tensor, in which rounding averages out: 1% of a step of 5e-5 is 5e-7 of a weight, 4 units in the last place of
float32.
"""

from __future__ import annotations

import math

import numpy as np

from diptych.parity.comparison.findings import Finding
from diptych.parity.trace import Step

ROUNDINGS = 4.0  # standard errors of rounding that are let pass


def step_findings(name: str, a: Step, b: Step, *, limit: float) -> list[Finding]:
    """The red ones of both projections for the tensor ROLE/weights/NAME; none where either side does not tell where it
    started, or they started apart."""
    role, _, rest = name.partition("/weights/")
    start = f"{role}/start/weights/{rest}"
    rate = a.metrics.get(f"{role}/learning_rate", 0.0)
    if start not in a.tensors or start not in b.tensors or not rate > 0:
        return []
    before, new_a, new_b = (one.astype(np.float64) for one in (a.array(start), a.array(name), b.array(name)))
    if (
        not np.array_equal(a.array(start), b.array(start))
        or not np.isfinite([one.sum() for one in (before, new_a, new_b)]).all()
    ):
        return []
    made, apart = new_a - before, new_b - new_a
    weights, step = float(np.linalg.norm(before)), float(np.linalg.norm(made))
    if step == 0 or weights == 0:
        return []
    # Both at once, by least squares: steps and weights are not at right angles. Of norms and biases they lie too close.
    along = [made / step] + ([before / weights] if before.ndim > 1 else [])
    products = np.array([[np.vdot(one, other) for other in along] for one in along])
    shares = np.linalg.lstsq(products, np.array([np.vdot(one, apart) for one in along]), rcond=None)[0]
    coarsest = max(float(np.finfo(side.array(name).dtype).eps) for side in (a, b))
    rounding = ROUNDINGS * coarsest / math.sqrt(before.size)
    size = float(shares[0]) / step
    found = [(size, rounding * weights / step, f"the step is {1 + size:.4g} times as large")]
    if len(shares) > 1:
        decay = -float(shares[1]) / weights / rate
        found.append((decay, rounding / rate, f"decays by {decay:.3g} x learning rate more"))
    errors = ((max(0.0, abs(value) - noise), words) for value, noise, words in found)
    return [
        Finding(name=name, error=error, limit=limit, detail=words, count=before.size)
        for error, words in errors
        if not error <= limit
    ]
