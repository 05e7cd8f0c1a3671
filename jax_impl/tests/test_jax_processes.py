"""How processes find each other, what is said where they cannot, and which rows each of them loads."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diptych.engine import EngineSettings
from diptych.errors import UserError
from diptych.layout import MeshShape
from diptych.world import SINGLE
from diptych_jax import processes
from diptych_jax.mesh import place_rows, train_mesh

THREE = {"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
DISTRIBUTED = EngineSettings(precision="float32", distributed=True)


@pytest.fixture
def asked(monkeypatch):
    """The calls of jax.distributed.initialize, which is not made."""
    calls = []
    for name in (*THREE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_one_process_asks_for_nobody(asked):
    processes.start(EngineSettings(precision="float32"))
    assert asked == []
    assert processes.world() is SINGLE


def test_the_variables_are_handed_on_and_a_cluster_is_not_asked_then(asked, monkeypatch):
    for name, value in THREE.items():
        monkeypatch.setenv(name, value)
    processes.start(DISTRIBUTED)
    expected = {"coordinator_address": "node1:8476", "num_processes": 4, "process_id": 3}
    assert asked[0].items() >= {**expected, "cluster_detection_method": "deactivate"}.items()


def test_without_them_jax_asks_the_cluster(asked):
    processes.start(DISTRIBUTED)
    assert "coordinator_address" not in asked[0]
    assert "cluster_detection_method" not in asked[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is set, JAX_PROCESS_ID is not"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "expected HOST:PORT"),
        ({"JAX_PROCESS_ID": "4"}, "0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES"),
        ({"JAX_NUM_PROCESSES": "two"}, "expected numbers"),
    ],
)
def test_variables_that_make_no_sense_are_named(changes, message):
    assert processes.given_by(THREE)["process_id"] == 3
    with pytest.raises(UserError, match=message):
        processes.given_by(THREE | changes)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("coordinator_address should be defined."), "nothing says which processes belong together"),
        (RuntimeError("address in use"), "JAX could not join the processes at the coordinator: address in use"),
    ],
)
def test_who_cannot_join_is_told_why(error, message, asked, monkeypatch):
    def fail(**_arguments):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=message):
        processes.start(DISTRIBUTED)


def test_who_waits_is_told_for_what(asked, monkeypatch, capfd):
    import threading

    said = threading.Event()
    monkeypatch.setattr(processes, "REMIND_SECONDS", 0.01)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: said.wait(0.5))
    processes.start(DISTRIBUTED)
    assert "diptych: waiting for the other processes at the coordinator" in capfd.readouterr().err


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "shape", [MeshShape(fsdp=8), MeshShape(data=2, fsdp=2, tensor=2), MeshShape(tensor=8)], ids=str
)
def test_each_device_gets_its_rows_whatever_the_order_of_devices(shape, axis):
    """(In several processes too: scripts/two_process_cpu.py.)"""
    host = np.arange(8 * 16 * 3).reshape((16, 24) if axis == 0 else (8, 16, 3)).astype(np.int32)
    devices = jax.devices()[:8]
    for order in (devices, devices[::-1], [devices[k] for k in (0, 4, 1, 5, 2, 6, 3, 7)]):
        mesh = train_mesh(shape, order)
        placed = place_rows(host, mesh, axis=axis)
        assert placed.sharding.shard_shape(placed.shape)[axis] == 16 // shape.rows
        np.testing.assert_array_equal(np.asarray(placed), host)
        for part in placed.addressable_shards:
            np.testing.assert_array_equal(np.asarray(part.data), host[part.index])
