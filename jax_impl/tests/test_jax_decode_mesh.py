"""Decoding on meshes of CPU devices, float64: the tokens of one device, and no cache that travels between devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diptych.engine import PromptBatch, Sampling
from diptych.families.family import model_slots, read_model
from diptych_jax import decode, weights
from diptych_jax.mesh import parameter_sharding, place

NEW, ROWS = 12, 11
needs_devices = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices (XLA_FLAGS, see conftest.py)")
pytestmark = needs_devices


@pytest.fixture(scope="module")
def on_one_device():
    """Rollouts of one device, by what changes them: made once."""
    return {}


def _mesh(data: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def _split(model, mesh: Mesh):
    """The model on a decode mesh."""
    table = model_slots(model.config, "lm")
    return weights.by_slot(
        lambda name, leaf: place(np.asarray(leaf), parameter_sharding(table[name], mesh)), model
    )  # fmt: skip


def _gathered(hlo: str) -> list[str]:
    """The shapes of four or more axes that are brought together from several devices."""
    found = re.findall(r"= (\S+) all-gather(?:-start)?\(", hlo)
    return [shape for shape in found if shape.split("[")[1].split("]")[0].count(",") >= 3]


@pytest.mark.parametrize(
    ("data", "tensor", "decode_rows", "kv_heads", "temperature"),
    [(2, 1, None, 4, 1.0), (4, 2, 5, 4, 1.0), (2, 4, 4, 4, 0.0), (2, 4, 3, 2, 1.0)],
)
def test_a_mesh_draws_the_tokens_of_one_device(
    data, tensor, decode_rows, kv_heads, temperature, on_one_device, tiny_config, hot_weights, ragged_batch, monkeypatch
):
    """Rows over data (11 do not divide), heads over tensor; two key-value heads for four devices are on all of them."""
    jax.config.update("jax_enable_x64", True)
    config = tiny_config(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=kv_heads)
    model = weights.pack(read_model(config), "lm", hot_weights(config, "lm"), np.dtype("float64"))
    batch = ragged_batch(ROWS, 9)
    prompts = PromptBatch(tokens=batch.tokens, attention=batch.attention, positions=batch.positions)
    uniforms = np.random.default_rng(1).random((ROWS, NEW), dtype=np.float32)

    def run(model, **where):
        sampling = Sampling(
            temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=NEW, stop_token_ids=(3, 9, 20, 31, 40),
            decode_rows=decode_rows if where else None,
        )  # fmt: skip
        done = decode.generate(model, prompts, sampling, uniforms, pad_token_id=0, **where)
        return done, decode.logprobs(model, batch, **where)

    key = kv_heads, temperature
    wanted, wanted_logprobs = on_one_device.get(key) or on_one_device.setdefault(key, run(model))
    compiled, program = [], decode.program

    def compile_first(*inputs, settings):
        compiled.append(program.lower(*inputs, settings=settings).compile())
        return compiled[0](*inputs)

    monkeypatch.setattr(decode, "program", compile_first)
    mesh = _mesh(data, tensor)
    with jax.set_mesh(mesh):
        done, logprobs = run(_split(model, mesh), mesh=mesh)
    for name in ("tokens", "mask", "finish"):
        np.testing.assert_array_equal(getattr(done, name), getattr(wanted, name))
    np.testing.assert_allclose(done.logprobs, wanted.logprobs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(done.margins, wanted.margins, rtol=0, atol=1e-12)
    np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-12)
    assert np.abs(wanted_logprobs).max() > 3
    hlo: str = compiled[0].as_text()
    assert "while" in hlo
    assert _gathered(hlo) == []


def test_canary_a_gathered_cache_is_seen():
    mesh = _mesh(2, 2)
    split = jax.device_put(jnp.zeros((2, 4, 5, 2)), NamedSharding(mesh, PartitionSpec("data", "tensor")))
    together = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec("data")))
    assert len(_gathered(str(together.lower(split).compile().as_text()))) == 1


def test_the_prompts_log_probabilities_are_the_training_forwards(tiny_model, tiny_config, hot_weights, ragged_batch):
    model, batch = tiny_model("float64"), ragged_batch(4, 9)
    packed = weights.pack(read_model(tiny_config()), "lm", hot_weights(tiny_config(), "lm"), np.dtype("float64"))
    wanted = model.logprobs(batch, temperature=1.0)
    np.testing.assert_allclose(decode.logprobs(packed, batch), wanted, rtol=0, atol=1e-12)
