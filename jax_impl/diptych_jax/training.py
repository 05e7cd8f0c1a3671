"""The loss of an optimizer step: micro-batches through the model, and the sums of values, metrics and gradients.

A batch arrives as [micro-batches, rows, ...]. Losses divide by denominators of the whole step (law 4), so everything
that comes back is a plain sum over micro-batches; they run one after another in a `jax.lax.scan`, and memory does not
grow with their number. On a mesh, gradients and their sums lie as the weights do (each micro-batch's are
reduce-scattered). In bfloat16 the weights are cast where a micro-batch begins; gradients are of the float32 masters.
Loss, shapes and optimizer are static; weights, arrays, denominators, temperature and learning
rate are not: the programs are compiled once per (loss, shapes, model). The optimizer's part is a program of its own, so
that an update and a look at its gradients share the one that takes long to compile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diptych.algorithms.losses import router_balance_loss
from diptych.engine import Loss, OptimizerSpec, Remat
from diptych.families.decoder import DecoderConfig
from diptych_jax import optimizer
from diptych_jax.experts import Routing
from diptych_jax.kernels import Kernel
from diptych_jax.logprobs import token_logprobs
from diptych_jax.model import scores
from diptych_jax.optimizer import TrainState
from diptych_jax.weights import Model, cast, join, pinned

Values = dict[str, Array]  # metric name -> scalar


class Inputs(NamedTuple):
    """The traced inputs of a step; M micro-batches of B rows and T columns. arrays: the loss's own, [M, B, ...]."""

    tokens_MBT: Int[Array, "M B T"]
    attention_MBT: Bool[Array, "M B T"]
    positions_MBT: Int[Array, "M B T"]
    arrays: dict[str, Array]
    denominators: dict[str, Float[Array, ""]]
    temperature: Float[Array, ""]
    num_routed: Float[Array, ""]  # real tokens of the whole step times layers


class Program(NamedTuple):
    """What changes the compiled step besides shapes. first: TokenBatch.first. chunk: ModelSpec.logprob_chunk. remat:
    EngineSettings.remat. compute: dtype of activations and matrix products. kernel: `kernels.choose`'s."""

    loss: Loss
    first: int
    chunk: int
    remat: Remat
    compute: str
    kernel: Kernel = "xla"


def _loss(
    model: Model, micro: Inputs, fractions_X: Float[Array, " X"] | None, program: Program
) -> tuple[Float[Array, ""], Values]:
    """The loss and metrics of one micro-batch (the fields of `micro` have lost their leading axis). fractions_X: how
    the step's tokens were routed; None where nobody asks, or where the micro-batch is the whole step."""
    loss = program.loss
    inputs = {**micro.arrays, **micro.denominators}
    if len(inputs) < len(micro.arrays) + len(micro.denominators):
        raise ValueError(f"arrays and denominators share a name: {sorted(micro.arrays)}, {sorted(micro.denominators)}")
    outputs, entropy, routing = _outputs(model, micro, program)
    if entropy is not None:
        inputs["entropy"] = entropy
    value, metrics = loss(outputs, **inputs)
    taken = {"loss", "grad_norm"} & set(metrics)
    if taken:
        raise ValueError(f"{sorted(taken)} are the engine's own metrics: the loss function must use other names")
    if loss.balance and routing is not None:
        if fractions_X is None:  # the micro-batch is the whole step
            fractions_X = routing.counts_X / micro.num_routed
        balance, more = router_balance_loss(
            routing.probability_sums_X, fractions=fractions_X, num_routed=micro.num_routed, top_k=_top_k(model)
        )  # pyright: ignore[reportArgumentType]
        value, metrics = value + loss.balance * balance, {**metrics, **more}
    # Upcast: loss and metrics are summed over micro-batches in the type of the outputs, at least float32.
    return jnp.asarray(value, outputs.dtype), {k: jnp.asarray(v, outputs.dtype) for k, v in metrics.items()}


def _outputs(model: Model, micro: Inputs, program: Program) -> tuple[Array, Array | None, Routing | None]:
    """What the loss reads: log-probabilities (and entropy) or scores; and the routing."""
    rows = (cast(model, program.compute), micro.tokens_MBT, micro.attention_MBT, micro.positions_MBT)
    if program.loss.reads == "scores":
        outputs, routing = scores(*rows, remat=program.remat, kernel=program.kernel)
        return outputs, None, routing
    return token_logprobs(
        *rows,
        micro.temperature,
        first=program.first,
        chunk=program.chunk,
        entropy=program.loss.entropy,
        remat=program.remat,
        kernel=program.kernel,
    )


def _top_k(model: Model) -> int:
    assert isinstance(model.config, DecoderConfig)
    assert model.config.experts is not None
    return model.config.experts.top_k


def _fractions(model: Model, inputs: Inputs, program: Program) -> Float[Array, " X"] | None:
    """How often each expert was chosen, over all real tokens of the step and all layers; None where nobody asks
    or the step is one micro-batch, whose own routing says it.

    The balance loss multiplies these with probabilities that are summed micro-batch by micro-batch, so they must be
    known before: a forward pass over the step.
    """
    if inputs.tokens_MBT.shape[0] == 1:
        return None
    if not (program.loss.balance and isinstance(model.config, DecoderConfig) and model.config.experts):
        return None
    frozen = jax.lax.stop_gradient(model)

    def body(total: Array, rows: tuple) -> tuple[Array, None]:
        routing = _outputs(frozen, _micro(inputs, rows), program)[2]
        assert routing is not None
        return total + routing.counts_X, None

    wide = jnp.promote_types(model.dtype, jnp.float32)
    return jax.lax.scan(body, jnp.zeros(model.config.experts.count, wide), inputs[:4])[0] / inputs.num_routed


def _micro(inputs: Inputs, rows: tuple) -> Inputs:
    tokens, attention, positions, arrays = rows
    return inputs._replace(tokens_MBT=tokens, attention_MBT=attention, positions_MBT=positions, arrays=arrays)


def _combine(metrics: Values) -> Values:
    """[M] of each metric to its value of the step: the maximum where the name says so, otherwise the sum."""
    return {k: jnp.max(v, axis=0) if k.endswith("_max") else jnp.sum(v, axis=0) for k, v in metrics.items()}


@partial(jax.jit, static_argnames=("program",))
def evaluate(model: Model, inputs: Inputs, *, program: Program) -> Values:
    """Loss and metrics of the step."""

    fractions_X = _fractions(model, inputs, program)

    def body(_: None, rows: tuple) -> tuple[None, Values]:
        value, metrics = _loss(model, _micro(inputs, rows), fractions_X, program)
        return None, {"loss": value, **metrics}

    return _combine(jax.lax.scan(body, None, inputs[:4])[1])


@partial(jax.jit, static_argnames=("program",))
def gradients(trained: Model, frozen: Model, inputs: Inputs, *, program: Program) -> tuple[Values, Model]:
    """Loss and metrics of the step, and the gradients of its loss for the trained part of the model, unclipped."""
    fractions_X = _fractions(join(trained, frozen), inputs, program)

    def loss(trained: Model, micro: Inputs) -> tuple[Float[Array, ""], Values]:
        return _loss(join(trained, frozen), micro, fractions_X, program)

    differentiate = jax.value_and_grad(loss, has_aux=True)

    def body(total: Model, rows: tuple) -> tuple[Model, Values]:
        (value, metrics), gradient = differentiate(trained, _micro(inputs, rows))
        return pinned(jax.tree.map(jnp.add, total, gradient)), {"loss": value, **metrics}

    if len(inputs.tokens_MBT) == 1:  # nothing to add up
        (value, metrics), gradient = differentiate(
            trained, _micro(inputs, jax.tree.map(lambda part: part[0], inputs[:4]))
        )
        return {"loss": value, **metrics}, pinned(gradient)
    zeros = pinned(jax.tree.map(jnp.zeros_like, trained))
    total, values = jax.lax.scan(body, zeros, inputs[:4])
    return _combine(values), total


@partial(jax.jit, static_argnames=("spec",), donate_argnames=("state",))
def apply(
    state: TrainState, gradient: Model, learning_rate: Float[Array, ""], *, spec: OptimizerSpec
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimizer step, and the gradients' norm. `state` is donated: its arrays are gone after the call."""
    return optimizer.apply(spec, state, gradient, learning_rate)
