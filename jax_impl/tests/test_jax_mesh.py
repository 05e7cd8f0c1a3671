"""Meshes of eight CPU devices against one device: nothing depends on the layout (float64, 1e-9)."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from diptych.algorithms.losses import pairwise_reward_loss, ppo_policy_loss
from diptych.engine import AdapterSpec, EngineSettings, Loss, ModelSpec, PromptBatch, Sampling, TrainBatch
from diptych.errors import UserError
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model
from diptych.layout import Layout, MeshShape
from diptych.parity.tolerances import TOLERANCES
from diptych_jax import mesh as meshes
from diptych_jax.engine import create

ONE = Layout(train=MeshShape(), decode=MeshShape())
LAYOUTS = {
    "fsdp 8": Layout(train=MeshShape(fsdp=8), decode=MeshShape(data=2, tensor=4)),
    "data 2, fsdp 2, tensor 2": Layout(train=MeshShape(data=2, fsdp=2, tensor=2), decode=MeshShape(data=4, tensor=2)),
    "tensor 4, data 2": Layout(train=MeshShape(data=2, tensor=4), decode=MeshShape(data=8)),
}
LIMIT = TOLERANCES["layout"].at("float64")
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
RNN = {"model_type": "rnn", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
OPTIONS = (("clip_range", 0.2),)


@pytest.fixture
def model(monkeypatch, tiny_config, hot_weights):
    """model(layout, ...): a float64 model on eight devices, or on one."""

    def make(layout, *, config=None, head="lm", optimizer=None, micro_batch_size=8, precision="float64", **changes):
        monkeypatch.setenv("DIPTYCH_DEVICES", "1" if layout == ONE else "8")
        config = config if config == RNN else tiny_config(**(config or SIZES))
        spec = ModelSpec(
            config=config, weights=hot_weights(config, head), head=head, optimizer=optimizer, logprob_chunk=10,
            micro_batch_size=micro_batch_size, **changes,
        )  # fmt: skip
        return create(EngineSettings(precision=precision, layout=layout)).model(spec)

    return make


def _largest(a, b):
    assert a.keys() == b.keys()
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


def _ppo(batch, seed=0):
    """A replayed PPO batch: perturbed old log-probabilities, so that ratios leave 1."""
    draws = np.random.default_rng(seed)
    shape = batch.tokens.tokens.shape
    arrays = {"old_logprobs": draws.normal(-4, 1, shape), "advantages": draws.normal(0, 1, shape), **batch.arrays}
    return replace(batch, arrays=arrays)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_scoring_and_decoding_do_not_depend_on_the_mesh(layout, model, adamw, sft, sft_batch, ragged_batch):
    batch = sft_batch(8)
    ppo = Loss(function=ppo_policy_loss, reads="logprobs", options=OPTIONS, entropy=True, temperature=0.7)
    prompts = ragged_batch(8, 6)
    prompts = PromptBatch(tokens=prompts.tokens, attention=prompts.attention, positions=prompts.positions)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=0.9, max_new_tokens=6, stop_token_ids=(3, 9))
    uniforms = np.random.default_rng(1).random((8, 6))
    found = []
    for which in (ONE, LAYOUTS[layout]):
        one = model(which, optimizer=adamw)
        steps = [one.update(loss, data, learning_rate=0.01) for loss, data in ((sft, batch), (ppo, _ppo(batch)))]
        state = one.optimizer_state()
        done = one.generate(prompts, sampling, uniforms, pad_token_id=0)
        found.append((steps, one.logprobs(batch.tokens, temperature=1.3), one.weights(), state.second, done))
    (steps, logprobs, weights, second, done), other = found
    assert max(map(_largest, steps, other[0])) <= LIMIT
    assert np.abs(logprobs - other[1]).max() <= LIMIT
    assert _largest(weights, other[2]) <= LIMIT
    assert _largest(second, other[3]) <= LIMIT
    assert (done.tokens == other[4].tokens).all()
    assert np.abs(done.logprobs - other[4].logprobs).max() <= LIMIT
    assert 0 < done.mask.sum() < done.mask.size  # rows ended at different columns
    assert np.abs(logprobs - one.logprobs(batch.tokens, temperature=1.2)).max() > LIMIT  # canary


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_that_do_not_fill_the_shards_change_nothing(size, model, adamw, sft_batch, capsys):
    """Pairs, whose loss reads rows two by two, in micro-batches of 2, 4 and 8 rows on eight shards."""
    batch = sft_batch(8)
    end = np.zeros_like(batch.arrays["mask"], dtype=np.float64)
    end[:, -1] = 1
    pairs = TrainBatch(tokens=batch.tokens, arrays={"end_mask": end}, denominators={"num_pairs": 4.0})
    loss = Loss(function=pairwise_reward_loss, reads="scores", options=(("center_coef", 0.01),))
    whole = model(ONE, head="scalar", optimizer=adamw).gradients(loss, pairs)
    parts = model(LAYOUTS["fsdp 8"], head="scalar", optimizer=adamw, micro_batch_size=2 * size)
    assert _largest(whole, parts.gradients(loss, pairs)) <= LIMIT
    one = model(ONE, head="scalar", optimizer=adamw)
    assert _largest(one.evaluate(loss, pairs), parts.evaluate(loss, pairs)) <= LIMIT
    told = capsys.readouterr().err.count("empty rows")
    assert told == (2 * size < 8)  # once, though two calls were filled up


@pytest.mark.parametrize("config", [MIXTRAL, RNN], ids=["experts", "recurrent"])
def test_other_models_on_a_mesh(config, model, adamw, sft, sft_batch, ragged_batch):
    """Experts are split over tensor (the router's gradient is a sum over the shares; a share's alone is another
    number); of a recurrent model only the vocabulary is."""
    batch = sft_batch(8)
    loss = replace(sft, balance=0.1)
    rows = ragged_batch(8, 6)
    prompts = PromptBatch(tokens=rows.tokens, attention=rows.attention, positions=rows.positions)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=4, stop_token_ids=())
    found = []
    for layout in (ONE, LAYOUTS["data 2, fsdp 2, tensor 2"]):
        made = model(layout, config=config, optimizer=adamw)
        done = made.generate(prompts, greedy, np.zeros((8, 4)), pad_token_id=0)
        found.append((made.gradients(loss, batch), done))
    assert _largest(found[0][0], found[1][0]) <= LIMIT
    assert (found[0][1].tokens == found[1][1].tokens).all()
    assert np.abs(found[0][1].logprobs - found[1][1].logprobs).max() <= LIMIT
    split = made._state.model["embedding"] if config is RNN else made._state.model.layers["gate"]
    assert split.addressable_shards[0].data.size * 4 == split.size


def test_adapters_and_averages_on_a_mesh(model, adamw, sft, sft_batch, ragged_batch, tiny_config):
    config, draws = read_model(tiny_config(**SIZES)), np.random.default_rng(3)
    spec = AdapterSpec(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    given = {name: draws.normal(0, 0.3, shape) for name, shape in adapter_shapes(config, spec).items()}
    prompts = ragged_batch(8, 6)
    prompts = PromptBatch(tokens=prompts.tokens, attention=prompts.attention, positions=prompts.positions)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=4, stop_token_ids=())
    found = []
    for layout in (ONE, LAYOUTS["data 2, fsdp 2, tensor 2"]):
        one = model(layout, optimizer=adamw, adapter=spec, adapter_weights=given)
        for _ in range(2):  # twice: what an update leaves is laid out as it was, or the second one would compile
            metrics = one.update(sft, sft_batch(8), learning_rate=0.01)
        done = one.generate(prompts, greedy, np.zeros((8, 4)), pad_token_id=0)
        found.append((metrics, one.adapter_weights(), one.ema_weights(), done))
    for part in range(3):
        assert _largest(found[0][part], found[1][part]) <= LIMIT
    assert (found[0][3].tokens == found[1][3].tokens).all()
    assert np.abs(found[0][3].logprobs - found[1][3].logprobs).max() <= LIMIT


def test_parameters_and_moments_are_split_and_stay_so(model, adamw, sft, sft_batch):
    one = model(LAYOUTS["data 2, fsdp 2, tensor 2"], optimizer=adamw)
    before = jax.tree.map(lambda leaf: leaf.sharding, one._state)
    one.update(sft, sft_batch(8), learning_rate=0.01)
    after = jax.tree.map(lambda leaf: leaf.sharding, one._state)
    same = jax.tree.map(lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), before, after, one._state)
    assert all(jax.tree.leaves(same))
    up = one._state.optimizer[0].second.layers["up"]  # [layers, model width, inner width] over fsdp and tensor
    assert up.addressable_shards[0].data.shape == (up.shape[0], up.shape[1] // 2, up.shape[2] // 2)


def test_other_roles_have_their_own_mesh_and_may_wait_on_the_host(model, ragged_batch):
    layout = replace(LAYOUTS["fsdp 8"], reference=MeshShape(data=2, tensor=4), offload=("reference",))
    rows = ragged_batch(8, 12)
    here = model(layout).logprobs(rows, temperature=1.0)
    waiting = model(layout, role="reference")
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((waiting._state.model, waiting._frozen))}
    assert kinds == {"pinned_host"}
    assert waiting._mesh.shape["tensor"] == 4
    assert np.abs(here - waiting.logprobs(rows, temperature=1.0)).max() <= LIMIT
    assert waiting._state.model["embedding"].sharding.memory_kind == "pinned_host"


def test_bfloat16_computes_in_half_and_keeps_float32(model, adamw, sft, sft_batch):
    """bfloat16 is a distributional matter: near float32, and unlike it. What is trained stays float32."""
    batch = sft_batch(8)
    wide = model(ONE, precision="float32", optimizer=adamw)
    half = model(LAYOUTS["data 2, fsdp 2, tensor 2"], precision="bfloat16", optimizer=adamw)
    a, b = (one.update(sft, batch, learning_rate=0.01) for one in (wide, half))
    assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert a["loss"] != pytest.approx(b["loss"], rel=1e-5)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half._state.model)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half._state.optimizer[0].second)} == {"float32"}
    frozen = model(ONE, precision="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen._model)} == {"bfloat16"}
    assert frozen.logprobs(batch.tokens, temperature=1.0).dtype == np.float32


def test_a_model_that_does_not_divide_is_refused_before_anything_is_allocated(model):
    layout = Layout(train=MeshShape(tensor=8), decode=MeshShape(data=8))
    live = len(jax.live_arrays())
    with pytest.raises(UserError, match=r"layout.train.tensor: query heads \(12\)"):
        model(layout, config={"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4})
    with pytest.raises(UserError, match=r"layout.decode.tensor: query heads \(4\)"):
        model(Layout(train=MeshShape(fsdp=8), decode=MeshShape(tensor=8)), config={"num_attention_heads": 4})
    assert len(jax.live_arrays()) == live


@pytest.mark.parametrize("wanted", ["0", "9", "two"])
def test_devices_that_are_not_there_are_refused(wanted, monkeypatch):
    monkeypatch.setenv("DIPTYCH_DEVICES", wanted)
    with pytest.raises(UserError, match=f"DIPTYCH_DEVICES={wanted}: give a number from 1 to 8"):
        create(EngineSettings(precision="float32"))


def test_constraints_and_rows_of_a_mesh():
    mesh = meshes.train_mesh(MeshShape(data=2, fsdp=2, tensor=2), jax.devices())
    assert meshes.num_shards(mesh) == 4
    host = np.arange(24.0, dtype=np.float32).reshape(2, 4, 3)
    rows = meshes.place_rows(host, mesh, axis=1)
    assert rows.addressable_shards[0].data.shape == (2, 1, 3)
    assert (meshes.to_host(rows) == host).all()
    with jax.set_mesh(mesh):
        lain = jax.jit(lambda x: meshes.constrain(x, None, "rows", "tensor"))(np.zeros((2, 8, 3), np.float32))
    assert lain.addressable_shards[0].data.shape == (2, 2, 3)  # 3 does not divide over tensor: whole
