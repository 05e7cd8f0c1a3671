"""What an optimizer step *is*: NumPy float64 oracles of `diptych.engine.OptimizerSpec`, the truth in engine tests.

No engine trains with these. Tensors are dictionaries by Hugging Face name; nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from diptych.engine import OptimizerSpec, OptimizerState, Tensors

CLIP_EPS = 1e-6
"""Added to the gradient norm before dividing by it, so that a zero gradient is no 0/0 (the constant of torch)."""


def initial_state(weights: Mapping[str, np.ndarray], *, spec: OptimizerSpec) -> OptimizerState:
    """No steps made, moments zero; for SGD no second moment."""
    return OptimizerState(step=0, first=_zeros(weights), second=_zeros(weights) if spec.name == "adamw" else {})


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    """The L2 norm over all tensors together."""
    return math.sqrt(sum(float((_f64(g) ** 2).sum()) for g in gradients.values()))


def clip(gradients: Mapping[str, np.ndarray], *, max_grad_norm: float | None) -> tuple[Tensors, float]:
    """Gradients scaled by max_grad_norm / (norm + 1e-6) where that is below 1 (None: never), and the norm before."""
    norm = global_norm(gradients)
    scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + CLIP_EPS))
    return {name: _f64(g) * scale for name, g in gradients.items()}, norm


def adamw_step(
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    state: OptimizerState,
    *,
    spec: OptimizerSpec,
    learning_rate: float,
) -> tuple[Tensors, OptimizerState]:
    """One AdamW step (Loshchilov and Hutter 2019) on gradients as they are: clip them first.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p),
    t = state.step + 1. Returns the new weights and state, float64.
    """
    t = state.step + 1
    new_weights, first, second = {}, {}, {}
    for name, p in weights.items():
        p, g = _f64(p), _f64(gradients[name])
        m = spec.beta1 * _f64(state.first[name]) + (1.0 - spec.beta1) * g
        v = spec.beta2 * _f64(state.second[name]) + (1.0 - spec.beta2) * g**2
        direction = m / (1.0 - spec.beta1**t) / (np.sqrt(v / (1.0 - spec.beta2**t)) + spec.eps)
        new_weights[name] = p - learning_rate * (direction + _decay(p, spec) * p)
        first[name], second[name] = m, v
    return new_weights, OptimizerState(step=t, first=first, second=second)


def sgd_step(
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    state: OptimizerState,
    *,
    spec: OptimizerSpec,
    learning_rate: float,
) -> tuple[Tensors, OptimizerState]:
    """One SGD step on gradients as they are: m = momentum m + g; p -= lr (m + wd p). Returns float64."""
    new_weights, first = {}, {}
    for name, p in weights.items():
        p = _f64(p)
        m = spec.momentum * _f64(state.first[name]) + _f64(gradients[name])
        new_weights[name] = p - learning_rate * (m + _decay(p, spec) * p)
        first[name] = m
    return new_weights, OptimizerState(step=state.step + 1, first=first, second={})


def optimizer_step(
    weights: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    state: OptimizerState,
    *,
    spec: OptimizerSpec,
    learning_rate: float,
) -> tuple[Tensors, OptimizerState, float]:
    """Clip, then step, as `Model.update` does. Returns new weights, new state and the norm before clipping."""
    clipped, norm = clip(gradients, max_grad_norm=spec.max_grad_norm)
    step = adamw_step if spec.name == "adamw" else sgd_step
    new_weights, new_state = step(weights, clipped, state, spec=spec, learning_rate=learning_rate)
    return new_weights, new_state, norm


def ema_step(average: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], *, decay: float) -> Tensors:
    """ema = decay ema + (1 - decay) p, float64."""
    return {name: decay * _f64(average[name]) + (1.0 - decay) * _f64(p) for name, p in weights.items()}


def _decay(p: np.ndarray, spec: OptimizerSpec) -> float:
    """Weight decay touches matrices, never gains, biases or other vectors."""
    return spec.weight_decay if p.ndim >= 2 else 0.0


def _f64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def _zeros(weights: Mapping[str, np.ndarray]) -> Tensors:
    return {name: np.zeros(p.shape, dtype=np.float64) for name, p in weights.items()}
