"""OPT: layer norms with biases, learned positions that start in row 2, ReLU; 350m normalises after and projects."""

from __future__ import annotations

from diptych.families.decoder import DecoderConfig, Norm
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.llama import activation

_LAYER = "model.decoder.layers.{layer}."
_LINES = {
    "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value", "self_attn.out_proj": "output",
    "self_attn_layer_norm": "attention_norm", "fc1": "up", "fc2": "down", "final_layer_norm": "mlp_norm",
}  # fmt: skip


def both(lines: dict[str, str], prefix: str) -> dict[str, str]:
    """A weight's and a bias's line for each module."""
    return {f"{prefix}{module}.weight": slot for module, slot in lines.items()} | {
        f"{prefix}{module}.bias": f"{slot}_bias" for module, slot in lines.items()
    }


def _read(fields: Fields) -> DecoderConfig:
    width, layers = fields.whole("hidden_size"), fields.whole("num_hidden_layers")
    heads = fields.whole("num_attention_heads")
    before = bool(fields.take("do_layer_norm_before", default=True))
    fields.fixed(enable_bias=True, layer_norm_elementwise_affine=True, layerdrop=0.0)
    no_final_norm = bool(fields.take("_remove_final_layer_norm", default=False))
    return DecoderConfig(
        family="opt",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        embedding_size=fields.whole("word_embed_proj_dim", default=width),
        intermediate_size=fields.whole("ffn_dim"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=fields.whole("max_position_embeddings"),
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=True)),
        initializer_range=fields.number("init_std", default=0.02),
        norm=Norm(kind="layer", eps=1e-5),  # nn.LayerNorm's, which OPT takes
        activation=activation(fields, "activation_function", default="relu"),
        gated=False,
        windows=(None,) * layers,
        attention_scale=(width // heads) ** -0.5,
        block="pre" if before else "post",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        position_offset=2,
        final_norm=before and not no_final_norm,
    )


FAMILY = Family(
    title="OPT",
    features="learned positions, LayerNorm, ReLU; 350m's norm after and projected embeddings",
    examples="OPT-125m to 66b",
    causal_lm="OPTForCausalLM",
    classifier="OPTForSequenceClassification",
    read=_read,
    names={
        "model.decoder.embed_tokens.weight": "embedding",
        "model.decoder.embed_positions.weight": "positions",
        "model.decoder.project_in.weight": "project_in",
        "model.decoder.project_out.weight": "project_out",
    }
    | both(_LINES, _LAYER)
    | both({"final_layer_norm": "final_norm"}, "model.decoder.")
    | {"lm_head.weight": "head"},
    prefix="model.",
    dropouts=("dropout", "attention_dropout", "activation_dropout"),
)
