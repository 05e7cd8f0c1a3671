"""What the JAX engine's tests share: tiny hot models, ragged left-padded batches, and a count of compilations.

A gradient takes XLA seconds to compile even for a tiny model, so tests that can share a program do: one loss, one
optimizer, one shape (`sft`, `adamw`, `sft_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from diptych.algorithms.losses import sft_loss
from diptych.engine import EngineSettings, Loss, ModelSpec, OptimizerSpec, TokenBatch, TrainBatch
from diptych.families.family import read_model, tensor_shapes

VOCAB = 64
SFT = Loss(function=sft_loss, reads="logprobs")
ADAMW = OptimizerSpec(name="adamw", beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.9)
SGD = OptimizerSpec(name="sgd", momentum=0.8, weight_decay=0.1, max_grad_norm=None)


def _config(**changes: Any) -> dict[str, Any]:
    """config.json of a model with 2 layers, width 32, 4 query heads over 2 key-value heads."""
    return {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", **changes,
    }  # fmt: skip


def _weights(config: dict[str, Any], head: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Hot weights: matrices of std 0.15, gains spread around 1, so that a wrong operation shows."""
    draws = np.random.default_rng(seed)
    return {
        name: (draws.normal(0, 0.15, shape) if len(shape) > 1 else 1 + draws.normal(0, 0.3, shape)).astype(np.float32)
        for name, shape in tensor_shapes(read_model(config), head).items()  # type: ignore[arg-type]
    }


def _batch(num_rows: int, length: int, *, seed: int = 0, first: int = 1) -> TokenBatch:
    """Ragged left padding: row i starts with i * 3 columns of padding, modulo half the length."""
    draws = np.random.default_rng(seed)
    padding = (3 * np.arange(num_rows)) % (length // 2)
    attention = np.arange(length) >= padding[:, None]
    return TokenBatch(
        tokens=draws.integers(0, VOCAB, (num_rows, length)).astype(np.int32),
        attention=attention,
        positions=np.where(attention, np.arange(length) - padding[:, None], 0).astype(np.int32),
        first=first,
    )


def _model(
    precision: str = "float32",
    *,
    head: str = "lm",
    optimizer: OptimizerSpec | None = None,
    micro_batch_size: int = 4,
    logprob_chunk: int = 1024,
    weights: dict[str, np.ndarray] | None = None,
    **changes: Any,
):
    from diptych_jax.engine import create

    config = _config(**changes)
    spec = ModelSpec(
        config=config, weights=_weights(config, head) if weights is None else weights, head=head, optimizer=optimizer,
        micro_batch_size=micro_batch_size, logprob_chunk=logprob_chunk,
    )  # type: ignore[arg-type]  # fmt: skip
    return create(EngineSettings(precision=precision)).model(spec)  # type: ignore[arg-type]


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    return _config


@pytest.fixture
def hot_weights() -> Callable[..., dict[str, np.ndarray]]:
    return _weights


@pytest.fixture
def ragged_batch() -> Callable[..., TokenBatch]:
    return _batch


def _sft_batch(num_rows: int = 4, length: int = 12, *, seed: int = 0) -> TrainBatch:
    tokens = _batch(num_rows, length, seed=seed, first=3)
    mask = tokens.attention & (np.arange(length) >= 7)
    return TrainBatch(tokens=tokens, arrays={"mask": mask}, denominators={"num_tokens": float(mask.sum())})


@pytest.fixture(autouse=True)
def switches_as_they_were() -> Iterator[None]:
    """A float64 engine switches x64 on for the process; the next test starts without it. These tests compile without
    XLA's expensive passes, in half the time; the parity tests and the demo compile as users do."""
    before = {name: jax.config.read(name) for name in ("jax_enable_x64", "jax_disable_most_optimizations")}
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", False)  # another package's test may have left it on
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def sft() -> Loss:
    return SFT


@pytest.fixture
def adamw() -> OptimizerSpec:
    return ADAMW


@pytest.fixture
def sgd() -> OptimizerSpec:
    return SGD


@pytest.fixture
def sft_batch() -> Callable[..., TrainBatch]:
    return _sft_batch


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return _model


_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: _compilations.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture
def count_compilations() -> Callable[[], Any]:
    """`with count_compilations() as count: ...; count()` is the number of programs that XLA compiled inside."""

    @contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        before = len(_compilations)
        yield lambda: len(_compilations) - before

    return counting
