"""Meshes over the devices, arrays onto them, and back to the host. `diptych.layout` says what is split over what.

Programs are traced with `jax.set_mesh(mesh)` around the call and say with `constrain` how their activations lie; the
compiler fills in the rest. On one device every mesh has one device, and nothing differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from diptych.families.decoder import Slot
from diptych.layout import DECODE_RULES, TRAIN_RULES, MeshShape, Rules, slot_spec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # a batch's rows are split over both
Dim = Literal["rows", "tensor", "all"] | None  # "all": rows over every device, tensor axis included


def train_mesh(shape: MeshShape, devices: Sequence[Any]) -> Mesh:
    """Devices as (data, fsdp, tensor); TPUs in an order that makes neighbours in the mesh neighbours in the machine."""
    grid = mesh_utils.create_device_mesh(tuple(shape.sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def rules_of(mesh: Any) -> Rules:
    """The table of the phase that a mesh is for."""
    return TRAIN_RULES if "fsdp" in mesh.axis_names else DECODE_RULES


def shape_of(mesh: Any) -> MeshShape:
    """The sizes of a mesh."""
    return MeshShape(**dict(mesh.shape))


def parameter_sharding(slot: Slot, mesh: Mesh) -> NamedSharding:
    """How a parameter (of all layers, where it is per layer) lies on a mesh."""
    spec = slot_spec(slot, shape_of(mesh), rules_of(mesh))
    return NamedSharding(mesh, PartitionSpec(*((None,) if slot.per_layer else ()), *spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, *dims: Dim) -> Array:
    """Say how an array lies on the mesh of the program that is being traced. dims: for each axis of x.

    An axis that does not divide (key-value heads fewer than the tensor axis) stays whole. Without a mesh: x.
    """
    if _is_one_device():
        return x
    mesh, spec = jax.sharding.get_abstract_mesh(), []
    for size, dim in zip(x.shape, dims, strict=True):
        axes = {"rows": ROWS, "tensor": ("tensor",), "all": AXES, None: ()}[dim]
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        whole = size % math.prod(mesh.shape[axis] for axis in axes)
        spec.append(None if whole or not axes else axes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def pin(x: Array, slot: Slot | None) -> Array:
    """A parameter of one layer or all, or its gradient, as `parameter_sharding` says on the mesh of the traced program.
    None: whole on every device."""
    return _pin(x, slot, None)


def gathered(x: Array, slot: Slot) -> Array:
    """A parameter of one layer, whole along fsdp: an all-gather before its use, a reduce-scatter of its gradient."""
    # On one device x itself: JAX then sees that what a loop over layers keeps of it is there already, stacked.
    return x if _is_one_device() else _gathered(x, slot)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Array, slot: Slot) -> Array:
    return _pin(x, slot, DECODE_RULES)


def _gathered_forward(x: Array, slot: Slot) -> tuple[Array, None]:
    return _gathered(x, slot), None


def _gathered_backward(slot: Slot, _: None, gradient: Array) -> tuple[Array]:
    return (pin(gradient, slot),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _is_one_device() -> bool:
    """Whether the program that is being traced is for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _pin(x: Array, slot: Slot | None, rules: Rules | None) -> Array:
    if _is_one_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = () if slot is None else slot_spec(slot, shape_of(mesh), rules or rules_of(mesh))
    lead = (None,) * (x.ndim - len(spec))  # all layers at once
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*lead, *spec))


def num_shards(mesh: Any) -> int:
    """How many ways the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.axis_names)


def row_shards(num_rows: int) -> int:
    """How many ways rows are split on the mesh of the traced program; 1 where they do not divide, or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else num_shards(mesh)
    return 1 if num_rows % shards else shards


def place(host: np.ndarray, sharding: NamedSharding) -> Array:
    """A host array, which every process has, on the devices: each process hands over only what its own devices hold."""
    if sharding.mesh.size == 1:
        return jax.device_put(host, sharding)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_rows(host: np.ndarray, mesh: Mesh, *, axis: int = 0) -> Array:
    """A host array whose axis `axis` is split like the rows of a batch (their number divides).

    Every process has the whole array and loads the rows of its own devices: they need not lie together, and processes
    whose devices share rows (along tensor) load the same.
    """
    rows = tuple(name for name in ROWS if name in mesh.axis_names)
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, rows))
    if mesh.size == 1:
        return jax.device_put(host, sharding)
    indices = sharding.addressable_devices_indices_map(host.shape).values()
    own = {index[axis].indices(host.shape[axis])[:2] for index in indices if index is not None}
    local = np.concatenate([np.take(host, range(*part), axis) for part in sorted(own)], axis)
    return jax.make_array_from_process_local_data(sharding, local, host.shape)


def to_host(array: Array) -> np.ndarray:
    """A copy of a whole array, in every process; a collective where its parts are in several."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.array(array)
    mesh: Any = array.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    return np.array(_replicate(mesh)(array))


@cache
def _replicate(mesh: Mesh) -> Any:
    """One program per mesh and shape, not one per call."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def on_host(tree: Any) -> Any:
    """Arrays in the host's memory, each process and device with its own parts."""
    return _in_memory(tree, "pinned_host")


def on_device(tree: Any) -> Any:
    """The inverse of `on_host`."""
    return _in_memory(tree, "device")


def _in_memory(tree: Any, kind: str) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)
