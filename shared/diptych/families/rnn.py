"""The Elman recurrent language model, a family of our own: `"model_type": "rnn"`."""

from __future__ import annotations

from diptych.errors import UserError
from diptych.families.family import Family
from diptych.families.fields import Fields
from diptych.families.recurrent import RecurrentConfig


def _read(fields: Fields) -> RecurrentConfig:
    nonlinearity = fields.take("nonlinearity", default="tanh")
    if nonlinearity not in ("tanh", "relu"):
        raise UserError(f"{fields.where}: nonlinearity = {nonlinearity!r} is not supported: tanh, relu")
    return RecurrentConfig(
        family="rnn",
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        num_layers=fields.whole("num_hidden_layers"),
        nonlinearity=nonlinearity,
        tie_word_embeddings=bool(fields.take("tie_word_embeddings", default=False)),
        initializer_range=fields.number("initializer_range", default=0.02),
        max_position_embeddings=fields.whole("max_position_embeddings", default=4096),
    )


FAMILY = Family(
    title="Elman RNN",
    features="recurrent state instead of a cache; tanh or ReLU",
    examples="trained from scratch",
    causal_lm="RNNForCausalLM",
    classifier="RNNForSequenceClassification",
    read=_read,
    names={
        "model.embed_tokens.weight": "embedding",
        "model.layers.{layer}.input.weight": "input",
        "model.layers.{layer}.recurrent.weight": "recurrent",
        "model.layers.{layer}.recurrent.bias": "recurrent_bias",
        "lm_head.weight": "head",
        "lm_head.bias": "head_bias",
    },
    prefix="model.",
)
