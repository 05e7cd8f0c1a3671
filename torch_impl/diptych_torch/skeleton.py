"""The transformers model of a config.json, without weights, with every choice that transformers would make made here.

What is replaced: dropout is 0, attention and experts are our own functions, rotary modules take the hinge's
frequencies, Gemma's embedding scale is exact in any precision, BLOOM's GELU is differentiated by autograd. What is
checked: parameters, rotary frequencies, activations, norms, scales, caps and routing are those that the hinge reads
from the same config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

from diptych.engine import Head
from diptych.errors import UserError
from diptych.families.decoder import GELU_SCALES, DecoderConfig
from diptych.families.family import ModelConfig, family
from diptych.families.fields import IDLE
from diptych_torch import attention, experts, recurrent  # noqa: F401 (recurrent registers the RNN)
from diptych_torch.names import parameters
from diptych_torch.rotary import Rotary, check_frequencies


class BloomGelu(nn.Module):
    """BLOOM's GELU with its true gradient; transformers' own backward pass has constants of nine digits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bloom_gelu_forward(x)


def skeleton(
    config: Mapping[str, Any], model: ModelConfig, head: Head, dtype: torch.dtype, device: torch.device
) -> Any:
    """The model on the `meta` device (so nothing is initialised or drawn); its few buffers are on `device`.

    Raises UserError where transformers would compute something else from config.json than `model` says.
    """
    transformers_config = AutoConfig.for_model(config["model_type"], **_settings(config, model, head))
    classes = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    # BLOOM has its own attention, which adds ALiBi and the mask; a recurrent model has none.
    options = {"attn_implementation": "eager" if model.family in ("bloom", "rnn") else attention.NAME}
    if isinstance(model, DecoderConfig) and model.experts is not None:
        options["experts_implementation"] = experts.NAME
    with torch.device("meta"):
        transformer = cast(Any, classes).from_config(transformers_config, dtype=dtype, **options)
    expected = {name: parameter.shape for name, parameter in parameters(model, head).items()}
    actual = {name: tuple(weight.shape) for name, weight in transformer.named_parameters()}
    if actual != expected:
        different = sorted(dict(expected.items() ^ actual.items()))
        raise UserError(f"config.json: transformers builds other tensors from it than Diptych: {', '.join(different)}")
    if isinstance(model, DecoderConfig):
        _settle(transformer, model, dtype, device)
    left = [name for name, buffer in transformer.named_buffers() if buffer.is_meta]
    assert not left, f"{model.family}: buffers without numbers: {left}"
    return transformer


def trunk_of(transformer: Any) -> Any:
    """Embedding, layers and last norm of a transformers model, without its head."""
    return getattr(transformer, transformer.base_model_prefix)


def layer_types(transformer: Any) -> list[str] | None:
    """What kind of attention each layer has by transformers' own account, in families that say so."""
    return getattr(transformer.config, "layer_types", None)


def _settings(config: Mapping[str, Any], model: ModelConfig, head: Head) -> dict[str, Any]:
    """config.json as arguments of the transformers config."""
    settings = {name: value for name, value in config.items() if name not in IDLE}
    # Embeddings of a pad token are weights like any other: with its id here their gradient would be cut out.
    settings |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    settings["tie_word_embeddings"] = model.tie_word_embeddings
    settings |= dict.fromkeys(family(model.family).dropouts, 0.0)
    if isinstance(model, DecoderConfig) and model.experts is not None:
        settings["output_router_logits"] = False  # we collect them ourselves
    return settings | ({"num_labels": 1} if head == "scalar" else {})


def _settle(transformer: Any, model: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Replace and check, in place."""
    trunk = trunk_of(transformer)
    if model.ropes:
        types = layer_types(transformer) or []
        rope_of_type = dict(zip(types, model.rope_of_layer, strict=False))
        check_frequencies(trunk.rotary_emb, model.ropes, rope_of_type)
        trunk.rotary_emb = Rotary(model.ropes, rope_of_type, device)
    embedding = transformer.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # a float32 number in transformers
        embedding.embed_scale = torch.tensor(model.embedding_scale, dtype=dtype, device=device)
    elif model.embedding_scale != 1.0:
        raise UserError("config.json: transformers does not scale this family's embeddings, Diptych does")
    for module in list(trunk.modules()):
        if hasattr(module, "gelu_impl"):
            module.gelu_impl = BloomGelu()
    _check_numbers(trunk, model)
    _check_activation(trunk, model)


def _check_numbers(trunk: Any, model: DecoderConfig) -> None:
    """Raise UserError where a number that a module of transformers holds is not the hinge's."""
    expected: dict[str, Any] = {
        "eps": model.norm.eps,
        "variance_epsilon": model.norm.eps,
        "scaling": model.attention_scale,
        "inv_norm_factor": model.attention_scale,
        "attn_logit_softcapping": model.attention_softcap,
    }
    if model.experts is not None:
        expected |= {"top_k": model.experts.top_k, "norm_topk_prob": model.experts.normalized}
    for name, module in trunk.named_modules():
        for attribute, ours in expected.items():
            theirs = getattr(module, attribute, ours)
            if theirs != ours and not (theirs and ours and math.isclose(theirs, ours, rel_tol=1e-15)):
                raise UserError(f"config.json: {attribute} of {name} is {theirs} in transformers, {ours} in Diptych")


def _check_activation(trunk: Any, model: DecoderConfig) -> None:
    """Raise UserError where transformers computes another activation than the hinge names (there are four GELUs)."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    if model.activation in GELU_SCALES:
        expected = x / 2 * (1 + torch.tanh(GELU_SCALES[model.activation] * (x + 0.044715 * x**3)))
    else:
        expected = {"silu": nn.functional.silu, "relu": torch.relu, "gelu": nn.functional.gelu}[model.activation](x)
    for name, module in trunk.named_modules():
        for attribute in ("act_fn", "activation_fn", "act", "gelu_impl"):
            function = getattr(module, attribute, None)
            if function is not None and not torch.allclose(function(x), expected, rtol=1e-13, atol=1e-13):
                raise UserError(f"config.json: {attribute} of {name} is not {model.activation} in transformers")
