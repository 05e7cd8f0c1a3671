"""The switch between meshes: what arrives, what it costs, and that a wrong copy is seen."""

from __future__ import annotations

import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from diptych.engine import EngineSettings, ModelSpec, PromptBatch, Sampling
from diptych.errors import InvariantError, UserError
from diptych.families.family import model_slots, read_model
from diptych.layout import Layout, MeshShape
from diptych_jax import switch, weights
from diptych_jax.engine import create
from diptych_jax.mesh import parameter_sharding, train_mesh

TRAIN = [(1, 8, 1), (2, 2, 2), (8, 1, 1), (2, 1, 4), (1, 4, 2)]
DECODE = [(8, 1), (4, 2), (2, 4)]


def _shape(sizes):
    return MeshShape(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


@pytest.fixture
def laid(tiny_config, hot_weights):
    """laid(train, decode): a model on the train mesh, and both meshes."""

    def make(train, decode, **changes):
        config = tiny_config(**{"num_attention_heads": 8, "num_key_value_heads": 4, **changes})
        mesh = train_mesh(_shape(train), jax.devices()[: math.prod(train)])
        model = weights.pack(read_model(config), "lm", hot_weights(config, "lm"), np.dtype(np.float32), mesh=mesh)
        return model, switch.meshes(mesh, MeshShape(data=decode[0], tensor=decode[1]))

    return make


def _least_bytes(model, over, itemsize):
    """What the decode mesh's shards hold beyond what their devices have already, over all devices."""
    total = 0
    for name, slot in model_slots(model.config, "lm").items():
        shape = model.arrays()[name].shape
        here = parameter_sharding(slot, over.train).devices_indices_map(shape)
        there = parameter_sharding(slot, over.decode).devices_indices_map(shape)
        for device, index in there.items():
            bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
            own = [s.indices(n) for s, n in zip(here[device], shape, strict=True)]
            size = math.prod(stop - start for start, stop, _ in bounds)
            common = math.prod(
                max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(bounds, own, strict=True)
            )  # fmt: skip
            total += (size - common) * itemsize
    return total


@pytest.mark.parametrize("train", TRAIN)
def test_every_parameter_arrives_and_few_bytes_move(train, laid):
    for decode in DECODE:
        model, over = laid(train, decode)
        done = switch.switch(model, over, "bfloat16")
        stacked = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in model.arrays().items()}
        table = model_slots(model.config, "lm")
        for name, slot in table.items():
            for layer in range(2) if slot.per_layer else [None]:
                copy = done.model[name] if layer is None else done.model.layers[layer][name]
                wanted = stacked[name] if layer is None else stacked[name][layer]
                assert (np.asarray(copy) == wanted).all(), (decode, name)
                assert copy.sharding.mesh == over.decode
        least = _least_bytes(model, over, 2)
        assert least <= done.bytes_moved <= 1.2 * least


def test_the_programs_collectives_move_what_is_counted(laid):
    """The bytes of the compiled program's own collectives, read from its text."""
    model, over = laid((1, 4, 2), (2, 4))
    table = model_slots(model.config, "lm")
    names = [name for name, slot in table.items() if slot.per_layer]
    arrays = {name: model.arrays()[name] for name in names}
    with jax.set_mesh(over.fine):
        text = switch.depart.lower(
            arrays, None, np.int32(0), table=tuple((name, table[name]) for name in names), over=over,
            dtype="float32", one_layer=True,
        ).compile().as_text()  # fmt: skip
    kinds = re.findall(r" (all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert set(kinds) <= {"all-gather", "all-to-all", "all-reduce"}
    assert {"all-gather", "all-to-all"} <= set(kinds)
    reduced = re.findall(r"= \(?([^)=]*?)\)? all-reduce", text)  # fingerprints only: single words
    assert all(set(re.findall(r"\w+\[[\d,]*\]", shapes)) == {"u32[]"} for shapes in reduced)


def test_chunks_change_nothing(laid):
    model, over = laid((2, 2, 2), (4, 2))
    whole, parts = (switch.switch(model, over, "float32", chunk=chunk) for chunk in (None, 1))
    for a, b in zip(jax.tree.leaves(whole.model), jax.tree.leaves(parts.model), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert whole.bytes_moved == parts.bytes_moved


def test_fingerprints_see_values_and_places_and_not_the_mesh(laid):
    model, _ = laid((2, 2, 2), (4, 2))
    array = model.arrays()["up"]
    plain = np.asarray(array)
    prints = [int(switch.fingerprints({"x": x})["x"]) for x in (array, plain)]
    assert prints[0] == prints[1]
    swapped = plain.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    nudged = plain.copy()
    nudged[1, 3, 5] = np.nextafter(nudged[1, 3, 5], 1)
    for other in (swapped, nudged, plain.astype(ml_dtypes.bfloat16)):
        assert int(switch.fingerprints({"x": other})["x"]) != prints[0]


def test_a_parameter_that_does_not_arrive_stops_the_run(laid, monkeypatch):
    """Canary: two devices' shards change places on the way."""
    model, over = laid((1, 8, 1), (4, 2))
    right = switch._on_decode_mesh

    def wrong(array, slot, meshes):
        copy = right(array, slot, meshes)
        if array.shape != (32, 48):
            return copy
        shards = [shard.data for shard in copy.addressable_shards]
        devices = [shard.device for shard in copy.addressable_shards]
        crossed = [jax.device_put(part, device) for part, device in zip(shards[1:] + shards[:1], devices, strict=True)]
        return jax.make_array_from_single_device_arrays(copy.shape, copy.sharding, crossed)

    monkeypatch.setattr(switch, "_on_decode_mesh", wrong)
    with pytest.raises(InvariantError, match="(gate|up) of layer 0 did not arrive as it left the train mesh"):
        switch.switch(model, over, "float32")


def test_meshes_that_cannot_be_laid_over_each_other_are_refused():
    mesh = train_mesh(MeshShape(fsdp=3, tensor=2), jax.devices()[:6])
    with pytest.raises(UserError, match="layout.decode.tensor: 3 devices cannot be laid over a train mesh of fsdp 3"):
        switch.meshes(mesh, MeshShape(data=2, tensor=3))


def test_the_decode_copy_is_made_when_weights_have_changed(
    tiny_config, hot_weights, adamw, sft, sft_batch, ragged_batch, monkeypatch
):
    monkeypatch.setenv("DIPTYCH_DEVICES", "8")
    layout = Layout(train=MeshShape(fsdp=8), decode=MeshShape(data=8), switch_check="logprobs", switch_chunk=1)
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4)
    model = create(EngineSettings(precision="float64", layout=layout)).model(
        ModelSpec(config=config, weights=hot_weights(config, "lm"), head="lm", optimizer=adamw, micro_batch_size=8)
    )
    rows = ragged_batch(8, 6)
    prompts = PromptBatch(tokens=rows.tokens, attention=rows.attention, positions=rows.positions)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=3, stop_token_ids=())

    def generate():
        done = model.generate(prompts, sampling, np.full((8, 3), 0.5), pad_token_id=0)
        return done, model.rollout_metrics()

    first, cost = generate()
    assert cost["switch/bytes_moved"] > 0
    assert cost["timing_s/switch"] > 0
    assert cost["switch/logprob_gap_max"] < 1e-12
    _, again = generate()
    assert again == {}  # the weights are the same
    model.update(sft, sft_batch(8), learning_rate=0.1)
    second, cost = generate()
    assert cost["switch/bytes_moved"] > 0
    assert np.abs(first.logprobs - second.logprobs).max() > 1e-3  # canary: a stale copy would give the same
    monkeypatch.setattr("diptych_jax.engine.TOLERANCES", {"sampler_gap": _Tolerance()})
    model.load_weights(model.weights())
    with pytest.raises(InvariantError, match="log-probabilities of the prompts differ"):
        generate()


class _Tolerance:
    """A band that nothing meets."""

    def at(self, precision):
        del precision
        return -1.0
