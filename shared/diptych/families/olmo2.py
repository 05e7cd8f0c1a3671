"""OLMo 2: norms after attention and MLP instead of before, and a norm over all heads of query and key."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, llama_like


def _read(fields: Fields) -> DecoderConfig:
    bias = bool(fields.take("attention_bias", default=False))
    common = llama_like(fields, eps=1e-5)
    return replace(common, attention_bias=bias, output_bias=bias, block="output", qk_norm="all")


FAMILY = Family(
    title="OLMo 2",
    features="norms after each block, QK norm over all heads",
    examples="OLMo 2 1B, 7B, 13B, 32B",
    causal_lm="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    read=_read,
    names={name: slot for name, slot in (TRUNK | MLP).items() if "layernorm" not in name}
    | {
        "model.layers.{layer}.post_attention_layernorm.weight": "attention_out_norm",
        "model.layers.{layer}.post_feedforward_layernorm.weight": "mlp_out_norm",
    }
    | HEADS,
    prefix="model.",
)
