"""`parity run --mode lockstep`, its bookkeeping: hand-made steps in the place of two engines."""

from __future__ import annotations

from pathlib import Path

from diptych.parity import side_by_side
from diptych.parity.comparison.expanded import explain
from diptych.recipe.load import load_recipe
from diptych.stages.context import StageContext
from shared.tests.parity_steps import TENSORS, elsewhere, healthy, put

Q = next(iter(TENSORS))


def test_the_step_to_look_at_first_is_kept_though_another_was_red_before_it(tmp_path, monkeypatch):
    """A late rung is red in step 1, an early one in step 3; both sides' tensors of step 3 are needed to explain it."""
    bugs = {1: lambda step: put(step, f"policy/weights/{Q}", 0, 5), 3: lambda step: put(step, "scores", 0, 9)}

    def walk(recipe, *, work, compare, engines, stages, begin):
        del recipe, work, engines, stages
        nobody = StageContext.__new__(StageContext)
        begin(nobody, nobody)
        for number in range(6):
            a = healthy(number)
            b = elsewhere(a)
            compare(a, bugs[number](b) if number in bugs else b)

    monkeypatch.setattr(side_by_side, "lockstep", walk)
    monkeypatch.setattr(side_by_side, "provenance", lambda *_, **__: {})
    monkeypatch.setattr(side_by_side, "producer", lambda _: {"name": "made up", "precision": "float32"})
    recipe = load_recipe(Path("recipes/quickstart.yaml"))
    found, a, b = side_by_side.in_lockstep(recipe, tmp_path, stages=None)
    assert [step for _, step in a.steps] == [0, 1, 3, 5]
    assert len(found.steps) == 6
    expanded = explain(found, a, b)
    assert expanded is not None
    assert (expanded.step.step, expanded.rung.rung.name) == (3, "rewards")
