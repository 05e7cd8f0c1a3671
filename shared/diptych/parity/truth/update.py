"""An optimizer step checked against itself: what a side made of its own moments it must have made by the formula of
`diptych.engine.OptimizerSpec`, whatever the true gradient of the whole mini-batch is."""

from __future__ import annotations

import math

import numpy as np

from diptych.algorithms.optimizers import CLIP_EPS
from diptych.parity.trace import Step
from diptych.recipe.schema import OptimizerRecipe


def consistency(step: Step, role: str, spec: OptimizerRecipe) -> dict[str, float]:
    """Does the role's first update follow from its own moments? {} where the step does not hold what that takes.

    second/TENSOR: v' against b2 v + (1 - b2) g^2 with g = (m' - b1 m) / (1 - b1), relative to the second term.
    weights/TENSOR: the step that AdamW (or SGD) makes of m' and v' at the recorded learning rate, relative to its own
    length. grad_norm: the length of g, the clipping undone, relative. Each error (relative L2) is what is left after
    the rounding that the arrays' own type explains, so one limit serves large weights and tiny steps.
    """
    new, old = step.under(f"{role}/weights"), step.under(f"{role}/start/weights")
    first, before = step.under(f"{role}/first"), step.under(f"{role}/start/first")
    second, earlier = step.under(f"{role}/second"), step.under(f"{role}/start/second")
    done, rate = (step.metrics.get(f"{role}/{name}") for name in ("step", "learning_rate"))
    names = [name for name in new if name in old and name in first and name in before]
    if not names or done is None or rate is None:
        return {}
    found: dict[str, float] = {}
    squares = 0.0
    for name in names:
        if spec.name == "adamw":
            gradient, blur = _gradient(first[name], before[name], spec)
            found[f"second/{name}"] = _second_error(second[name], earlier[name], gradient, blur, spec)
            squares += float(np.sum(gradient**2))
        moments = (first[name], second.get(name))
        found[f"weights/{name}"] = _step_error(old[name], new[name], moments, spec, int(done) + 1, rate)
    norm = step.metrics.get(f"{role}/grad_norm")
    if norm is not None and spec.name == "adamw":
        scale = 1.0 if spec.max_grad_norm is None else min(1.0, spec.max_grad_norm / (norm + CLIP_EPS))
        length = math.sqrt(squares)
        found["grad_norm"] = abs(length - norm * scale) / (norm * scale) if norm > 0 else length
    return found


def _f64(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)


def _eps(values: np.ndarray) -> float:
    """The relative rounding of the type that the array came in."""
    return float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else float(np.finfo(np.float32).eps)


def _relative(distance: np.ndarray, allowed: float, whole: np.ndarray) -> float:
    """(|distance| - allowed) / |whole|, 0 where rounding explains all of it; inf for what is not finite."""
    length, size = float(np.linalg.norm(distance)), float(np.linalg.norm(whole))
    if not math.isfinite(length):
        return math.inf
    excess = max(0.0, length - allowed)
    return 0.0 if excess == 0 else excess / size if size > 0 else math.inf


def _gradient(new: np.ndarray, old: np.ndarray, spec: OptimizerRecipe) -> tuple[np.ndarray, np.ndarray]:
    """The gradient that led from the old first moment to the new one, and how far rounding may have moved it."""
    beta = spec.betas[0]
    gradient = (_f64(new) - beta * _f64(old)) / (1 - beta)
    return gradient, _eps(new) * (np.abs(_f64(new)) + 2 * beta * np.abs(_f64(old))) / (1 - beta)


def _second_error(
    new: np.ndarray, old: np.ndarray, gradient: np.ndarray, blur: np.ndarray, spec: OptimizerRecipe
) -> float:
    beta = spec.betas[1]
    added = (1 - beta) * gradient**2
    rounding = (1 - beta) * (2 * np.abs(gradient) * blur + blur**2) + _eps(new) * (2 * np.abs(_f64(new)) + 4 * added)
    return _relative(_f64(new) - beta * _f64(old) - added, float(np.linalg.norm(rounding)), added)


def _step_error(
    old: np.ndarray,
    new: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray | None],
    spec: OptimizerRecipe,
    updates: int,
    rate: float,
) -> float:
    first, second = moments
    blur = 8.0  # roundings of a step, in units of eps
    if spec.name == "adamw":
        assert second is not None
        left = [1 - beta**updates for beta in spec.betas]
        step = _f64(first) / left[0] / (np.sqrt(_f64(second) / left[1]) + spec.eps)
        blur += 1 / left[0] + 1 / left[1]  # 1 - beta^t loses digits in float32
    else:
        step = _f64(first)
    decay = spec.weight_decay if old.ndim >= 2 else 0.0
    step = -rate * (step + decay * _f64(old))
    allowed = _eps(new) * (2 * float(np.linalg.norm(_f64(new))) + blur * float(np.linalg.norm(step)))
    return _relative(_f64(new) - _f64(old) - step, allowed, step)
