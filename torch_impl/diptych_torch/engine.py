"""The PyTorch + DeepSpeed engine: transformers models, trained by DeepSpeed (ZeRO 0 to 3), on one process.

`create` starts the process and fixes the precision switches; `TorchModel` is one model behind the protocol
`diptych.engine.Model`. Trained models always run through their DeepSpeed engine, on a CPU too; frozen ones are plain
modules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

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
from diptych_torch import checkpoint, decode, optimizer, zero
from diptych_torch.float64 import let_deepspeed_reduce_float64
from diptych_torch.model import Network, build, check_weights, device_batch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def create(settings: EngineSettings) -> TorchEngine:
    """Start the engine. Raises UserError for settings that it cannot serve."""
    if settings.precision not in DTYPES:
        raise UserError(f"precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}")
    if settings.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"layout.zero.stage must be 0, 1, 2 or 3, got {settings.zero_stage!r}")
    if settings.precision == "float64" and settings.zero_stage > 0:
        raise UserError("precision float64 needs layout.zero.stage 0: DeepSpeed's stages 1 to 3 keep float32 masters")
    # Full float32 products on every device (law 6), and the same bits in every run.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Where an accelerator has no deterministic kernel (cumsum), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    device = zero.start()
    if settings.precision == "float64":
        let_deepspeed_reduce_float64()
    return TorchEngine(settings, device)


class TorchEngine:
    """`diptych.engine.Engine` on one process."""

    name = "torch"

    def __init__(self, settings: EngineSettings, device: torch.device):
        self.settings = settings
        self.device = device

    def model(self, spec: ModelSpec) -> TorchModel:
        """Build a model. Raises UserError for weights or a config that do not fit."""
        return TorchModel(spec, self.settings, self.device)

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
            "attention": "sdpa",
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
        self._network = build(spec.config, spec.weights, spec.head, self._dtype, device)
        self._weights = self._network.named_weights()
        self._plain: Network | None = None  # what `_view` lends out
        self._step = 0
        self._ema: dict[str, Tensor] = {}
        self._deepspeed: Any = None
        if spec.optimizer is None:
            self._network.eval()
            return
        self._network.requires_grad_(True)
        if spec.optimizer.ema_decay is not None:
            self._ema = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._optimizer = optimizer.build(spec.optimizer, self._weights)
        self._deepspeed = zero.initialize(
            self._network,
            self._optimizer,
            spec.optimizer,
            stage=settings.zero_stage,
            micro_batch_size=spec.micro_batch_size,
        )
        if settings.precision == "float64":
            self._deepspeed.communication_data_type = torch.float64

    # -- inference -----------------------------------------------------------------------------------------------

    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Float[np.ndarray, "batch time"]:
        """Log-probability of each token given those before it; also 0 on padding and on a row's first token."""
        self._require_head("lm")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        return self._read(batch, temperature=temperature)

    def scores(self, batch: TokenBatch) -> Float[np.ndarray, "batch time"]:
        """The scalar head at each token."""
        self._require_head("scalar")
        return self._read(batch, temperature=1.0)

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy)."""
        self._require_head("lm")
        with self._view(requires_grad=False) as network:
            return decode.generate(network, prompts, sampling, uniforms, pad_token_id=pad_token_id, device=self._device)

    @torch.no_grad()
    def _read(self, batch: TokenBatch, *, temperature: float) -> Float[np.ndarray, "batch time"]:
        run = self._network if self._deepspeed is None else self._deepspeed
        size = self.spec.micro_batch_size
        rows = [slice(start, start + size) for start in range(0, len(batch), size)]
        outputs = [
            run(self._to_device(batch.take(part)), temperature=temperature, chunk=self.spec.logprob_chunk)[0]
            for part in rows
        ]
        return torch.cat(outputs).cpu().numpy()

    # -- training ------------------------------------------------------------------------------------------------

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """One optimizer step over all rows, in micro-batches. `grad_norm` is the norm before clipping.

        A non-finite gradient shows as a non-finite `grad_norm`; DeepSpeed's stages 1 to 3 then leave the weights alone.
        """
        spec = self._trained()
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
            gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
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
        """The gradient of the step's loss for every tensor, unclipped, by Hugging Face name. Changes nothing."""
        with self._view(requires_grad=True) as network:
            self._accumulate(
                lambda *inputs, last, **settings: network(*inputs, **settings),
                loss,
                batch,
                lambda value: value.backward(),
            )
            return {
                name: np.zeros(weight.shape, self.settings.precision) if weight.grad is None else _copy(weight.grad)
                for name, weight in network.named_weights().items()
            }

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
        totals: Metrics = {}
        for start in range(0, count, size):
            rows = slice(start, start + size)
            outputs, entropy = run(
                self._to_device(batch.tokens.take(rows)),
                temperature=loss.temperature,
                chunk=self.spec.logprob_chunk,
                entropy=loss.entropy,
                last=start + size >= count,
            )
            inputs: dict[str, Any] = {name: self._array(array[rows]) for name, array in batch.arrays.items()}
            if loss.entropy:
                inputs["entropy"] = entropy
            value, metrics = loss(outputs, **inputs, **denominators)
            if metrics.keys() & {"loss", "grad_norm"}:
                raise ValueError("a loss's metrics must not be called loss or grad_norm: those names are the engine's")
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
    def _average(self, spec: OptimizerSpec) -> None:
        """ema = decay ema + (1 - decay) p."""
        if spec.ema_decay is None:
            return
        with zero.whole(self._weights.values()):
            for name, weight in self._weights.items():
                self._ema[name].mul_(spec.ema_decay).add_(weight, alpha=1 - spec.ema_decay)

    # -- weights and state ---------------------------------------------------------------------------------------

    def weights(self) -> Tensors:
        """Copies of all tensors by Hugging Face name."""
        with zero.whole(self._weights.values()):
            return {name: _copy(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace all weights (same names and shapes); the optimizer state and the average stay."""
        check_weights(self._network, weights)
        with zero.whole(self._weights.values(), write=True):
            for name, weight in self._weights.items():
                weight.copy_(torch.tensor(weights[name], dtype=self._dtype, device=self._device))
        if self._zero_optimizer is not None:
            self._zero_optimizer.refresh_fp32_params()  # what the next update starts from

    def ema_weights(self) -> Tensors:
        """The averaged weights (only where `ema_decay` is set)."""
        if not self._ema:
            raise ValueError("this model keeps no average: its optimizer has no ema_decay")
        return {name: _copy(value) for name, value in self._ema.items()}

    def optimizer_state(self) -> OptimizerState:
        """Copies of step and moments by Hugging Face name."""
        spec = self._trained()
        moments = optimizer.read_moments(spec, self._optimizer, self._weights, self._zero_optimizer)
        return OptimizerState(step=self._step, first=moments[0], second=moments[1] if len(moments) > 1 else {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replace step and moments. Raises UserError for another model's or optimizer's."""
        optimizer.write_moments(self._trained(), self._optimizer, self._weights, self._zero_optimizer, state)
        self._step = state.step

    def save_checkpoint(self, directory: Path) -> None:
        """Everything that training needs to go on bit for bit, into an empty folder."""
        checkpoint.save(directory, self._deepspeed, self._description(), step=self._step, ema=self._ema)

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint. Raises UserError when it is not this model's."""
        self._step = checkpoint.load(directory, self._deepspeed, self._description(), ema=self._ema)

    def _description(self) -> dict[str, Any]:
        spec = self._trained()
        return {
            "engine": "torch",
            "head": self.spec.head,
            "optimizer": spec.name,
            "has_ema": spec.ema_decay is not None,
            "precision": self.settings.precision,
            "zero_stage": self.settings.zero_stage,
            "processes": zero.world_size(),
            "shapes": {name: list(getattr(weight, "ds_shape", weight.shape)) for name, weight in self._weights.items()},
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
        parameters are gathered once for the whole visit.
        """
        if self._plain is None:
            self._plain = Network(self.spec.config, self.spec.head, self._dtype, self._device).eval()
        empty = {name: weight.detach() for name, weight in self._plain.named_weights().items()}
        with zero.whole(self._weights.values()):
            self._plain.assign(
                {name: weight.detach() for name, weight in self._weights.items()}, requires_grad=requires_grad
            )
            try:
                yield self._plain
            finally:
                self._plain.assign(empty, requires_grad=False)

    def _to_device(self, batch: TokenBatch) -> Any:
        return device_batch(batch, self._network.shape.vocab_size, self._device)

    def _array(self, array: np.ndarray) -> Tensor:
        """Floats in the engine's precision, integers as int64, booleans as they are."""
        dtype = {"f": self._dtype, "i": torch.int64, "u": torch.int64, "b": torch.bool}[np.asarray(array).dtype.kind]
        return torch.tensor(array, dtype=dtype, device=self._device)

    def _trained(self) -> OptimizerSpec:
        if self.spec.optimizer is None:
            raise ValueError("this model is frozen: its spec has no optimizer")
        return self.spec.optimizer

    def _require_head(self, head: str) -> None:
        if self.spec.head != head:
            raise ValueError(f"this needs a model with head {head!r}, this one has {self.spec.head!r}")


def _copy(tensor: Tensor | nn.Parameter) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()
