"""Looking into the JAX engine's models: every tap of several families, recorded and forced (`diptych.families.taps`).

Everything that a family's tests ask runs through one compiled probe, in float64. What is expected of a forced probe is
written down here as a graph: which tap an operation makes and which it reads.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from diptych.engine import (
    AdapterSpec,
    EngineSettings,
    Loss,
    ModelSpec,
    Precision,
    Probed,
    Taps,
    Tensors,
    TokenBatch,
    TrainBatch,
)
from diptych.errors import UserError
from diptych.families.adapter import adapter_shapes
from diptych.families.decoder import DecoderConfig
from diptych.families.family import model_slots, read_model, tensor_rules, tensor_shapes
from diptych.families.taps import taps
from diptych_jax import experts, logprobs, model, recurrent, training
from diptych_jax import taps as inside
from diptych_jax.engine import JaxModel, create
from diptych_jax.probe import check_place

_LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA = {"head_dim": 6, "sliding_window": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
CASES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 6, "tie_word_embeddings": True},
    "gemma2": _LLAMA | _GEMMA | {"query_pre_attn_scalar": 5},
    "olmo2, scalar": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4},
    "gpt_neox": _NEOX | {"rotary_pct": 0.5},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_inner": 20, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 12, "ffn_dim": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "do_layer_norm_before": False,
    },
    "rnn": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2},
}  # fmt: skip
CASES = {name: {"model_type": name.split(",")[0], **config} for name, config in CASES.items()}
ROWS, COLUMNS = 3, 9
ADAPTER = AdapterSpec(rank=2, alpha=3.0, targets=("q_proj", "mlp.up_proj"))


@pytest.fixture(autouse=True)
def in_float64(switches_as_they_were: None) -> None:
    jax.config.update("jax_enable_x64", True)


def bent(outputs: Any, *, factors: Any, total: Any, entropy: Any = 0.0) -> Any:
    """A loss that no two tokens enter alike, and whose gradient depends on its outputs."""
    terms = outputs * factors
    metrics = {"squares": (outputs**2 * factors).sum() / total, "entropy": (entropy * factors).sum() / total}
    return (terms + 0.05 * terms**2).sum() / total, metrics


def head_of(name: str) -> Any:
    return "scalar" if name.endswith("scalar") else "lm"


def loss_of(name: str) -> Loss:
    if head_of(name) == "scalar":
        return Loss(function=bent, reads="scores")
    return Loss(function=bent, reads="logprobs", temperature=0.7, entropy=True, balance=0.3)


def batch() -> TrainBatch:
    """Left padding of 0, 4 and 2 columns. The factors are 0 on padding."""
    draws = np.random.default_rng(1)
    real = np.arange(COLUMNS) >= np.array([0, 4, 2])[:, None]
    tokens = TokenBatch(
        tokens=draws.integers(0, 40, real.shape).astype(np.int32),
        attention=real,
        positions=(np.maximum(real.cumsum(axis=1) - 1, 0) * real).astype(np.int32),
        first=2,
    )
    return TrainBatch(
        tokens=tokens, arrays={"factors": draws.normal(size=real.shape) * real}, denominators={"total": 7.0}
    )


REAL = batch().tokens.attention


def hot(name: str) -> Tensors:
    draws, found = np.random.default_rng(0), {}
    for tensor, shape in tensor_shapes(read_model(CASES[name]), head_of(name)).items():
        found[tensor] = draws.normal(0, 0.3, shape) if len(shape) > 1 else 1 + draws.normal(0, 0.3, shape)
    return found


def build(name: str, precision: Precision = "float64", **changes: Any) -> JaxModel:
    """With experts, one row to a micro-batch: how the whole step's tokens are routed is in each one's loss."""
    spec = ModelSpec(
        config=CASES[name], weights=hot(name), head=head_of(name), optimizer=None,
        micro_batch_size=1 if name == "mixtral" else ROWS,
    )  # fmt: skip
    return create(EngineSettings(precision=precision)).model(replace(spec, **changes))


@cache
def model_of(name: str) -> JaxModel:
    return build(name)


def probed(name: str, forced: Taps | None = None) -> Probed:
    return model_of(name).probe(loss_of(name), batch(), depth="ops", forced=forced)


@cache
def clean(name: str) -> Probed:
    return probed(name)


def differing(found: Tensors, wanted: Tensors, *, limit: float = 0.0, real: Any = ...) -> set[str]:
    """The names of arrays whose largest difference, where `real`, is above `limit` times the largest number."""
    assert found.keys() == wanted.keys()
    pairs = {name: (found[name][real], wanted[name][real]) for name in found}
    return {name for name, (a, b) in pairs.items() if not np.abs(a - b).max() <= limit * np.abs(b).max()}


def changed(found: Tensors, wanted: Tensors, real: Any = ...) -> set[str]:
    """Those that differ by more than rounding; they do so by a good deal."""
    names = differing(found, wanted, limit=1e-12, real=real)
    assert names == differing(found, wanted, limit=1e-7, real=real)
    return names


# -- what a probe gives ------------------------------------------------------------------------------------------------


def widths(config: Any, head: str) -> dict[str, int]:
    """The width of every flat tap, by the last part of its name; all others are as wide as the model."""
    if not isinstance(config, DecoderConfig):
        return {}
    found = dict.fromkeys(("gate", "up", "inner"), config.intermediate_size) | {"final": config.embedding_size}
    return found | ({} if config.experts is None else {"router": config.experts.count})


def check_layouts(found: Taps, name: str, depth: Any) -> None:
    config = read_model(CASES[name])
    layouts = taps(config, head_of(name), depth)
    assert list(found.values) == list(found.gradients) == list(layouts)
    for tap, layout in layouts.items():
        last = tap.rpartition(".")[2]
        shape: tuple[int, ...] = (ROWS, COLUMNS)
        if layout == "batch time width":
            shape += (widths(config, head_of(name)).get(last, config.hidden_size),)
        elif layout == "batch time heads size":
            assert isinstance(config, DecoderConfig)
            heads = config.num_kv_heads if last.split("_")[0] in ("key", "value") else config.num_heads
            shape += (heads, config.head_dim)
        for array in (found.values[tap], found.gradients[tap]):
            assert array.shape == shape, tap
            assert np.isfinite(array).all(), tap
            assert np.abs(array[REAL]).max() > 0, tap


@pytest.mark.parametrize("name", CASES)
def test_taps_are_the_hinges_and_the_numbers_are_the_step_s(name):
    subject, loss, found = model_of(name), loss_of(name), clean(name)
    check_layouts(found.taps, name, "ops")
    assert {array.dtype for array in (*found.taps.values.values(), *found.taps.gradients.values())} == {np.dtype(float)}
    assert list(found.gradients) == list(tensor_shapes(read_model(CASES[name]), head_of(name)))
    # The gradients are the slope of the loss along a random direction.
    moved, step, draws = build(name), 1e-6, np.random.default_rng(4)
    direction = {tensor: draws.normal(size=value.shape) for tensor, value in found.gradients.items()}
    sides = []
    for sign in (1, -1):
        moved.load_weights({tensor: value + sign * step * direction[tensor] for tensor, value in hot(name).items()})
        sides.append(moved.probe(loss, batch(), depth="ops").metrics["loss"])
    slope = sum(float((gradient * direction[tensor]).sum()) for tensor, gradient in found.gradients.items())
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)
    if name not in ("olmo2, scalar", "mixtral", "rnn"):
        return  # a program takes seconds to compile; the rest is not the families' own
    for tensor, gradient in subject.gradients(loss, batch()).items():
        np.testing.assert_allclose(found.gradients[tensor], gradient, rtol=1e-10, atol=1e-14, err_msg=tensor)
    assert found.metrics == pytest.approx(subject.evaluate(loss, batch()), rel=1e-12)
    assert ("router/balance_loss" in found.metrics) == (name == "mixtral")
    tokens = batch().tokens
    outputs = subject.scores(tokens) if "scalar" in name else subject.logprobs(tokens, temperature=0.7)
    np.testing.assert_allclose(list(found.taps.values.values())[-1], outputs, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "precision", "depth"),
    [pytest.param("mixtral", "bfloat16", "ops", marks=pytest.mark.slow), ("rnn", "float32", "layers")],
)
def test_between_layers_and_in_other_precisions(name, precision, depth):
    subject = build(name, precision)
    found = subject.probe(loss_of(name), batch(), depth=depth)
    check_layouts(found.taps, name, depth)
    limit = {"float32": 1e-5, "bfloat16": 0.2}[precision]  # bfloat16: one or two tokens change experts
    for side in ("values", "gradients"):
        for tap, array in getattr(found.taps, side).items():
            assert array.dtype == np.float32
            wanted = getattr(clean(name).taps, side)[tap][REAL]
            assert np.linalg.norm(array[REAL] - wanted) < limit * np.linalg.norm(wanted), (side, tap)
    assert {array.dtype for array in found.gradients.values()} == {np.dtype(np.float32)}
    again = subject.probe(loss_of(name), batch(), depth=depth, forced=found.taps)
    for side in ("values", "gradients"):
        assert not differing(getattr(again.taps, side), getattr(found.taps, side)), side


def test_an_adapter_alone_has_gradients():
    draws = np.random.default_rng(3)
    shapes = adapter_shapes(read_model(CASES["llama"]), ADAPTER)
    held = {name: draws.normal(0, 0.3, shape) for name, shape in shapes.items()}
    subject = build("llama", adapter=ADAPTER, adapter_weights=held)
    found = subject.probe(loss_of("llama"), batch(), depth="layers")
    gradients = subject.gradients(loss_of("llama"), batch())
    assert list(found.gradients) == list(gradients) == list(held)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, rtol=1e-10, atol=1e-14, err_msg=name)
    # The adapter is in the layers that are looked into.
    assert "layers.0.out" in differing(found.taps.values, {n: clean("llama").taps.values[n] for n in found.taps.values})


# -- forcing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_tap_s_gradient_is_the_slope_of_the_loss_along_a_forced_value(name):
    """Another value forced on one tap, all behind it follows: a central difference along a random direction."""
    step = 1e-5
    for tap, value in clean(name).taps.values.items():
        if tap.startswith("layers.0.") and tap != "layers.0.out":
            continue  # as in layer 1
        direction = np.random.default_rng(len(tap)).normal(size=value.shape)
        sides = []
        for sign in (1, -1):
            found = probed(name, Taps(values={tap: value + sign * step * direction}, gradients={}))
            assert np.array_equal(found.taps.values[tap], value), tap  # what is recorded is what was computed
            sides.append(found.metrics["loss"])
        slope = float((clean(name).taps.gradients[tap] * direction)[REAL].sum())
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-9), tap
        assert abs(slope) > 1e-6, tap


@pytest.mark.parametrize("name", CASES)
def test_forced_to_its_own_numbers_a_model_gives_them_again_to_the_last_bit(name):
    """Whatever the other engine left on padding is not read."""
    found = clean(name)

    def with_rubbish(tensors: Tensors) -> Tensors:
        made = {tap: value.copy() for tap, value in tensors.items()}
        for value in made.values():
            value[~REAL] = np.nan
        return made

    own = Taps(values=with_rubbish(found.taps.values), gradients=with_rubbish(found.taps.gradients))
    again = probed(name, own)
    assert again.metrics == found.metrics
    assert not differing(again.gradients, found.gradients)
    assert not differing(again.taps.values, found.taps.values)
    assert not differing(again.taps.gradients, found.taps.gradients)


def test_a_gradient_forced_in_the_middle_goes_down_and_not_up():
    found = clean("llama")
    zero = np.zeros_like(found.taps.gradients["layers.0.out"])
    cut = probed("llama", Taps(values={}, gradients={"layers.0.out": zero}))
    assert cut.metrics == found.metrics
    assert not differing(cut.taps.values, found.taps.values)
    lower = differing(cut.taps.gradients, found.taps.gradients)
    assert lower == {tap for tap in found.taps.values if tap == "embed" or tap.startswith("layers.0.")} - {
        "layers.0.out"
    }
    assert all(not cut.taps.gradients[tap].any() for tap in lower)
    below = {tensor for tensor in found.gradients if "layers.0." in tensor or "embed" in tensor}
    assert differing(cut.gradients, found.gradients) == below
    assert all(not cut.gradients[tensor].any() for tensor in below)


# -- with all taps forced, an operation's bug is seen at that operation ------------------------------------------------


def made_by(config: Any, head: str, slot: str) -> str:
    """The tap (of a layer: the last part of its name) that the operation of a slot makes."""
    if slot in ("embedding", "positions", "project_in") or slot.startswith("embedding_norm"):
        return "embed"
    if slot in ("head", "head_bias"):
        return "logprobs"
    if slot == "score":
        return "scores"
    if slot == "project_out" or slot.startswith("final_norm"):
        return "final"
    if not isinstance(config, DecoderConfig):
        return {"input": "input", "recurrent_bias": "input", "recurrent": "out"}[slot]
    if slot.startswith("mlp_norm") and config.block == "post":
        return "out"
    if config.experts is not None and slot in ("gate", "up", "down"):
        return "down"
    return slot.removesuffix("_bias")


def read_by(config: Any, tap: str, layer: int) -> list[str]:
    """The taps that the operation behind a tap reads."""
    last, this = f"layers.{config.num_layers - 1}.out", f"layers.{layer}."
    if tap in ("embed", "final", "logprobs", "scores"):
        return {"embed": [], "final": [last]}.get(tap, ["final"])
    before = "embed" if layer == 0 else f"layers.{layer - 1}.out"
    if not isinstance(config, DecoderConfig):
        return [{"input": before, "out": f"{this}input"}[tap]]
    block = config.block
    middle = {
        "pre": [before, f"{this}output"],
        "post": [f"{this}attention_norm"],
        "output": [before, f"{this}attention_out_norm"],
        "sandwich": [before, f"{this}attention_out_norm"],
        "parallel": [before],
    }[block]
    into_attention = [before] if block in ("post", "output") else [f"{this}attention_norm"]
    into_mlp = middle if block in ("post", "output") else [f"{this}mlp_norm"]
    reads = {
        "attention_norm": [before, f"{this}output"] if block == "post" else [before],
        **dict.fromkeys(("query", "key", "value"), into_attention),
        "query_norm": [f"{this}query"],
        "key_norm": [f"{this}key"],
        "output": [f"{this}attention"],
        "attention_out_norm": [f"{this}output"],
        "mlp_norm": middle,
        **dict.fromkeys(("gate", "up", "router"), into_mlp),
        "down": [f"{this}inner"] if config.experts is None else [*into_mlp, f"{this}router"],
        "mlp_out_norm": [f"{this}down"],
        "out": [f"{this}attention_norm", f"{this}down"],
    }
    return reads[tap]


# Slots that are added last: the gradients below their operation do not depend on them.
ADDED = ("positions", "recurrent_bias")


def roles(rule: Any, table: Any) -> tuple[str, ...]:
    """The slots that a tensor is: tied embeddings are the head's too."""
    tied = rule.slots == ("embedding",) and "head" not in table and "score" not in table
    return (*rule.slots, "head") if tied else rule.slots


def joint(config: Any, tap: str) -> bool:
    """Does the gradient of one weight of the operation behind a tap depend on the operation's weights?"""
    if isinstance(config, DecoderConfig):
        return tap in ("embed", "logprobs") or (tap == "down" and config.experts is not None)
    return tap in ("logprobs", "out")


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_weight_shows_at_its_own_operation_and_nowhere_else(name):
    """Every tensor of the last layer and of the top in turn is a bug; all taps are forced to the clean model's."""
    config, head, found = read_model(CASES[name]), head_of(name), clean(name)
    broken, given, layer = build(name), hot(name), config.num_layers - 1
    table, rules = model_slots(config, head), tensor_rules(config, head)
    tensors = {rule: rule.names(config, layer if rule.per_layer else None) for rule in rules}
    makes = {rule: {made_by(config, head, slot) for slot in roles(rule, table)} for rule in rules}
    for rule in rules:
        tensor = tensors[rule][0]
        noise = np.random.default_rng(5).normal(0, 0.1, given[tensor].shape)
        broken.load_weights(given | {tensor: given[tensor] + noise})
        seen = broken.probe(loss_of(name), batch(), depth="ops", forced=found.taps)
        values = {f"layers.{layer}.{tap}" if rule.per_layer else tap for tap in makes[rule]}
        gradients = {
            read
            for slot in roles(rule, table)
            if slot not in ADDED and (slot == "head_bias" or not slot.endswith("_bias"))
            for read in read_by(config, made_by(config, head, slot), layer)
        }
        related = {
            one for other in rules for one in tensors[other] for tap in makes[rule] & makes[other] if joint(config, tap)
        }
        assert changed(seen.taps.values, found.taps.values, REAL) == values, tensor
        assert changed(seen.taps.gradients, found.taps.gradients, REAL) == gradients, tensor
        assert changed(seen.gradients, found.gradients) <= related, tensor


# -- a value is what its name says, in NumPy ---------------------------------------------------------------------------

LINEAR = {
    "query": "btd,dnh->btnh", "key": "btd,dkh->btkh", "value": "btd,dkh->btkh", "output": "btnh,nhd->btd",
    "gate": "btd,df->btf", "up": "btd,df->btf", "down": "btf,fd->btd", "router": "btd,dx->btx", "input": "btd,de->bte",
}  # fmt: skip


def normed(x: Any, norm: Any, slots: Tensors, name: str) -> Any:
    gain = slots[name] + norm.offset
    axes = tuple(range(-gain.ndim, 0))
    x = x - x.mean(axis=axes, keepdims=True) if norm.kind == "layer" else x
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + norm.eps) * gain + slots.get(f"{name}_bias", 0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_value_is_what_its_name_says(name):
    config, head, values = read_model(CASES[name]), head_of(name), clean(name).taps.values
    layer, first, slots = config.num_layers - 1, REAL.argmax(axis=1), {}
    for rule in tensor_rules(config, head):
        if rule.per_layer and not rule.per_expert:
            slots |= rule.split(hot(name)[rule.names(config, layer)[0]], model_slots(config, head))
    at = {tap.rpartition(".")[2]: value for tap, value in values.items() if tap.startswith(f"layers.{layer}.")}
    expected: Tensors = {}
    for tap in at:
        if tap in LINEAR and tap in slots:
            read = sum(values[one] for one in read_by(config, tap, layer))
            bias = slots.get("recurrent_bias" if tap == "input" else f"{tap}_bias", 0.0)
            expected[tap] = np.einsum(LINEAR[tap], read, slots[tap]) + bias
        elif tap.endswith("norm"):
            read = sum(values[one] for one in read_by(config, tap, layer))
            expected[tap] = normed(read, config.norm, slots, tap)
    if isinstance(config, DecoderConfig):
        if config.activation == "silu" and config.experts is None:
            expected["inner"] = at["gate"] / (1 + np.exp(-at["gate"])) * at["up"]
        if config.activation == "relu":
            expected["inner"] = np.maximum(at["up"], 0)
        written = [at.get("attention_out_norm", at["output"]), at.get("mlp_out_norm", at["down"])]
        if config.block == "post":
            expected["out"] = normed(at["attention_norm"] + at["down"], config.norm, slots, "mlp_norm")
        else:
            expected["out"] = values[f"layers.{layer - 1}.out"] + sum(written)
        # An example's first token is at position 0, and reads itself alone.
        groups = config.num_heads // config.num_kv_heads
        rows = np.arange(ROWS)
        np.testing.assert_allclose(at["attention"][rows, first], at["value"][rows, first].repeat(groups, 1), atol=1e-14)
        for part in ("query", "key"):
            if config.ropes:
                turned, read = at[f"{part}_rotated"], at.get(f"{part}_norm", at[part])
                np.testing.assert_allclose(turned[rows, first], read[rows, first], atol=1e-14)
                np.testing.assert_allclose((turned**2).sum(axis=-1), (read**2).sum(axis=-1), rtol=1e-12)
                assert np.abs(turned - read)[REAL].max() > 0.1
    else:
        expected["input"][~REAL] = 0
        assert np.array_equal(at["input"][~REAL], expected["input"][~REAL])
    assert expected
    for tap, value in expected.items():
        np.testing.assert_allclose(at[tap][REAL], value[REAL], rtol=1e-11, atol=1e-13, err_msg=tap)


# -- what a probe leaves as it was -------------------------------------------------------------------------------------


def jaxpr_of(name: str) -> str:
    """A training step's program before it is compiled."""
    subject, loss = model_of(name), loss_of(name)
    inputs, program = subject._inputs(loss, batch()), subject._program(loss, batch())

    def step(*parts: Any) -> Any:
        return training.gradients.__wrapped__(*parts, program=program)  # what jit has traced before it would not again

    text = str(jax.make_jaxpr(step)(subject._state.model, subject._frozen, inputs))
    return re.sub("0x[0-9a-f]+", "", text)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "rnn"])
def test_training_is_the_program_that_it_is_without_taps(name, monkeypatch):
    clean(name)  # a probe leaves nothing behind
    before = jaxpr_of(name)

    def replace_taps(tap: Any) -> None:
        for module in (experts, logprobs, model, recurrent):
            monkeypatch.setattr(module, "tap", tap)

    for module in (model, recurrent):
        monkeypatch.setattr(module, "over_layers", lambda body, carry, layers, _: jax.lax.scan(body, carry, layers))
    replace_taps(lambda name, value, *layout, **sizes: value)
    assert jaxpr_of(name) == before
    replace_taps(lambda name, value, *layout, **sizes: value + 0)  # canary
    assert jaxpr_of(name) != before


def test_outside_a_probe_and_after_one_that_failed_a_tap_is_its_value():
    value = jax.numpy.ones(3)
    assert inside.tap("query", value, "a -> a") is value

    def broken(outputs: Any, **_: Any) -> Any:
        raise RuntimeError("no such loss")

    with pytest.raises(RuntimeError, match="no such loss"):
        model_of("llama").probe(replace(loss_of("llama"), function=broken), batch(), depth="ops")
    assert inside.tap("query", value, "a -> a") is value


def test_whatever_is_forced_runs_through_one_program(count_compilations):
    found = clean("llama")
    some = Taps(values={"embed": found.taps.values["embed"]}, gradients={"final": found.taps.gradients["final"]})
    probed("llama", some)
    with count_compilations() as count:
        for forced in (None, some, found.taps):
            probed("llama", forced)
    assert count() == 0


# -- errors ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_forced_is_named():
    values = clean("llama").taps.values
    wrong = {
        "at depth ops this model has no tap layers.0.router, layers.7.query": {
            "layers.7.query": values["embed"], "layers.0.router": values["embed"], "embed": values["embed"],
        },
        r"layers.1.key is float64 \[3, 9, 4, 4\], the tap is float \[3, 9, 2, 4\]": {
            "embed": values["embed"], "layers.1.key": values["layers.1.query"],
        },
        r"embed is int64 \[3, 9, 16\], the tap is float \[3, 9, 16\]": {"embed": values["embed"].astype(np.int64)},
    }  # fmt: skip
    for text, tensors in wrong.items():
        with pytest.raises(ValueError, match=f"forced values: .*{text}"):
            probed("llama", Taps(values=tensors, gradients={}))
        with pytest.raises(ValueError, match=f"forced gradients: .*{text}"):
            probed("llama", Taps(values={}, gradients=tensors))
    only_ops = Taps(values={"layers.0.query": values["layers.0.query"]}, gradients={})
    with pytest.raises(ValueError, match="at depth layers this model has no tap layers.0.query"):
        model_of("llama").probe(loss_of("llama"), batch(), depth="layers", forced=only_ops)
    with pytest.raises(ValueError, match="head='scalar'"):
        model_of("llama").probe(loss_of("olmo2, scalar"), batch(), depth="ops")


def test_a_model_on_two_devices_or_with_a_fused_kernel_cannot_be_looked_into(monkeypatch):
    with pytest.raises(UserError, match="set layout.attention=xla"):
        check_place(model_of("llama")._mesh, "splash")
    monkeypatch.setenv("DIPTYCH_DEVICES", "2")
    with pytest.raises(UserError, match="on 2 devices of 1 processes: start one process with DIPTYCH_DEVICES=1"):
        build("llama").probe(loss_of("llama"), batch(), depth="ops")
