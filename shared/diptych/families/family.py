"""A family: how its config.json reads, and which tensor of a checkpoint fills which slots of the model. The registry.

A tensor's line in the map is

    "model.layers.{layer}.self_attn.q_proj.weight": "query"                       one slot
    "model.layers.{layer}.self_attn.qkv_proj.weight": ("query", "key", "value")   several, one after another

Slots are concatenated on the first axis of the canonical layout ([outputs, inputs] for linear layers); a `Line` adds an
einops pattern for a checkpoint whose layout is another. Lines whose slots a config does not have (a bias, an untied
head) fall away; every slot that it has must be filled exactly once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from einops import rearrange

from diptych.engine import Head
from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig, Slot, pattern_shape, slots
from diptych.families.fields import Fields
from diptych.families.recurrent import RecurrentConfig
from diptych.families.recurrent import slots as recurrent_slots

ModelConfig = DecoderConfig | RecurrentConfig
# Where each model_type is read, in the order of the README's table.
MODULES: Mapping[str, str] = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "mixtral": "mixtral", "qwen3_moe": "qwen3_moe",
    "opt": "opt", "gpt2": "gpt2", "gpt_neox": "gpt_neox", "bloom": "bloom", "rnn": "rnn",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Slots of one tensor, and an einops pattern from the checkpoint's layout to the canonical one. Its axes are those
    of `model_slots`, and c: the number of slots."""

    slots: tuple[str, ...]
    order: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry. title, features, examples: for the table of families.

    read: the fields of a config.json -> what the model computes. names: tensor name in the checkpoint -> slots;
    `{layer}` and `{expert}` stand for numbers. prefix: of the trunk's tensor names, which some files leave out.
    derived: endings of tensors that old files carry and that config.json determines. dropouts: fields that both engines
    set to 0. causal_lm, classifier: transformers' class names.
    """

    title: str
    features: str
    examples: str
    causal_lm: str
    classifier: str
    read: Callable[[Fields], Any]
    names: Mapping[str, str | tuple[str, ...] | Line]
    prefix: str
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)
    dropouts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One tensor of a checkpoint (for every layer and expert): its name, shape, slots, and the way there and back.

    order: pattern from the checkpoint's layout to the canonical one, "" where they are the same. rows: how many rows of
    the canonical layout each slot takes.
    """

    name: str
    shape: tuple[int, ...]
    slots: tuple[str, ...]
    rows: tuple[int, ...]
    order: str
    axes: tuple[tuple[str, int], ...]
    per_layer: bool
    per_expert: bool

    def split(self, array: Any, table: Mapping[str, Slot]) -> dict[str, Any]:
        """The slots' arrays, in the model's layout, of this tensor (NumPy, JAX or torch)."""
        if self.order:
            array = rearrange(array, self.order, **dict(self.axes))
        parts, start = {}, 0
        for name, rows in zip(self.slots, self.rows, strict=True):
            piece = array[start : start + rows] if len(self.slots) > 1 else array
            parts[name] = rearrange(piece, table[name].pattern, **table[name].sizes_of_pattern)
            start += rows
        return parts

    def fuse(self, parts: Mapping[str, np.ndarray], table: Mapping[str, Slot]) -> np.ndarray:
        """The inverse of `split`."""
        pieces = [rearrange(parts[name], table[name].inverse, **table[name].sizes_of_pattern) for name in self.slots]
        array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if self.order:
            left, right = self.order.split("->")
            array = rearrange(array, f"{right} -> {left}", **dict(self.axes))
        return np.ascontiguousarray(array)

    def names(self, config: Any, layer: int | None = None) -> list[str]:
        """The tensors of a layer (None where the rule is not per layer): one, or one for every expert in order."""
        experts = range(config.experts.count) if self.per_expert else [None]
        return [self.name.format(layer=layer, expert=expert) for expert in experts]

    def layers(self, config: Any) -> list[int | None]:
        """The layers that have such a tensor; [None] where the rule is not per layer."""
        return list(range(config.num_layers)) if self.per_layer else [None]


def supported_families() -> tuple[str, ...]:
    """Every model_type that is read."""
    return tuple(MODULES)


@lru_cache
def family(model_type: str) -> Family:
    """The entry of a model_type."""
    return importlib.import_module(f"diptych.families.{MODULES[model_type]}").FAMILY


def read_model(config: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """What a config.json says the model computes.

    Raises UserError for a family that is not supported, a missing field, one that is not understood, or a setting that
    is not computed.
    """
    model_type = config.get("model_type")
    if model_type not in MODULES:
        hint = " (its text model, gemma3_text, is)" if model_type == "gemma3" else ""
        raise UserError(
            f"{where}: model_type is {model_type!r}{hint}; supported families: {', '.join(supported_families())}"
        )
    entry = family(model_type)
    fields = Fields(config, where)
    fields.idle(*entry.dropouts)
    model = entry.read(fields)
    fields.finish()
    return model


def model_slots(config: ModelConfig, head: Head) -> dict[str, Slot]:
    """Every parameter of the model, by name."""
    return recurrent_slots(config, head) if isinstance(config, RecurrentConfig) else slots(config, head)


@lru_cache(maxsize=64)
def tensor_rules(config: ModelConfig, head: Head) -> tuple[TensorRule, ...]:
    """The map between checkpoint and model: every slot is filled by exactly one line."""
    entry, table = family(config.family), model_slots(config, head)
    sizes = {axis: size for slot in table.values() for axis, size in slot.axes}
    rules = []
    for name, held in (dict(entry.names) | {"score.weight": "score"}).items():
        line = held if isinstance(held, Line) else Line((held,) if isinstance(held, str) else held, "")
        present = [one for one in line.slots if one in table]
        if not present:
            continue
        assert len(present) == len(line.slots), f"{name} is only partly a tensor of this {config.family}"
        rows = tuple(table[one].canonical[0] for one in line.slots)
        shape = (sum(rows), *table[present[0]].canonical[1:])
        axes: dict[str, int] = {}
        if line.order:
            known = sizes | {"c": len(rows)}
            axes = {axis: known[axis] for axis in sorted(set(line.order) & known.keys())}
            shape = pattern_shape(line.order.split("->")[0], axes)
        rules.append(
            TensorRule(
                name=name, shape=shape, slots=line.slots, rows=rows, order=line.order, axes=tuple(axes.items()),
                per_layer="{layer}" in name, per_expert="{expert}" in name,
            )
        )  # fmt: skip
    filled = [one for rule in rules for one in rule.slots]
    assert sorted(filled) == sorted(table), f"{config.family}: slots and tensors do not match one to one"
    return tuple(rules)


@lru_cache(maxsize=16)
def tensor_places(config: ModelConfig, head: Head) -> dict[str, tuple[TensorRule, int | None, int]]:
    """Where every tensor of a checkpoint belongs: its rule, layer (None: not per layer) and expert (0: not per expert);
    not to be changed."""
    return {
        name: (rule, layer, expert)
        for rule in tensor_rules(config, head)
        for layer in rule.layers(config)
        for expert, name in enumerate(rule.names(config, layer))
    }


def tensor_shapes(config: ModelConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this head, with its shape; the order is the checkpoint's."""
    rules = tensor_rules(config, head)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (None, *range(config.num_layers)):
        for rule in rules:
            if rule.per_layer == (layer is not None):
                shapes |= dict.fromkeys(rule.names(config, layer), rule.shape)
    return shapes


def initial_value(config: ModelConfig, rule: TensorRule) -> float | None:
    """The value of a new model's tensor where it is a constant (norms gain 1, biases 0); None where it is drawn."""
    name = rule.slots[0]
    if name.endswith("_bias"):
        return 0.0
    if name.endswith("norm"):
        return 1.0 - config.norm.offset if isinstance(config, DecoderConfig) else 1.0
    return None


def position_limit(config: ModelConfig) -> int | None:
    """How many positions there are a table's rows for; None where positions are computed."""
    if isinstance(config, DecoderConfig):
        if config.position_offset is not None:
            return config.max_position_embeddings
        if any(rope.kind == "dynamic" for rope in config.ropes):
            return min(rope.reach for rope in config.ropes)
    return None


def check_positions(config: ModelConfig, positions: np.ndarray) -> None:
    """Raise ValueError for a position without a row (an accelerator would crash or read another row)."""
    limit = position_limit(config)
    if limit is not None and positions.size and positions.max() >= limit:
        raise ValueError(f"positions must be in 0..{limit - 1}, got {positions.max()}")


def check_reach(config: ModelConfig, *, prompt: int, new: int) -> None:
    """Raise UserError where `new` tokens after a prompt of `prompt` cannot be decoded: positions run out, or rotary
    frequencies that depend on the length of the sequence would turn the keys that are already cached."""
    text = f"max_new_tokens {new} after a prompt of {prompt} tokens"
    limit = position_limit(config)
    if limit is not None and prompt + new > limit:
        raise UserError(f"{text} would pass the model's {limit} positions; shorten one of them")
    for rope in config.ropes if isinstance(config, DecoderConfig) else ():
        if rope.by_length and prompt + new > rope.original_max_position_embeddings:
            raise UserError(
                f"{text} would pass {rope.original_max_position_embeddings} tokens, beyond which the {rope.kind} RoPE "
                "of this model has other frequencies; text is not generated across that length: shorten one of them"
            )
