"""The protocol that both engines implement, and the data that crosses it.

An engine turns tokens into per-token numbers and gradients; the hinge decides what the numbers mean (law 2). All that
crosses this line is NumPy on the host. Columns are *token-aligned*: `logprobs[b, t]` is log p(tokens[b, t] | tokens
before t), so column 0 is 0; `scores[b, t]` is the scalar head after the model has read tokens[b, 0..t].
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from diptych.errors import UserError
from diptych.layout import Layout
from diptych.world import World

if TYPE_CHECKING:  # families import this file
    from diptych.families.family import ModelConfig

Array = Any  # whatever the array API standard calls an array: NumPy, JAX (traced too) or torch
Tensors = dict[str, np.ndarray]  # Hugging Face tensor name -> value
Metrics = dict[str, float]
Precision = Literal["float32", "float64", "bfloat16"]
Head = Literal["lm", "scalar"]
Remat = Literal["full", "dots", "none"]
Role = Literal["policy", "critic", "reference", "reward"]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of tokens as the data layer made them. Masks and positions are given, never guessed from token ids.

    tokens: int32 [batch, time]. attention: True on real tokens. positions: int32, the index of each real token within
    its example, 0 on padding. first: the first column whose log-probability is wanted (static); engines return 0 before
    it and need not compute it.

    A row may hold several examples, one after another (packing): each begins where a position is 0, and no token reads
    another example's. A row may be padding alone; what comes out of it is finite.
    """

    tokens: Int[np.ndarray, "batch time"]
    attention: Bool[np.ndarray, "batch time"]
    positions: Int[np.ndarray, "batch time"]
    first: int = 1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def segments(self) -> Int[np.ndarray, "batch time"]:
        """int32: equal numbers, above 0, on the tokens of one example; 0 on padding."""
        begins = self.attention & (self.positions == 0)
        return np.where(self.attention, 1 + np.cumsum(begins, axis=1), 0).astype(np.int32)

    def take(self, rows: slice | np.ndarray) -> TokenBatch:
        """The same batch with only `rows`."""
        return TokenBatch(
            tokens=self.tokens[rows], attention=self.attention[rows], positions=self.positions[rows], first=self.first
        )


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """A token batch and the loss's own arrays.

    arrays: name -> [batch, time] or [batch], cut along with the rows into micro-batches. denominators: name -> float,
    global over the whole optimizer step (law 4), the same for every micro-batch. A row whose arrays are all zero adds
    nothing to loss, metrics or gradient: data layer and engines fill up batches with such rows.
    """

    tokens: TokenBatch
    arrays: Mapping[str, np.ndarray]
    denominators: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A pure loss function and its settings; hashable, so that an engine compiles it once.

    The engine calls `function(outputs, **arrays, **denominators, **options)` for every micro-batch, where `outputs` is
    `logprobs` [batch, time] (reads="logprobs"; computed at `temperature`) or `scores` [batch, time] (reads="scores").
    It returns `(loss, metrics)`, both already divided by global denominators: their sums over micro-batches are the
    values of the step (a metric whose name ends in `_max` is combined by maximum instead). A function that reads
    logprobs also receives `entropy` [batch, time] (no gradient) when `entropy` is True. group: neighbouring rows that
    the function compares with each other (pairs: 2) and must see in one call; micro-batches are made of whole groups.
    """

    function: Callable[..., tuple[Array, dict[str, Array]]]
    reads: Literal["logprobs", "scores"]
    options: tuple[tuple[str, float | str | bool], ...] = ()
    temperature: float = 1.0
    entropy: bool = False
    balance: float = 0.0
    group: int = 1

    def __call__(self, outputs: Array, **inputs: Array) -> tuple[Array, dict[str, Array]]:
        return self.function(outputs, **inputs, **dict(self.options))


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Left-padded prompts. tokens: int32 [batch, prompt]. attention, positions: as in TokenBatch."""

    tokens: Int[np.ndarray, "batch prompt"]
    attention: Bool[np.ndarray, "batch prompt"]
    positions: Int[np.ndarray, "batch prompt"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 switch truncation off.

    stop_token_ids end a row; the stop token itself belongs to the response. decode_rows: rows that are decoded at once,
    None for all; the others wait. It changes no number.
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    decode_rows: int | None = None

    @property
    def scoring_temperature(self) -> float:
        """The temperature of the log-probabilities that go with these draws: greedy rows are scored at 1."""
        return self.temperature if self.temperature > 0 else 1.0


class Finish(enum.IntEnum):
    """Why a row ended."""

    LENGTH = 0
    STOP = 1


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What a sampler returns; all [batch, new], new = max_new_tokens, right-padded with `mask` False.

    tokens: int32. mask: True on generated tokens, the stop token included. logprobs: of each drawn token under the
    tempered, untruncated distribution (what `Model.logprobs` computes for the same tokens). margins: distance from the
    uniform to the nearer edge of the drawn token's interval of the cumulative distribution (greedy: half the gap of
    the two largest probabilities); a token whose margin is below numerical noise is a near-tie. finish: [batch].
    """

    tokens: Int[np.ndarray, "batch new"]
    mask: Bool[np.ndarray, "batch new"]
    logprobs: Float[np.ndarray, "batch new"]
    margins: Float[np.ndarray, "batch new"]
    finish: Int[np.ndarray, " batch"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer with nothing left to a framework's default (law 6). The learning rate comes with every update.

    AdamW: m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + wd p)
    (Loshchilov and Hutter 2019; eps outside the root and after bias correction, the form of Kingma and Ba's
    Algorithm 1). SGD: m = momentum m + g; p -= lr (m + wd p). Weight decay touches only tensors of two or more
    dimensions. Before either, gradients are scaled by max_grad_norm / (norm + 1e-6) where that is below 1.
    ema_decay: when set, a float32 (float64 in float64) average is kept: ema = decay ema + (1 - decay) p each step.
    """

    name: Literal["adamw", "sgd"]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Low-rank adapters (Hu et al. 2022): W + alpha / rank B A on the linear layers that `targets` name.

    targets: ends of module names (`q_proj`, `mlp.up_proj`), or `all-linear` for every linear layer of the trunk. Each
    must match something. There is no dropout.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to be built on an accelerator.

    config: the contents of a Hugging Face config.json. weights: every tensor of the model under its Hugging Face name,
    the scalar head `score.weight` [1, hidden] included where head="scalar" (checked by `diptych.weights`). optimizer:
    None for a frozen model. micro_batch_size: rows that go through the model at once, in updates and in scoring.
    logprob_chunk: tokens whose vocabulary-wide logits exist at once. adapter: then only the adapter and a scalar head
    are trained, and adapter_weights holds A and B under PEFT's names (`diptych.families.adapter`). role: what the model
    is for; an engine may lay out each role its own way (`Layout`).
    """

    config: Mapping[str, Any]
    weights: Mapping[str, np.ndarray] = field(repr=False)
    head: Head
    optimizer: OptimizerSpec | None
    micro_batch_size: int
    role: Role = "policy"
    logprob_chunk: int = 1024
    adapter: AdapterSpec | None = None
    adapter_weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Optimizer state in canonical names. step: updates made. first, second: moments by Hugging Face tensor name.

    For SGD `first` is the momentum buffer and `second` is empty.
    """

    step: int
    first: Tensors
    second: Tensors


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Values inside a forward pass and the gradients of the loss by them, by the names of `diptych.families.taps`.

    Columns that hold padding hold numbers without meaning.
    """

    values: Tensors
    gradients: Tensors


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A model looked into: what a step's loss, metrics and gradients are (as `Model.evaluate` and `Model.gradients`
    give them), and what its taps computed."""

    metrics: Metrics
    gradients: Tensors
    taps: Taps


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine needs to know before its first model.

    device: "cpu" keeps the engine off every accelerator; "auto" takes the best that is there. remat: which activations
    the backward pass makes again: all ("full"), all but the results of matrix products ("dots"), or none. layout:
    meshes (JAX), ZeRO (torch), the switch to the decode copy, and who waits in host memory. attention: which
    implementation the JAX engine runs. distributed: this is one of several processes that were started together
    (`diptych run --distributed`). rollout: what generates: "auto", "native", "deepspeed", or the target of a server,
    which the hinge calls. deepspeed: further settings of DeepSpeed's configuration, read by the torch engine only.
    """

    precision: Precision
    device: Literal["auto", "cpu"] = "auto"
    remat: Remat = "full"
    layout: Layout = field(default_factory=Layout)
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    distributed: bool = False
    rollout: str = "auto"
    deepspeed: Mapping[str, Any] = field(default_factory=dict, hash=False)


@runtime_checkable
class Model(Protocol):
    """One model on the accelerator. Every array that goes in or comes out is NumPy; floats are float32 or float64."""

    spec: ModelSpec

    def logprobs(
        self, batch: TokenBatch, *, temperature: float, adapter: bool = True
    ) -> Float[np.ndarray, "batch time"]:
        """Log-probability of each token given those of its example before it, of logits / temperature; 0 before
        `batch.first`, on padding and on an example's first token.

        adapter False: of the model below its adapter (the reference of a policy that trains one)."""
        ...

    def scores(self, batch: TokenBatch) -> Float[np.ndarray, "batch time"]:
        """The scalar head at each token."""
        ...

    def greedy_matches(self, batch: TokenBatch) -> Bool[np.ndarray, "batch time"]:
        """True where a token is the most likely one given those before it (the first of several with the largest
        logit); False where `logprobs` is 0 by definition.
        Language models only."""
        ...

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """One optimizer step over all rows of `batch`, in micro-batches. Returns `loss`, the loss's metrics summed over
        micro-batches, and `grad_norm` (before clipping)."""
        ...

    def evaluate(self, loss: Loss, batch: TrainBatch) -> Metrics:
        """The same numbers as `update` without gradient or step (no `grad_norm`)."""
        ...

    def gradients(self, loss: Loss, batch: TrainBatch) -> Tensors:
        """The gradient of the step's loss for every tensor, unclipped, by Hugging Face name. Changes nothing."""
        ...

    def probe(
        self, loss: Loss, batch: TrainBatch, *, depth: Literal["layers", "ops"], forced: Taps | None = None
    ) -> Probed:
        """Look inside one forward and backward pass over all rows of `batch` at once. Changes nothing.

        forced: values and gradients of all taps or some (another engine's), taken on real columns only. What reads a
        tap reads the forced value, and what hands a gradient down through it hands down the forced one, while the taps
        that come back are those that were computed here. So each is the doing of the operations between it and its
        neighbours alone. In one process, on one device; UserError elsewhere.
        """
        ...

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, uniforms: Float[np.ndarray, "batch new"], *, pad_token_id: int
    ) -> Completions:
        """Sample completions by inverse CDF on the given uniforms (ignored when greedy)."""
        ...

    def rollout_metrics(self) -> Metrics:
        """What the newest rollout cost beside decoding (`timing_s/switch`, ...), for the log; empty where there is
        nothing to say."""
        ...

    def weights(self, names: Sequence[str] | None = None) -> Tensors:
        """Copies of the tensors with these Hugging Face names, in this order (None: of all); what is not asked for is
        not brought to the host."""
        ...

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace all weights (same names and shapes); the optimizer state stays."""
        ...

    def adapter_weights(self) -> Tensors:
        """Copies of the adapter's A and B, and of a scalar head trained beside it, by PEFT's names."""
        ...

    def load_adapter(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace them; the model below, the optimizer state and the average stay."""
        ...

    def ema_weights(self, names: Sequence[str] | None = None) -> Tensors:
        """The averaged trained weights, as `weights` gives the weights (only where `ema_decay` is set)."""
        ...

    def optimizer_state(self) -> OptimizerState: ...

    def load_optimizer_state(self, state: OptimizerState) -> None: ...

    def save_checkpoint(self, directory: Path) -> Callable[[], None]:
        """Everything that training needs to go on bit for bit, in the engine's native format, into an empty folder.

        Training may go on at once. Call the result to wait until everything is on disk: only then is it a checkpoint.
        """
        ...

    def load_checkpoint(self, directory: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that each process may fill, the least over all processes. device: on its accelerator; None on a CPU, whose
    models lie in host memory. host: its share of the host's free memory; None: not known."""

    device: int | None
    host: int | None


@runtime_checkable
class Instruments(Protocol):
    """What an engine can measure of itself and its machine (`diptych bench`)."""

    def ceilings(self) -> dict[str, float]:
        """What one device reaches at best through this framework, measured now: `flops`, FLOP/s of a large product in
        the engine's precision; `copy_bytes`, bytes/s of a large copy, read and written counted."""
        ...

    def peak_bytes(self) -> int | None:
        """Most bytes that the accelerator held so far; None on a CPU."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[dict[str, Any]]:
        """Trace what runs inside into `folder`. The mapping that it gives holds at exit `operations`: rows of name,
        seconds and calls, the dearest first, and `files`: what was written."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Everything that touches an accelerator."""

    name: str
    settings: EngineSettings
    world: World

    def check_model(self, config: ModelConfig, role: Role) -> None:
        """UserError where a model of this role cannot be laid out on the devices as the settings ask; allocates
        nothing."""
        ...

    def model(self, spec: ModelSpec) -> Model: ...

    def memory(self) -> Memory | None:
        """What each process may fill before its first model; None where `diptych plan` is what counts (JAX).
        Collective."""
        ...

    def compilations(self) -> int | None:
        """Programs compiled in this process so far; None where the engine does not compile."""
        ...

    def environment(self) -> dict[str, str]:
        """Versions, devices and precision switches, for the run's record."""
        ...

    def instruments(self) -> Instruments: ...


MASTERS: Mapping[Precision, Precision] = {"float32": "float32", "float64": "float64", "bfloat16": "float32"}
"""The precision of what is trained, by the precision that is asked for."""

ENGINES: Mapping[str, tuple[str, Sequence[str]]] = {
    "jax": ("diptych_jax.engine", ("jax", "flax", "optax", "orbax.checkpoint")),
    "torch": ("diptych_torch.engine", ("torch", "deepspeed", "transformers")),
}


def load_engine(name: str, settings: EngineSettings) -> Engine:
    """Import the engine `name` and start it.

    Raises UserError when it is unknown or its framework is not installed.
    """
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")
    module_name, _ = ENGINES[name]
    missing = missing_packages(name)
    if missing:
        raise UserError(
            f"engine {name!r} is not installed ({', '.join(missing)} missing): pip install 'diptych[{name}]'"
        )
    module = importlib.import_module(module_name)
    return module.create(settings)


def missing_packages(name: str) -> list[str]:
    """What the engine `name` needs and is not installed."""
    return [package for package in ENGINES[name][1] if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is absent
        return False
