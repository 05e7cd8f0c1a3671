"""An optimizer step against NumPy float64, whatever the micro-batches; metrics, clipping, averages, compile counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diptych.algorithms.losses import ppo_policy_loss, sft_loss
from diptych.algorithms.optimizers import ema_step, initial_state, optimizer_step
from diptych.engine import Loss, OptimizerState, TrainBatch
from diptych.errors import UserError
from diptych.families.family import read_model
from diptych.layout import MeshShape
from diptych_jax import optimizer, weights
from diptych_jax.mesh import train_mesh


def _relative(found, wanted):
    return max(np.linalg.norm(found[n] - wanted[n]) / (np.linalg.norm(wanted[n]) + 1e-30) for n in wanted)


def _largest(found, wanted):
    return max(np.abs(found[name] - value).max() for name, value in wanted.items())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_fifty_steps_equal_the_numpy_oracle(precision, name, tiny_config, hot_weights, request):
    """The same gradients on both sides: this is the optimizer's test, not the model's."""
    spec, config = request.getfixturevalue(name), tiny_config()
    with jax.enable_x64(precision == "float64"):
        parsed, dtype = read_model(config), np.dtype(precision)
        given = hot_weights(config, "lm")
        state = optimizer.create(
            spec, weights.pack(parsed, "lm", given, dtype), train_mesh(MeshShape(), jax.devices()[:1])
        )
        step = jax.jit(lambda state, gradients, rate: optimizer.apply(spec, state, gradients, rate))
        wanted, moments, ema = given, initial_state(given, spec=spec), given
        tolerance = {"float32": 1e-6, "float64": 1e-13}[precision]
        for index in range(50):
            draws, rate = np.random.default_rng(index), 1e-3 * (1 + index % 2)
            # From far below eps to far above it; every third step is below the clip.
            scale = 10.0 ** -(index % 3) * 0.01
            gradients = {n: draws.normal(0, scale, w.shape).astype(np.float32) for n, w in given.items()}
            state, norm = step(state, weights.pack(parsed, "lm", gradients, dtype), jnp.asarray(rate, dtype))
            wanted, moments, wanted_norm = optimizer_step(wanted, gradients, moments, spec=spec, learning_rate=rate)
            ema = ema_step(ema, wanted, decay=0.9)
            assert float(norm) == pytest.approx(wanted_norm, rel=tolerance)
            if index in (0, 49):
                found, held = weights.unpack(state.model), optimizer.moments_of(state)
                # Weights of float32 are rounded by up to 6e-8 in every step.
                assert _relative(found, wanted) < {"float32": 1e-7 * (1 + index / 10), "float64": 1e-13}[precision]
                assert int(held.step) == index + 1
                assert _relative(weights.unpack(held.first), moments.first) < tolerance
                assert held.second is None or _relative(weights.unpack(held.second), moments.second) < tolerance
        if state.ema is not None:
            assert _relative(weights.unpack(state.ema), ema) < tolerance
            assert _relative(ema, wanted) > 1e-4  # canary: the average is not the weights


def test_an_update_is_its_gradient_through_the_optimizer(tiny_model, adamw, sft, sft_batch):
    model = tiny_model(optimizer=adamw)
    wanted = {name: value.astype(np.float64) for name, value in model.weights().items()}
    state = initial_state(wanted, spec=adamw)
    for seed in range(2):
        gradients = model.gradients(sft, sft_batch(seed=seed))
        metrics = model.update(sft, sft_batch(seed=seed), learning_rate=1e-3)
        wanted, state, norm = optimizer_step(wanted, gradients, state, spec=adamw, learning_rate=1e-3)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert norm > adamw.max_grad_norm  # the clip is at work
    assert _largest(model.weights(), wanted) < 2e-7
    assert _relative(model.optimizer_state().first, state.first) < 1e-5
    assert _relative(model.optimizer_state().second, state.second) < 1e-5
    assert _largest(model.weights(), tiny_model().weights()) > 1e-4  # canary: it moved


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.0}, {"eps": 1e-3}, {"beta2": 0.999}, {"beta1": 0.8}, {"max_grad_norm": None}],
    ids=lambda change: next(iter(change)),
)
def test_canary_every_setting_of_adamw_shows(change, tiny_config, hot_weights, adamw):
    """Two steps of the oracle with one setting changed are further away than the tolerance above."""
    given = hot_weights(tiny_config(), "lm")
    results = []
    for spec in (adamw, dataclasses.replace(adamw, **change)):
        new, state = given, initial_state(given, spec=spec)
        for seed in (1, 2):
            draws = np.random.default_rng(seed)
            gradients = {name: draws.normal(0, 0.01 * seed, value.shape) for name, value in given.items()}
            new, state, _ = optimizer_step(new, gradients, state, spec=spec, learning_rate=1e-3)
        results.append(new)
    assert _largest(*results) > 10 * 1e-7


@pytest.mark.parametrize(("precision", "name", "sizes"), [("float32", "adamw", (2,)), ("float64", "sgd", (2,))])
def test_micro_batches_change_nothing(precision, name, sizes, tiny_model, sft, sft_batch, request):
    spec, batch = request.getfixturevalue(name), sft_batch()
    results = []
    for size in (8, *sizes):  # 8 is more than there are rows: all at once
        model = tiny_model(precision, optimizer=spec, micro_batch_size=size)
        evaluated = model.evaluate(sft, batch)
        metrics = model.update(sft, batch, learning_rate=0.1)
        assert evaluated == pytest.approx({k: v for k, v in metrics.items() if k != "grad_norm"}, rel=1e-6)
        results.append((metrics, model.optimizer_state().first))
    tolerance = {"float32": 2e-6, "float64": 1e-13}[precision]
    for metrics, first in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=tolerance)
        assert _relative(first, results[0][1]) < 10 * tolerance
    # Canary: one row's mask less is seen.
    fewer = dataclasses.replace(batch, arrays={"mask": batch.arrays["mask"] & (np.arange(4) < 3)[:, None]})
    assert abs(model.evaluate(sft, fewer)["loss"] - model.evaluate(sft, batch)["loss"]) > 1e-3


def _row_metrics(scores, *, weights, attention, num):
    per_row = (scores * attention).sum(axis=1)
    return (per_row * weights).sum() / num, {"sum": weights.sum(), "weight_max": weights.max()}


def test_metrics_are_summed_or_maximal(tiny_model, ragged_batch):
    tokens = ragged_batch(4, 12)
    arrays = {"weights": np.array([1.0, 5.0, -2.0, 3.0]), "attention": tokens.attention}
    batch = TrainBatch(tokens=tokens, arrays=arrays, denominators={"num": 2.0})
    loss = Loss(function=_row_metrics, reads="scores")
    model = tiny_model(head="scalar", micro_batch_size=2)
    wanted = ((model.scores(tokens) * tokens.attention).sum(1) * arrays["weights"]).sum() / 2
    metrics = model.evaluate(loss, batch)
    assert metrics == {"sum": 7.0, "weight_max": 5.0, "loss": pytest.approx(wanted, rel=1e-5)}
    assert all(type(value) is float for value in metrics.values())


def test_the_ratio_is_1_at_the_temperature_of_the_rollout(tiny_model, ragged_batch):
    """With old log-probabilities of the same weights and temperature the ratio is exactly 1; at another it is not."""
    tokens = ragged_batch(4, 12, first=5)
    mask = tokens.attention & (np.arange(12) >= 7)
    model = tiny_model()
    arrays = {
        "old_logprobs": model.logprobs(tokens, temperature=0.7),
        "advantages": np.random.default_rng(0).normal(0, 1, mask.shape).astype(np.float32),
        "mask": mask,
    }
    batch = TrainBatch(tokens=tokens, arrays=arrays, denominators={"num_tokens": float(mask.sum())})
    deviations = []
    for temperature in (0.7, 1.0):
        loss = Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", 0.2),),
            temperature=temperature,
            entropy=True,
        )
        deviations.append(model.evaluate(loss, batch)["policy/ratio_deviation_max"])
    assert deviations[0] < 2e-6
    assert deviations[1] > 0.1


def test_values_compile_nothing(tiny_model, adamw, sft, sft_batch, count_compilations):
    """A program is compiled once for a loss and a shape; denominators, rates, values and other models reuse it."""
    model = tiny_model(optimizer=adamw)
    model.update(sft, sft_batch(), learning_rate=1e-3)
    model.evaluate(sft, sft_batch())
    model.weights()  # slices layers out of their stacks: a small program for each shape
    twin = tiny_model(optimizer=adamw)
    other = dataclasses.replace(sft_batch(seed=1), denominators={"num_tokens": 17.0})
    with count_compilations() as count:
        model.update(sft, other, learning_rate=1e-4)
        model.evaluate(sft, other)
        model.load_weights(model.weights())
        model.load_optimizer_state(model.optimizer_state())
        model.update(Loss(function=sft_loss, reads="logprobs"), other, learning_rate=1e-4)
        twin.update(sft, other, learning_rate=1e-4)
        assert count() == 0
    with count_compilations() as count:
        model.evaluate(dataclasses.replace(sft, temperature=0.5), other)
        assert count() >= 1  # canary: another loss is counted


def test_optimizer_state_goes_out_and_in(tiny_model, adamw, sft, sft_batch):
    """Weights and state moved by Hugging Face names to another model: both go on alike, to the last bit."""
    here, there = (tiny_model(optimizer=adamw) for _ in range(2))
    for seed in range(3):
        here.update(sft, sft_batch(seed=seed), learning_rate=1e-3)
    state = here.optimizer_state()
    there.load_weights(here.weights())
    fresh = there.optimizer_state()
    there.load_optimizer_state(state)
    assert there.optimizer_state().step == 3
    assert fresh.step == 0
    for model in (here, there):
        model.update(sft, sft_batch(seed=3), learning_rate=1e-3)
    _assert_equal(here.weights(), there.weights())
    there.load_optimizer_state(fresh)  # canary: without the moments the next step differs
    for model in (here, there):
        model.update(sft, sft_batch(seed=4), learning_rate=1e-3)
    assert _relative(here.weights(), there.weights()) > 1e-5


def test_wrong_optimizer_states_are_named(tiny_model, adamw, sgd):
    adamw, sgd = tiny_model(optimizer=adamw), tiny_model(optimizer=sgd)
    with pytest.raises(UserError, match="SGD has none"):
        sgd.load_optimizer_state(adamw.optimizer_state())
    with pytest.raises(UserError, match="second moments .* missing"):
        adamw.load_optimizer_state(sgd.optimizer_state())
    first = adamw.optimizer_state().first | {"model.norm.weight": np.zeros(3)}
    with pytest.raises(UserError, match="first moments: model.norm.weight has shape"):
        adamw.load_optimizer_state(OptimizerState(step=1, first=first, second=adamw.optimizer_state().second))


def test_float32_is_float32_whatever_x64_says(tiny_model, adamw, sft, sft_batch):
    """A float64 engine switches x64 on for the process; a float32 engine goes on with the same bits."""
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            model = tiny_model(optimizer=adamw)
            metrics = [model.update(sft, sft_batch(seed=seed), learning_rate=1e-3) for seed in range(3)]
            results.append((metrics, model.weights(), model.ema_weights()))
            assert all(value.dtype == np.float32 for value in model.weights().values())
    assert results[0][0] == results[1][0]
    _assert_equal(results[0][1], results[1][1])
    _assert_equal(results[0][2], results[1][2])


def test_averages_are_given_by_name(tiny_model, adamw, sft, sft_batch):
    """What an export asks for a part at a time."""
    model = tiny_model(optimizer=adamw)
    model.update(sft, sft_batch(), learning_rate=1e-3)
    whole = model.ema_weights()
    names = [*whole][3:0:-1]
    some = model.ema_weights(names)
    assert list(some) == names
    _assert_equal(some, {name: whole[name] for name in names})
    assert any((some[name] != value).any() for name, value in model.weights(names).items())


def _named_loss(logprobs):
    return logprobs.sum(), {"grad_norm": logprobs.sum()}


def test_mistakes_are_errors(tiny_model, adamw, sgd, sft, sft_batch):
    model = tiny_model(optimizer=adamw)
    with pytest.raises(ValueError, match="6 rows does not divide into micro-batches of 4"):
        model.update(sft, sft_batch(num_rows=6), learning_rate=1e-3)
    batch = sft_batch()
    with pytest.raises(ValueError, match="an array of the loss has 3 rows, the tokens have 4"):
        model.update(sft, dataclasses.replace(batch, arrays={"mask": batch.arrays["mask"][:3]}), learning_rate=1e-3)
    bare = dataclasses.replace(batch, arrays={}, denominators={})
    with pytest.raises(ValueError, match="grad_norm"):
        model.update(Loss(function=_named_loss, reads="logprobs"), bare, learning_rate=1e-3)
    with pytest.raises(ValueError, match="share a name"):
        model.update(sft, dataclasses.replace(batch, denominators={"mask": 1.0}), learning_rate=1e-3)
    with pytest.raises(ValueError, match="head='scalar'"):
        model.update(Loss(function=sft_loss, reads="scores"), batch, learning_rate=1e-3)
    model.update(sft, batch, learning_rate=1e-3)  # no mistake has spoilt the model
    frozen = tiny_model()
    for call in (lambda: frozen.update(sft, batch, learning_rate=1e-3), frozen.optimizer_state):
        with pytest.raises(ValueError, match="frozen"):
            call()
    with pytest.raises(ValueError, match="ema_decay"):
        tiny_model(optimizer=sgd).ema_weights()


def _assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
