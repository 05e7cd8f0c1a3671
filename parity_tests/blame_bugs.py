"""Single-layer bugs for the test of blame: each changes one module of one layer of the torch engine's network.

A bug is (family, the operation that blame must name, how to plant it). The backward ones compute the right values and
hand down a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diptych_torch import attention


@dataclass(frozen=True)
class Layer:
    """One layer of the engine's network, and of the one that it probes: the same weights in modules of its own."""

    trained: nn.Module
    probed: nn.Module


Plant = Callable[[Layer, int, ExitStack], None]  # (the layer, its index, undoes everything when it ends)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """operation: what blame must name, without its layer. direction: of the pass that is wrong first."""

    name: str
    family: str
    operation: str
    direction: str
    plant: Plant


class _Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(x, factor)  # pyright: ignore[reportReturnType]


def _weight(path: str, change: Callable[[Tensor], Tensor], tensor: str = "weight") -> Plant:
    """Another weight or bias for as long as the bug lives."""

    def plant(layer: Layer, index: int, undo: ExitStack) -> None:
        del index
        held = getattr(layer.trained.get_submodule(path), tensor)
        before = held.data.clone()
        held.data.copy_(change(before))
        undo.callback(held.data.copy_, before)

    return plant


def _attribute(path: str, name: str, value: Any) -> Plant:
    def plant(layer: Layer, index: int, undo: ExitStack) -> None:
        del index
        module = layer.probed.get_submodule(path)
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    return plant


def _forward(path: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Plant:
    """Another forward of one module, hooks still around it."""

    def plant(layer: Layer, index: int, undo: ExitStack) -> None:
        del index
        module = layer.probed.get_submodule(path) if path else layer.probed
        module.forward = wrap(module.forward)
        undo.callback(delattr, module, "forward")

    return plant


def _reads(path: str, factor: float) -> Plant:
    """The gradient that a module hands down to what it reads."""
    return _forward(path, lambda forward: lambda x, *rest, **more: forward(scaled_gradient(x, factor), *rest, **more))


def _attention(
    change: Callable[..., tuple[Tensor, Tensor, Tensor, Any]], after: Callable[[Tensor], Tensor] = lambda y: y
):
    """Another attention in one layer: of (query, key, value, mask), and of what was read [B, T, N, H]."""

    def plant(layer: Layer, index: int, undo: ExitStack) -> None:
        del layer
        original = ALL_ATTENTION_FUNCTIONS[attention.NAME]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            if module.layer_idx != index:
                return original(module, query, key, value, mask, **options)
            read, rest = original(module, *change(query, key, value, mask), **options)
            return after(read), rest

        AttentionInterface.register(attention.NAME, attend)
        undo.callback(AttentionInterface.register, attention.NAME, original)

    return plant


def _one_head_reads_itself(read: Tensor) -> Tensor:
    """The first head of every token gets what the first token's got: as if its mask were another."""
    return torch.cat([read[:, :1, :1].expand_as(read[:, :, :1]), read[:, :, 1:]], dim=2)


def _turned_less(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Rotary angles of another base: those of each position, halved."""

    def wrapped(*inputs: Any, position_embeddings: tuple[Tensor, Tensor], **more: Any) -> Any:
        cos, sin = position_embeddings
        half = torch.atan2(sin, cos) / 2
        return forward(*inputs, position_embeddings=(half.cos(), half.sin()), **more)

    return wrapped


def _scaled_first(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a module gives (the first of several) times a factor."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*inputs: Any, **more: Any) -> Any:
            given = forward(*inputs, **more)
            return given * factor if isinstance(given, Tensor) else (given[0] * factor, *given[1:])

        return wrapped

    return wrap


def _skip_gradient(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The MLP's share of the residual sum hands down another gradient."""
    return lambda forward: lambda *inputs, **more: scaled_gradient(forward(*inputs, **more), factor)


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x)


def _weight_gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Right values, right gradient of the input, half the gradient of the weight."""

    def wrapped(x: Tensor) -> Tensor:
        weight = forward.__self__.weight  # pyright: ignore[reportFunctionMemberAccess]
        return nn.functional.linear(x, scaled_gradient(weight, 0.5))

    return wrapped


FORWARD = [
    Bug(name="a scaled weight", family="llama", operation="query", direction="forward",
        plant=_weight("self_attn.q_proj", lambda w: w * 1.01)),
    Bug(name="a zeroed weight", family="llama", operation="value", direction="forward",
        plant=_weight("self_attn.v_proj", torch.zeros_like)),
    Bug(name="a transposed weight", family="llama", operation="output", direction="forward",
        plant=_weight("self_attn.o_proj", lambda w: w.T.contiguous())),
    Bug(name="another eps of one norm", family="llama", operation="mlp_norm", direction="forward",
        plant=_attribute("post_attention_layernorm", "variance_epsilon", 1e-3)),
    Bug(name="gelu in place of silu", family="llama", operation="inner", direction="forward",
        plant=_forward("mlp.act_fn", lambda _: nn.functional.gelu)),
    Bug(name="rotary angles halved", family="llama", operation="rotary", direction="forward",
        plant=_forward("self_attn", _turned_less)),
    Bug(name="one head's mask", family="llama", operation="attention", direction="forward",
        plant=_attention(lambda *four: four, _one_head_reads_itself)),
    Bug(name="a scaled residual sum after attention", family="llama", operation="residual", direction="forward",
        plant=_forward("self_attn", _scaled_first(1.01))),
    Bug(name="a scaled residual sum at the end", family="llama", operation="out", direction="forward",
        plant=_forward("mlp", _scaled_first(1.01))),
    Bug(name="a missing bias", family="gpt2", operation="up", direction="forward",
        plant=_weight("mlp.c_fc", torch.zeros_like, "bias")),
    Bug(name="exact gelu in place of tanh", family="gpt2", operation="inner", direction="forward",
        plant=_forward("mlp.act", lambda _: _gelu)),
    Bug(name="a norm without its bias", family="gpt2", operation="attention_norm", direction="forward",
        plant=_weight("ln_1", torch.zeros_like, "bias")),
]  # fmt: skip
BACKWARD = [
    Bug(name="the output projection's gradient scaled", family="llama", operation="output", direction="backward",
        plant=_reads("self_attn.o_proj", 1.05)),
    Bug(name="no gradient through the query projection", family="llama", operation="query", direction="backward",
        plant=_reads("self_attn.q_proj", 0.0)),
    Bug(name="the keys' gradient halved in attention", family="llama", operation="attention", direction="backward",
        plant=_attention(lambda q, k, v, mask: (q, scaled_gradient(k, 0.5), v, mask))),
    Bug(name="all gradients of attention scaled", family="llama", operation="attention", direction="backward",
        plant=_attention(lambda *four: four, lambda read: scaled_gradient(read, 1.01))),
    Bug(name="the norm's gradient scaled", family="llama", operation="attention_norm", direction="backward",
        plant=_reads("input_layernorm", 1.01)),
    Bug(name="half the gradient of a weight", family="llama", operation="down", direction="backward",
        plant=_forward("mlp.down_proj", _weight_gradient)),
    Bug(name="the activation's gradient scaled", family="gpt2", operation="inner", direction="backward",
        plant=_reads("mlp.act", 1.01)),
    Bug(name="the residual sum's gradient scaled", family="gpt2", operation="out", direction="backward",
        plant=_forward("mlp", _skip_gradient(0.9))),
]  # fmt: skip
BUGS = {bug.name: bug for bug in [*FORWARD, *BACKWARD]}
