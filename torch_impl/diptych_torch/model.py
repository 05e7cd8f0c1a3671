"""A transformers model as a function from tokens to hidden states, log-probabilities or scores.

The modules and the names of their parameters are transformers'. Everything that transformers would decide by itself is
decided here and handed over: the attention masks, the positions, the rotary angles, the cache, the chunks of the
vocabulary. Training, scoring and decoding call the very same trunk.

Dimensions: B batch, T time, S columns (T and whatever a cache holds), D model width, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from diptych.engine import AdapterSpec, Head, ModelSpec, TokenBatch
from diptych.errors import UserError
from diptych.families.adapter import SCORE, adapter_shapes, check_adapter
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, check_positions, read_model, tensor_shapes
from diptych.weights.huggingface import check_tensors
from diptych_torch import adapter as adapters
from diptych_torch import names
from diptych_torch.attention import additive, alibi, causal_mask
from diptych_torch.experts import Routing, RoutingRecord
from diptych_torch.float64 import KeepFloat64
from diptych_torch.linear import use_onednn
from diptych_torch.logprobs import chunked_logprobs, chunked_matches
from diptych_torch.names import Parameter, Part
from diptych_torch.skeleton import layer_types, skeleton, trunk_of

# Families whose trunk takes one mask for each kind of layer.
MASK_BY_LAYER_TYPE = ("qwen2", "qwen3", "gemma2", "gemma3_text")


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A `TokenBatch` on the device. sources: the flat indices (b * T + t) of the tokens that predict a wanted one."""

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    attention: Bool[Tensor, "B T"]
    segments: Int[Tensor, "B T"]
    sources: Int[Tensor, " N"]


class Network(nn.Module):
    """The module that DeepSpeed trains. Its parameters are transformers', under `transformer.`.

    A tied output projection is one parameter with two names; `named_weights` gives it once. With an adapter, PEFT's
    layers are around some of its modules; the names of the base's parameters stay.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        head: Head,
        dtype: torch.dtype,
        device: torch.device,
        adapter: AdapterSpec | None = None,
    ):
        """A network whose parameters have no storage yet (`meta`). Raises UserError for an unsupported config."""
        super().__init__()
        self.head: Head = head
        self.dtype = dtype
        self.is_split = False  # its layers are on several processes (`tensor_parallel`)
        self.config: ModelConfig = read_model(config)
        self.adapter = adapter
        self.held = names.parameters(self.config, head)
        self.transformer = skeleton(config, self.config, head, dtype, device)
        self._routing = RoutingRecord()
        if self.num_experts:
            for layer in self.trunk.layers:
                self._routing.watch(layer.mlp.gate)
        # What training changes: the names that it has outside, with shapes, and the parameters that hold it.
        self.trained_shapes = tensor_shapes(self.config, head)
        self.trained_held = self.held
        if adapter is not None:
            adapters.inject(self.transformer, self.config, adapter)
            self.trained_shapes = adapter_shapes(self.config, adapter)
            if head == "scalar":
                self.trained_shapes[SCORE] = self.held["score.weight"].shape
            self.trained_held = {
                name: Parameter(shape=shape, parts=(Part(name),)) for name, shape in self.trained_shapes.items()
            }
        use_onednn(self.transformer, dtype, device)

    @property
    def trunk(self) -> Any:
        """Embedding, layers and last norm, without a head."""
        return trunk_of(self.transformer)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 where there is no mixture."""
        experts = self.config.experts if isinstance(self.config, DecoderConfig) else None
        return 0 if experts is None else experts.count

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the module's own names, each once (`names.parameters` says what they hold). Without an
        adapter's."""
        found = self.transformer.named_parameters()
        return {adapters.plain_name(name): weight for name, weight in found if adapters.peft_name(name) is None}

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes: all of them, or with an adapter its A and B and a scalar head, by
        PEFT's names."""
        if self.adapter is None:
            return self.named_weights()
        found = {adapters.peft_name(name): weight for name, weight in self.transformer.named_parameters()}
        if self.head == "scalar":
            found[SCORE] = self.transformer.score.weight
        return {name: found[name] for name in self.trained_held}

    def assign(self, weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], *, requires_grad: bool) -> None:
        """Use these tensors, without a copy, as the parameters. weights: the base's by the module's names. adapter: A
        and B by PEFT's. requires_grad: of what is trained; the rest is frozen."""
        for name in self.held:
            is_trained = self.adapter is None or name == "score.weight"
            parameter = nn.Parameter(weights[name], requires_grad=requires_grad and is_trained)
            adapters.put(self.transformer, name, parameter)
        for name in self.adapter_names():
            adapters.put(self.transformer, name, nn.Parameter(adapter[name], requires_grad=requires_grad))
        self.tie()

    def tie(self) -> None:
        """Let a tied output projection be the embedding."""
        if self.head == "lm" and self.config.tie_word_embeddings:
            self.transformer.lm_head.weight = self.transformer.get_input_embeddings().weight

    def adapter_names(self) -> Iterable[str]:
        """PEFT's names of A and B; none without an adapter."""
        return () if self.adapter is None else (name for name in self.trained_held if name != SCORE)

    def hidden_states(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        segments: Shaped[Tensor, "B S"],
        cache: Any = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states that a head reads (after the last norm, and OPT's projection).

        segments: of all columns, the cache's and after them the T new ones: `TokenBatch.segments`, or True on real
        tokens where a row is one example. cache: `slots.new_cache`'s; it takes the new columns in.
        """
        inputs = {"input_ids": tokens, "past_key_values": cache, "use_cache": cache is not None}
        if not isinstance(self.config, DecoderConfig):
            inputs |= {"attention_mask": segments[:, -tokens.shape[1] :], "position_ids": positions}
            return self.trunk(**inputs).last_hidden_state
        keys = positions if cache is None else cache.extend(positions)
        mask = causal_mask if cache is None else cache.mask
        masks = {window: mask(segments, tokens.shape[1], window) for window in dict.fromkeys(self.config.windows)}
        if self.config.alibi:
            inputs["attention_mask"] = additive(masks[None], self.dtype)
            slopes = alibi(self.config.num_heads, positions, keys, self.dtype)
            # BLOOM takes no positions: it asks this method of its own for ALiBi.
            self.trunk.build_alibi_tensor = lambda *_, **__: slopes
        else:
            inputs |= {"attention_mask": self._by_layer_type(masks), "position_ids": positions}
        # The only casts down to float32 are inside transformers' modules; the losses' own casts are not touched.
        with KeepFloat64() if self.dtype == torch.float64 else contextlib.nullcontext():
            hidden = self.trunk(**inputs).last_hidden_state
        if self.config.alibi:
            del self.trunk.build_alibi_tensor  # it holds on to a tensor as large as the attention logits
        return hidden

    def _by_layer_type(self, masks: Mapping[int | None, Tensor]) -> Any:
        """The masks as the trunk takes them: one for all layers, or one for each kind of layer."""
        assert isinstance(self.config, DecoderConfig)
        if self.config.family in MASK_BY_LAYER_TYPE:
            kinds = layer_types(self.transformer)
            assert kinds is not None
            return {kind: masks[window] for kind, window in zip(kinds, self.config.windows, strict=True)}
        (mask,) = masks.values()
        return mask

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The language-model head, its softcap included."""
        if self.head != "lm":
            raise ValueError("this model has a scalar head: it has no log-probabilities")
        logits = self.transformer.lm_head(hidden)
        cap = self.config.logit_softcap if isinstance(self.config, DecoderConfig) else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        batch: DeviceBatch,
        *,
        temperature: float = 1.0,
        chunk: int = 1024,
        entropy: bool = False,
        routing: bool = False,
        only_routing: bool = False,
        greedy: bool = False,
    ) -> tuple[Float[Tensor, "B T"] | Bool[Tensor, "B T"] | None, Float[Tensor, "B T"] | None, Routing | None]:
        """`lm`: log-probabilities of the tokens and, if asked, entropies; greedy: instead of them, is each token the
        likeliest one (the first largest logit)? `scalar`: scores and None.

        A log-probability is 0 before `TokenBatch.first`, on padding, and on an example's first token.
        routing: the third is what the routers did with the real tokens (`RoutingRecord.finish`); only_routing: nothing
        else is computed.
        """
        if routing:
            self._routing.start()
        hidden = self.hidden_states(batch.tokens, batch.positions, batch.segments)
        routed = self._routing.finish(batch.attention.flatten()) if routing else None
        if only_routing:
            return None, None, routed
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.head == "scalar":
            return self.transformer.score(hidden)[..., 0].to(wide), None, routed
        # ZeRO-3 gathers the head for every chunk, in all processes together, which do not want as many tokens each.
        is_split = hasattr(self.transformer.lm_head.weight, "ds_id")
        least = -(-batch.tokens.numel() // chunk) if is_split else 1
        targets = batch.sources + 1
        predictions = hidden.flatten(0, 1)[batch.sources], batch.tokens.flatten()[targets], self.logits

        def align(values: Tensor) -> Tensor:
            zeros = values.new_zeros(batch.tokens.numel())
            return zeros.index_copy(0, targets, values).view(batch.tokens.shape)

        if greedy:
            return align(chunked_matches(*predictions, chunk=chunk, least=least)), None, routed
        logprobs, entropies = chunked_logprobs(
            *predictions, temperature=temperature, chunk=chunk, entropy=entropy, least=least
        )
        return align(logprobs), None if entropies is None else align(entropies), routed


def build(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[nn.Parameter], None] | None = None,
) -> Network:
    """A network that holds copies of the weights and the adapter of `spec`. Raises UserError unless they are exactly
    the model's tensors.

    Reads one tensor at a time: a mapping that reads from disk on every access costs one tensor's memory beside the
    model's own. partition: called with every parameter as soon as it is there (on the host then), so that the whole
    model is nowhere.
    """
    network = Network(spec.config, spec.head, dtype, device, spec.adapter)
    shapes = tensor_shapes(network.config, spec.head)
    # The names first, with stand-ins that take no memory; each tensor's own shape when it is read.
    blank = np.zeros((), np.float32)
    named = {name: np.broadcast_to(blank, shapes.get(name, ())) for name in spec.weights}
    check_tensors(named, network.config, spec.head, where="weights")
    if spec.adapter is not None:
        check_adapter(dict(spec.adapter_weights), network.config, spec.adapter, where="adapter")
    for name, values in values_of(spec, network, dtype, torch.device("cpu") if partition else device):
        parameter = nn.Parameter(values, requires_grad=False)
        adapters.put(network.transformer, name, parameter)
        if partition is not None:
            partition(parameter)
    network.tie()
    return network


def values_of(
    spec: ModelSpec, network: Network, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """What `spec` puts into each parameter of the base (by the module's names) and of the adapter (by PEFT's), one at a
    time."""
    for name, parameter in network.held.items():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        for one, view in parameter.split(values).items():
            fill(view, spec.weights[one], one)
        yield name, values
    for name in network.adapter_names():
        yield name, torch.tensor(spec.adapter_weights[name], dtype=dtype, device=device)


@torch.no_grad()
def fill(target: Tensor, array: np.ndarray, name: str) -> None:
    """Copy a checkpoint's tensor into its place. Raises UserError where it has another shape."""
    if array.shape != tuple(target.shape):
        raise UserError(f"weights: {name} has shape {list(array.shape)}, config.json says {list(target.shape)}")
    wide = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16, which torch does not take
    target.copy_(torch.tensor(wide, dtype=target.dtype))


def device_batch(batch: TokenBatch, config: ModelConfig, device: torch.device) -> DeviceBatch:
    """Copy a batch to the device. Raises ValueError for tokens or positions that the model has no row for."""
    length = batch.tokens.shape[1]
    if not 1 <= batch.first <= length:
        raise ValueError(f"TokenBatch.first is a column from 1 to {length}, got {batch.first}")
    check_token_ids(batch.tokens, config.vocab_size)
    check_positions(config, batch.positions)
    columns = np.arange(length)
    follows = batch.attention[:, 1:] & batch.attention[:, :-1] & (batch.positions[:, 1:] != 0)
    wanted = follows & (columns[1:] >= batch.first)
    row, column = np.nonzero(wanted)
    return DeviceBatch(
        tokens=torch.tensor(batch.tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(batch.positions, dtype=torch.int64, device=device),
        attention=torch.tensor(batch.attention, device=device),
        segments=torch.tensor(batch.segments, device=device),
        sources=torch.tensor(row * length + column, dtype=torch.int64, device=device),
    )


def device_array(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A loss's array on the device: floats of this type, integers as int64, booleans as they are."""
    kinds = {"f": dtype, "i": torch.int64, "u": torch.int64, "b": torch.bool}
    return torch.tensor(array, dtype=kinds[np.asarray(array).dtype.kind], device=device)


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, outside any graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def check_token_ids(tokens: Int[np.ndarray, "B T"], vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary (an accelerator would crash or read another row)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
