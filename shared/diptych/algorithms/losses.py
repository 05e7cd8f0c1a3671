"""Every training loss, written once against the Python array API standard.

The same lines run under `jax.numpy` (inside `jax.jit(jax.value_and_grad(..., has_aux=True))`), under torch's autograd
and under NumPy float64, the oracle. A loss is a pure function of per-token arrays: it sums over its mask and divides
by a *global* denominator (law 4), so that sums over micro-batches and processes are the values of the step. Metrics
are divided the same way; one whose name ends in `_max` is combined by maximum instead.

Rules that keep the frameworks equal: constants are Python floats or arrays of the input's dtype, so nothing is
promoted; clips are built from `where` with strict inequalities, because the frameworks' own `clip` and `clamp` differ
in the gradient exactly at an edge; the larger of two losses is the elementwise `maximum`, which both split evenly at a
tie; masked-out slots are replaced *before* the arithmetic, so that whatever lies there (NaN too) reaches neither a
value nor a gradient. Nothing is written in place.

Legend: mask arguments are bool or 0/1 numbers; `num_*` arguments are Python floats (or 0-d arrays of the loss's dtype),
positive, counted on the host over all micro-batches and processes.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace
from jaxtyping import Float, Shaped

Array = Any  # NumPy, JAX (traced too) or torch
Scalar = Any  # a Python float or a 0-d array
Output = tuple[Array, dict[str, Array]]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clipped to +- this before exp, so that neither the ratio (at most 4.9e8) nor its square can overflow
float32. At a working PPO step |log-ratio| stays below 1; a token out here has no gradient, and `policy/clamped_avg`
counts it."""


def sft_loss(logprobs: Float[Array, "batch time"], *, mask: Shaped[Array, "batch time"], num_tokens: Scalar) -> Output:
    """Negative log-likelihood: -sum(mask * logprobs) / num_tokens.

    logprobs: [batch, time], nats. mask: 1 on response tokens. num_tokens: masked-in tokens of the optimizer step.
    Metrics: `loss/nll`, the loss itself in nats per token.
    """
    xp = array_namespace(logprobs)
    loss = -xp.sum(_only(xp, logprobs, _bool(xp, mask))) / num_tokens
    return loss, {"loss/nll": loss}


def pairwise_reward_loss(
    scores: Float[Array, "batch time"],
    *,
    end_mask: Shaped[Array, "batch time"],
    num_pairs: Scalar,
    center_coef: float,
) -> Output:
    """Bradley-Terry: sum_i [-log sigmoid(c_i - r_i) + center_coef (c_i + r_i)^2] / num_pairs.

    scores: [batch, time], the scalar head; row 2i is the chosen and row 2i+1 the rejected response of pair i, so batch
    is even. end_mask: 1 at the last response token, where the row's score is read. A padding pair has an end_mask of
    zeros and contributes nothing. num_pairs: real pairs of the optimizer step. The centering term keeps scores near
    zero (Eisenstein et al. 2023).

    Metrics, each a mean over pairs: `reward/accuracy` (chosen > rejected; a tie counts as wrong), `reward/margin`
    (c - r), `reward/chosen`, `reward/rejected`.
    """
    xp = array_namespace(scores)
    chosen, rejected, is_pair = _pair_scores(xp, scores, end_mask)
    pair_loss = _neg_log_sigmoid(xp, chosen - rejected)
    return _reward_output(xp, pair_loss, chosen, rejected, is_pair, num_pairs=num_pairs, center_coef=center_coef)


def dschat_reward_loss(
    scores: Float[Array, "batch time"],
    *,
    end_mask: Shaped[Array, "batch time"],
    span_mask: Shaped[Array, "batch time"],
    num_pairs: Scalar,
    center_coef: float,
) -> Output:
    """DeepSpeed-Chat's token-wise pairwise loss: mean over the span of -log sigmoid(c_t - r_t), then over pairs.

    scores, end_mask, num_pairs and the metrics are as in `pairwise_reward_loss`; end_mask feeds the metrics and the
    centering term only. span_mask: 1 on the columns from the first differing token (included) to the end of the longer
    response (excluded), the same on both rows of a pair; every real pair has at least one. The shorter response
    contributes its padding columns, as in the original. DeepSpeed-Chat itself has no centering: center_coef 0.
    """
    xp = array_namespace(scores)
    chosen, rejected, is_pair = _pair_scores(xp, scores, end_mask)
    span = _bool(xp, span_mask)[0::2, :]
    # Both rows are replaced outside the span before they meet: 0 - 0 there, whatever the padding holds.
    margins = _only(xp, scores[0::2, :], span) - _only(xp, scores[1::2, :], span)
    num_span = xp.sum(xp.astype(span, scores.dtype), axis=1)
    num_span = xp.maximum(num_span, xp.ones_like(num_span))  # padding pairs: 0 / 1
    pair_loss = xp.sum(_only(xp, _neg_log_sigmoid(xp, margins), span), axis=1) / num_span
    return _reward_output(xp, pair_loss, chosen, rejected, is_pair, num_pairs=num_pairs, center_coef=center_coef)


def ppo_policy_loss(
    logprobs: Float[Array, "batch time"],
    *,
    entropy: Float[Array, "batch time"],
    old_logprobs: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"],
    mask: Shaped[Array, "batch time"],
    clip_range: float,
    num_tokens: Scalar,
    weights: Float[Array, "batch time"] | None = None,
) -> Output:
    """Clipped surrogate, Schulman et al. 2017 eq. 7: sum(mask max(-A rho, -A clip(rho, 1 +- clip_range))) / num_tokens.

    rho = exp(logprobs - old_logprobs), the exponent clipped to +-MAX_LOG_RATIO. All arrays [batch, time]; entropy in
    nats, logged only. num_tokens: masked-in tokens of the optimizer step. weights: constants, not negative, that each
    token's term is multiplied by (`diptych.algorithms.importance`); the denominator stays. None: no weights.

    Metrics, means over masked-in tokens: `loss/policy_avg` (the loss), `policy/approxkl_avg` (half the mean squared
    log-ratio), `policy/clipfrac_avg` (share of tokens where the clipped loss is the larger), `policy/clamped_avg`
    (share of tokens beyond MAX_LOG_RATIO), `policy/entropy_avg`, `val/ratio`, `val/ratio_excess_square` (mean of
    (rho - 1)^2; minus (val/ratio - 1)^2 it is the variance, and nothing cancels near 1).
    `policy/ratio_deviation_max`: the largest |rho - 1|.
    """
    xp = array_namespace(logprobs)
    keep = _bool(xp, mask)
    log_ratio = _only(xp, logprobs, keep) - _only(xp, old_logprobs, keep)
    advantages = _only(xp, advantages, keep)
    # Clip the log-ratio before exp() so that exp cannot overflow.
    ratio = xp.exp(_clip(xp, log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    unclipped = -advantages * ratio
    clipped = -advantages * _clip(xp, ratio, 1.0 - clip_range, 1.0 + clip_range)
    terms = _only(xp, xp.maximum(unclipped, clipped), keep)
    loss = xp.sum(terms if weights is None else terms * _only(xp, weights, keep)) / num_tokens

    def mean(values: Array) -> Array:
        return xp.sum(_only(xp, xp.astype(values, logprobs.dtype), keep)) / num_tokens

    return loss, {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * mean(log_ratio * log_ratio),
        "policy/clipfrac_avg": mean(clipped > unclipped),
        "policy/clamped_avg": mean(xp.abs(log_ratio) > MAX_LOG_RATIO),
        "policy/entropy_avg": mean(entropy),
        "policy/ratio_deviation_max": xp.max(_only(xp, xp.abs(ratio - 1.0), keep)),
        "val/ratio": mean(ratio),
        "val/ratio_excess_square": mean((ratio - 1.0) * (ratio - 1.0)),
    }


def ppo_value_loss(
    scores: Float[Array, "batch time"],
    *,
    columns: Shaped[Array, "batch slots"],
    old_values: Float[Array, "batch slots"],
    returns: Float[Array, "batch slots"],
    mask: Shaped[Array, "batch slots"],
    value_clip_range: float,
    value_coef: float,
    num_tokens: Scalar,
) -> Output:
    """Clipped value loss: value_coef * 0.5 * sum(mask * max((v - R)^2, (clip(v) - R)^2)) / num_tokens.

    scores: [batch, time], the critic's head after each token that *it* reads. columns: integer [batch, slots] (int64
    under torch), the column of the critic at each of the policy's states: v[b, s] = scores[b, columns[b, s]]; states
    that share a column add up their gradients there. Where the critic reads the policy's own tokens, columns count up.
    clip(v) keeps v within +-value_clip_range of old_values (Ziegler et al. 2019). num_tokens: masked-in slots of the
    optimizer step (more than the response tokens where the dialect's value mask is one longer).

    Metrics: `loss/value_avg` (the loss *without* value_coef), `val/clipfrac_avg` (share of slots where the clipped loss
    is the larger).
    """
    xp = array_namespace(scores)
    keep = _bool(xp, mask)
    values = xp.take_along_axis(scores, columns, axis=1)
    values, old_values, returns = (_only(xp, array, keep) for array in (values, old_values, returns))
    clipped_values = _clip(xp, values, old_values - value_clip_range, old_values + value_clip_range)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    value_loss = 0.5 * xp.sum(_only(xp, xp.maximum(unclipped, clipped), keep)) / num_tokens
    num_clipped = xp.sum(_only(xp, xp.astype(clipped > unclipped, scores.dtype), keep))
    return value_coef * value_loss, {"loss/value_avg": value_loss, "val/clipfrac_avg": num_clipped / num_tokens}


def _bool(xp: Any, mask: Array) -> Array:
    return xp.astype(mask, xp.bool)


def _only(xp: Any, values: Array, keep: Array) -> Array:
    """values where `keep`, 0 elsewhere; the gradient of what is left out is 0, never NaN."""
    return xp.where(keep, values, xp.zeros_like(values))


def _clip(xp: Any, values: Array, low: Any, high: Any) -> Array:
    """values limited to [low, high] (floats or arrays), with gradient 1 *at* the edges and 0 beyond.

    `torch.clamp` has 1 and `jax.numpy.clip` 0.5 at an edge; a ratio of exactly 1.2 is no rare thing in a test.
    """
    low = xp.full_like(values, low) if isinstance(low, float) else low
    high = xp.full_like(values, high) if isinstance(high, float) else high
    return xp.where(values < low, low, xp.where(values > high, high, values))


def _neg_log_sigmoid(xp: Any, margin: Array) -> Array:
    """-log sigmoid(margin) = log(1 + exp(-margin)) without overflow; gradient -0.5 at margin 0 in every framework."""
    return xp.logaddexp(xp.zeros_like(margin), -margin)


def _pair_scores(xp: Any, scores: Array, end_mask: Array) -> tuple[Array, Array, Array]:
    """(chosen [pairs], rejected [pairs], is_pair [pairs] bool): end scores, and which pairs are no padding."""
    if scores.shape[0] % 2:
        raise ValueError(f"pairs lie in neighbouring rows, so the batch must be even, got {scores.shape[0]} rows")
    ends = _bool(xp, end_mask)
    end_scores = xp.sum(_only(xp, scores, ends), axis=1)
    has_end = xp.any(ends, axis=1)
    return end_scores[0::2], end_scores[1::2], xp.logical_and(has_end[0::2], has_end[1::2])


def _reward_output(
    xp: Any, pair_loss: Array, chosen: Array, rejected: Array, is_pair: Array, *, num_pairs: Scalar, center_coef: float
) -> Output:
    """The loss and metrics that both reward losses share, from per-pair values."""
    pair_loss = pair_loss + center_coef * (chosen + rejected) ** 2

    def mean(values: Array) -> Array:
        return xp.sum(_only(xp, xp.astype(values, chosen.dtype), is_pair)) / num_pairs

    return mean(pair_loss), {
        "reward/accuracy": mean(chosen > rejected),
        "reward/margin": mean(chosen - rejected),
        "reward/chosen": mean(chosen),
        "reward/rejected": mean(rejected),
    }


def router_balance_loss(
    probability_sums: Array, *, fractions: Array, num_routed: Array | float, top_k: int
) -> tuple[Array, dict[str, Array]]:
    """Load balancing of a mixture of experts (Fedus et al. 2022, eq. 4 to 6): experts * sum_e f_e P_e.

    probability_sums: [experts], softmax of the router's logits summed over the layers and real tokens of a micro-batch.
    fractions: [experts], no gradient: how many times each expert was chosen, over num_routed, in the whole optimizer
    step. num_routed: real tokens of the whole step times layers. The sum over micro-batches is the value of the step,
    which is what transformers computes when it sees the whole step at once. `router/load_max`: the busiest expert's
    share of the work, 1 where all are equal.
    """
    xp = array_namespace(probability_sums)
    count = probability_sums.shape[0]
    loss = count * xp.sum(fractions * probability_sums) / num_routed
    return loss, {"router/balance_loss": loss, "router/load_max": count * xp.max(fractions) / top_k}
