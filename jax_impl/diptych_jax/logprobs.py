"""Log-probabilities and entropies of tokens without ever holding [batch, time, vocabulary].

Hidden states are cut into chunks of tokens; each chunk's logits exist only inside one step of a `jax.lax.map` whose
body is rematerialised, so the backward pass makes them again chunk by chunk instead of keeping them.

Dimensions: B batch, T time, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych_jax.model import Llama, hidden_states


def logits(
    x_CD: Float[Array, "C D"], unembedding_VD: Float[Array, "V D"], temperature: Float[Array, ""]
) -> Float[Array, "C V"]:
    """Logits divided by the temperature, in at least float32. Sampler and trainer both take them from here."""
    # Upcast: logits leave the matrix product in at least float32, before temperature and log-softmax.
    wide = jnp.promote_types(x_CD.dtype, jnp.float32)
    return jnp.einsum("CD,VD->CV", x_CD, unembedding_VD, preferred_element_type=wide) / temperature


def token_logprobs(
    model: Llama,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    temperature: Float[Array, ""],
    *,
    first: int,
    chunk: int,
    entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """log p(tokens[b, t] | tokens[b, :t]) of logits / temperature, nats, for columns t >= first (static), else 0.

    The second result is the entropy of the distribution that token t was drawn from, aligned the same way and without
    gradient, or None unless `entropy`. `chunk` is the number of tokens whose logits exist at once.
    """
    if model.head != "lm":
        raise ValueError("this model has a scalar head: it has no log-probabilities")
    batch, length = tokens_BT.shape
    if not 1 <= first <= length:
        raise ValueError(f"TokenBatch.first is a column from 1 to {length} (columns from there on count), got {first}")
    hidden_BTD, _ = hidden_states(model, tokens_BT, attention_BT, positions_BT)
    # Column t - 1 predicts token t.
    x_ND = hidden_BTD[:, first - 1 : length - 1].reshape(-1, hidden_BTD.shape[-1])
    targets_N = tokens_BT[:, first:].reshape(-1)
    results = chunked_logprobs(x_ND, targets_N, model.unembedding_VD, temperature, chunk=chunk, entropy=entropy)

    def align(values_N):
        return jnp.pad(values_N.reshape(batch, length - first), ((0, 0), (first, 0)))

    logprobs_N, entropy_N = results
    return align(logprobs_N), None if entropy_N is None else align(entropy_N)


def chunked_logprobs(
    x_ND: Float[Array, "N D"],
    targets_N: Int[Array, " N"],
    unembedding_VD: Float[Array, "V D"],
    temperature: Float[Array, ""],
    *,
    chunk: int,
    entropy: bool,
) -> tuple[Float[Array, " N"], Float[Array, " N"] | None]:
    """`token_logprobs` of N rows of hidden states: the log-probability of each row's target, and its entropy.

    The rows are shared out evenly over ceil(N / chunk) chunks; fewer than that many rows of padding are added.
    """
    num_rows = len(targets_N)
    num_chunks = max(1, -(-num_rows // chunk))
    size = -(-num_rows // num_chunks)
    padding = num_chunks * size - num_rows
    x_MCD = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(num_chunks, size, x_ND.shape[-1])
    targets_MC = jnp.pad(targets_N, (0, padding)).reshape(num_chunks, size)

    @jax.checkpoint
    def body(inputs):
        x_CD, targets_C = inputs
        logits_CV = logits(x_CD, unembedding_VD, temperature)
        normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
        logprobs_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0] - normalizer_C
        if not entropy:
            return logprobs_C, None
        logprobs_CV = jax.lax.stop_gradient(logits_CV - normalizer_C[:, None])
        return logprobs_C, -jnp.sum(jnp.exp(logprobs_CV) * logprobs_CV, axis=-1)

    if num_chunks == 1:  # no loop to compile and run for a batch that fits
        logprobs_C, entropy_C = body((x_MCD[0], targets_MC[0]))
        return logprobs_C, entropy_C
    logprobs_MC, entropy_MC = jax.lax.map(body, (x_MCD, targets_MC))
    return logprobs_MC.reshape(-1)[:num_rows], None if entropy_MC is None else entropy_MC.reshape(-1)[:num_rows]
