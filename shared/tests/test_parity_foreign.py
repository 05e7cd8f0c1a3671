"""Recording another trainer: what is written, what is refused, and what real recordings of TRL and Tunix say of us."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from diptych.algorithms.dialects import DIALECTS, experience
from diptych.data.batches import join
from diptych.engine import Completions, PromptBatch
from diptych.errors import UserError
from diptych.parity.doctor.vocabulary import MEANINGS, canonical, settings_of
from diptych.parity.foreign.recording import SETTINGS, Recording, Update, gradients_of, weights_of
from diptych.parity.recorder import given_probe
from diptych.parity.steps import rung_of
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Trace
from diptych.recipe.load import load_recipe
from diptych.stages.rollout import Rollout

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).parent / "foreign_traces"
LIMIT = TOLERANCES["function"].float32
CONFIG = {"model_type": "llama", "vocab_size": 50}
ROWS, PROMPT, NEW = 3, 4, 5
LENGTHS = np.array([5, 2, 4])


def recording(folder, **changes):
    about = {"producer": "mine", "precision": "float32", "models": {"policy": CONFIG, "critic": CONFIG}}
    return Recording(folder / "trace", **(about | changes))


def update(seed, **changes):
    draws = np.random.default_rng(seed)
    before, gradients = (
        {"a.weight": draws.normal(size=(2, 3)).astype(np.float32), "b.bias": draws.normal(size=2).astype(np.float32)}
        for _ in range(2)
    )
    after = {name: value - 0.1 * gradients[name] for name, value in before.items()}
    made = {"weights_before": before, "gradients": gradients, "weights_after": after, "loss": 0.5, "updates": 0}
    return Update(**(made | {"learning_rate": 0.1} | changes))


def step(**changes):
    """The arguments of a healthy ppo_step."""
    draws = np.random.default_rng(0)
    mask = np.arange(NEW) < LENGTHS[:, None]

    def normal(*shape):
        return draws.normal(size=shape).astype(np.float32)

    made = {
        "prompts": draws.integers(3, 50, (ROWS, PROMPT)),
        "prompt_mask": np.arange(PROMPT) >= np.array([0, 2, 1])[:, None],
        "responses": draws.integers(3, 50, (ROWS, NEW)),
        "response_mask": mask,
        "logprobs": np.where(mask, -np.abs(normal(ROWS, NEW)), 1.0).astype(np.float32),  # TRL's filler
        "ref_logprobs": -np.abs(normal(ROWS, NEW)),
        "values": normal(ROWS, NEW),
        "returns": normal(ROWS, NEW),
        "advantages": normal(ROWS, NEW),
        "shaped": normal(ROWS, NEW),
        "kl": normal(ROWS),
        "scores": normal(ROWS),
        "value_mask": np.arange(NEW) < LENGTHS[:, None] + 1,
        "policy": update(1),
        "critic": update(2),
        "metrics": {"objective/kl": np.float32(0.25)},
    }
    return made | changes


def written(folder, **changes):
    with recording(folder) as trace:
        trace.ppo_step(**step(**changes))
    return Trace(folder / "trace").read("rl", 0)


def test_what_is_recorded_is_what_was_given(tmp_path):
    given, found = step(), written(tmp_path)
    mask = given["response_mask"]
    for name in ("logprobs", "ref_logprobs"):
        np.testing.assert_array_equal(found.array(name), np.where(mask, given[name], 0))
    np.testing.assert_array_equal(found.array("values"), np.where(given["value_mask"], given["values"], 0))
    np.testing.assert_array_equal(found.array("used/tokens"), np.where(mask, given["responses"], 0))
    for name in ("scores", "kl"):
        np.testing.assert_array_equal(found.array(name), given[name])
    for role in ("policy", "critic"):
        for group, own in (
            ("start/weights", "weights_before"),
            ("gradient", "gradients"),
            ("weights", "weights_after"),
        ):
            for name, value in getattr(given[role], own).items():
                np.testing.assert_array_equal(found.array(f"{role}/{group}/{name}"), value)
        assert found.metrics[f"{role}/loss"] == 0.5
        assert found.metrics[f"{role}/step"] == 0
        square = sum((value.astype(np.float64) ** 2).sum() for value in given[role].gradients.values())
        assert found.metrics[f"{role}/grad_norm"] == pytest.approx(square**0.5, rel=1e-12)
    assert found.metrics["objective/kl"] == 0.25


def test_every_name_has_a_meaning(tmp_path):
    found = written(tmp_path, policy=update(1, first_after=update(3).gradients, second_after=update(4).gradients))
    for name, one in found.tensors.items():
        assert rung_of(name) is not None or "/start/" in name, name
        assert one.mask is None or one.mask in found.tensors
        assert one.phase == ("given" if "/probe/" in name or "/start/" in name else "made")


def test_the_probe_batch_is_where_our_own_ppo_puts_things(tmp_path):
    """Columns, positions and the two alignments are those of `stages.rollout`, of the rows that were trained on."""
    chosen = np.array([2, 0])
    given = step(trained_rows=chosen)
    found = written(tmp_path, trained_rows=chosen)
    attention, mask = given["prompt_mask"], given["response_mask"]
    positions = np.where(attention, attention.cumsum(1) - 1, 0).astype(np.int32)
    prompts = PromptBatch(tokens=found.array("prompts/tokens"), attention=attention, positions=positions)
    zeros = np.zeros((ROWS, NEW), np.float32)
    done = Completions(
        tokens=found.array("used/tokens"), mask=mask, logprobs=zeros, margins=zeros, finish=np.zeros(ROWS, np.int32)
    )
    rollout = Rollout(prompts=prompts, completions=done, tokens=join(prompts, done), texts=[])
    expected = rollout.tokens.take(chosen)
    for role, place, own, keep in (
        ("policy", rollout.at_response, {"old_logprobs": "logprobs", "advantages": "advantages"}, mask),
        ("critic", rollout.at_state, {"old_values": "values", "returns": "returns"}, given["value_mask"]),
    ):
        probe = given_probe(found, role)
        for name in ("tokens", "attention", "positions"):
            np.testing.assert_array_equal(getattr(probe.tokens, name), getattr(expected, name))
        assert probe.tokens.first == expected.first
        assert probe.denominators == {"num_tokens": keep[chosen].sum()}
        np.testing.assert_array_equal(probe.arrays["mask"], place(keep.astype(np.float32))[chosen])
        for name, source in own.items():
            array = np.where(keep, given[source], 0).astype(np.float32)
            np.testing.assert_array_equal(probe.arrays[name], place(array)[chosen])
    columns = np.broadcast_to(np.arange(PROMPT - 1, PROMPT - 1 + NEW), (ROWS, NEW))
    np.testing.assert_array_equal(given_probe(found, "critic").arrays["columns"], rollout.at_state(columns)[chosen])


class Tensor:
    """What torch's tensors look like from here."""

    def __init__(self, values, itemsize=4):
        self.values = np.asarray(values)
        self.dtype = type("dtype", (), {"itemsize": itemsize})()
        self.grad = None

    shape = property(lambda self: self.values.shape)

    def detach(self):
        return self

    def cpu(self):
        return self

    def is_floating_point(self):
        return True

    def float(self):
        return Tensor(self.values.astype(np.float32))

    def numpy(self):
        assert self.dtype.itemsize > 2, "torch has no NumPy type for bfloat16"
        return self.values


def test_arrays_of_other_frameworks(tmp_path):
    """torch's bfloat16 (no NumPy type), JAX's (an ml_dtypes one), and lists of Python floats."""
    values = step()["values"].astype(ml_dtypes.bfloat16)
    exact = values.astype(np.float32)
    changes = {"values": values, "returns": Tensor(values, itemsize=2), "scores": [0.1, 0.2, 1.0]}
    found = written(tmp_path, **changes)
    np.testing.assert_array_equal(found.array("values"), np.where(step()["value_mask"], exact, 0))
    np.testing.assert_array_equal(found.array("returns"), np.where(step()["value_mask"], exact, 0))
    np.testing.assert_array_equal(found.array("scores"), np.array([0.1, 0.2, 1.0], np.float32))


def test_weights_and_gradients_are_copies():
    parameter = Tensor(np.ones(2, np.float32))
    module = type("Module", (), {"named_parameters": lambda self: [("a", parameter)]})()
    weights, nothing = weights_of(module), gradients_of(module)
    parameter.grad = Tensor(np.full(2, 3.0, np.float32))
    gradients = gradients_of(module)
    parameter.values[:] = 5
    parameter.grad.values[:] = 5
    np.testing.assert_array_equal(weights["a"], [1, 1])
    np.testing.assert_array_equal(gradients["a"], [3, 3])
    np.testing.assert_array_equal(nothing["a"], [0, 0])


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def sides(which, **changes):
    return {which: update(1, **changes)}


BAD = {
    "a response per prompt": ({"responses": step()["responses"][:2]}, "response_mask has shape"),
    "token-aligned instead of response-aligned": (
        {"logprobs": np.zeros((ROWS, PROMPT + NEW), np.float32)}, "logprobs has shape [3, 9], expected [3, 5]"),
    "right-padded prompts": (
        {"prompt_mask": step()["prompt_mask"][:, ::-1]}, "prompt_mask: row 1 is not a prompt padded on the left"),
    "a hole in a response": (
        {"response_mask": changed(step()["response_mask"], (0, 2), False)}, "response_mask: row 0 must be True"),
    "an empty response": ({"response_mask": changed(step()["response_mask"], 1, False)}, "row 1 is empty"),
    "a mask of floats": ({"response_mask": step()["values"]}, "response_mask must be a mask"),
    "labels": ({"responses": changed(step()["responses"], (0, 0), -100)}, "labels such as -100"),
    "ids beyond the vocabulary": ({"responses": changed(step()["responses"], (0, 0), 50)}, "the model has 0 to 49"),
    "tokens that are floats": ({"prompts": step()["prompts"].astype(np.float32)}, "prompts must be integers"),
    "not a number where it counts": ({"values": changed(step()["values"], (1, 2), np.nan)}, "values is nan at [1, 2]"),
    "log-probabilities above 0": ({"logprobs": -step()["logprobs"]}, "a log-probability is at most 0"),
    "too wide a float": ({"returns": step()["returns"].astype(np.float64)}, "returns is float64, the recording"),
    "an update without its inputs": ({"advantages": None}, "update of the policy was given without advantages"),
    "the same weights twice": (
        sides("policy", weights_after=update(1).weights_before), "weights_before and weights_after are the same"),
    "gradients that were zeroed": (
        sides("critic", gradients={name: 0 * value for name, value in update(1).gradients.items()}), "zero_grad()"),
    "clipped gradients": (sides("policy", grad_norm=17.0), "the trainer reports 17"),
    "a tensor without gradient": (
        sides("policy", gradients={"a.weight": update(1).gradients["a.weight"]}), "b.bias is missing in gradients"),
    "a transposed gradient": (
        sides("policy", gradients=update(1).gradients | {"a.weight": update(1).gradients["a.weight"].T}),
        "gradients: a.weight has shape [3, 2], in weights_before [2, 3]"),
    "no weights": (sides("policy", weights_before={}), "weights_before is empty"),
    "a loss of many numbers": (sides("policy", loss=np.zeros(3)), "loss: loss must be one number"),
    "rows twice": ({"trained_rows": np.array([0, 0])}, "trained_rows must be different rows"),
    "a critic's outputs": (sides("critic", outputs=step()["values"]), "a critic's outputs are `values`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_where_it_was_made(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(UserError) as error, recording(tmp_path) as trace:
        trace.ppo_step(**step(**changes))
    assert message in str(error.value)
    assert "rl step 0" in str(error.value)


def sft(**changes):
    attention = np.arange(6) >= np.array([0, 2])[:, None]
    made = {
        "tokens": np.random.default_rng(0).integers(3, 50, (2, 6)),
        "attention": attention,
        "trained": attention & (np.arange(6) > 3),
        "model": update(1),
    }
    return made | changes


def test_a_supervised_step(tmp_path):
    outputs = -np.ones((2, 6), np.float32)
    with recording(tmp_path, models={"sft": CONFIG}) as trace:
        trace.sft_step(**sft(model=update(1, outputs=outputs, metrics={"loss/nll": 0.5})))
    found = Trace(tmp_path / "trace").read("sft", 0)
    begins = np.array([[0], [2]]) == np.arange(6)
    np.testing.assert_array_equal(found.array("model/outputs"), np.where(sft()["attention"] & ~begins, -1, 0))
    assert given_probe(found, "model").denominators == {"num_tokens": 4.0}
    assert found.metrics["model/loss/loss/nll"] == 0.5


BAD_SFT = {
    "the column before": ({"trained": changed(sft()["trained"], (1, 2), True)}, "row 1, column 2, which is its row's"),
    "padding": ({"trained": ~sft()["attention"] | sft()["trained"]}, "is padding"),
    "nothing": ({"trained": np.zeros((2, 6), bool)}, "marks no token"),
    "a hole": ({"attention": changed(sft()["attention"], (0, 3), False)}, "has a hole"),
}


@pytest.mark.parametrize("name", BAD_SFT)
def test_supervised_steps_that_are_refused(name, tmp_path):
    changes, message = BAD_SFT[name]
    with (
        pytest.raises(UserError, match=message),
        recording(tmp_path, models={"sft": CONFIG}) as trace,
    ):
        trace.sft_step(**sft(**changes))


def test_hooks_that_never_fire_are_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing was recorded"), recording(tmp_path):
        pass


def test_steps_count_up(tmp_path):
    with recording(tmp_path) as trace:
        trace.ppo_step(**step(step=7))
        with pytest.raises(UserError, match="step 3 after step 7"):
            trace.ppo_step(**step(step=3))


HEADERS = {
    "almost a setting": ({"settings": {"cliprange": 0.2}}, "did you mean clip_range"),
    "an unknown role": ({"models": {"actor": CONFIG}}, "unknown role 'actor'"),
    "no configuration": ({"models": {"policy": {"layers": 2}}}, "config.json"),
    "not JSON": ({"settings": {"lam": object()}}, "must be JSON"),
    "an infinite setting": ({"settings": {"lam": float("inf")}}, "must be JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_refused(name, tmp_path):
    changes, message = HEADERS[name]
    with pytest.raises(UserError, match=message):
        recording(tmp_path, **changes)


def test_settings_are_those_that_doctor_and_replay_read(tmp_path):
    recipe = settings_of(load_recipe(ROOT / "recipes" / "quickstart.yaml"))
    assert set(SETTINGS) <= MEANINGS.keys()
    assert set(SETTINGS) <= recipe.keys()
    assert canonical(dict.fromkeys(SETTINGS, 1)).keys() == set(SETTINGS)
    recording(tmp_path, settings=dict.fromkeys(MEANINGS, 1)).close()


def test_a_stranger_needs_numpy_and_safetensors_alone():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'shared')!r})\n"
        "import diptych.parity.foreign.recording\n"
        "known = sys.stdlib_module_names | {'numpy', 'safetensors', 'diptych', 'ml_dtypes'}\n"
        "print(sorted({name.split('.')[0] for name, module in sys.modules.items()\n"
        "              if getattr(module, '__file__', None)} - known - before))"
    )
    code = "import sys; before = {name.split('.')[0] for name in sys.modules}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What TRL and Tunix really computed (foreign_traces/README.md), against our formulas of their dialects.


def made_by(trace, step, dialect, *, scores=None):
    """What `experience` makes of a recorded step."""
    settings = trace.provenance["settings"]
    ended = step.array("used/finish").astype(bool)
    scores = step.array("scores") if scores is None else scores
    penalty = settings.get("missing_eos_penalty", 0.0)
    return experience(
        dialect,
        **{name: step.array(name) for name in ("logprobs", "ref_logprobs", "values")},
        scores=scores - (penalty * ~ended).astype(np.float32),
        mask=step.array("used/mask"),
        ended=ended,
        **{name: settings[name] for name in ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards")},
        score_clip=None,
    )


def distance(step, made):
    """The largest difference of rewards, returns, advantages and KL; inf where masks differ."""
    pairs = {
        "shaped": made.rewards, "returns": made.returns, "advantages": made.advantages, "kl": made.kl_per_response,
    }  # fmt: skip
    same = all(np.array_equal(step.array(name), getattr(made, name)) for name in ("policy_mask", "value_mask"))
    error = max(float(np.abs(step.array(name) - array).max()) for name, array in pairs.items())
    return error if same else np.inf


def test_trl_computes_what_our_dialect_says():
    trace = Trace(REAL / "trl-1.12.0")
    for recorded in trace:
        assert recorded.array("used/mask").sum(axis=1).min() < 8  # the slot after the stop token is there
        assert distance(recorded, made_by(trace, recorded, "trl")) <= LIMIT
        for name in DIALECTS.keys() - {"trl"}:
            assert distance(recorded, made_by(trace, recorded, name)) > 1000 * LIMIT, name
        doubled = replace(recorded, tensors=recorded.tensors | {"scores": recorded.tensors["kl"]})
        assert distance(recorded, made_by(trace, doubled, "trl")) > 1000 * LIMIT


def test_tunix_truncates_rewards_to_integers():
    """Its own trace proves it: with the scores that its reward function returned nothing fits, cut down to integers
    everything does."""
    trace = Trace(REAL / "tunix-0.1.7")
    for recorded in trace:
        scores = recorded.array("scores")
        assert (scores != np.trunc(scores)).any()
        assert distance(recorded, made_by(trace, recorded, "verl")) > 0.1
        assert distance(recorded, made_by(trace, recorded, "verl", scores=np.trunc(scores))) <= LIMIT
