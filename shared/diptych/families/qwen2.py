"""Qwen 2 and 2.5: Llama with biases on query, key and value, and, switched on, a window in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, llama_like


def windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types`, or `sliding_window` from layer `max_window_layers` on."""
    size = fields.take("sliding_window", default=4096)
    first = fields.take("max_window_layers", default=28)
    used = fields.take("use_sliding_window", default=False)
    kinds = fields.take("layer_types", default=None)
    if kinds is None:
        kinds = ["sliding_attention" if used and layer >= first else "full_attention" for layer in range(num_layers)]
    return tuple(size if used and kind == "sliding_attention" else None for kind in kinds)


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields)
    fields.idle("use_mrope")
    return replace(common, windows=windows(fields, common.num_layers), attention_bias=True)


FAMILY = Family(
    title="Qwen 2, 2.5",
    features="GQA, QKV bias, optional window",
    examples="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    causal_lm="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    read=_read,
    names=TRUNK | MLP | HEADS,
    prefix="model.",
)
