"""Traps that config.json, the tokenizer's files or the weights show. See `trap_finding` for what a check answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from diptych.errors import UserError
from diptych.parity.doctor.effects import dropouts
from diptych.parity.doctor.setups import Fact, Facts, Setup
from diptych.parity.doctor.trap_finding import (
    LOW,
    NOT_APPLICABLE,
    Answer,
    Finding,
    apart,
    last,
    model_type,
    only_ours,
    same,
    says,
    shown,
)
from diptych.weights.contents import read_contents, tied_copy_differs
from diptych.weights.files import DTYPES, StoredTensor, stored_tensors, tensor_files

_WITHOUT_ROPE = ("gpt2", "opt", "bloom", "rnn")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")
_NORMS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def activation(setup: Setup, other: Setup | None) -> Answer:
    """Left to the family's default, or under the name that Gemma's early files have wrong."""
    model = setup.model
    if model is None:
        return None
    kind = model_type(model)
    if kind in ("rnn", "bloom"):
        return NOT_APPLICABLE
    name = _field(model, _ACTIVATIONS)
    if name is None:
        key, value = _default_activation(kind)
        return [
            Finding(
                where=_file(model),
                found="names no activation: each library takes its own",
                instead=f'"{key}": "{value}"',
            )
        ]
    if kind.startswith("gemma") and name != "hidden_activation":
        found = f"{name} is {shown(model[name].value)}, which Gemma reads as the tanh approximation or not at all"
        return [Finding(where=model[name].where, found=found, instead='"hidden_activation": "gelu_pytorch_tanh"')]
    return []


def activations_differ(a: Setup, b: Setup) -> Answer:
    return _fields_differ(a, b, _ACTIVATIONS, "activation")


def norm_eps(setup: Setup, other: Setup | None) -> Answer:
    """Left to a default."""
    model = setup.model
    if model is None:
        return None
    kind = model_type(model)
    if kind in ("rnn", "opt"):
        return NOT_APPLICABLE
    if _field(model, _NORMS) is not None:
        return []
    layer_norms = {"gpt2": "layer_norm_epsilon", "bloom": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}
    key, value = (layer_norms[kind], 1e-5) if kind in layer_norms else ("rms_norm_eps", 1e-6)
    return [Finding(where=_file(model), found="gives no epsilon of the norms", instead=f'"{key}": {value}')]


def norm_eps_differ(a: Setup, b: Setup) -> Answer:
    return _fields_differ(a, b, _NORMS, "norm_eps")


def _fields_differ(a: Setup, b: Setup, names: Sequence[str], setting: str) -> Answer:
    """One field under any of its names, or the setting of a trainer that has it."""
    facts = []
    for setup in (a, b):
        name = None if setup.model is None else _field(setup.model, names)
        fact = setup.setting(setting)
        if name is not None and setup.model is not None and fact is None:
            fact = Fact(value=setup.model[name].value, where=setup.model[name].where, key=name)
        facts.append(fact)
    left, right = facts
    if left is None or right is None:
        return None
    return [] if same(left.value, right.value) else [apart(setting, left, right)]


def rope(setup: Setup, other: Setup | None) -> Answer:
    """The old spelling of scaled positions, which new versions read otherwise or not; tables of low precision."""
    precision = setup.setting("rope_precision")
    found = []
    if precision is not None and precision.value in LOW:
        found.append(says(precision, "rope_precision", "rope_precision: float32"))
    model = setup.model
    if model is None:
        return found if precision is not None else None
    if model_type(model) in _WITHOUT_ROPE:
        return NOT_APPLICABLE
    old = [key for key, fact in model.items() if key.startswith("rope_scaling") and fact.value is not None]
    old += [key for key in model if key == "rope_parameters.type"]
    if old:
        kind = next((model[key].value for key in old if key.endswith("type")), "default")
        found.append(
            Finding(
                where=model[old[0]].where,
                found=f"{old[0].split('.')[0]} has the spelling of transformers 4 (rope_scaling, type)",
                instead=f'"rope_parameters": {{"rope_type": "{kind}", "rope_theta": ..., ...}}',
            )
        )
    return found


def ids_in_range(setup: Setup, other: Setup | None) -> Answer:
    """Ids that the tokenizer makes, and those that config.json names, against the embeddings' rows."""
    model = setup.model
    if model is None or "vocab_size" not in model:
        return None
    size, found = model["vocab_size"], []
    sizes = {key: fact for key, fact in setup.facts.get("tokenizer", {}).items() if key.endswith("/vocab_size")}
    for fact in sizes.values():
        if fact.value > size.value:
            text = f"the tokenizer has {fact.value} ids, vocab_size is {size.value}"
            found.append(
                Finding(where=size.where, found=text, instead=f'"vocab_size": {fact.value} (and the rows for it)')
            )
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fact = model.get(key)
        ids = [] if fact is None else fact.value if isinstance(fact.value, list) else [fact.value]
        if fact is not None and any(isinstance(one, int) and not 0 <= one < size.value for one in ids):
            text = f"{key} is {shown(fact.value)}, vocab_size is {size.value}"
            found.append(Finding(where=fact.where, found=text, instead=f'"{key}": an id below {size.value}'))
    return found


def dropout(setup: Setup, other: Setup | None) -> Answer:
    """Of config.json, where a trainer other than ours would read it; of a trainer, always."""
    found = []
    stated = setup.setting("dropout")
    if stated is not None and stated.value:
        found.append(says(stated, "dropout", f"{last(stated.key or 'dropout')}: 0.0"))
    off = setup.setting("disable_dropout")
    for fields in setup.models.values():
        switched_off = off is not None and off.value is True and model_type(fields) != "opt"
        if only_ours(setup, other) or switched_off:
            continue
        for name in dropouts():
            fact = fields.get(name)
            if fact is not None and isinstance(fact.value, int | float) and fact.value > 0:
                found.append(Finding(where=fact.where, found=f"{name} is {fact.value}", instead=f'"{name}": 0.0'))
    return found if setup.models or stated is not None else None


def near_init(setup: Setup, other: Setup | None) -> Answer:
    """Gains all 1, biases all 0, matrices as wide as initializer_range: a comparison on them sees 9 bugs of 13."""
    recipe = setup.recipe
    if recipe is not None and recipe.model.new is not None:
        if "sft" in recipe.stages or (recipe.rl.policy_path is not None and recipe.stages == ("rl",)):
            return []
        fact = setup.get("recipe", "stages")
        where = str(setup.source) if fact is None else fact.where
        text = "a new model goes into rl or reward untrained"
        return [Finding(where=where, found=text, instead="stages: [sft, reward, rl], or model.path of a trained model")]
    if setup.directory is None or not any(setup.directory.glob("*.safetensors")):
        return None
    tensors = [one for file in tensor_files(setup.directory)[0] for one in stored_tensors(file) if one.kind in DTYPES]
    if not _looks_new(tensors, setup.model):
        return []
    text = "every gain is 1, every bias 0, matrices are as wide as initializer_range: weights as if never trained"
    return [
        Finding(
            where=str(setup.directory), found=text, instead="a trained model, or weights of standard deviation 0.15"
        )
    ]


def _looks_new(tensors: Sequence[StoredTensor], model: Facts | None) -> bool:
    vectors = [one for one in tensors if len(one.shape) == 1]
    for one in vectors:
        values = one.read(np.dtype(np.float64))
        if not (np.all(values == values[:1]) and values[0] in (0.0, 1.0)):
            return False
    fact = (model or {}).get("initializer_range")
    width = fact.value if fact is not None else 0.02
    matrices = [one for one in tensors if len(one.shape) == 2 and np.prod(one.shape) >= 256]
    spreads = [float(one.read(np.dtype(np.float64)).std()) for one in matrices[:8]]
    return bool(spreads) and all(abs(spread - width) < 0.1 * width for spread in spreads)


def tied_copies(setup: Setup, other: Setup | None) -> Answer:
    """An output projection stored beside tied embeddings, with other numbers."""
    model = setup.model
    if model is None or setup.directory is None or not any(setup.directory.glob("*.safetensors")):
        return None
    try:
        contents = read_contents(setup.directory)
        different = None if contents.problems else tied_copy_differs(contents)
    except UserError:
        return None
    if different is None:
        return []
    tie = model.get("tie_word_embeddings")
    where = _file(model) if tie is None else tie.where
    return [Finding(where=where, found=different, instead='"tie_word_embeddings": false, or store only one of the two')]


def pad_is_eos(setup: Setup, other: Setup | None) -> Answer:
    """Only where masks are made from ids: padding that is known by its length may be any token."""
    masks = setup.setting("masks_from")
    if masks is not None and masks.value != "ids":
        return []
    for pad, ends in _special_tokens(setup):
        if pad.value in (ends.value if isinstance(ends.value, list) else [ends.value]):
            if masks is None:
                return None
            text = f"pad_token_id is {pad.value}, an end-of-sequence token, and masks are made from ids"
            return [
                Finding(
                    where=pad.where, found=text, instead='"pad_token_id": a token of its own, or masks from lengths'
                )
            ]
    return [] if any(_special_tokens(setup)) else None


def _special_tokens(setup: Setup) -> Iterator[tuple[Fact, Fact]]:
    """(padding, end of sequence) of every role, of config.json and of the tokenizer."""
    for fields in setup.models.values():
        if fields.get("pad_token_id") is not None and fields.get("eos_token_id") is not None:
            pad = fields["pad_token_id"]
            if pad.value is not None:
                yield pad, fields["eos_token_id"]
    known = setup.facts.get("tokenizer", {})
    for key, pad in known.items():
        ends = known.get(f"{key.split('/')[0]}/eos_token_ids")
        if key.endswith("/pad_token_id") and ends is not None and pad.value is not None:
            yield pad, ends


def _field(model: Facts, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in model and model[name].value is not None), None)


def _file(model: Facts) -> str:
    """The file that any of the fields stands in."""
    where = next(iter(model.values())).where
    return re.sub(r"(:\d+|: [^/]*)$", "", where)


def _default_activation(kind: str) -> tuple[str, str]:
    if kind.startswith("gemma"):
        return "hidden_activation", "gelu_pytorch_tanh"
    known = {
        "gpt2": ("activation_function", "gelu_new"), "opt": ("activation_function", "relu"),
        "gpt_neox": ("hidden_act", "gelu"),
    }  # fmt: skip
    return known.get(kind, ("hidden_act", "silu"))
