"""GAE, whitening and the KL estimators against definitions written as loops and against hand-worked numbers."""

import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from diptych.algorithms import shaping
from diptych.algorithms.advantages import Whitening, gae, masked_mean_variance, whiten
from diptych.errors import InvariantError

POPULATION = Whitening(variance="population", eps=1e-8)
BESSEL = Whitening(variance="bessel", eps=1e-8)


# --- GAE -------------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}: the sum of the paper, not its recursion."""
    rows, new = rewards.shape
    padded = np.concatenate([values, np.zeros((rows, 1))], axis=1)
    delta = rewards + gamma * padded[:, 1:] - values
    advantages = np.zeros_like(rewards)
    for t in range(new):
        for k in range(new - t):
            advantages[:, t] += (gamma * lam) ** k * delta[:, t + k]
    return advantages


def check_gae(function, gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 5, 12))
    advantages, returns = function(rewards, values, gamma=gamma, lam=lam)
    expected = gae_by_definition(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=1e-12, strict=True)
    np.testing.assert_allclose(returns, expected + values, rtol=0, atol=1e-12, strict=True)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.9, 0.0), (1.0, 1.0)])
def test_gae(gamma, lam):
    check_gae(gae, gamma, lam)


def test_gae_by_hand():
    """delta = (1 + 1 - 1, 0 + 2 - 2, 8 - 4) = (1, 0, 4); A_2 = 4, A_1 = 0 + 4 / 4, A_0 = 1 + 1 / 4."""
    advantages, returns = gae(np.array([[1.0, 0.0, 8.0]]), np.array([[1.0, 2.0, 4.0]]), gamma=0.5, lam=0.5)
    np.testing.assert_array_equal(advantages, [[1.25, 1.0, 4.0]])
    np.testing.assert_array_equal(returns, [[2.25, 3.0, 8.0]])


def test_gae_limits():
    """lam 1: returns are discounted sums of rewards, whatever the critic says; lam 0: one-step returns."""
    rng = np.random.default_rng(1)
    rewards, values = rng.standard_normal((2, 3, 6))
    _, monte_carlo = gae(rewards, values, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(monte_carlo, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], atol=1e-12)
    _, one_step = gae(rewards, values, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(one_step[:, :-1], rewards[:, :-1] + 0.9 * values[:, 1:], atol=1e-12)


GAE_BUGS = {
    "bootstraps from the last value": lambda r, v, *, gamma, lam: gae(
        r + gamma * v * (np.arange(12) == 11), v, gamma=gamma, lam=lam
    ),
    "gamma forgotten in the trace": lambda r, v, *, gamma, lam: gae(r, v, gamma=gamma, lam=lam / gamma),
    "values one slot late": lambda r, v, *, gamma, lam: gae(r, np.roll(v, 1, axis=1), gamma=gamma, lam=lam),
    "returns from something else": lambda r, v, *, gamma, lam: (gae(r, v, gamma=gamma, lam=lam)[0], r + v),
}


@pytest.mark.parametrize("bug", GAE_BUGS)
def test_canary_gae(bug):
    with pytest.raises(AssertionError):
        check_gae(GAE_BUGS[bug], 0.9, 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    x = np.arange(8, dtype=dtype).reshape(2, 4)
    mask = x > 1
    assert all(array.dtype == dtype for array in gae(x, x, gamma=0.99, lam=0.95))
    assert whiten(x, mask, whitening=BESSEL).dtype == dtype
    assert shaping.clip_scores(x[:, 0], limit=1.0).dtype == dtype
    assert shaping.add_scores(shaping.kl_penalty(x, kl_coef=0.1), x[:, 0], slots=np.array([1, 2])).dtype == dtype


# --- whitening -------------------------------------------------------------------------------------------------------

X = np.array([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]])
MASK = np.array([[True, True, False], [True, False, False]])
SHAPES = {  # variance 2/3 (population), 1 (Bessel)
    "population": (POPULATION, np.array([-1, 0, 1]) / np.sqrt(2 / 3 + 1e-8)),
    "bessel": (BESSEL, np.array([-1, 0, 1]) / np.sqrt(1 + 1e-8)),
    "large eps added": (Whitening(variance="population", eps=2.0), np.array([-1, 0, 1]) / np.sqrt(8 / 3)),
    "large eps as floor": (Whitening(variance="population", eps=2.0, eps_form="floor"), np.array([-1, 0, 1]) / 2**0.5),
    "mean kept": (Whitening(variance="bessel", eps=0.0, keep_mean=True), np.array([1.0, 2.0, 3.0])),
    "count": (
        Whitening(variance="bessel", eps=0.0, count_eps=1.0),  # mean 6/4; squares (.25 + .25 + 2.25) / 4 * 3/2
        (np.array([1, 2, 3]) - 1.5) / np.sqrt(2.75 / 4 * 1.5),
    ),
}


def check_whiten(name, whitening):
    whitened = whiten(X, MASK, whitening=whitening)
    np.testing.assert_allclose(whitened[MASK], SHAPES[name][1], rtol=0, atol=1e-14)
    assert not whitened[~MASK].any()


@pytest.mark.parametrize("name", SHAPES)
def test_whiten(name):
    check_whiten(name, SHAPES[name][0])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_canary_whiten(name, other):
    """Every setting gives its own numbers: none passes for another."""
    if name != other:
        with pytest.raises(AssertionError):
            check_whiten(name, SHAPES[other][0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(0, 5), rows=st.integers(0, 3))
def test_whitening_sees_neither_padding_nor_the_order_of_rows(seed, columns, rows):
    rng = np.random.default_rng(seed)
    x, mask = rng.standard_normal((4, 6)), rng.random((4, 6)) < 0.7
    mask[0, :2] = True
    plain = whiten(x, mask, whitening=BESSEL)
    order = rng.permutation(4 + rows)
    wide_x = np.pad(x, ((0, rows), (0, columns)), constant_values=np.nan)[order]
    wide_mask = np.pad(mask, ((0, rows), (0, columns)))[order]
    back = np.argsort(order)[:4]
    wide = whiten(wide_x, wide_mask, whitening=BESSEL)[back][:, :6]
    np.testing.assert_allclose(wide, plain, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plain[mask].mean(), 0, atol=1e-12)


def test_statistics_are_summed_in_float64():
    """The mean of 2**20 numbers near 1000 in float32: exact to the rounding of the inputs."""
    x = (1000 + np.random.default_rng(0).standard_normal((1024, 1024))).astype(np.float32)
    mean, variance = masked_mean_variance(x, np.ones(x.shape, bool), whitening=POPULATION)
    assert mean == pytest.approx(float(np.mean(x, dtype=np.float64)), abs=1e-10)
    assert variance == pytest.approx(float(np.var(x, dtype=np.float64)), rel=1e-12)


def test_constant_advantages_whiten_to_zero_not_nan():
    assert not whiten(np.full((2, 3), 2.0), np.ones((2, 3), bool), whitening=POPULATION).any()


@pytest.mark.parametrize(("whitening", "tokens"), [(POPULATION, 0), (BESSEL, 0), (BESSEL, 1)])
def test_too_few_tokens_to_whiten(whitening, tokens):
    with pytest.raises(InvariantError, match=f"this one has {tokens}"):
        whiten(np.ones((1, 3)), np.arange(3)[None] < tokens, whitening=whitening)


# --- KL and scores ---------------------------------------------------------------------------------------------------

LOG_RATIOS = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
KL = {
    "k1": LOG_RATIOS,
    "k2": np.array([2.0, 0.125, 0.0, 0.125, 2.0]),
    "k3": np.exp(-LOG_RATIOS) - 1 + LOG_RATIOS,
}


@pytest.mark.parametrize("framework", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("estimator", KL)
def test_kl_estimators(estimator, framework):
    ref = np.array([-1.0, -0.3, -2.0, -0.1, -4.0])
    actual = _in_framework(
        framework, lambda a, b: shaping.kl_estimate(a, b, estimator=estimator), ref + LOG_RATIOS, ref
    )
    np.testing.assert_allclose(actual, KL[estimator], rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", KL)
def test_canary_kl_swapped_arguments(estimator):
    """k2 is symmetric; the others change when policy and reference are exchanged."""
    swapped = shaping.kl_estimate(np.zeros(5), LOG_RATIOS, estimator=estimator)
    assert (np.abs(swapped - KL[estimator]).max() > 0.1) == (estimator != "k2")


def test_kl_estimators_agree_in_expectation():
    """Over tokens drawn from the policy k1 and k3 average to the KL exactly; k2 does not."""
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    exact = (policy * np.log(policy / reference)).sum()
    mean = {e: (policy * shaping.kl_estimate(np.log(policy), np.log(reference), estimator=e)).sum() for e in KL}
    assert mean["k1"] == pytest.approx(exact, abs=1e-15)
    assert mean["k3"] == pytest.approx(exact, abs=1e-15)
    assert abs(mean["k2"] - exact) > 1e-3


def test_k3_is_precise_near_zero_and_finite_far_away():
    """At l = 1e-6 k3 is l^2 / 2 - l^3 / 6; the naive exp(-l) - 1 + l has lost four digits (the canary)."""
    tiny = shaping.kl_estimate(np.array([1e-6]), np.array([0.0]), estimator="k3")
    truth = pytest.approx(1e-12 / 2 - 1e-18 / 6, rel=1e-7, abs=0)
    assert tiny.item() == truth
    assert np.exp(-1e-6) - 1 + 1e-6 != truth
    assert np.isfinite(shaping.kl_estimate(np.float32([-2000.0]), np.float32([0.0]), estimator="k3")).all()


def test_scores_are_added_on_their_slot_only():
    rewards = np.full((2, 3), 0.5)
    np.testing.assert_array_equal(
        shaping.add_scores(rewards, np.array([1.0, -2.0]), slots=np.array([2, 0])), [[0.5, 0.5, 1.5], [-1.5, 0.5, 0.5]]
    )
    np.testing.assert_array_equal(rewards, np.full((2, 3), 0.5))  # never in place


def test_score_clip():
    scores = np.array([-7.0, 1.5, 9.0])
    np.testing.assert_array_equal(shaping.clip_scores(scores, limit=5.0), [-5.0, 1.5, 5.0])
    np.testing.assert_array_equal(shaping.clip_scores(scores, limit=None), scores)


def _in_framework(name, function, *arrays):
    if name == "numpy":
        return function(*arrays)
    if name == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diptych[torch]'")
        return function(*(torch.from_numpy(array) for array in arrays)).numpy()
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'diptych[jax]'")
    with jax.enable_x64(True):
        return np.asarray(jax.jit(function)(*(jax.numpy.asarray(array) for array in arrays)))


def test_shape_annotations_hold():
    checked = jaxtyped(typechecker=beartype)(gae)
    checked(X, X, gamma=1.0, lam=0.95)
    with pytest.raises(TypeError):
        checked(X, X[:, :2], gamma=1.0, lam=0.95)
