"""A small hot model of every family, and the plain model that it is compared with: transformers' own, or equations.

Plain: `from_pretrained` on a directory, eager attention, one unpadded row at a time. transformers rounds to float32 in
three places whatever the precision (norms and softmaxes, rotary frequencies, Gemma's embedding scale); there the plain
model gets the numbers in float64 too, so that what is left is only rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from diptych.engine import TokenBatch, TrainBatch
from diptych.families.decoder import DecoderConfig
from diptych.families.family import initial_value, read_model, tensor_rules, tensor_shapes
from diptych.families.rope import frequencies
from diptych_torch.float64 import KeepFloat64
from diptych_torch.names import parameters

VOCAB, LENGTH, WINDOW = 48, 24, 5
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "tie_word_embeddings": True}
OPT = {
    "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 24, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rotary_pct": 0.5, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MOE = {
    **LLAMA, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "model_type": "llama", "attention_bias": True},
    "llama, yarn": {**LLAMA, "model_type": "llama", "rope_scaling": YARN},
    "llama, dynamic": {
        **LLAMA, "model_type": "llama", "max_position_embeddings": 20,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {
        **LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    },
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {
        **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **GEMMA, "model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "phi3": {**LLAMA, "model_type": "phi3", "sliding_window": WINDOW},
    "phi3, longrope": {
        **LLAMA, "model_type": "phi3", "partial_rotary_factor": 0.67, "original_max_position_embeddings": 16,
        "rope_scaling": LONG, "sliding_window": None,
    },
    "olmo2": {**LLAMA, "model_type": "olmo2"},
    "mixtral": MIXTRAL,
    "qwen3_moe": MOE,
    "qwen3_moe, not normalised": {**MOE, "norm_topk_prob": False},
    "opt": OPT,
    "opt, norm after, projected": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "gpt_neox": NEOX,
    "gpt_neox, one after another": {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
    "bloom": {
        "model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 4, "pad_token_id": 2,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "rnn": {"model_type": "rnn", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2},
    "rnn, relu, tied": {
        "model_type": "rnn", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "nonlinearity": "relu",
        "tie_word_embeddings": True,
    },
}  # fmt: skip
# transformers computes the frequencies of each length anew, in float32.
TOLERANCE = {"llama, dynamic": 1e-5}


def hot(config: dict[str, Any], head: Any = "lm") -> dict[str, np.ndarray]:
    """Standard deviation 0.15, gains away from 1, biases away from 0."""
    described, rng = read_model(config), np.random.default_rng(7)
    weights = {}
    for rule in tensor_rules(described, head):
        constant = initial_value(described, rule)
        for layer in rule.layers(described):
            for name in rule.names(described, layer):
                drawn = rng.normal(0, 0.15, rule.shape)
                if constant == 0.0:
                    drawn = np.sign(drawn) * (0.1 + np.abs(drawn))
                elif constant is not None:
                    drawn = constant + np.sign(drawn) * rng.uniform(0.1, 0.5, rule.shape)
                weights[name] = drawn
    return {name: weights[name] for name in tensor_shapes(described, head)}


def ragged(rows: int = 4, *, seed: int = 3) -> TokenBatch:
    """Padding of 0, 15, 4, ... columns on the left."""
    rng = np.random.default_rng(seed)
    padding = np.array([0, LENGTH - 9, 4, 11, 2, 7])[:rows]
    real = np.arange(LENGTH) >= padding[:, None]
    positions = np.maximum(real.cumsum(axis=1) - 1, 0) * real
    tokens = rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)
    return TokenBatch(tokens=tokens, attention=real, positions=positions.astype(np.int32))


class PlainRNN(torch.nn.Module):
    """Elman's equations, a token at a time."""

    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray]):
        super().__init__()
        self.w = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
        self.layers = config["num_hidden_layers"]
        self.f = {"tanh": torch.tanh, "relu": torch.relu}[config.get("nonlinearity", "tanh")]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = [torch.zeros(24, dtype=torch.float64) for _ in range(self.layers)]
        outputs = []
        for token in tokens:
            x = self.w["model.embed_tokens.weight"][token]
            for layer in range(self.layers):
                part = {name: self.w[f"model.layers.{layer}.{name}"] for name in (
                    "input.weight", "recurrent.weight", "recurrent.bias"
                )}  # fmt: skip
                drive = part["input.weight"] @ x + part["recurrent.weight"] @ states[layer]
                x = states[layer] = self.f(drive + part["recurrent.bias"])
            outputs.append(x)
        return torch.stack(outputs)

    def outputs(self, tokens: torch.Tensor, head: str) -> torch.Tensor:
        hidden = self(tokens)
        if head == "scalar":
            return hidden @ self.w["score.weight"][0]
        unembedding = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return hidden @ unembedding.T + self.w["lm_head.bias"]

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: value.grad.numpy() for name, value in self.w.items() if value.grad is not None}


class Plain:
    """A directory as transformers reads it."""

    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray], head: str, directory: Path):
        directory.mkdir(exist_ok=True)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        dropouts = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
        written = {**config, **dropouts, **({"num_labels": 1} if head == "scalar" else {})}
        (directory / "config.json").write_text(json.dumps(written))
        classes: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        options = {"experts_implementation": "eager"} if "num_experts_per_tok" in config else {}
        self.model, report = classes.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager", output_loading_info=True, **options
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        self.model.eval()
        self.config, self.head = read_model(config), head
        self.trunk = getattr(self.model, self.model.base_model_prefix)
        if isinstance(self.config, DecoderConfig):
            self._sharpen(self.config)

    def _sharpen(self, config: DecoderConfig) -> None:
        embedding = self.model.get_input_embeddings()
        embedding.padding_idx = None
        if hasattr(embedding, "embed_scale"):
            embedding.embed_scale = torch.tensor(config.hidden_size, dtype=torch.float64).sqrt()
        for index, rope in enumerate(config.ropes):
            prefix = ("full_attention_", "sliding_attention_")[index] if len(config.ropes) > 1 else ""
            rows = torch.tensor(np.array(frequencies(rope)), dtype=torch.float64)
            for name in ("inv_freq", "original_inv_freq"):
                setattr(self.trunk.rotary_emb, prefix + name, rows[0].clone())
            self.trunk.rotary_emb.long_inv_freq = rows[-1]

    def outputs(self, tokens: torch.Tensor, head: str) -> torch.Tensor:
        """Logits [T, V] or scores [T] of one row."""
        with KeepFloat64():
            if head == "lm":
                return self.model(input_ids=tokens[None]).logits[0]
            return self.model.score(self.trunk(input_ids=tokens[None]).last_hidden_state)[0, :, 0]

    def gradients(self) -> dict[str, np.ndarray]:
        found = dict(self.model.named_parameters())
        gradients = {}
        for name, parameter in parameters(self.config, self.head).items():  # pyright: ignore[reportArgumentType]
            gradients |= parameter.split(found[name].grad.numpy())
        return gradients


def read_plain(plain: Any, batch: TokenBatch, head: str) -> torch.Tensor:
    """Log-probabilities or scores [B, T], row by row without padding; 0 on padding and on a row's first token."""
    rows = []
    for tokens, real in zip(batch.tokens, batch.attention, strict=True):
        row = torch.tensor(tokens[real], dtype=torch.int64)
        outputs = plain.outputs(row, head)
        if head == "lm":
            chosen = outputs[:-1].log_softmax(dim=-1).gather(1, row[1:, None])[:, 0]
            outputs = torch.nn.functional.pad(chosen, (1, 0))
        rows.append(torch.nn.functional.pad(outputs, (len(tokens) - len(row), 0)))
    return torch.stack(rows)


def weighted(outputs: Any, *, weight: Any, total: float) -> Any:
    return (outputs * weight).sum() / total, {}


def weighted_batch(batch: TokenBatch) -> TrainBatch:
    weight = np.random.default_rng(9).normal(size=batch.tokens.shape) * batch.attention
    return TrainBatch(tokens=batch, arrays={"weight": weight}, denominators={"total": float(batch.attention.sum())})
