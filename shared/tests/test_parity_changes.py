"""What one step did: another size and another decay are seen far below the limit of the weights, rounding is not."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.parity.comparison.changes import step_findings
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Recorded, Step

RATE, NAME = 5e-5, "policy/weights/w"
LIMIT = TOLERANCES["step_relative"].at("float32")
DRAWS = np.random.default_rng(3)
BEFORE = (DRAWS.normal(size=(128, 96)) * 0.08).astype(np.float32)
MADE = RATE * np.sign(DRAWS.normal(size=BEFORE.shape))


def side(made, *, before=BEFORE, shape=None):
    new = (before.astype(np.float64) + made).astype(np.float32)
    arrays = {"policy/start/weights/w": before, NAME: new}
    tensors = {name: Recorded(values=one if shape is None else one.reshape(shape), layout="as stored")
               for name, one in arrays.items()}  # fmt: skip
    return Step(stage="rl", step=0, metrics={"policy/learning_rate": RATE}, tensors=tensors)


def found(b, a=None):
    return [one.detail for one in step_findings(NAME, a or side(MADE), b, limit=LIMIT)]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (MADE, []),
        (MADE * (1 + 1e-4), []),
        (MADE * 1.01, ["the step is 1.01 times as large"]),
        (MADE * 0.98, ["the step is 0.98 times as large"]),
        (MADE - RATE * 1e-2 * BEFORE, ["decays by 0.01 x learning rate more"]),
        (MADE + 1e-8 * DRAWS.normal(size=BEFORE.shape), []),  # as far as rounding goes
    ],
)
def test_another_step_and_another_decay(made, says):
    said = found(side(made))
    assert len(said) == len(says)
    for one, beginning in zip(said, says, strict=True):
        assert one.split(" ")[0] == beginning.split(" ")[0]
    # All of these pass the weights' own limit: that is why this is looked at.
    apart = np.linalg.norm(side(made).array(NAME) - side(MADE).array(NAME)) / np.linalg.norm(BEFORE)
    assert apart < TOLERANCES["weights_relative_l2"].at("float32")


def test_sides_that_start_apart_or_tell_no_start_are_left_to_the_other_checks():
    assert found(side(MADE * 2, before=BEFORE + np.float32(1e-3))) == []
    alone = side(MADE * 2)
    del alone.tensors["policy/start/weights/w"]
    assert found(alone) == []


def test_a_norm_s_gain_has_no_decay():
    assert found(side(MADE - RATE * 0.1 * BEFORE, shape=-1), side(MADE, shape=-1)) == []
