"""The operations of the oracle (`diptych.parity.truth.oracle`), one small function each: norms, activations, rotary
positions, attention, experts. NumPy float64.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size, R rotated pairs, X
experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diptych.engine import TokenBatch
from diptych.families.decoder import GELU_SCALES, Activation, DecoderConfig, Norm, alibi_slopes
from diptych.families.rope import Rope, frequencies

_erf = np.frompyfunc(math.erf, 1, 1)


def activate(kind: Activation, x: np.ndarray) -> np.ndarray:
    """The activation of the MLP."""
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "gelu":
        return 0.5 * x * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), np.float64))
    return 0.5 * x * (1.0 + np.tanh(GELU_SCALES[kind] * (x + 0.044715 * x**3)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def normalized(norm: Norm, x: np.ndarray, gain: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """`Norm` over the axes of `gain`, the last ones of `x`."""
    axes = tuple(range(-gain.ndim, 0))
    if norm.kind == "layer":
        x = x - x.mean(axis=axes, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + norm.eps) * (gain + norm.offset)
    return x if bias is None else x + bias


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """Cosines and sines of one rotary embedding at every column [B, T, R]."""

    cos: np.ndarray
    sin: np.ndarray


def rotations(config: DecoderConfig, batch: TokenBatch) -> list[Rotations]:
    """Every rotary embedding of the model at the columns' positions; the frequencies are the hinge's float32 numbers.

    Where they depend on the length of a sequence, each example takes those of its own."""
    return [_rotation(rope, batch) for rope in config.ropes]


def _rotation(rope: Rope, batch: TokenBatch) -> Rotations:
    table = frequencies(rope).astype(np.float64)
    rows = np.zeros(batch.tokens.shape, np.int64)
    if rope.by_length:
        rows = np.asarray(rope.rows(example_lengths(batch))).astype(np.int64)
    angles = batch.positions[..., None] * table[rows]
    return Rotations(cos=np.cos(angles) * rope.attention_factor, sin=np.sin(angles) * rope.attention_factor)


def example_lengths(batch: TokenBatch) -> np.ndarray:
    """Tokens of the example that each column belongs to [B, T]; 0 on padding."""
    segments = batch.segments
    lengths = np.zeros(segments.shape, np.int64)
    for row, numbers in enumerate(segments):
        lengths[row] = np.where(numbers > 0, np.bincount(numbers)[numbers], 0)
    return lengths


def rotate(x: np.ndarray, turned: Rotations) -> np.ndarray:
    """The pairs (i, i + R) of every head turned, [B, T, heads, H]; columns from 2R on stay as they are."""
    cos, sin = turned.cos[:, :, None], turned.sin[:, :, None]
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Reads:
    """mask [B, T, S]: which keys each query reads. distance [B, T, S]: key's position minus the query's."""

    mask: np.ndarray
    distance: np.ndarray


def reads(config: DecoderConfig, batch: TokenBatch, window: int | None) -> Reads:
    """A token reads those of its own example up to itself, of them the last `window` (None: all). Padding reads
    padding, so that every column reads something."""
    del config
    segments, columns = batch.segments, np.arange(batch.tokens.shape[1])
    back = columns[:, None] - columns
    mask = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        mask = mask & (back < window)
    positions = batch.positions.astype(np.float64)
    return Reads(mask=mask, distance=positions[:, None, :] - positions[:, :, None])


def attention(config: DecoderConfig, query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: Reads) -> np.ndarray:
    """softmax(cap(scale q k) + bias) v, one row and head at a time, heads in groups.

    query [B, T, N, H], key and value [B, S, K, H] -> [B, T, N, H]."""
    group = config.num_heads // config.num_kv_heads
    slopes = alibi_slopes(config.num_heads).astype(np.float64)
    mixed = np.empty_like(query)
    for row in range(len(query)):
        for head in range(config.num_heads):
            scores = query[row, :, head] @ key[row, :, head // group].T * config.attention_scale
            if config.attention_softcap is not None:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            if config.alibi:
                scores = scores + slopes[head] * seen.distance[row]
            probabilities = softmax(np.where(seen.mask[row], scores, -np.inf))
            mixed[row, :, head] = probabilities @ value[row, :, head // group]
    return mixed


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the balance loss reads: the router's probabilities and how often each expert was chosen, summed over real
    tokens and layers [X]."""

    probability_sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Routing | None) -> Routing:
        assert other is not None
        return Routing(
            probability_sums=self.probability_sums + other.probability_sums, counts=self.counts + other.counts
        )


def mixture(
    config: DecoderConfig,
    x: np.ndarray,
    router: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    real: np.ndarray,
) -> tuple[np.ndarray, Routing]:
    """sum over the chosen experts e of w_e down_e(act(gate_e x) * up_e x), of router logits [B, T, X]."""
    experts = config.experts
    assert experts is not None
    probabilities = softmax(router)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[..., : experts.top_k]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    if experts.normalized:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = np.zeros_like(x)
    counts = np.zeros(experts.count)
    for expert in range(experts.count):
        rows, columns, choice = np.nonzero(chosen == expert)
        tokens = x[rows, columns]
        made = (activate(config.activation, tokens @ gate[expert]) * (tokens @ up[expert])) @ down[expert]
        mixed[rows, columns] += made * weights[rows, columns, choice][:, None]  # a token chooses an expert once
        counts[expert] = real[rows, columns].sum()
    return mixed, Routing(probability_sums=probabilities[real].sum(axis=0), counts=counts)
