"""Llama 2, 3, 3.1, 3.2 and what shares their code: SmolLM, TinyLlama, Yi. The pattern for the families after it."""

from __future__ import annotations

from dataclasses import replace

from diptych.errors import UserError
from diptych.families.decoder import ACTIVATIONS, Activation, DecoderConfig, Norm
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.rope import parse_rope

TRUNK = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.{layer}.input_layernorm.weight": "attention_norm",
    "model.layers.{layer}.self_attn.q_proj.weight": "query",
    "model.layers.{layer}.self_attn.q_proj.bias": "query_bias",
    "model.layers.{layer}.self_attn.k_proj.weight": "key",
    "model.layers.{layer}.self_attn.k_proj.bias": "key_bias",
    "model.layers.{layer}.self_attn.v_proj.weight": "value",
    "model.layers.{layer}.self_attn.v_proj.bias": "value_bias",
    "model.layers.{layer}.self_attn.o_proj.weight": "output",
    "model.layers.{layer}.self_attn.o_proj.bias": "output_bias",
    "model.layers.{layer}.self_attn.q_norm.weight": "query_norm",
    "model.layers.{layer}.self_attn.k_norm.weight": "key_norm",
    "model.layers.{layer}.post_attention_layernorm.weight": "mlp_norm",
}
MLP = {
    "model.layers.{layer}.mlp.gate_proj.weight": "gate",
    "model.layers.{layer}.mlp.up_proj.weight": "up",
    "model.layers.{layer}.mlp.up_proj.bias": "up_bias",
    "model.layers.{layer}.mlp.down_proj.weight": "down",
    "model.layers.{layer}.mlp.down_proj.bias": "down_bias",
}
HEADS = {"model.norm.weight": "final_norm", "lm_head.weight": "head"}


def activation(fields: Fields, *names: str, default: str) -> Activation:
    """The activation that a field names. Raises UserError for one that is not computed."""
    name = fields.take(*names, default=default)
    if name not in ACTIVATIONS:
        raise UserError(f"{fields.where}: {names[0]} = {name!r} is not supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def llama_like(
    fields: Fields, *, theta: float = 10000.0, eps: float = 1e-6, tied: bool = False, head_dim: int | None = None
) -> DecoderConfig:
    """What Llama and its descendants share; each replaces what it does differently.

    theta, eps, tied, head_dim: the family's own values of fields that a config.json may leave out (head_dim None: the
    width shared out over the heads).
    """
    width, layers = fields.whole("hidden_size"), fields.whole("num_hidden_layers")
    heads = fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise UserError(
            f"{fields.where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    size = fields.whole("head_dim", default=head_dim or width // heads)
    limit = fields.whole("max_position_embeddings")
    share = fields.take("partial_rotary_factor", default=None)
    theta = fields.number("rope_theta", default=theta)
    settings = fields.take("rope_parameters", "rope_scaling", default={})
    rope = parse_rope(
        ({"partial_rotary_factor": share} if share is not None else {}) | dict(settings),
        where=fields.where,
        theta=theta,
        head_dim=size,
        limit=limit,
        original=fields.take("original_max_position_embeddings", default=None),
    )
    fields.fixed(attention_dropout=0.0)
    return DecoderConfig(
        family=fields.config["model_type"],
        vocab_size=fields.whole("vocab_size"),
        hidden_size=width,
        embedding_size=width,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        max_position_embeddings=rope.reach,
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=tied)),
        initializer_range=fields.number("initializer_range", default=0.02),
        norm=Norm(kind="rms", eps=fields.number("rms_norm_eps", default=eps)),
        activation=activation(fields, "hidden_act", default="silu"),
        windows=(None,) * layers,
        attention_scale=size**-0.5,
        ropes=(rope,),
        rope_of_layer=(0,) * layers,
    )


def _read(fields: Fields) -> DecoderConfig:
    fields.fixed(pretraining_tp=1, mlp_bias=False)  # mlp_bias would bias the gate too: no published model does
    bias = bool(fields.take("attention_bias", default=False))
    return replace(llama_like(fields), attention_bias=bias, output_bias=bias)


FAMILY = Family(
    title="Llama 2, 3, 3.1, 3.2",
    features="GQA; linear, dynamic, llama3, yarn RoPE scaling",
    examples="Llama, SmolLM, SmolLM2, TinyLlama, Yi",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    read=_read,
    names=TRUNK | MLP | HEADS,
    prefix="model.",
)
