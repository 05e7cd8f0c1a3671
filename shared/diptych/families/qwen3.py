"""Qwen 3: Llama with a norm on every head of query and key."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, llama_like
from diptych.families.qwen2 import windows


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields, head_dim=128)
    bias = bool(fields.take("attention_bias", default=False))
    layers = windows(fields, common.num_layers)
    return replace(common, windows=layers, attention_bias=bias, output_bias=bias, qk_norm="head")


FAMILY = Family(
    title="Qwen 3",
    features="GQA, QK norm",
    examples="Qwen3 0.6B to 32B",
    causal_lm="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    read=_read,
    names=TRUNK | MLP | HEADS,
    prefix="model.",
)
