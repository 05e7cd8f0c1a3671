"""Linear layers of a rollout on the CPU through oneDNN, with weights laid out for it once a rollout.

torch sends float32 products to MKL, which reaches a third of an AMD core's arithmetic with 16 rows; oneDNN with packed
weights does the same product, in the same float32, in half the time (it is also what torch.compile puts in their
place). The packed weights are a second copy, which lives as long as the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SMALLEST = 2**15  # elements of a weight; below, calling oneDNN costs as much as it saves
LIMIT = 2**33  # bytes of packed weights, beyond which layers keep to torch's own product


@contextmanager
def packed_linears(network: nn.Module, rows: int) -> Iterator[str]:
    """Inside, the network's larger linear layers multiply with packed copies of their weights; for inference.

    rows: of the products that matter most. Gives one line for the log: what was packed and what it takes, or why
    nothing was.
    """
    layers: list[Any] = [module for module in network.modules() if type(module) in (nn.Linear, Conv1D)]
    reason = _obstacle(layers)
    done, size = [], 0
    try:
        for layer in layers if reason is None else []:
            if layer.weight.numel() >= SMALLEST and size + layer.weight.nbytes <= LIMIT:
                layer.forward = _product(layer, rows)
                done.append(layer)
                size += layer.weight.nbytes
        of = f"{len(done)} of {len(layers)} linear layers"
        yield reason or f"{of} in oneDNN, {size / 2**20:.0f} MiB of packed weights"
    finally:
        for layer in done:
            del layer.forward  # the class's is there again


def _obstacle(layers: list[Any]) -> str | None:
    """Why nothing can be packed."""
    if not layers:
        return "no linear layers to pack"
    weight = layers[0].weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"linear layers as torch has them ({weight.dtype} on {weight.device.type})"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "linear layers as torch has them (this build has no oneDNN)"
    return None


def _product(layer: Any, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer's forward with a packed copy of its weights."""
    weight = layer.weight.detach()
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    bias = None if layer.bias is None else layer.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")
