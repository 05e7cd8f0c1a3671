"""DeepSpeed's configuration from the recipe, what may be added to it, offload, bfloat16, and activation checkpointing.

One process here; several, and the JAX engine beside them, in parity_tests/test_zero.py.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import EngineSettings, Loss, ModelSpec, OptimizerSpec, TokenBatch, TrainBatch, load_engine
from diptych.errors import UserError
from diptych.layout import Layout, Zero
from diptych_torch import zero

# eps: not in the way of rounding, which Adam would amplify where a gradient is about 0.
ADAMW = OptimizerSpec(name="adamw", eps=1e-4, weight_decay=0.1, max_grad_norm=0.3, ema_decay=0.9)


def objective(logprobs: Any, *, weight: Any, total: float) -> Any:
    return -(logprobs * weight).sum() / total, {"weight": weight.sum() / total, "logprob_max": logprobs.max()}


LOSS = Loss(function=objective, reads="logprobs")


@pytest.fixture
def data(make_batch, wanted):
    batch = make_batch(rows=4)
    weight = wanted(batch) * np.random.default_rng(3).normal(size=batch.tokens.shape)
    return TrainBatch(tokens=batch, arrays={"weight": weight.astype(np.float32)}, denominators={"total": 25.0})


@pytest.fixture
def make(hot_weights, make_config):
    def build(
        stage: int = 1, *, precision: Any = "float32", optimizer: OptimizerSpec = ADAMW, micro_batch_size: int = 2,
        remat: Any = "full", logprob_chunk: int = 1024, deepspeed: Any = None, config: Any = None, **offload: bool,
    ) -> Any:  # fmt: skip
        layout = Layout(zero=Zero(stage=stage, **offload))
        settings = EngineSettings(precision=precision, layout=layout, remat=remat, deepspeed=deepspeed or {})
        config = config or make_config()
        return load_engine("torch", settings).model(
            ModelSpec(
                config=config, weights=hot_weights(config), head="lm",
                optimizer=optimizer, micro_batch_size=micro_batch_size, logprob_chunk=logprob_chunk,
            )
        )  # fmt: skip

    return build


FLOATS = ("float32", "bfloat16")
SPLIT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # tiny tensors too are cut at stage 3


def everything(model: Any, data: TrainBatch, *, steps: int = 3) -> dict[str, Any]:
    """Metrics of a few steps, and all that they leave."""
    metrics = [model.update(LOSS, data, learning_rate=1e-2) for _ in range(steps)]
    found: dict[str, Any] = {f"{name} {step}": row[name] for step, row in enumerate(metrics) for name in row}
    state = model.optimizer_state()
    for kind, tensors in (
        ("weight", model.weights()), ("average", model.ema_weights()), ("first", state.first), ("second", state.second)
    ):  # fmt: skip
        found |= {f"{kind} {name}": value for name, value in tensors.items()}
    return found


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(np.asarray(one[name], np.float64) - other[name]).max()) for name in one)


# -- configuration -----------------------------------------------------------------------------------------------------


def config_of(stage: int = 2, *, more: Any = None, dtype: torch.dtype = torch.float32, **offload: bool) -> Any:
    return zero.ds_config(
        Zero(stage=stage, **offload), elements=1000, micro_batch_size=3, dtype=dtype, max_grad_norm=0.5, more=more or {}
    )


def test_the_recipe_becomes_deepspeeds_configuration():
    plain = config_of(0)
    assert plain["zero_optimization"]["stage"] == 0
    assert plain["gradient_clipping"] == 0.0  # stage 0 does not clip as the others do: the engine does it
    assert plain["train_micro_batch_size_per_gpu"] == 3
    assert plain["gradient_accumulation_steps"] == 1  # losses come divided
    assert not plain["bf16"]["enabled"]
    assert "data_types" not in plain
    split = config_of(3, dtype=torch.bfloat16, offload_optimizer=True, offload_param=True)
    assert split["gradient_clipping"] == 0.5
    assert split["bf16"]["enabled"]
    assert split["data_types"] == {"grad_accum_dtype": "fp32"}
    assert split["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert split["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert not any("offload" in key for key in config_of(3)["zero_optimization"])
    assert config_of(1)["zero_optimization"]["reduce_bucket_size"] == 1000  # as many as there are


def nested(place: str, value: Any) -> dict[str, Any]:
    first, _, rest = place.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("place", zero.OF_THE_RECIPE)
def test_what_the_recipe_decides_is_named(place):
    with pytest.raises(UserError) as caught:
        config_of(more=nested(place, {"enabled": True}))
    assert str(caught.value).startswith(f"deepspeed.{place}: the recipe decides this: set {zero.OF_THE_RECIPE[place]}")


@pytest.mark.parametrize(
    "place",
    ["zero_optimization.reduce_scatter", "prescale_gradients", "zero_allow_untested_optimizer", "zero_optimization"],
)
def test_what_the_numbers_rest_on_is_not_changed(place):
    with pytest.raises(UserError, match=rf"deepspeed\.{place}: Diptych sets it to "):
        config_of(more=nested(place, True))


@pytest.mark.parametrize("place", zero.FREE)
def test_sizes_may_be_others(place):
    *path, last = place.split(".")
    bfloat16 = torch.bfloat16  # where all of them have a value
    before, after = config_of(dtype=bfloat16), config_of(dtype=bfloat16, more=nested(place, 7))
    for name in path:
        before, after = before[name], after[name]
    assert before[last] != 7
    assert after == {**before, last: 7}


def test_further_settings_are_added():
    more = {"comms_logger": {"enabled": True}, "zero_optimization": {"overlap_comm": True}}
    found = config_of(more=more)
    assert found["comms_logger"] == {"enabled": True}
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["zero_optimization"]["stage"] == 2


def test_every_key_that_the_recipe_decides_is_one_of_deepspeeds():
    """Canary of the table: a key that DeepSpeed does not know would guard nothing."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for place in (*zero.OF_THE_RECIPE, *zero.FREE):
        if place.startswith("zero_optimization."):
            assert place.partition(".")[2] in known, place


# -- stages, offload, bfloat16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True}),
        (3, {"offload_param": True}),
        (3, {"offload_optimizer": True, "offload_param": True}),
    ],
    ids=str,
)
def test_offload_changes_no_number(make, data, stage, offload):
    plain = everything(make(1), data)
    model = make(stage, deepspeed=SPLIT, **offload)
    inner = model._deepspeed.optimizer
    is_offloaded = inner.offload_optimizer if stage == 3 else inner.cpu_offload
    assert is_offloaded == ("offload_optimizer" in offload)
    assert furthest(everything(model, data), plain) < 1e-6
    assert plain["grad_norm 0"] > 2 * 0.3  # clipping is at work


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_model_waits_in_host_memory_between_uses(data, hot_weights, make_config, monkeypatch, stage):
    """layout.offload: whole ones are put on the device for a pass and taken off again (here onto copies), split ones
    are DeepSpeed's to offload; the numbers stay."""
    config = make_config()
    zero_reference, found = Zero(stage=stage), []
    for offload in ((), ("reference",)):
        layout = Layout(zero_reference=zero_reference, offload=offload)
        engine = load_engine("torch", EngineSettings(precision="float32", layout=layout, deepspeed=SPLIT))
        spec = ModelSpec(
            config=config, weights=hot_weights(config), head="lm", optimizer=None, micro_batch_size=2, role="reference"
        )
        found.append(engine.model(spec))
    here, waiting = found
    expected = here.logprobs(data.tokens, temperature=1.0)
    if stage == 3:
        assert here._deepspeed.zero_offload_param() is None
        assert waiting._deepspeed.zero_offload_param().device == "cpu"
        np.testing.assert_array_equal(waiting.logprobs(data.tokens, temperature=1.0), expected)
        return
    waiting._waits_on_host = True  # no accelerator is here
    home = {name: weight.data_ptr() for name, weight in waiting._weights.items()}
    to = torch.Tensor.to

    def across(self: Any, *inputs: Any, **options: Any) -> Any:
        moved = to(self, *inputs, **options)
        return moved.clone() if "non_blocking" in options else moved

    monkeypatch.setattr(torch.Tensor, "to", across)
    used: list[int] = []
    waiting._network.register_forward_pre_hook(
        lambda module, _: used.append(module.named_weights()["lm_head.weight"].data_ptr())
    )
    np.testing.assert_array_equal(waiting.logprobs(data.tokens, temperature=1.0), expected)
    assert len(used) == 2
    assert home["lm_head.weight"] not in used
    assert {name: one.data_ptr() for name, one in waiting._network.named_weights().items()} == home


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_masters_in_float32(make, data, stage):
    """They are the weights as given, not as rounded; a step far below bfloat16's resolution is not lost; the first one
    of Adam's is as long as the learning rate (no step is counted before it); the average follows the masters."""
    spec = OptimizerSpec(name="adamw", eps=1e-12, max_grad_norm=None, ema_decay=0.5)
    model = make(stage, precision="bfloat16", optimizer=spec, deepspeed=SPLIT)
    before = model.weights()
    exact = make(0).weights()
    assert all(value.dtype == np.float32 for value in before.values())
    assert furthest(before, exact) == 0
    gradients = model.gradients(LOSS, data)
    rate = 1e-5
    model.update(LOSS, data, learning_rate=rate)
    after = model.weights()
    moved = 0
    for name, gradient in gradients.items():
        clear = np.abs(gradient) > 1e-2 * np.abs(gradient).max()
        step = (before[name] - after[name])[clear]
        np.testing.assert_allclose(step, rate * np.sign(gradient[clear]), rtol=0.05, atol=2e-7, err_msg=name)
        moved += clear.sum()
    assert moved > 1000
    for name, average in model.ema_weights().items():
        np.testing.assert_allclose(average, (before[name] + after[name]) / 2, atol=1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_micro_batches_are_summed_in_float32(make, make_batch, stage):
    """48 equal rows, one at a time: 48 times the gradient of one. bfloat16 sums would be off by a percent."""
    batch = make_batch(rows=3)
    norms = {}
    for count in (1, 48):
        rows = batch.take(np.full(count, 2))
        weight = np.ones(rows.tokens.shape, np.float32)
        model = make(stage, precision="bfloat16", micro_batch_size=1, deepspeed=SPLIT)
        repeated = TrainBatch(tokens=rows, arrays={"weight": weight}, denominators={"total": 10.0})
        norms[count] = model.update(LOSS, repeated, learning_rate=1e-3)["grad_norm"]
    assert norms[48] == pytest.approx(48 * norms[1], rel=1e-5)


@pytest.mark.parametrize(
    "layout", [Layout(zero=Zero(stage=0)), Layout(zero=Zero(stage=1), zero_critic=Zero(stage=0))], ids=["all", "critic"]
)
def test_stage_0_in_bfloat16_is_refused(layout):
    with pytest.raises(UserError, match=r"bfloat16 needs layout.zero.stage 1, 2 or 3"):
        load_engine("torch", EngineSettings(precision="bfloat16", layout=layout))


def test_offload_in_float64_is_refused():
    layout = Layout(zero=Zero(stage=2, offload_optimizer=True))
    with pytest.raises(UserError, match=r"float64 goes without layout.zero.offload_optimizer"):
        load_engine("torch", EngineSettings(precision="float64", layout=layout))


def test_stage_3_without_the_threshold_is_cut(make):
    """`SPLIT` does what it says: otherwise these tests would train whole tensors."""
    weights = make(3, deepspeed=SPLIT)._network.named_weights().values()
    assert all(weight.numel() == 0 for weight in weights)
    assert not any(weight.ds_persist for weight in weights)
    assert all(weight.ds_persist for weight in make(3)._network.named_weights().values())


def test_how_often_the_head_is_gathered_does_not_depend_on_what_is_wanted(make, make_batch):
    """ZeRO-3 gathers in all processes together, which have other rows each: padding alone too."""
    model = make(3, deepspeed=SPLIT, logprob_chunk=5)
    calls = []
    model._network.transformer.lm_head.register_forward_hook(lambda *_: calls.append(None))
    batch = make_batch(rows=4).take(np.array([0, 1]))
    padding = TokenBatch(tokens=batch.tokens * 0, attention=batch.attention & False, positions=batch.positions * 0)
    counts = []
    for one in (batch, padding, batch.take(np.array([0, 0]))):
        calls.clear()
        assert model.logprobs(one, temperature=1.0).any() == one.attention.any()
        counts.append(len(calls))
    assert counts == [5, 5, 5]  # 2 x 11 tokens in chunks of 5


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "rnn", "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2}]
)
def test_what_is_made_again_changes_no_number(make, make_config, data, config):
    kinds = ("none", "dots", "full")
    results = {kind: everything(make(remat=kind, config=config or None, precision="float64"), data) for kind in kinds}
    for kind in kinds[1:]:
        assert furthest(results[kind], results["none"]) < 1e-13


def test_full_makes_products_again_and_dots_does_not(make, data):
    """Matrix products, and the cheap rest, of one update."""
    counts = {}
    for kind in ("none", "dots", "full"):
        model = make(remat=kind)
        with Count() as counted:
            model.update(LOSS, data, learning_rate=1e-3)
        counts[kind] = counted.counts["aten::mm"], counted.counts["aten::silu"]
    layers, passes = 2, 2
    assert counts["none"][1] == layers * passes
    assert counts["dots"] == (counts["none"][0], 2 * layers * passes)
    products = 7  # query, key, value, output, gate, up, down
    made_again = counts["full"][0] - counts["none"][0]
    assert layers * passes * (products - 1) <= made_again <= layers * passes * products  # the last may be spared
    assert counts["full"][1] == 2 * layers * passes


def test_what_is_made_again_is_not_kept(make, data):
    """Elements that the backward pass waits for, outside of what checkpoints keep for themselves."""
    kept = {}
    for kind in ("none", "dots", "full"):
        model, kept[kind] = make(remat=kind), 0

        def pack(tensor: torch.Tensor, kind: str = kind) -> torch.Tensor:
            kept[kind] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.update(LOSS, data, learning_rate=1e-3)
    assert 0 < kept["full"] < 0.6 * kept["none"]
    assert 0 < kept["dots"] < 0.6 * kept["none"]


# -- letting go --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_that_is_no_longer_used_is_freed(make, data, stage, precision):
    """DeepSpeed's hooks would keep it: the model of sft would stay on the accelerator beside those of rl."""
    model = make(stage, precision=precision, deepspeed=SPLIT)
    model.update(LOSS, data, learning_rate=1e-3)
    held = [weakref.ref(one) for one in (model, model._network, model._deepspeed, model._deepspeed.optimizer or model)]
    del model
    for _ in range(2):  # the model, and then what it alone held on to
        gc.collect()
    assert [one() is None for one in held] == [True] * len(held)


def test_canary_without_release_it_is_kept(make, data, monkeypatch):
    monkeypatch.setattr(zero, "release", lambda engine: None)
    model = make(2)
    model.update(LOSS, data, learning_rate=1e-3)
    network, engine = weakref.ref(model._network), model._deepspeed
    del model
    gc.collect()
    assert network() is not None
    monkeypatch.undo()
    zero.release(engine)
    del engine
    gc.collect()
    assert network() is None
