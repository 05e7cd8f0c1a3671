"""Gemma 2: norms on both sides of each block with gain 1 + w, alternating windows, softcaps, scaled embeddings."""

from __future__ import annotations

from dataclasses import replace

from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import HEADS, MLP, TRUNK, activation, llama_like

NAMES = TRUNK | MLP | HEADS | {
    "model.layers.{layer}.post_attention_layernorm.weight": "attention_out_norm",
    "model.layers.{layer}.pre_feedforward_layernorm.weight": "mlp_norm",
    "model.layers.{layer}.post_feedforward_layernorm.weight": "mlp_out_norm",
}  # fmt: skip


def gemma_like(fields: Fields, *, pattern: int) -> DecoderConfig:
    """What Gemma 2 and 3 share. pattern: every how-manyth layer reads everything, where `layer_types` is not given."""
    fields.fixed(use_bidirectional_attention=False)
    # hidden_act is the older name, and what old files say there (gelu) was always computed as the tanh approximation.
    kind = activation(fields, "hidden_activation", default="gelu_pytorch_tanh")
    fields.idle("hidden_act")
    common = llama_like(fields, tied=True, head_dim=256)
    layers = common.num_layers
    window = fields.whole("sliding_window", default=4096)
    kinds = fields.take("layer_types", default=None) or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"{fields.where}: layer_types must name sliding_attention or full_attention {layers} times")
    bias = bool(fields.take("attention_bias", default=False))
    return replace(
        common,
        norm=replace(common.norm, offset=1.0),
        activation=kind,
        windows=tuple(window if name == "sliding_attention" else None for name in kinds),
        attention_scale=fields.number("query_pre_attn_scalar", default=256) ** -0.5,
        block="sandwich",
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=common.hidden_size**0.5,
    )


def softcap(fields: Fields, name: str, default: float) -> float | None:
    """A cap; null switches it off, absence means the family's own."""
    return None if name in fields.config and fields.take(name, default=None) is None else fields.number(
        name, default=default
    )  # fmt: skip


def _read(fields: Fields) -> DecoderConfig:
    return replace(
        gemma_like(fields, pattern=2),
        attention_softcap=softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=softcap(fields, "final_logit_softcapping", 30.0),
    )


FAMILY = Family(
    title="Gemma 2",
    features="softcaps, alternating windows, (1 + w) sandwich norms, scaled embeddings",
    examples="Gemma 2 2B, 9B, 27B",
    causal_lm="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    read=_read,
    names=NAMES,
    prefix="model.",
)
