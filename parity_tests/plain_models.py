"""The oracle: transformers' own model of a checkpoint, read row by row without padding, and torch autograd on it.

Eager attention and experts. transformers rounds to float32 in some places whatever the precision; for float64 those
numbers are kept (`KeepFloat64`), and the rotary frequencies and Gemma's embedding scale are set, after a check that
they are the ones transformers has itself. The recurrent model, which transformers does not know, is written out.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import logging as transformers_logging
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from diptych.engine import Head, Tensors, TokenBatch
from diptych.families.decoder import DecoderConfig
from diptych.families.family import read_model
from diptych.families.rope import frequencies
from diptych.parity.tolerances import TOLERANCES
from diptych_torch.float64 import KeepFloat64

transformers_logging.set_verbosity_error()  # tiny vocabularies do not hold the default special tokens
transformers_logging.disable_progress_bar()
OWN_NUMBERS = TOLERANCES["frequencies_relative"].float32
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Plain(Protocol):
    """What the checks ask of an oracle."""

    head: Head

    def outputs(self, tokens: Tensor) -> Tensor:
        """Logits [T, V] or scores [T] of one row of real tokens [T]."""
        ...

    def gradients(self) -> Tensors:
        """What `backward` has left, by the checkpoint's names; a tensor that got none is missing."""
        ...


def plain_model(config: Mapping[str, Any], weights: Tensors, head: Head) -> Plain:
    """The oracle of a checkpoint, in the type of its weights."""
    if config["model_type"] == "rnn":
        return PlainElman(config, weights, head)
    return PlainTransformers(config, weights, head)


def read(plain: Plain, batch: TokenBatch) -> Tensor:
    """Log-probabilities or scores [batch, time], row by row; 0 on padding and on the first token's log-probability."""
    rows = []
    for tokens, real in zip(batch.tokens, batch.attention, strict=True):
        row = torch.tensor(tokens[real], dtype=torch.int64)
        values = plain.outputs(row)
        if plain.head == "lm":
            values = nn.functional.pad(values[:-1].log_softmax(-1).gather(1, row[1:, None])[:, 0], (1, 0))
        rows.append(nn.functional.pad(values, (len(tokens) - len(row), 0)))
    return torch.stack(rows)


class PlainTransformers:
    """A directory as `from_pretrained` reads it."""

    def __init__(self, config: Mapping[str, Any], weights: Tensors, head: Head):
        self.head: Head = head
        self.config = read_model(config)
        assert isinstance(self.config, DecoderConfig)
        dtype = next(iter(weights.values())).dtype.name
        self.exact = KeepFloat64 if dtype == "float64" else contextlib.nullcontext
        classes: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        options = {} if self.config.experts is None else {"experts_implementation": "eager"}
        with tempfile.TemporaryDirectory() as folder:
            written = dict(config) | ({"num_labels": 1} if head == "scalar" else {})
            Path(folder, "config.json").write_text(json.dumps(written))
            save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
            self.model, report = classes.from_pretrained(
                folder, dtype=DTYPES[dtype], attn_implementation="eager", output_loading_info=True, **options
            )
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        self.model.eval()  # no dropout
        self.trunk = getattr(self.model, self.model.base_model_prefix)
        embedding = self.model.get_input_embeddings()
        embedding.padding_idx = None  # a pad token's embedding is a weight like any other
        if hasattr(embedding, "embed_scale"):
            assert np.isclose(float(embedding.embed_scale), self.config.embedding_scale, rtol=OWN_NUMBERS)
            embedding.embed_scale = torch.tensor(self.config.embedding_scale, dtype=DTYPES[dtype])

    def outputs(self, tokens: Tensor) -> Tensor:
        self._set_frequencies(len(tokens))
        with self.exact():
            if self.head == "lm":
                return self.model(input_ids=tokens[None], use_cache=False).logits[0]
            hidden = self.trunk(input_ids=tokens[None], use_cache=False).last_hidden_state
            return self.model.score(hidden)[0, :, 0]

    def balance_loss(self, batch: TokenBatch) -> Tensor:
        """transformers' balance loss of the whole batch, from its router logits of unpadded rows."""
        assert isinstance(self.config, DecoderConfig)
        assert self.config.experts is not None
        rows = []
        for tokens, real in zip(batch.tokens, batch.attention, strict=True):
            row = torch.tensor(tokens[real], dtype=torch.int64)
            self._set_frequencies(len(row))
            with self.exact():
                rows.append(self.trunk(input_ids=row[None], use_cache=False, output_router_logits=True).router_logits)
        layers = tuple(torch.cat(layer) for layer in zip(*rows, strict=True))
        with self.exact():
            value = load_balancing_loss_func(layers, self.config.experts.count, self.config.experts.top_k)  # pyright: ignore[reportArgumentType]
        assert isinstance(value, Tensor)
        return value

    def gradients(self) -> Tensors:
        """transformers itself writes them, in the place of the weights, under the names of a checkpoint."""
        found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, state_dict=found)
            return load_file(Path(folder, "model.safetensors"))

    def _set_frequencies(self, length: int) -> None:
        """The hinge's frequencies for a sequence of this length, where transformers keeps its own."""
        assert isinstance(self.config, DecoderConfig)
        if not self.config.ropes:
            return
        rotary = self.trunk.rotary_emb
        for rope, prefix in zip(self.config.ropes, ("full_attention_", "sliding_attention_"), strict=False):
            prefix = prefix if len(self.config.ropes) > 1 else ""
            row = frequencies(rope)[int(rope.rows(np.int64(length))) if rope.by_length else 0]
            if rope.by_length:
                own, factor = ROPE_INIT_FUNCTIONS[rope.kind](rotary.config, torch.device("cpu"), seq_len=length)
            else:
                own, factor = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
            np.testing.assert_allclose(own.numpy(), row, rtol=OWN_NUMBERS, atol=0)
            np.testing.assert_allclose(factor, rope.attention_factor, rtol=OWN_NUMBERS)
            for name in ("inv_freq", "original_inv_freq", "long_inv_freq"):
                setattr(rotary, prefix + name, torch.tensor(np.array(row)).to(self.model.dtype))
            rotary.max_seq_len_cached = 2**30  # so that it does not make others


class PlainElman:
    """h_t = f(W_xh x_t + W_hh h_{t-1} + b_h), y_t = W_hy h_t + b_y, a token at a time."""

    def __init__(self, config: Mapping[str, Any], weights: Tensors, head: Head):
        self.head: Head = head
        self.weights = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
        self.num_layers = config["num_hidden_layers"]
        self.function = {"tanh": torch.tanh, "relu": torch.relu}[config.get("nonlinearity", "tanh")]

    def outputs(self, tokens: Tensor) -> Tensor:
        w = self.weights
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            state, states = torch.zeros_like(x[0]), []
            for one in x:
                drive = w[name + "input.weight"] @ one + w[name + "recurrent.weight"] @ state
                state = self.function(drive + w[name + "recurrent.bias"])
                states.append(state)
            x = torch.stack(states)
        if self.head == "scalar":
            return x @ w["score.weight"][0]
        unembedding = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return x @ unembedding.T + w["lm_head.bias"]

    def gradients(self) -> Tensors:
        return {name: value.grad.numpy() for name, value in self.weights.items() if value.grad is not None}
