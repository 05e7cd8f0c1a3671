"""What differs between two setups is said, weighed, and said of one side where only that knows it."""

import argparse
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from diptych.errors import UserError
from diptych.parity.doctor.doctor import command, describe, diagnose
from diptych.parity.doctor.setups import read_setup
from diptych.parity.trace import Step, TraceWriter
from diptych.recipe.load import dump_recipe, load_recipe
from diptych.run.directory import RunDirectory

RECIPE = """\
name: small
stages: [rl]
model: {path: somewhere}
data:
  prompts: {path: "task:postcards", limit: 64}
  max_prompt_tokens: 64
rl:
  reward: {function: "reward.py:score"}
  kl_coef: 0.05
"""
GPT2 = {
    "model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
ENVIRONMENT = {
    "diptych": "0.1.0", "platform": "Linux-x", "machine": "x86_64", "processors": 2, "memory_gib": 8.0,
    "packages": {"numpy": "2.0", "torch": "2.13"},
}  # fmt: skip
JAX = {"engine": "jax", "platform": "cpu", "jax_enable_x64": "False", "jax_default_matmul_precision": "highest"}
TORCH = {"engine": "torch", "device": "cpu", "float32_matmul_precision": "highest", "tf32": "False"}


def recipe_file(path, text=RECIPE):
    path.write_text(text)
    return path


def model(path, config=GPT2, seed=0):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    rng = np.random.default_rng(seed)
    save_file({"wte.weight": rng.normal(size=(64, 16)).astype(np.float32)}, path / "model.safetensors")
    return path


def trace(path, name="jax", *, recipe=RECIPE, environment=ENVIRONMENT, own=JAX, variables=None, **more):
    recipe_file(path.with_suffix(".yaml"), recipe)
    provenance = {
        "recipe": dump_recipe(load_recipe(path.with_suffix(".yaml"))), "seed": 0, "engine": name,
        "environment": {**environment, "engine_environment": own}, "variables": variables or {}, "replay": None,
        "models": {"policy": {"config": GPT2, "weights": "a" * 64}}, "depth": "tensors",
        "dropout": 0.0, "pad_side": "left",
        "tokenizers": {"policy": {"fingerprint": "00000001", "pad_token_id": 0}},
        "data": {"prompts": {"train": 64, "fingerprint": "12345678"}},
        **more,
    }  # fmt: skip
    with TraceWriter(path, producer={"name": name, "precision": "float32"}, provenance=provenance) as writer:
        writer.add(Step(stage="rl", step=0, metrics={"loss": 1.0}))
    return path


def run(path, engine="jax", text=RECIPE, own=JAX, **environment):
    recipe = load_recipe(recipe_file(path.with_suffix(".yaml"), text))
    record = {**ENVIRONMENT, **environment, "engine_environment": own}
    return RunDirectory.create(path, recipe, engine=engine, environment=record, resume=False, stages=("rl",)).path


def code(a, b=None, *, as_json=False):
    return command(argparse.Namespace(a=a, b=b, json=as_json))


def counted(a, b):
    """The differences that count: (group, key)."""
    return [(one.group, one.key) for one in diagnose(read_setup(a), read_setup(b)).of("number")]


def test_both_engines_on_one_recipe_are_well(tmp_path, capsys):
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b", "torch", own=TORCH)
    assert code(a, b) == 0
    assert "nothing that can change a number differs" in capsys.readouterr().out
    assert code(run(tmp_path / "c"), run(tmp_path / "d", "torch", own=TORCH)) == 0
    assert code(a, tmp_path / "c") == code(tmp_path / "a.yaml", a) == code(tmp_path / "a.yaml") == 0


# What is planted in B, and what must be said.
PLANTED = [
    ({"recipe": RECIPE.replace("kl_coef: 0.05", "kl_coef: 0.1")}, ("recipe", "rl.kl_coef")),
    ({"recipe": RECIPE + "  optimizer: {eps: 1.0e-8}\n"}, ("recipe", "rl.optimizer.eps")),
    ({"recipe": "seed: 3\n" + RECIPE}, ("recipe", "seed")),
    (
        {"models": {"policy": {"config": {**GPT2, "layer_norm_epsilon": 1e-6}, "weights": "a" * 64}}},
        ("model", "policy: layer_norm_epsilon"),
    ),
    ({"models": {"policy": {"config": GPT2, "weights": "b" * 64}}}, ("weights", "policy")),
    ({"data": {"prompts": {"train": 64, "fingerprint": "87654321"}}}, ("data", "prompts/fingerprint")),
    ({"tokenizers": {"policy": {"fingerprint": "00000002", "pad_token_id": 0}}}, ("tokenizer", "policy/fingerprint")),
    ({"own": {**JAX, "jax_default_matmul_precision": "default"}}, ("precision", "matmul_precision")),
    ({"variables": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}}, ("variables", "XLA_FLAGS")),
    ({"variables": {"NVIDIA_TF32_OVERRIDE": "1"}}, ("variables", "NVIDIA_TF32_OVERRIDE")),
]


@pytest.mark.parametrize(("planted", "expected"), PLANTED)
def test_what_can_change_a_number_counts(tmp_path, planted, expected):
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b", **planted)
    assert counted(a, b) == [expected]
    assert code(a, b) == code(b, a) == 1


NOTES = [
    {"recipe": RECIPE.replace("name: small", "name: other")},
    {"recipe": RECIPE + "checkpoint: {every: 5}\n"},
    {"recipe": RECIPE + "layout: {remat: none}\n"},
    {"recipe": RECIPE + "logprob_chunk: 77\n"},
    {"recipe": RECIPE + "sft: {epochs: 9}\n"},  # a stage that does not run
    {"environment": {**ENVIRONMENT, "packages": {"numpy": "2.1", "torch": "2.13"}}},
    {"environment": {**ENVIRONMENT, "processors": 64, "machine": "aarch64"}},
    {"variables": {"OMP_NUM_THREADS": "4", "DIPTYCH_PROGRESS": "off", "XLA_FLAGS": ""}},
    {"variables": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}},
]


@pytest.mark.parametrize("planted", NOTES)
def test_notes_are_told_and_do_not_count(tmp_path, planted):
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b", **planted)
    found = diagnose(read_setup(a), read_setup(b))
    assert found.differences
    assert found.of("number") == []
    assert code(a, b) == 0


def test_micro_batches_are_rounding_and_a_trap(tmp_path):
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b", recipe=RECIPE + "  micro_batch_size: 8\n")
    assert counted(a, b) == []
    assert code(a, b) == 1


def test_lines_values_and_meaning_are_told(tmp_path, capsys):
    a = recipe_file(tmp_path / "a.yaml")
    b = recipe_file(tmp_path / "b.yaml", RECIPE.replace("kl_coef: 0.05", "lam: 0.9\n  kl_coef: 0.1"))
    assert code(a, b) == 1
    text = capsys.readouterr().out
    assert "rl.kl_coef: Weight of the KL penalty per token" in text
    assert f"A  0.05   {a}:9" in text
    assert f"B  0.1   {b}:10" in text
    assert f"A  0.95   {a}: rl.lam (default)" in text
    assert "2 differences can change numbers" in text


def test_groups_come_in_the_order_of_their_weight(tmp_path):
    a = trace(tmp_path / "a")
    changes = {
        "recipe": RECIPE.replace("kl_coef: 0.05", "kl_coef: 0.1"),
        "models": {"policy": {"config": {**GPT2, "n_embd": 32}, "weights": "b" * 64}},
        "data": {"prompts": {"train": 65}},
        "variables": {"NVIDIA_TF32_OVERRIDE": "1"},
    }
    b = trace(tmp_path / "b", **changes)
    assert [group for group, _ in counted(a, b)] == ["model", "recipe", "weights", "data", "variables"]


def test_what_one_side_alone_knows_is_said_and_not_counted(tmp_path):
    a, b = tmp_path / "r.yaml", trace(tmp_path / "b")
    recipe_file(a)
    found = diagnose(read_setup(a), read_setup(b))
    unknown = {(group, side): keys for group, side, keys in found.unknown}
    assert unknown["weights", "A"] == ["policy"]
    assert unknown["model", "A"] == ["policy"]
    assert "data and its order, not known of A: prompts/train, prompts/fingerprint" in describe(found)
    partial = trace(tmp_path / "c", models={"policy": {"config": GPT2, "weights": None}})
    found = diagnose(read_setup(b), read_setup(partial))
    assert ("weights", "B", ["policy"]) in found.unknown
    assert found.of("number") == []


def test_two_kinds_of_checksum_are_not_compared(tmp_path):
    a = trace(tmp_path / "a", models={"policy": {"config": GPT2, "weights": "12345678"}})
    found = diagnose(read_setup(a), read_setup(trace(tmp_path / "b")))
    assert found.of("number") == []
    assert {group for group, _, _ in found.unknown} == {"weights"}


def test_another_spelling_of_the_same_model_is_no_difference(tmp_path):
    spelled = {**GPT2, "n_inner": 64, "tie_word_embeddings": True}
    a, b = model(tmp_path / "a"), model(tmp_path / "b", spelled)
    assert counted(a, b) == []
    assert counted(a, model(tmp_path / "c", {**spelled, "n_inner": 32})) != []


def test_model_directories_are_compared_by_weights_too(tmp_path):
    a, same, other = model(tmp_path / "a"), model(tmp_path / "b"), model(tmp_path / "c", seed=1)
    assert counted(a, same) == []
    assert counted(a, other) == [("weights", "model")]


def test_a_model_directory_meets_the_policy_of_a_trace(tmp_path):
    a = model(tmp_path / "a", {**GPT2, "layer_norm_epsilon": 1e-6})
    assert counted(a, trace(tmp_path / "b")) == [("model", "model / policy: layer_norm_epsilon")]


def test_two_places_with_one_content_are_no_difference(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        model(tmp_path / name, seed=seed)
    recipes = {
        name: recipe_file(tmp_path / f"{name}.yaml", RECIPE.replace("somewhere", str(tmp_path / name)))
        for name in ("one", "two", "three")
    }
    assert counted(recipes["one"], recipes["two"]) == []
    assert ("recipe", "model.path") in counted(recipes["one"], recipes["three"])
    assert ("weights", "base") in counted(recipes["one"], recipes["three"])


def test_a_foreign_trace_is_laid_beside_a_recipe(tmp_path):
    theirs = {"adam_epsilon": 1e-8, "kl_coef": 0.05, "weight_decay": 0.0, "dialect": "trl", "own": 1}
    b = trace(tmp_path / "b", "trl")
    header = json.loads((b / "trace.json").read_text())
    header["provenance"] = {"settings": theirs, "replay": None}
    (b / "trace.json").write_text(json.dumps(header, indent=2))
    a = recipe_file(tmp_path / "a.yaml")
    keys = [key for _, key in counted(a, b)]
    assert "eps" in keys
    assert "whiten_ddof" in keys
    assert not {"kl_coef", "weight_decay"} & set(keys)
    found = diagnose(read_setup(a), read_setup(b))
    assert any(group == "settings" and side == "A" and "own" in keys for group, side, keys in found.unknown)
    (eps,) = (one for one in found.of("number") if one.key == "eps")
    line = (b / "trace.json").read_text().splitlines().index('      "adam_epsilon": 1e-08,') + 1
    assert eps.b is not None
    assert eps.b.where == f"{b}/trace.json:{line}"


def test_json_holds_everything(tmp_path, capsys):
    a, b = trace(tmp_path / "a"), trace(tmp_path / "b", recipe="seed: 3\n" + RECIPE)
    assert code(a, b, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is False
    assert [(one["key"], one["a"]["value"], one["b"]["value"]) for one in told["differences"]] == [("seed", 0, 3)]
    assert len(told["traps"]) == 42


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "missing: no such file or directory"),
        (lambda p: p, r"holds no trace\.json \(a trace\), recipe\.yaml \(a run\) or config\.json \(a model\)"),
        (lambda p: recipe_file(p / "notes.txt"), r"notes\.txt: is no recipe"),
        (lambda p: recipe_file(p / "r.yaml", RECIPE + "  kl_coeff: 1\n"), r"r\.yaml:10: unknown key 'rl\.kl_coeff'"),
        (lambda p: (model(p / "m") / "config.json").write_text("{,") and p / "m", r"m/config\.json:1: not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        code(make(tmp_path))


def test_nothing_in_common_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing in common to compare: .*r\.yaml knows recipe.*m knows model config"):
        code(recipe_file(tmp_path / "r.yaml"), model(tmp_path / "m"))
