"""Low-rank adapters (LoRA, Hu et al. 2022) in PEFT's names: which linear layers they sit on, their shapes and starts.

An adapter of a linear layer is A [rank, inputs] and B [outputs, rank]; its weight becomes W + alpha / rank B A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diptych import random
from diptych.engine import AdapterSpec, Tensors
from diptych.errors import UserError
from diptych.families.family import ModelConfig, TensorRule, tensor_rules

PREFIX = "base_model.model."
SCORE = PREFIX + "score.weight"  # a scalar head is trained whole beside an adapter (PEFT's modules_to_save)


@dataclass(frozen=True, kw_only=True)
class AdapterRule:
    """The adapters of one kind of linear layer. transposed: the checkpoint holds [inputs, outputs] (GPT-2's Conv1D)."""

    rule: TensorRule
    inputs: int
    outputs: int
    transposed: bool

    @property
    def module(self) -> str:
        """The end of the module's name, after its layer."""
        return self.rule.name.removesuffix(".weight").split("{layer}.")[-1]

    def names(self, layer: int) -> tuple[str, str]:
        """PEFT's names of A and B."""
        module = self.rule.name.format(layer=layer).removesuffix(".weight")
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def linear_rules(config: ModelConfig) -> Iterator[AdapterRule]:
    """Every linear layer of the trunk that can carry an adapter: not the router, not the experts, not the heads."""
    for rule in tensor_rules(config, "lm"):
        if rule.per_layer and not rule.per_expert and len(rule.shape) == 2 and rule.slots != ("router",):
            left, right = rule.order.split("->") if rule.order else ("", " ")
            transposed = bool(rule.order) and _words(left)[0] == _words(right)[-1]
            outputs, inputs = rule.shape[::-1] if transposed else rule.shape
            yield AdapterRule(rule=rule, inputs=inputs, outputs=outputs, transposed=transposed)


def _words(side: str) -> list[str]:
    """The axes of one side of a pattern, groups whole."""
    words, group = [], ""
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" or group:
            group += word + " "
            if word == ")":
                words.append(group)
                group = ""
        else:
            words.append(word)
    return words


def adapter_rules(config: ModelConfig, spec: AdapterSpec) -> list[AdapterRule]:
    """The linear layers that `spec.targets` names. Raises UserError where a target names none."""
    if spec.rank < 1:
        raise UserError(f"adapter.rank = {spec.rank} must be at least 1")
    rules = list(linear_rules(config))
    chosen: list[AdapterRule] = []
    for target in spec.targets:
        found = [one for one in rules if target == "all-linear" or _matches(one, target)]
        if not found:
            modules = sorted(one.module for one in rules)
            raise UserError(f"adapter.targets: {target!r} names no linear layer of this model: {', '.join(modules)}")
        chosen += [one for one in found if one not in chosen]
    if not chosen:
        raise UserError("adapter.targets: empty: name at least one linear layer, or all-linear")
    return chosen


def _matches(one: AdapterRule, target: str) -> bool:
    module = one.rule.name.removesuffix(".weight")
    return module == target or module.endswith(f".{target}")


def adapter_shapes(config: ModelConfig, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """A and B of every adapted layer by PEFT's name, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        for one in adapter_rules(config, spec):
            a, b = one.names(layer)
            shapes |= {a: (spec.rank, one.inputs), b: (one.outputs, spec.rank)}
    return shapes


def initial_adapter(config: ModelConfig, spec: AdapterSpec, *, seed: int) -> Tensors:
    """A new adapter: A uniform in +- 1 / sqrt(inputs) (PEFT's: He initialisation with a = sqrt 5), B zero. So the model
    starts as it is without. Keyed by name."""
    tensors: Tensors = {}
    for name, shape in adapter_shapes(config, spec).items():
        tensors[name] = np.zeros(shape, np.float32)
        if ".lora_A." in name:
            bound = shape[1] ** -0.5
            draws = random.generator(seed, f"init/{name}").uniform(-bound, bound, shape)
            tensors[name] = draws.astype(np.float32)
    return tensors


def check_adapter(tensors: Tensors, config: ModelConfig, spec: AdapterSpec, *, where: str) -> None:
    """Raise UserError unless `tensors` are exactly the adapter's, each in its shape."""
    expected = adapter_shapes(config, spec)
    different = sorted(expected.keys() ^ tensors.keys())
    if different:
        raise UserError(f"{where}: not this model's adapter: missing or left over {', '.join(different[:3])}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}, the model needs {list(shape)}")


def merge(config: ModelConfig, spec: AdapterSpec, weights: Tensors, adapter: Tensors) -> Tensors:
    """A copy of `weights`, the model's or a part of them, with the adapter merged in: W + alpha / rank B A, computed in
    float64 and rounded once."""
    merged = dict(weights)
    for layer in range(config.num_layers):
        for one in adapter_rules(config, spec):
            name = one.rule.name.format(layer=layer)
            if name not in weights:
                continue
            a, b = (adapter[part].astype(np.float64) for part in one.names(layer))
            delta = spec.scale * (b @ a)
            merged[name] = (weights[name] + (delta.T if one.transposed else delta)).astype(weights[name].dtype)
    return merged
