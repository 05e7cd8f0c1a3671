"""The Llama family as data: what its config.json means, which tensors it has, and its rotary frequencies.

Both engines and the checkpoint reader work from this one description, so a field that it does not understand is an
error here and never a silent difference between the engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from diptych.engine import Head
from diptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding. kind: "default", "linear" or "llama3"; the rest as in config.json."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What the model computes, from a Hugging Face config.json; hashable."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    rope: Rope


# Fields whose other values would change the numbers, and the one value that this family computes.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "sliding_window": None,
}


def parse_config(config: Mapping[str, Any], *, where: str = "config.json") -> LlamaConfig:
    """Read a config.json. Raises UserError for another family, a missing field, or a setting that is not computed."""
    if config.get("model_type") != "llama":
        raise UserError(f"{where}: model_type is {config.get('model_type')!r}; supported families: llama")
    for name, value in _FIXED.items():
        if config.get(name, value) not in (value, None):
            raise UserError(f"{where}: {name} = {config[name]!r} is not supported (only {value!r})")
    required = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "max_position_embeddings",
    )  # fmt: skip
    missing = [name for name in required if name not in config]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    if head_dim % 2:
        raise UserError(f"{where}: head_dim = {head_dim} must be even for rotary embeddings")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config["max_position_embeddings"],
        initializer_range=float(config.get("initializer_range", 0.02)),
        rope=_parse_rope(config, where),
    )


def _parse_rope(config: Mapping[str, Any], where: str) -> Rope:
    """transformers 5 writes `rope_parameters`; older files `rope_theta` and `rope_scaling` (`type` before 4.43)."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    theta = float(settings.pop("rope_theta", config.get("rope_theta", 10000.0)))
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in known:
        raise UserError(f"{where}: RoPE type {kind!r} is not supported; supported: {', '.join(known)}")
    missing = [name for name in known[kind] if name not in settings]
    unknown = [name for name in settings if name not in known[kind]]
    if missing or unknown:
        raise UserError(
            f"{where}: RoPE type {kind!r} needs exactly {known[kind]}, missing {missing}, unknown {unknown}"
        )
    return Rope(kind=kind, theta=theta, **settings)


def inverse_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Rotary inverse frequencies, float32 [head_dim / 2], computed in float64 and rounded once.

    Su et al. 2021 eq. 15; linear: Chen et al. 2023 (position interpolation); llama3: Llama 3.1's piecewise scaling by
    wavelength. Both engines take these very numbers, so their angles are equal.
    """
    rope = config.rope
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        old_length = rope.original_max_position_embeddings
        smooth = (old_length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        # smooth <= 0: longer than the low-frequency wavelength, fully scaled; >= 1: left alone; between: a blend.
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def tensor_shapes(config: LlamaConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by Hugging Face name, with its shape in Hugging Face layout ([out, in]).

    A tied output projection is not a tensor of its own. The scalar head is `score.weight` [1, hidden], as
    `LlamaForSequenceClassification(num_labels=1)` has it.
    """
    width, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (query, width),
            prefix + "self_attn.k_proj.weight": (key_value, width),
            prefix + "self_attn.v_proj.weight": (key_value, width),
            prefix + "self_attn.o_proj.weight": (width, query),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "mlp.gate_proj.weight": (inner, width),
            prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
        }
    shapes["model.norm.weight"] = (width,)
    if head == "scalar":
        shapes["score.weight"] = (1, width)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes
