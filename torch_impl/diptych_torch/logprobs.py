"""Log-probabilities and entropies of tokens without ever holding [batch, time, vocabulary].

Hidden states are cut into chunks of tokens. Where there is more than one chunk, each is a `torch.utils.checkpoint`: the
backward pass makes a chunk's logits again instead of keeping them.

Dimensions: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
        normalizer = logits.logsumexp(dim=-1)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - normalizer
        if not entropy:
            return logprobs, None
        with torch.no_grad():  # last, so that the recomputation of a checkpoint stops before it
            every = logits - normalizer[:, None]
            return logprobs, -(every.exp() * every).sum(dim=-1)

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
