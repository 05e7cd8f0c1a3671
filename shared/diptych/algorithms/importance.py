"""Truncated importance sampling, for rollouts of a sampler that computes other numbers than the trainer.

Tokens were drawn from q, the sampler's distribution; the policy gradient wants p, the trainer's for the same weights.
Each token's loss is weighed by min(p / q, cap) (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training"; verl's `rollout_is` of tokens, truncated, without renormalisation). The cap bounds the variance
that a token with a tiny q would bring, at the price of a bias.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from diptych.algorithms.losses import MAX_LOG_RATIO


def importance_weights(
    logprobs: Float[np.ndarray, "rows new"],
    sampler_logprobs: Float[np.ndarray, "rows new"],
    mask: Bool[np.ndarray, "rows new"],
    *,
    cap: float,
) -> Float[np.ndarray, "rows new"]:
    """min(exp(logprobs - sampler_logprobs), cap) on the mask, 0 elsewhere.

    logprobs: the trainer's, with the weights that the sampler had, before any update; both in nats at one temperature.
    """
    log_ratio = np.where(mask, logprobs - sampler_logprobs, 0)
    # Clip the log-ratio before exp() so that exp cannot overflow.
    weights = np.minimum(np.exp(np.minimum(log_ratio, MAX_LOG_RATIO)), cap)
    return np.where(mask, weights, 0).astype(logprobs.dtype)


def importance_metrics(
    weights: Float[np.ndarray, "rows new"], mask: Bool[np.ndarray, "rows new"], *, cap: float
) -> dict[str, float]:
    """What the weights of a rollout are like, over its response tokens.

    `importance/weight_mean`, `importance/weight_max`; `importance/truncated`, the share of tokens at the cap;
    `importance/effective_sample_size` = (sum w)^2 / (n sum w^2) (Kish 1965), 1 where all weights are equal.
    """
    live = weights[mask].astype(np.float64)
    return {
        "importance/weight_mean": float(live.mean()),
        "importance/weight_max": float(live.max()),
        "importance/truncated": float(np.mean(live >= np.asarray(cap, weights.dtype))),
        "importance/effective_sample_size": float(live.sum() ** 2 / (len(live) * np.square(live).sum())),
    }
