"""Log-probabilities and entropies of tokens without ever holding [batch, time, vocabulary].

Hidden states are cut into chunks of tokens; each chunk's logits exist only inside one step of a `jax.lax.map` whose
body is rematerialised, so the backward pass makes them again chunk by chunk instead of keeping them. On a mesh every
shard of the rows has its own chunk at the same time, and the vocabulary of a chunk's logits is split over `tensor`.

Dimensions: B batch, T time, E width of the states that a head reads, V vocabulary, S shards of the rows, C tokens of a
chunk of one shard, N = B T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Remat
from diptych_jax.experts import Routing
from diptych_jax.kernels import Kernel
from diptych_jax.mesh import constrain, row_shards
from diptych_jax.model import Unembed
from diptych_jax.taps import tap
from diptych_jax.weights import Model


def tempered(unembed: Unembed, x: Float[Array, "*C E"], temperature: Float[Array, ""]) -> Float[Array, "*C V"]:
    """Logits divided by the temperature. Sampler and trainer both take them from here."""
    return unembed(x) / temperature


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
    kernel: Kernel = "xla",
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None, Routing | None]:
    """log p(tokens[b, t] | those of its example before it) of logits / temperature, nats, for columns t >= first
    (static); 0 before `first`, on padding and on an example's first token.

    The second result is the entropy of the distribution that token t was drawn from, aligned the same way and without
    gradient, or None unless `entropy`; the third the routing of a model with experts. `chunk` is the number of tokens
    of a device whose logits exist at once.
    """
    x_NE, targets_N, routing = _predictions(model, tokens_BT, attention_BT, positions_BT, first, remat, kernel)
    logprobs_N, entropy_N = chunked_logprobs(
        model.unembedding(), x_NE, targets_N, temperature, chunk=chunk, entropy=entropy
    )
    follows_BT = _follows(attention_BT, positions_BT)

    def align(values_N: Array) -> Array:
        return jnp.where(follows_BT, _align(values_N, tokens_BT.shape, first), 0)

    return tap("logprobs", align(logprobs_N)), None if entropy_N is None else align(entropy_N), routing


def greedy_matches(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    first: int,
    chunk: int,
    kernel: Kernel = "xla",
) -> Bool[Array, "B T"]:
    """Is tokens[b, t] the likeliest token given those of its example before it (the first largest logit)? False before
    `first`, on padding and on an example's first token."""
    x_NE, targets_N, _ = _predictions(model, tokens_BT, attention_BT, positions_BT, first, kernel=kernel)

    unembed = model.unembedding()

    def body(x_SCE, targets_SC):
        return jnp.argmax(unembed(x_SCE), axis=-1) == targets_SC

    follows_BT = _follows(attention_BT, positions_BT)
    return _align(_in_chunks(body, x_NE, targets_N, chunk), tokens_BT.shape, first) & follows_BT


def _follows(attention_BT: Bool[Array, "B T"], positions_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Is a token of the same example in the column before this one's?"""
    return attention_BT & (positions_BT != 0) & jnp.pad(attention_BT[:, :-1], ((0, 0), (1, 0)))


def _predictions(
    model: Model, tokens_BT, attention_BT, positions_BT, first: int, remat: Remat = "full", kernel: Kernel = "xla"
):
    """The states that predict the wanted tokens, one row each, the tokens, and the routing."""
    if model.head_kind != "lm":
        raise ValueError("this model has a scalar head: it has no log-probabilities")
    length = tokens_BT.shape[1]
    if not 1 <= first <= length:
        raise ValueError(f"TokenBatch.first is a column from 1 to {length} (columns from there on count), got {first}")
    hidden_BTE, routing = model.read(tokens_BT, attention_BT, positions_BT, remat, kernel)
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

    def body(x_SCE, targets_SC):
        logits_SCV = tempered(unembed, x_SCE, temperature)
        logprobs_SC, normalizer_SC = _log_softmax_at(logits_SCV, targets_SC)
        if not entropy:
            return logprobs_SC, None
        logprobs_SCV = jax.lax.stop_gradient(logits_SCV - normalizer_SC[..., None])
        return logprobs_SC, -jnp.einsum("SCV,SCV->SC", jnp.exp(logprobs_SCV), logprobs_SCV)

    return _in_chunks(body, x_NE, targets_N, chunk)


@jax.custom_vjp
def _log_softmax_at(
    logits_SCV: Float[Array, "S C V"], targets_SC: Int[Array, "S C"]
) -> tuple[Float[Array, "S C"], Float[Array, "S C"]]:
    """The targets' log-probabilities, and the logarithm of the normalizer, which takes no gradient. A derivative of its
    own, since it then is one pass over the logits."""
    normalizer_SC = jax.nn.logsumexp(logits_SCV, axis=-1)
    if _is_whole(logits_SCV):
        chosen_SC = jnp.take_along_axis(logits_SCV, targets_SC[..., None], axis=-1)[..., 0]
    else:  # a sum over the vocabulary: an index into it would bring the devices' parts together
        chosen_SC = jnp.sum(jnp.where(_hits(logits_SCV, targets_SC), logits_SCV, 0), axis=-1)
    return chosen_SC - normalizer_SC, normalizer_SC


def _log_softmax_at_forward(logits_SCV, targets_SC):
    logprobs_SC, normalizer_SC = _log_softmax_at(logits_SCV, targets_SC)
    return (logprobs_SC, normalizer_SC), (logits_SCV, targets_SC, normalizer_SC)


def _log_softmax_at_backward(saved, changes):
    """(target's one - probabilities) x the change of the target's log-probability."""
    logits_SCV, targets_SC, normalizer_SC = saved
    change_SC1 = changes[0][..., None]
    probs_SCV = jnp.exp(logits_SCV - normalizer_SC[..., None])
    return jnp.where(_hits(logits_SCV, targets_SC), change_SC1, 0) - change_SC1 * probs_SCV, None


_log_softmax_at.defvjp(_log_softmax_at_forward, _log_softmax_at_backward)


def _hits(logits_SCV: Array, targets_SC: Array) -> Bool[Array, "S C V"]:
    return jnp.arange(logits_SCV.shape[-1], dtype=targets_SC.dtype) == targets_SC[..., None]


def _is_whole(logits_SCV: Array) -> bool:
    """Whether a device of the mesh of the traced program holds the whole vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.shape["tensor"] == 1


def _in_chunks(body: Callable[[Array, Array], Any], x_NE: Array, targets_N: Array, chunk: int) -> Any:
    """`body` of the rows [S, C, ...] of a chunk: a shard's rows are shared out evenly over ceil(N / S / chunk) chunks;
    so fewer than that many rows of padding."""
    shards = row_shards(len(targets_N))
    rows = len(targets_N) // shards
    x_SNE = constrain(x_NE.reshape(shards, rows, -1), "rows", None, None)
    targets_SN = constrain(targets_N.reshape(shards, rows), "rows", None)
    num_chunks = max(1, -(-rows // chunk))
    if num_chunks == 1:  # no loop to compile and run for a batch that fits, and nothing to make again
        return jax.tree.map(lambda values: values.reshape(-1), body(x_SNE, targets_SN))
    size = -(-rows // num_chunks)
    padding = ((0, 0), (0, num_chunks * size - rows))
    x_SMCE = jnp.pad(x_SNE, (*padding, (0, 0))).reshape(shards, num_chunks, size, -1)
    targets_SMC = jnp.pad(targets_SN, padding).reshape(shards, num_chunks, size)
    chunks = (
        constrain(jnp.swapaxes(x_SMCE, 0, 1), None, "rows", None, None),
        constrain(jnp.swapaxes(targets_SMC, 0, 1), None, "rows", None),
    )
    results_MSC = jax.lax.map(jax.checkpoint(lambda inputs: body(*inputs)), chunks)
    return jax.tree.map(lambda m: jnp.swapaxes(m, 0, 1).reshape(shards, -1)[:, :rows].reshape(-1), results_MSC)
