"""The JAX engine: NumPy in, NumPy out, compiled programs on a mesh between (`diptych.engine` is the contract).

Nothing here decides a number. The model is model.py, its weights weights.py, log-probabilities logprobs.py, a training
step training.py and optimizer.py, meshes mesh.py, the switch to the decode mesh switch.py, sampling decode.py and
sampling.py. This file cuts batches into micro-batches, checks what the device would not, and moves arrays.

Environment: DIPTYCH_DEVICES=N uses only the first N devices (comparisons and tests; on one process).

Process-wide switches: `create` sets the matrix multiplication precision to "highest", and x64 on for a float64 engine.
x64 stays on then; a float32 engine in the same process goes on in float32, because every array that enters a
program has an explicit type. Compiled programs are kept on disk (`compilations.enable_cache`); on a CPU the process
keeps the memory that it frees (`diptych.allocator`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from diptych.allocator import computes_on_cpu, keep_freed_memory
from diptych.engine import (
    Completions,
    EngineSettings,
    Loss,
    Memory,
    Metrics,
    ModelSpec,
    OptimizerSpec,
    OptimizerState,
    Probed,
    PromptBatch,
    Role,
    Sampling,
    Taps,
    Tensors,
    TokenBatch,
    TrainBatch,
)
from diptych.errors import InvariantError, UserError
from diptych.families.family import ModelConfig, check_positions, model_slots, read_model
from diptych.layout import DECODE_RULES, check_slots, resolve
from diptych.parity.tolerances import TOLERANCES
from diptych_jax import adapter as adapters
from diptych_jax import checkpoint, compilations, decode, optimizer, processes, scoring, switch, training, weights
from diptych_jax.instruments import JaxInstruments
from diptych_jax.kernels import Choice, Kernel, choose
from diptych_jax.mesh import (
    num_shards,
    on_device,
    on_host,
    place,
    place_rows,
    replicated,
    shape_of,
    to_host,
    train_mesh,
)
from diptych_jax.optimizer import Moments, TrainState
from diptych_jax.probe import check_place, look


def create(settings: EngineSettings) -> JaxEngine:
    """Start the engine: sets JAX's process-wide precision switches (see the top of the file). Raises UserError for
    settings that are another engine's."""
    if settings.rollout == "deepspeed":
        raise UserError("rollout.engine=deepspeed needs the torch engine: set native, or auto, for the JAX engine")
    if settings.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if settings.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    if settings.device == "cpu" or jax.config.jax_platforms == "cpu" or computes_on_cpu():  # pyright: ignore[reportAttributeAccessIssue]
        keep_freed_memory()
    processes.start(settings)
    compilations.enable_cache(_devices())
    return JaxEngine(settings)


class JaxEngine:
    """See `diptych.engine.Engine`."""

    name = "jax"

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self.world = processes.world()
        devices = _devices()
        self._meshes = {}
        for role in ("policy", "critic", "reference", "reward"):
            shape = resolve(settings.layout.of(role), len(devices), key=settings.layout.key_of(role))
            self._meshes[role] = train_mesh(shape, devices)
        decode_shape = resolve(settings.layout.decode, len(devices), key="layout.decode")
        self._over = switch.meshes(self._meshes["policy"], decode_shape)
        self._attention: dict[str, Choice] = {}  # of each role that was checked

    def check_model(self, config: ModelConfig, role: Role) -> None:
        """UserError where a model of this role does not divide over its meshes (naming the axis), or cannot run the
        attention that the settings name."""
        platform = self._meshes[role].devices.flat[0].platform
        self._attention[role] = choose(
            self.settings.attention, platform=platform, dtype=self.settings.precision, config=config
        )
        layout = self.settings.layout
        slots = model_slots(config, "lm")
        check_slots(slots, shape_of(self._meshes[role]), key=layout.key_of(role))
        if role == "policy":
            check_slots(slots, shape_of(self._over.decode), key="layout.decode", rules=DECODE_RULES)

    def model(self, spec: ModelSpec) -> JaxModel:
        """Put copies of the weights of `spec` on the devices. Raises UserError where they do not fit the config or the
        mesh."""
        self.check_model(read_model(spec.config), spec.role)
        return JaxModel(spec, self.settings, self._meshes[spec.role], self._over, self._attention[spec.role].name)

    def memory(self) -> Memory | None:
        """Not asked for: `diptych plan` compiles the very programs for the devices before they are there."""
        return None

    def compilations(self) -> int | None:
        """Programs made in this process so far, read back from disk or compiled."""
        return compilations.count()

    def instruments(self) -> JaxInstruments:
        return JaxInstruments(self._meshes["policy"].devices.flat[0], self.settings.precision)

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
            "processes": str(self.world.count),
            **{f"mesh/{role}": str(shape_of(mesh)) for role, mesh in self._meshes.items()},
            "mesh/decode": str(shape_of(self._over.decode)),
            **{f"attention/{role}": f"{kernel} ({why})" for role, (kernel, why) in self._attention.items()},
            "jax_enable_x64": str(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
            "jax_default_matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        }


class JaxModel:
    """See `diptych.engine.Model`. A frozen model has no optimizer: updating or checkpointing it is an error."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings, mesh: Mesh, over: switch.Meshes, kernel: Kernel):
        if spec.micro_batch_size < 1 or spec.logprob_chunk < 1:
            raise ValueError("micro_batch_size and logprob_chunk must be 1 or more")
        self.spec = spec
        self._settings = settings
        self._mesh, self._over, self._kernel = mesh, over, kernel
        self._compute = jnp.dtype(settings.precision)
        # What is trained, and every number that is not an activation, has at least float32.
        self._dtype = np.dtype(np.float64 if settings.precision == "float64" else np.float32)
        self._config = read_model(spec.config)
        self._warm = compilations.Warm()
        self._told_of_filler = False
        self._decode_copy: weights.Model | None = None
        self._rollout_metrics: Metrics = {}
        is_trained = spec.optimizer is not None
        self._waits_on_host = not is_trained and spec.role in settings.layout.offload
        stored = self._dtype if is_trained else self._compute
        model = weights.pack(self._config, spec.head, spec.weights, stored, mesh=mesh)
        if spec.adapter is not None:
            adapter = adapters.pack(self._config, spec.adapter, spec.adapter_weights, stored, mesh=mesh)
            model = weights.with_adapter(model, adapter)
        trained, self._frozen = weights.split(model)
        self._state = (
            TrainState(trained, (), None) if spec.optimizer is None else optimizer.create(spec.optimizer, trained, mesh)
        )
        if self._waits_on_host:
            self._state = self._state._replace(model=on_host(trained))
            self._frozen = on_host(self._frozen)

    @property
    def _static(self) -> dict[str, Any]:
        """What every forward pass is compiled for."""
        return {"compute": self._compute.name, "kernel": self._kernel}

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
        scale = self._scalar(temperature)
        return self._score(
            "logprobs" if adapter else "logprobs below the adapter",
            batch,
            lambda rows: scoring.logprobs(
                model, *rows, scale, first=batch.first, chunk=self.spec.logprob_chunk, **self._static
            ),
        )

    def scores(self, batch: TokenBatch) -> Float[np.ndarray, "batch time"]:
        """The scalar head at each token."""
        self._need_head("scalar")
        self._check_batch(batch)
        model = self._model
        return self._score("scores", batch, lambda rows: scoring.scores(model, *rows, **self._static))

    def greedy_matches(self, batch: TokenBatch) -> Bool[np.ndarray, "batch time"]:
        """Is each token the likeliest one given those before it? False before `batch.first`."""
        self._need_head("lm")
        self._check_batch(batch)
        model = self._model
        return self._score(
            "greedy_matches",
            batch,
            lambda rows: scoring.greedy_matches(
                model, *rows, first=batch.first, chunk=self.spec.logprob_chunk, **self._static
            ),
        )

    def _score(self, name: str, batch: TokenBatch, score: Any) -> np.ndarray:
        """`score` of micro-batches, all of one shape: the last is filled up with copies of its last row."""
        size = min(self.spec.micro_batch_size, len(batch))
        filled = size + self._filler(size)
        results = []
        with jax.set_mesh(self._mesh), self._warm.call(name, filled, batch.tokens.shape[1], batch.first):
            for start in range(0, len(batch), size):
                rows = np.minimum(np.arange(start, start + filled), min(start + size, len(batch)) - 1)
                part = batch.take(rows)
                arrays = (part.tokens, part.attention, part.positions)
                results.append(score(tuple(place_rows(_of_device(array), self._mesh) for array in arrays)))
        return np.concatenate([to_host(result)[:size] for result in results])[: len(batch)]

    def _filler(self, size: int) -> int:
        """Rows to add to a micro-batch of `size`, so that it divides over the devices. Says once that they cost."""
        shards = num_shards(self._mesh)
        filler = -size % shards
        if filler and not self._told_of_filler and jax.process_index() == 0:
            print(
                f"diptych: {self.spec.role}: a micro-batch of {size} rows is split over {shards} devices and filled up "
                f"with {filler} empty rows: make micro_batch_size a multiple of {shards}, or data x fsdp smaller",
                file=sys.stderr,
            )
        self._told_of_filler |= filler > 0
        return filler

    # Training ------------------------------------------------------------------------------------------------------

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """One optimizer step; compiled once per loss and shape. Raises ValueError where the rows do not divide."""
        spec = self._optimizer_spec()
        self._decode_copy = None  # of weights that are about to change; its memory is free for the step
        inputs, program = self._inputs(loss, batch), self._program(loss, batch)
        with jax.set_mesh(self._mesh), self._warm.call("update", *_key(program, inputs)):
            values, gradients = training.gradients(self._state.model, self._frozen, inputs, program=program)
            rate = self._scalar(learning_rate)
            self._state, norm = training.apply(self._state, gradients, rate, spec=spec)
        return _floats({**values, "grad_norm": norm})

    def evaluate(self, loss: Loss, batch: TrainBatch) -> Metrics:
        """The loss and metrics of a step, without one."""
        inputs, program = self._inputs(loss, batch), self._program(loss, batch)
        with jax.set_mesh(self._mesh), self._warm.call("evaluate", *_key(program, inputs)):
            return _floats(training.evaluate(self._model, inputs, program=program))

    def gradients(self, loss: Loss, batch: TrainBatch) -> Tensors:
        """The unclipped gradient of the step's loss for every trained tensor."""
        inputs, program = self._inputs(loss, batch), self._program(loss, batch)
        with jax.set_mesh(self._mesh):
            found = training.gradients(self._state.model, self._frozen, inputs, program=program)[1]
        return weights.unpack_trained(found)

    def probe(
        self, loss: Loss, batch: TrainBatch, *, depth: Literal["layers", "ops"], forced: Taps | None = None
    ) -> Probed:
        """Look inside one forward and backward pass over all rows at once; compiled once per loss, shape and depth,
        whatever is forced. UserError on several devices."""
        check_place(self._mesh, self._kernel)
        inputs, program = self._inputs(loss, batch, rows=len(batch.tokens)), self._program(loss, batch)
        trained, frozen = weights.split(self._model)
        with jax.set_mesh(self._mesh):
            metrics, gradients, taps = look(trained, frozen, inputs, program=program, depth=depth, forced=forced)
        return Probed(metrics=_floats(metrics), gradients=weights.unpack_trained(gradients), taps=taps)

    def _program(self, loss: Loss, batch: TrainBatch) -> training.Program:
        return training.Program(
            loss=loss, first=batch.tokens.first, chunk=self.spec.logprob_chunk, remat=self._settings.remat,
            **self._static,
        )  # fmt: skip

    def _inputs(self, loss: Loss, batch: TrainBatch, *, rows: int | None = None) -> training.Inputs:
        """The batch as [micro-batches, rows, ...] on the devices; floats in the engine's precision. Where a micro-batch
        does not fill the shards of its rows, it is filled up with rows of zeros, which add nothing (`TrainBatch`).
        rows: of a micro-batch; None: those of the spec."""
        self._need_head("lm" if loss.reads == "logprobs" else "scalar")
        self._check_batch(batch.tokens)
        if loss.entropy and loss.reads != "logprobs":
            raise ValueError("a loss that reads scores has no entropy")
        if loss.temperature <= 0:
            raise ValueError(f"log-probabilities need a temperature above 0, got {loss.temperature}")
        num_rows = len(batch.tokens)
        size = min(self.spec.micro_batch_size, num_rows) if rows is None else rows
        if num_rows == 0 or num_rows % size:
            raise ValueError(
                f"a step of {num_rows} rows does not divide into micro-batches of {self.spec.micro_batch_size} rows"
            )

        filler = self._filler(size)

        def cut(array: np.ndarray) -> jax.Array:
            host = np.asarray(array)
            if len(host) != num_rows:
                raise ValueError(f"an array of the loss has {len(host)} rows, the tokens have {num_rows}")
            host = _of_device(host, self._dtype).reshape(num_rows // size, size, *host.shape[1:])
            host = np.pad(host, ((0, 0), (0, filler), *((0, 0),) * (host.ndim - 2)))
            return place_rows(host, self._mesh, axis=1)

        return training.Inputs(
            tokens_MBT=cut(batch.tokens.tokens),
            attention_MBT=cut(batch.tokens.attention),
            positions_MBT=cut(batch.tokens.positions),
            arrays={name: cut(array) for name, array in batch.arrays.items()},
            denominators={name: self._scalar(value) for name, value in batch.denominators.items()},
            temperature=self._scalar(loss.temperature),
            num_routed=self._scalar(float(batch.tokens.attention.sum()) * self._config.num_layers),
        )

    def _scalar(self, value: float) -> Any:
        """On the host: the same in every process, and part of no mesh."""
        return np.asarray(value, self._dtype)

    # Sampling ------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy), from a copy of the weights on
        the decode mesh, which is made where they have changed since the last one."""
        self._need_head("lm")
        self._check_tokens(prompts.tokens)
        copy = self._on_decode_mesh(prompts)
        mesh = self._over.decode
        settings = replace(sampling, temperature=float(sampling.temperature > 0), top_p=float(sampling.top_p < 1))
        settings = replace(settings, stop_token_ids=(0,) * len(sampling.stop_token_ids))
        with jax.set_mesh(mesh), self._warm.call("generate", prompts.tokens.shape, settings):
            return decode.generate(copy, prompts, sampling, uniforms, pad_token_id=pad_token_id, mesh=mesh)

    def rollout_metrics(self) -> Metrics:
        """What the newest decode copy cost: `timing_s/switch`, `switch/bytes_moved`, `switch/bytes_per_second`; empty
        where none was made since this was last asked."""
        metrics, self._rollout_metrics = self._rollout_metrics, {}
        return metrics

    def _on_decode_mesh(self, prompts: PromptBatch) -> weights.Model:
        if self._decode_copy is None:
            layout = self._settings.layout
            with self._warm.call("switch"):
                switched = switch.switch(self._model, self._over, self._compute, chunk=layout.switch_chunk)
            self._decode_copy = switched.model
            self._rollout_metrics = {
                "timing_s/switch": switched.seconds,
                "switch/bytes_moved": float(switched.bytes_moved),
                "switch/bytes_per_second": switched.bytes_moved / switched.seconds,
            }
            if layout.switch_check == "logprobs":
                self._rollout_metrics["switch/logprob_gap_max"] = self._switch_gap(prompts)
        return self._decode_copy

    def _switch_gap(self, prompts: PromptBatch) -> float:
        """The largest difference between the prompts' log-probabilities under the two copies. InvariantError beyond the
        band of the precision."""
        rows = TokenBatch(tokens=prompts.tokens, attention=prompts.attention, positions=prompts.positions)
        here = self.logprobs(rows, temperature=1.0)
        copy, mesh = self._decode_copy, self._mesh
        assert copy is not None
        there = decode.logprobs(copy, rows, mesh=self._over.decode)
        gap = float(np.abs(np.where(rows.attention, here - there, 0)).max())
        limit = TOLERANCES["sampler_gap"].at(self._settings.precision)
        if not gap <= limit:
            raise InvariantError(
                f"the switch to the decode mesh: log-probabilities of the prompts differ by up to {gap:.3g} (limit "
                f"{limit:.0e}) between the train mesh ({shape_of(mesh)}) and the decode mesh "
                f"({shape_of(self._over.decode)})"
            )
        return gap

    # State ---------------------------------------------------------------------------------------------------------

    def weights(self, names: Sequence[str] | None = None) -> Tensors:
        """Copies of all tensors (or of `names`) by Hugging Face name."""
        return weights.unpack(self._model, names)

    def load_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace all weights; adapter, optimizer state and average stay."""
        stored = self._compute if self.spec.optimizer is None else self._dtype
        model = weights.pack(self._config, self.spec.head, tensors, stored, mesh=self._mesh)
        trained, frozen = weights.split(weights.with_adapter(model, self._state.model.adapter))
        self._replace(trained, frozen)

    def adapter_weights(self) -> Tensors:
        """Copies of the adapter's tensors, and of a scalar head trained beside it, by PEFT's names."""
        self._need_adapter()
        return weights.unpack_trained(self._state.model)

    def load_adapter(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace them; weights, optimizer state and average stay."""
        self._need_adapter()
        self._replace(self._pack(tensors, "adapter"), self._frozen)

    def ema_weights(self, names: Sequence[str] | None = None) -> Tensors:
        """The averaged trained weights (or those of `names`). Raises ValueError where `ema_decay` is not set."""
        if self._state.ema is None:
            raise ValueError("this model keeps no average of its weights: set OptimizerSpec.ema_decay")
        return weights.unpack_trained(self._state.ema, names)

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
            step=place(np.asarray(state.step, np.int32), replicated(self._mesh)),
            first=self._pack(state.first, "first moments"),
            second=self._pack(state.second, "second moments") if is_adamw else None,
        )
        self._state = optimizer.with_moments(self._state, moments)

    def save_checkpoint(self, directory: Path) -> Callable[[], None]:
        """Everything that training needs to go on bit for bit; call the result to wait until it is on disk."""
        self._optimizer_spec()
        return checkpoint.save(directory, self._state)

    def load_checkpoint(self, directory: Path) -> None:
        """Go on where `save_checkpoint` was called. Raises UserError for another model's checkpoint."""
        self._optimizer_spec()
        self._state = checkpoint.load(directory, self._state)
        self._decode_copy = None

    @property
    def _model(self) -> weights.Model:
        model = weights.join(self._state.model, self._frozen)
        return on_device(model) if self._waits_on_host else model

    def _replace(self, trained: weights.Model, frozen: weights.Model) -> None:
        """Other weights; the decode copy is of those before."""
        self._decode_copy = None
        if self._waits_on_host:
            trained, frozen = on_host(trained), on_host(frozen)
        self._state, self._frozen = self._state._replace(model=trained), frozen

    def _without_adapter(self) -> weights.Model:
        """The model as it is below its adapter: the reference of a policy that trains one."""
        self._need_adapter()
        return weights.with_adapter(self._model, None)

    def _pack(self, tensors: Mapping[str, np.ndarray], what: str) -> weights.Model:
        return weights.pack_trained(self._state.model, tensors, self._dtype, mesh=self._mesh, what=what)

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


def _devices() -> list[Any]:
    """All devices, or as many as DIPTYCH_DEVICES says."""
    devices, wanted = jax.devices(), os.environ.get("DIPTYCH_DEVICES")
    if wanted is None:
        return devices
    if jax.process_count() > 1:
        raise UserError("DIPTYCH_DEVICES is for one process: unset it, every process brings all its devices")
    if not wanted.isdecimal() or not 1 <= int(wanted) <= len(devices):
        raise UserError(f"DIPTYCH_DEVICES={wanted}: give a number from 1 to {len(devices)}, the devices that are here")
    return devices[: int(wanted)]


def _of_device(host: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """As the device wants it: floats in `dtype`, integers int32, booleans as they are."""
    kinds = {"f": np.dtype(dtype), "i": np.dtype(np.int32), "u": np.dtype(np.int32), "b": np.dtype(bool)}
    if host.dtype.kind not in kinds:
        raise ValueError(f"arrays are float, integer or boolean, got {host.dtype}")
    return np.asarray(host, kinds[host.dtype.kind])


def _key(program: training.Program, inputs: training.Inputs) -> tuple:
    """All that changes the compiled step."""
    return program, tuple((name, array.shape) for name, array in inputs.arrays.items()), inputs.tokens_MBT.shape


def _floats(values: Mapping[str, jax.Array]) -> Metrics:
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}
