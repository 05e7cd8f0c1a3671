"""Hugging Face tensors into the model and out again: one table, checked to be a bijection.

A slot is one parameter of the model and the tensor (or, stacked, the tensors of all layers) that it holds. Linear
layers are [out, in] in a checkpoint and [in, out] here, with heads and head size as axes of their own, so a slot knows
whether to transpose and which shape to give. Embedding, output projection and scalar head keep the checkpoint's layout.

The same functions carry whatever has the model's structure: weights, gradients, moments and averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diptych.engine import Head, Tensors
from diptych.errors import UserError
from diptych.weights.llama import LlamaConfig, tensor_shapes
from diptych_jax.model import DecoderLayer, Llama


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter. name: the Hugging Face name, `{layer}` in it where stacked. shape: of one tensor, in the model."""

    attribute: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    stacked: bool = False

    def names(self, config: LlamaConfig) -> list[str]:
        """The tensors that it holds, in the order in which they are stacked."""
        return [self.name.format(layer=layer) for layer in range(config.num_layers)] if self.stacked else [self.name]

    def into(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor from the checkpoint's layout to the model's."""
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def out_of(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor from the model's layout to the checkpoint's `shape`; the inverse of `into`."""
        return array.reshape(shape[::-1]).T if self.transposed else array.reshape(shape)


def slots(config: LlamaConfig, head: Head) -> list[Slot]:
    """The table. Together the slots hold exactly the tensors of `tensor_shapes(config, head)`."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, key_values = config.num_heads, config.num_kv_heads

    def layer(attribute: str, name: str, *shape: int) -> Slot:
        transposed = len(shape) > 1
        return Slot(
            attribute=attribute, name=f"model.layers.{{layer}}.{name}.weight", shape=shape, transposed=transposed,
            stacked=True,
        )  # fmt: skip

    table = [
        Slot(attribute="embedding_VD", name="model.embed_tokens.weight", shape=(config.vocab_size, width)),
        layer("attention_norm_D", "input_layernorm", width),
        layer("query_DNH", "self_attn.q_proj", width, queries, size),
        layer("key_DKH", "self_attn.k_proj", width, key_values, size),
        layer("value_DKH", "self_attn.v_proj", width, key_values, size),
        layer("output_NHD", "self_attn.o_proj", queries, size, width),
        layer("mlp_norm_D", "post_attention_layernorm", width),
        layer("gate_DF", "mlp.gate_proj", width, inner),
        layer("up_DF", "mlp.up_proj", width, inner),
        layer("down_FD", "mlp.down_proj", inner, width),
        Slot(attribute="norm_D", name="model.norm.weight", shape=(width,)),
    ]
    if head == "scalar":
        table.append(Slot(attribute="score_1D", name="score.weight", shape=(1, width)))
    elif not config.tie_word_embeddings:
        table.append(Slot(attribute="head_VD", name="lm_head.weight", shape=(config.vocab_size, width)))
    held = [name for slot in table for name in slot.names(config)]
    assert sorted(held) == sorted(tensor_shapes(config, head)), "the slots do not hold the family's tensors one to one"
    return table


def check(config: LlamaConfig, head: Head, tensors: Mapping[str, np.ndarray], *, what: str) -> None:
    """Raise UserError unless `tensors` are exactly the family's, each of its shape. `what` says which tensors."""
    shapes = tensor_shapes(config, head)
    missing = [name for name in shapes if name not in tensors]
    left_over = [name for name in tensors if name not in shapes]
    if missing or left_over:
        found = [f"{kind} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in
                 (("missing", missing), ("left over", left_over)) if names]  # fmt: skip
        raise UserError(f"{what} do not fit the model: {'; '.join(found)}: use the tensors of the same config.json")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, the model needs {shape}: "
                "use the tensors of the same config.json"
            )


def pack(
    config: LlamaConfig, head: Head, tensors: Mapping[str, np.ndarray], dtype: np.dtype, *, what: str = "weights"
) -> Llama:
    """The model that holds copies of `tensors`. Raises UserError for missing, left-over or misshapen ones."""
    check(config, head, tensors, what=what)
    top: dict[str, jax.Array] = {}
    stacked: dict[str, jax.Array] = {}
    for slot in slots(config, head):
        parts = [slot.into(np.asarray(tensors[name])) for name in slot.names(config)]
        value = np.stack(parts) if slot.stacked else parts[0]
        # Always a copy: on a CPU JAX may otherwise alias NumPy's memory, and a later write there would change weights.
        (stacked if slot.stacked else top)[slot.attribute] = jnp.array(value, dtype=dtype, copy=True)
    return Llama(config=config, layers=DecoderLayer(**stacked, eps=config.rms_norm_eps), **top)


def arrays(model: Llama) -> Iterator[tuple[Slot, jax.Array]]:
    """Every slot of the model with its array on the device."""
    for slot in slots(model.config, model.head):
        owner = model.layers if slot.stacked else model
        yield slot, getattr(owner, slot.attribute)[...]


def unpack(model: Llama) -> Tensors:
    """Copies of all tensors by Hugging Face name, in the checkpoint's layout. The inverse of `pack`."""
    shapes = tensor_shapes(model.config, model.head)
    tensors: Tensors = {}
    for slot, array in arrays(model):
        host = np.asarray(array)
        for index, name in enumerate(slot.names(model.config)):
            part = host[index] if slot.stacked else host
            # A copy: NumPy's view of a JAX array is its device memory, which the next donated update overwrites.
            tensors[name] = np.array(slot.out_of(part, shapes[name]), order="C", copy=True)
    return {name: tensors[name] for name in shapes}


def decayed(model: Llama) -> Llama:
    """True where weight decay applies: tensors of two or more dimensions *in the checkpoint*, however stacked here."""
    shapes = tensor_shapes(model.config, model.head)
    dimensions = {slot.attribute: len(shapes[slot.names(model.config)[0]]) for slot in slots(model.config, model.head)}

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        attribute = next(key.name for key in path if getattr(key, "name", None) in dimensions)
        return dimensions[attribute] >= 2

    return jax.tree_util.tree_map_with_path(is_decayed, model)
