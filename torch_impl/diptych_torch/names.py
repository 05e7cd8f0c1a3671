"""A checkpoint's tensors and the module's parameters: the map both ways.

Their names are equal but for two things that transformers does when it loads a checkpoint: GPT-NeoX's `embed_out` is
its `lm_head`, and the experts of a layer lie in two fused parameters,

    mlp.experts.gate_up_proj  [experts, 2 inner, width]     gate and up projection of every expert
    mlp.experts.down_proj     [experts, width, inner]

Everything that leaves the engine (weights, gradients, moments, averages) has the checkpoint's names; what an adapter
trains has PEFT's, one tensor to a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diptych.engine import Head, Tensors
from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, tensor_shapes

_EXPERT = re.compile(r"(?P<layer>.*\.)(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<slot>\w+)\.weight")
_SLOTS = {
    "w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint. index: where it lies in the parameter."""

    name: str
    index: Any = ...


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the module: its shape, and the checkpoint's tensors that it is made of."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def split(self, array: Any) -> dict[str, Any]:
        """Views of the checkpoint's tensors in this parameter, or in anything of its shape (NumPy or torch)."""
        return {part.name: array[part.index] for part in self.parts}


def parameters(model: ModelConfig, head: Head) -> dict[str, Parameter]:
    """Every parameter of the module by its own name, each made of one or more tensors of the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[Part]] = {}
    for name, shape in tensor_shapes(model, head).items():
        found, part, whole = _place(model, name, shape)
        parts.setdefault(found, []).append(part)
        shapes[found] = whole
    return {name: Parameter(shape=shapes[name], parts=tuple(held)) for name, held in parts.items()}


def _place(model: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[str, Part, tuple[int, ...]]:
    """The parameter that holds a tensor, where in it the tensor lies, and the parameter's shape."""
    experts = model.experts if isinstance(model, DecoderConfig) else None
    match = _EXPERT.fullmatch(name)
    if experts is None or match is None:
        renamed = name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
        return {"embed_out.weight": "lm_head.weight"}.get(renamed, renamed), Part(name), shape
    expert, slot = int(match["expert"]), _SLOTS[match["slot"]]
    prefix = f"{match['layer']}mlp.experts."
    if slot == "down":
        return f"{prefix}down_proj", Part(name, expert), (experts.count, *shape)
    rows = slice(0, shape[0]) if slot == "gate" else slice(shape[0], 2 * shape[0])
    return f"{prefix}gate_up_proj", Part(name, (expert, rows)), (experts.count, 2 * shape[0], shape[1])


def holding(held: Mapping[str, Parameter], wanted: Collection[str]) -> list[str]:
    """The parameters, by the module's names, that any of the wanted tensors lies in."""
    return [name for name, parameter in held.items() if any(part.name in wanted for part in parameter.parts)]


def to_checkpoint(held: Mapping[str, Parameter], read: Callable[[str], Any], order: Sequence[str]) -> Tensors:
    """Copies of the checkpoint's tensors that `order` names; `read` gives a parameter's array (NumPy or torch) by the
    module's name, and is asked for no others."""
    wanted = frozenset(order)
    tensors: Tensors = {}
    for name in holding(held, wanted):
        pieces = held[name].split(read(name))
        tensors |= {one: host_copy(piece) for one, piece in pieces.items() if one in wanted}
    return {name: tensors[name] for name in order}


def host_copy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """A contiguous copy in NumPy."""
    return np.array(array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array, order="C")


def to_module(held: Mapping[str, Parameter], tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The module's arrays, by its own names, of a checkpoint's tensors (all of them, in their shapes: `check`)."""
    arrays: Tensors = {}
    for name, parameter in held.items():
        if len(parameter.parts) == 1:
            arrays[name] = tensors[parameter.parts[0].name]
            continue
        arrays[name] = np.empty(parameter.shape, np.asarray(tensors[parameter.parts[0].name]).dtype)
        for one, view in parameter.split(arrays[name]).items():
            view[...] = tensors[one]
    return arrays


def check(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raise UserError unless `tensors` are exactly the expected ones, each in its shape."""
    different = sorted(tensors.keys() ^ expected.keys())
    if different:
        raise UserError(f"{where}: not this model's: missing or left over {', '.join(different[:3])}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}, the model has {list(shape)}")
