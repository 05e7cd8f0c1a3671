"""Blame on hand-made traces: every operation of every kind of block is named when its own work differs, forward and
backward; what cannot be compared is said; terminal, JSON and page. parity_tests/ plants bugs in the real engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.engine import Head, TokenBatch
from diptych.errors import UserError
from diptych.families.family import read_model, tensor_shapes
from diptych.families.taps import Depth, taps
from diptych.parity.blame.blame import Blame, blame, command, look
from diptych.parity.blame.report import as_json, as_page, as_text
from diptych.parity.blame.search import Culprit, Sides, find_culprits
from diptych.parity.blame.structure import operations
from diptych.parity.tolerances import TOLERANCES
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter
from diptych.parity.truth.oracle import forward
from diptych.parity.truth.truth import Truth

LAYERS = 6
BASE = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
LLAMA = BASE | {
    "model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "pre": LLAMA,
    "pre, biases": BASE | {"model_type": "gpt2", "n_inner": 12, "n_positions": 32},
    "post": BASE | {"model_type": "opt", "ffn_dim": 12, "do_layer_norm_before": False, "max_position_embeddings": 32},
    "output": LLAMA | {"model_type": "olmo2"},
    "sandwich": LLAMA | {"model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4},
    "parallel": BASE
    | {"model_type": "gpt_neox", "intermediate_size": 12, "max_position_embeddings": 32, "rotary_pct": 0.5},
    "experts": LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "recurrent": {"model_type": "rnn", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": LAYERS},
}
RECIPE = """
name: blame
stages: [rl]
model: {path: nowhere}
data: {prompts: {path: "task:postcards", limit: 20}}
rl: {reward: {model_path: nowhere}}
"""
SMALL = {"num_hidden_layers": 2}
REAL = np.array([[False, True, True, True, True], [True, True, True, True, True]])
ROLE = "policy"
LIMIT = TOLERANCES["operation_relative_l2"].at("float32")


def draw(name: str, shape, std=0.4) -> np.ndarray:
    return random.normal(1, name, tuple(shape), std=std).astype(np.float32)


def recorded(config: dict[str, Any], depth: Depth = "ops") -> Step:
    """What side A leaves: true values of the taps, and gradients that are only drawn (blame compares them)."""
    model, head = read_model(config), "lm"
    weights = {name: draw(name, shape) for name, shape in tensor_shapes(model, head).items()}
    tokens = random.generator(1, "tokens").integers(0, 20, REAL.shape).astype(np.int32)
    positions = np.where(REAL, np.cumsum(REAL, axis=1) - 1, 0).astype(np.int32)
    arrays = {"tokens": tokens, "attention": REAL, "positions": positions, "first": np.asarray(2, np.int64)}
    mask = np.pad(REAL[:, 2:], ((0, 0), (2, 0))).astype(np.float32)
    more = {"mask": mask, "advantages": draw("a", mask.shape), "old_logprobs": draw("o", mask.shape) - 3}
    arrays |= {f"arrays/{name}": value for name, value in more.items()} | {"denominators/num_tokens": np.asarray(6.0)}
    tensors = {f"{ROLE}/probe/{name}": value for name, value in arrays.items()}
    tensors |= {f"{ROLE}/start/weights/{name}": value for name, value in weights.items()}
    tensors |= {f"{ROLE}/gradient/{name}": draw(f"g/{name}", value.shape) for name, value in weights.items()}
    wanted = taps(model, head, depth)

    def note(name: str, value: np.ndarray) -> np.ndarray:
        if name in wanted:
            tensors[f"{ROLE}/taps/{name}"] = value.astype(np.float32)
            tensors[f"{ROLE}/tap_gradients/{name}"] = draw(f"d/{name}", value.shape)
        return value

    forward(model, head, weights, TokenBatch(tokens=tokens, attention=REAL, positions=positions, first=2), tap=note)
    return Step(
        stage="rl", step=0, tensors={name: Recorded(values=value, layout="") for name, value in tensors.items()}
    )


def replayed(step: Step, changes: Mapping[str, float] | None = None) -> Step:
    """What side B leaves: the same but for rounding, and what the arrays named in `changes` are multiplied with noise
    by. Padding columns hold anything."""
    tensors = {}
    for name, one in step.tensors.items():
        if "/gradient/" in name:
            name = name.replace("/gradient/", "/forced_gradient/")
        values = one.values
        if any(kind in name for kind in ("/taps/", "/tap_gradients/", "/forced_gradient/")):
            size = 1e-7 + (changes or {}).get(name.removeprefix(f"{ROLE}/"), 0.0)
            values = (values * (1 + size * draw(f"noise/{name}", values.shape, 1.0))).astype(values.dtype)
            if "/taps/" in name or "/tap_gradients/" in name:
                values[~REAL] = np.nan
        tensors[name] = Recorded(values=values, layout="")
    return replace(step, tensors=tensors)


def write(path, step: Step, config, *, replay: Trace | None = None, precision="float32", **more) -> Trace:
    about = {
        "recipe": RECIPE, "models": {"policy": {"config": config, "head": "lm"}},
        "replay": None if replay is None else {"trace": replay.fingerprint(), "producer": "jax"},
    } | more  # fmt: skip
    name = "jax" if replay is None else "torch"
    with TraceWriter(path, producer={"name": name, "precision": precision}, provenance=about) as writer:
        writer.add(step)
    return Trace(path)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """blame of one configuration with some arrays of B changed."""
    written: dict[Any, tuple[Step, Trace]] = {}

    def run(name: str, changes: Mapping[str, float] | None = None, depth: Depth = "ops", **options: Any) -> Blame:
        root = tmp_path_factory.mktemp("blame")
        if (name, depth) not in written:
            step = recorded(CONFIGS[name], depth)
            written[name, depth] = step, write(root / "a", step, CONFIGS[name])
        step, a = written[name, depth]
        return blame(a, write(root / "b", replayed(step, changes), CONFIGS[name], replay=a), **options)

    return run


@pytest.fixture(scope="module")
def culprits(tmp_path_factory):
    """Those of one configuration with two layers, without a trace of B on a disk."""
    made: dict[str, tuple[Step, Trace]] = {}

    def run(name: str, changes: Mapping[str, float]) -> list[Culprit]:
        if name not in made:
            step = recorded(CONFIGS[name] | SMALL)
            made[name] = step, write(tmp_path_factory.mktemp("a") / "a", step, CONFIGS[name] | SMALL)
        step, a = made[name]
        other = replayed(step, changes)
        one = look(Truth(a, step), step, other, ROLE, is_forced=True)
        return find_culprits(one, Sides(step, other, ROLE), LIMIT)

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_and_padding_blame_nobody(sides, name):
    found = sides(name)
    assert found.code == 0, as_text(found)
    assert as_text(found).startswith("the same")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_operation_is_named_forward(culprits, name):
    for tap in taps(read_model(CONFIGS[name] | SMALL), "lm", "ops"):
        if tap.startswith(("layers.1.", "embed", "final", "logprobs")):
            found = culprits(name, {f"taps/{tap}": 0.01})
            assert [one.operations for one in found] == [(tap,)], tap
            worst = found[0]
            assert (worst.direction, worst.layer) == ("forward", 1 if tap.startswith("layers") else None)
            assert 100 < worst.over < 10000


# Operations that read the same taps and no others: only the weights' gradients, or what a matrix product hands down,
# tell them apart. All of them are named.
@pytest.mark.parametrize("name", CONFIGS)
def test_every_operation_is_named_backward(culprits, name):
    graph = operations(read_model(CONFIGS[name] | SMALL), "lm", "ops")
    for makes, operation in graph.items():
        if operation.reads and operation.layer in (1, None):
            found = culprits(name, {f"tap_gradients/{tap}": 0.01 for tap in operation.reads})
            rivals = {other for other, one in graph.items() if set(one.reads) == set(operation.reads)}
            assert [one.direction for one in found] == ["backward"], makes
            assert set(found[0].operations) == rivals, makes
            assert found[0].layer == operation.layer


def test_an_operation_wrong_both_ways_is_said_once(sides):
    changes = {"taps/layers.2.inner": 0.01, "tap_gradients/layers.2.gate": 0.01, "tap_gradients/layers.2.up": 0.02}
    found = sides("pre", changes)
    assert [(one.direction, one.operations) for one in found.culprits] == [("forward", ("layers.2.inner",))]


def test_two_bugs_are_two_culprits_the_worse_first(sides):
    found = sides("pre", {"taps/layers.1.query": 0.01, "tap_gradients/layers.4.attention": 0.1})
    assert [one.operations for one in found.culprits] == [("layers.4.output",), ("layers.1.query",)]


@pytest.mark.parametrize(
    ("name", "readers"),
    [("pre", ("mlp_norm", "out")), ("sandwich", ("mlp_norm", "out")), ("output", ("gate", "up", "out"))],
)
def test_the_residual_sum_that_has_no_tap(sides, name, readers):
    found = sides(name, {f"taps/layers.3.{reader}": 0.01 for reader in readers})
    assert [one.title for one in found.culprits] == ["the residual sum after attention in layer 3"]
    branch = "output" if name == "pre" else "attention_out_norm"
    lost = sides(name, {f"tap_gradients/layers.3.{branch}": 0.01})
    assert [one.title for one in lost.culprits] == ["the residual sum after attention in layer 3"]


def test_a_gradient_that_a_matrix_product_lost_names_it_among_its_neighbours(tmp_path):
    """The error is the key projection's share of the gradient, gone."""
    step = recorded(LLAMA)
    a = write(tmp_path / "a", step, LLAMA)
    other = replayed(step)
    made, weight = (step.array(f"{ROLE}/{name}").astype(float) for name in (
        "tap_gradients/layers.3.key", "start/weights/model.layers.3.self_attn.k_proj.weight"))  # fmt: skip
    share = made.reshape(*made.shape[:2], -1) @ weight
    name = f"{ROLE}/tap_gradients/layers.3.attention_norm"
    values = (other.array(name) - share).astype(np.float32)
    tensors = other.tensors | {name: Recorded(values=values, layout="")}
    found = blame(a, write(tmp_path / "b", replace(other, tensors=tensors), LLAMA, replay=a))
    assert [one.operations for one in found.culprits] == [("layers.3.key",)]


@pytest.mark.parametrize(
    ("name", "tensor", "operations"),
    [
        ("pre", "model.layers.4.self_attn.k_proj.weight", ("layers.4.key",)),
        ("pre", "model.layers.2.input_layernorm.weight", ("layers.2.attention_norm",)),
        ("pre", "lm_head.weight", ("logprobs",)),
        ("pre, biases", "transformer.wte.weight", ("embed", "logprobs")),  # tied
        ("experts", "model.layers.1.block_sparse_moe.experts.2.w2.weight", ("layers.1.down",)),
        ("recurrent", "model.layers.5.recurrent.weight", ("layers.5.out",)),
    ],
)
def test_a_weights_gradient_alone_names_its_operation(sides, name, tensor, operations):
    found = sides(name, {f"forced_gradient/{tensor}": 0.01})
    assert [(one.direction, one.operations) for one in found.culprits] == [("backward", operations)]


def test_part_of_a_fused_weight_names_its_own_operation(tmp_path):
    config = CONFIGS["pre, biases"]
    step = recorded(config)
    a = write(tmp_path / "a", step, config)
    other = replayed(step)
    name = f"{ROLE}/forced_gradient/transformer.h.3.attn.c_attn.weight"
    values = other.array(name).copy()
    values[:, 16:] *= 1.01  # query, key, value lie next to each other: the last third
    tensors = other.tensors | {name: Recorded(values=values, layout="")}
    found = blame(a, write(tmp_path / "b", replace(other, tensors=tensors), config, replay=a))
    assert [one.operations for one in found.culprits] == [("layers.3.value",)]


def test_an_adapters_gradient_names_the_layer_that_it_sits_on(tmp_path):
    """Of a run that trains an adapter, a trace holds its A and B only."""
    module = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
    step = recorded(LLAMA)
    tensors = {name: one for name, one in step.tensors.items() if "/gradient/" not in name and "/weights/" not in name}
    for part, shape in (("A", (2, 8)), ("B", (12, 2))):
        name = module.format(part)
        tensors[f"{ROLE}/gradient/{name}"] = Recorded(values=draw(name, shape), layout="")
    step = replace(step, tensors=tensors)
    a = write(tmp_path / "a", step, LLAMA)
    changed = replayed(step, {f"forced_gradient/{module.format('B')}": 0.01})
    found = blame(a, write(tmp_path / "b", changed, LLAMA, replay=a))
    assert [one.operations for one in found.culprits] == [("layers.2.up",)]
    assert blame(a, write(tmp_path / "c", replayed(step), LLAMA, replay=a)).code == 0
    odd = {f"{ROLE}/{kind}/nobody.weight": Recorded(values=draw("odd", (2,)), layout="")
           for kind in ("gradient", "forced_gradient")}  # fmt: skip
    strange = write(tmp_path / "d", replace(step, tensors=step.tensors | odd), LLAMA)
    with pytest.raises(UserError, match=r"nobody.weight is no tensor"):
        blame(
            strange, write(tmp_path / "e", replayed(replace(step, tensors=step.tensors | odd)), LLAMA, replay=strange)
        )


def test_a_sum_that_cancels_is_no_error(tmp_path):
    """A key bias without positions has no gradient: what is left is rounding, whatever its relative size."""
    config = CONFIGS["pre, biases"]
    step = recorded(config)
    name = "gradient/transformer.h.3.attn.c_attn.bias"
    tiny = step.array(f"{ROLE}/{name}").copy()
    tiny[8:16] = 1e-8
    step = replace(step, tensors=step.tensors | {f"{ROLE}/{name}": Recorded(values=tiny, layout="")})
    a = write(tmp_path / "a", step, config)
    other = replayed(step, {f"forced_{name}": 0.0})
    forced = f"{ROLE}/forced_{name}"
    values = other.array(forced).copy()
    values[8:16] = -2e-8
    tensors = other.tensors | {forced: Recorded(values=values, layout="")}
    assert blame(a, write(tmp_path / "b", replace(other, tensors=tensors), config, replay=a)).code == 0


def test_at_depth_layers_the_layer_is_named_and_how_to_learn_more(sides):
    found = sides("pre", {"taps/layers.3.out": 0.01}, depth="layers")
    assert [(one.title, one.layer) for one in found.culprits] == [("layer 3", 3)]
    assert "--depth ops" in as_text(found)
    back = sides("pre", {"tap_gradients/layers.2.out": 0.01}, depth="layers")
    assert [(one.title, one.direction) for one in back.culprits] == [("layer 3", "backward")]


def test_not_finite_is_a_difference(tmp_path):
    step = recorded(LLAMA)
    a = write(tmp_path / "a", step, LLAMA)
    other = replayed(step)
    name = f"{ROLE}/taps/layers.3.up"
    values = other.array(name).copy()
    values[1, 2, 3] = np.nan
    tensors = other.tensors | {name: Recorded(values=values, layout="")}
    found = blame(a, write(tmp_path / "b", replace(other, tensors=tensors), LLAMA, replay=a))
    assert [one.operations for one in found.culprits] == [("layers.3.up",)]
    assert np.isinf(found.culprits[0].over)
    assert json.loads(as_json(found))["culprits"][0]["over_limit"] == "inf"
    assert "inf x" in as_text(found)


def test_without_forcing_the_first_divergence_is_said_to_be_weaker(tmp_path):
    """A free run: everything after layer 3's value is off."""
    step = recorded(LLAMA)
    a = write(tmp_path / "a", step, LLAMA)
    after = list(taps(read_model(LLAMA), "lm", "ops"))
    after = after[after.index("layers.3.value") :]
    changes = {f"taps/{tap}": 0.01 for tap in after if not tap.startswith(("layers.3.query_", "layers.3.key_"))}
    b = write(tmp_path / "b", replayed(step, changes), LLAMA)
    found = blame(a, b)
    assert [one.operations for one in found.culprits] == [("layers.3.value",)]
    assert as_text(found).startswith("probably: ")
    assert "no replay" in as_text(found)
    # Backward: off from layer 3's output projection on down, values equal.
    below = [tap for tap in taps(read_model(LLAMA), "lm", "ops") if tap.startswith(("embed", "layers.0", "layers.1"))]
    b = write(tmp_path / "c", replayed(step, {f"tap_gradients/{tap}": 0.01 for tap in below}), LLAMA)
    found = blame(a, b)
    assert [(one.direction, one.layer) for one in found.culprits] == [("backward", 2)]


def test_the_truth_says_which_sides_value_is_wrong(sides, tmp_path):
    found = sides("pre", {"taps/layers.3.gate": 0.01}, truth=True)
    assert found.culprits[0].verdict.startswith("B is wrong")
    assert "B (torch) is wrong" in as_text(found)
    step = recorded(LLAMA)
    name = f"{ROLE}/taps/layers.3.inner"
    wrong = replace(
        step, tensors=step.tensors | {name: Recorded(values=step.array(name) * np.float32(1.01), layout="")}
    )
    a = write(tmp_path / "a", wrong, LLAMA)
    found = blame(a, write(tmp_path / "b", replayed(step), LLAMA, replay=a), truth=True)
    assert found.culprits[0].operations == ("layers.3.inner",)
    assert found.culprits[0].verdict.startswith("A is wrong")


def test_bad_input(tmp_path):
    step = recorded(LLAMA)
    a = write(tmp_path / "a", step, LLAMA)
    b = write(tmp_path / "b", replayed(step), LLAMA, replay=a)
    with pytest.raises(UserError, match="give the recorded trace first"):
        blame(b, a)
    coarse = write(tmp_path / "c", replayed(step), LLAMA, replay=a, precision="bfloat16")
    with pytest.raises(UserError, match="bfloat16"):
        blame(a, coarse)
    without = {name: one for name, one in step.tensors.items() if "/tap" not in name}
    plain = write(tmp_path / "d", replace(step, tensors=without), LLAMA)
    with pytest.raises(UserError, match="--depth layers"):
        blame(plain, write(tmp_path / "e", replace(step, tensors=without), LLAMA))
    with pytest.raises(UserError, match="in one trace only"):
        blame(a, plain)
    shallow = write(tmp_path / "f", replayed(recorded(LLAMA, "layers")), LLAMA, replay=a)
    with pytest.raises(UserError, match="same --depth"):
        blame(a, shallow)
    some = {name: one for name, one in step.tensors.items() if name != f"{ROLE}/tap_gradients/layers.3.up"}
    with pytest.raises(UserError, match="layers.3.up is missing"):
        blame(a, write(tmp_path / "g", replace(step, tensors=some), LLAMA, replay=a))
    unknown = write(tmp_path / "h", step, LLAMA, models={})
    with pytest.raises(UserError, match="what policy computes"):
        blame(unknown, write(tmp_path / "i", replayed(step), LLAMA, replay=unknown))


def test_the_command_prints_and_writes_and_returns_its_code(tmp_path, capsys):
    step = recorded(LLAMA)
    a = write(tmp_path / "a", step, LLAMA)
    write(tmp_path / "b", replayed(step, {"tap_gradients/layers.3.key_rotated": 0.02}), LLAMA, replay=a)
    options = argparse.Namespace(
        a=tmp_path / "a", b=tmp_path / "b", truth=False, html=tmp_path / "page.html", json=tmp_path / "found.json"
    )
    assert command(options) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(
        "A and B differ in the backward of attention (mask, softmax, mix of the values) in layer 3"
    )
    assert len(printed.splitlines()) <= 24
    assert max(len(line) for line in printed.splitlines() if line.startswith("  layer")) <= 120
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["culprits"][0]["operations"] == ["layers.3.attention"]
    assert len(found["steps"][0]["forward"]) == len(taps(read_model(LLAMA), "lm", "ops"))
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert text.count('title="layers.3.attention:') == 2  # forward and backward
    same = argparse.Namespace(**vars(options) | {"b": tmp_path / "same", "html": None, "json": None})
    write(tmp_path / "same", replayed(step), LLAMA, replay=a)
    assert command(same) == 0


def test_many_layers_still_fit_one_screen(sides):
    config = {**LLAMA, "num_hidden_layers": 60}
    CONFIGS_60 = {"deep": config}
    model = read_model(config)
    head: Head = "lm"
    assert len(taps(model, head, "ops")) > 600
    CONFIGS["deep"] = CONFIGS_60["deep"]  # pyright: ignore[reportIndexIssue]
    try:
        text = as_text(sides("deep", {"taps/layers.41.up": 0.01}))
    finally:
        del CONFIGS["deep"]  # pyright: ignore[reportIndexIssue]
    assert "layer 41" in text
    assert len(text.splitlines()) < 24
    assert "rows have nothing above the limit" in text


def test_the_page_shows_every_operation(sides):
    found = sides("pre", {"taps/layers.3.up": 0.01})
    text = as_page(found)
    for tap in taps(read_model(LLAMA), "lm", "ops"):
        assert f'title="{tap}: ' in text, tap
