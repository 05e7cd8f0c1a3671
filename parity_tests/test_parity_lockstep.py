"""float32, lockstep: 20 PPO steps of the quickstart model and 12 of the stages before; every rung of every step is
green, and the gap does not grow. Whether the rungs can turn red is what `test_parity_selftest.py` shows; here are the
canaries of the walk."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.errors import UserError
from diptych.parity.comparison.ladder import StepResult
from diptych.parity.comparison.rungs import climb
from diptych.parity.lockstep import Steps, lockstep
from diptych.parity.side_by_side import gaps_of, growth
from diptych.parity.trace import Step
from diptych.recipe.load import load_recipe
from diptych.stages import pipeline

SETTINGS = [
    "data.demonstrations.limit=300",
    "data.preferences.limit=300",
    "data.prompts.limit=200",
    "sft.batch_size=16",
    "sft.micro_batch_size=8",
    "sft.max_steps=12",
    "sft.optimizer.warmup_steps=2",
    "reward.batch_size=16",
    "reward.micro_batch_size=8",
    "reward.max_steps=12",
    "rl.batch_size=16",
    "rl.micro_batch_size=8",
    "rl.iterations=20",
    "rl.eval_prompts=16",
    "rollout.temperature=0.8",
    "rollout.max_new_tokens=32",
    "rl.missing_eos_penalty=0.5",
]


def walk(recipe, work, **options):
    """[(step, its rungs)] of both engines in lockstep."""
    found = []

    def compare(a, b):
        rungs = climb(a, b, precision=recipe.precision)
        found.append(StepResult(stage=a.stage, step=a.step, is_deep=True, rungs=tuple(rungs)))

    lockstep(recipe, work=work, compare=compare, **options)
    return found


@pytest.mark.slow
def test_every_step_of_every_stage(hot_models, tmp_path):
    recipe = load_recipe("recipes/quickstart.yaml", [*SETTINGS, f"model.path={hot_models['policy']}", "model.new=null"])
    found = walk(recipe, tmp_path)
    assert [one.name for one in found] == [
        f"{stage} step {n}" for stage, count in (("sft", 12), ("reward", 12), ("rl", 20)) for n in range(count)
    ]
    red = [f"{one.name}: {rung.rung.title}: {rung.worst}" for one in found for rung in one.red]
    assert not red, "\n".join(red[:20])
    of_rl = [one for one in found if one.stage == "rl"]
    assert all(rung.status == "green" for one in of_rl for rung in one.rungs)
    assert sum(rung.count for one in of_rl for rung in one.rungs) > 1_000_000
    assert sum(len(rung.near_ties) for one in of_rl for rung in one.rungs) <= 3
    grows, about = growth(gaps_of(found))
    assert not grows, about


@pytest.mark.slow
def test_canary_another_beta_on_one_side_is_seen_where_it_acts(hot_models, tmp_path, monkeypatch):
    """The second moment of the very first update, and nothing before it."""
    recipe = load_recipe(
        "recipes/quickstart.yaml",
        [
            *SETTINGS,
            f"model.path={hot_models['policy']}",
            "model.new=null",
            "stages=[sft]",
            "sft.max_steps=2",
            "sft.optimizer.warmup_steps=1",
        ],
    )
    right = pipeline.prepare

    def wrong(recipe, *, engine_name, **options):
        if engine_name == "torch":
            recipe = load_with(recipe, beta2=0.99)
        return right(recipe, engine_name=engine_name, **options)

    monkeypatch.setattr("diptych.parity.lockstep.prepare", wrong)
    first = walk(recipe, tmp_path)[0]
    assert first.red[0].rung.name == "optimizer"
    assert first.red[0].worst.name.startswith("model/second/")


def load_with(recipe, *, beta2):
    from dataclasses import replace

    optimizer = replace(recipe.sft.optimizer, betas=(recipe.sft.optimizer.betas[0], beta2))
    return replace(recipe, sft=replace(recipe.sft, optimizer=optimizer))


def test_a_failure_of_the_leading_side_reaches_the_other():
    steps = Steps()
    steps.fail(UserError("no more"))
    with pytest.raises(UserError, match="no more"):
        steps.get("rl", 0)


def test_steps_are_handed_over_in_order_and_once_the_run_is_over_there_are_none():
    import threading

    steps = Steps()

    def lead():
        for number in (0, 1):
            steps.put(Step(stage="rl", step=number))
        steps.finish()

    thread = threading.Thread(target=lead)
    thread.start()
    found = [steps.get("rl", number) for number in (0, 0, 1, 2)]
    thread.join()
    assert [one and one.step for one in found] == [0, 0, 1, None]


NOISE = 1e-6 * (1 + 0.3 * np.random.default_rng(0).random(300))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (NOISE, False),
        (NOISE * np.linspace(1, 1.4, 300), False),  # the weights grow, and with them the numbers
        (NOISE * np.linspace(1, 9, 300), True),
        (NOISE * 1.02 ** np.arange(300), True),  # chaos
        (np.zeros(300), False),
        (np.full(300, 1e-6), False),
        (np.where(np.arange(300) == 150, 1e-5, NOISE), False),  # one large gap is no growth
    ],
)
def test_growth_is_seen_and_noise_is_not(errors, expected):
    assert growth({"rl": [float(error) for error in errors]})[0] is expected
