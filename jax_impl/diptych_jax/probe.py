"""`Model.probe`: one forward and backward pass with every named value inside it recorded, and forced where asked.

The pass is a training step's own (`training`), over all rows as one micro-batch and without rematerialisation; taps.py
is what a probe changes about it. What is forced is data: nothing, some taps or all of them run through one compiled
program per (loss, shapes, depth, model), so forcing a model's own numbers on it gives them back bit for bit. That
program holds its layers one after another, and takes as many times longer to compile. On the device there are four
arrays for every tap: value and gradient, computed and forced.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diptych.engine import Taps, Tensors
from diptych.errors import UserError
from diptych.families.taps import Depth, taps
from diptych_jax import training
from diptych_jax.taps import Forced, Recorder, recording
from diptych_jax.weights import Model, join

Shapes = dict[str, jax.ShapeDtypeStruct]  # of taps, by name


class Seen(NamedTuple):
    """What a probe sees. metrics: the step's loss and metrics. gradients: of the trained part of the model, in at least
    float32. values, tap_gradients: by tap, in the type of the activations."""

    metrics: dict[str, Array]
    gradients: Model
    values: dict[str, Array]
    tap_gradients: dict[str, Array]


def check_place(mesh: Mesh, kernel: str) -> None:
    """UserError where a model lies or computes in a way that its taps cannot be forced."""
    if mesh.size > 1 or jax.process_count() > 1:
        raise UserError(
            f"a probe looks into a model on one device, and this one lies on {mesh.size} devices of "
            f"{jax.process_count()} processes: start one process with DIPTYCH_DEVICES=1"
        )
    if kernel != "xla":
        raise UserError(f"a probe needs attention by xla, and this model's is {kernel}: set layout.attention=xla")


def look(
    trained: Model,
    frozen: Model,
    inputs: training.Inputs,
    *,
    program: training.Program,
    depth: Depth,
    forced: Taps | None,
) -> tuple[dict[str, Array], Model, Taps]:
    """The step's metrics, the gradients of the trained part, and the taps as they were computed, in the order of
    `diptych.families.taps`, in at least float32. inputs: a step of one micro-batch.

    Raises ValueError for forced taps that this model does not have at this depth, or of another shape.
    """
    if depth not in get_args(Depth):
        raise ValueError(f"the depth of a probe is one of {', '.join(get_args(Depth))}, got {depth!r}")
    assert len(inputs.tokens_MBT) == 1
    program = program._replace(remat="none")  # what is made again in the backward pass cannot be told from outside
    model = join(trained, frozen)
    names = taps(model.config, model.head_kind, depth)
    shapes = _tap_values.eval_shape(model, inputs, program=program, wanted=frozenset(names))
    assert shapes.keys() == names.keys(), sorted(shapes.keys() ^ names.keys())
    seen = _run(trained, frozen, inputs, _forced(forced, shapes, depth), program=program)
    values, gradients = ({name: _wide(part[name]) for name in names} for part in (seen.values, seen.tap_gradients))
    return seen.metrics, seen.gradients, Taps(values=values, gradients=gradients)


@partial(jax.jit, static_argnames=("program",))
def _run(
    trained: Model, frozen: Model, inputs: training.Inputs, forced: dict[str, Forced], *, program: training.Program
) -> Seen:
    def loss(trained: Model, changes: dict[str, Array]) -> tuple[Float[Array, ""], Any]:
        return _loss(join(trained, frozen), inputs, program, frozenset(forced), changes, forced)

    changes = {name: jnp.zeros_like(one.value) for name, one in forced.items()}
    differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (metrics, values)), (gradients, tap_gradients) = differentiate(trained, changes)
    # Upcast: the gradients of a frozen model come in the type of its activations.
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), gradients)
    return Seen({"loss": value, **metrics}, gradients, values, tap_gradients)


def _loss(
    model: Model,
    inputs: training.Inputs,
    program: training.Program,
    wanted: frozenset[str],
    changes: Mapping[str, Array] | None = None,
    forced: Mapping[str, Forced] | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, Array]]]:
    """The loss as `training` computes it, and (its metrics, the values of the taps)."""
    tokens, attention, positions, arrays = jax.tree.map(operator.itemgetter(0), inputs[:4])
    micro = inputs._replace(tokens_MBT=tokens, attention_MBT=attention, positions_MBT=positions, arrays=arrays)
    known = frozenset(taps(model.config, model.head_kind, "ops"))
    recorder = Recorder(known, wanted, attention, changes, forced)
    with recording(recorder):
        value, metrics = training._loss(model, micro, None, program)
    return value, (metrics, recorder.values)


@partial(jax.jit, static_argnames=("program", "wanted"))
def _tap_values(
    model: Model, inputs: training.Inputs, *, program: training.Program, wanted: frozenset[str]
) -> dict[str, Array]:
    """Only traced, once per program, for the shapes."""
    return _loss(model, inputs, program, wanted)[1][1]


def _forced(given: Taps | None, shapes: Shapes, depth: Depth) -> dict[str, Forced]:
    """What is forced on each tap, in its own type; zeros that nobody reads where nothing is."""
    values, gradients = ({}, {}) if given is None else (given.values, given.gradients)
    for what, tensors in (("values", values), ("gradients", gradients)):
        _check_forced(what, tensors, shapes, depth)

    def of(tensors: Tensors, name: str) -> tuple[Array, Array]:
        one, is_given = shapes[name], name in tensors
        host = np.asarray(tensors[name], one.dtype) if is_given else np.zeros(one.shape, one.dtype)
        return jnp.asarray(host), jnp.asarray(is_given)

    return {name: Forced(*of(values, name), *of(gradients, name)) for name in shapes}


def _check_forced(what: str, tensors: Tensors, shapes: Shapes, depth: Depth) -> None:
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"forced {what}: at depth {depth} this model has no tap {', '.join(unknown)}")
    wrong = [
        f"{name} is {array.dtype} {list(array.shape)}, the tap is float {list(shapes[name].shape)}"
        for name, array in tensors.items()
        if array.shape != shapes[name].shape or array.dtype.kind != "f"
    ]
    if wrong:
        raise ValueError(f"forced {what}: {'; '.join(wrong)}")


def _wide(array: Array) -> np.ndarray:
    """A copy on the host, in at least float32."""
    return np.array(array, jnp.promote_types(array.dtype, jnp.float32))
