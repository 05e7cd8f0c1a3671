"""float32, lockstep: 20 PPO steps of the quickstart model; tokens equal up to recorded near-ties, log-probabilities
within 2e-5, gradients per tensor within 2e-5 relative L2. Every rung has a canary."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from diptych.engine import Loss
from diptych.parity.lockstep import lockstep
from diptych.recipe.load import load_recipe
from diptych.stages.pipeline import prepare
from diptych.stages.rl import PPO, build_models

OVERRIDES = [
    "data.demonstrations.limit=300",
    "data.preferences.limit=300",
    "data.prompts.limit=200",
    "stages=[rl]",
    "rl.batch_size=16",
    "rl.micro_batch_size=8",
    "rl.iterations=20",
    "rl.epochs=1",
    "rl.mini_batches=1",
    "rollout.temperature=0.8",
    "rollout.max_new_tokens=32",
    "rl.missing_eos_penalty=0.5",
]


def ppo(engine, hot_models, output, recipe_path, overrides=()):
    settings = [
        *OVERRIDES,
        f"model.path={hot_models['policy']}",
        "model.new=null",
        f"rl.reward.model_path={hot_models['reward']}",
        *overrides,
    ]
    context = prepare(load_recipe(recipe_path, settings), engine_name=engine, output=output)
    return PPO(context, build_models(context)), context.datasets.prompts.train


@pytest.fixture(scope="module")
def quickstart():
    from pathlib import Path

    return Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


@pytest.mark.slow
def test_twenty_ppo_steps_in_lockstep(hot_models, tmp_path, quickstart):
    jax, train = ppo("jax", hot_models, tmp_path / "jax", quickstart)
    torch, _ = ppo("torch", hot_models, tmp_path / "torch", quickstart)
    report = lockstep(jax, torch, train, steps=20)
    assert report.tokens > 5000
    assert len(report.near_ties) <= 3, report.near_ties
    assert not report.differences, "\n".join(map(str, report.differences[:20]))


def with_config(directory, target, **changes):
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


CANARIES = {
    "norm eps times ten": ("logprobs", {"rms_norm_eps": 1e-4}),
    "rope theta off": ("logprobs", {"rope_parameters": {"rope_type": "default", "rope_theta": 11000.0}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CANARIES)
def test_canary_a_model_bug_is_seen(name, hot_models, tmp_path, quickstart):
    rung, changes = CANARIES[name]
    jax, train = ppo("jax", hot_models, tmp_path / "jax", quickstart)
    wrong = hot_models | {"policy": with_config(hot_models["policy"], tmp_path / "wrong", **changes)}
    torch, _ = ppo("torch", wrong, tmp_path / "torch", quickstart)
    report = lockstep(jax, torch, train, steps=1)
    assert any(rung in difference.name for difference in report.differences)
    assert any("policy/gradient" in difference.name for difference in report.differences)


@pytest.mark.slow
def test_canary_an_optimizer_and_a_clip_bug_are_seen(hot_models, tmp_path, quickstart):
    jax, train = ppo("jax", hot_models, tmp_path / "jax", quickstart)
    torch, _ = ppo("torch", hot_models, tmp_path / "torch", quickstart, ["rl.optimizer.betas=[0.9, 0.99]"])
    found = lockstep(jax, torch, train, steps=1).differences
    assert any("policy/second" in difference.name for difference in found)
    assert not any("gradient" in difference.name for difference in found)
    assert not any("logprobs" in difference.name for difference in found)

    class Clipped:  # the same model, clipping at 0.3 where the recipe says 0.2
        def __init__(self, model):
            self._model = model

        def __getattr__(self, attribute):
            return getattr(self._model, attribute)

        def gradients(self, loss: Loss, batch):
            return self._model.gradients(replace(loss, options=(("clip_range", 0.3),)), batch)

    good, _ = ppo("torch", hot_models, tmp_path / "clip", quickstart)
    good.models = replace(good.models, policy=Clipped(good.models.policy))
    found = lockstep(jax, good, train, steps=1).differences
    assert any("policy/gradient" in difference.name for difference in found)
