"""The truth: every family's forward pass in plain NumPy float64, written for reading and independent of both engines.

What a model computes comes from its `DecoderConfig` or `RecurrentConfig`, how a checkpoint's tensors fill it from the
family's rules, and rotary frequencies and ALiBi's slopes from where both engines take them; everything else is written
out here once more. A tap (`diptych.families.taps`) can be looked at and replaced in the middle of the pass. There is no
backward pass: gradients are checked along a direction, by differences of this forward (`diptych.parity.truth.truth`).

Dimensions: B batch, T time, D model width, E embedding width, N query heads, K key-value heads, H head size, V
vocabulary. A linear layer's weight lies as in the decoder's slots: inputs first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.algorithms.losses import router_balance_loss
from diptych.engine import AdapterSpec, Head, Loss, Metrics, TokenBatch, TrainBatch
from diptych.errors import UserError
from diptych.families.adapter import SCORE, merge
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, check_positions, model_slots, tensor_rules, tensor_shapes
from diptych.families.recurrent import RecurrentConfig
from diptych.parity.truth.parts import (
    Reads,
    Rotations,
    Routing,
    activate,
    attention,
    mixture,
    normalized,
    reads,
    rotate,
    rotations,
)

Tap = Callable[[str, np.ndarray], np.ndarray]  # (name, what was computed) -> what the next operations read
Values = dict[str, np.ndarray]  # slot -> its array in float64
CHUNK = 256  # columns whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a forward pass gives. outputs: log-probabilities or scores [B, T] as `Model.logprobs` and `Model.scores`
    define them. entropy: of the distribution that each token was drawn from, nats [B, T]; None with a scalar head."""

    outputs: np.ndarray
    entropy: np.ndarray | None
    routing: Routing | None


def forward(
    config: ModelConfig,
    head: Head,
    weights: Mapping[str, np.ndarray],
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    tap: Tap | None = None,
    adapter: tuple[AdapterSpec, Mapping[str, np.ndarray]] | None = None,
) -> Read:
    """The model of `weights` (by Hugging Face name) on `batch`, in float64.

    adapter: its settings and its A and B by PEFT's names, added to the weights first. Raises UserError for tensors that
    are not the model's and positions that it has no rows for.
    """
    top, layers = slot_values(config, head, weights if adapter is None else with_adapter(config, weights, *adapter))
    try:
        check_positions(config, batch.positions)
    except ValueError as error:
        raise UserError(f"the batch does not fit the model: {error}") from None
    tap = tap or _untouched
    if isinstance(config, RecurrentConfig):
        x, routing = _recurrent(config, top, layers, batch, tap), None
    else:
        x, routing = _decoder(config, top, layers, batch, tap)
    if head == "scalar":
        return Read(outputs=tap("scores", x @ top["score"][0]), entropy=None, routing=routing)
    logprobs, entropy = _logprobs(config, top, x, batch, temperature)
    return Read(outputs=tap("logprobs", logprobs), entropy=entropy, routing=routing)


def evaluate(
    loss: Loss,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    batch: TrainBatch,
    *,
    tap: Tap | None = None,
    adapter: tuple[AdapterSpec, Mapping[str, np.ndarray]] | None = None,
) -> Metrics:
    """`loss` and the loss's metrics over all rows of `batch` at once, as `Model.evaluate` gives them."""
    head: Head = "lm" if loss.reads == "logprobs" else "scalar"
    read = forward(config, head, weights, batch.tokens, temperature=loss.temperature, tap=tap, adapter=adapter)
    inputs: dict[str, Any] = {name: _wide(value) for name, value in batch.arrays.items()}
    inputs |= {name: float(value) for name, value in batch.denominators.items()}
    if loss.entropy:
        inputs["entropy"] = read.entropy
    value, metrics = loss(read.outputs, **inputs)
    metrics = dict(metrics)
    if loss.balance and read.routing is not None:
        assert isinstance(config, DecoderConfig)
        assert config.experts is not None
        num_routed = float(batch.tokens.attention.sum()) * config.num_layers
        balance, more = router_balance_loss(
            read.routing.probability_sums,
            fractions=read.routing.counts / num_routed,
            num_routed=num_routed,
            top_k=config.experts.top_k,
        )
        value, metrics = value + loss.balance * balance, metrics | more
    return {"loss": float(value)} | {name: float(one) for name, one in metrics.items()}


def slot_values(config: ModelConfig, head: Head, weights: Mapping[str, np.ndarray]) -> tuple[Values, list[Values]]:
    """The slots of the whole model and those of each layer, by the family's rules. Raises UserError for tensors that
    are missing, left over or misshapen."""
    wanted = tensor_shapes(config, head)
    different = sorted(wanted.keys() ^ weights.keys())
    different += [name for name, shape in wanted.items() if name in weights and np.shape(weights[name]) != shape]
    if different:
        raise UserError(
            f"not the tensors of this {config.family}: missing, left over or of another shape: "
            f"{', '.join(different[:3])}: use those of the same config.json"
        )
    table = model_slots(config, head)
    top: Values = {}
    layers: list[Values] = [{} for _ in range(config.num_layers)]
    for rule in tensor_rules(config, head):
        for layer in rule.layers(config):
            parts = [rule.split(np.asarray(weights[name], np.float64), table) for name in rule.names(config, layer)]
            held = {slot: np.stack([part[slot] for part in parts]) if rule.per_expert else parts[0][slot]
                    for slot in rule.slots}  # fmt: skip
            (top if layer is None else layers[layer]).update(held)
    return top, layers


def with_adapter(
    config: ModelConfig, weights: Mapping[str, np.ndarray], spec: AdapterSpec, adapter: Mapping[str, np.ndarray]
) -> Values:
    """The weights with an adapter merged in, and the scalar head that is trained beside it."""
    wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    merged = merge(config, spec, wide, {name: np.asarray(value) for name, value in adapter.items() if name != SCORE})
    return merged | ({"score.weight": np.asarray(adapter[SCORE], np.float64)} if SCORE in adapter else {})


def _untouched(name: str, value: np.ndarray) -> np.ndarray:
    del name
    return value


def _wide(value: np.ndarray) -> np.ndarray:
    """Floats in float64; whole numbers and truth values as they are."""
    value = np.asarray(value)
    return value if value.dtype.kind in "biu" else value.astype(np.float64)


def _plus(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x if bias is None else x + bias


def _decoder(
    config: DecoderConfig, top: Values, layers: list[Values], batch: TokenBatch, tap: Tap
) -> tuple[np.ndarray, Routing | None]:
    """Tokens to what the head reads [B, T, E], and how the experts were used."""
    x = top["embedding"][batch.tokens] * config.embedding_scale
    if "project_in" in top:
        x = x @ top["project_in"]
    if config.position_offset is not None:
        x = x + top["positions"][batch.positions + config.position_offset]
    if config.embedding_norm:
        x = normalized(config.norm, x, top["embedding_norm"], top.get("embedding_norm_bias"))
    x = tap("embed", x)
    turned = rotations(config, batch)
    routing: Routing | None = None
    for index, held in enumerate(layers):
        layer = _Layer(
            config=config,
            held=held,
            prefix=f"layers.{index}.",
            tap=tap,
            turned=turned[config.rope_of_layer[index]] if turned else None,
            seen=reads(config, batch, config.windows[index]),
            real=batch.attention,
        )
        x, used = layer(x)
        x = tap(f"layers.{index}.out", x)
        routing = used if routing is None else routing + used
    if config.final_norm:
        x = normalized(config.norm, x, top["final_norm"], top.get("final_norm_bias"))
    if "project_out" in top:
        x = x @ top["project_out"]
    return tap("final", x), routing


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One decoder layer. held: its slots. turned: its rotation. seen: which columns each column reads. real: the
    columns that are no padding."""

    config: DecoderConfig
    held: Values
    prefix: str
    tap: Tap
    turned: Rotations | None
    seen: Reads
    real: np.ndarray

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, Routing | None]:
        """See `diptych.families.decoder` for the five kinds of block."""
        block = self.config.block
        norm_before, norm_after = block in ("pre", "sandwich", "parallel"), block in ("output", "sandwich")
        attended = self._attention(self._norm("attention_norm", x) if norm_before else x)
        if norm_after:
            attended = self._norm("attention_out_norm", attended)
        middle = x if block == "parallel" else x + attended
        if block == "post":
            middle = self._norm("attention_norm", middle)
        inner, routing = self._mlp(self._norm("mlp_norm", middle) if norm_before else middle)
        if norm_after:
            inner = self._norm("mlp_out_norm", inner)
        if block == "parallel":
            return x + attended + inner, routing
        if block == "post":  # what this norm gives is the layer's output
            return self._normed("mlp_norm", middle + inner), routing
        return middle + inner, routing

    def _at(self, name: str, value: np.ndarray) -> np.ndarray:
        return self.tap(self.prefix + name, value)

    def _normed(self, name: str, x: np.ndarray) -> np.ndarray:
        return normalized(self.config.norm, x, self.held[name], self.held.get(f"{name}_bias"))

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._at(name, self._normed(name, x))

    def _attention(self, x: np.ndarray) -> np.ndarray:
        held, config = self.held, self.config
        parts = {}
        for name in ("query", "key", "value"):
            parts[name] = self._at(name, _plus(np.tensordot(x, held[name], 1), held.get(f"{name}_bias")))
        for name in ("query", "key"):
            if config.qk_norm is not None:
                parts[name] = self._at(f"{name}_norm", normalized(config.norm, parts[name], held[f"{name}_norm"], None))
        for name in ("query", "key"):
            if self.turned is not None:
                parts[name] = self._at(f"{name}_rotated", rotate(parts[name], self.turned))
        mixed = self._at("attention", attention(config, parts["query"], parts["key"], parts["value"], self.seen))
        return self._at("output", _plus(np.tensordot(mixed, held["output"], 2), held.get("output_bias")))

    def _mlp(self, x: np.ndarray) -> tuple[np.ndarray, Routing | None]:
        held, config = self.held, self.config
        if config.experts is not None:
            router = self._at("router", x @ held["router"])
            mixed, routing = mixture(config, x, router, held["gate"], held["up"], held["down"], self.real)
            return self._at("down", mixed), routing
        gate = self._at("gate", x @ held["gate"]) if config.gated else None
        up = self._at("up", _plus(x @ held["up"], held.get("up_bias")))
        inner = activate(config.activation, up) if gate is None else activate(config.activation, gate) * up
        inner = self._at("inner", inner)
        return self._at("down", _plus(inner @ held["down"], held.get("down_bias"))), None


def _recurrent(config: RecurrentConfig, top: Values, layers: list[Values], batch: TokenBatch, tap: Tap) -> np.ndarray:
    """h_t = f(W_xh x_t + W_hh h_{t-1} + b_h); the state is zero before an example's first token and on padding."""
    x = tap("embed", top["embedding"][batch.tokens])
    for index, held in enumerate(layers):
        drive = np.where(batch.attention[..., None], x @ held["input"] + held["recurrent_bias"], 0.0)
        drive = tap(f"layers.{index}.input", drive)
        state, states = np.zeros_like(drive[:, 0]), []
        for column in range(drive.shape[1]):
            state = np.where((batch.positions[:, column] == 0)[:, None], 0.0, state)
            state = drive[:, column] + state @ held["recurrent"]
            state = np.tanh(state) if config.nonlinearity == "tanh" else np.maximum(state, 0.0)
            states.append(state)
        x = tap(f"layers.{index}.out", np.stack(states, axis=1))
    return tap("final", x)


def _logprobs(
    config: ModelConfig, top: Values, x: np.ndarray, batch: TokenBatch, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """log p(token | those of its example before it) of logits / temperature, and the entropy of what it was drawn
    from; 0 before `batch.first`, on padding and on an example's first token."""
    table = top.get("head", top["embedding"])
    cap = config.logit_softcap if isinstance(config, DecoderConfig) else None
    logprobs, entropy = np.zeros(batch.tokens.shape), np.zeros(batch.tokens.shape)
    before = np.pad(batch.attention[:, :-1], ((0, 0), (1, 0)))
    wanted = batch.attention & before & (batch.positions != 0) & (np.arange(x.shape[1]) >= batch.first)
    rows, columns = np.nonzero(wanted)
    for start in range(0, len(rows), CHUNK):
        row, column = rows[start : start + CHUNK], columns[start : start + CHUNK]
        logits = _plus(x[row, column - 1] @ table.T, top.get("head_bias"))  # column t - 1 predicts token t
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        logits = logits / temperature
        shifted = logits - logits.max(axis=-1, keepdims=True)
        every = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        logprobs[row, column] = np.take_along_axis(every, batch.tokens[row, column][:, None], axis=-1)[:, 0]
        entropy[row, column] = -(np.exp(every) * every).sum(axis=-1)
    return logprobs, entropy
