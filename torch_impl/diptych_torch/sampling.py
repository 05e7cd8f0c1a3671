"""Drawing tokens by inverse CDF on uniforms that the hinge has drawn (law 5): no generator lives here.

The definition is the hinge's, `diptych.algorithms.sampling`; this is the same in torch. On the CPU rare cases are
looked for before they are dealt with; on an accelerator, where to look is to wait, they are dealt with always, so that
a draw is one fixed program.

Dimensions: B rows, V vocabulary, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.engine import Sampling
from diptych_torch.logprobs import tempered

FEW = 128  # ranks that hold top_p of most distributions: an eighth of the time of a sort


class Draw(NamedTuple):
    """One token of each row; `logprob` and `margin` as in `diptych.engine.Completions`."""

    token: Int[Tensor, " B"]
    logprob: Float[Tensor, " B"]
    margin: Float[Tensor, " B"]


def draw(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], sampling: Sampling) -> Draw:
    """Draw one token of each row; greedy where the temperature is 0 (then `uniforms` is not read)."""
    # tempered() upcasts.
    scaled = tempered(logits, sampling.scoring_temperature)
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(scaled, dim=-1)
        token = scaled.argmax(dim=-1, keepdim=True)
        logprob = logprobs.gather(1, token)[:, 0]
        second = logprobs.scatter(1, token, -torch.inf).amax(dim=-1)
        return Draw(token[:, 0], logprob, (logprob.exp() - second.exp()) / 2)
    probabilities = torch.softmax(scaled, dim=-1)
    # The kernel's own sum is in one precision and in one line: after it a thousand rounding errors stand in all.
    whole = probabilities.sum(dim=-1)
    if sampling.top_k > 0 or sampling.top_p < 1:
        probabilities = probabilities.where(_kept(scaled, sampling), 0.0)
    token, probability, margin = _invert(probabilities, uniforms.to(scaled.dtype))
    return Draw(token, (probability / whole).log(), margin)


def _kept(scaled: Float[Tensor, "B V"], sampling: Sampling) -> Bool[Tensor, "B V"]:
    """The tokens that truncation leaves: the top_k likeliest, and of these, renormalised, each whose likelier ones hold
    less than top_p together. Equals rank by index."""
    ranked, cumulative = _ranked(scaled, sampling)
    num_kept = torch.full((len(scaled), 1), ranked.shape[1], device=scaled.device)
    if sampling.top_p < 1:
        num_kept = 1 + (cumulative[:, :-1] < sampling.top_p).sum(dim=-1, keepdim=True)
    # Ordering by (-logit, index) without sorting indices: all above the last kept logit, and the first of its equals.
    least = ranked.gather(1, num_kept - 1)
    above, equal = scaled > least, scaled == least
    room = num_kept - above.sum(dim=-1, keepdim=True)
    if _has_none(equal.sum(dim=-1, keepdim=True) > room):
        return above | equal
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def _ranked(scaled: Float[Tensor, "B V"], sampling: Sampling) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """The largest logits in order, as many as truncation can keep, and what the likeliest hold together up to each, as
    a share of what the top_k hold."""
    vocabulary = scaled.shape[1]
    num_ranks = min(sampling.top_k, vocabulary) or vocabulary
    if num_ranks < vocabulary:
        ranked = scaled.topk(num_ranks, dim=-1).values
        return ranked, torch.softmax(ranked, dim=-1).cumsum(dim=-1)
    normalizer = scaled.logsumexp(dim=-1, keepdim=True)
    if vocabulary > FEW and scaled.device.type == "cpu":  # elsewhere a sort costs little, and to look costs more
        ranked = scaled.topk(FEW, dim=-1).values
        cumulative = (ranked - normalizer).exp().cumsum(dim=-1)
        if _has_none(cumulative[:, -1] < sampling.top_p):
            return ranked, cumulative
    ranked = scaled.sort(dim=-1, descending=True).values
    return ranked, (ranked - normalizer).exp().cumsum(dim=-1)


def _has_none(cases: Bool[Tensor, "..."]) -> bool:
    """Is there no such case? On an accelerator there may be one: its answer would have to be waited for."""
    return cases.device.type == "cpu" and not bool(cases.any())


def _invert(
    probabilities: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """The token in whose interval of the cumulative distribution (in vocabulary order) the uniform falls, its
    probability, and the uniform's distance from the nearer edge of that interval, as a share of the whole."""
    cdf = probabilities.cumsum(dim=-1)
    total = cdf[:, -1]
    point = (uniforms * total)[:, None]
    last = cdf.shape[1] - 1
    # The number of entries that are <= the point.
    inside = torch.searchsorted(cdf, point, right=True).clamp_(max=last)
    width = probabilities.gather(1, inside)
    lost = width == 0
    if not _has_none(lost):
        # The point was rounded up to the total, or an accelerator's tree of sums rose over an empty interval.
        columns = torch.arange(last + 1, device=cdf.device)
        filled = probabilities > 0
        first = columns.where(filled & (cdf > point), last).amin(dim=-1, keepdim=True)
        found = torch.minimum(first, columns.where(filled, 0).amax(dim=-1, keepdim=True))
        inside = found.where(lost, inside)
        width = probabilities.gather(1, inside)
    above = cdf.gather(1, inside) - point
    margin = torch.minimum(width - above, above)[:, 0] / total
    return inside[:, 0], width[:, 0], margin.clamp_(min=0)
