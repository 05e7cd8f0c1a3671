"""A mixture of experts: every token through its `top_k` experts, as grouped products over tokens sorted by expert.

No capacity, so no token is ever dropped, and a token's result does not depend on its neighbours.

Dimensions: B batch, T time, D model width, X experts, F inner width of an expert, M = B T top_k routed
copies of tokens, N = B T tokens, C the top_k choices of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diptych.families.decoder import Experts


class Routing(NamedTuple):
    """What the balance loss needs of a layer: the router's probabilities and its choices, summed over real tokens."""

    probability_sums_X: Float[Array, " X"]
    counts_X: Float[Array, " X"]


def mixture(
    x_BTD: Float[Array, "B T D"],
    attention_BT: Bool[Array, "B T"],
    *,
    router_DX: Float[Array, "D X"],
    gate_XDF: Float[Array, "X D F"],
    up_XDF: Float[Array, "X D F"],
    down_XFD: Float[Array, "X F D"],
    activation: Callable[[Array], Array],
    experts: Experts,
) -> tuple[Float[Array, "B T D"], Routing]:
    """sum over chosen experts e of w_e down_e(activation(gate_e x) * up_e x), and the routing of the real tokens."""
    batch, length, width = x_BTD.shape
    x_ND = x_BTD.reshape(-1, width)
    # Upcast: the router's logits and softmax in at least float32.
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    logits_NX = jnp.einsum("ND,DX->NX", x_ND, router_DX, preferred_element_type=wide)
    probs_NX = jax.nn.softmax(logits_NX, axis=-1)
    weights_NC, chosen_NC = jax.lax.top_k(probs_NX, experts.top_k)
    if experts.normalized:
        weights_NC = weights_NC / jnp.sum(weights_NC, axis=-1, keepdims=True)

    chosen_M = chosen_NC.reshape(-1)
    order_M = jnp.argsort(chosen_M, stable=True)
    source_M = order_M // experts.top_k
    sizes_X = jnp.bincount(chosen_M, length=experts.count).astype(jnp.int32)
    x_MD = x_ND[source_M]
    inner_MF = activation(jax.lax.ragged_dot(x_MD, gate_XDF, sizes_X)) * jax.lax.ragged_dot(x_MD, up_XDF, sizes_X)
    out_MD = jax.lax.ragged_dot(inner_MF, down_XFD, sizes_X)
    out_MD = out_MD * weights_NC.reshape(-1)[order_M, None].astype(out_MD.dtype)
    y_ND = jnp.zeros_like(x_ND).at[source_M].add(out_MD)

    real_N = attention_BT.reshape(-1).astype(wide)
    hits_NX = jnp.sum(jax.nn.one_hot(chosen_NC, experts.count, dtype=wide), axis=1)
    routing = Routing(
        probability_sums_X=jnp.einsum("N,NX->X", real_N, probs_NX),
        counts_X=jax.lax.stop_gradient(jnp.einsum("N,NX->X", real_N, hits_NX)),
    )
    return y_ND.reshape(batch, length, width), routing
