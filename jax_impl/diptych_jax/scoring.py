"""The compiled forward passes that only score: log-probabilities and scores of one micro-batch.

Dimensions: B rows of a micro-batch, T time.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Int

from diptych_jax import logprobs as heads
from diptych_jax import model as modules
from diptych_jax.weights import Model


@partial(jax.jit, static_argnames=("first", "chunk"))
def logprobs(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    temperature: Float[Array, ""],
    *,
    first: int,
    chunk: int,
) -> Float[Array, "B T"]:
    """See `diptych_jax.logprobs.token_logprobs`. The temperature is traced: another one compiles nothing."""
    return heads.token_logprobs(model, tokens_BT, attention_BT, positions_BT, temperature, first=first, chunk=chunk)[0]


@partial(jax.jit, static_argnames=("first", "chunk"))
def greedy_matches(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    first: int,
    chunk: int,
) -> Bool[Array, "B T"]:
    """See `diptych_jax.logprobs.greedy_matches`."""
    return heads.greedy_matches(model, tokens_BT, attention_BT, positions_BT, first=first, chunk=chunk)


@jax.jit
def scores(
    model: Model, tokens_BT: Int[Array, "B T"], attention_BT: Bool[Array, "B T"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """See `diptych_jax.model.scores`."""
    return modules.scores(model, tokens_BT, attention_BT, positions_BT)[0]
