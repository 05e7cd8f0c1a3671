"""The PyTorch + DeepSpeed engine: transformers models, trained by DeepSpeed (ZeRO 0 to 3), in one process or many.

`create` starts the process and fixes the precision switches; `TorchModel` is one model behind the protocol
`diptych.engine.Model`. Trained models always run through their DeepSpeed engine, on a CPU too; frozen ones are plain
modules.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

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
from diptych.errors import UserError
from diptych.families.adapter import adapter_shapes
from diptych.families.family import ModelConfig, read_model, tensor_shapes
from diptych.families.taps import Depth
from diptych.layout import Zero
from diptych.weights.huggingface import check_tensors
from diptych_torch import adapter as adapters
from diptych_torch import (
    checkpoint,
    deepspeed_rollout,
    optimizer,
    probe,
    processes,
    tensor_parallel,
    zero,
)
from diptych_torch import names as naming
from diptych_torch.data_parallel import (
    Share,
    add_over_processes,
    add_tensors,
    gather_rows,
    take_tokens,
)
from diptych_torch.float64 import KeepFloat64
from diptych_torch.hybrid import Hybrid, empty_network, filled
from diptych_torch.instruments import TorchInstruments
from diptych_torch.linear import no_onednn
from diptych_torch.model import Network, build, detached, device_batch, fill, values_of
from diptych_torch.remat import rematerialize
from diptych_torch.tensor_parallel import TensorGroup
from diptych_torch.training import Backward, Run, accumulate, check_batch

# What is computed in, by precision; masters, losses and what leaves the engine are at least float32.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def create(settings: EngineSettings) -> TorchEngine:
    """Start the engine. Raises UserError for settings that it cannot serve."""
    if settings.precision not in DTYPES:
        raise UserError(f"precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}")
    for role in ("policy", "critic", "reference", "reward"):
        stage = settings.layout.zero_of(role, is_trained=role in ("policy", "critic")).stage
        if stage not in (0, 1, 2, 3):
            raise UserError(f"layout.zero.stage must be 0, 1, 2 or 3, got {stage!r}")
        if settings.precision == "float64" and settings.layout.zero_of(role, is_trained=True).offload_optimizer:
            raise UserError(
                "precision float64 goes without layout.zero.offload_optimizer: DeepSpeed takes the norm of offloaded "
                "gradients in float32"
            )
        if settings.precision == "bfloat16" and stage == 0 and role in ("policy", "critic"):
            raise UserError(
                "precision bfloat16 needs layout.zero.stage 1, 2 or 3: at stage 0 DeepSpeed sums gradients in bfloat16 "
                "and counts a step that is not made (one process holds no more at stage 1 than at stage 0)"
            )
    # Full float32 products on every device (law 6), and the same bits in every run.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Where an accelerator has no deterministic kernel (cumsum), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return TorchEngine(settings, processes.start(settings))


class TorchEngine:
    """`diptych.engine.Engine` on this process's device."""

    name = "torch"

    def __init__(self, settings: EngineSettings, device: torch.device):
        self.settings = settings
        self.device = device
        self.world = processes.world()
        self._group = TensorGroup(settings.layout.decode.tensor)

    def model(self, spec: ModelSpec) -> TorchModel:
        """Build a model. Raises UserError for weights or a config that do not fit."""
        return TorchModel(spec, self.settings, self.device, self._group)

    def check_model(self, config: ModelConfig, role: Role) -> None:
        """UserError where a policy cannot be decoded on as many processes together as the settings ask. (ZeRO
        partitions any model.)"""
        if role == "policy":
            tensor_parallel.check(config, self._group.size)

    def memory(self) -> Memory | None:
        """What each process may fill; the plan before launch is made for it."""
        return processes.memory(self.device)

    def compilations(self) -> int | None:
        """PyTorch runs its operations one by one."""
        return None

    def instruments(self) -> TorchInstruments:
        return TorchInstruments(self.device, DTYPES[self.settings.precision])

    def environment(self) -> dict[str, str]:
        """Versions, devices and precision switches, for the run's record."""
        import deepspeed
        import transformers

        is_gpu = self.device.type == "cuda"
        layout = self.settings.layout
        return {
            "engine": self.name,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name(self.device) if is_gpu else "cpu",
            "processes": str(self.world.count),
            "communication": torch.distributed.get_backend(),
            "threads": str(torch.get_num_threads()),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
            "precision": self.settings.precision,
            **{
                f"zero/{role}": _shown(layout.zero_of(role, is_trained=role in ("policy", "critic")))
                for role in ("policy", "critic", "reference", "reward")
            },
            "remat": self.settings.remat,
            "rollout": _rollout(self.settings.rollout),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "tf32": str(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32),
            "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "attention": "sdpa; explicit with a softcap, and in BLOOM",
            "linear layers": "oneDNN"
            if (why := no_onednn(DTYPES[self.settings.precision], self.device)) is None
            else f"torch's ({why})",
        }


def _rollout(wanted: str) -> str:
    """What generates, and why."""
    if wanted == "auto":
        return (
            "native (auto: it serves every architecture and adapters, gathers once a rollout and refills rows; "
            "DeepSpeed's hybrid engine serves few)"
        )
    return wanted


def _shown(found: Zero) -> str:
    waits = [name for name in ("optimizer", "param") if getattr(found, f"offload_{name}")]
    return f"stage {found.stage}" + (f", {' and '.join(waits)} in host memory" if waits else "")


class TorchModel:
    """`diptych.engine.Model`. Arrays are NumPy on the host, in and out."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings, device: torch.device, group: TensorGroup):
        if spec.micro_batch_size < 1 or spec.logprob_chunk < 1:
            raise UserError("micro_batch_size and logprob_chunk must be at least 1")
        self.spec = spec
        self.settings = settings
        self._device = device
        self._dtype = DTYPES[settings.precision]
        self._wide = torch.promote_types(self._dtype, torch.float32)
        self._share = Share(torch.distributed.get_rank(), zero.world_size())
        self._told_of_filler = False
        self._plain_network: Network | None = None  # filled for the time of `gradients`
        self._step = 0
        self._zero = settings.layout.zero_of(spec.role, is_trained=spec.optimizer is not None)
        waits = spec.optimizer is None and spec.role in settings.layout.offload
        if waits and self._zero.stage == 3:  # its partitions wait there
            self._zero = replace(self._zero, offload_param=True)
        self._waits_on_host = waits and self._zero.stage == 0 and device.type != "cpu"
        model = read_model(spec.config)
        trained = tensor_shapes(model, spec.head) if spec.adapter is None else adapter_shapes(model, spec.adapter)
        config = zero.ds_config(
            self._zero,
            elements=sum(math.prod(shape) for shape in trained.values()),
            micro_batch_size=-(-spec.micro_batch_size // self._share.count),
            dtype=self._dtype,
            max_grad_norm=None if spec.optimizer is None else spec.optimizer.max_grad_norm,
            more=settings.deepspeed,
        )
        partition = zero.Partition(config) if self._zero.stage == 3 else None
        home = torch.device("cpu") if self._waits_on_host else device
        self._network = build(spec, self._dtype, home, partition)
        self._weights = self._network.named_weights()
        self._trained = self._network.trained_weights()
        self._deepspeed: Any = None
        self._shards: zero.Shards | None = None
        if spec.optimizer is not None:
            self._begin_training(spec.optimizer, config)
        elif partition is not None:
            self._deepspeed = zero.initialize(self._network.eval(), None, config, dtype=self._dtype)
            weakref.finalize(self, zero.release, self._deepspeed).atexit = False
        else:
            self._network.eval()
        self._hybrid = Hybrid(
            spec, settings, self._network, self._trained, deepspeed=self._deepspeed, shards=self._shards,
            group=group, device=device,
        )  # fmt: skip

    def _begin_training(self, spec: OptimizerSpec, config: dict[str, Any]) -> None:
        """DeepSpeed's engine around the network; exact masters, and an optimizer whose state is there."""
        rematerialize(self._network.trunk, self.settings.remat, self._dtype)
        for weight in self._trained.values():
            weight.requires_grad_(True)
        self._optimizer = optimizer.build(spec, self._trained)
        surroundings = contextlib.nullcontext()
        if self.settings.rollout == "deepspeed" and self.spec.head == "lm":
            deepspeed_rollout.check(self._network, self._device)
            config = config | deepspeed_rollout.config(self._network.config)
            surroundings = deepspeed_rollout.as_transformers(self._network)
        with surroundings:
            self._deepspeed = zero.initialize(self._network, self._optimizer, config, dtype=self._dtype)
        weakref.finalize(self, zero.release, self._deepspeed).atexit = False
        self._shards = zero.Shards(self._deepspeed, self._optimizer, self._zero.stage)
        if self._dtype != self._wide:  # the masters were made of what the network holds: put back what it has lost
            for name, values in values_of(self.spec, self._network, self._wide, self._device):
                parameter = self._weights[name] if name in self._weights else self._trained[name]
                if parameter.requires_grad:
                    self._shards.write(parameter, values)
        optimizer.begin(spec, self._optimizer, self._shards.flats())

    # -- inference -----------------------------------------------------------------------------------------------

    def logprobs(
        self, batch: TokenBatch, *, temperature: float, adapter: bool = True
    ) -> Float[np.ndarray, "batch time"]:
        """Log-probability of each token given those before it; also 0 on padding and on a row's first token."""
        self._require_head("lm")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not adapter:
            self._require_adapter()
        with contextlib.nullcontext() if adapter else adapters.disabled(self._network.transformer):
            return self._read(batch, temperature=temperature)

    def scores(self, batch: TokenBatch) -> Float[np.ndarray, "batch time"]:
        """The scalar head at each token."""
        self._require_head("scalar")
        return self._read(batch)

    def greedy_matches(self, batch: TokenBatch) -> Bool[np.ndarray, "batch time"]:
        """Is each token the likeliest one given those before it? False where `logprobs` is 0 by definition."""
        self._require_head("lm")
        return self._read(batch, greedy=True)

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy); each process its rows."""
        self._require_head("lm")
        with self._resident():
            return self._hybrid.generate(
                prompts, sampling, uniforms, pad_token_id=pad_token_id, score=partial(self.logprobs, temperature=1.0)
            )

    def rollout_metrics(self) -> Metrics:
        """What the newest decode copy cost: `timing_s/switch`, `switch/bytes_moved`, `switch/bytes_per_second`; empty
        where none was made since this was last asked."""
        metrics, self._hybrid.metrics = self._hybrid.metrics, {}
        return metrics

    @torch.no_grad()
    def _read(self, batch: TokenBatch, **settings: Any) -> np.ndarray:
        size = self.spec.micro_batch_size
        with self._resident():
            run, to_device = self._runner, partial(device_batch, config=self._network.config, device=self._device)
            outputs = [
                run(to_device(take_tokens(batch, rows)), chunk=self.spec.logprob_chunk, **settings)[0]
                for rows in self._pieces(len(batch), size)
            ]
            return gather_rows(torch.cat(outputs), size, len(batch)).cpu().numpy()

    def _pieces(self, count: int, size: int, group: int = 1) -> list[np.ndarray]:
        """This process's rows of each micro-batch; -1 for a row of padding. group: of rows that stay together."""
        filler = self._share.filler(min(size, count), group)
        if filler and not self._told_of_filler and self._share.index == 0:
            print(
                f"diptych: {self.spec.role}: a micro-batch of {min(size, count)} rows is split over "
                f"{self._share.count} processes and filled up with {filler} empty rows: make micro_batch_size a "
                f"multiple of {self._share.count}",
                file=sys.stderr,
                flush=True,
            )
        self._told_of_filler |= filler > 0
        return [self._share.rows(start, min(start + size, count), group) for start in range(0, count, size)]

    @property
    def _runner(self) -> Any:
        """Training and scoring go through DeepSpeed where there is an engine of it."""
        return self._network if self._deepspeed is None else self._deepspeed

    @contextlib.contextmanager
    def _resident(self) -> Iterator[None]:
        """Inside, a frozen model that waits in host memory is on the device."""
        if not self._waits_on_host:
            yield
            return
        home = detached(self._weights), detached(self._trained)
        there = [{name: one.to(self._device, non_blocking=True) for name, one in part.items()} for part in home]
        self._network.assign(*there, requires_grad=False)
        try:
            yield
        finally:
            self._network.assign(*home, requires_grad=False)

    # -- training ------------------------------------------------------------------------------------------------

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """One optimizer step over all rows, in micro-batches. `grad_norm` is the norm before clipping.

        A non-finite gradient shows as a non-finite `grad_norm`; DeepSpeed's stages 1 to 3 then leave the weights alone.
        """
        spec = self._optimizer_spec()
        engine = self._deepspeed

        def run(*inputs: Any, last: bool, **settings: Any) -> Any:
            engine.set_gradient_accumulation_boundary(last)
            return engine(*inputs, **settings)

        def backward(value: Tensor) -> None:
            # Losses are shares of a global sum: undo DeepSpeed's mean over processes.
            engine.backward(value * zero.world_size(), scale_wrt_gas=False)

        metrics = self._accumulate(run, loss, batch, backward)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._zero.stage == 0:
            gradients = [weight.grad for weight in self._trained.values() if weight.grad is not None]
            norm = optimizer.global_norm(gradients)
            if spec.max_grad_norm is not None:
                optimizer.clip(gradients, norm, spec.max_grad_norm)
        with KeepFloat64() if self._dtype == torch.float64 else contextlib.nullcontext():
            engine.step()
        self._step += 1
        assert self._shards is not None
        optimizer.average(spec, self._optimizer, self._shards.flats())
        metrics["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
        return metrics

    @torch.no_grad()
    def evaluate(self, loss: Loss, batch: TrainBatch) -> Metrics:
        """The same numbers as `update` without gradient or step (no `grad_norm`)."""
        with self._resident():
            runner = self._runner
            return self._accumulate(lambda *inputs, last, **settings: runner(*inputs, **settings), loss, batch, None)

    def gradients(self, loss: Loss, batch: TrainBatch) -> Tensors:
        """The gradient of the step's loss for every trained tensor, unclipped. Changes nothing."""
        with self._view() as network:
            self._accumulate(
                lambda *inputs, last, **settings: network(*inputs, **settings),
                loss,
                batch,
                lambda value: value.backward(),
            )
            return self._gradients_of(network)

    def probe(self, loss: Loss, batch: TrainBatch, *, depth: Depth, forced: Taps | None = None) -> Probed:
        """Look inside one forward and backward pass over all rows at once (`probe.look`). Changes nothing."""
        self._require_head("lm" if loss.reads == "logprobs" else "scalar")
        chunk = self.spec.logprob_chunk
        with self._view() as network:
            metrics, taps = probe.look(
                network, loss, batch, depth=depth, forced=forced, chunk=chunk, device=self._device
            )
            return Probed(metrics=metrics, gradients=self._gradients_of(network), taps=taps)

    def _gradients_of(self, network: Network) -> Tensors:
        """What a backward pass has left at the trained parameters, summed over all processes; 0 where nothing."""
        found = {
            name: torch.zeros_like(one, dtype=self._wide) if one.grad is None else one.grad.to(self._wide)
            for name, one in network.trained_weights().items()
        }
        add_tensors(found)
        return self._outside(found.__getitem__)

    def _accumulate(self, run: Run, loss: Loss, batch: TrainBatch, backward: Backward | None) -> Metrics:
        """`training.accumulate` of this process's rows; sums over all processes."""
        self._require_head("lm" if loss.reads == "logprobs" else "scalar")
        check_batch(loss, batch, self.spec.micro_batch_size)
        pieces = self._pieces(len(batch.tokens), self.spec.micro_batch_size, loss.group)
        totals = accumulate(
            run, loss, batch, pieces, backward, network=self._network, chunk=self.spec.logprob_chunk,
            device=self._device,
        )  # fmt: skip
        return add_over_processes(totals, self._device)

    # -- weights and state ---------------------------------------------------------------------------------------

    def weights(self, names: Sequence[str] | None = None) -> Tensors:
        """Copies of all tensors (or of `names`) by Hugging Face name, those of an adapted layer without its adapter.
        One parameter at a time is whole. Collective."""
        held = self._network.held
        order = list(tensor_shapes(self._network.config, self.spec.head)) if names is None else list(names)
        return naming.to_checkpoint(held, lambda name: self._value(self._weights[name]), order)

    def adapter_weights(self) -> Tensors:
        """Copies of the adapter's tensors, and of a scalar head trained beside it, by PEFT's names."""
        self._require_adapter()
        return self._outside(lambda name: self._value(self._trained[name]))

    def ema_weights(self, names: Sequence[str] | None = None) -> Tensors:
        """The averaged trained weights, or those with these names (only where `ema_decay` is set). Collective."""
        if self.spec.optimizer is None or self.spec.optimizer.ema_decay is None:
            raise ValueError("this model keeps no average: its optimizer has no ema_decay")
        return self._outside(lambda name: self._state(name, optimizer.AVERAGE), names)

    def _value(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter: its master where it is trained."""
        if self._shards is not None and parameter.requires_grad:
            return self._shards.read(parameter)
        with zero.whole([parameter]):
            return parameter.detach().to(self._wide, copy=True)

    def _state(self, name: str, key: str) -> Tensor:
        assert self._shards is not None
        return self._shards.read(self._trained[name], key)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace all weights (same names and shapes); adapter, optimizer state and average stay."""
        check_tensors(weights, self._network.config, self.spec.head, where="weights")
        for name, parameter in self._network.held.items():
            values = torch.empty(parameter.shape, dtype=self._wide)
            for one, view in parameter.split(values).items():
                fill(view, weights[one], one)
            self._replace(self._weights[name], values)

    @torch.no_grad()
    def load_adapter(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace them; the weights below, optimizer state and average stay."""
        self._require_adapter()
        naming.check(weights, self._network.trained_shapes, where="adapter")
        for name, parameter in self._trained.items():
            self._replace(parameter, torch.tensor(weights[name], dtype=self._wide))

    def _replace(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Put these into the parameter, and into its master where it is trained."""
        with zero.whole([parameter], write=True):
            parameter.copy_(values)
        if self._shards is not None and self._shards.stage > 0 and parameter.requires_grad:
            self._shards.write(parameter, values)

    def optimizer_state(self) -> OptimizerState:
        """Copies of step and moments by the trained tensors' names."""
        first, *second = [
            self._outside(lambda name, moment=moment: self._state(name, moment))
            for moment in optimizer.MOMENTS[self._optimizer_spec().name]
        ]
        return OptimizerState(step=self._step, first=first, second=second[0] if second else {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace step and moments. Raises UserError for another model's or optimizer's."""
        spec = self._optimizer_spec()
        if spec.name == "sgd" and state.second:
            raise UserError("optimizer state: SGD has no second moment, yet the state holds one (was it AdamW's?)")
        given = (state.first, state.second) if spec.name == "adamw" else (state.first,)
        for tensors in given:
            naming.check(tensors, self._network.trained_shapes, where="optimizer state")
        assert self._shards is not None
        for moment, tensors in zip(optimizer.MOMENTS[spec.name], given, strict=True):
            for name, values in naming.to_module(self._network.trained_held, tensors).items():
                self._shards.write(self._trained[name], torch.tensor(values, dtype=self._wide), moment)
        self._shards.set_step(state.step)
        self._step = state.step

    def _outside(self, read: Callable[[str], Any], names: Sequence[str] | None = None) -> Tensors:
        """Copies of arrays of the trained parameters, under the names that they have outside."""
        order = list(self._network.trained_shapes) if names is None else list(names)
        return naming.to_checkpoint(self._network.trained_held, read, order)

    def save_checkpoint(self, directory: Path) -> Callable[[], None]:
        """Everything that training needs to go on bit for bit, into an empty folder; on disk when this returns."""
        description = self._description()
        assert self._shards is not None
        checkpoint.save(directory, self._deepspeed, self._shards, self._trained, description, step=self._step)
        return lambda: None

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint of any number of processes and ZeRO stage. Raises UserError when it is not this
        model's."""
        description = self._description()
        assert self._shards is not None
        self._step = checkpoint.load(directory, self._shards, self._trained, description)

    def _description(self) -> dict[str, Any]:
        spec, adapter = self._optimizer_spec(), self.spec.adapter
        return {
            "engine": "torch",
            "head": self.spec.head,
            "optimizer": spec.name,
            "has_ema": spec.ema_decay is not None,
            "precision": self.settings.precision,
            "adapter": None if adapter is None else {"rank": adapter.rank, "alpha": adapter.alpha},
            "shapes": {name: list(held.shape) for name, held in self._network.trained_held.items()},
        }

    # -- pieces --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _view(self) -> Iterator[Network]:
        """The weights as a network that DeepSpeed has no hooks in, for gradients that leave no trace in the training
        state. ZeRO-3's parameters are gathered, all of them, for the visit."""
        if self._plain_network is None:
            self._plain_network = empty_network(self.spec, self._dtype, self._device, self.spec.adapter)
        with zero.whole([*self._weights.values(), *self._trained.values()]):
            tensors = detached(self._weights), detached(self._trained)
            with filled(self._plain_network, *tensors, requires_grad=True) as network:
                yield network

    def _optimizer_spec(self) -> OptimizerSpec:
        if self.spec.optimizer is None:
            raise ValueError("this model is frozen: its spec has no optimizer")
        return self.spec.optimizer

    def _require_adapter(self) -> None:
        if self.spec.adapter is None:
            raise ValueError("this model has no adapter: its spec names none")

    def _require_head(self, head: str) -> None:
        if self.spec.head != head:
            raise ValueError(f"this needs a model with head {head!r}, this one has {self.spec.head!r}")
