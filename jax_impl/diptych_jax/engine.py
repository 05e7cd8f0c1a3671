"""The JAX engine on one device: NumPy in, NumPy out, compiled programs between (`diptych.engine` is the contract).

Nothing here decides a number. The model is model.py, its weights weights.py, log-probabilities logprobs.py, a training
step training.py and optimizer.py, sampling decode.py and sampling.py. This file cuts batches into micro-batches, checks
what the device would not, and moves arrays.

Process-wide switches: `create` sets the matrix multiplication precision to "highest", and x64 on for a float64 engine.
x64 stays on then; a float32 engine in the same process goes on in float32, because every array that enters a
program has an explicit type. The persistent compilation cache is left as it is configured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from diptych.engine import (
    Completions,
    EngineSettings,
    Loss,
    Metrics,
    ModelSpec,
    OptimizerSpec,
    OptimizerState,
    PromptBatch,
    Sampling,
    Tensors,
    TokenBatch,
    TrainBatch,
)
from diptych.errors import UserError
from diptych.families.family import check_positions, read_model
from diptych_jax import adapter as adapters
from diptych_jax import checkpoint, decode, optimizer, scoring, training, weights
from diptych_jax.optimizer import Moments, TrainState


def create(settings: EngineSettings) -> JaxEngine:
    """Start the engine: sets JAX's process-wide precision switches (see the top of the file)."""
    if settings.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if settings.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    return JaxEngine(settings)


class JaxEngine:
    """See `diptych.engine.Engine`."""

    name = "jax"

    def __init__(self, settings: EngineSettings):
        self.settings = settings

    def model(self, spec: ModelSpec) -> JaxModel:
        """Put copies of the weights of `spec` on the device. Raises UserError where they do not fit the config."""
        return JaxModel(spec, self.settings)

    def environment(self) -> dict[str, str]:
        """Versions, devices and precision switches."""
        devices = jax.devices()
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
        return {
            "engine": self.name,
            "precision": self.settings.precision,
            **{package: version(package) for package in packages},
            "platform": devices[0].platform,
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "jax_enable_x64": str(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
            "jax_default_matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        }


class JaxModel:
    """See `diptych.engine.Model`. A frozen model has no optimizer: updating or checkpointing it is an error."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings):
        if spec.micro_batch_size < 1 or spec.logprob_chunk < 1:
            raise ValueError("micro_batch_size and logprob_chunk must be 1 or more")
        self.spec = spec
        self._settings = settings
        self._dtype = dtype = np.dtype(settings.precision)
        self._config = read_model(spec.config)
        model = weights.pack(self._config, spec.head, spec.weights, dtype)
        if spec.adapter is not None:
            adapter = adapters.pack(self._config, spec.adapter, spec.adapter_weights, dtype)
            model = weights.with_adapter(model, adapter)
        trained, self._frozen = weights.split(model)
        self._state = (
            TrainState(trained, (), None) if spec.optimizer is None else optimizer.create(spec.optimizer, trained)
        )

    # Scoring -------------------------------------------------------------------------------------------------------

    def logprobs(
        self, batch: TokenBatch, *, temperature: float, adapter: bool = True
    ) -> Float[np.ndarray, "batch time"]:
        """Nats of each token given those before it, of logits / temperature; 0 before `batch.first`."""
        self._need_head("lm")
        model = self._model if adapter else self._without_adapter()
        self._check_batch(batch)
        if temperature <= 0:
            raise ValueError(f"log-probabilities need a temperature above 0, got {temperature}")
        scale = jnp.asarray(temperature, self._dtype)
        return self._score(
            batch,
            lambda rows: scoring.logprobs(model, *rows, scale, first=batch.first, chunk=self.spec.logprob_chunk),
        )

    def scores(self, batch: TokenBatch) -> Float[np.ndarray, "batch time"]:
        """The scalar head at each token."""
        self._need_head("scalar")
        self._check_batch(batch)
        return self._score(batch, lambda rows: scoring.scores(self._model, *rows))

    def greedy_matches(self, batch: TokenBatch) -> Bool[np.ndarray, "batch time"]:
        """Is each token the likeliest one given those before it? False before `batch.first`."""
        self._need_head("lm")
        self._check_batch(batch)
        return self._score(
            batch,
            lambda rows: scoring.greedy_matches(self._model, *rows, first=batch.first, chunk=self.spec.logprob_chunk),
        )

    def _score(self, batch: TokenBatch, score: Any) -> np.ndarray:
        """`score` of micro-batches, all of one shape: the last is filled up with copies of its last row."""
        size = min(self.spec.micro_batch_size, len(batch))
        results = []
        for start in range(0, len(batch), size):
            rows = np.minimum(np.arange(start, start + size), len(batch) - 1)
            part = batch.take(rows)
            results.append(score((_int32(part.tokens), jnp.asarray(part.attention, bool), _int32(part.positions))))
        return np.concatenate([np.asarray(result) for result in results])[: len(batch)]

    # Training ------------------------------------------------------------------------------------------------------

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """One optimizer step; compiled once per loss and shape. Raises ValueError where the rows do not divide."""
        spec = self._optimizer_spec()
        values, gradients = training.gradients(
            self._state.model, self._frozen, self._inputs(loss, batch), program=self._program(loss, batch)
        )
        self._state, norm = training.apply(self._state, gradients, jnp.asarray(learning_rate, self._dtype), spec=spec)
        return _floats({**values, "grad_norm": norm})

    def evaluate(self, loss: Loss, batch: TrainBatch) -> Metrics:
        """The loss and metrics of a step, without one."""
        return _floats(training.evaluate(self._model, self._inputs(loss, batch), program=self._program(loss, batch)))

    def gradients(self, loss: Loss, batch: TrainBatch) -> Tensors:
        """The unclipped gradient of the step's loss for every trained tensor."""
        inputs, program = self._inputs(loss, batch), self._program(loss, batch)
        return weights.unpack_trained(training.gradients(self._state.model, self._frozen, inputs, program=program)[1])

    def _program(self, loss: Loss, batch: TrainBatch) -> training.Program:
        return training.Program(
            loss=loss, first=batch.tokens.first, chunk=self.spec.logprob_chunk, remat=self._settings.remat
        )

    def _inputs(self, loss: Loss, batch: TrainBatch) -> training.Inputs:
        """The batch as [micro-batches, rows, ...] on the device; floats in the engine's precision."""
        self._need_head("lm" if loss.reads == "logprobs" else "scalar")
        self._check_batch(batch.tokens)
        if loss.entropy and loss.reads != "logprobs":
            raise ValueError("a loss that reads scores has no entropy")
        if loss.temperature <= 0:
            raise ValueError(f"log-probabilities need a temperature above 0, got {loss.temperature}")
        num_rows = len(batch.tokens)
        size = min(self.spec.micro_batch_size, num_rows)
        if num_rows == 0 or num_rows % size:
            raise ValueError(
                f"a step of {num_rows} rows does not divide into micro-batches of {self.spec.micro_batch_size} rows"
            )

        def cut(array: np.ndarray) -> jax.Array:
            host = np.asarray(array)
            if len(host) != num_rows:
                raise ValueError(f"an array of the loss has {len(host)} rows, the tokens have {num_rows}")
            return self._put(host.reshape(num_rows // size, size, *host.shape[1:]))

        return training.Inputs(
            tokens_MBT=cut(batch.tokens.tokens),
            attention_MBT=cut(batch.tokens.attention),
            positions_MBT=cut(batch.tokens.positions),
            arrays={name: cut(array) for name, array in batch.arrays.items()},
            denominators={name: jnp.asarray(value, self._dtype) for name, value in batch.denominators.items()},
            temperature=jnp.asarray(loss.temperature, self._dtype),
            num_routed=jnp.asarray(float(batch.tokens.attention.sum()) * self._config.num_layers, self._dtype),
        )

    def _put(self, host: np.ndarray) -> jax.Array:
        """On the device: floats in the engine's precision, integers int32, booleans as they are."""
        kinds = {"f": self._dtype, "i": np.dtype(np.int32), "u": np.dtype(np.int32), "b": np.dtype(bool)}
        if host.dtype.kind not in kinds:
            raise ValueError(f"arrays are float, integer or boolean, got {host.dtype}")
        return jnp.asarray(host, kinds[host.dtype.kind])

    # Sampling ------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy)."""
        self._need_head("lm")
        self._check_tokens(prompts.tokens)
        return decode.generate(self._model, prompts, sampling, uniforms, pad_token_id=pad_token_id)

    # State ---------------------------------------------------------------------------------------------------------

    def weights(self, names: Sequence[str] | None = None) -> Tensors:
        """Copies of all tensors (or of `names`) by Hugging Face name."""
        return weights.unpack(self._model, names)

    def load_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace all weights; adapter, optimizer state and average stay."""
        model = weights.pack(self._config, self.spec.head, tensors, self._dtype)
        trained, self._frozen = weights.split(weights.with_adapter(model, self._state.model.adapter))
        self._state = self._state._replace(model=trained)

    def adapter_weights(self) -> Tensors:
        """Copies of the adapter's tensors, and of a scalar head trained beside it, by PEFT's names."""
        self._need_adapter()
        return weights.unpack_trained(self._state.model)

    def load_adapter(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace them; weights, optimizer state and average stay."""
        self._need_adapter()
        self._state = self._state._replace(model=self._pack(tensors, "adapter"))

    def ema_weights(self) -> Tensors:
        """The averaged trained weights. Raises ValueError where `ema_decay` is not set."""
        if self._state.ema is None:
            raise ValueError("this model keeps no average of its weights: set OptimizerSpec.ema_decay")
        return weights.unpack_trained(self._state.ema)

    def optimizer_state(self) -> OptimizerState:
        """Step count and moments by the trained tensors' names, in their layout."""
        self._optimizer_spec()
        step, first, second = optimizer.moments_of(self._state)
        return OptimizerState(
            step=int(step),
            first=weights.unpack_trained(first),
            second={} if second is None else weights.unpack_trained(second),
        )

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace step count and moments. Raises UserError for the state of another model or optimizer."""
        is_adamw = self._optimizer_spec().name == "adamw"
        if not is_adamw and state.second:
            raise UserError("the optimizer state has second moments, SGD has none: use the state of the same optimizer")
        moments = Moments(
            step=jnp.asarray(state.step, jnp.int32),
            first=self._pack(state.first, "first moments"),
            second=self._pack(state.second, "second moments") if is_adamw else None,
        )
        self._state = optimizer.with_moments(self._state, moments)

    def save_checkpoint(self, directory: Path) -> None:
        """Everything that training needs to go on bit for bit."""
        self._optimizer_spec()
        checkpoint.save(directory, self._state)

    def load_checkpoint(self, directory: Path) -> None:
        """Go on where `save_checkpoint` was called. Raises UserError for another model's checkpoint."""
        self._optimizer_spec()
        self._state = checkpoint.load(directory, self._state)

    @property
    def _model(self) -> weights.Model:
        return weights.join(self._state.model, self._frozen)

    def _without_adapter(self) -> weights.Model:
        """The model as it is below its adapter: the reference of a policy that trains one."""
        self._need_adapter()
        return weights.with_adapter(self._model, None)

    def _pack(self, tensors: Mapping[str, np.ndarray], what: str) -> weights.Model:
        return weights.pack_trained(self._state.model, tensors, self._dtype, what=what)

    def _need_adapter(self) -> None:
        if self.spec.adapter is None:
            raise ValueError("this model has no adapter: its spec names none")

    def _optimizer_spec(self) -> OptimizerSpec:
        if self.spec.optimizer is None:
            raise ValueError("this model is frozen: it was built with optimizer=None")
        return self.spec.optimizer

    def _need_head(self, head: str) -> None:
        if self.spec.head != head:
            raise ValueError(f"this needs a model with head={head!r}, and this one has head={self.spec.head!r}")

    def _check_batch(self, batch: TokenBatch) -> None:
        self._check_tokens(batch.tokens)
        check_positions(self._config, batch.positions)

    def _check_tokens(self, tokens: np.ndarray) -> None:
        """JAX clamps a wrong index silently, so token ids are checked here."""
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._config.vocab_size:
            raise UserError(
                f"token ids run from {tokens.min()} to {tokens.max()}, the model has {self._config.vocab_size} "
                "(0 to vocab_size - 1): use the tokenizer that belongs to the model"
            )


def _int32(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.int32)


def _floats(values: Mapping[str, jax.Array]) -> Metrics:
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}
