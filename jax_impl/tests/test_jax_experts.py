"""The TPU's kernel for the gradient of experts' matrices, in Pallas' interpreter, alone and in a mixture on a mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych.families.decoder import Experts
from diptych.layout import MeshShape
from diptych_jax import experts, flops
from diptych_jax.mesh import train_mesh

LIMIT = 1e-4

# Rows of each expert. The kernel takes 128 rows at a time here; one list ends with a tile, the others in one.
SIZES = {"some experts without rows": (0, 130, 3, 0, 57, 0), "whole tiles": (128, 0, 128), "no rows": (0, 0)}


def _expected(x_MD, y_MF, sizes):
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return np.stack([x_MD[part].astype(np.float64).T @ y_MF[part].astype(np.float64) for part in parts])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SIZES)
def test_the_kernel_multiplies_every_row_for_its_own_expert(case, dtype, monkeypatch):
    monkeypatch.setattr(experts, "LARGEST_BLOCK", 128)
    sizes, draws = SIZES[case], np.random.default_rng(0)
    beyond = 0 if case == "whole tiles" else 70
    x_MD = draws.normal(size=(sum(sizes) + beyond, 140)).astype(dtype)
    y_MF = draws.normal(size=(sum(sizes) + beyond, 24)).astype(dtype)
    for array in (x_MD, y_MF):
        array[sum(sizes) :] = np.nan  # what is there is not read
    by_group = jax.jit(partial(experts.by_group, interpret=True))
    found = by_group(x_MD, y_MF, jnp.asarray(sizes, jnp.int32))
    assert found.dtype == dtype
    found, expected = np.asarray(found, np.float64), _expected(x_MD, y_MF, sizes)
    limit = {"float32": 1e-6, "bfloat16": 2**-8}[dtype] * max(1.0, np.abs(expected).max())
    assert np.abs(found - expected).max() < limit
    if sum(sizes):  # canary: a row that goes to its neighbour
        moved = list(sizes)
        first = next(index for index, size in enumerate(sizes) if size)
        moved[first] -= 1
        moved[first + 1] += 1
        assert np.abs(found - _expected(x_MD, y_MF, moved)).max() > limit


@pytest.fixture
def kernel(monkeypatch):
    """The TPU's branch, interpreted, takes the place of the default."""
    by_group = partial(experts.by_group, interpret=True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: by_group(*arrays))


def _mixture(arrays, config):
    """A sum of outputs with weights, and of the router's probabilities."""
    x_BTD, router_DX, gate_XDF, up_XDF, down_XFD = arrays
    attention_BT = jnp.ones(x_BTD.shape[:2], bool)
    y_BTD, routing = experts.mixture(
        x_BTD, attention_BT, router_DX=router_DX, gate_XDF=gate_XDF, up_XDF=up_XDF, down_XFD=down_XFD,
        activation=jax.nn.silu, experts=config,
    )  # fmt: skip
    return jnp.sum(jnp.sin(y_BTD)) + jnp.sum(routing.probability_sums_X**2)


def test_on_a_mesh_the_kernel_gives_the_gradients_of_plain_products(kernel):
    """float32, experts split over tensor: most rows of a device are for experts elsewhere."""
    config = Experts(count=4, top_k=2, inner=6, normalized=True, balance_coef=0.0)
    draws, shapes = np.random.default_rng(1), ((4, 3, 5), (5, 4), (4, 5, 6), (4, 5, 6), (4, 6, 5))
    arrays = [jnp.asarray(draws.normal(size=shape), jnp.float32) for shape in shapes]

    def plain(arrays):
        """Every token through every expert; those not chosen weigh nothing."""
        x, router, gate, up, down = arrays
        probs = jax.nn.softmax(x @ router)
        kept = jnp.where(probs >= jnp.sort(probs)[..., -2:-1], probs, 0)
        weights = kept / jnp.sum(kept, axis=-1, keepdims=True)
        inner = jax.nn.silu(jnp.einsum("BTD,XDF->BTXF", x, gate)) * jnp.einsum("BTD,XDF->BTXF", x, up)
        y = jnp.einsum("BTXF,XFD,BTX->BTD", inner, down, weights)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sum(probs, axis=(0, 1)) ** 2)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(plain))(arrays)
        with jax.set_mesh(train_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])):
            found = jax.jit(jax.grad(partial(_mixture, config=config)))(arrays)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() < LIMIT
        assert np.abs(np.asarray(other)).max() > 100 * LIMIT  # canary: a gradient that is missing


def test_frozen_matrices_have_no_gradient():
    x_MD, w_XDF, sizes_X = jnp.ones((9, 5)), jnp.ones((3, 5, 6)), jnp.asarray([3, 0, 4], jnp.int32)

    def products(*which):
        gradient = jax.grad(lambda x_MD, w_XDF: jnp.sum(experts._grouped(x_MD, w_XDF, sizes_X)), argnums=which)
        return flops.count(jax.make_jaxpr(gradient)(x_MD, w_XDF)).all / (2 * 9 * 5 * 6)

    assert products(0) == 2
    assert products(0, 1) == 3
