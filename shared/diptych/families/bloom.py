"""BLOOM: ALiBi, QKV interleaved by head, a norm on the embeddings, tanh-approximated GELU."""

from __future__ import annotations

from diptych.families.decoder import DecoderConfig, Norm
from diptych.families.family import Family, Line
from diptych.families.fields import Fields
from diptych.families.opt import both

_LAYER = "transformer.h.{layer}."
_LINES = {
    "input_layernorm": "attention_norm", "self_attention.dense": "output", "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down",
}  # fmt: skip


def _read(fields: Fields) -> DecoderConfig:
    width, layers = fields.whole("hidden_size", "n_embed"), fields.whole("n_layer", "num_hidden_layers")
    heads = fields.whole("n_head", "num_attention_heads")
    fields.fixed(apply_residual_connection_post_layernorm=False)
    # How Megatron trained it; transformers computes the same sum in another order where slow_but_exact is set.
    fields.idle("pretraining_tp", "slow_but_exact", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add",
                "skip_bias_add_qkv", "attention_softmax_in_fp32", "offset_alibi", "unk_token_id")  # fmt: skip
    return DecoderConfig(
        family="bloom",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        embedding_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        # ALiBi has no limit of its own; this is what the published models were trained on.
        max_position_embeddings=fields.whole("seq_length", "max_position_embeddings", default=2048),
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=True)),
        initializer_range=fields.number("initializer_range", default=0.02),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_epsilon", default=1e-5)),
        activation="gelu_bloom",
        gated=False,
        windows=(None,) * layers,
        attention_scale=(width // heads) ** -0.5,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        alibi=True,
        embedding_norm=True,
    )


FAMILY = Family(
    title="BLOOM",
    features="ALiBi, interleaved QKV, embedding norm",
    examples="BLOOM 560m to 176B, BLOOMZ",
    causal_lm="BloomForCausalLM",
    classifier="BloomForSequenceClassification",
    read=_read,
    names={
        "transformer.word_embeddings.weight": "embedding",
        **both({"word_embeddings_layernorm": "embedding_norm"}, "transformer."),
        **both(_LINES, _LAYER),
        _LAYER + "self_attention.query_key_value.weight": Line(("query", "key", "value"), "(n c h) d -> (c n h) d"),
        _LAYER + "self_attention.query_key_value.bias": Line(
            ("query_bias", "key_bias", "value_bias"), "(n c h) -> (c n h)"
        ),
        **both({"ln_f": "final_norm"}, "transformer."),
        "lm_head.weight": "head",
    },
    prefix="transformer.",
    dropouts=("hidden_dropout", "attention_dropout"),
)
