"""The sampler's definition: hand-worked draws, a dense sweep of the unit interval, and seeded bugs."""

import numpy as np
import pytest

from diptych.algorithms.sampling import sample
from diptych.errors import UserError

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES)[None]


def draw(u, logits=LOGITS, *, temperature=1.0, top_k=0, top_p=1.0):
    token, logprob, margin = sample(
        np.asarray(logits), np.array([u]), temperature=temperature, top_k=top_k, top_p=top_p
    )
    assert token.dtype == np.int32
    return int(token[0]), float(logprob[0]), float(margin[0])


# settings, u -> token, margin. The cumulative distribution runs in vocabulary order.
DRAWS = {
    "first interval": ({}, 0.05, 0, 0.05),
    "second": ({}, 0.3, 1, 0.2),
    "near a boundary": ({}, 0.49, 1, 0.01),
    "third": ({}, 0.55, 2, 0.05),
    "last": ({}, 0.99, 3, 0.01),
    "u is 0": ({}, 0.0, 0, 0.0),
    # top_k 2 keeps tokens 1 and 3: cdf 0, 4/7, 4/7, 1
    "top_k, u is 0": ({"top_k": 2}, 0.0, 1, 0.0),
    "top_k, first": ({"top_k": 2}, 0.5, 1, 4 / 7 - 0.5),
    "top_k, second": ({"top_k": 2}, 0.6, 3, 0.6 - 4 / 7),
    "top_k larger than the vocabulary": ({"top_k": 9}, 0.55, 2, 0.05),
    # top_p 0.5: before token 1: 0; before token 3: 0.4 < 0.5; before token 2: 0.7
    "top_p": ({"top_p": 0.5}, 0.6, 3, 0.6 - 4 / 7),
    "top_p keeps at least one": ({"top_p": 1e-9}, 0.99, 1, 0.01),
    # before token 2: 0.7 < 0.75, so it stays
    "top_p three": ({"top_p": 0.75}, 4.5 / 9, 2, 0.5 / 9),  # cdf 0, 4/9, 6/9, 1
    # top_k 3 renormalises to 4/9, 3/9, 2/9; before token 2: 7/9 > 0.75, so it goes, though 0.7 < 0.75 before
    "top_p after top_k": ({"top_k": 3, "top_p": 0.75}, 0.6, 3, 0.6 - 4 / 7),
    # temperature 0.5 squares: 1, 16, 4, 9 of 30
    "temperature": ({"temperature": 0.5}, 20.5 / 30, 2, 0.5 / 30),
}


def check_draw(name, **changes):
    options, u, token, margin = DRAWS[name]
    actual_token, logprob, actual_margin = draw(u, **{**options, **changes})
    assert actual_token == token
    assert actual_margin == pytest.approx(margin, abs=1e-12)
    tempered = PROBABILITIES ** (1 / options.get("temperature", 1.0))
    assert logprob == pytest.approx(np.log(tempered[token] / tempered.sum()), abs=1e-12)  # untruncated


@pytest.mark.parametrize("name", DRAWS)
def test_draws(name):
    check_draw(name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("temperature", {"temperature": 1.0}),
        ("top_k, first", {"top_k": 3}),
        ("top_p after top_k", {"top_k": 0}),
        ("third", {"logits": LOGITS[:, ::-1]}),
    ],
)
def test_canary_draws(name, changes):
    with pytest.raises(AssertionError):
        check_draw(name, **changes)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8)])
def test_a_sweep_of_the_unit_interval_gives_the_truncated_distribution(top_k, top_p):
    """Shares of tokens over an even grid of u, against a truncation written as a loop."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(12)
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    order = sorted(range(12), key=lambda i: (-logits[i], i))
    order = order[:top_k] if top_k else order
    total, before, kept = p[order].sum(), 0.0, []
    for i in order:
        if before / total < top_p:
            kept.append(i)
        before += p[i]
    grid = (np.arange(20_000) + 0.5) / 20_000
    tokens, logprobs, margins = sample(np.tile(logits, (20_000, 1)), grid, temperature=0.7, top_k=top_k, top_p=top_p)
    shares = np.bincount(tokens, minlength=12) / 20_000
    expected = np.zeros(12)
    expected[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(shares, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], rtol=0, atol=1e-12)
    assert (margins >= 0).all()
    flips = np.flatnonzero(np.diff(tokens))
    assert (margins[flips] < 1e-4).all()  # a draw beside a boundary says so


def test_equal_logits_are_ordered_by_index():
    assert draw(0.999, np.zeros((1, 6)), top_k=2)[0] == 1
    assert draw(0.999, np.zeros((1, 6)), top_p=0.4)[0] == 2  # 0, 1/6 and 2/6 lie below 0.4
    assert draw(0.5, np.zeros((1, 6)), temperature=0.0)[0] == 0  # the first of equals


def test_ties_at_the_edge_of_top_k_in_a_large_vocabulary():
    """600 of 1000 tokens share the largest logit: the first 250 of them by index are kept, and no others."""
    rng = np.random.default_rng(8)
    logits = np.where(rng.permutation(1000) < 600, 1.0, 0.0)
    first = np.flatnonzero(logits == 1.0)[:250]
    grid = (np.arange(250) + 0.5) / 250
    tokens, _, _ = sample(np.tile(logits, (250, 1)), grid, temperature=1.0, top_k=250, top_p=1.0)
    np.testing.assert_array_equal(tokens, first)


def test_greedy():
    token, logprob, margin = draw(0.999, temperature=0.0)
    assert token == 1
    assert logprob == pytest.approx(np.log(0.4), abs=1e-12)
    assert margin == pytest.approx((0.4 - 0.3) / 2, abs=1e-12)
    assert draw(0.5, np.array([[3.0]]), temperature=0.0) == (0, 0.0, 0.5)  # a vocabulary of one


def test_a_token_without_probability_is_never_drawn():
    """-inf logits at either end: u = 0 skips the first, u just below 1 stops before the last."""
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    assert draw(0.0, logits)[0] == 1
    assert draw(1 - 2.0**-24, logits)[0] == 3
    assert draw(1.0, logits)[0] == 3  # what rounding of u * cdf[-1] in float32 can come to
    rng = np.random.default_rng(0)
    tokens, _, _ = sample(np.tile(logits, (5000, 1)), rng.random(5000), temperature=1.0, top_k=0, top_p=1.0)
    assert set(tokens) == {1, 3}


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(5)
    logits, u = rng.standard_normal((7, 20)), rng.random(7)
    together = sample(logits, u, temperature=0.9, top_k=10, top_p=0.9)
    for row in range(7):
        alone = sample(logits[row : row + 1], u[row : row + 1], temperature=0.9, top_k=10, top_p=0.9)
        assert [float(part[row]) for part in together] == [float(part[0]) for part in alone]


def test_float32_logits_are_upcast():
    logits = np.random.default_rng(6).standard_normal((50, 300)).astype(np.float32)
    u = np.random.default_rng(7).random(50).astype(np.float32)
    single = sample(logits, u, temperature=1.0, top_k=0, top_p=1.0)
    double = sample(logits.astype(np.float64), u.astype(np.float64), temperature=1.0, top_k=0, top_p=1.0)
    for one, other in zip(single, double, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, "rollout.temperature"),
        ({"temperature": float("nan")}, "rollout.temperature"),
        ({"top_k": -1}, "rollout.top_k"),
        ({"top_p": 0.0}, "rollout.top_p"),
        ({"top_p": 1.5}, "rollout.top_p"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(UserError, match=text):
        draw(0.5, **options)
