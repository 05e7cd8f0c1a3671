"""GPT-NeoX and Pythia: attention and MLP in parallel, QKV interleaved by head, rotary positions on part of a head."""

from __future__ import annotations

from diptych.families.decoder import DecoderConfig, Norm
from diptych.families.family import Family, Line
from diptych.families.fields import Fields
from diptych.families.llama import activation
from diptych.families.opt import both
from diptych.families.rope import parse_rope

_LAYER = "gpt_neox.layers.{layer}."
_LINES = {
    "input_layernorm": "attention_norm", "attention.dense": "output", "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down",
}  # fmt: skip


def _read(fields: Fields) -> DecoderConfig:
    width, layers = fields.whole("hidden_size"), fields.whole("num_hidden_layers")
    heads = fields.whole("num_attention_heads")
    limit = fields.whole("max_position_embeddings")
    share = fields.number("partial_rotary_factor", "rotary_pct", default=0.25)
    theta = fields.number("rope_theta", "rotary_emb_base", default=10000.0)
    settings = {"partial_rotary_factor": share} | dict(fields.take("rope_parameters", "rope_scaling", default={}))
    rope = parse_rope(settings, where=fields.where, theta=theta, head_dim=width // heads, limit=limit)
    fields.fixed(is_decoder=fields.config.get("is_decoder") or False)
    bias = bool(fields.take("attention_bias", default=True))
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        embedding_size=width,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=rope.reach,
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=False)),
        initializer_range=fields.number("initializer_range", default=0.02),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_eps", default=1e-5)),
        activation=activation(fields, "hidden_act", default="gelu"),
        gated=False,
        windows=(None,) * layers,
        attention_scale=(width // heads) ** -0.5,
        block="parallel" if fields.take("use_parallel_residual", default=True) else "pre",
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        ropes=(rope,),
        rope_of_layer=(0,) * layers,
    )


FAMILY = Family(
    title="GPT-NeoX",
    features="parallel blocks, interleaved QKV, partial RoPE, LayerNorm",
    examples="Pythia 14M to 12B, GPT-NeoX-20B",
    causal_lm="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    read=_read,
    names={
        "gpt_neox.embed_in.weight": "embedding",
        **both(_LINES, _LAYER),
        _LAYER + "attention.query_key_value.weight": Line(("query", "key", "value"), "(n c h) d -> (c n h) d"),
        _LAYER + "attention.query_key_value.bias": Line(("query_bias", "key_bias", "value_bias"), "(n c h) -> (c n h)"),
        **both({"final_layer_norm": "final_norm"}, "gpt_neox."),
        "embed_out.weight": "head",
    },
    prefix="gpt_neox.",
    derived=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    dropouts=("hidden_dropout", "attention_dropout"),
)
