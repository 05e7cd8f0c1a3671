"""Small hot models and ragged batches for the torch engine's tests.

Hot: weights of standard deviation 0.15 and norm gains away from 1. On init-like weights a third of seeded bugs hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diptych.engine import AdapterSpec, EngineSettings, ModelSpec, OptimizerSpec, TokenBatch, load_engine
from diptych.families.family import read_model, tensor_shapes
from diptych.layout import Layout, Zero

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., dict[str, Any]]:
    return lambda **changes: {**CONFIG, **changes}


@pytest.fixture(scope="session")
def hot_weights() -> Callable[..., dict[str, np.ndarray]]:
    def make(config: dict[str, Any], head: Any = "lm", seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            name: rng.uniform(0.5, 1.5, shape) if name.endswith("norm.weight") else rng.normal(0, 0.15, shape)
            for name, shape in tensor_shapes(read_model(config), head).items()
        }

    return make


@pytest.fixture(scope="session")
def make_model(hot_weights: Any) -> Callable[..., Any]:
    """A model of the engine. Defaults: float32, stage 0, the CONFIG above, hot weights, no optimizer."""

    def make(
        *,
        config: dict[str, Any] = CONFIG,
        head: Any = "lm",
        optimizer: OptimizerSpec | None = None,
        precision: Any = "float32",
        stage: int = 0,
        micro_batch_size: int = 2,
        logprob_chunk: int = 7,
        weights: dict[str, np.ndarray] | None = None,
        adapter: AdapterSpec | None = None,
        adapter_weights: dict[str, np.ndarray] | None = None,
    ) -> Any:
        return load_engine("torch", EngineSettings(precision=precision, layout=Layout(zero=Zero(stage=stage)))).model(
            ModelSpec(
                config=config,
                weights=hot_weights(config, head) if weights is None else weights,
                head=head,
                optimizer=optimizer,
                micro_batch_size=micro_batch_size,
                logprob_chunk=logprob_chunk,
                adapter=adapter,
                adapter_weights=adapter_weights or {},
            )
        )

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., TokenBatch]:
    def make(
        *, rows: int = 4, length: int = 11, offset: int = 0, first: int = 1, vocab: int = 64, seed: int = 1
    ) -> TokenBatch:
        """Ragged on the left (row 0 most) and on the right (row 1). offset: added to the positions of row 2."""
        rng = np.random.default_rng(seed)
        attention = np.ones((rows, length), bool)
        attention[0, : length // 2] = False
        attention[1, :2] = False
        attention[1, -3:] = False
        positions = np.maximum(attention.cumsum(axis=1) - 1, 0) * attention
        positions[2] += offset
        return TokenBatch(
            tokens=rng.integers(0, vocab, (rows, length)).astype(np.int32),
            attention=attention,
            positions=positions.astype(np.int32),
            first=first,
        )

    return make


@pytest.fixture(scope="session")
def wanted() -> Callable[[TokenBatch], np.ndarray]:
    """The columns whose log-probability means something: a real token after a real token, from `first` on."""

    def mask(batch: TokenBatch) -> np.ndarray:
        wanted = np.zeros(batch.attention.shape, bool)
        wanted[:, 1:] = batch.attention[:, 1:] & batch.attention[:, :-1]
        wanted[:, : batch.first] = False
        return wanted

    return mask
