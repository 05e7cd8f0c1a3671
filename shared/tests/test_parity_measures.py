"""Measures of a difference, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diptych.parity.comparison import measures

F32 = np.float32


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 1.0, 0),
        (1.0, 1.0 + 2**-23, 1),
        (1.0, 1.0 - 2**-24, 1),
        (0.0, -0.0, 0),
        (2**-149, -(2**-149), 2),  # the smallest numbers on both sides of 0
        (1.0, 2.0, 2**23),
        (-1.0, -2.0, 2**23),
    ],
)
def test_ulp(a, b, expected):
    assert measures.ulp_distance(np.array([a], F32), np.array([b], F32)) == (expected, (0,))
    assert measures.ulp_distance(np.array([b], F32), np.array([a], F32)) == (expected, (0,))


def test_ulp_in_the_coarser_type_under_a_mask_and_without_overflow():
    a, b = np.array([[1.0, 5.0]], np.float64), np.array([[1.0 + 2**-23, 1.0]], F32)
    assert measures.ulp_distance(a, b, np.array([[True, False]])) == (1, (0, 0))
    far = measures.ulp_distance(np.array([1e308]), np.array([-1e308]))[0]
    assert 2**63 < far < 2**64


def test_absolute_finds_the_index_under_the_mask():
    a, b = np.zeros((2, 3)), np.array([[0.0, 3.0, 0.0], [4.0, 0.0, 100.0]])
    mask = np.array([[True, True, True], [True, True, False]])
    assert measures.absolute(a, b, mask) == (4.0, (1, 0), pytest.approx(math.sqrt(25 / 5)))


def test_relative_l2():
    a = np.array([3.0, 4.0])
    assert measures.relative_l2(a, a * 1.1) == pytest.approx(0.1)
    assert measures.relative_l2(np.zeros(2), np.zeros(2)) == 0
    assert measures.relative_l2(np.zeros(2), a) == math.inf
    assert math.isnan(measures.relative_l2(a, np.array([np.nan, 4.0])))


def test_sign_flips_are_a_share_of_what_has_a_sign():
    assert measures.sign_flips(np.array([1.0, -1.0, 0.0, 2.0]), np.array([-1.0, -2.0, 1.0, 1.0])) == pytest.approx(
        1 / 3
    )


def test_divergence_against_the_formulas():
    a, b = np.log(np.array([0.5, 0.25])), np.log(np.array([0.25, 0.5]))
    found = measures.divergence(a, b)
    assert found.k1 == pytest.approx(0, abs=1e-15)
    assert found.k3 == pytest.approx(np.mean([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]))
    assert found.mean_error == found.max_error == pytest.approx(2)
    assert found.ess == pytest.approx(2.5**2 / (4 + 0.25) / 2)
    equal = measures.divergence(a, a)
    assert (equal.k1, equal.k3, equal.mean_error, equal.ess) == (0, 0, 1, 1)


def test_a_mean_of_zero_hides_nothing():
    """Errors of both signs cancel in k1; k3, the probability error and the sample size see them."""
    a = np.zeros(100)
    b = np.where(np.arange(100) % 2, 0.5, -0.5)
    found = measures.divergence(a, b)
    assert abs(found.k1) < 1e-12
    assert found.k3 > 0.1
    assert found.ess < 0.9


def test_clip_flips_count_what_crosses_the_edge_with_its_margin():
    old = np.zeros((1, 4))
    a = np.log(np.array([[1.19, 1.25, 0.7, 1.0]]))
    b = np.log(np.array([[1.21, 1.25, 0.81, 1.0]]))
    advantages = np.array([[1.0, -1.0, -1.0, 1.0]])
    found = measures.clip_flips(a, b, old_logprobs=old, advantages=advantages, clip_range=0.2)
    assert (found.flips, found.total, found.index) == (2, 4, (0, 0))
    assert found.margin == pytest.approx(0.01)
    other = measures.clip_flips(a, b, old_logprobs=old, advantages=-advantages, clip_range=0.2)
    assert other.flips == 0  # on the other side of the ratio the loss is not clipped


def test_top_k_flips():
    a = np.array([[1.0, 2.0, 3.0], [3.0, 3.0, 0.0]])
    b = np.array([[1.0, 3.5, 3.0], [3.0, 3.0, 0.0]])
    first = measures.top_k_flips(a, b)
    assert (first.flips, first.total, first.margin, first.index) == (1, 2, 0.5, (0,))
    assert measures.top_k_flips(a, b, k=2).flips == 0  # the same two, in another order
    with pytest.raises(ValueError, match="k must lie"):
        measures.top_k_flips(a, b, k=3)


@pytest.mark.parametrize("error", [0.0, 1e-7, 3.14159e-5, 9.99e-3, 0.1, 7.0, 123456.0])
def test_the_smallest_limit_that_passes(error):
    limit = measures.passing_limit(error)
    assert error <= limit <= 1.11 * error
    assert measures.passing_limit(math.inf) == math.inf


def test_masks_are_never_broadcast():
    with pytest.raises(ValueError, match="nothing is broadcast"):
        measures.absolute(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3, bool))
