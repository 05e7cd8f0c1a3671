"""Models and batches as shapes with shardings (`jax.ShapeDtypeStruct`), on devices that need not be there.

They are laid out as the engine lays out the arrays themselves, so that a program lowered with them is the engine's own;
no weight is ever made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diptych.errors import UserError
from diptych.families.adapter import adapter_rules
from diptych.families.decoder import DecoderConfig
from diptych.families.family import model_slots
from diptych.layout import MeshShape
from diptych.plan.hardware import Topology
from diptych.plan.workload import Held, Workload
from diptych_jax import optimizer, weights
from diptych_jax.adapter import Adapter
from diptych_jax.mesh import ROWS, parameter_sharding, replicated, train_mesh
from diptych_jax.model import Decoder

# No TPU is asked for its metadata, and none is locked: only the compiler runs.
SWITCHES = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices. UserError without the TPU's compiler, or where JAX has started with fewer CPU devices."""
    count = topology.num_chips
    if topology.chip.kind == "cpu":
        jax.config.update("jax_platforms", "cpu")
        with contextlib.suppress(RuntimeError):  # JAX has started: it has as many as it has
            jax.config.update("jax_num_cpu_devices", count)
        if len(jax.devices()) < count:
            raise UserError(
                f"--topology {topology.name}: JAX has started with {len(jax.devices())} CPU devices already"
            )
        return jax.devices()[:count]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology.name}: compiling for a TPU takes its compiler, which no TPU is needed for: "
            "pip install 'diptych[plan]'"
        )
    jax.config.update("jax_platforms", "cpu")
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:
        raise UserError(f"--topology {topology.name}: the TPU's compiler does not know it: {error}") from None
    return list(found.devices)


class Shapes:
    """What the programs of a workload are called with."""

    def __init__(self, workload: Workload, topology: Topology):
        self.workload, self.topology = workload, topology
        self.devices = devices_of(topology)
        self._meshes: dict[MeshShape, Mesh] = {}

    def mesh(self, shape: MeshShape) -> Mesh:
        if shape not in self._meshes:
            self._meshes[shape] = train_mesh(shape, self.order(tuple(shape.sizes.values())))
        return self._meshes[shape]

    def order(self, sizes: tuple[int, ...]) -> Sequence[Any]:
        """Neighbours in the mesh are neighbours in the machine."""
        if self.topology.chip.kind != "tpu":
            return self.devices
        laid = mesh_utils.create_device_mesh(sizes, self.devices, allow_split_physical_axes=True)
        return list(laid.flatten())

    def arrays(self, held: Held, mesh: Mesh, dtype: str) -> dict[str, Any]:
        """Every slot of the model, laid out."""
        return {
            name: jax.ShapeDtypeStruct(
                ((held.config.num_layers,) if slot.per_layer else ()) + slot.shape, dtype,
                sharding=parameter_sharding(slot, mesh),
            )
            for name, slot in model_slots(held.config, held.head).items()
        }  # fmt: skip

    def adapter(self, held: Held, mesh: Mesh, dtype: str) -> Adapter | None:
        values = self._adapter_arrays(held, mesh, dtype)
        if held.adapter is None:
            return None
        made = jax.eval_shape(partial(Adapter, held.config, held.adapter), values)
        return weights.by_slot(lambda name, _: values[name], made)  # pyright: ignore[reportArgumentType, reportReturnType]

    def _adapter_arrays(self, held: Held, mesh: Mesh, dtype: str) -> dict[str, Any]:
        if held.adapter is None:
            return {}
        lead, rank, values = held.config.num_layers, held.adapter.rank, {}
        for index, one in enumerate(adapter_rules(held.config, held.adapter)):
            for name, shape in ((f"a_{index}", (rank, one.inputs)), (f"b_{index}", (one.outputs, rank))):
                values[name] = jax.ShapeDtypeStruct((lead, *shape), dtype, sharding=replicated(mesh))
        return values

    def model(self, held: Held, mesh: Mesh, dtype: str) -> weights.Model:
        arrays, adapter = self.arrays(held, mesh, dtype), self._adapter_arrays(held, mesh, dtype)

        def build(arrays: dict[str, Any], parts: dict[str, Any]) -> weights.Model:
            made = None if held.adapter is None else Adapter(held.config, held.adapter, parts)
            return weights.build(held.config, arrays, made)

        return self._placed(build, arrays, adapter)

    def _placed(self, build: Any, *values: dict[str, Any]) -> weights.Model:
        """The model that `build` makes of arrays, of their shapes and layouts instead."""
        named = {name: value for part in values for name, value in part.items()}
        return weights.by_slot(lambda name, _: named[name], jax.eval_shape(build, *values))

    def state(self, held: Held, mesh: Mesh) -> optimizer.TrainState:
        """As `optimizer.create` makes it: moments and average lie as the weights do."""
        assert held.optimizer is not None
        trained, _ = weights.split(self.model(held, mesh, self.workload.masters))
        inner: Any = jax.eval_shape(optimizer.transformation(held.optimizer).init, trained)
        state = optimizer.TrainState(trained, inner, None if held.optimizer.ema_decay is None else trained)
        moments = optimizer.moments_of(state)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        second = None if moments.second is None else trained
        return optimizer.with_moments(state, moments._replace(step=step, first=trained, second=second))

    def rows(self, mesh: Mesh, dtype: str, *shape: int, axis: int = 0) -> Any:
        """A batch's array: axis `axis` is split like rows."""
        axes = tuple(name for name in ROWS if name in mesh.axis_names)
        whole = shape[axis] % int(np.prod([mesh.shape[name] for name in axes]))
        spec = PartitionSpec() if whole else PartitionSpec(*(None,) * axis, axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def number(self, mesh: Mesh, dtype: str | None = None) -> Any:
        return jax.ShapeDtypeStruct((), dtype or self.workload.masters, sharding=replicated(mesh))

    def tokens(self, mesh: Mesh, rows: int, columns: int) -> tuple[Any, ...]:
        return tuple(self.rows(mesh, dtype, rows, columns) for dtype in ("int32", "bool", "int32"))

    def decode_copy(self, held: Held, mesh: Mesh) -> weights.Model:
        """As the switch leaves it: layers apart, no adapter."""
        config = held.config
        table, arrays = model_slots(config, "lm"), self.arrays(held, mesh, self.workload.compute)
        if not isinstance(config, DecoderConfig):
            return self._placed(partial(weights.build, config), arrays)
        of_layer: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(
                slot.shape, self.workload.compute, sharding=parameter_sharding(replace(slot, per_layer=False), mesh)
            )
            for name, slot in table.items()
            if slot.per_layer
        }
        others = {name: array for name, array in arrays.items() if name not in of_layer}

        def build(others: dict[str, Any], of_layer: dict[str, Any]) -> weights.Model:
            return Decoder(config, others, layers=[of_layer] * config.num_layers)

        return self._placed(build, others, of_layer)
