"""Looking into a network: its taps recorded and forced, forward and backward (`diptych.families.taps`).

A tap is one node of autograd's graph between what makes a value and all that reads it. Forward, the node notes the
value and hands on the forced one where there is one; backward it does the same with the gradient, which by then is the
sum over all readers. The modules stay transformers' own: for the time of a visit hooks sit on those that hold the
slots' weights. Two values are on no module's edge: rotated queries and keys are caught on their way into the attention
function, and a router's logits behind the linear product inside it.

Dimensions: B batch, T time, W any width, N heads, H head size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diptych.engine import Loss, Metrics, Taps, Tensors, TrainBatch
from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import TensorRule, tensor_rules
from diptych.families.taps import Depth, taps
from diptych_torch import attention
from diptych_torch.model import Network
from diptych_torch.names import host_copy
from diptych_torch.training import accumulate, check_batch

Change = Callable[[Tensor], Tensor]
# Families whose norms of queries and keys read [B, N, T, H] (in the others [B, T, N, H] or [B, T, W]).
HEADS_FIRST = ("gemma3_text",)


def look(
    network: Network,
    loss: Loss,
    batch: TrainBatch,
    *,
    depth: Depth,
    forced: Taps | None,
    chunk: int,
    device: torch.device,
) -> tuple[Metrics, Taps]:
    """The loss and its metrics over all rows as one micro-batch, and what the taps computed. The gradients are left at
    the network's parameters.

    forced: arrays of float32 or float64, rounded to the network's type where that is a coarser one. Raises ValueError
    for a tap that this network does not have at this depth, or that has another shape; UserError in several processes.
    """
    if torch.distributed.get_world_size() > 1:
        raise UserError("a probe looks into a model in one process: run it without --distributed")
    check_batch(loss, batch, len(batch.tokens))
    probe = Probe(network, depth, forced or Taps(values={}, gradients={}), batch.tokens.attention)
    with contextlib.ExitStack() as visit:
        _install(network, probe, visit)
        metrics = accumulate(
            lambda *inputs, last, **settings: network(*inputs, **settings),
            loss,
            batch,
            [np.arange(len(batch.tokens))],
            lambda value: value.backward(),
            network=network,
            chunk=chunk,
            device=device,
        )
    return metrics, probe.taps()


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one direction, forward or backward, has found at the taps, and what is forced on it, on the real columns
    alone: what another engine holds on padding has no meaning."""

    forced: Mapping[str, np.ndarray]
    real: np.ndarray
    dtype: torch.dtype
    found: Tensors = field(default_factory=dict)

    def exchange(self, name: str, tensor: Tensor) -> Tensor:
        """Note what was computed and give what is read: the forced numbers themselves, or what was computed."""
        assert name not in self.found, f"{name} was computed twice"
        self.found[name] = host_copy(tensor.to(self.dtype))
        if name not in self.forced:
            return tensor.clone()
        given = torch.tensor(self.forced[name], dtype=tensor.dtype, device=tensor.device)
        real = torch.tensor(self.real, device=tensor.device)
        return torch.where(real.reshape(*real.shape, *(1,) * (tensor.ndim - 2)), given, tensor)


class Probe:
    """The taps of one visit to a network."""

    def __init__(self, network: Network, depth: Depth, forced: Taps, attention: np.ndarray):
        """attention: [B, T], True on real tokens."""
        if depth not in ("layers", "ops"):
            raise ValueError(f"depth must be 'layers' or 'ops', got {depth!r}")
        self.layouts = taps(network.config, network.head, depth)
        unknown = sorted((forced.values.keys() | forced.gradients.keys()) - self.layouts.keys())
        if unknown:
            raise ValueError(f"forced: this model has no such taps at depth {depth!r}: {', '.join(unknown)}")
        sizes = (-1, network.config.head_dim) if isinstance(network.config, DecoderConfig) else (-1,)
        self._shapes = {
            "batch time": attention.shape,
            "batch time width": (*attention.shape, -1),
            "batch time heads size": (*attention.shape, *sizes),
        }
        wide = torch.promote_types(network.dtype, torch.float32)
        self.values = Side(forced=forced.values, real=attention, dtype=wide)
        self.gradients = Side(forced=forced.gradients, real=attention, dtype=wide)

    def through(self, name: str, value: Tensor, *, heads_first: bool = False) -> Tensor:
        """The value as whatever reads it is to get it, in the same shape. heads_first: it is [B, N, T, H]."""
        straight = value.transpose(1, 2) if heads_first else value
        shaped = straight.reshape(self._shapes[self.layouts[name]])
        self._check(name, shaped)
        if not shaped.requires_grad:  # nothing below it is trained; the gradient by the tap is wanted all the same
            shaped = shaped.detach().requires_grad_()
        read = _Tap.apply(shaped, name, self).reshape(straight.shape)  # pyright: ignore[reportOptionalMemberAccess]
        return read.transpose(1, 2) if heads_first else read

    def _check(self, name: str, value: Tensor) -> None:
        """ValueError unless what is forced here has this value's shape and is made of floats."""
        for what, side in (("value", self.values), ("gradient", self.gradients)):
            given = side.forced.get(name)
            if given is None:
                continue
            if given.shape != tuple(value.shape):
                raise ValueError(f"forced: the {what} of {name} has shape {given.shape}, the model's {value.shape}")
            if given.dtype not in (np.float32, np.float64):
                raise ValueError(f"forced: the {what} of {name} is {given.dtype}; give float32 or float64")

    def taps(self) -> Taps:
        """What was computed, in the order of the forward pass; a gradient is 0 where none came back (and then none can
        be handed down there)."""
        missed = self.layouts.keys() ^ self.values.found.keys()
        assert not missed, f"the network never computed {sorted(missed)}"
        values = {name: self.values.found[name] for name in self.layouts}
        gradients = {
            name: self.gradients.found.get(name, np.zeros_like(value)) for name, value in values.items()
        }  # fmt: skip
        return Taps(values=values, gradients=gradients)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str, probe: Probe) -> Tensor:
        ctx.name, ctx.probe = name, probe
        return probe.values.exchange(name, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return ctx.probe.gradients.exchange(ctx.name, gradient), None, None


# -- where the taps are ------------------------------------------------------------------------------------------------


def _install(network: Network, probe: Probe, visit: contextlib.ExitStack) -> None:
    """Put every tap of the probe into the network, until the visit ends."""

    def through(name: str) -> Change:
        return lambda value: probe.through(name, value)

    rules = [rule for rule in tensor_rules(network.config, network.head) if rule.per_layer]
    for index in range(network.config.num_layers):
        layer = network.transformer.get_submodule(rules[0].name.split("{layer}")[0] + str(index))
        if index == 0:
            _before(visit, layer, through("embed"))
        _after(visit, layer, through(f"layers.{index}.out"))
        if not isinstance(network.config, DecoderConfig):
            if f"layers.{index}.input" in probe.layouts:
                _after(visit, layer.drive, through(f"layers.{index}.input"))
            continue
        for rule in rules:
            _operation(network, probe, visit, rule, index)
    if any(name.endswith(".query_rotated") for name in probe.layouts):
        ALL_ATTENTION_FUNCTIONS[attention.NAME] = _rotated(probe, ALL_ATTENTION_FUNCTIONS[attention.NAME])
        visit.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, attention.NAME)
    _after(visit, network.trunk, through("final"))
    _after(visit, network, through(list(probe.layouts)[-1]))


def _operation(network: Network, probe: Probe, visit: contextlib.ExitStack, rule: TensorRule, layer: int) -> None:
    """The taps at the module that holds a tensor of a layer: what it gives, a fused one's parts each for itself, and in
    the two projections back to the model's width what they read."""
    names = {slot: f"layers.{layer}.{slot}" for slot in rule.slots}
    if not set(names.values()) <= probe.layouts.keys():
        return  # a bias, an expert's own tensor, or a norm whose value is the layer's
    module = _holder(network, rule.names(network.config, layer)[0])
    for slot, reads in (("output", "attention"), ("down", "inner")):
        read = f"layers.{layer}.{reads}"
        if slot in names and read in probe.layouts:
            _before(visit, module, lambda value, read=read: probe.through(read, value))
    heads_first = network.config.family in HEADS_FIRST and rule.slots[0] in ("query_norm", "key_norm")

    def parts(value: Tensor) -> Tensor:
        if len(names) == 1:
            return probe.through(names[rule.slots[0]], value, heads_first=heads_first)
        given, one_after_another, axes = _outputs(rule)
        split = rearrange(value, f"... {given} -> ... {one_after_another}", **axes).split(rule.rows, dim=-1)
        read = [probe.through(names[slot], part) for slot, part in zip(rule.slots, split, strict=True)]
        return rearrange(torch.cat(read, dim=-1), f"... {one_after_another} -> ... {given}", **axes)

    (_inside_router if "router" in names else _after)(visit, module, parts)


def _holder(network: Network, tensor: str) -> nn.Module:
    """The module that holds a tensor of the checkpoint, an adapter's layer around it included."""
    (found,) = (
        name for name, parameter in network.held.items() if any(part.name == tensor for part in parameter.parts)
    )
    return network.transformer.get_submodule(found.rpartition(".")[0])


def _outputs(rule: TensorRule) -> tuple[str, str, dict[str, int]]:
    """How the outputs of a fused projection lie, and how they lie slot after slot, as one side's last axis in einops'
    words, with the sizes of its axes."""
    if not rule.order:
        return "w", "w", {}
    left, right = (re.findall(r"\([^)]*\)|\w+", side) for side in rule.order.split("->"))
    wanted = right[0]  # canonical is [outputs, inputs]
    (given,) = (word for word in left if sorted(re.findall(r"\w+", word)) == sorted(re.findall(r"\w+", wanted)))
    return given, wanted, {axis: size for axis, size in rule.axes if axis in wanted}


def _rotated(probe: Probe, attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function behind taps of the queries and keys that it reads."""

    def watched(module: Any, query: Tensor, key: Tensor, *inputs: Any, **options: Any) -> Any:
        query = probe.through(f"layers.{module.layer_idx}.query_rotated", query, heads_first=True)
        key = probe.through(f"layers.{module.layer_idx}.key_rotated", key, heads_first=True)
        return attend(module, query, key, *inputs, **options)

    return watched


def _before(visit: contextlib.ExitStack, module: nn.Module, change: Change) -> None:
    """Let a module read its first input through `change`."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    visit.callback(module.register_forward_pre_hook(hook).remove)


def _after(visit: contextlib.ExitStack, module: nn.Module, change: Change) -> None:
    """Let what a module gives be read through `change`: the hidden states of a trunk, the first of several."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    visit.callback(module.register_forward_hook(hook).remove)


def _inside_router(visit: contextlib.ExitStack, router: nn.Module, change: Change) -> None:
    """Let a router choose by its logits read through `change`. It makes them by its one linear product."""
    forward = router.forward

    def watched(*inputs: Any) -> Any:
        with _linear_through(change):
            return forward(*inputs)

    router.forward = watched
    visit.callback(delattr, router, "forward")


@contextlib.contextmanager
def _linear_through(change: Change) -> Iterator[None]:
    """Inside, what `torch.nn.functional.linear` gives (or ZeRO-3's, in its place) is read through `change`."""
    linear = nn.functional.linear
    nn.functional.linear = lambda *inputs: change(linear(*inputs))
    try:
        yield
    finally:
        nn.functional.linear = linear
