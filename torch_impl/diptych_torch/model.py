"""A transformers model as a function from tokens to hidden states, log-probabilities or scores.

The modules and the names of the weights are transformers'. Everything that transformers would decide by itself is
decided here and handed over: the attention mask, the positions, the rotary angles, the cache, the chunks of the
vocabulary. So the decoder layers are called directly, and training, scoring and decoding run the very same layers.

Dimensions: B batch, T time, S keys (T and whatever a cache holds), D model width, H head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from diptych.engine import Head, TokenBatch
from diptych.errors import UserError
from diptych.weights.huggingface import check_tensors
from diptych.weights.llama import inverse_frequencies, parse_config, tensor_shapes
from diptych_torch.float64 import KeepFloat64
from diptych_torch.logprobs import chunked_logprobs


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A `TokenBatch` on the device. sources: the flat indices (b * T + t) of the tokens that predict a wanted one."""

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B 1 T T"]
    sources: Int[Tensor, " N"]


class Network(nn.Module):
    """The module that DeepSpeed trains. Its parameters are transformers', under `transformer.`.

    A tied output projection is one parameter with two names; `named_weights` gives it once, under its checkpoint name.
    """

    def __init__(self, config: Mapping[str, Any], head: Head, dtype: torch.dtype, device: torch.device):
        """A network whose parameters have no storage yet (`meta`). Raises UserError for an unsupported config."""
        super().__init__()
        self.head: Head = head
        self.dtype = dtype
        self.shape = parse_config(config)
        self.transformer = _skeleton(config, head, dtype)
        # The embedding of a pad token is a weight like any other: `padding_idx` would cut its gradient out.
        self.trunk.embed_tokens.padding_idx = None
        frequencies = inverse_frequencies(self.shape)
        _check_frequencies(self.trunk.rotary_emb, frequencies)
        # The last bits differ from transformers' own; both engines' angles are products of these float32 numbers.
        for name in ("inv_freq", "original_inv_freq"):
            table = torch.tensor(frequencies, device=device)
            self.trunk.rotary_emb.register_buffer(name, table, persistent=False)

    @property
    def trunk(self) -> Any:
        """Embedding, decoder layers and last norm, without a head."""
        return self.transformer.model

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by Hugging Face name, each once."""
        return {name.removeprefix("transformer."): weight for name, weight in self.transformer.named_parameters()}

    def assign(self, weights: Mapping[str, Tensor], *, requires_grad: bool) -> None:
        """Use these tensors, without a copy, as the parameters."""
        for name in self.named_weights():
            parent = self.transformer.get_submodule(name.rpartition(".")[0])
            parent.weight = nn.Parameter(weights[name], requires_grad=requires_grad)
        if self.head == "lm" and self.shape.tie_word_embeddings:
            self.transformer.lm_head.weight = self.trunk.embed_tokens.weight

    def hidden_states(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B 1 T S"] | None,
        cache: Any = None,
    ) -> Float[Tensor, "B T D"]:
        """The hidden states after the last norm. `cache` has transformers' `update(keys, values, layer_index)`."""
        # The only casts down to float32 are inside transformers' modules; the losses' own casts are not touched.
        precise = KeepFloat64() if self.dtype == torch.float64 else contextlib.nullcontext()
        with precise:
            hidden = self.trunk.embed_tokens(tokens)
            angles = self._rotary(positions)
            for layer in self.trunk.layers:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
            return self.trunk.norm(hidden)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The language-model head."""
        if self.head != "lm":
            raise ValueError("this model has a scalar head: it has no log-probabilities")
        return self.transformer.lm_head(hidden)

    def forward(
        self, batch: DeviceBatch, *, temperature: float = 1.0, chunk: int = 1024, entropy: bool = False
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """`lm`: log-probabilities of the tokens and, if asked, entropies. `scalar`: scores and None.

        A log-probability is 0 before `TokenBatch.first`, on padding, and on a row's first token (nothing precedes it).
        """
        hidden = self.hidden_states(batch.tokens, batch.positions, batch.mask)
        if self.head == "scalar":
            return self.transformer.score(hidden)[..., 0], None
        if not len(batch.sources):  # nothing is wanted; the zeros still hang on the graph
            zeros = hidden[..., 0] * 0
            return zeros, zeros.detach() if entropy else None
        targets = batch.sources + 1
        logprobs, entropies = chunked_logprobs(
            hidden.flatten(0, 1)[batch.sources],
            batch.tokens.flatten()[targets],
            self.logits,
            temperature=temperature,
            chunk=chunk,
            entropy=entropy,
        )

        def align(values: Tensor) -> Tensor:
            zeros = values.new_zeros(batch.tokens.numel())
            return zeros.index_copy(0, targets, values).view(batch.tokens.shape)

        return align(logprobs), None if entropies is None else align(entropies)

    def _rotary(self, positions: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """Cosines and sines of position * inverse frequency, each twice (half-split layout, Su et al. 2021)."""
        angles = positions[..., None].to(self.dtype) * self.trunk.rotary_emb.inv_freq.to(self.dtype)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def build(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], head: Head, dtype: torch.dtype, device: torch.device
) -> Network:
    """A network that holds copies of `weights`. Raises UserError unless they are exactly the model's tensors."""
    network = Network(config, head, dtype, device)
    check_weights(network, weights)
    network.assign(
        {name: torch.tensor(value, dtype=dtype, device=device) for name, value in weights.items()}, requires_grad=False
    )
    return network


def check_weights(network: Network, weights: Mapping[str, np.ndarray]) -> None:
    """Raise UserError unless `weights` holds exactly the network's tensors, each in its shape."""
    check_tensors(weights, network.shape, network.head, where="weights")


def device_batch(batch: TokenBatch, vocab_size: int, device: torch.device) -> DeviceBatch:
    """Copy a batch to the device, with its causal mask.

    A padding token reads itself and nothing else, so that no row of the mask is empty: attention stays finite, forward
    and backward, in every kernel. No real token reads padding.
    """
    length = batch.tokens.shape[1]
    if not 1 <= batch.first <= length:
        raise ValueError(f"TokenBatch.first is a column from 1 to {length}, got {batch.first}")
    check_token_ids(batch.tokens, vocab_size)
    columns = np.arange(length)
    wanted = batch.attention[:, 1:] & batch.attention[:, :-1] & (columns[1:] >= batch.first)
    row, column = np.nonzero(wanted)
    return DeviceBatch(
        tokens=torch.tensor(batch.tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(batch.positions, dtype=torch.int64, device=device),
        mask=causal_mask(torch.tensor(batch.attention, device=device)),
        sources=torch.tensor(row * length + column, dtype=torch.int64, device=device),
    )


def causal_mask(attention: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """mask[b, 0, q, k]: may query q read key k? Real keys up to q, and always q itself."""
    length = attention.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=attention.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=attention.device)
    return ((attention[:, None, :] & earlier) | itself)[:, None]


def check_token_ids(tokens: Int[np.ndarray, "B T"], vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary (an accelerator would crash or read another row)."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got {tokens.min()}..{tokens.max()}")


def _skeleton(config: Mapping[str, Any], head: Head, dtype: torch.dtype) -> Any:
    """The transformers model of a config.json, on the `meta` device (so nothing is initialised or drawn)."""
    settings = {name: value for name, value in config.items() if name not in ("model_type", "torch_dtype", "dtype")}
    settings |= {"num_labels": 1} if head == "scalar" else {}
    transformers_config = AutoConfig.for_model(config["model_type"], **settings)
    family = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        transformer = cast(Any, family).from_config(transformers_config, dtype=dtype, attn_implementation="sdpa")
    expected = tensor_shapes(parse_config(config), head)
    actual = {name: tuple(weight.shape) for name, weight in transformer.named_parameters()}
    if actual != expected:
        different = sorted(dict(expected.items() ^ actual.items()))
        raise UserError(f"config.json: transformers builds other tensors from it than Diptych: {', '.join(different)}")
    return transformer


def _check_frequencies(rotary: Any, frequencies: Float[np.ndarray, " half"]) -> None:
    """Raise UserError where transformers reads other rotary frequencies (or scaling) from the config than we do."""
    theirs = type(rotary)(config=rotary.config)  # outside of `meta`: with numbers
    agrees = np.allclose(theirs.inv_freq.numpy(), frequencies, rtol=1e-5, atol=0.0)
    if not agrees or theirs.attention_scaling != 1.0:
        raise UserError(
            "config.json: transformers computes other rotary frequencies from it than Diptych; "
            "check rope_parameters, rope_scaling and rope_theta"
        )
