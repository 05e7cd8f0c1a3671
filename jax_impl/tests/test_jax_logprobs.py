"""Chunked log-probabilities: equal for every chunk, no [batch, time, vocabulary] anywhere; entropy; scoring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych.errors import UserError
from diptych_jax.logprobs import chunked_logprobs, token_logprobs


def _dense(x_ND, targets_N, unembedding_VD, temperature):
    """All log-probabilities at once, float64 [N, V], and those of the targets."""
    z = x_ND.astype(np.float64) @ unembedding_VD.T.astype(np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    logprobs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return logprobs, logprobs[np.arange(len(z)), targets_N]


@pytest.mark.parametrize("chunk", [1, 7, 10, 20, 64])
def test_every_chunk_gives_the_same(chunk):
    draws = np.random.default_rng(0)
    x, unembedding = (draws.normal(0, 1, (20, 8)).astype(np.float32), draws.normal(0, 1, (50, 8)).astype(np.float32))
    targets = draws.integers(0, 50, 20)
    logprobs, entropy = chunked_logprobs(
        lambda states: states @ unembedding.T,
        jnp.array(x),
        jnp.array(targets),
        jnp.float32(0.7),
        chunk=chunk,
        entropy=True,
    )
    dense, wanted = _dense(x, targets, unembedding, 0.7)
    assert entropy is not None
    np.testing.assert_allclose(logprobs, wanted, atol=5e-6)
    np.testing.assert_allclose(entropy, -(np.exp(dense) * dense).sum(-1), atol=5e-6)
    # Canary: the target one row further is another number.
    assert np.abs(np.asarray(logprobs) - np.roll(wanted, 1)).max() > 0.1


def _shapes(jaxpr):
    """Shapes of everything a program makes, inner loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_the_full_vocabulary_never_exists_for_all_tokens(tiny_model, ragged_batch):
    """Batch 4 x time 20, vocabulary 64, chunks of 8 tokens: nothing wider in the program of the gradient."""
    batch = ragged_batch(4, 20)
    model = tiny_model()._model

    def loss(model, chunk):
        rows = (jnp.asarray(batch.tokens), jnp.asarray(batch.attention), jnp.asarray(batch.positions))
        logprobs, entropy, _ = token_logprobs(model, *rows, jnp.float32(1), first=1, chunk=chunk, entropy=True)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    def largest(chunk):
        """The most tokens that have a vocabulary-wide value at the same time."""
        shapes = list(_shapes(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(model, chunk).jaxpr))
        wide = [shape for shape in shapes if shape and shape[-1] == 64]
        assert wide
        return max(int(np.prod(shape[:-1])) for shape in wide)

    assert largest(8) <= 8
    assert largest(80) >= 76  # canary: with one chunk for all tokens, the measure sees the whole of it


def test_columns_before_first_are_zero_and_the_others_unchanged(tiny_model, ragged_batch):
    model = tiny_model()
    whole, late = (model.logprobs(ragged_batch(4, 20, first=first), temperature=1.0) for first in (1, 12))
    assert (late[:, :12] == 0).all()
    assert (whole[:, 0] == 0).all()
    np.testing.assert_allclose(late[:, 12:], whole[:, 12:], atol=1e-6)
    assert np.abs(whole[:, 11]).min() > 0.1
    for first in (0, 21):
        with pytest.raises(ValueError, match="first is a column"):
            model.logprobs(ragged_batch(4, 20, first=first), temperature=1.0)


def test_entropy_has_no_gradient():
    draws = np.random.default_rng(0)
    x, unembedding = jnp.array(draws.normal(0, 1, (6, 8))), jnp.array(draws.normal(0, 1, (50, 8)))
    targets = jnp.arange(6)

    def total(x, which):
        return jnp.sum(
            chunked_logprobs(lambda states: states @ unembedding.T, x, targets, jnp.float32(1), chunk=3, entropy=True)[
                which
            ]
        )

    assert total(x, 1) > 1
    assert (jax.grad(total)(x, 1) == 0).all()
    assert (jax.grad(total)(x, 0) != 0).any()  # canary: the log-probabilities have one


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_gradient_is_that_of_a_plain_log_softmax(chunk):
    draws = np.random.default_rng(0)
    x, table = (draws.normal(0, 1, shape).astype(np.float32) for shape in ((7, 8), (50, 8)))
    targets, weights = jnp.array(draws.integers(0, 50, 7)), jnp.array(draws.normal(0, 1, 7).astype(np.float32))

    def chunked(x, table):
        logprobs, _ = chunked_logprobs(
            lambda states: states @ table.T, x, targets, jnp.float32(0.7), chunk=chunk, entropy=True
        )
        return jnp.sum(weights * logprobs)

    def plain(x, table, shift=0):
        logprobs = jax.nn.log_softmax(x @ table.T / 0.7, axis=-1)
        return jnp.sum(weights * logprobs[jnp.arange(7), (targets + shift) % 50])

    for mine, theirs in zip(*(jax.grad(f, argnums=(0, 1))(x, table) for f in (chunked, plain)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)
    wrong = jax.grad(plain)(x, table, 1)
    assert np.abs(np.asarray(wrong) - np.asarray(jax.grad(chunked)(x, table))).max() > 0.1  # canary


def test_scoring_in_ragged_micro_batches_compiles_once(tiny_model, ragged_batch, count_compilations):
    batch = ragged_batch(7, 20)
    lm, scalar = tiny_model(micro_batch_size=3), tiny_model(head="scalar", micro_batch_size=3)
    whole = tiny_model(micro_batch_size=7).logprobs(batch, temperature=1.0)
    np.testing.assert_allclose(lm.logprobs(batch, temperature=1.0), whole, atol=1e-6)
    scalar.scores(batch)
    with count_compilations() as count:
        part = lm.logprobs(batch.take(slice(0, 4)), temperature=0.5)
        scalar.scores(batch.take(slice(0, 5)))
        assert count() == 0
    assert part.shape == (4, 20)
    with count_compilations() as count:
        lm.logprobs(ragged_batch(7, 21), temperature=1.0)
        assert count() >= 1  # canary: another shape is counted


def test_what_the_device_would_not_check(tiny_model, ragged_batch):
    batch = ragged_batch(2, 20)
    wrong = batch.tokens.copy()
    wrong[1, 19] = 64
    too_large = type(batch)(tokens=wrong, attention=batch.attention, positions=batch.positions)
    model = tiny_model()
    with pytest.raises(UserError, match="token ids run from .* to 64, the model has 64"):
        model.logprobs(too_large, temperature=1.0)
    with pytest.raises(ValueError, match="temperature above 0"):
        model.logprobs(batch, temperature=0.0)
    with pytest.raises(ValueError, match="head='scalar'"):
        model.scores(batch)
    with pytest.raises(ValueError, match="head='lm'"):
        tiny_model(head="scalar").logprobs(batch, temperature=1.0)
