"""AdamW and SGD as optax transformations in which every number is named, global clipping, the average of the weights.

The formulas are `diptych.engine.OptimizerSpec`'s. What differs from optax's own `adamw`: the bias corrections are
1 - b^t taken as -expm1(t log b), because 1 - b**t in float32 is off by 1e-5 at the first steps with b = 0.999; the
learning rate arrives with every update; and weight decay is masked by the tensors' dimensions in the checkpoint, since
stacking gives a norm's gain a second one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from diptych.engine import OptimizerSpec
from diptych_jax.mesh import place, replicated
from diptych_jax.weights import Model, decayed, pinned


class TrainState(NamedTuple):
    """All that an update changes: the trained weights (`weights.split`), optimizer state, and the average of the
    weights where one is kept."""

    model: Model
    optimizer: tuple[Any, ...]
    ema: Model | None


class Moments(NamedTuple):
    """Optimizer state. step: updates made, int32. second is None for SGD, whose `first` is the momentum buffer."""

    step: Array
    first: Model
    second: Model | None


def create(spec: OptimizerSpec, model: Model, mesh: Mesh) -> TrainState:
    """The state before the first update, laid out as the weights are; the average starts at the weights."""
    ema = None if spec.ema_decay is None else jax.tree.map(lambda parameter: jnp.array(parameter, copy=True), model)
    init: Any = transformation(spec).init
    state = TrainState(model, init(model), ema)
    # The count lies on the mesh from the first step on: another place would be another program.
    step = place(np.zeros((), np.int32), replicated(mesh))
    return with_moments(state, moments_of(state)._replace(step=step))


def transformation(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Clipped gradients to what, times the learning rate, is subtracted from the weights."""
    return optax.chain(scale_by_moments(spec), add_weight_decay(spec.weight_decay))


def moments_of(state: TrainState) -> Moments:
    """The moments within the chain's state."""
    return state.optimizer[0]


def with_moments(state: TrainState, moments: Moments) -> TrainState:
    """The same state with other moments."""
    return state._replace(optimizer=(moments, *state.optimizer[1:]))


def scale_by_moments(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Gradients to Adam's m_hat / (sqrt(v_hat) + eps) (Kingma and Ba 2015, Algorithm 1), or to SGD's momentum."""

    def init(params: Any) -> Any:
        first = jax.tree.map(jnp.zeros_like, params)
        second = jax.tree.map(jnp.zeros_like, params) if spec.name == "adamw" else None
        return Moments(step=jnp.zeros((), jnp.int32), first=first, second=second)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        step = state.step + 1
        if spec.name == "sgd":
            first = jax.tree.map(lambda m, g: spec.momentum * m + g, state.first, updates)
            return first, Moments(step, first, None)
        first = jax.tree.map(lambda m, g: spec.beta1 * m + (1 - spec.beta1) * g, state.first, updates)
        second = jax.tree.map(lambda v, g: spec.beta2 * v + (1 - spec.beta2) * jnp.square(g), state.second, updates)

        def direction(m, v):
            return m / _correction(spec.beta1, step, m.dtype) / (
                jnp.sqrt(v / _correction(spec.beta2, step, v.dtype)) + spec.eps
            )  # fmt: skip

        return jax.tree.map(direction, first, second), Moments(step, first, second)

    return optax.GradientTransformation(init, update)


def _correction(beta: float, step: Array, dtype) -> Float[Array, ""]:
    """1 - beta^step to the last digit."""
    return -jnp.expm1(step.astype(dtype) * (math.log(beta) if beta > 0 else -math.inf))


def add_weight_decay(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov and Hutter 2019) on tensors of two or more dimensions in the checkpoint."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if not weight_decay:
            return updates, state
        assert params is not None
        return jax.tree.map(
            lambda u, p, is_decayed: u + weight_decay * p if is_decayed else u, updates, params, decayed(params)
        ), state

    def init(params: Any) -> Any:
        del params
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def global_norm(gradients: Model) -> Float[Array, ""]:
    """The L2 norm over all gradients together."""
    # Upcast: squares are summed in at least float32.
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(gradients)]
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in wide])))


def apply(
    spec: OptimizerSpec, state: TrainState, gradients: Model, learning_rate: Float[Array, ""]
) -> tuple[TrainState, Float[Array, ""]]:
    """One update, and the norm of the gradients before clipping. Pure; run it under `jax.jit`."""
    norm = global_norm(gradients)
    if spec.max_grad_norm is not None:
        scale = jnp.minimum(spec.max_grad_norm / (norm + 1e-6), 1.0)
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    step: Any = transformation(spec).update
    directions, optimizer = step(gradients, state.optimizer, state.model)
    model = jax.tree.map(lambda p, direction: p - learning_rate * direction, state.model, directions)
    ema, decay = None, spec.ema_decay
    if decay is not None:
        # The average has the type of the weights, which is at least float32.
        ema = pinned(jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, model))
    moments = moments_of(TrainState(model, optimizer, ema))
    second = None if moments.second is None else pinned(moments.second)
    moments = moments._replace(first=pinned(moments.first), second=second)
    return with_moments(TrainState(pinned(model), optimizer, ema), moments), norm
