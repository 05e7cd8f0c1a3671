"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig, Experts
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, TRUNK, llama_like


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields, theta=1_000_000.0, eps=1e-5)
    fields.fixed(router_jitter_noise=0.0)
    window = fields.take("sliding_window", default=None)
    balanced = fields.take("output_router_logits", default=False)
    experts = Experts(
        count=fields.whole("num_local_experts", "num_experts", default=8),
        top_k=fields.whole("num_experts_per_tok", default=2),
        inner=common.intermediate_size,
        normalized=True,
        balance_coef=fields.number("router_aux_loss_coef", default=0.001) if balanced else 0.0,
    )
    return replace(common, windows=(window,) * common.num_layers, experts=experts)


FAMILY = Family(
    title="Mixtral",
    features="mixture of experts, balance loss",
    examples="Mixtral 8x7B, 8x22B",
    causal_lm="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    read=_read,
    names=TRUNK
    | {
        "model.layers.{layer}.block_sparse_moe.gate.weight": "router",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": "gate",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": "up",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": "down",
    }
    | HEADS,
    prefix="model.",
)
