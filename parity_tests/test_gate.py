"""The gate on both engines: what is sound passes in every precision, and one corrupted weight, position, mask or head
map of the decode path is stopped. And PPO through a rollout server in a process of its own (`stand_in_server`), whose
mismatch is corrected by truncated importance sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.algorithms.importance import importance_weights
from diptych.algorithms.losses import ppo_policy_loss
from diptych.data.examples import PromptExample
from diptych.data.tokenizer import Tokenizer
from diptych.engine import (
    EngineSettings,
    Loss,
    Model,
    ModelSpec,
    OptimizerSpec,
    Precision,
    Sampling,
    TokenBatch,
    TrainBatch,
    load_engine,
)
from diptych.errors import InvariantError, UserError
from diptych.families.family import read_model, tensor_shapes
from diptych.layout import Layout, Zero
from diptych.parity.compare import tensors
from diptych.parity.tolerances import TOLERANCES
from diptych.recipe.load import load_recipe
from diptych.run.metrics import read_metrics
from diptych.stages.gate import Gate, check_gate
from diptych.stages.pipeline import run_recipe
from parity_tests import stand_in_server
from parity_tests.conftest import QUICKSTART
from parity_tests.family_checks import quick_compilation

ENGINES = ("jax", "torch")
VOCAB = 280
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
SAMPLING = Sampling(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=24, stop_token_ids=(2,))


@pytest.fixture(autouse=True)
def compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["sunny greetings from the sea", "rain again"]
    return Tokenizer.train(texts, vocab_size=VOCAB, directory=tmp_path_factory.mktemp("tokenizer"))


def hot_weights() -> dict[str, np.ndarray]:
    """Standard deviation 0.15, gains away from 1: on initial-like weights a third of seeded bugs hide."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1.5, shape) if name.endswith("norm.weight") else rng.normal(0, 0.15, shape)
        for name, shape in tensor_shapes(read_model(CONFIG), "lm").items()
    }


def build(engine: str, precision: Precision, *, trained: bool = False) -> Model:
    # DeepSpeed has no bfloat16 at stage 0; elsewhere stage 0 is the quickest.
    layout = Layout(zero=Zero(stage=1 if precision == "bfloat16" else 0))
    return load_engine(engine, EngineSettings(precision=precision, device="cpu", layout=layout)).model(
        ModelSpec(
            config=CONFIG,
            weights=hot_weights(),
            head="lm",
            optimizer=OptimizerSpec(name="adamw") if trained else None,
            micro_batch_size=8,
        )
    )


def gate(model: Model, tokenizer: Tokenizer, precision: Precision = "float32") -> Gate:
    lengths = (3, 5, 9, 14, 21)
    train = [
        PromptExample(row=row, tokens=(random.uniforms(3, "gate", step=0, rows=[row], num_positions=length)[0]
                                       * VOCAB).astype(np.int64), text="", data={})
        for row, length in enumerate(lengths)
    ]  # fmt: skip
    return check_gate(
        model, model, train, recipe=load_recipe(QUICKSTART), sampling=SAMPLING, tokenizer=tokenizer,
        precision=precision, name=f"the engine in {precision}", quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sound_engine_passes(engine, precision, tokenizer):
    found = gate(build(engine, precision), tokenizer, precision)
    assert found.tokens == 5 * 24
    assert found.gap_max <= TOLERANCES["sampler_gap"].at(precision) / 10
    assert precision == "bfloat16" or found.near_ties == 0


def seed_torch(bug: str, patch: pytest.MonkeyPatch) -> None:
    """Seed a bug into the torch engine's decode path, which training and scoring do not share."""
    import torch

    from diptych_torch import decode
    from diptych_torch.model import Network
    from diptych_torch.program import Program

    generate = decode.Decoder.generate
    generating: list[bool] = []

    def bugged_generate(self: Any, *inputs: Any, **settings: Any) -> Any:
        weights = self._network.named_weights()
        changes: dict[str, Callable[[Any], Any]] = {}
        if bug == "weight":
            changes = {
                "layers.1.self_attn.o_proj.weight": lambda w: w.index_put(
                    (torch.tensor(3), torch.tensor(5)), w.new_tensor(2.0)
                )
            }
        elif bug == "head map":
            changes = {f"layers.1.self_attn.{kind}_proj.weight": lambda w: w.roll(8, 0) for kind in "kv"}
        named = {name: weight for name, weight in weights.items() if name.endswith(tuple(changes))} if changes else {}
        assert len(named) == len(changes)
        before = {name: weight.data for name, weight in named.items()}
        for name, weight in named.items():
            weight.data = next(change for end, change in changes.items() if name.endswith(end))(weight.data)
        generating.append(True)
        try:
            return generate(self, *inputs, **settings)
        finally:
            generating.clear()
            for name, weight in named.items():
                weight.data = before[name]

    def bugged(hidden_states: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, tokens: Any, positions: Any, segments: Any, *rest: Any) -> Any:
            if generating and bug == "position" and tokens.shape[1] == 1:
                positions = positions.clone()
                positions[1] += 1
            if generating and bug == "mask" and tokens.shape[1] > 1:
                segments = segments.clone()
                segments[1] = segments[1].max()  # the padding before this prompt is read
            return hidden_states(self, tokens, positions, segments, *rest)

        return changed

    patch.setattr(decode.Decoder, "generate", bugged_generate)
    for one in (Network, Program):  # whichever of them decodes
        patch.setattr(one, "hidden_states", bugged(one.hidden_states))


def seed_jax(bug: str, patch: pytest.MonkeyPatch) -> None:
    """The same into the JAX engine's: other values go into the compiled programs, which stay as they are."""
    import jax

    from diptych_jax import decode

    generate, dealt = decode.generate, decode._dealt

    def changed(path: Any, value: Any) -> Any:
        name, there = jax.tree_util.keystr(path), np.array(value)
        if bug == "weight" and name == ".layers[1].output.value":
            there[0, 3, 5] = 2.0
        elif bug == "head map" and name in (".layers[1].key.value", ".layers[1].value.value"):
            there = there[:, ::-1].copy()
        return jax.device_put(there, value.sharding)  # an operation on `value` would be a compilation

    def bugged_generate(model: Any, *inputs: Any, **settings: Any) -> Any:
        return generate(jax.tree_util.tree_map_with_path(changed, model), *inputs, **settings)

    def bugged_dealt(prompts: Any, mesh: Any) -> Any:
        tokens, padding = dealt(prompts, mesh)
        there = np.array(padding)
        there[1] -= 1  # a column of padding is read, and every position is one too high
        return tokens, jax.device_put(there, padding.sharding)

    patch.setattr(decode, "generate", bugged_generate)
    if bug == "mask":
        patch.setattr(decode, "_dealt", bugged_dealt)


SEEDS = {
    "torch": (seed_torch, ("weight", "position", "mask", "head map")),
    "jax": (seed_jax, ("weight", "mask", "head map")),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_canary_a_corrupted_decode_path_is_stopped(engine, tokenizer, monkeypatch):
    model, (seed, bugs) = build(engine, "float32"), SEEDS[engine]
    for bug in bugs:
        with monkeypatch.context() as patch:
            seed(bug, patch)
            for band in ("bfloat16", "float32"):  # such bugs are beyond either
                with pytest.raises(InvariantError, match="what generates is not what is trained") as caught:
                    gate(model, tokenizer, band)
        if bug in ("position", "mask"):  # one row is touched, and one row is named
            assert "row 2 of data.prompts (5 tokens), position" in str(caught.value), bug
            assert "of 1 of the 5 rows" in str(caught.value), bug
    gate(model, tokenizer)  # the training weights were never touched


# --- a server in a process of its own --------------------------------------------------------------------------------

SERVED = [
    "stages=[rl]", "model.new=null", "data.demonstrations.limit=300", "data.prompts.limit=100", "rl.iterations=3",
    "rl.batch_size=8", "rl.micro_batch_size=8", "rl.mini_batches=1", "rl.epochs=2", "rl.eval_every=3",
    "rl.eval_prompts=8", "rl.learning_rate=1e-3", "rl.max_kl=null", "rollout.max_new_tokens=16",
]  # fmt: skip


@pytest.fixture
def train(hot_models, tmp_path, capsys):
    def train(*overrides: str, output: str = "run") -> tuple[str, list[dict[str, Any]]]:
        """What the run said, and the metrics of its iterations."""
        models = (f"model.path={hot_models['policy']}", f"rl.reward.model_path={hot_models['reward']}")
        recipe = load_recipe(QUICKSTART, [*SERVED, *models, *overrides])
        run_recipe(recipe, engine_name="torch", output=tmp_path / output)
        rows = read_metrics(tmp_path / output / "metrics.jsonl")
        return capsys.readouterr().err, [row for row in rows if "rollout/tokens_crc32" in row]

    return train


@pytest.mark.slow
def test_an_exact_server_is_the_native_engine(train):
    _, native = train(output="native")
    said, served = train("rollout.engine=parity_tests.stand_in_server:exact", output="served")
    [client] = stand_in_server.made[-1:]
    assert not client.is_running
    assert [version.partition("-")[2] for version in client.versions] == ["0", "2", "4", "6"]
    assert (
        "gate: rollout server parity_tests.stand_in_server:exact generates what is trained: 128 greedy tokens" in said
    )
    for here, there in zip(native, served, strict=True):
        assert here["rollout/tokens_crc32"] == there["rollout/tokens_crc32"]
        for name in ("objective/kl", "objective/scores", "grad_norm/policy"):
            assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-5), name
    assert native[-1]["eval/score"] == served[-1]["eval/score"]
    assert "rollout/margin_min" not in served[0]
    assert "timing_s/switch" in served[0]


def test_a_servers_mismatch_is_weighed(train):
    target = "rollout.engine=parity_tests.stand_in_server:rounded"
    with pytest.raises(UserError, match="computes in bfloat16 and the policy is trained in float32: set rl.importance"):
        train(target, output="no cap")
    assert not stand_in_server.made[-1].is_running
    said, rows = train(target, "rl.importance_cap=1.005", output="capped")
    assert "stand_in_server:rounded generates what is trained" in said
    assert "(limit 3e-01)" in said  # the coarser precision's
    for row in rows:  # beyond float32's band, which would stop a run without the cap
        assert row["rollout/logprob_gap_max"] > TOLERANCES["sampler_gap"].at("float32")
        assert row["policy/first_ratio_deviation_max"] < TOLERANCES["first_ratio"].at("float32")
        assert row["importance/weight_max"] == pytest.approx(1.005)
        assert 0 < row["importance/truncated"] < 0.5
        assert 0.9 < row["importance/effective_sample_size"] < 1
        assert row["importance/weight_mean"] != 1


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("stale", r"stand_in_server:stale generated with weights of version '\w+-0', and the policy's are '\w+-2'"),
        ("corrupted", r"what generates is not what is trained. rollout server \S+:corrupted completed 8 prompts"),
    ],
)
def test_canary_a_broken_server_is_stopped_and_closed(server, message, train):
    with pytest.raises(InvariantError, match=message):
        train(f"rollout.engine=parity_tests.stand_in_server:{server}", "rl.importance_cap=2")
    assert not stand_in_server.made[-1].is_running


def test_both_engines_weigh_alike():
    """Gradients of the weighted loss in float64, leaf by leaf; and the weights are not without effect."""
    tokens = left_padded()
    shape = tokens.tokens.shape
    rng = np.random.default_rng(4)
    mask = tokens.attention & (np.arange(shape[1]) >= tokens.first)
    arrays = {
        "old_logprobs": rng.normal(-4, 1, shape), "advantages": rng.normal(0, 1, shape),
        "mask": mask.astype(np.float64),
    }  # fmt: skip
    arrays["weights"] = importance_weights(arrays["old_logprobs"], rng.normal(-4, 1, shape), mask, cap=2.0)
    loss = Loss(function=ppo_policy_loss, reads="logprobs", options=(("clip_range", 0.2),), entropy=True)
    step = TrainBatch(tokens=tokens, arrays=arrays, denominators={"num_tokens": float(mask.sum())})
    plain = replace(step, arrays={name: value for name, value in arrays.items() if name != "weights"})
    limit = TOLERANCES["gradient_relative_l2"].at("float64")
    found = {}
    for engine in ENGINES:
        model = build(engine, "float64", trained=True)
        found[engine] = model.gradients(loss, step)
        assert tensors("without weights", model.gradients(loss, plain), found[engine], limit=0.01)  # canary
    assert not tensors("gradients", found["jax"], found["torch"], limit=limit)


def left_padded() -> TokenBatch:
    tokens = random.uniforms(5, "weighted", step=0, rows=range(4), num_positions=12) * VOCAB
    attention = np.arange(12) >= np.array([[0], [2], [3], [1]])
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0)
    return TokenBatch(
        tokens=tokens.astype(np.int32), attention=attention, positions=positions.astype(np.int32), first=5
    )
