"""Qwen 3 MoE: Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig, Experts
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, TRUNK, llama_like


def _read(fields: Fields) -> DecoderConfig:
    common = llama_like(fields)
    # Layers with a plain MLP among the others: no published model has them.
    fields.fixed(decoder_sparse_step=1, mlp_only_layers=[])
    used = fields.take("use_sliding_window", default=False)
    window = fields.take("sliding_window", default=4096)
    fields.idle("max_window_layers")
    bias = bool(fields.take("attention_bias", default=False))
    balanced = fields.take("output_router_logits", default=False)
    experts = Experts(
        count=fields.whole("num_experts", "num_local_experts", default=128),
        top_k=fields.whole("num_experts_per_tok", default=8),
        inner=fields.whole("moe_intermediate_size", default=768),
        normalized=bool(fields.take("norm_topk_prob", default=False)),
        balance_coef=fields.number("router_aux_loss_coef", default=0.001) if balanced else 0.0,
    )
    return replace(
        common,
        windows=(window if used else None,) * common.num_layers,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        experts=experts,
    )


FAMILY = Family(
    title="Qwen 3 MoE",
    features="mixture of experts, balance loss, QK norm",
    examples="Qwen3-30B-A3B, Qwen3-235B-A22B",
    causal_lm="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    read=_read,
    names=TRUNK
    | {
        "model.layers.{layer}.mlp.gate.weight": "router",
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": "gate",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": "up",
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": "down",
    }
    | HEADS,
    prefix="model.",
)
