"""The recipes of recipes/families: 20 steps of `sft` on both engines in lockstep, float32.

Before every step both engines stand on the same weights and optimizer state; gradients per tensor, metrics, moments and
new weights of each step are compared (`diptych.parity.lockstep` does it for whole recipes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.algorithms.losses import sft_loss
from diptych.data.batches import order, sft_batch
from diptych.engine import Loss, Model, ModelSpec, Tensors, TrainBatch
from diptych.parity.compare import metrics, tensors
from diptych.parity.tolerances import TOLERANCES
from diptych.recipe.load import load_recipe
from diptych.stages.context import StageContext, optimizer_spec, schedule
from diptych.stages.pipeline import prepare
from diptych.stages.supervised import num_steps
from diptych.weights.huggingface import Checkpoint, read_checkpoint
from parity_tests.families import vanishing_gradients
from parity_tests.family_checks import ENGINES, EVERYTHING, engine, gradient_error, largest, quick_compilation

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "families").glob("*.yaml"))
STEPS = 20
LIMIT = {name: tolerance.float32 for name, tolerance in TOLERANCES.items()}
NAMES = {
    "gradient_relative_l2": "gradients float32", "trajectory_relative": "metrics", "moment_relative_l2": "moments",
    "weights_relative_l2": "new weights",
}  # fmt: skip
# Two micro-batches in a step, and one shape of batch: each shape would be a program to compile.
SMALL = ["sft.batch_size=4", "sft.micro_batch_size=2"]


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def run_of(recipe: Path, output: Path) -> tuple[StageContext, Checkpoint]:
    """The recipe's data and its hot model."""
    settings = [*SMALL, f"data.buckets=[{max(load_recipe(recipe, []).data.buckets)}]"]
    context = prepare(load_recipe(recipe, settings), engine_name="torch", output=output, stages=("sft",))
    checkpoint = read_checkpoint(context.model_directories["sft"], precision="float32")
    weights = {name: np.array(value) for name, value in checkpoint.weights.items()}
    # Initial weights hide bugs: matrices of standard deviation 0.02 make all attention the same.
    hot = {name: value * 4 if value.ndim > 1 and value.std() < 0.1 else value for name, value in weights.items()}
    return context, replace(checkpoint, weights=hot)


def batch_of(context: StageContext, step: int) -> TrainBatch:
    """The rows that the stage would take."""
    settings, split = context.recipe.sft, context.datasets.demonstrations
    assert split is not None
    chosen = order(
        len(split.train), seed=context.recipe.seed, purpose="sft/order", start=step * settings.batch_size,
        count=settings.batch_size,
    )  # fmt: skip
    return sft_batch(
        [split.train[int(index)] for index in chosen],
        buckets=context.recipe.data.buckets,
        pad_token_id=context.tokenizer.pad_token_id,
        multiple_of=settings.micro_batch_size,
    )


def model_of(name: str, context: StageContext, checkpoint: Checkpoint) -> Model:
    settings = context.recipe.sft
    return engine(name, "float32").model(
        ModelSpec(
            config=checkpoint.config, weights=checkpoint.weights, head="lm",
            optimizer=optimizer_spec(settings.optimizer), micro_batch_size=settings.micro_batch_size,
        )
    )  # fmt: skip


def one_step(a: Model, b: Model, loss: Loss, batch: TrainBatch, rate: float) -> dict[str, float]:
    """Everything that an update makes: the largest error of each check. Leaves `b` where `a` is.

    Key biases that only shift all logits of a softmax alike have gradients of 0 but for rounding, which Adam turns into
    whole steps: they are measured against the norm of all leaves, and their new weights, which change nothing, not.
    """
    vanishing = vanishing_gradients(a.spec.config)
    gradients = a.gradients(loss, batch), b.gradients(loss, batch)
    made = a.update(loss, batch, learning_rate=rate), b.update(loss, batch, learning_rate=rate)
    states, weights = (a.optimizer_state(), b.optimizer_state()), (a.weights(), b.weights())
    found = {
        "gradient_relative_l2": gradient_error(*gradients, vanishing=vanishing),
        # Losses are sums of terms of both signs: differences below the function tolerance are rounding.
        "trajectory_relative": largest(metrics("metrics", *made, limit=EVERYTHING, floor=LIMIT["function"])),
        # The second moment is quadratic in the gradient: twice its error.
        "moment_relative_l2": max(
            gradient_error(states[0].first, states[1].first, vanishing=vanishing),
            gradient_error(states[0].second, states[1].second, vanishing=vanishing) / 2,
        ),
        "weights_relative_l2": largest(
            tensors("weights", *(_without(side, vanishing) for side in weights), limit=EVERYTHING)
        ),
    }
    b.load_weights(weights[0])
    b.load_optimizer_state(states[0])
    return found


def _without(tensors_: Tensors, names: set[str]) -> Tensors:
    return {name: value for name, value in tensors_.items() if name not in names}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_sft_in_lockstep(recipe, tmp_path, judge):
    context, checkpoint = run_of(recipe, tmp_path / "run")
    settings, split = context.recipe.sft, context.datasets.demonstrations
    assert split is not None
    assert num_steps(len(split.train), settings) >= STEPS
    loss = Loss(function=sft_loss, reads="logprobs", balance=context.balance(checkpoint.model))
    rate = schedule(settings.learning_rate, settings.optimizer, STEPS)
    a, b = (model_of(name, context, checkpoint) for name in ENGINES)
    first = batch_of(context, 0)
    before = a.evaluate(loss, first)["loss"]
    for step in range(STEPS):
        for tolerance, error in one_step(a, b, loss, batch_of(context, step), rate(step)).items():
            judge(f"sft {recipe.stem}", NAMES[tolerance], error, LIMIT[tolerance])
    assert a.evaluate(loss, first)["loss"] < before  # it learns


@pytest.mark.slow
def test_canary_a_wrong_model_and_a_wrong_optimizer_are_seen(tmp_path):
    recipe = next(one for one in RECIPES if one.stem == "llama")
    context, checkpoint = run_of(recipe, tmp_path / "run")
    loss, batch = Loss(function=sft_loss, reads="logprobs"), batch_of(context, 0)
    right = model_of("torch", context, checkpoint)
    eps = next(name for name in checkpoint.config if name.endswith(("norm_eps", "norm_epsilon")))
    wrong = model_of("torch", context, replace(checkpoint, config=checkpoint.config | {eps: 1e-4}))
    assert one_step(right, wrong, loss, batch, 1e-3)["gradient_relative_l2"] > LIMIT["gradient_relative_l2"]
    other = engine("torch", "float32").model(
        replace(right.spec, optimizer=replace(optimizer_spec(context.recipe.sft.optimizer), beta2=0.9))
    )
    other.load_weights(right.weights())
    state = right.optimizer_state()
    other.load_optimizer_state(state)
    found = one_step(right, other, loss, batch, 1e-3)
    assert found["moment_relative_l2"] > LIMIT["moment_relative_l2"]
    assert found["gradient_relative_l2"] <= LIMIT["gradient_relative_l2"]
