"""Checkpoints: ten steps equal five, a restart and five more, bit for bit; what does not fit is named."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from diptych.engine import EngineSettings
from diptych.errors import UserError
from diptych.layout import Layout, MeshShape
from diptych_jax.engine import create


@pytest.mark.parametrize(("precision", "name"), [("float32", "adamw"), ("float64", "sgd")])
def test_ten_steps_are_five_and_five(precision, name, tiny_model, sft, sft_batch, request, tmp_path):
    spec, batch = request.getfixturevalue(name), sft_batch()

    def train(model, steps):
        return [model.update(sft, batch, learning_rate=1e-3 / (1 + step)) for step in steps]

    straight = tiny_model(precision, optimizer=spec)
    metrics = train(straight, range(10))
    stopped = tiny_model(precision, optimizer=spec)
    train(stopped, range(5))
    finished = stopped.save_checkpoint(tmp_path / "five")
    train(stopped, range(3))  # a checkpoint is a copy: what follows does not reach it, while it is written or after
    finished()
    train(stopped, range(3))
    zeros = {name: np.zeros_like(value) for name, value in stopped.weights().items()}
    resumed = tiny_model(precision, optimizer=spec, weights=zeros)
    resumed.load_checkpoint(tmp_path / "five")
    assert resumed.optimizer_state().step == 5
    assert train(resumed, range(5, 10)) == metrics[5:]
    stopped.load_checkpoint(tmp_path / "five")
    assert train(stopped, range(5, 10)) == metrics[5:]
    for model in (resumed, stopped):
        _assert_equal(model.weights(), straight.weights())
        _assert_equal(model.optimizer_state().first, straight.optimizer_state().first)
        _assert_equal(model.optimizer_state().second, straight.optimizer_state().second)
        if spec.ema_decay is not None:
            _assert_equal(model.ema_weights(), straight.ema_weights())
    train(stopped, [10])
    with pytest.raises(AssertionError):  # canary: six steps after the restart are not five
        _assert_equal(stopped.weights(), straight.weights())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 40}, r"down is float32\[2, 48, 32\], the model has float32\[2, 40, 32\]"),
        ({"precision": "float64"}, "is float32.*the model has float64"),
        ({"tie_word_embeddings": True}, "head not in both"),
        ({"optimizer": "sgd"}, "not in both"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, tiny_model, adamw, sgd, tmp_path):
    tiny_model(optimizer=adamw).save_checkpoint(tmp_path)()
    other = tiny_model(**{**changes, "optimizer": sgd if "optimizer" in changes else adamw})
    before = other.weights()
    with pytest.raises(UserError, match=message):
        other.load_checkpoint(tmp_path)
    _assert_equal(other.weights(), before)


def test_folders_are_checked(tiny_model, sgd, tmp_path):
    model = tiny_model(optimizer=sgd)
    with pytest.raises(UserError, match="is not a checkpoint of the JAX engine"):
        model.load_checkpoint(tmp_path)
    model.save_checkpoint(tmp_path)()
    with pytest.raises(UserError, match="goes into an empty folder"):
        model.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        tiny_model().save_checkpoint(tmp_path / "frozen")


@pytest.fixture
def laid_out(tiny_model, adamw, monkeypatch):
    """The tiny float64 model, with another vector in each device's part, on a mesh of all devices that it needs."""
    spec = replace(tiny_model("float64", optimizer=adamw, num_hidden_layers=1).spec, micro_batch_size=8)

    def make(mesh: MeshShape):
        monkeypatch.setenv("DIPTYCH_DEVICES", str(mesh.size))
        layout = Layout(train=mesh, decode=MeshShape(data=mesh.size))
        return create(EngineSettings(precision="float64", layout=layout)).model(spec)

    return make


def test_a_checkpoint_goes_on_on_another_mesh(laid_out, sft, sft_batch, tmp_path):
    assert len(jax.devices()) >= 8, "conftest.py asks for them"
    batch = sft_batch(8)
    saved = laid_out(MeshShape(fsdp=8))
    saved.update(sft, batch, learning_rate=1e-2)
    finished = saved.save_checkpoint(tmp_path)
    state, average = saved.optimizer_state(), saved.ema_weights()
    weights = saved.weights()
    after = saved.update(sft, batch, learning_rate=1e-2)
    finished()
    for mesh in (MeshShape(data=2, fsdp=2, tensor=2), MeshShape()):
        moved = laid_out(mesh)
        with pytest.raises(AssertionError):  # canary: it starts from other weights
            _assert_equal(moved.weights(), weights)
        moved.load_checkpoint(tmp_path)
        _assert_equal(moved.weights(), weights)
        _assert_equal(moved.ema_weights(), average)
        _assert_equal(moved.optimizer_state().first, state.first)
        _assert_equal(moved.optimizer_state().second, state.second)
        assert moved.optimizer_state().step == state.step == 1
        found = moved.update(sft, batch, learning_rate=1e-2)
        assert found == pytest.approx(after, rel=1e-12)
        for name, value in saved.weights().items():
            np.testing.assert_allclose(moved.weights([name])[name], value, rtol=1e-9, atol=1e-12)


def test_what_is_not_wholly_written_is_no_checkpoint(tiny_model, sgd, tmp_path, monkeypatch):
    """A process that dies while it writes, here before the last step of orbax, leaves what nobody loads."""
    from orbax.checkpoint._src.path import atomicity

    async def die(*_arguments, **_options):
        raise OSError("died")

    with monkeypatch.context() as patched:
        patched.setattr(atomicity, "on_commit_callback", die)
        finished = tiny_model(optimizer=sgd).save_checkpoint(tmp_path)
        with pytest.raises(OSError, match="died"):
            finished()
    assert [path.name for path in tmp_path.iterdir()] != []
    with pytest.raises(UserError, match="is not a checkpoint of the JAX engine"):
        tiny_model(optimizer=sgd).load_checkpoint(tmp_path)


def _assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
