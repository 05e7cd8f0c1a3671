"""The compiled forward passes that only score: log-probabilities and scores of one micro-batch.

compute: dtype of activations and matrix products (static). kernel: `kernels.choose`'s (static).

Dimensions: B rows of a micro-batch, T time.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Int

from diptych_jax import logprobs as heads
from diptych_jax import model as modules
from diptych_jax.kernels import Kernel
from diptych_jax.weights import Model, cast


@partial(jax.jit, static_argnames=("first", "chunk", "compute", "kernel"))
def logprobs(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    temperature: Float[Array, ""],
    *,
    first: int,
    chunk: int,
    compute: str,
    kernel: Kernel = "xla",
) -> Float[Array, "B T"]:
    """See `diptych_jax.logprobs.token_logprobs`. The temperature is traced: another one compiles nothing."""
    model = cast(model, compute)
    return heads.token_logprobs(
        model, tokens_BT, attention_BT, positions_BT, temperature, first=first, chunk=chunk, kernel=kernel
    )[0]


@partial(jax.jit, static_argnames=("first", "chunk", "compute", "kernel"))
def greedy_matches(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    first: int,
    chunk: int,
    compute: str,
    kernel: Kernel = "xla",
) -> Bool[Array, "B T"]:
    """See `diptych_jax.logprobs.greedy_matches`."""
    return heads.greedy_matches(
        cast(model, compute), tokens_BT, attention_BT, positions_BT, first=first, chunk=chunk, kernel=kernel
    )


@partial(jax.jit, static_argnames=("compute", "kernel"))
def scores(
    model: Model,
    tokens_BT: Int[Array, "B T"],
    attention_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    *,
    compute: str,
    kernel: Kernel = "xla",
) -> Float[Array, "B T"]:
    """See `diptych_jax.model.scores`."""
    return modules.scores(cast(model, compute), tokens_BT, attention_BT, positions_BT, kernel=kernel)[0]
