"""FLOPs of traced functions: each construct by hand, and a whole model against the hinge's formulas."""

import jax
import jax.numpy as jnp
import pytest

from diptych_jax import flops

X, W = jnp.ones((8, 16)), jnp.ones((16, 32))
DOT = 2 * 8 * 16 * 32


def counted(function, *arguments, **options):
    return flops.count(jax.make_jaxpr(function)(*arguments), **options)


def test_a_product():
    assert counted(lambda x, w: x @ w, X, W) == (DOT, 0)


def test_a_batch_of_products():
    assert counted(
        lambda a, b: jnp.einsum("btnh,bsnh->bnts", a, b), jnp.ones((2, 3, 4, 5)), jnp.ones((2, 7, 4, 5))
    ).all == (2 * 2 * 3 * 7 * 4 * 5)


def test_loops_and_branches():
    square = jnp.ones((8, 8))
    one = 2 * 8 * 8 * 8
    assert counted(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=6)[0], square).all == 6 * one
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)  # noqa: E731
    assert counted(loop, square, while_trips=9.0).all == 9 * one
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert counted(branch, square).all == 2 * one
    kernels = lambda x: jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x)  # noqa: E731
    assert counted(kernels, square).all == one  # not a kernel's padding: what it computes


def test_a_gradient_is_three_products_and_a_checkpoint_one_more():
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T))

    plain = counted(jax.grad(loss, argnums=(0, 1)), W, X)
    assert plain == (6 * DOT, 0)
    again = counted(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), W, X)
    assert again.needed == plain.all
    assert 0 < again.again <= 2 * DOT


def test_ragged_products_count_each_row_once_forward_and_backward():
    x, w, sizes = jnp.ones((12, 4)), jnp.ones((3, 4, 5)), jnp.asarray([5, 3, 4])
    one = 2 * 12 * 4 * 5
    assert counted(jax.lax.ragged_dot, x, w, sizes).all == one
    both = jax.grad(lambda x, w: jnp.sum(jax.lax.ragged_dot(x, w, sizes)), argnums=(0, 1))
    assert counted(both, x, w).all == 3 * one


def test_canary_a_product_left_out_is_seen():
    with pytest.raises(AssertionError):
        assert counted(lambda x, w: x[:4] @ w, X, W).all == DOT
