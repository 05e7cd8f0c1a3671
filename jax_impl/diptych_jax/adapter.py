"""Low-rank adapters on the model's linear layers: the only trained part, beside a scalar head, of a model that has one.

The low-rank product of a layer is added to its weights where the layer runs, inside the scan, so that no second copy of
the model exists in training and the gradient of a whole weight never outlives its layer. Decoding merges it once, into
the copy that the loop reads.

Dimensions: L layers, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from diptych.engine import AdapterSpec, Tensors
from diptych.families.adapter import adapter_rules, check_adapter
from diptych.families.family import ModelConfig, model_slots
from diptych_jax.mesh import place, replicated, to_host


class Adapter(nnx.Module):
    """A [L, r, I] and B [L, O, r] of every adapted kind of layer, in the order of `adapter_rules`."""

    def __init__(self, config: ModelConfig, spec: AdapterSpec, values: Mapping[str, Any]):
        """values: `a_0`, `b_0`, `a_1`, ..."""
        self.config = config
        self.spec = spec
        for name, value in values.items():
            setattr(self, name, nnx.Param(value))

    def changes(self) -> dict[str, jax.Array]:
        """What is added to each slot of a layer (the arrays have lost their leading axis)."""
        table = model_slots(self.config, "lm")
        added: dict[str, jax.Array] = {}
        for index, one in enumerate(adapter_rules(self.config, self.spec)):
            a_RI, b_OR = getattr(self, f"a_{index}")[...], getattr(self, f"b_{index}")[...]
            delta_OI = jnp.einsum("OR,RI->OI", b_OR, a_RI) * self.spec.scale
            added |= one.rule.split(delta_OI.T if one.transposed else delta_OI, table)
        return added


def pack(
    config: ModelConfig,
    spec: AdapterSpec,
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
    *,
    mesh: Mesh,
    what: str = "adapter",
) -> Adapter:
    """The adapter that holds copies of tensors by PEFT's names, whole on every device of a mesh. Raises UserError
    unless they are exactly its own."""
    check_adapter(dict(tensors), config, spec, where=what)
    values: dict[str, jax.Array] = {}
    for index, one in enumerate(adapter_rules(config, spec)):
        names = [one.names(layer) for layer in range(config.num_layers)]
        for letter, which in (("a", 0), ("b", 1)):
            stack = np.stack([np.asarray(tensors[pair[which]]) for pair in names])
            values[f"{letter}_{index}"] = place(np.array(stack, dtype=dtype), replicated(mesh))
    return Adapter(config, spec, values)


def unpack(adapter: Adapter) -> Tensors:
    """Copies of all tensors by PEFT's names. The inverse of `pack`."""
    tensors: Tensors = {}
    config = adapter.config
    rules = list(enumerate(adapter_rules(config, adapter.spec)))
    for layer in range(config.num_layers):
        for index, one in rules:
            for name, letter in zip(one.names(layer), ("a", "b"), strict=True):
                tensors[name] = to_host(getattr(adapter, f"{letter}_{index}")[layer])
    return tensors
