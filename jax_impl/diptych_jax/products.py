"""Products of activations and weights whose gradients need no transposed copy.

JAX takes the gradient of weights as (gradient, input) and transposes the result, which XLA turns into a product with a
transposed right operand. On a CPU that operand is copied and the product takes a slow path: 90 GFLOP/s where
(input, gradient), as here, gets 200. Elsewhere the order is the compiler's to choose.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float


def project(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """The last `axes` axes of x times the first `axes` of w, both of one type: [*rows, *inputs] and [*inputs, *outputs]
    to [*rows, *outputs]."""
    return _project(x, w, axes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: Array, w: Array, axes: int) -> Array:
    rows = x.ndim - axes
    return _contract(x, range(rows, x.ndim), w, range(axes))


def _forward(x, w, axes: int):
    """x is kept for the gradient of the weights, if they have one (frozen ones do not), and the weights for that of
    x."""
    rows = x.value.ndim - axes
    saved = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    return _contract(x.value, range(rows, x.value.ndim), w.value, range(axes)), saved


def _backward(axes: int, saved, change):
    x, w = saved
    dx = dw = None
    if w is not None:
        outputs = w.ndim - axes
        dx = _contract(change, range(change.ndim - outputs, change.ndim), w, range(axes, w.ndim))
    if x is not None:
        rows = x.ndim - axes
        dw = _contract(x, range(rows), change, range(rows))
    return dx, dw


_project.defvjp(_forward, _backward, symbolic_zeros=True)


def _contract(left: Array, left_axes: range, right: Array, right_axes: range) -> Array:
    return jax.lax.dot_general(left, right, ((tuple(left_axes), tuple(right_axes)), ((), ())))
