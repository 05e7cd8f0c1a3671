"""Low-rank adapters: what is trained, at every ZeRO stage, what is saved, and what is refused. What they compute is
compared with merged weights, with PEFT and with the other engine in the parity tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diptych.engine import AdapterSpec, Loss, Model, OptimizerSpec, PromptBatch, Sampling, TokenBatch, TrainBatch
from diptych.errors import UserError
from diptych.families.adapter import SCORE, adapter_shapes, merge
from diptych.families.family import read_model
from diptych_torch import zero
from torch_impl.tests.plain import CASES, hot, ragged

SPEC = AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "o_proj", "mlp.up_proj"))
ADAMW = OptimizerSpec(name="adamw", weight_decay=0.1, max_grad_norm=0.3, ema_decay=0.9)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6, stop_token_ids=(99,))


def hot_adapter(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.normal(0, 0.2, shape) for name, shape in adapter_shapes(read_model(config), SPEC).items()}


def weighted(outputs: Any, *, weight: Any, total: float) -> Any:
    return (outputs * weight).sum() / total, {}


def loss_of(head: str) -> Loss:
    return Loss(function=weighted, reads="logprobs" if head == "lm" else "scores")


@pytest.fixture
def data(make_batch) -> TrainBatch:
    batch = make_batch(rows=4)
    factors = np.random.default_rng(5).normal(size=batch.tokens.shape) * batch.attention
    return TrainBatch(tokens=batch, arrays={"weight": factors.astype(np.float32)}, denominators={"total": 30.0})


@pytest.fixture
def adapted(make_model, make_config):
    def make(**changes: Any) -> Any:
        config = make_config()
        return make_model(**{"adapter": SPEC, "adapter_weights": hot_adapter(config), "optimizer": ADAMW, **changes})

    return make


def rounded(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def assert_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def split_parameters(monkeypatch) -> None:
    """ZeRO-3 divides tensors as small as these."""
    monkeypatch.setattr(zero, "PERSISTENCE_THRESHOLD", 0)


@pytest.mark.parametrize(("stage", "head"), [(0, "lm"), (0, "scalar"), (1, "scalar"), (2, "lm"), (3, "scalar")])
def test_training_changes_the_adapter_and_a_scalar_head_only(
    adapted, make_config, hot_weights, data, tmp_path, stage, head, split_parameters
):
    weights, adapter, loss = hot_weights(make_config(), head), hot_adapter(make_config()), loss_of(head)
    trained = {**adapter, SCORE: weights["score.weight"]} if head == "scalar" else adapter
    model, reference = adapted(head=head, stage=stage), adapted(head=head)
    assert isinstance(model, Model)
    assert_equal(model.adapter_weights(), rounded(trained))
    gradients = model.gradients(loss, data)
    assert gradients.keys() == trained.keys()
    assert all(np.abs(value).max() > 0 for value in gradients.values())
    for one in (model, reference):
        one.update(loss, data, learning_rate=1e-2)
    after = model.adapter_weights()
    for name, value in reference.adapter_weights().items():
        np.testing.assert_allclose(after[name], value, atol=2e-6, err_msg=name)
        assert np.abs(after[name] - trained[name]).max() > 5e-3  # canary: nothing trained is left out
    assert_equal(model.weights(), rounded({**weights, "score.weight": after[SCORE]} if head == "scalar" else weights))
    assert model.ema_weights().keys() == model.optimizer_state().first.keys() == trained.keys()

    model.save_checkpoint(tmp_path / "c")
    stored = sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.is_file())
    assert stored < 8 * 4 * sum(value.size for value in trained.values()) + 60_000  # not the base: 84 kB more
    other = adapted(head=head, stage=stage, adapter_weights={name: value * 0.5 for name, value in adapter.items()})
    other.load_checkpoint(tmp_path / "c")
    assert other.update(loss, data, learning_rate=1e-2) == model.update(loss, data, learning_rate=1e-2)
    assert_equal(other.adapter_weights(), model.adapter_weights())
    assert_equal(other.ema_weights(), model.ema_weights())
    assert_equal(other.weights(), model.weights())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_goes_in_and_out_by_pefts_names(adapted, make_config, hot_weights, data, stage, split_parameters):
    loss, other_base = loss_of("lm"), hot_weights(make_config(), seed=9)
    model, twin = adapted(stage=stage), adapted(stage=stage, adapter_weights={
        name: value + 1 for name, value in hot_adapter(make_config()).items()
    })  # fmt: skip
    model.update(loss, data, learning_rate=1e-2)
    twin.load_adapter(model.adapter_weights())
    twin.load_optimizer_state(model.optimizer_state())
    for one in (model, twin):
        one.load_weights(other_base)
        one.update(loss, data, learning_rate=1e-2)
    assert_equal(twin.adapter_weights(), model.adapter_weights())
    assert_equal(twin.weights(), rounded(other_base))
    assert_equal(twin.optimizer_state().second, model.optimizer_state().second)


@pytest.mark.parametrize("stage", [0, 3])
def test_below_the_adapter_is_the_base_bit_for_bit(
    adapted, make_model, make_config, hot_weights, data, stage, split_parameters
):
    batch, config = data.tokens, make_config()
    model, base = adapted(stage=stage), make_model(stage=stage)
    merged = make_model(weights=merge(read_model(config), SPEC, hot_weights(config), hot_adapter(config)))
    plain = base.logprobs(batch, temperature=1.0)
    above = model.logprobs(batch, temperature=1.0)
    np.testing.assert_array_equal(model.logprobs(batch, temperature=1.0, adapter=False), plain)
    np.testing.assert_array_equal(model.logprobs(batch, temperature=1.0), above)
    np.testing.assert_allclose(above, merged.logprobs(batch, temperature=1.0), atol=2e-5)
    assert np.abs(above - plain).max() > 1e-2  # canary: a forgotten adapter is seen
    model.update(loss_of("lm"), data, learning_rate=1e-2)  # what was switched off is trained again
    assert all(np.abs(v - hot_adapter(config)[n]).max() > 5e-3 for n, v in model.adapter_weights().items())


@pytest.mark.parametrize(("stage", "precision"), [(0, "float64"), (3, "float32")])
def test_decoding_reads_a_merged_copy_and_leaves_training_alone(adapted, data, stage, precision, split_parameters):
    tokens = data.tokens.tokens[2:]
    prompts = PromptBatch(
        tokens=tokens, attention=np.ones_like(tokens, bool), positions=np.tile(np.arange(11, dtype=np.int32), (2, 1))
    )
    model, undisturbed = (adapted(precision=precision, stage=stage) for _ in range(2))
    for _ in range(2):
        done = model.generate(prompts, GREEDY, np.zeros((2, 6)), pad_token_id=0)
        for one in (model, undisturbed):
            one.update(loss_of("lm"), data, learning_rate=1e-2)
    assert_equal(model.adapter_weights(), undisturbed.adapter_weights())
    assert_equal(model.weights(), undisturbed.weights())
    again = model.generate(prompts, GREEDY, np.zeros((2, 6)), pad_token_id=0)
    assert (again.logprobs != done.logprobs).any()
    joined = TokenBatch(
        tokens=np.concatenate([tokens, again.tokens], axis=1), attention=np.ones((2, 17), bool),
        positions=np.tile(np.arange(17, dtype=np.int32), (2, 1)), first=11,
    )  # fmt: skip
    limit = 1e-12 if precision == "float64" else 2e-5
    np.testing.assert_allclose(again.logprobs, model.logprobs(joined, temperature=1.0)[:, 11:], atol=limit)
    assert model.greedy_matches(joined)[:, 11:].all()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_keep_their_adapter_free_parameters(make_model, name):
    """transformers fuses experts, and PEFT rewrites targets for such models: only attention carries an adapter."""
    spec = replace(SPEC, targets=("all-linear",))
    shapes = adapter_shapes(read_model(CASES[name]), spec)
    rng = np.random.default_rng(7)
    adapter = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    weights, batch = hot(CASES[name]), ragged()
    build = {"config": CASES[name], "precision": "float64"}
    model = make_model(**build, weights=weights, adapter=spec, adapter_weights=adapter)
    merged = make_model(**build, weights=merge(read_model(CASES[name]), spec, weights, adapter))
    above, expected = (one.logprobs(batch, temperature=1.0) for one in (model, merged))
    np.testing.assert_allclose(above, expected, atol=1e-12)
    assert_equal(model.weights(), weights)
    some = [list(weights)[-1], "model.layers.1.self_attn.q_proj.weight", *[n for n in weights if "experts.3" in n]]
    assert list(model.weights(some)) == some
    assert_equal(model.weights(some), {name: weights[name] for name in some})


def test_float64_stays_float64(adapted, data):
    model = adapted(precision="float64")
    seen = []
    for module in model._network.modules():
        if hasattr(module, "lora_A"):
            module.lora_B["default"].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    model.logprobs(data.tokens, temperature=1.0)
    assert set(seen) == {torch.float64}
    assert len(seen) == 2 * 6  # two micro-batches, three layers in each of two blocks


def test_what_does_not_fit_is_named(adapted, make_model, make_config, hot_weights, data, tmp_path):
    adapter = hot_adapter(make_config())
    wrong = dict(list(adapter.items())[1:])
    with pytest.raises(UserError, match="missing or left over base_model"):
        adapted(adapter_weights=wrong)
    model, plain = adapted(), make_model(optimizer=ADAMW)
    with pytest.raises(UserError, match="missing or left over base_model"):
        model.load_adapter(wrong)
    with pytest.raises(UserError, match="missing or left over base_model"):
        model.load_optimizer_state(plain.optimizer_state())
    name = next(iter(adapter))
    with pytest.raises(UserError, match=r"has shape \[2, 32\], the model has \[3, 32\]"):
        model.load_adapter({**adapter, name: adapter[name][:2]})
    with pytest.raises(UserError, match=r"missing or left over base_model.model.score.weight"):
        adapted(head="scalar").load_adapter(adapter)
    for refused in (plain.adapter_weights, lambda: plain.load_adapter({})):
        with pytest.raises(ValueError, match="no adapter"):
            refused()
    with pytest.raises(ValueError, match="no adapter"):
        plain.logprobs(data.tokens, temperature=1.0, adapter=False)
    with pytest.raises(UserError, match="'c_attn' names no linear layer"):
        adapted(adapter=replace(SPEC, targets=("c_attn",)))
    model.save_checkpoint(tmp_path / "c")
    with pytest.raises(UserError, match="the checkpoint has adapter = "):
        adapted(adapter=replace(SPEC, alpha=3.0)).load_checkpoint(tmp_path / "c")
