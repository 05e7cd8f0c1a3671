"""From log-probabilities and scores to per-token rewards: the KL estimators, the KL penalty and where the score lands.

r_t = -kl_coef * kl_t, and the score of the whole response is added to one slot (Ziegler et al. 2019). `kl_estimate`
runs under any array namespace; the rest is NumPy on the host and keeps the dtype of its input.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Bool, Float, Int

from diptych.algorithms.losses import MAX_LOG_RATIO

Array = Any
KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"], *, estimator: str
) -> Float[Array, "*shape"]:
    """Per-token estimate of KL(policy || reference), nats, at tokens drawn from the policy (Schulman 2020).

    With l = logprobs - ref_logprobs: k1 = l (unbiased, may be negative); k2 = l^2 / 2 (biased, low variance);
    k3 = exp(-l) - 1 + l (unbiased, never negative). In k3 the exponent is clipped to +-MAX_LOG_RATIO so that exp
    cannot overflow: beyond it the estimate stops at 4.9e8 nats, which no run survives unnoticed.

    Raises ValueError for another estimator.
    """
    xp = array_namespace(logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    if estimator == "k3":
        exponent = -log_ratio
        low, high = xp.full_like(exponent, -MAX_LOG_RATIO), xp.full_like(exponent, MAX_LOG_RATIO)
        # expm1: near l = 0, where k3 is l^2 / 2, exp(-l) - 1 would cancel.
        return xp.expm1(xp.where(exponent < low, low, xp.where(exponent > high, high, exponent))) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


def kl_penalty(kl: Float[np.ndarray, "rows new"], *, kl_coef: float) -> Float[np.ndarray, "rows new"]:
    """The per-token penalty -kl_coef * kl."""
    return -kl_coef * kl


def clip_scores(scores: Float[np.ndarray, " rows"], *, limit: float | None) -> Float[np.ndarray, " rows"]:
    """scores limited to [-limit, limit]; None leaves them."""
    return scores if limit is None else np.clip(scores, -limit, limit)


def add_scores(
    rewards: Float[np.ndarray, "rows new"], scores: Float[np.ndarray, " rows"], *, slots: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows new"]:
    """rewards with scores[b] added at column slots[b] of row b."""
    at_slot = slots[:, None] == np.arange(rewards.shape[1])
    return np.where(at_slot, rewards + scores[:, None], rewards)


def only(values: Float[np.ndarray, "rows new"], mask: Bool[np.ndarray, "rows new"]) -> Float[np.ndarray, "rows new"]:
    """values where mask, 0 elsewhere."""
    return np.where(mask, values, np.zeros_like(values))
