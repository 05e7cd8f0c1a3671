"""The switch: the policy's weights from the train mesh to the decode mesh, cast, merged with an adapter, and checked.

Both meshes lie over the same devices, and the decode mesh is laid so that few bytes move: its tensor axis begins with
the train mesh's. Both are then products of six axes of one finer mesh,

    train   data = a1 a2     fsdp = b1 b2     tensor = c1 c2
    decode  data = a1 b1 c2                   tensor = c1 b2 a2

on which going from one to the other is, for each parameter, a few explicit collectives: an axis that stops splitting is
gathered, one that begins to is sliced, one that goes from one dimension to another is exchanged (all-to-all). Nothing
is replicated on the way. Layers move one at a time through one compiled program and leave as arrays of their own, as
the decode loop reads them. The training weights stay as they are, so there is nothing to donate; what exists twice is
the copy, in the type that decoding computes in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from diptych.errors import InvariantError, UserError
from diptych.families.decoder import DecoderConfig, Slot
from diptych.families.family import model_slots
from diptych.layout import MeshShape, slot_spec
from diptych_jax.adapter import Adapter
from diptych_jax.mesh import rules_of, shape_of
from diptych_jax.model import Decoder
from diptych_jax.weights import Model, build

_FINE = ("a1", "a2", "b1", "b2", "c1", "c2")
# What an axis of either mesh is made of, from major to minor.
_TRAIN = {"data": ("a1", "a2"), "fsdp": ("b1", "b2"), "tensor": ("c1", "c2")}
_DECODE = {"data": ("a1", "b1", "c2"), "tensor": ("c1", "b2", "a2")}
Axes = tuple[tuple[str, ...], ...]  # for each dimension of an array, the fine axes that split it
Step = tuple[Literal["slice", "exchange", "gather"], str, int, int]  # what, fine axis, from which dimension, to which


@dataclass(frozen=True)
class Meshes:
    """The train mesh, and the decode and the fine mesh over the same devices."""

    train: Mesh
    decode: Mesh
    fine: Mesh


class Switched(NamedTuple):
    """The decode copy and what it cost. bytes_moved: received from other devices, all devices together."""

    model: Model
    seconds: float
    bytes_moved: int


def meshes(train: Mesh, decode: MeshShape) -> Meshes:
    """UserError where the decode mesh's tensor axis neither divides the train mesh's nor is made of it and others."""
    data, fsdp, tensor = (train.shape[name] for name in ("data", "fsdp", "tensor"))
    shared = math.gcd(tensor, decode.tensor)
    more = decode.tensor // shared
    from_fsdp = math.gcd(more, fsdp)
    from_data = more // from_fsdp
    if (shared < tensor and more > 1) or data % from_data:
        raise UserError(
            f"layout.decode.tensor: {decode.tensor} devices cannot be laid over a train mesh of {shape_of(train)}: "
            f"choose a divisor of its tensor = {tensor}, or {tensor} times a divisor of fsdp or data"
        )
    fine = train.devices.reshape(data // from_data, from_data, fsdp // from_fsdp, from_fsdp, shared, tensor // shared)
    laid = fine.transpose([_FINE.index(axis) for axis in _DECODE["data"] + _DECODE["tensor"]])
    return Meshes(
        train=train,
        decode=Mesh(laid.reshape(decode.data, decode.tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2),
        fine=Mesh(fine, _FINE, axis_types=(AxisType.Auto,) * 6),
    )


def switch(model: Model, over: Meshes, dtype: Any, *, chunk: int | None = None) -> Switched:
    """The decode copy of `model`, which lies on the train mesh and stays as it is.

    chunk: bytes of the copy that may be on their way at a time, all devices together (a layer, or one of the other
    parameters, at least); None: no limit. Raises InvariantError where a parameter did not arrive as it left.
    """
    start = time.perf_counter()
    table, arrays = model_slots(model.config, model.head_kind), model.arrays()
    in_layers = [name for name, slot in table.items() if slot.per_layer and isinstance(model.config, DecoderConfig)]
    others = [name for name in table if name not in in_layers]
    layers = range(model.config.num_layers) if in_layers else ()
    copies: dict[int | None, dict[str, Array]] = {None: {}} | {layer: {} for layer in layers}
    prints: list[tuple[str, Array, Array]] = []
    moved = under_way = 0
    for layer, names in [(None, [name]) for name in others] + [(layer, in_layers) for layer in layers]:
        with jax.set_mesh(over.fine):
            arrived, left = depart(
                {name: arrays[name] for name in names}, model.adapter, np.int32(layer or 0),
                table=tuple((name, table[name]) for name in names), over=over, dtype=str(np.dtype(dtype)),
                one_layer=layer is not None,
            )  # fmt: skip
        for name, array in arrived.items():
            copies[layer][name] = _on_decode_mesh(array, table[name], over)
            moved += bytes_received(table[name], over, array) * over.fine.size
            under_way += array.nbytes
        with jax.set_mesh(over.decode):
            there = fingerprints({name: copies[layer][name] for name in names})
        prints += [(name if layer is None else f"{name} of layer {layer}", left[name], there[name]) for name in names]
        if chunk is not None and under_way >= chunk:
            jax.block_until_ready(there)
            under_way = 0
    _check(prints)
    return Switched(_assembled(model, copies), time.perf_counter() - start, moved)


@partial(jax.jit, static_argnames=("table", "over", "dtype", "one_layer"))
def depart(
    arrays: Mapping[str, Array],
    adapter: Adapter | None,
    layer: Array,
    *,
    table: tuple[tuple[str, Slot], ...],
    over: Meshes,
    dtype: str,
    one_layer: bool,
) -> tuple[dict[str, Array], dict[str, UInt32[Array, ""]]]:
    """Parameters of one layer (or whole ones) on the train mesh to where they lie on the decode mesh, and fingerprints
    of what leaves. The program runs on the fine mesh."""

    def here(value: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False) if one_layer else value

    slots = dict(table)
    leaving = {name: here(array) for name, array in arrays.items()}
    if adapter is not None:
        part = jax.tree.map(here, adapter)
        changes = part.changes() if one_layer else jax.vmap(lambda a: a.changes())(part)
        leaving = {name: array + changes[name] if name in changes else array for name, array in leaving.items()}
    source = {name: axes_of(slots[name], over, over.train, array.ndim) for name, array in leaving.items()}
    target = {name: axes_of(slots[name], over, over.decode, array.ndim) for name, array in leaving.items()}
    leaving = {
        name: jax.lax.with_sharding_constraint(array.astype(dtype), P(*source[name])) for name, array in leaving.items()
    }

    def move(shards: dict[str, Array]) -> dict[str, Array]:
        return {name: _moved(shard, steps(source[name], target[name])) for name, shard in shards.items()}

    specs = [{name: P(*axes[name]) for name in leaving} for axes in (source, target)]
    travel = jax.shard_map(move, mesh=over.fine, in_specs=(specs[0],), out_specs=specs[1], check_vma=False)
    return travel(leaving), _fingerprints(leaving)


@jax.jit
def fingerprints(arrays: Mapping[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """A number for each array's bits and where they stand, the same on every mesh."""
    return _fingerprints(arrays)


def _fingerprints(arrays: Mapping[str, Array]) -> dict[str, Array]:
    found = {}
    for name, array in arrays.items():
        word = jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32
        bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)  # float64: two words, on a last axis
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        # Sums modulo 2^32 do not depend on their order; the odd factors tell places apart.
        found[name] = jnp.sum(bits * (index * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)
    return found


def axes_of(slot: Slot, over: Meshes, mesh: Mesh, num_dims: int) -> Axes:
    """The fine axes that split each dimension of a parameter (of all layers, where it has one dimension more)."""
    parts = _TRAIN if mesh is over.train else _DECODE
    spec = slot_spec(slot, shape_of(mesh), rules_of(mesh))
    named = [tuple(axis for axis in parts[name] if over.fine.shape[axis] > 1) if name else () for name in spec]
    return ((),) * (num_dims - len(spec)) + tuple(named)


def steps(source: Axes, target: Axes) -> list[Step]:
    """From one layout to the other; slices first and gathers last, so that as little as possible moves."""
    now, found = [list(axes) for axes in source], []
    while tuple(tuple(axes) for axes in now) != target:
        arriving = {dim: target[dim][len(axes)] for dim, axes in enumerate(now)
                    if len(axes) < len(target[dim]) and tuple(axes) == target[dim][: len(axes)]}  # fmt: skip
        leaving = {axes[-1]: dim for dim, axes in enumerate(now) if tuple(axes) != target[dim][: len(axes)]}
        used = {axis for axes in now for axis in axes}
        free = [(axis, dim) for dim, axis in arriving.items() if axis not in used]
        both = [(axis, dim) for dim, axis in arriving.items() if axis in leaving]
        if free:
            (axis, dim), *_ = free
            found.append(("slice", axis, dim, dim))
        elif both:
            (axis, dim), *_ = both
            found.append(("exchange", axis, leaving[axis], dim))
            now[leaving[axis]].pop()
        else:
            axis = next(iter(leaving))
            found.append(("gather", axis, leaving[axis], leaving[axis]))
            now[leaving[axis]].pop()
            continue
        now[dim].append(axis)
    return found


def _moved(shard: Array, plan: list[Step]) -> Array:
    for kind, axis, source, target in plan:
        if kind == "gather":
            shard = jax.lax.all_gather(shard, axis, axis=source, tiled=True)
        elif kind == "exchange":
            shard = jax.lax.all_to_all(shard, axis, split_axis=target, concat_axis=source, tiled=True)
        else:
            size = shard.shape[target] // jax.lax.axis_size(axis)
            shard = jax.lax.dynamic_slice_in_dim(shard, jax.lax.axis_index(axis) * size, size, target)
    return shard


def bytes_received(slot: Slot, over: Meshes, array: Array) -> int:
    """Bytes that each device receives from others for a parameter of the decode copy."""
    source, target = (axes_of(slot, over, mesh, array.ndim) for mesh in (over.train, over.decode))
    local = array.nbytes // math.prod(over.fine.shape[axis] for axes in source for axis in axes)
    received = 0
    for kind, axis, _, _ in steps(source, target):
        ways = over.fine.shape[axis]
        if kind == "gather":
            received += local * (ways - 1)
            local *= ways
        elif kind == "exchange":
            received += local * (ways - 1) // ways
        else:
            local //= ways
    return received


def _on_decode_mesh(array: Array, slot: Slot, over: Meshes) -> Array:
    """The same buffers under the decode mesh's names."""
    spec = slot_spec(slot, shape_of(over.decode), rules_of(over.decode))
    sharding = NamedSharding(over.decode, P(*(None,) * (array.ndim - len(spec)), *spec))
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, [shard.data for shard in array.addressable_shards]
    )


def _check(prints: list[tuple[str, Array, Array]]) -> None:
    for what, before, after in jax.device_get(prints):
        if before != after:
            raise InvariantError(
                f"the switch to the decode mesh: {what} did not arrive as it left the train mesh (fingerprints "
                f"{before:08x} and {after:08x}): the rollout would not be the trained model's"
            )


def _assembled(model: Model, copies: Mapping[int | None, Mapping[str, Array]]) -> Model:
    if isinstance(model.config, DecoderConfig):
        layers = [copies[layer] for layer in range(model.config.num_layers)]
        return Decoder(model.config, copies[None], layers=layers)
    return build(model.config, copies[None])
