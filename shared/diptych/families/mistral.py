"""Mistral 7B and its descendants: Llama with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, llama_like


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields)
    window = fields.take("sliding_window", default=None if "sliding_window" in fields.config else 4096)
    return replace(common, windows=(window,) * common.num_layers)


FAMILY = Family(
    title="Mistral",
    features="GQA, sliding window",
    examples="Mistral 7B, Mistral Nemo, Zephyr",
    causal_lm="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    read=_read,
    names=TRUNK | MLP | HEADS,
    prefix="model.",
)
