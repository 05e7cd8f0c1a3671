"""`model.new` as the config.json of a new model, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from diptych.errors import UserError
from diptych.families.family import ModelConfig, family, read_model
from diptych.recipe.schema import NewModel

# What each family of `model.new` must be told, and what it takes besides (vocab_size: always).
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "llama": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings",
    ),
    "rnn": ("hidden_size", "num_hidden_layers", "max_position_embeddings"),
}  # fmt: skip
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "llama": ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
    "rnn": ("nonlinearity", "tie_word_embeddings", "initializer_range"),
}
FILLED_IN = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def new_model_config(new: NewModel) -> dict[str, Any]:
    """The config.json of a new model, still without the special tokens' ids. The fields must be in order."""
    if new.config is not None:
        return new.config | {"vocab_size": new.vocab_size}
    names = ("vocab_size", *REQUIRED[new.family], *OPTIONAL[new.family])
    fields = {name.name: getattr(new, name.name) for name in dataclasses.fields(new) if name.name in names}
    config = {"architectures": [family(new.family).causal_lm], "model_type": new.family, **fields}
    if new.family == "llama":
        theta = config.pop("rope_theta")
        config |= {
            "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_cache": True,
        }
    return config


def new_model(new: NewModel) -> ModelConfig:
    """What the new model computes. Raises UserError where its config says what no family understands."""
    return read_model(new_model_config(new), where="config.json")


def field_problems(new: NewModel) -> Iterator[tuple[str, str]]:
    """(field, message): required fields that are missing, and set ones that the family would ignore."""
    defaults = {field.name: field.default for field in dataclasses.fields(new) if field.name != "vocab_size"}
    changed = [name for name, default in defaults.items() if getattr(new, name) != default]
    if new.config is not None:
        for name in changed:
            if name != "config":
                yield name, "has no effect beside 'model.new.config', which describes the whole model; move it there"
        for name in FILLED_IN:
            if name in new.config:
                yield "config", f"holds {name}, which is filled in from the trained tokenizer; take it out"
        return
    missing = [name for name in REQUIRED[new.family] if getattr(new, name) is None]
    if missing:
        yield missing[0], f"is not set, and a new {new.family} model needs {', '.join(missing)}"
    for name in changed:
        if name not in ("family", *REQUIRED[new.family], *OPTIONAL[new.family]):
            yield name, f"has no effect in a {new.family} model; take it away"


def config_problem(new: NewModel) -> str | None:
    """What is wrong with `config`, read as a config.json; None where it is well."""
    try:
        new_model(new)
    except UserError as error:
        return str(error).removeprefix("config.json: ")
    return None
