"""Log-probabilities and entropies of tokens without ever holding [batch, time, vocabulary].

Hidden states are cut into chunks of tokens; each chunk's logits exist only inside one step of a `jax.lax.map` whose
body is rematerialised, so the backward pass makes them again chunk by chunk instead of keeping them.

Dimensions: B batch, T time, E width of the states that a head reads, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Remat
from diptych_jax.experts import Routing
from diptych_jax.weights import Model

Unembed = Callable[[Array], Array]  # states [C, E] -> logits [C, V], in at least float32


def tempered(unembed: Unembed, x_CE: Float[Array, "C E"], temperature: Float[Array, ""]) -> Float[Array, "C V"]:
    """Logits divided by the temperature. Sampler and trainer both take them from here."""
    return unembed(x_CE) / temperature


def token_logprobs(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    temperature: Float[Array, ""],
    *,
    first: int,
    chunk: int,
    entropy: bool = False,
    remat: Remat = "full",
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None, Routing | None]:
    """log p(tokens[b, t] | tokens[b, :t]) of logits / temperature, nats, for columns t >= first (static), else 0.

    The second result is the entropy of the distribution that token t was drawn from, aligned the same way and without
    gradient, or None unless `entropy`; the third the routing of a model with experts. `chunk` is the number of tokens
    whose logits exist at once.
    """
    x_NE, targets_N, routing = _predictions(model, tokens_BT, attention_BT, positions_BT, first, remat)
    logprobs_N, entropy_N = chunked_logprobs(model.unembed, x_NE, targets_N, temperature, chunk=chunk, entropy=entropy)
    shape = tokens_BT.shape
    return _align(logprobs_N, shape, first), None if entropy_N is None else _align(entropy_N, shape, first), routing


def greedy_matches(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    first: int,
    chunk: int,
) -> Bool[Array, "B T"]:
    """Is tokens[b, t] the likeliest token given those before it (the first largest logit)? False before `first`, on
    padding and on a row's first token."""
    x_NE, targets_N, _ = _predictions(model, tokens_BT, attention_BT, positions_BT, first)

    def body(x_CE, targets_C):
        return jnp.argmax(model.unembed(x_CE), axis=-1) == targets_C

    counted_BT = attention_BT & jnp.pad(attention_BT[:, :-1], ((0, 0), (1, 0)))
    return _align(_in_chunks(body, x_NE, targets_N, chunk), tokens_BT.shape, first) & counted_BT


def _predictions(model: Model, tokens_BT, attention_BT, positions_BT, first: int, remat: Remat = "full"):
    """The states that predict the wanted tokens, one row each, the tokens, and the routing."""
    if model.head_kind != "lm":
        raise ValueError("this model has a scalar head: it has no log-probabilities")
    length = tokens_BT.shape[1]
    if not 1 <= first <= length:
        raise ValueError(f"TokenBatch.first is a column from 1 to {length} (columns from there on count), got {first}")
    hidden_BTE, routing = model.read(tokens_BT, attention_BT, positions_BT, remat)
    # Column t - 1 predicts token t.
    x_NE = hidden_BTE[:, first - 1 : length - 1].reshape(-1, hidden_BTE.shape[-1])
    return x_NE, tokens_BT[:, first:].reshape(-1), routing


def _align(values_N: Array, shape: tuple[int, ...], first: int) -> Array:
    return jnp.pad(values_N.reshape(shape[0], shape[1] - first), ((0, 0), (first, 0)))


def chunked_logprobs(
    unembed: Unembed,
    x_NE: Float[Array, "N E"],
    targets_N: Int[Array, " N"],
    temperature: Float[Array, ""],
    *,
    chunk: int,
    entropy: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"] | None]:
    """`token_logprobs` of N rows of hidden states: the log-probability of each row's target, and its entropy."""

    @jax.checkpoint
    def body(x_CE, targets_C):
        logits_CV = tempered(unembed, x_CE, temperature)
        normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
        logprobs_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0] - normalizer_C
        if not entropy:
            return logprobs_C, None
        logprobs_CV = jax.lax.stop_gradient(logits_CV - normalizer_C[:, None])
        return logprobs_C, -jnp.sum(jnp.exp(logprobs_CV) * logprobs_CV, axis=-1)

    return _in_chunks(body, x_NE, targets_N, chunk)


def _in_chunks(body: Callable[[Array, Array], Any], x_NE: Array, targets_N: Array, chunk: int) -> Any:
    """`body` of the rows, shared out evenly over ceil(N / chunk) chunks; so fewer than that many rows of padding."""
    num_rows = len(targets_N)
    num_chunks = max(1, -(-num_rows // chunk))
    if num_chunks == 1:  # no loop to compile and run for a batch that fits
        return body(x_NE, targets_N)
    size = -(-num_rows // num_chunks)
    padding = num_chunks * size - num_rows
    x_MCE = jnp.pad(x_NE, ((0, padding), (0, 0))).reshape(num_chunks, size, x_NE.shape[-1])
    targets_MC = jnp.pad(targets_N, (0, padding)).reshape(num_chunks, size)
    results = jax.lax.map(lambda inputs: body(*inputs), (x_MCE, targets_MC))
    return jax.tree.map(lambda values: values.reshape(-1)[:num_rows], results)
