"""Hugging Face tensors in and out: a bijection with nothing missing, left over, misshapen or aliased."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diptych.errors import UserError
from diptych.families.family import read_model
from diptych_jax import weights as table


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_round_trip_is_exact(head, tied, tiny_model, tiny_config, hot_weights):
    config = tiny_config(tie_word_embeddings=tied, head_dim=6)  # heads x size differs from the width
    given = hot_weights(config, head)
    found = tiny_model(head=head, tie_word_embeddings=tied, head_dim=6).weights()
    assert list(found) == list(given)
    for name, value in given.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": w["model.norm.weight"]}), "left over model.layers.2"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].T}), r"lm_head.weight has shape \(32, 64\)"),
        (lambda w: w.update({"model.norm.weight": np.ones(31, np.float32)}), r"model.norm.weight has shape \(31,\)"),
    ],
)
def test_wrong_tensors_are_named(change, message, tiny_model, tiny_config, hot_weights):
    broken = hot_weights(tiny_config(), "lm")
    change(broken)
    with pytest.raises(UserError, match=message):
        tiny_model(weights=broken)
    model = tiny_model()
    before = model.weights()
    with pytest.raises(UserError, match=message):
        model.load_weights(broken)
    assert all((before[name] == value).all() for name, value in model.weights().items())


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_nothing_is_aliased(precision, tiny_model, tiny_config, hot_weights):
    """On a CPU a JAX array may share NumPy's memory: neither side may see the other's writes."""
    given = hot_weights(tiny_config(), "lm")
    given = {name: value.astype(precision) for name, value in given.items()}
    kept = {name: value.copy() for name, value in given.items()}
    model = tiny_model(precision, weights=given)
    for value in given.values():
        value[...] = 0
    for value in model.weights().values():
        value[...] = 0
    for name, value in model.weights().items():
        np.testing.assert_array_equal(value, kept[name], err_msg=name)


def test_weight_decay_follows_the_checkpoint_not_the_stacking(tiny_config, hot_weights):
    config = tiny_config()
    model = table.pack(read_model(config), "lm", hot_weights(config, "lm"), np.dtype(np.float32))
    mask: dict[str, bool] = {}
    table.by_slot(mask.setdefault, table.decayed(model))
    assert {name for name, decays in mask.items() if not decays} == {"attention_norm", "mlp_norm", "final_norm"}
    assert model.arrays()["attention_norm"].ndim == 2  # canary: dimensions as stored would decay the stacked norms


def test_trained_and_frozen_parts_join_to_the_whole(tiny_config, hot_weights):
    config = tiny_config()
    model = table.pack(read_model(config), "lm", hot_weights(config, "lm"), np.dtype(np.float32))
    trained, frozen = table.split(model)
    assert not jax.tree.leaves(frozen)
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(model))
    for name, value in table.join(trained, frozen).arrays().items():
        assert value is model.arrays()[name]
