"""The NumPy oracle against transformers' plain models, every family of the table: float64, hot weights, left padding,
600 positions. So that what says who is wrong is right itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.families.decoder import DecoderConfig
from diptych.families.family import read_model, supported_families
from diptych.parity.record import record
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Trace
from diptych.parity.truth import oracle
from diptych.parity.truth.truth import Truth, who
from diptych.recipe.load import load_recipe
from parity_tests.conftest import QUICKSTART, SMALL_DATA
from parity_tests.families import CASES, EXPERTS, VARIANTS, hot_weights, token_batch
from parity_tests.family_checks import output_error, wanted
from parity_tests.plain_models import plain_model, read

LIMIT = TOLERANCES["model"].float64


def oracle_outputs(name, head, change=None):
    model = read_model(CASES[name])
    weights = hot_weights(CASES[name], head, "float64")
    return oracle.forward(change(model) if change else model, head, weights, token_batch()).outputs


def plain_outputs(name, head):
    with torch.no_grad():
        return read(plain_model(CASES[name], hot_weights(CASES[name], head, "float64"), head), token_batch()).numpy()


def test_every_family_is_here():
    assert {config["model_type"] for config in CASES.values()} == set(supported_families())


@pytest.mark.parametrize("name", CASES)
def test_logprobs(name):
    expected, batch = plain_outputs(name, "lm"), token_batch()
    assert np.abs(expected).max() > 3  # hot
    assert output_error(oracle_outputs(name, "lm"), expected, wanted(batch, "lm")) <= LIMIT


@pytest.mark.parametrize("name", [name for name in CASES if name not in VARIANTS])
def test_scores(name):
    expected, batch = plain_outputs(name, "scalar"), token_batch()
    assert output_error(oracle_outputs(name, "scalar"), expected, wanted(batch, "scalar")) <= LIMIT


@pytest.mark.parametrize("name", EXPERTS)
def test_routing_gives_the_balance_loss(name):
    model, weights, batch = read_model(CASES[name]), hot_weights(CASES[name], "lm", "float64"), token_batch()
    routing = oracle.forward(model, "lm", weights, batch).routing
    assert routing is not None
    assert isinstance(model, DecoderConfig)
    routed = batch.attention.sum() * model.num_layers
    found = model.experts.count * float(routing.counts / routed @ routing.probability_sums) / routed
    with torch.no_grad():
        expected = float(plain_model(CASES[name], weights, "lm").balance_loss(batch))  # pyright: ignore
    assert abs(found - expected) <= TOLERANCES["function"].float64


CANARIES = {
    "the norm's eps": ("llama", lambda m: replace(m, norm=replace(m.norm, eps=1e-6))),
    "the kind of gelu": ("gpt2", lambda m: replace(m, activation="gelu")),
    "gelu cut short": ("bloom", lambda m: replace(m, activation="gelu_fast")),
    "a window one longer": ("mistral", lambda m: replace(m, windows=tuple(w + 1 for w in m.windows))),
    "an offset of the gain": ("gemma2", lambda m: replace(m, norm=replace(m.norm, offset=1.001))),
    "the rotation's base": (
        "qwen3",
        lambda m: replace(m, ropes=tuple(replace(rope, theta=rope.theta * 1.01) for rope in m.ropes)),
    ),
    "the cap of attention": ("gemma2", lambda m: replace(m, attention_softcap=2.01)),
    "the cap of the logits": ("gemma2", lambda m: replace(m, logit_softcap=3.01)),
    "the weights of experts": ("qwen3_moe", lambda m: replace(m, experts=replace(m.experts, normalized=False))),
    "attention's scale": ("olmo2", lambda m: replace(m, attention_scale=m.attention_scale * 1.001)),
    "ALiBi left out": ("bloom", lambda m: replace(m, alibi=False)),
}


@pytest.mark.parametrize("what", CANARIES)
def test_canary(what):
    name, change = CANARIES[what]
    error = output_error(oracle_outputs(name, "lm", change), plain_outputs(name, "lm"), wanted(token_batch(), "lm"))
    assert error > 100 * LIMIT


SETTINGS = [
    *SMALL_DATA, "rl.iterations=2", "rl.batch_size=8", "rl.micro_batch_size=8", "rl.mini_batches=1", "rl.epochs=1",
    "rollout.max_new_tokens=12", "rollout.gate=false", "rl.eval_prompts=8", "rl.kl_estimator=k3",
]  # fmt: skip
OF_THE_MODEL = ("logprobs", "ref_logprobs", "values", "scores", "policy/outputs", "policy/next_outputs",
                "critic/outputs", "critic/next_outputs", "kl", "shaped", "returns", "advantages")  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, hot_models) -> dict[str, Trace]:
    """Two PPO steps of JAX, and torch's replay of them, in float32."""
    models = [f"rl.policy_path={hot_models['policy']}", f"rl.reward.model_path={hot_models['reward']}"]
    recipe = load_recipe(QUICKSTART, [*SETTINGS, *models])
    root = tmp_path_factory.mktemp("recordings")
    a = record(recipe, engine="jax", output=root / "a", every=1, stages=("rl",))
    return {"jax": a, "torch": record(recipe, engine="torch", output=root / "b", every=1, stages=("rl",), replay=a)}


def masked(step, name: str, values: np.ndarray) -> np.ndarray:
    mask = step.tensors[name].mask
    return values if mask is None else values[step.array(mask).astype(bool)]


@pytest.mark.slow
def test_both_engines_are_right_about_every_rung_of_a_recorded_step(recordings):
    """What both recorded is within float32's noise of the truth, which was computed from JAX's trace."""
    limit = TOLERANCES["model"].at("float32")
    for number in (0, 1):
        own = recordings["jax"].read("rl", number)
        about = Truth(recordings["jax"], own)
        for engine, trace in recordings.items():
            step = trace.read("rl", number)
            source = about if engine == "jax" else Truth(trace, step)
            for name in OF_THE_MODEL:
                true = (source if "next" in name else about).of(name)
                assert isinstance(true, np.ndarray), name
                error = np.abs(masked(own, name, step.array(name).astype(np.float64) - true)).max()
                is_zero = name == "kl" and number == 0  # policy and reference are still the same
                assert is_zero or error > 0, (engine, number, name)
                assert error < limit * max(1.0, np.abs(true).max()), (engine, number, name)
            losses = [name for name in step.metrics if name.startswith(("policy/loss", "critic/loss"))]
            assert len(losses) > 8
            for name in losses:
                assert step.metrics[name] == pytest.approx(about.of(name), rel=1e-4, abs=1e-6), (engine, name)
            for role in ("policy", "critic"):
                found = source.consistency(role)
                assert found
                assert max(found.values()) < TOLERANCES["moment_relative_l2"].at("float32"), (engine, role, found)


@pytest.mark.slow
def test_a_wrong_gradient_of_either_side_is_recognised(recordings):
    a, b = (recordings[engine].read("rl", 0) for engine in ("jax", "torch"))
    about = Truth(recordings["jax"], a)
    for name in ("policy/gradient/model.layers.1.self_attn.q_proj.weight", "critic/gradient/model.norm.weight"):
        mine, theirs = a.array(name), b.array(name)
        noise = TOLERANCES["gradient_relative_l2"].at("float32") * float(np.linalg.norm(mine))
        for sides, wrong in ((mine, theirs * 1.001), "B is wrong"), ((mine * 1.001, theirs), "A is wrong"):
            true, *found = about.gradient_verdict(name, *sides)
            assert who(*(abs(true - one) for one in found), noise) == wrong, name
