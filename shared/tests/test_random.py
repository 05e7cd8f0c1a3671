"""Keyed draws: named by meaning, equal in any batch, order or process."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych import random


@given(
    rows=st.lists(st.integers(0, 2**50), min_size=1, max_size=8, unique=True),
    step=st.integers(0, 2**40),
    data=st.data(),
)
def test_a_row_draws_the_same_in_any_batch_and_order(rows, step, data):
    whole = random.uniforms(7, "rl/rollout", step=step, rows=rows, num_positions=9)
    shuffled = data.draw(st.permutations(range(len(rows))))
    again = random.uniforms(7, "rl/rollout", step=step, rows=[rows[i] for i in shuffled], num_positions=9)
    assert np.array_equal(again, whole[shuffled])
    alone = random.uniforms(7, "rl/rollout", step=step, rows=rows[:1], num_positions=4)
    assert np.array_equal(alone[0], whole[0, :4])  # fewer positions: the same first ones


def test_every_part_of_the_key_matters():
    base = random.uniforms(0, "a", step=0, rows=[0], num_positions=64)
    others = [
        random.uniforms(1, "a", step=0, rows=[0], num_positions=64),
        random.uniforms(0, "b", step=0, rows=[0], num_positions=64),
        random.uniforms(0, "a", step=1, rows=[0], num_positions=64),
        random.uniforms(0, "a", step=0, rows=[1], num_positions=64),
    ]
    for other in others:
        assert np.mean(base == other) < 0.1
        assert abs(np.corrcoef(base[0], other[0])[0, 1]) < 0.5


def test_draws_are_uniform_float32_below_one_and_exact_in_both_precisions():
    draws = random.uniforms(3, "u", step=5, rows=range(64), num_positions=512)
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.array_equal(draws.astype(np.float64) * 2**24 % 1, np.zeros(draws.shape))
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * draws.size)
    counts = np.histogram(draws, bins=32, range=(0, 1))[0]
    assert ((counts - draws.size / 32) ** 2 / (draws.size / 32)).sum() < 70  # chi-square, 31 degrees of freedom


def test_draws_are_the_same_in_another_process_and_forever():
    code = "from diptych import random; print(random.uniforms(1, 'pinned', step=2, rows=[3], num_positions=3).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = random.uniforms(1, "pinned", step=2, rows=[3], num_positions=3).tolist()
    assert eval(done.stdout) == here
    assert here == PINNED


PINNED = [[0.061984121799468994, 0.8700293302536011, 0.8594052791595459]]


def test_permutation_and_normal():
    order = random.permutation(0, "order", 100, step=3)
    assert sorted(order.tolist()) == list(range(100))
    assert not np.array_equal(order, random.permutation(0, "order", 100, step=4))
    values = random.normal(0, "init/w", (200, 100), std=0.02)
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(0.02, rel=0.02)


def test_counters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="64-bit"):
        random.generator(0, "x", step=-1)
