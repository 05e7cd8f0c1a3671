"""Layouts before any device: sizes that fill, axes that divide, bytes that add up."""

from __future__ import annotations

import math

import pytest

from diptych.errors import UserError
from diptych.families.family import model_slots, read_model
from diptych.layout import DECODE_RULES, TRAIN_RULES, Layout, MeshShape, check_slots, resolve, shard_size, slot_spec

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
RNN = {"model_type": "rnn", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("wanted", "devices", "found"),
    [
        (MeshShape(fsdp=-1), 8, MeshShape(fsdp=8)),
        (MeshShape(data=2, fsdp=-1, tensor=2), 8, MeshShape(data=2, fsdp=2, tensor=2)),
        (MeshShape(), 1, MeshShape()),
    ],
)
def test_what_is_left_is_filled_in(wanted, devices, found):
    assert resolve(wanted, devices, key="layout.train") == found
    assert found.size == devices


@pytest.mark.parametrize(
    ("wanted", "devices", "axis"),
    [
        (MeshShape(data=3, fsdp=-1), 8, "layout.train.fsdp: data 3 x fsdp -1 x tensor 1 does not fill the 8 devices"),
        (MeshShape(tensor=4), 8, "layout.train.tensor: .* does not fill the 8 devices"),
        (MeshShape(data=16), 8, "layout.train.data"),
        (MeshShape(data=-1, fsdp=-1), 8, "layout.train.fsdp: only one axis can be -1"),
        (MeshShape(data=0), 8, "layout.train.data: 0 devices"),
    ],
)
def test_sizes_that_do_not_fill_name_the_axis(wanted, devices, axis):
    with pytest.raises(UserError, match=axis):
        resolve(wanted, devices, key="layout.train")


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        (LLAMA, MeshShape(tensor=3), r"layout.train.tensor: query heads \(8\) cannot be split over 3 devices"),
        (LLAMA | {"vocab_size": 97}, MeshShape(tensor=2), r"layout.train.tensor: vocabulary \(97\)"),
        (LLAMA | {"intermediate_size": 100}, MeshShape(tensor=8), r"layout.train.tensor: inner width \(100\)"),
        (LLAMA, MeshShape(fsdp=48), r"layout.train.fsdp: embedding width \(64\)"),
        (MIXTRAL, MeshShape(tensor=4), r"layout.train.tensor: experts \(6\)"),
        (RNN, MeshShape(tensor=5), r"layout.train.tensor: vocabulary \(96\)"),
    ],
)
def test_a_model_that_does_not_divide_names_axis_and_number(config, mesh, message):
    with pytest.raises(UserError, match=message):
        check_slots(model_slots(read_model(config), "lm"), mesh, key="layout.train")


def test_an_expert_s_inner_width_is_not_split_and_need_not_divide():
    config = read_model(MIXTRAL | {"intermediate_size": 95})
    check_slots(model_slots(config, "lm"), MeshShape(tensor=2), key="layout.train")
    assert slot_spec(model_slots(config, "lm")["gate"], MeshShape(tensor=2), TRAIN_RULES) == ("tensor", "fsdp", None)


def test_key_value_heads_may_be_fewer_than_the_tensor_axis():
    config = read_model(LLAMA)
    check_slots(model_slots(config, "lm"), MeshShape(tensor=4), key="layout.decode", rules=DECODE_RULES)
    key = model_slots(config, "lm")["key"]
    assert slot_spec(key, MeshShape(tensor=4), DECODE_RULES) == (None, None, None)
    assert slot_spec(key, MeshShape(tensor=2), DECODE_RULES) == (None, "tensor", None)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, RNN])
@pytest.mark.parametrize("rules", [TRAIN_RULES, DECODE_RULES])
def test_shards_are_what_the_specs_say(config, rules):
    mesh = MeshShape(data=2, fsdp=4, tensor=2)
    split = 0
    for slot in model_slots(read_model(config), "lm").values():
        spec = slot_spec(slot, mesh, rules)
        assert len({axis for axis in spec if axis}) == sum(axis is not None for axis in spec)  # an axis is used once
        ways = [mesh.sizes[axis] if axis else 1 for axis in spec]
        assert all(dim % way == 0 for dim, way in zip(slot.shape, ways, strict=True))
        assert shard_size(slot, mesh, rules) * math.prod(ways) == math.prod(slot.shape)
        assert len(slot.shape) > 1 or "fsdp" not in spec
        split += math.prod(ways) > 1
    assert split >= 2
    if rules is DECODE_RULES:
        assert "fsdp" not in rules.values()


def test_roles_without_a_mesh_of_their_own_take_the_train_mesh():
    own = MeshShape(tensor=2)
    layout = Layout(train=MeshShape(fsdp=2), critic=own)
    assert (layout.of("critic"), layout.of("reference"), layout.of("policy")) == (own, layout.train, layout.train)
    assert (layout.key_of("critic"), layout.key_of("reward")) == ("layout.critic", "layout.train")
