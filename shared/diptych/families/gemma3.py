"""Gemma 3 (text): Gemma 2 with QK norm instead of softcaps, and other rotary frequencies in windowed layers."""

from __future__ import annotations

from dataclasses import replace

from diptych.families.decoder import DecoderConfig
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.gemma2 import NAMES, gemma_like
from diptych.families.rope import parse_rope


def _read(fields: Fields) -> DecoderConfig:
    fields.fixed(attn_logit_softcapping=None)
    cap = fields.take("final_logit_softcapping", default=None)
    pattern = fields.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    nested = fields.config.get("rope_parameters") or {}
    local_theta = fields.number("rope_local_base_freq", default=10000.0)
    flat = {name: value for name, value in fields.config.items() if name != "rope_parameters"}
    whole, local = nested.get("full_attention"), nested.get("sliding_attention")
    inner = Fields(flat | ({"rope_parameters": whole} if whole else {"rope_parameters": nested}), fields.where)
    inner.idle(*(name for name in fields.config if name.endswith("pattern") or name == "rope_local_base_freq"))
    inner.idle("final_logit_softcapping", "attn_logit_softcapping")
    if inner.config.get("rope_theta") is None:
        inner.config = dict(inner.config) | {"rope_theta": 1_000_000.0}
    base = gemma_like(inner, pattern=pattern)
    inner.finish()
    fields.idle(*fields.config)
    sliding = parse_rope(
        {"rope_theta": local_theta} | dict(local or {}),
        where=fields.where,
        theta=local_theta,
        head_dim=base.head_dim,
        limit=base.max_position_embeddings,
    )
    return replace(
        base,
        qk_norm="head",
        logit_softcap=None if cap is None else float(cap),
        ropes=(*base.ropes, sliding),
        rope_of_layer=tuple(int(window is not None) for window in base.windows),
    )


FAMILY = Family(
    title="Gemma 3 (text)",
    features="QK norm, 5:1 windows with their own RoPE base, (1 + w) sandwich norms",
    examples="Gemma 3 270M, 1B",
    causal_lm="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    read=_read,
    names=NAMES,
    prefix="model.",
)
