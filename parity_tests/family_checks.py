"""What every family is checked for, and how far apart two sides are. Tests and canaries use the same functions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import numpy as np
import torch

from diptych.data.batches import join
from diptych.engine import (
    AdapterSpec,
    Completions,
    Engine,
    EngineSettings,
    Head,
    Model,
    ModelSpec,
    Precision,
    PromptBatch,
    Sampling,
    Tensors,
    TokenBatch,
    load_engine,
)  # fmt: skip
from diptych.parity.compare import Difference, max_abs, tensors
from parity_tests.families import CASES, hot_weights, loss_of, targets, token_batch, train_batch, widened
from parity_tests.plain_models import Plain, plain_model, read

ENGINES = ("jax", "torch")
EVERYTHING = -1.0  # a limit that no error is within: the comparison then tells every error


def largest(differences: Collection[Difference]) -> float:
    """The largest error among differences."""
    return max((one.value for one in differences), default=0.0)


def output_error(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """Largest absolute difference over `mask`; inf for other shapes, numbers that are not finite, or an empty mask."""
    return largest(max_abs("outputs", found, expected, limit=EVERYTHING, mask=mask))


def gradient_error(found: Tensors, expected: Tensors, *, vanishing: Collection[str] = ()) -> float:
    """Largest relative L2 of all leaves; inf where one side lacks a leaf.

    vanishing: leaves that are 0 but for rounding; they are measured against the norm of all gradients together.
    """
    whole = np.sqrt(sum(float(np.linalg.norm(value.astype(np.float64))) ** 2 for value in expected.values()))
    rest = tuple({name: value for name, value in side.items() if name not in vanishing} for side in (expected, found))
    error = largest(tensors("gradient", *rest, limit=EVERYTHING))
    for name in vanishing:
        for side in (found, expected):
            error = max(error, float(np.linalg.norm(side[name])) / whole if name in side else np.inf)
    return error


def bytes_differ(found: Tensors, expected: Tensors) -> int:
    """How many tensors are not the same bytes, in the same order under the same names."""
    if list(found) != list(expected):
        return max(len(found), len(expected))
    same = [
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in _pairs(found, expected)
    ]
    return same.count(False)


def _pairs(a: Tensors, b: Tensors) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((a[name], b[name]) for name in a)


def tokens_differ(a: Completions, b: Completions) -> int:
    """How many columns differ between two rollouts."""
    return int(((a.tokens != b.tokens) | (a.mask != b.mask)).sum()) + int((a.finish != b.finish).sum())


def cache_error(
    model: Model, prompts: PromptBatch, done: Completions, sampling: Sampling, *, wide: bool = False
) -> float:
    """The log-probabilities of a rollout with a cache against those of the full forward over the joined rows.

    wide: pad the rows to the shape that the other checks have compiled.
    """
    whole = join(prompts, done)
    whole = widened(whole) if wide else whole
    full = model.logprobs(whole, temperature=sampling.scoring_temperature)[:, -sampling.max_new_tokens :]
    return output_error(done.logprobs, full, done.mask)


@contextmanager
def quick_compilation(quick: bool = True) -> Iterator[None]:
    """XLA without its expensive passes: half the time to compile, the same mathematics."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@cache
def engine(name: str, precision: Precision) -> Engine:
    return load_engine(name, EngineSettings(precision=precision, device="cpu"))


def build(
    engine_name: str, config: Mapping[str, Any], weights: Tensors, head: Head = "lm", *, rows: int = 2,
    adapter: AdapterSpec | None = None, adapter_weights: Tensors | None = None,
) -> Model:  # fmt: skip
    """A model of an engine in the precision of its weights, two rows at a time."""
    precision: Any = next(iter(weights.values())).dtype.name
    return engine(engine_name, precision).model(
        ModelSpec(
            config=config, weights=weights, head=head, optimizer=None, micro_batch_size=rows, adapter=adapter,
            adapter_weights=adapter_weights or {},
        )
    )  # fmt: skip


def outputs(model: Model, batch: TokenBatch) -> np.ndarray:
    """What the model's head gives."""
    return model.logprobs(batch, temperature=1.0) if model.spec.head == "lm" else model.scores(batch)


def wanted(batch: TokenBatch, head: Head) -> np.ndarray:
    return targets(batch) if head == "lm" else batch.attention


@dataclass
class Subject:
    """One case: its models and what the oracle says of them, each made once."""

    name: str
    batch: TokenBatch = field(default_factory=token_batch)
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return CASES[self.name]

    def weights(self, head: Head, precision: Precision) -> Tensors:
        return self._once(("weights", head, precision), lambda: hot_weights(self.config, head, precision))

    def model(self, engine_name: str, head: Head = "lm", precision: Precision = "float64") -> Model:
        return self._once(
            (engine_name, head, precision), lambda: build(engine_name, self.config, self.weights(head, precision), head)
        )

    def plain(self, head: Head, precision: Precision = "float64") -> Plain:
        return plain_model(self.config, self.weights(head, precision), head)

    def oracle(self, head: Head, precision: Precision) -> tuple[np.ndarray, Tensors]:
        """Outputs [rows, columns] of the plain model, and the gradients of `weighted_sum`."""
        return self._once(
            ("oracle", head, precision), lambda: outputs_and_gradients(self.plain(head, precision), self.batch)
        )

    def release(self) -> None:
        """Let models and compiled programs go."""
        self._made.clear()
        jax.clear_caches()

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def outputs_and_gradients(plain: Plain, batch: TokenBatch, *, balance: float = 0.0) -> tuple[np.ndarray, Tensors]:
    """An oracle's outputs, and its gradients of `weighted_sum` (and of the balance loss)."""
    values = read(plain, batch)
    data = train_batch(batch, plain.head)
    factors = torch.tensor(data.arrays["factors"]).to(values.dtype)
    loss, _ = loss_of(plain.head)(values, factors=factors, num=data.denominators["num"])
    if balance:
        loss = loss + balance * plain.balance_loss(batch)  # pyright: ignore[reportAttributeAccessIssue]
    loss.backward()
    return values.detach().numpy(), plain.gradients()
