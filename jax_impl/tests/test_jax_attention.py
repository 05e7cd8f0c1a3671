"""Attention in float32 with a derivative of its own, against JAX's derivative of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych_jax.attention import attention, softmax_attention


def _inputs(heads, kv_heads):
    draws = np.random.default_rng(0)
    shapes = ((2, 9, heads, 4), (2, 9, kv_heads, 4), (2, 9, kv_heads, 4), (2, 9, heads, 4))
    columns = np.arange(9)
    mask = np.tile((columns[:, None] >= columns) & (columns[:, None] - columns < 5), (2, 1, 1))
    return [jnp.asarray(draws.normal(0, 2, shape).astype(np.float32)) for shape in shapes], jnp.asarray(mask)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_value_and_gradients_are_those_of_the_plain_formula(heads, kv_heads):
    (q, k, v, weights), mask = _inputs(heads, kv_heads)

    def both(function):
        return jax.value_and_grad(lambda q, k, v: jnp.sum(weights * function(q, k, v)), argnums=(0, 1, 2))(q, k, v)

    mine = both(lambda q, k, v: softmax_attention(q, k, v, mask, 0.5))
    theirs = both(lambda q, k, v: attention(q, k, v, mask, scale=0.5))
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
    # Canaries: a key that is not seen, and another scale.
    for wrong in (
        both(lambda q, k, v: softmax_attention(q, k, v, mask.at[:, 5, 3].set(False), 0.5)),
        both(lambda q, k, v: softmax_attention(q, k, v, mask, 0.51)),
    ):
        assert max(np.abs(a - b).max() for a, b in zip(mine[1], wrong[1], strict=True)) > 1e-2


def test_large_scores_stay_finite():
    (q, k, v, weights), mask = _inputs(4, 2)

    def total(q):
        return jnp.vdot(weights, softmax_attention(q, k, v, mask, 1e4))  # pyright: ignore[reportArgumentType]

    gradient = jax.grad(total)(q)
    assert np.isfinite(gradient).all()
