"""The PyTorch + DeepSpeed engine: transformers models, trained by DeepSpeed (ZeRO 0 to 3), on one process.

`create` starts the process and fixes the precision switches; `TorchModel` is one model behind the protocol
`diptych.engine.Model`. Trained models always run through their DeepSpeed engine, on a CPU too; frozen ones are plain
modules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diptych.engine import (
    AdapterSpec,
    Completions,
    EngineSettings,
    Loss,
    Metrics,
    ModelSpec,
    OptimizerSpec,
    OptimizerState,
    PromptBatch,
    Role,
    Sampling,
    Tensors,
    TokenBatch,
    TrainBatch,
)
from diptych.errors import UserError
from diptych.families.family import ModelConfig, tensor_shapes
from diptych.weights.huggingface import check_tensors
from diptych.world import SINGLE
from diptych_torch import adapter as adapters
from diptych_torch import checkpoint, decode, optimizer, zero
from diptych_torch import names as naming
from diptych_torch.experts import balance_loss
from diptych_torch.float64 import let_deepspeed_reduce_float64
from diptych_torch.model import Network, build, detached, device_array, device_batch, fill

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def create(settings: EngineSettings) -> TorchEngine:
    """Start the engine. Raises UserError for settings that it cannot serve."""
    if settings.precision not in DTYPES:
        raise UserError(f"precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}")
    if settings.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"layout.zero.stage must be 0, 1, 2 or 3, got {settings.zero_stage!r}")
    if settings.precision == "float64" and settings.zero_stage > 0:
        raise UserError("precision float64 needs layout.zero.stage 0: DeepSpeed's stages 1 to 3 keep float32 masters")
    if settings.distributed:
        raise UserError("--distributed: the torch engine trains in one process; leave it away, or use --engine jax")
    # Full float32 products on every device (law 6), and the same bits in every run.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Where an accelerator has no deterministic kernel (cumsum), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    device = zero.start(settings.device)
    if settings.precision == "float64":
        let_deepspeed_reduce_float64()
    return TorchEngine(settings, device)


class TorchEngine:
    """`diptych.engine.Engine` on one process."""

    name = "torch"
    world = SINGLE

    def __init__(self, settings: EngineSettings, device: torch.device):
        self.settings = settings
        self.device = device

    def model(self, spec: ModelSpec) -> TorchModel:
        """Build a model. Raises UserError for weights or a config that do not fit."""
        return TorchModel(spec, self.settings, self.device)

    def check_model(self, config: ModelConfig, role: Role) -> None:
        """ZeRO partitions any model."""
        del config, role

    def compilations(self) -> int | None:
        """PyTorch runs its operations one by one."""
        return None

    def environment(self) -> dict[str, str]:
        """Versions, devices and precision switches, for the run's record."""
        import deepspeed
        import transformers

        is_gpu = self.device.type == "cuda"
        return {
            "engine": self.name,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name(self.device) if is_gpu else "cpu",
            "processes": str(zero.world_size()),
            "communication": torch.distributed.get_backend(),
            "threads": str(torch.get_num_threads()),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
            "precision": self.settings.precision,
            "zero_stage": str(self.settings.zero_stage),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "tf32": str(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32),
            "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "attention": "sdpa; explicit with a softcap, and in BLOOM",
        }


class TorchModel:
    """`diptych.engine.Model`. Arrays are NumPy on the host, in and out."""

    def __init__(self, spec: ModelSpec, settings: EngineSettings, device: torch.device):
        if spec.micro_batch_size < 1 or spec.logprob_chunk < 1:
            raise UserError("micro_batch_size and logprob_chunk must be at least 1")
        self.spec = spec
        self.settings = settings
        self._device = device
        self._dtype = DTYPES[settings.precision]
        self._network = build(spec, self._dtype, device)
        self._weights = self._network.named_weights()
        self._trained = self._network.trained_weights()
        self._views: dict[AdapterSpec | None, Network] = {}  # what `_view` lends out
        self._step = 0
        self._ema: dict[str, Tensor] = {}
        self._deepspeed: Any = None
        if spec.optimizer is None:
            self._network.eval()
            return
        for weight in self._trained.values():
            weight.requires_grad_(True)
        if spec.optimizer.ema_decay is not None:
            self._ema = {name: weight.detach().clone() for name, weight in self._trained.items()}
        self._optimizer = optimizer.build(spec.optimizer, self._trained)
        stage, size = settings.zero_stage, spec.micro_batch_size
        self._deepspeed = zero.initialize(
            self._network, self._optimizer, spec.optimizer, stage=stage, micro_batch_size=size
        )
        if settings.precision == "float64":
            self._deepspeed.communication_data_type = torch.float64

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
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy)."""
        self._require_head("lm")
        with self._view(requires_grad=False) as network:
            return decode.generate(network, prompts, sampling, uniforms, pad_token_id=pad_token_id, device=self._device)

    def rollout_metrics(self) -> Metrics:
        """Nothing: the rollout reads the training weights themselves."""
        return {}

    @torch.no_grad()
    def _read(self, batch: TokenBatch, **settings: Any) -> np.ndarray:
        run = self._network if self._deepspeed is None else self._deepspeed
        size = self.spec.micro_batch_size
        rows = [slice(start, start + size) for start in range(0, len(batch), size)]
        outputs = [
            run(self._to_device(batch.take(part)), chunk=self.spec.logprob_chunk, **settings)[0] for part in rows
        ]
        return torch.cat(outputs).cpu().numpy()

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
        if self.settings.zero_stage == 0:
            gradients = [weight.grad for weight in self._trained.values() if weight.grad is not None]
            norm = optimizer.global_norm(gradients)
            if spec.max_grad_norm is not None:
                optimizer.clip(gradients, norm, spec.max_grad_norm)
        engine.step()
        self._step += 1
        self._average(spec)
        metrics["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
        return metrics

    @torch.no_grad()
    def evaluate(self, loss: Loss, batch: TrainBatch) -> Metrics:
        """The same numbers as `update` without gradient or step (no `grad_norm`)."""
        runner = self._network if self._deepspeed is None else self._deepspeed
        return self._accumulate(lambda *inputs, last, **settings: runner(*inputs, **settings), loss, batch, None)

    def gradients(self, loss: Loss, batch: TrainBatch) -> Tensors:
        """The gradient of the step's loss for every trained tensor, unclipped. Changes nothing."""
        with self._view(requires_grad=True) as network:
            self._accumulate(
                lambda *inputs, last, **settings: network(*inputs, **settings),
                loss,
                batch,
                lambda value: value.backward(),
            )
            found = network.trained_weights()

            def gradient(name: str) -> np.ndarray | Tensor:
                grad = found[name].grad
                return np.zeros(found[name].shape, self.settings.precision) if grad is None else grad

            return self._outside(gradient)

    def _accumulate(
        self, run: Callable[..., Any], loss: Loss, batch: TrainBatch, backward: Callable[[Tensor], None] | None
    ) -> Metrics:
        """Run the loss over micro-batches, `backward` on each. Sums of the loss and its metrics (`_max`: maxima)."""
        self._require_head("lm" if loss.reads == "logprobs" else "scalar")
        if loss.entropy and loss.reads != "logprobs":
            raise ValueError("a loss that reads scores has no entropy")
        size, count = self.spec.micro_batch_size, len(batch.tokens)
        if not count or (count > size and count % size):
            raise ValueError(f"{count} rows cannot be cut into micro-batches of {size}")
        for name, array in batch.arrays.items():
            if len(array) != count:
                raise ValueError(f"array {name!r} has {len(array)} rows, the tokens have {count}")
        denominators = {name: float(value) for name, value in batch.denominators.items()}
        pieces = [slice(start, start + size) for start in range(0, count, size)]
        is_balanced = loss.balance > 0 and self._network.num_experts > 0
        choices = self._choices(run, batch.tokens, pieces) if is_balanced and len(pieces) > 1 else None
        totals: Metrics = {}
        for rows in pieces:
            outputs, entropy, routing = run(
                self._to_device(batch.tokens.take(rows)),
                temperature=loss.temperature,
                chunk=self.spec.logprob_chunk,
                entropy=loss.entropy,
                routing=is_balanced,
                last=rows is pieces[-1],
            )
            inputs: dict[str, Any] = {
                name: device_array(array[rows], self._dtype, self._device) for name, array in batch.arrays.items()
            }
            if loss.entropy:
                inputs["entropy"] = entropy
            value, metrics = loss(outputs, **inputs, **denominators)
            if metrics.keys() & {"loss", "grad_norm"}:
                raise ValueError("a loss's metrics must not be called loss or grad_norm: those names are the engine's")
            if is_balanced:
                num_tokens = int(batch.tokens.attention.sum())
                balance, about_routers = balance_loss(routing, choices, self._network.config, num_tokens)
                value, metrics = value + loss.balance * balance, {**metrics, **about_routers}
            if backward is not None:
                backward(value)
            for name, number in {"loss": value, **metrics}.items():
                number = float(number.detach() if isinstance(number, Tensor) else number)
                if name not in totals:
                    totals[name] = number
                elif name.endswith("_max"):
                    totals[name] = max(totals[name], number)
                else:
                    totals[name] += number
        return totals

    @torch.no_grad()
    def _choices(self, run: Callable[..., Any], tokens: TokenBatch, pieces: list[slice]) -> Tensor:
        """How many times each expert is chosen in the whole step [experts]: a pass over all micro-batches, because the
        balance loss of each depends on the choices in all of them."""
        counts = [
            run(self._to_device(tokens.take(rows)), routing=True, only_routing=True, last=False)[2][1]
            for rows in pieces
        ]
        return torch.stack(counts).sum(dim=0)

    @torch.no_grad()
    def _average(self, spec: OptimizerSpec) -> None:
        """ema = decay ema + (1 - decay) p."""
        if spec.ema_decay is None:
            return
        with zero.whole(self._trained.values()):
            for name, weight in self._trained.items():
                self._ema[name].mul_(spec.ema_decay).add_(weight, alpha=1 - spec.ema_decay)

    # -- weights and state ---------------------------------------------------------------------------------------

    def weights(self, names: Sequence[str] | None = None) -> Tensors:
        """Copies of all tensors (or of `names`) by Hugging Face name, those of an adapted layer without its adapter."""
        held = self._network.held
        order = list(tensor_shapes(self._network.config, self.spec.head)) if names is None else list(names)
        with zero.whole([self._weights[name] for name in naming.holding(held, frozenset(order))]):
            return naming.to_checkpoint(held, self._weights.__getitem__, order)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace all weights (same names and shapes); adapter, optimizer state and average stay."""
        check_tensors(weights, self._network.config, self.spec.head, where="weights")
        with zero.whole(self._weights.values(), write=True):
            for name, parameter in self._network.held.items():
                for one, view in parameter.split(self._weights[name]).items():
                    fill(view, weights[one], one)
        self._refresh_masters()

    def adapter_weights(self) -> Tensors:
        """Copies of the adapter's tensors, and of a scalar head trained beside it, by PEFT's names."""
        self._require_adapter()
        with zero.whole(self._trained.values()):
            return self._outside(self._trained.__getitem__)

    @torch.no_grad()
    def load_adapter(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace them; the weights below, optimizer state and average stay."""
        self._require_adapter()
        naming.check(weights, self._network.trained_shapes, where="adapter")
        with zero.whole(self._trained.values(), write=True):
            for name, parameter in self._trained.items():
                fill(parameter, weights[name], name)
        self._refresh_masters()

    def _refresh_masters(self) -> None:
        """Let the next update start from what was written."""
        if self._zero_optimizer is not None:
            self._zero_optimizer.refresh_fp32_params()

    def ema_weights(self) -> Tensors:
        """The averaged trained weights (only where `ema_decay` is set)."""
        if not self._ema:
            raise ValueError("this model keeps no average: its optimizer has no ema_decay")
        return self._outside(self._ema.__getitem__)

    def optimizer_state(self) -> OptimizerState:
        """Copies of step and moments by the trained tensors' names."""
        spec = self._optimizer_spec()
        moments = optimizer.read_moments(spec, self._optimizer, self._trained, self._zero_optimizer)
        tensors = [self._outside(moment.__getitem__) for moment in moments]
        return OptimizerState(step=self._step, first=tensors[0], second=tensors[1] if len(tensors) > 1 else {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace step and moments. Raises UserError for another model's or optimizer's."""
        spec = self._optimizer_spec()
        if spec.name == "sgd" and state.second:
            raise UserError("optimizer state: SGD has no second moment, yet the state holds one (was it AdamW's?)")
        given = (state.first, state.second) if spec.name == "adamw" else (state.first,)
        for tensors in given:
            naming.check(tensors, self._network.trained_shapes, where="optimizer state")
        moments = [naming.to_module(self._network.trained_held, tensors) for tensors in given]
        held = OptimizerState(step=state.step, first=moments[0], second=moments[1] if len(moments) > 1 else {})
        optimizer.write_moments(spec, self._optimizer, self._trained, self._zero_optimizer, held)
        self._step = state.step

    def _outside(self, read: Callable[[str], Any]) -> Tensors:
        """Copies of arrays of the trained parameters, under the names that they have outside."""
        return naming.to_checkpoint(self._network.trained_held, read, list(self._network.trained_shapes))

    def save_checkpoint(self, directory: Path) -> Callable[[], None]:
        """Everything that training needs to go on bit for bit, into an empty folder; on disk when this returns."""
        checkpoint.save(directory, self._deepspeed, self._description(), step=self._step, ema=self._ema)
        return lambda: None

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint. Raises UserError when it is not this model's."""
        self._step = checkpoint.load(directory, self._deepspeed, self._description(), ema=self._ema)

    def _description(self) -> dict[str, Any]:
        spec, adapter = self._optimizer_spec(), self.spec.adapter
        return {
            "engine": "torch",
            "head": self.spec.head,
            "optimizer": spec.name,
            "has_ema": spec.ema_decay is not None,
            "precision": self.settings.precision,
            "zero_stage": self.settings.zero_stage,
            "processes": zero.world_size(),
            "adapter": None if adapter is None else {"rank": adapter.rank, "alpha": adapter.alpha},
            "shapes": {name: list(held.shape) for name, held in self._network.trained_held.items()},
        }

    # -- pieces --------------------------------------------------------------------------------------------------

    @property
    def _zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer; None at stage 0 and in frozen models."""
        return self._deepspeed.optimizer if self._deepspeed is not None and self.settings.zero_stage > 0 else None

    @contextlib.contextmanager
    def _view(self, *, requires_grad: bool) -> Iterator[Network]:
        """The same weights, without a copy, in a network that DeepSpeed has no hooks in.

        Decoding and `gradients` run on it: whatever they do, they leave no trace in the training state. ZeRO-3's
        parameters are gathered once for the whole visit. Where nothing needs gradients, an adapter is merged, into
        copies of the weights that it changes.
        """
        spec = self.spec.adapter if requires_grad else None
        if spec not in self._views:
            self._views[spec] = Network(self.spec.config, self.spec.head, self._dtype, self._device, spec).eval()
        network = self._views[spec]
        empty, nothing = detached(network.named_weights()), detached(network.trained_weights())
        with zero.whole([*self._weights.values(), *self._trained.values()]):
            weights, adapter = detached(self._weights), detached(self._trained)
            if self.spec.adapter is not None and spec is None:
                weights = adapters.merge(network.config, self.spec.adapter, weights, adapter)
            network.assign(weights, adapter, requires_grad=requires_grad)
            try:
                yield network
            finally:
                network.assign(empty, nothing, requires_grad=False)

    def _to_device(self, batch: TokenBatch) -> Any:
        return device_batch(batch, self._network.config, self._device)

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
