"""GPT-2: fused QKV in Conv1D's layout ([inputs, outputs]), learned positions, tanh-approximated GELU."""

from __future__ import annotations

from diptych.families.decoder import DecoderConfig, Norm
from diptych.families.family import Family, Line
from diptych.families.fields import Fields
from diptych.families.llama import activation
from diptych.families.opt import both

_LAYER = "transformer.h.{layer}."


def _read(fields: Fields) -> DecoderConfig:
    width, layers = fields.whole("n_embd", "hidden_size"), fields.whole("n_layer", "num_hidden_layers")
    heads = fields.whole("n_head", "num_attention_heads")
    fields.fixed(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
        add_cross_attention=False,
    )  # fmt: skip
    fields.idle(*(name for name in fields.config if name.startswith("summary_")), "n_ctx")
    return DecoderConfig(
        family="gpt2",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        embedding_size=width,
        intermediate_size=fields.whole("n_inner", default=4 * width),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=fields.whole("n_positions", "max_position_embeddings"),
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=True)),
        initializer_range=fields.number("initializer_range", default=0.02),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_epsilon", default=1e-5)),
        activation=activation(fields, "activation_function", default="gelu_new"),
        gated=False,
        windows=(None,) * layers,
        attention_scale=(width // heads) ** -0.5,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        position_offset=0,
    )


FAMILY = Family(
    title="GPT-2",
    features="fused Conv1D projections, learned positions, LayerNorm, tanh GELU",
    examples="GPT-2 small to XL, DistilGPT2",
    causal_lm="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    read=_read,
    names={
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "positions",
        **both({"ln_1": "attention_norm", "ln_2": "mlp_norm"}, _LAYER),
        _LAYER + "attn.c_attn.weight": Line(("query", "key", "value"), "d (c n h) -> (c n h) d"),
        _LAYER + "attn.c_attn.bias": ("query_bias", "key_bias", "value_bias"),
        _LAYER + "attn.c_proj.weight": Line(("output",), "(n h) d -> d (n h)"),
        _LAYER + "attn.c_proj.bias": "output_bias",
        _LAYER + "mlp.c_fc.weight": Line(("up",), "d f -> f d"),
        _LAYER + "mlp.c_fc.bias": "up_bias",
        _LAYER + "mlp.c_proj.weight": Line(("down",), "f d -> d f"),
        _LAYER + "mlp.c_proj.bias": "down_bias",
        **both({"ln_f": "final_norm"}, "transformer."),
        "lm_head.weight": "head",
    },
    prefix="transformer.",
    derived=(".attn.bias", ".attn.masked_bias"),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
)
