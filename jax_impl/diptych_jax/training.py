"""The loss of an optimizer step: micro-batches through the model, and the sums of values, metrics and gradients.

A batch arrives as [micro-batches, rows, ...]. Losses divide by denominators of the whole step (law 4), so everything
that comes back is a plain sum over micro-batches; they run one after another in a `jax.lax.scan`, and memory does not
grow with their number. Loss, shapes and optimizer are static; weights, arrays, denominators, temperature and learning
rate are not: the programs are compiled once per (loss, shapes, model). The optimizer's part is a program of its own, so
that an update and a look at its gradients share the one that takes long to compile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.engine import Loss, OptimizerSpec
from diptych_jax import optimizer
from diptych_jax.logprobs import token_logprobs
from diptych_jax.model import Llama, scores
from diptych_jax.optimizer import TrainState

Values = dict[str, Array]  # metric name -> scalar


class Inputs(NamedTuple):
    """The traced inputs of a step; M micro-batches of B rows and T columns. arrays: the loss's own, [M, B, ...]."""

    tokens_MBT: Int[Array, "M B T"]
    attention_MBT: Bool[Array, "M B T"]
    positions_MBT: Int[Array, "M B T"]
    arrays: dict[str, Array]
    denominators: dict[str, Float[Array, ""]]
    temperature: Float[Array, ""]


class Program(NamedTuple):
    """What changes the compiled step besides shapes. first: TokenBatch.first. chunk: ModelSpec.logprob_chunk."""

    loss: Loss
    first: int
    chunk: int


def _loss(model: Llama, micro: Inputs, program: Program) -> tuple[Float[Array, ""], Values]:
    """The loss and metrics of one micro-batch (the fields of `micro` have lost their leading axis)."""
    loss = program.loss
    inputs = {**micro.arrays, **micro.denominators}
    if len(inputs) < len(micro.arrays) + len(micro.denominators):
        raise ValueError(f"arrays and denominators share a name: {sorted(micro.arrays)}, {sorted(micro.denominators)}")
    rows = (model, micro.tokens_MBT, micro.attention_MBT, micro.positions_MBT)
    if loss.reads == "scores":
        outputs = scores(*rows)
    else:
        outputs, entropy = token_logprobs(
            *rows, micro.temperature, first=program.first, chunk=program.chunk, entropy=loss.entropy
        )
        if entropy is not None:
            inputs["entropy"] = entropy
    value, metrics = loss(outputs, **inputs)
    taken = {"loss", "grad_norm"} & set(metrics)
    if taken:
        raise ValueError(f"{sorted(taken)} are the engine's own metrics: the loss function must use other names")
    # Upcast: loss and metrics are summed over micro-batches in the type of the outputs, at least float32.
    return jnp.asarray(value, outputs.dtype), {k: jnp.asarray(v, outputs.dtype) for k, v in metrics.items()}


def _micro(inputs: Inputs, rows: tuple) -> Inputs:
    tokens, attention, positions, arrays = rows
    return inputs._replace(tokens_MBT=tokens, attention_MBT=attention, positions_MBT=positions, arrays=arrays)


def _combine(metrics: Values) -> Values:
    """[M] of each metric to its value of the step: the maximum where the name says so, otherwise the sum."""
    return {k: jnp.max(v, axis=0) if k.endswith("_max") else jnp.sum(v, axis=0) for k, v in metrics.items()}


@partial(jax.jit, static_argnames=("program",))
def evaluate(model: Llama, inputs: Inputs, *, program: Program) -> Values:
    """Loss and metrics of the step."""

    def body(_: None, rows: tuple) -> tuple[None, Values]:
        value, metrics = _loss(model, _micro(inputs, rows), program)
        return None, {"loss": value, **metrics}

    return _combine(jax.lax.scan(body, None, inputs[:4])[1])


@partial(jax.jit, static_argnames=("program",))
def gradients(model: Llama, inputs: Inputs, *, program: Program) -> tuple[Values, Llama]:
    """Loss and metrics of the step, and the gradients of its loss, unclipped, in the model's structure."""
    differentiate = jax.value_and_grad(partial(_loss, program=program), has_aux=True)

    def body(total: Llama, rows: tuple) -> tuple[Llama, Values]:
        (value, metrics), gradient = differentiate(model, _micro(inputs, rows))
        return jax.tree.map(jnp.add, total, gradient), {"loss": value, **metrics}

    zeros = jax.tree.map(jnp.zeros_like, model)
    total, values = jax.lax.scan(body, zeros, inputs[:4])
    return _combine(values), total


@partial(jax.jit, static_argnames=("spec",), donate_argnames=("state",))
def apply(
    state: TrainState, gradient: Llama, learning_rate: Float[Array, ""], *, spec: OptimizerSpec
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimizer step, and the gradients' norm. `state` is donated: its arrays are gone after the call."""
    return optimizer.apply(spec, state, gradient, learning_rate)
