"""The sampler's definition, as a NumPy oracle: one uniform in, one token out, by inverse CDF.

Both engines implement these lines natively; tests hold them to this file. The same uniform draws the same token in
either framework unless it falls within rounding of a boundary of the cumulative distribution, and `margins` says how
far away the nearest boundary was.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from diptych.errors import UserError


def sample(
    logits: Float[np.ndarray, "batch vocab"],
    uniforms: Float[np.ndarray, " batch"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[np.ndarray, " batch"], Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """Draw one token per row. Returns (tokens int32, logprobs, margins), each [batch]; arithmetic in float64.

    temperature 0: the largest logit, the first of equals; its log-probability at temperature 1; margin: half the gap
    of the two largest probabilities. uniforms are not read.

    temperature > 0, with z = logits / temperature and p = softmax(z):
      1. Order the vocabulary by (-z, index). top_k > 0 keeps the first top_k. top_p < 1 then keeps, of p renormalised
         over what is left, each token whose predecessors in that order hold less than top_p together: at least one.
      2. cdf = cumulative sum of the kept p in *vocabulary* order; x = u * cdf[-1].
      3. The token is the number of entries of cdf that are <= x, at most the last index with a kept p above 0.
    logprob: log softmax(z)[token], of the tempered, *untruncated* distribution, as training computes it. margin:
    min(x - cdf[token - 1], cdf[token] - x) / cdf[-1], in units of u.

    Raises UserError for settings outside temperature >= 0, top_k >= 0 and 0 < top_p <= 1.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = logits.astype(np.float64)  # upcast before softmax and the cumulative sum
    if temperature == 0:
        return _greedy(logits)
    logprobs = _log_softmax(logits / temperature)
    kept = np.exp(logprobs)
    if top_k > 0 or top_p < 1:
        kept = np.where(_kept(logprobs, kept, top_k=top_k, top_p=top_p), kept, 0.0)
    cdf = np.cumsum(kept, axis=-1)
    total = cdf[:, -1]
    x = uniforms.astype(np.float64) * total
    last = logits.shape[1] - 1 - np.argmax(kept[:, ::-1] > 0, axis=-1)
    tokens = np.minimum((cdf <= x[:, None]).sum(axis=-1), last)
    rows = np.arange(len(tokens))
    below = np.where(tokens > 0, cdf[rows, tokens - 1], 0.0)
    margins = np.minimum(x - below, cdf[rows, tokens] - x) / total
    return tokens.astype(np.int32), logprobs[rows, tokens], margins


def check_sampling(*, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for settings that define no distribution."""
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise UserError(f"rollout.temperature: must be 0 (greedy) or a positive number, got {temperature}")
    if top_k < 0:
        raise UserError(f"rollout.top_k: must be 0 (off) or a positive count, got {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"rollout.top_p: must be above 0 and at most 1 (off), got {top_p}")


def _greedy(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logprobs = _log_softmax(logits)
    tokens = np.argmax(logits, axis=-1)
    # A vocabulary of one has no second token: its probability is 0.
    second = np.sort(np.exp(logprobs), axis=-1)[:, -2] if logits.shape[1] > 1 else np.zeros(len(tokens))
    best = np.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(np.int32), best, 0.5 * (np.exp(best) - second)


def _kept(logprobs: np.ndarray, p: np.ndarray, *, top_k: int, top_p: float) -> np.ndarray:
    """Mask [batch, vocab] of the tokens that truncation keeps."""
    order = np.argsort(-logprobs, axis=-1, kind="stable")  # by (-z, index)
    ranked = np.take_along_axis(p, order, axis=-1)
    keep = np.ones_like(ranked, dtype=bool)
    if top_k > 0:
        keep = np.broadcast_to(np.arange(ranked.shape[1]) < top_k, ranked.shape)
    if top_p < 1:
        ranked = np.where(keep, ranked, 0.0)
        ranked = ranked / ranked.sum(axis=-1, keepdims=True)
        before = np.cumsum(ranked, axis=-1) - ranked
        keep = keep & (before < top_p)
    mask = np.empty_like(keep)
    np.put_along_axis(mask, order, keep, axis=-1)
    return mask


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
