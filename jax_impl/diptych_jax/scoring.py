"""The compiled forward passes that only score: log-probabilities and scores of one micro-batch.

Dimensions: B rows of a micro-batch, T time.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Int

from diptych_jax import model as modules
from diptych_jax.logprobs import token_logprobs
from diptych_jax.model import Llama


@partial(jax.jit, static_argnames=("first", "chunk"))
def logprobs(
    model: Llama,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    temperature: Float[Array, ""],
    *,
    first: int,
    chunk: int,
) -> Float[Array, "B T"]:
    """See `diptych_jax.logprobs.token_logprobs`. The temperature is traced: another one compiles nothing."""
    return token_logprobs(model, tokens_BT, attention_BT, positions_BT, temperature, first=first, chunk=chunk)[0]


scores = jax.jit(modules.scores)
