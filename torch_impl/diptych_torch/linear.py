"""Linear layers in float32 on the CPU: every product through oneDNN, forward and backward.

torch sends float32 products to MKL, which takes AVX2 on processors that are not Intel's: 100 GFLOP/s on an AMD core
where oneDNN, with AVX-512, does the same product in the same float32 at 150 to 240 (`docs/LOG.md`). On Intel's the two
are alike. Which of them multiplies is decided by the size of the product alone, never by a measurement: the same run
gives the same bits. Elsewhere (other types, accelerators, builds without oneDNN) layers stay torch's.

A rollout multiplies a few rows many times with the same weights: for its time these may be laid out for oneDNN
(`packed_linears`), a second copy.

Dimensions: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

SMALLEST = 2**20  # N I O of a product; calling oneDNN costs some 8 microseconds more than calling MKL
SMALLEST_PACKED = 2**15  # elements of a weight that is laid out for a rollout; below, there is nothing to save
LIMIT = 2**33  # bytes of packed weights, beyond which layers keep to their own


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies by `linear`."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(x, self.weight, self.bias)


class TransposedLinear(Conv1D):
    """transformers' `Conv1D`, whose weight is [inputs, outputs], that multiplies by `linear`."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return linear(x, self.weight, self.bias, is_transposed=True)


FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, Conv1D: TransposedLinear}


def use_onednn(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let the linear layers of a network multiply by `linear`, where that is another way than torch's. Their parameters
    stay as they are, and whatever hooks sit on them."""
    if no_onednn(dtype, device) is None:
        for module in network.modules():
            module.__class__ = FASTER.get(type(module), type(module))


def linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "A B"],
    bias: Float[Tensor, " O"] | None = None,
    *,
    is_transposed: bool = False,
) -> Float[Tensor, "... _"]:
    """x weight^T + bias: [..., O]. The weight is [O, I]; is_transposed: [I, O]."""
    rows = x.shape[:-1].numel()
    if rows * weight.numel() < SMALLEST or no_onednn(x.dtype, x.device) is not None:
        return nn.functional.linear(x, weight.t() if is_transposed else weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    if torch.is_grad_enabled():
        product = _Product.apply(flat, weight, bias, is_transposed)
    else:
        product = _multiply(flat, weight.t() if is_transposed else weight, bias)
    return product.view(*x.shape[:-1], product.shape[-1])  # pyright: ignore[reportOptionalMemberAccess]


def no_onednn(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN does not multiply here."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"{dtype} on {device.type}"
    if not HAS_ONEDNN:
        return "this build of torch has no oneDNN"
    return None


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. weight may be a view of its transpose; oneDNN reads both as they lie."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`linear` of two dimensions, with its gradients. What is kept is the parameter itself: ZeRO-3 empties it after the
    forward pass and fills it again before the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.is_transposed = is_transposed
        return _multiply(x, weight.t() if is_transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _multiply(gradient, weight if ctx.is_transposed else weight.t())
        if ctx.needs_input_grad[1]:
            left, right = (x, gradient) if ctx.is_transposed else (gradient, x)
            of_weight = _outer(left, right.contiguous())
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_x, of_weight, of_bias, None


def _outer(left: Float[Tensor, "N O"], right: Float[Tensor, "N I"]) -> Float[Tensor, "O I"]:
    """left^T right. oneDNN copies its first operand where that lies transposed: the narrower one, if much so."""
    if left.shape[1] >= 4 * right.shape[1]:
        return _multiply(right.t(), left.t()).t().contiguous()
    return _multiply(left.t(), right.t())


# -- rollouts ----------------------------------------------------------------------------------------------------------


class PackedLinear:
    """x weight^T + bias with a copy of the weight that is laid out for oneDNN; for inference."""

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None, rows: int):
        """rows: of the products that matter most."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Float[Tensor, "... I"], activation: str = "none") -> Float[Tensor, "... O"]:
        """activation: oneDNN's name of one."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, activation, [], "")

    def plus(self, x: Float[Tensor, "N I"], other: Float[Tensor, "N O"]) -> Float[Tensor, "N O"]:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, "add")

    def times(self, x: Float[Tensor, "N I"], other: Float[Tensor, "N O"]) -> Float[Tensor, "N O"]:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, "mul")


@contextmanager
def packed_linears(network: nn.Module, rows: int) -> Iterator[str]:
    """Inside, the network's larger linear layers multiply with packed copies of their weights; for inference.

    rows: of the products that matter most. Gives one line for the log: what was packed and what it takes, or why
    nothing was.
    """
    kinds = (*FASTER.keys(), *FASTER.values())
    layers: list[Any] = [module for module in network.modules() if type(module) in kinds]
    first = layers[0].weight if layers else None
    reason = "no linear layers to pack" if first is None else no_onednn(first.dtype, first.device)
    done, size = [], 0
    try:
        for layer in layers if reason is None else []:
            if layer.weight.numel() >= SMALLEST_PACKED and size + layer.weight.nbytes <= LIMIT:
                layer.forward = PackedLinear(
                    layer.weight.T if isinstance(layer, Conv1D) else layer.weight, layer.bias, rows
                )
                done.append(layer)
                size += layer.weight.nbytes
        of = f"{len(done)} of {len(layers)} linear layers"
        yield reason or f"{of} in oneDNN, {size / 2**20:.0f} MiB of packed weights"
    finally:
        for layer in done:
            del layer.forward  # the class's is there again
