"""Looking into the torch engine's models: every tap of every family, recorded and forced (`diptych.families.taps`)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diptych.engine import (
    AdapterSpec,
    EngineSettings,
    Head,
    Loss,
    ModelSpec,
    OptimizerSpec,
    Probed,
    Taps,
    TrainBatch,
    load_engine,
)
from diptych.errors import UserError
from diptych.families.adapter import initial_adapter, merge
from diptych.families.decoder import DecoderConfig
from diptych.families.family import model_slots, read_model, tensor_rules
from diptych.families.taps import taps
from diptych_torch import probe
from torch_impl.tests.plain import CASES as ALL
from torch_impl.tests.plain import hot, ragged

CASES = [name for name in ALL if name not in ("llama, yarn", "llama, dynamic", "mistral", "qwen2", "phi3, longrope")]
# One of each way to lie in a module: fused, interleaved, norms of heads, sandwich, parallel, ALiBi, experts, state.
SLOPES = ("llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "bloom", "mixtral", "rnn")
EXPERTS = ("mixtral", "qwen3_moe", "qwen3_moe, not normalised")
ROWS = 3


def bent(outputs: Any, *, weight: Any, total: float) -> Any:
    """A loss that no two tokens enter alike, and whose gradient depends on its outputs."""
    terms = outputs * weight + 0.05 * (outputs * weight) ** 2
    return terms.sum() / total, {"squares": (outputs**2 * weight).sum() / total}


def loss_of(head: Head, **settings: Any) -> Loss:
    return Loss(function=bent, reads="logprobs" if head == "lm" else "scores", temperature=1.3, **settings)


@cache
def data() -> TrainBatch:
    """Left padding of 0, 6 and 4 columns, another number of columns than a model has heads."""
    batch = ragged(4)
    batch = replace(batch, tokens=batch.tokens[1:, -11:], attention=batch.attention[1:, -11:])
    attention = batch.attention & (np.arange(11) >= np.array([6, 0, 4])[:, None])
    batch = replace(
        batch,
        attention=attention,
        positions=(np.maximum(attention.cumsum(axis=1) - 1, 0) * attention).astype(np.int32),
    )
    weight = np.random.default_rng(9).normal(size=attention.shape) * attention
    return TrainBatch(tokens=batch, arrays={"weight": weight}, denominators={"total": float(attention.sum())})


def build(name: str, head: Head = "lm", weights: Any = None, precision: Any = "float64") -> Any:
    return load_engine("torch", EngineSettings(precision=precision)).model(
        ModelSpec(
            config=ALL[name], weights=hot(ALL[name], head) if weights is None else weights, head=head, optimizer=None,
            micro_batch_size=ROWS, logprob_chunk=1024,
        )
    )  # fmt: skip


@cache
def model_of(name: str, head: Head = "lm") -> Any:
    return build(name, head)


@cache
def clean(name: str, head: Head = "lm", depth: Any = "ops") -> Probed:
    return model_of(name, head).probe(loss_of(head), data(), depth=depth)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6))


# -- what a probe gives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["layers", "ops"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", CASES)
def test_taps_are_the_hinges_and_the_numbers_those_of_an_unwatched_step(name, head, depth):
    model, loss, config = model_of(name, head), loss_of(head), read_model(ALL[name])
    found = clean(name, head, depth)
    layouts = taps(config, head, depth)
    assert list(found.taps.values) == list(found.taps.gradients) == list(layouts)
    for tap, layout in layouts.items():
        value, gradient = found.taps.values[tap], found.taps.gradients[tap]
        assert value.shape == gradient.shape
        assert value.dtype == gradient.dtype == np.float64
        assert value.shape[:2] == data().tokens.tokens.shape
        assert value.ndim == len(layout.split()), tap
        if layout.endswith("heads size"):
            assert isinstance(config, DecoderConfig)
            few = tap.split(".")[-1].split("_")[0] in ("key", "value")
            assert value.shape[2:] == (config.num_kv_heads if few else config.num_heads, config.head_dim), tap
        assert np.abs(value).max() > 0, tap
    assert found.metrics == pytest.approx(model.evaluate(loss, data()), rel=1e-13)
    gradients = model.gradients(loss, data())
    assert list(found.gradients) == list(gradients)
    for tensor, value in gradients.items():
        assert distance(found.gradients[tensor], value) < 1e-12, tensor
    outputs = model.logprobs(data().tokens, temperature=1.3) if head == "lm" else model.scores(data().tokens)
    np.testing.assert_allclose(found.taps.values[list(layouts)[-1]], outputs, rtol=0, atol=1e-13)


def slot_arrays(name: str, layer: int) -> dict[str, np.ndarray]:
    """Every slot of a layer that no expert has, in the decoder's layout."""
    config, weights = read_model(ALL[name]), hot(ALL[name])
    found: dict[str, np.ndarray] = {}
    for rule in tensor_rules(config, "lm"):
        if rule.per_layer and not rule.per_expert:
            found |= rule.split(weights[rule.names(config, layer)[0]], model_slots(config, "lm"))
    return found


@pytest.mark.parametrize("name", [name for name in CASES if "rnn" not in name])
def test_a_tap_is_the_product_of_the_slot_that_it_is_named_by(name):
    """In NumPy: which slot, which head, and what it reads."""
    config, values = read_model(ALL[name]), clean(name).taps.values
    assert isinstance(config, DecoderConfig)
    for layer in range(2):
        slots, at = slot_arrays(name, layer), {
            tap.removeprefix(f"layers.{layer}."): value for tap, value in values.items()
        }  # fmt: skip
        before = values["embed" if layer == 0 else "layers.0.out"]
        read = at["attention_norm"] if config.block in ("pre", "sandwich", "parallel") else before
        written = at.get("attention_out_norm", at["output"])
        after = at["attention_norm"] if config.block == "post" else before + written
        mlp = at["mlp_norm"] if config.block in ("pre", "sandwich", "parallel") else after
        expected = {one: np.einsum("btd,dnh->btnh", read, slots[one]) for one in ("query", "key", "value")}
        expected["output"] = np.einsum("btnh,nhd->btd", at["attention"], slots["output"])
        if config.experts is not None:
            expected["router"] = mlp @ slots["router"]
        else:
            expected |= {one: mlp @ slots[one] for one in ("gate", "up") if one in slots}
            expected["down"] = at["inner"] @ slots["down"]
        expected = {tap: value + slots.get(f"{tap}_bias", 0.0) for tap, value in expected.items()}
        for norm, reads in (("query_norm", "query"), ("key_norm", "key")):
            if norm in at:
                x = at[reads] if config.qk_norm == "head" else rearrange(at[reads], "b t n h -> b t (n h)")
                x = (x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm.eps)).reshape(at[reads].shape)
                expected[norm] = x * (slots[norm] + config.norm.offset)
        for tap, value in expected.items():
            assert distance(at[tap], value) < 1e-12, (layer, tap)


# -- forcing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOPES)
def test_a_tap_s_gradient_is_the_slope_of_the_loss_along_a_forced_change(name):
    """Another value forced there, everything behind it follows; central difference along a random direction."""
    model, loss, found = model_of(name), loss_of("lm"), clean(name)
    step = 1e-6  # few units of a ReLU turn within it
    for tap, value in found.taps.values.items():
        if tap.startswith("layers.0.") and tap != "layers.0.out":
            continue  # like layer 1's
        direction = np.random.default_rng(len(tap)).normal(size=value.shape)
        slope, sides = float((found.taps.gradients[tap] * direction).sum()), []
        for sign in (1, -1):
            forced = Taps(values={tap: value + sign * step * direction}, gradients={})
            sides.append(model.probe(loss, data(), depth="ops", forced=forced).metrics["loss"])
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8), tap
        assert abs(slope) > 1e-6 or tap.endswith("key"), tap


@pytest.mark.parametrize("name", CASES)
def test_forced_to_its_own_numbers_a_model_gives_them_again(name):
    found = clean(name)
    again = model_of(name).probe(loss_of("lm"), data(), depth="ops", forced=found.taps)
    for side in ("values", "gradients"):
        for tap, value in getattr(found.taps, side).items():
            assert distance(getattr(again.taps, side)[tap], value) < 1e-12, (side, tap)
    for tensor, value in found.gradients.items():
        assert distance(again.gradients[tensor], value) < 1e-12, tensor
    assert again.metrics == pytest.approx(found.metrics, rel=1e-13)


def test_forced_numbers_are_read_to_the_last_bit_and_what_was_computed_comes_back():
    """In float32, where y + (f - y) is not f: the last tap's forced numbers are the loss's, the gradient's all
    below."""
    model = build("llama", precision="float32")
    loss, plain = loss_of("lm"), build("llama", precision="float32").probe(loss_of("lm"), data(), depth="layers")
    drawn = np.random.default_rng(3).normal(size=(2, *data().tokens.tokens.shape)).astype(np.float32) * 1e-3
    forced = Taps(values={"logprobs": drawn[0]}, gradients={"logprobs": drawn[1]})
    found = model.probe(loss, data(), depth="layers", forced=forced)
    expected, _ = bent(
        torch.tensor(drawn[0]), weight=torch.tensor(data().arrays["weight"]).float(), total=data().denominators["total"]
    )
    assert found.metrics["loss"] == float(expected)
    for tap, value in plain.taps.values.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(found.taps.values[tap], value)
    pulled = Loss(function=lambda outputs, *, pull: ((outputs * pull).sum(), {}), reads="logprobs", temperature=1.3)
    straight = model.probe(
        pulled, TrainBatch(tokens=data().tokens, arrays={"pull": drawn[1]}, denominators={}), depth="layers"
    )
    for tap in list(plain.taps.values)[:-1]:
        np.testing.assert_array_equal(found.taps.gradients[tap], straight.taps.gradients[tap])
    for tensor, value in straight.gradients.items():
        np.testing.assert_array_equal(found.gradients[tensor], value)


# -- one wrong operation ----------------------------------------------------------------------------------------------


def same(x: np.ndarray, y: np.ndarray) -> bool:
    """On real columns: nothing is forced on padding. (Experts sum in another order where padding goes elsewhere.)"""
    real = data().tokens.attention
    return np.allclose(x[real], y[real], rtol=1e-12, atol=1e-14)


def tap_of(config: Any, slot: str, layer: int) -> str:
    """The tap whose making reads a slot."""
    slot = slot.removesuffix("_bias")
    if not isinstance(config, DecoderConfig):
        slot = "out" if slot == "recurrent" else slot
    elif config.experts is not None and slot in ("gate", "up"):
        slot = "down"
    elif config.block == "post" and slot == "mlp_norm":
        slot = "out"
    top = {
        "embedding": "embed", "positions": "embed", "project_in": "embed", "embedding_norm": "embed",
        "final_norm": "final", "project_out": "final", "head": "logprobs",
    }  # fmt: skip
    return top.get(slot, f"layers.{layer}.{slot}")


@pytest.mark.parametrize("name", CASES)
def test_canary_a_wrong_weight_shows_at_its_own_operation_and_nowhere_else(name):
    """All taps forced to the right model's: of a model with one slot of one layer changed, one tap differs; gradients
    only at taps that the operation hands one to."""
    config, loss = read_model(ALL[name]), loss_of("lm")
    weights, table = hot(ALL[name]), model_slots(config, "lm")
    right = clean(name).taps
    expected = model_of(name).probe(loss, data(), depth="ops", forced=right).taps
    model, order = build(name), list(right.values)
    for rule in tensor_rules(config, "lm"):
        layer = 1 if rule.per_layer else None
        tensor = rule.names(config, layer)[-1]
        for slot in rule.slots:
            parts = {one: np.array(part) for one, part in rule.split(weights[tensor], table).items()}
            parts[slot] = parts[slot] * 1.5 + 0.01
            model.load_weights({**weights, tensor: rule.fuse(parts, table)})
            found = model.probe(loss, data(), depth="ops", forced=right).taps
            wrong = [tap for tap in order if not same(found.values[tap], expected.values[tap])]
            tap = "layers.1.input" if slot == "recurrent_bias" else tap_of(config, slot, 1)
            tied = ["logprobs"] if slot == "embedding" and config.tie_word_embeddings else []
            assert wrong == [tap, *tied], (slot, wrong)
            handed = {tap for tap in order if not same(found.gradients[tap], expected.gradients[tap])}
            end = order.index("final" if tied else tap)
            begin = order.index("layers.0.out") if not tied and tap.startswith("layers.1.") else 0
            assert handed <= set(order[begin : end + bool(tied)]), (slot, handed)
            if not slot.endswith("_bias") and slot not in ("embedding", "positions", "project_in", "embedding_norm"):
                assert handed, slot


def test_canary_an_attention_of_its_own_shows_at_attention(monkeypatch):
    """An operation without weights: queries scaled by 1.01."""
    right, model = clean("llama").taps, model_of("llama")
    expected = model.probe(loss_of("lm"), data(), depth="ops", forced=right).taps
    attend = ALL_ATTENTION_FUNCTIONS["diptych"]

    def off(module, query, *inputs, **options):
        return attend(module, query * (1.01 if module.layer_idx else 1.0), *inputs, **options)

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "diptych", off)
    found = model.probe(loss_of("lm"), data(), depth="ops", forced=right).taps
    wrong = [tap for tap, value in expected.values.items() if not same(found.values[tap], value)]
    assert wrong == ["layers.1.attention"]
    wrong = [tap for tap, value in expected.gradients.items() if not same(found.gradients[tap], value)]
    assert wrong == ["layers.1.value", "layers.1.query_rotated", "layers.1.key_rotated"]


# -- every way that a model may lie ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_stage_of_a_trained_model_is_looked_into(make_model, name, stage):
    loss, optimizer = loss_of("lm", balance=0.1 if name == "mixtral" else 0.0), OptimizerSpec(name="adamw")
    model = make_model(
        config=ALL[name], weights=hot(ALL[name]), precision="float64", optimizer=optimizer, stage=stage,
        micro_batch_size=ROWS,
    )  # fmt: skip
    found = model.probe(loss, data(), depth="ops")
    for tap, value in clean(name).taps.values.items():
        assert distance(found.taps.values[tap], value) < 1e-12, tap
    assert found.metrics == pytest.approx(model.evaluate(loss, data()), rel=1e-12)
    for tensor, value in model.gradients(loss, data()).items():
        assert distance(found.gradients[tensor], value) < 1e-12, tensor


@pytest.mark.parametrize("name", ["llama", "gpt2", "rnn"])
def test_with_an_adapter_a_tap_is_the_changed_projection_and_every_gradient_is_there(make_model, name):
    """Only the second layer is adapted here: gradients go on to the taps below it."""
    targets = {
        "llama": ("model.layers.{layer}.self_attn.q_proj", "mlp.down_proj"), "gpt2": ("attn.c_attn",),
        "rnn": ("input", "recurrent"),
    }[name]  # fmt: skip
    config = read_model(ALL[name])
    spec = AdapterSpec(rank=2, alpha=3.0, targets=targets)
    adapter = {
        tensor: np.random.default_rng(len(tensor)).normal(size=value.shape, scale=0.2)
        for tensor, value in initial_adapter(config, spec, seed=1).items()
    }
    model = make_model(
        config=ALL[name], weights=hot(ALL[name]), precision="float64", optimizer=OptimizerSpec(name="adamw"),
        adapter=spec, adapter_weights=adapter, micro_batch_size=ROWS,
    )  # fmt: skip
    found = model.probe(loss_of("lm"), data(), depth="ops")
    merged = build(name, weights=merge(config, spec, hot(ALL[name]), adapter)).probe(loss_of("lm"), data(), depth="ops")
    for side in ("values", "gradients"):
        for tap, value in getattr(merged.taps, side).items():
            assert distance(getattr(found.taps, side)[tap], value) < 1e-11, (side, tap)
    gradients = model.gradients(loss_of("lm"), data())
    assert list(found.gradients) == list(gradients)
    for tensor, value in gradients.items():
        assert distance(found.gradients[tensor], value) < 1e-12, tensor


# -- nothing stays, and errors ----------------------------------------------------------------------------------------


def installed(model: Any) -> list[Any]:
    """Everything that a probe could have left behind."""
    modules = [] if model._plain_network is None else list(model._plain_network.modules())
    return [
        *(list(module._forward_hooks) + list(module._forward_pre_hooks) for module in modules),
        *("forward" in vars(module) for module in modules),
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        torch.nn.functional.linear,
    ]


@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom", "rnn"])
def test_nothing_is_left_installed_also_after_an_exception(monkeypatch, name):
    model, loss = build(name), loss_of("lm")
    before = model.gradients(loss, data())
    left = installed(model)
    model.probe(loss, data(), depth="ops")
    assert installed(model) == left
    for tap in clean(name).taps.values:
        wrong = Taps(values={tap: np.zeros((1, 1))}, gradients={})
        with pytest.raises(ValueError, match=f"the value of {tap} has shape"):
            model.probe(loss, data(), depth="ops", forced=wrong)
        assert installed(model) == left
    for tensor, value in model.gradients(loss, data()).items():
        np.testing.assert_array_equal(value, before[tensor])
    with monkeypatch.context() as patch:  # canary: a hook that nobody takes away
        patch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)
        model.probe(loss, data(), depth="ops")
    assert installed(model) != left


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        (Taps(values={"layers.0.query": np.zeros(1)}, gradients={}), "no such taps at depth 'layers': layers.0.query"),
        (Taps(values={}, gradients={"layers.9.out": np.zeros(1)}), "no such taps at depth 'layers': layers.9.out"),
        (Taps(values={}, gradients={"final": np.zeros((3, 11, 23))}), r"the gradient of final has shape \(3, 11, 23\)"),
        (Taps(values={"final": np.zeros((3, 11, 24), int)}, gradients={}), "the value of final is int64"),
    ],
    ids=["deeper tap", "no such layer", "wrong shape", "no floats"],
)
def test_what_cannot_be_forced_is_named(forced, message):
    with pytest.raises(ValueError, match=message):
        model_of("llama").probe(loss_of("lm"), data(), depth="layers", forced=forced)


def test_other_bad_input_is_refused(monkeypatch):
    model = model_of("llama")
    with pytest.raises(ValueError, match="head 'scalar'"):
        model.probe(loss_of("scalar"), data(), depth="ops")
    monkeypatch.setattr(probe.torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="in one process"):
        model.probe(loss_of("lm"), data(), depth="ops")
