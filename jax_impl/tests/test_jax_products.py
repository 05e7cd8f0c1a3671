"""Products with a derivative of their own: JAX's values and gradients, in an order that transposes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych_jax.products import project

CASES = [
    ((2, 3, 8), (8, 5), 1, "btd,df->btf"),
    ((2, 3, 8), (8, 4, 5), 1, "btd,dnh->btnh"),
    ((2, 3, 4, 5), (4, 5, 8), 2, "btnh,nhd->btd"),
    ((6, 8), (8, 8), 1, "bi,id->bd"),
]


@pytest.mark.parametrize(("shape", "weights", "axes", "names"), CASES)
def test_value_and_gradients_are_those_of_einsum(shape, weights, axes, names):
    draws = np.random.default_rng(0)
    x, w = (jnp.asarray(draws.normal(size=size).astype(np.float32)) for size in (shape, weights))

    def both(function):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), argnums=(0, 1))(x, w)

    mine = both(lambda x, w: project(x, w, axes))
    theirs = both(lambda x, w: jnp.einsum(names, x, w))
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    # Canary: another product has other gradients.
    wrong = both(lambda x, w: jnp.einsum(names, x, 1.01 * w))
    assert np.abs(np.asarray(mine[1][1]) - np.asarray(wrong[1][1])).max() > 1e-3


def _primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def test_no_gradient_is_transposed():
    x, w = jnp.ones((2, 3, 8)), jnp.ones((8, 4, 5))

    def found(function):
        gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), argnums=(0, 1))
        return list(_primitives(jax.make_jaxpr(gradient)(x, w).jaxpr))

    assert "transpose" not in found(project)
    assert "transpose" in found(lambda x, w: jnp.einsum("btd,dnh->btnh", x, w))  # canary: JAX's own rule


def test_a_frozen_weight_has_no_gradient_product():
    x, w = jnp.ones((2, 3, 8)), jnp.ones((8, 5))

    def products(argnums):
        gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(project(x, w))), argnums=argnums)
        return list(_primitives(jax.make_jaxpr(gradient)(x, w).jaxpr)).count("dot_general")

    assert products((0,)) == 2
    assert products((0, 1)) == 3  # canary


def test_a_loop_over_layers_keeps_no_copy_of_the_weights():
    """The weights of a scan are stacked already: what the backward pass reads of them is the argument itself."""
    x, w_LDD = jnp.ones((2, 3, 7)), jnp.ones((4, 7, 7))

    def stacked(body):
        gradient = jax.grad(lambda x, w: jnp.sum(jax.lax.scan(body, x, w)[0]), argnums=(0, 1))
        loops = [one for one in jax.make_jaxpr(gradient)(x, w_LDD).jaxpr.eqns if one.primitive.name == "scan"]
        return sum(v.aval.shape == w_LDD.shape for loop in loops for v in loop.outvars)

    assert stacked(lambda x, w: (jnp.sin(project(x, w)), None)) == 1  # the gradient
    copied = lambda x, w: (jnp.sin(project(x, jnp.negative(w))), None)  # noqa: E731
    assert stacked(copied) == 2  # canary: weights that the loop changes are kept
