"""Tiny configurations of every family and variant, their hot weights, and ragged batches of up to 600 positions.

Hot: weights of standard deviation 0.15, gains away from 1, biases away from 0; on weights like initial ones a third of
seeded bugs hide (docs/parity.md). Every draw is keyed by the tensor's name. Weights are float32 numbers, so that both
precisions compute the same model and float64 is the truth about float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diptych import random
from diptych.engine import Head, Loss, Precision, PromptBatch, Tensors, TokenBatch, TrainBatch
from diptych.families.family import initial_value, read_model, tensor_rules, tensor_shapes

VOCAB, WIDTH, LAYERS, WINDOW = 64, 32, 2, 5
# Real tokens of each row. Three rows are past the limits of dynamic and longrope scaling (48), one is not. Their sum
# times LAYERS is a power of two: there transformers' float32 division of the experts' counts is exact.
LENGTHS = (600, 333, 51, 40)
PROMPTS, NEW = (14, 9, 5, 12), 12  # tokens of each prompt, longer than a window; new tokens
ORIGINAL = 48  # where dynamic and longrope scaling begin

_BASE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_LLAMA = _BASE | {
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA = _LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "tie_word_embeddings": True}
_QWEN_MOE = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
_OPT = _BASE | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
_NEOX = _BASE | {"intermediate_size": 48, "rotary_pct": 0.5, "tie_word_embeddings": False}
_RNN = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}

# "family" or "family, variant" -> config.json without model_type.
_CASES: Mapping[str, dict[str, Any]] = {
    "llama": _LLAMA | {"rope_theta": 500000.0},
    "llama, bias, tied": _LLAMA | {"attention_bias": True, "tie_word_embeddings": True},
    "llama, linear": _LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, dynamic": _LLAMA
    | {"max_position_embeddings": ORIGINAL, "rope_scaling": {"rope_type": "dynamic", "factor": 16.0}},
    "llama, llama3": _LLAMA | {"rope_scaling": _LLAMA3},
    "llama, yarn": _LLAMA | {"rope_scaling": _YARN},
    "mistral": _LLAMA | {"sliding_window": WINDOW},
    "qwen2": _LLAMA,
    "qwen2, window": _LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": _LLAMA | {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "phi3": _LLAMA | {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    "phi3, longrope": _LLAMA
    | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": ORIGINAL, "rope_scaling": _LONG},
    "olmo2": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "qwen3_moe": _LLAMA | _QWEN_MOE | {"norm_topk_prob": True},
    "qwen3_moe, not normalised": _LLAMA | _QWEN_MOE | {"norm_topk_prob": False},
    "opt": _OPT,
    "opt, norm after, projected": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "gpt2": _BASE | {"n_inner": 48},
    "gpt_neox": _NEOX,
    "gpt_neox, sequential": _NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
    # Six heads: not a power of two, so ALiBi's slopes come from both of its series.
    "bloom": _BASE | {"hidden_size": 48, "num_attention_heads": 6},
    "rnn": _RNN,
    "rnn, relu, tied": _RNN | {"nonlinearity": "relu", "tie_word_embeddings": True},
}
CASES: dict[str, dict[str, Any]] = {
    name: {"model_type": name.split(",")[0], **config} for name, config in _CASES.items()
}
# What changes no more than positions, windows, ties or a scale: log-probabilities, gradients and decoding are checked,
# but not again the scalar head, float32's gradients and JAX's greedy decoding. (A program takes seconds to compile.)
VARIANTS = frozenset(CASES) & {
    "llama, bias, tied", "llama, linear", "llama, dynamic", "llama, llama3", "llama, yarn", "qwen2, window",
    "phi3, longrope", "qwen3_moe, not normalised", "rnn, relu, tied",
}  # fmt: skip
EXPERTS = ("mixtral", "qwen3_moe")


def hot_weights(config: Mapping[str, Any], head: Head, precision: Precision) -> Tensors:
    """The checkpoint's tensors, each drawn by its own name; float32 numbers in the asked type."""
    model = read_model(config)
    weights: Tensors = {}
    for rule in tensor_rules(model, head):
        constant = initial_value(model, rule)
        for layer in rule.layers(model):
            for name in rule.names(model, layer):
                drawn = random.normal(1, f"families/{name}", rule.shape, std=0.15)
                if constant is not None:  # a gain or a bias: at least 0.1 away from its initial value
                    drawn = constant + np.sign(drawn) * 0.1 + drawn
                weights[name] = drawn.astype(np.float32).astype(precision)
    return {name: weights[name] for name in tensor_shapes(model, head)}


def left_padded(lengths: tuple[int, ...], columns: int, purpose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, attention and positions [rows, columns] of rows with so many real tokens at their right ends.

    Padding holds random tokens too: what is there must not matter.
    """
    real = np.arange(columns) >= columns - np.asarray(lengths)[:, None]
    positions = (np.maximum(real.cumsum(axis=1) - 1, 0) * real).astype(np.int32)
    tokens = random.generator(1, f"families/{purpose}").integers(3, VOCAB, real.shape).astype(np.int32)
    return tokens, real, positions


def token_batch() -> TokenBatch:
    """LENGTHS, left-padded to 600 columns."""
    tokens, real, positions = left_padded(LENGTHS, max(LENGTHS), "tokens")
    return TokenBatch(tokens=tokens, attention=real, positions=positions)


def prompt_batch() -> PromptBatch:
    """PROMPTS, left-padded."""
    tokens, real, positions = left_padded(PROMPTS, max(PROMPTS), "prompts")
    return PromptBatch(tokens=tokens, attention=real, positions=positions)


def widened(batch: TokenBatch) -> TokenBatch:
    """The same rows with padding on the left up to 600 columns: the shape that is compiled already."""
    missing = max(LENGTHS) - batch.tokens.shape[1]

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (missing, 0)))

    return TokenBatch(tokens=pad(batch.tokens), attention=pad(batch.attention), positions=pad(batch.positions))


def targets(batch: TokenBatch) -> np.ndarray:
    """The columns that have a log-probability: a real token after a real token. bool [batch, time]."""
    return batch.attention & np.roll(batch.attention, 1, axis=1) & (np.arange(batch.tokens.shape[1]) > 0)


def weighted_sum(outputs: Any, *, factors: Any, num: Any) -> tuple[Any, dict[str, Any]]:
    """A loss that no two tokens enter alike: fresh on-policy losses hide most bugs of a model."""
    return (outputs * factors).sum() / num, {}


def nothing(outputs: Any, *, factors: Any, num: Any) -> tuple[Any, dict[str, Any]]:
    """A loss that leaves only the balance of experts."""
    return (outputs * factors).sum() * 0.0 / num, {}


def train_batch(batch: TokenBatch, head: Head) -> TrainBatch:
    """Random per-token factors on what the head gives."""
    real = targets(batch) if head == "lm" else batch.attention
    drawn = random.generator(1, "families/factors").normal(0, 1, real.shape)
    return TrainBatch(
        tokens=batch, arrays={"factors": np.where(real, drawn, 0.0)}, denominators={"num": float(real.sum())}
    )


def loss_of(head: Head, *, balance: float = 0.0) -> Loss:
    return Loss(function=weighted_sum, reads="logprobs" if head == "lm" else "scores", balance=balance)


def vanishing_gradients(config: Mapping[str, Any]) -> set[str]:
    """Tensors whose gradient is 0 in exact arithmetic: key biases where nothing turns or caps the logits add the same
    number to every logit of a softmax."""
    model = read_model(config)
    if getattr(model, "ropes", ()) or not getattr(model, "attention_bias", False):
        return set()
    rules = [rule for rule in tensor_rules(model, "lm") if rule.slots == ("key_bias",)]
    return {name for rule in rules for layer in rule.layers(model) for name in rule.names(model, layer)}
