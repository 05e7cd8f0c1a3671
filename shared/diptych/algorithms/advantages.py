"""Generalised advantage estimation and whitening, in NumPy on the host.

Both engines get their advantages from here, so there is one implementation to be right. Arrays keep their dtype;
statistics are global (over every masked-in slot of the rollout, law 4) and are summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from diptych.errors import InvariantError


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """How advantages (and rewards, where asked for) get unit scale: (x - mean) / scale over masked-in slots."""

    variance: Literal["population", "bessel"]
    """Divide the sum of squares by n (NumPy, JAX, N+ details) or by n - 1 (torch's default)."""
    eps: float
    """Guards the root; see `eps_form`."""
    eps_form: Literal["add", "floor"] = "add"
    """scale = sqrt(variance + eps), or sqrt(max(variance, eps))."""
    count_eps: float = 0.0
    """Added to the count in the mean and the population variance (verl and NeMo RL divide by n + 1e-8)."""
    keep_mean: bool = False
    """Add the mean back: only the scale changes. Reward whitening does; for advantages it is torchtune's defect."""


def gae(
    rewards: Float[np.ndarray, "rows new"], values: Float[np.ndarray, "rows new"], *, gamma: float, lam: float
) -> tuple[Float[np.ndarray, "rows new"], Float[np.ndarray, "rows new"]]:
    """Advantages and returns (Schulman et al. 2016, eq. 16), both [rows, new].

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t; V and A beyond the last
    column are 0. values[b, t] is the critic's value of the state before token t; the caller zeroes rewards and values
    after the end of a row.
    """
    columns = []
    advantage = np.zeros_like(rewards[:, 0])
    next_value = np.zeros_like(values[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        columns.append(advantage)
    advantages = np.stack(columns[::-1], axis=1)
    return advantages, advantages + values


def masked_mean_variance(
    x: Float[np.ndarray, "rows new"], mask: Bool[np.ndarray, "rows new"], *, whitening: Whitening
) -> tuple[float, float]:
    """Mean and variance of x over mask, float64, as `whitening` defines them.

    Raises InvariantError where there are too few slots for them to exist.
    """
    needed = 2 if whitening.variance == "bessel" else 1
    inside = x[mask].astype(np.float64)
    if inside.size < needed:
        raise InvariantError(
            f"whitening needs at least {needed} response tokens in a rollout, this one has {inside.size}: "
            "all responses are empty or masked out"
        )
    count = inside.size + whitening.count_eps
    mean = inside.sum() / count
    variance = ((inside - mean) ** 2).sum() / count
    if whitening.variance == "bessel":
        variance *= inside.size / (inside.size - 1)
    return float(mean), float(variance)


def whiten(
    x: Float[np.ndarray, "rows new"], mask: Bool[np.ndarray, "rows new"], *, whitening: Whitening
) -> Float[np.ndarray, "rows new"]:
    """x brought to zero mean (unless `keep_mean`) and unit scale over mask; 0 outside the mask."""
    mean, variance = masked_mean_variance(x, mask, whitening=whitening)
    guarded = variance + whitening.eps if whitening.eps_form == "add" else max(variance, whitening.eps)
    whitened = (x - mean) / float(np.sqrt(guarded))
    if whitening.keep_mean:
        whitened = whitened + mean
    return np.where(mask, whitened, np.zeros_like(x))
