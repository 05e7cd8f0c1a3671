"""Phi-3, 3.5 and 4: Llama with fused QKV and gate-up projections, and longrope."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, llama_like

_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields, eps=1e-5)
    window = fields.take("sliding_window", default=None)
    fields.fixed(attention_bias=False)
    return replace(common, windows=(window,) * common.num_layers)


FAMILY = Family(
    title="Phi-3, 3.5, 4",
    features="fused projections, window, partial and longrope RoPE",
    examples="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
    causal_lm="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    read=_read,
    names={name: slot for name, slot in (TRUNK | MLP).items() if not any(part in name for part in _SPLIT)}
    | {
        "model.layers.{layer}.self_attn.qkv_proj.weight": ("query", "key", "value"),
        "model.layers.{layer}.mlp.gate_up_proj.weight": ("gate", "up"),
    }
    | HEADS,
    prefix="model.",
    dropouts=("embd_pdrop", "resid_pdrop"),
)
