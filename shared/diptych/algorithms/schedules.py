"""The course of the learning rate: a plain function of the step, computed on the host and handed to every update."""

from __future__ import annotations

import math

from diptych.errors import UserError


def learning_rate(step: int, *, peak: float, num_steps: int, schedule: str, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of a stage of `num_steps` steps.

    Warm-up, step < warmup_steps: peak * (step + 1) / warmup_steps, so the first step moves and the last is at peak.
    After it, with t = step - warmup_steps and T = num_steps - warmup_steps:
      constant: peak
      linear:   peak * (1 - t / T), the 1 - (u - 1) / U of the N implementation details with u counted from 1
      cosine:   peak * (1 + cos(pi t / T)) / 2
    Both fall from peak at t = 0 and would reach zero at t = T, one step after the last: no step is wasted on rate 0.

    Raises UserError for an unknown schedule or a warm-up longer than the stage, ValueError for a step outside it.
    """
    if warmup_steps < 0 or warmup_steps > num_steps:
        raise UserError(
            f"optimizer.warmup_steps: must lie between 0 and the stage's {num_steps} steps, got {warmup_steps}"
        )
    if not 0 <= step < num_steps:
        raise ValueError(f"step must lie in [0, {num_steps}), got {step}")
    if schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"optimizer.schedule: unknown {schedule!r}; choose constant, linear or cosine")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    fraction = (step - warmup_steps) / (num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - fraction)
    return peak * 0.5 * (1.0 + math.cos(math.pi * fraction))
