"""Log-probabilities and entropies of tokens without ever holding [batch, time, vocabulary].

Hidden states are cut into chunks of tokens. Where there is more than one chunk, each is a `torch.utils.checkpoint`: the
backward pass makes a chunk's logits again instead of keeping them.

Dimensions: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IN_CACHE = 2**18  # logits that stay in a core's cache

Unembedding = Callable[[Tensor], Tensor]  # hidden states [N, D] -> logits [N, V]


def tempered(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Logits divided by the temperature, in at least float32. Sampler and trainer both take them from here."""
    # Upcast: before temperature and log-softmax.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def chunked_logprobs(
    hidden: Float[Tensor, "N D"],
    targets: Int[Tensor, " N"],
    unembedding: Unembedding,
    *,
    temperature: float,
    chunk: int,
    entropy: bool,
    least: int = 1,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Log-probability (nats) of each row's target under softmax(logits / temperature), and the entropy of that softmax.

    The entropy carries no gradient; it is None unless asked for. Rows are shared out evenly over ceil(N / chunk)
    chunks, or over `least` where those are more: some are empty then.
    """

    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = tempered(unembedding(hidden), temperature)
        return _OfTokens.apply(logits, targets, entropy)  # pyright: ignore[reportReturnType]

    count = _count(len(targets), chunk, least)
    if count == 1:  # nothing to gain: the logits of the one chunk may stay until its backward pass
        return one_chunk(hidden, targets)
    pieces = []
    for rows, wanted in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(one_chunk, rows, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(one_chunk(rows, wanted))
    logprobs = torch.cat([piece[0] for piece in pieces])
    return logprobs, torch.cat([piece[1] for piece in pieces]) if entropy else None


class _OfTokens(torch.autograd.Function):
    """Log-probabilities of tokens and entropies, in as few passes over the logits as there can be: one exponential of
    each logit, forward and backward together."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], entropy: bool
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
        is_kept = ctx.needs_input_grad[0]
        blocks = logits.split(_rows_at_once(logits))
        weights = torch.empty_like(logits if is_kept else blocks[0])
        shifted = torch.empty_like(blocks[0])
        largest, totals, means = [], [], []
        for number, block in enumerate(blocks):
            start = number * len(blocks[0]) if is_kept else 0
            largest.append(block.amax(dim=-1))
            below = torch.sub(block, largest[-1][:, None], out=shifted[: len(block)])
            weight = torch.exp(below, out=weights[start : start + len(block)])
            totals.append(weight.sum(dim=-1))
            if entropy:
                means.append(torch.linalg.vecdot(weight, below))
        total = torch.cat(totals)
        normalizer = total.log()
        logprobs = logits.gather(1, targets[:, None])[:, 0] - (torch.cat(largest) + normalizer)
        if is_kept:
            ctx.save_for_backward(weights, total, targets)
        ctx.set_materialize_grads(False)
        if not entropy:
            return logprobs, None
        entropies = normalizer - torch.cat(means) / total
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """g (1 at the target - probability), written over what was kept: it is not read again."""
        gradient = gradients[0]
        if gradient is None:
            return None, None, None
        of_logits, total, targets = ctx.saved_tensors
        rows = torch.arange(len(targets), device=targets.device)
        of_logits.mul_((-gradient / total)[:, None])
        of_logits[rows, targets] += gradient
        return of_logits, None, None


def _rows_at_once(logits: Float[Tensor, "N V"]) -> int:
    """Rows that several passes read while they are in a CPU's cache; elsewhere all."""
    return max(1, IN_CACHE // logits.shape[1] if logits.device.type == "cpu" else len(logits))


def chunked_matches(
    hidden: Float[Tensor, "N D"], targets: Int[Tensor, " N"], unembedding: Unembedding, *, chunk: int, least: int = 1
) -> Bool[Tensor, " N"]:
    """Is each row's target the likeliest token, the first of several with the largest logit? Not differentiated."""
    count = _count(len(targets), chunk, least)
    pieces = zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True)
    return torch.cat([unembedding(rows).argmax(dim=-1) == wanted for rows, wanted in pieces])


def _count(rows: int, chunk: int, least: int) -> int:
    """Chunks of `chunk` rows or fewer; at least one, so that the head sees every batch, if only nothing of it."""
    return max(-(-rows // chunk), least, 1)
