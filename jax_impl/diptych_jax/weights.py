"""Checkpoint tensors into the model and out again, by the family's rules (`diptych.families.family`).

The same functions carry whatever has the model's structure: weights, gradients, moments and averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diptych.engine import Head, Tensors
from diptych.errors import UserError
from diptych.families.adapter import SCORE
from diptych.families.decoder import Slot
from diptych.families.family import ModelConfig, TensorRule, model_slots, tensor_places, tensor_rules, tensor_shapes
from diptych.families.recurrent import RecurrentConfig
from diptych_jax import adapter as adapters
from diptych_jax.adapter import Adapter
from diptych_jax.mesh import parameter_sharding, pin, place, to_host
from diptych_jax.model import Decoder
from diptych_jax.recurrent import Recurrent

Model = Decoder | Recurrent


def check(config: ModelConfig, head: Head, shapes: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Raise UserError unless these are exactly the family's tensors, each of its shape. `what` says which tensors."""
    wanted = tensor_shapes(config, head)
    missing = [name for name in wanted if name not in shapes]
    left_over = [name for name in shapes if name not in wanted]
    if missing or left_over:
        found = [f"{kind} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in
                 (("missing", missing), ("left over", left_over)) if names]  # fmt: skip
        raise UserError(f"{what} do not fit the model: {'; '.join(found)}: use the tensors of the same config.json")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(shapes[name])}, the model needs {shape}: "
                "use the tensors of the same config.json"
            )


def build(config: ModelConfig, values: Mapping[str, Any], adapter: Adapter | None = None) -> Model:
    """The model of `config` with these slots, of layers stacked on a leading axis."""
    if isinstance(config, RecurrentConfig):
        return Recurrent(config, values, adapter)
    return Decoder(config, values, adapter)


def with_adapter(model: Model, adapter: Adapter | None) -> Model:
    """The same arrays below another adapter, or none."""
    return build(model.config, model.arrays(), adapter)


def pack(
    config: ModelConfig,
    head: Head,
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
    *,
    mesh: Mesh | None = None,
    what: str = "weights",
) -> Model:
    """The model that holds copies of `tensors`, on a mesh. Raises UserError for missing, left-over or misshapen ones.

    Tensors are asked for one at a time, so that a mapping which reads from a disk holds one; beside the model itself
    the host holds one slot of all layers.
    """
    table = model_slots(config, head)
    if missing := [name for name in tensor_shapes(config, head) if name not in tensors]:
        check(config, head, dict.fromkeys(tensors.keys() - set(missing), ()), what=what)
    values: dict[str, jax.Array] = {}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, ())
    for rule in tensor_rules(config, head):
        stacks: dict[str, np.ndarray] = {}
        for at, layer in enumerate(rule.layers(config)):
            parts = []
            for name in rule.names(config, layer):
                tensor = np.asarray(tensors[name])
                shapes[name] = tensor.shape
                if tensor.shape != rule.shape:
                    check(config, head, tensor_shapes(config, head) | {name: tensor.shape}, what=what)
                parts.append(rule.split(tensor, table))
            for slot in rule.slots:
                value = np.stack([part[slot] for part in parts]) if rule.per_expert else parts[0][slot]
                if slot not in stacks:
                    lead = (config.num_layers,) if rule.per_layer else (1,)
                    stacks[slot] = _aligned(lead + value.shape, dtype)
                stacks[slot][at] = value
        for slot in list(stacks):
            host = stacks.pop(slot) if rule.per_layer else stacks.pop(slot)[0]
            # Nobody else holds this memory, so on a CPU JAX may keep it instead of a copy.
            values[slot] = jnp.asarray(host) if mesh is None else place(host, parameter_sharding(table[slot], mesh))
    check(config, head, shapes, what=what)
    return build(config, values)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: what JAX on a CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def unpack(model: Model, names: Sequence[str] | None = None) -> Tensors:
    """Copies of all tensors (or of `names`) by checkpoint name, in the checkpoint's layout. The inverse of `pack`."""
    config, head = model.config, model.head_kind
    table, arrays = model_slots(config, head), model.arrays()
    places = tensor_places(config, head)
    tensors: Tensors = {}
    for name in tensor_shapes(config, head) if names is None else names:
        rule, layer, expert = places[name]
        tensors[name] = rule.fuse({slot: _part(arrays[slot], rule, layer, expert) for slot in rule.slots}, table)
    return tensors


def _part(array: jax.Array, rule: TensorRule, layer: int | None, expert: int) -> np.ndarray:
    """One layer's and expert's share of a slot, as a copy: NumPy's view of a JAX array is its device memory, which the
    next donated update overwrites."""
    part = array if layer is None else array[layer]
    return to_host(part[expert] if rule.per_expert else part)


def by_slot(function: Callable[[str, Any], Any], model: Model) -> Model:
    """`function(name, leaf)` of every array of the model, by the name of its slot (an adapter: `a_0`, `b_0`, ...)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path[-2].name, leaf), model)


def pinned(model: Model) -> Model:
    """Weights, gradients, moments in a traced program: laid out as the weights are on its mesh (an adapter's whole on
    every device)."""
    table = model_slots(model.config, model.head_kind)
    return by_slot(lambda name, leaf: pin(leaf, table.get(name)), model)


def cast(model: Model, dtype: Any) -> Model:
    """The model as it computes: every weight in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def decayed(model: Model) -> Model:
    """True where weight decay applies: tensors of two or more dimensions *in the checkpoint*, however stacked here."""
    table = model_slots(model.config, model.head_kind)
    return by_slot(lambda name, _: len(table[name].canonical) >= 2 if name in table else True, model)


def split(model: Model) -> tuple[Model, Model]:
    """(trained, frozen): the same structure twice, None in place of the other's arrays.

    All is trained, unless the model has an adapter: then that, and a scalar head.
    """
    table = model_slots(model.config, model.head_kind)

    def is_trained(name: str) -> bool:
        return model.adapter is None or name not in table or name == "score"

    trained = by_slot(lambda name, leaf: leaf if is_trained(name) else None, model)
    return trained, by_slot(lambda name, leaf: None if is_trained(name) else leaf, model)


def join(trained: Model, frozen: Model) -> Model:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def pack_trained(like: Model, tensors: Mapping[str, np.ndarray], dtype: Any, *, mesh: Mesh, what: str) -> Model:
    """Tensors of the trained part, in the structure of `like` (`split`): checkpoint names, or PEFT's."""
    if like.adapter is None:
        return pack(like.config, like.head_kind, tensors, dtype, mesh=mesh, what=what)
    parts = dict(tensors)
    score = parts.pop(SCORE, None)
    if (score is None) != (like.head_kind == "lm"):
        raise UserError(f"{what}: {SCORE} is {'missing' if score is None else 'left over'}")
    held = adapters.pack(like.config, like.adapter.spec, parts, dtype, mesh=mesh, what=what)
    values = {name: leaf for name, leaf in vars(held).items() if name[:2] in ("a_", "b_")}
    values = {name: parameter[...] for name, parameter in values.items()}
    if score is not None:
        values["score"] = place(np.array(score, dtype=dtype), parameter_sharding(_score_slot(like), mesh))
    return by_slot(lambda name, _: values[name], like)


def _score_slot(model: Model) -> Slot:
    return model_slots(model.config, "scalar")["score"]


def unpack_trained(trained: Model, names: Sequence[str] | None = None) -> Tensors:
    """Copies of the trained part's tensors (or of `names`). The inverse of `pack_trained`."""
    if trained.adapter is None:
        return unpack(trained, names)
    tensors = adapters.unpack(trained.adapter)
    if trained.head_kind == "scalar":
        tensors[SCORE] = to_host(trained["score"])
    return tensors if names is None else {name: tensors[name] for name in names}
