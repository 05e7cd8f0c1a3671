"""Drawing a token by inverse CDF from one uniform, as `diptych.algorithms.sampling` defines it in NumPy.

The definition takes a cumulative sum over the vocabulary, which is the slow part on a CPU and needless: the token is
found in two levels, first the block of the vocabulary (cumulative sum of block sums), then the token within it. The
numbers are those of the definition up to rounding.

Dimensions: B batch, V vocabulary, J blocks, I tokens of a block, R ranks (tokens that truncation may keep, in order).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Draw = tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]  # tokens, logprobs, margins


def draw_greedy(logits_BV: Float[Array, "B V"]) -> Draw:
    """The likeliest token (the first of equals), its log-probability, half the gap of the two largest probabilities.

    `logits_BV` are at temperature 1 and in at least float32.
    """
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    best_B = jnp.max(logits_BV, axis=-1)
    # The first index of the maximum; jnp.argmax takes five times as long on a CPU.
    tokens_B = jnp.min(jnp.where(logits_BV == best_B[:, None], ids_V, len(ids_V) - 1), axis=-1)
    others_BV = jnp.where(ids_V == tokens_B[:, None], -jnp.inf, logits_BV)
    normalizer_B = jax.nn.logsumexp(logits_BV, axis=-1)
    margins_B = (jnp.exp(best_B - normalizer_B) - jnp.exp(jnp.max(others_BV, axis=-1) - normalizer_B)) / 2
    return tokens_B, best_B - normalizer_B, margins_B


def draw(
    logits_BV: Float[Array, "B V"],
    uniforms_B: Float[Array, " B"],
    top_p: Float[Array, ""],
    *,
    top_k: int,
    nucleus: bool,
) -> Draw:
    """Draw from softmax(logits), truncated, at the uniforms in [0, 1).

    `logits_BV` are divided by the temperature and in at least float32. top_k: keep the k likeliest tokens, 0 for all.
    nucleus: then keep those before which less than `top_p` of their probability lies (static, since it costs a sort).
    The log-probability is of the untruncated distribution. The margin is the distance from the uniform to the nearer
    edge of the token's interval, as a share of the kept probability; a tiny margin marks a near-tie.
    """
    normalizer_B = jax.nn.logsumexp(logits_BV, axis=-1)
    probs_BV = jnp.exp(logits_BV - normalizer_B[:, None])
    if top_k or nucleus:
        probs_BV = _truncate(logits_BV, probs_BV, top_p, top_k=top_k, nucleus=nucleus)
    tokens_B, margins_B = _inverse_cdf(probs_BV, uniforms_B)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - normalizer_B, margins_B


def _truncate(
    logits_BV: Float[Array, "B V"], probs_BV: Float[Array, "B V"], top_p: Float[Array, ""], *, top_k: int, nucleus: bool
) -> Float[Array, "B V"]:
    """The probabilities with 0 for every token that top-k, then top-p, drops. Equal logits rank by token id."""
    num_ranks = min(top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    if num_ranks < logits_BV.shape[-1]:
        ranked_BR, _ = jax.lax.top_k(logits_BV, num_ranks)
    else:
        ranked_BR = _sort_descending(logits_BV)
    num_kept_B = jnp.full(len(logits_BV), num_ranks)
    if nucleus:
        probs_BR = jax.nn.softmax(ranked_BR, axis=-1)
        before_BR = jnp.pad(jnp.cumsum(probs_BR, axis=-1)[:, :-1], ((0, 0), (1, 0)))
        num_kept_B = jnp.sum(before_BR < top_p, axis=-1)
    # The order by (-logit, token id) without an index sort: all above the last kept logit, and the first of its equals.
    last_B1 = jnp.take_along_axis(ranked_BR, num_kept_B[:, None] - 1, axis=-1)
    above_BV, equal_BV = logits_BV > last_B1, logits_BV == last_B1
    num_equal_kept_B1 = num_kept_B[:, None] - jnp.sum(above_BV, axis=-1, keepdims=True)
    kept_BV = jax.lax.cond(
        jnp.all(jnp.sum(equal_BV, axis=-1, keepdims=True) == num_equal_kept_B1),
        lambda: above_BV | equal_BV,  # all equals are kept (there is one, as a rule): no cumulative sum needed
        lambda: above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= num_equal_kept_B1)),
    )
    return jnp.where(kept_BV, probs_BV, 0)


def _sort_descending(values_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Sorted from large to small, as integers of the same order: on a CPU five times as fast as a sort of floats."""
    word = jnp.int64 if values_BV.dtype == jnp.float64 else jnp.int32
    # A negative float's bits fall as it rises: flip all but the sign. (-0 then sorts below +0, which it equals.)
    bits_BV = jax.lax.bitcast_convert_type(values_BV, word)
    keys_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.iinfo(word).max, bits_BV)
    keys_BV = ~jnp.sort(~keys_BV, axis=-1)
    bits_BV = jnp.where(keys_BV < 0, keys_BV ^ jnp.iinfo(word).max, keys_BV)
    return jax.lax.bitcast_convert_type(bits_BV, values_BV.dtype)


def _inverse_cdf(
    probs_BV: Float[Array, "B V"], uniforms_B: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first token whose cumulative probability exceeds uniform x total, never one of probability 0; its margin."""
    num_tokens = probs_BV.shape[-1]
    size = max(1, math.isqrt(num_tokens))
    num_blocks = -(-num_tokens // size)
    probs_BJI = jnp.pad(probs_BV, ((0, 0), (0, num_blocks * size - num_tokens))).reshape(-1, num_blocks, size)
    sums_BJ = jnp.sum(probs_BJI, axis=-1)
    block_ends_BJ = jnp.cumsum(sums_BJ, axis=-1)
    total_B = block_ends_BJ[:, -1]
    target_B = uniforms_B.astype(probs_BV.dtype) * total_B
    block_B, block_start_B, _ = _first_above(sums_BJ, block_ends_BJ, target_B, jnp.zeros_like(total_B))

    probs_BI = jnp.take_along_axis(probs_BJI, block_B[:, None, None], axis=1)[:, 0]
    ends_BI = block_start_B[:, None] + jnp.cumsum(probs_BI, axis=-1)
    token_B, start_B, end_B = _first_above(probs_BI, ends_BI, target_B, block_start_B)
    margins_B = jnp.minimum(target_B - start_B, end_B - target_B) / total_B
    # A target in the gap of rounding between a block's sum and its last cumulative sum is as near a tie as can be.
    return (block_B * size + token_B).astype(jnp.int32), jnp.maximum(margins_B, 0)


def _first_above(
    widths_BX: Float[Array, "B X"],
    ends_BX: Float[Array, "B X"],
    target_B: Float[Array, " B"],
    origin_B: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Index, start and end of the first interval of nonzero width that ends above the target.

    The widths are looked at because JAX's cumulative sum adds in a tree: an end may rise by an ulp over an interval of
    width 0, and a token that truncation dropped must not be drawn for that. Where rounding put the target at the very
    end, it is the last interval of nonzero width.
    """
    filled_BX = widths_BX > 0
    above_BX = filled_BX & (ends_BX > target_B[:, None])
    last_filled_B = widths_BX.shape[-1] - 1 - jnp.argmax(filled_BX[:, ::-1], axis=-1)
    index_B = jnp.where(jnp.any(above_BX, axis=-1), jnp.argmax(above_BX, axis=-1), last_filled_B)
    starts_BX = jnp.concatenate([origin_B[:, None], ends_BX[:, :-1]], axis=-1)
    start_B, end_B = (jnp.take_along_axis(edges, index_B[:, None], axis=-1)[:, 0] for edges in (starts_BX, ends_BX))
    return index_B, start_B, end_B
