"""Drawing tokens by inverse CDF on uniforms that the hinge has drawn (law 5): no generator lives here.

The definition is the hinge's, `diptych.algorithms.sampling`; this is the same in torch.

Dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.engine import Sampling
from diptych_torch.logprobs import tempered


class Draw(NamedTuple):
    """One token of each row; `logprob` and `margin` as in `diptych.engine.Completions`."""

    token: Int[Tensor, " B"]
    logprob: Float[Tensor, " B"]
    margin: Float[Tensor, " B"]


def draw(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], sampling: Sampling) -> Draw:
    """Draw one token of each row; greedy where the temperature is 0 (then `uniforms` is not read)."""
    # tempered() upcasts.
    scaled = tempered(logits, sampling.scoring_temperature)
    normalizer = scaled.logsumexp(dim=-1)
    if sampling.temperature == 0:
        token = scaled.argmax(dim=-1)
        largest = (scaled.topk(2, dim=-1).values - normalizer[:, None]).exp()
        margin = (largest[:, 0] - largest[:, 1]) / 2
    else:
        probabilities = torch.softmax(scaled, dim=-1)
        if sampling.top_k > 0 or sampling.top_p < 1:
            probabilities = probabilities.where(_kept(scaled, sampling), 0.0)
        token, margin = _invert(probabilities, uniforms.to(scaled.dtype))
    return Draw(token, scaled.gather(1, token[:, None])[:, 0] - normalizer, margin)


def _kept(scaled: Float[Tensor, "B V"], sampling: Sampling) -> Bool[Tensor, "B V"]:
    """The tokens that truncation leaves: the top_k likeliest, and of these, renormalised, each whose likelier ones hold
    less than top_p together. Equals rank by index."""
    vocabulary = scaled.shape[1]
    num_ranks = min(sampling.top_k, vocabulary) or vocabulary
    ranked = scaled.topk(num_ranks, dim=-1).values if num_ranks < vocabulary else scaled.sort(dim=-1).values.flip(-1)
    num_kept = torch.full((len(scaled), 1), num_ranks, device=scaled.device)
    if sampling.top_p < 1:
        cumulative = torch.softmax(ranked, dim=-1).cumsum(dim=-1)
        num_kept = 1 + (cumulative[:, :-1] < sampling.top_p).sum(dim=-1, keepdim=True)
    # Ordering by (-logit, index) without sorting indices: all above the last kept logit, and the first of its equals.
    least = ranked.gather(1, num_kept - 1)
    above, equal = scaled > least, scaled == least
    room = num_kept - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def _invert(
    probabilities: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The token in whose interval of the cumulative distribution (in vocabulary order) the uniform falls, and the
    uniform's distance from the nearer edge of that interval, as a share of the whole."""
    cdf = probabilities.cumsum(dim=-1)
    total = cdf[:, -1]
    point = uniforms * total
    last = cdf.shape[1] - 1
    # The number of entries that are <= the point.
    token = torch.searchsorted(cdf, point[:, None], right=True)
    inside = token.clamp(max=last)
    if bool(((token > last) | (probabilities.gather(1, inside) == 0)).any()):
        # The point was rounded up to the total, or an accelerator's tree of sums rose over an empty interval.
        columns = torch.arange(last + 1, device=cdf.device)
        filled = probabilities > 0
        first = columns.where(filled & (cdf > point[:, None]), last).amin(dim=-1, keepdim=True)
        inside = torch.minimum(first, columns.where(filled, 0).amax(dim=-1, keepdim=True))
    above = cdf.gather(1, inside)[:, 0]
    below = cdf.gather(1, (inside - 1).clamp(min=0))[:, 0].where(inside[:, 0] > 0, 0.0)
    return inside[:, 0], (torch.minimum(point - below, above - point) / total).clamp(min=0)
