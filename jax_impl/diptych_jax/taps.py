"""Named values inside the forward pass (`diptych.families.taps`), recorded and forced while a probe is traced.

The model calls `tap` where such a value is made, and runs its layers by `over_layers`. Outside a probe the one is the
identity and the other `jax.lax.scan`: training, scoring and decoding are the programs that they were. A probe traces
the very same code with a `Recorder` in a context variable; its layers run one after another, since a value that lives
in a scan cannot be told apart by layers.

What a tap's forcing does to the backward pass is a custom derivative. Every tap gets an array `change` that enters no
value and takes as its gradient what came down to the tap, before anything else is handed on in its place.

Dimensions: B batch, T time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float


class Forced(NamedTuple):
    """What the readers of a tap get in place of its value, and what its makers get in place of its gradient; both only
    where the scalar beside them is True."""

    value: Float[Array, "B T *rest"]
    is_value: Bool[Array, ""]
    gradient: Float[Array, "B T *rest"]
    is_gradient: Bool[Array, ""]


class Recorder:
    """The taps of one trace. known: every name that the model may call. wanted: those that are recorded.

    changes, forced: by wanted name; None: the taps are recorded and do nothing else. real_BT: columns that hold tokens.
    Only these are forced: on padding another engine's numbers mean nothing, and this one's reach nothing.
    """

    def __init__(
        self,
        known: frozenset[str],
        wanted: frozenset[str],
        real_BT: Bool[Array, "B T"],
        changes: Mapping[str, Array] | None = None,
        forced: Mapping[str, Forced] | None = None,
    ):
        self.known, self.wanted = known, wanted
        self.real_BT, self.changes, self.forced = real_BT, changes, forced
        self.prefix = ""
        self.values: dict[str, Array] = {}

    def tap(self, name: str, value: Array) -> Array:
        """Record the value as it was computed; what its readers get."""
        name = self.prefix + name
        assert name in self.known, f"{name} is no tap of this model"
        if name not in self.wanted:
            return value
        assert name not in self.values, f"{name} is made twice"
        self.values[name] = value
        if self.changes is None or self.forced is None:
            return value
        real = self.real_BT.reshape(self.real_BT.shape + (1,) * (value.ndim - 2))
        return _through(value, self.changes[name], self.forced[name], real)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Taps that are traced inside are the recorder's."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def tap(name: str, value: Array, layout: str | None = None, **sizes: int) -> Array:
    """The value, as its readers are to see it: itself, unless a probe forces it.

    layout: an einops pattern from how the value lies here to the layout of the tap; None where they are the same.
    """
    recorder = _recorder.get()
    if recorder is None:
        return value
    if layout is None:
        return recorder.tap(name, value)
    here, there = layout.split("->")
    return rearrange(recorder.tap(name, rearrange(value, layout, **sizes)), f"{there} -> {here}", **sizes)


def over_layers(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, num_layers: int) -> Any:
    """`jax.lax.scan(body, carry, layers)`; in a probe every layer by itself, its taps named `layers.3.` and so on."""
    recorder = _recorder.get()
    if recorder is None:
        return jax.lax.scan(body, carry, layers)
    results = []
    for index in range(num_layers):
        recorder.prefix = f"layers.{index}."
        carry, result = body(carry, jax.tree.map(operator.itemgetter(index), layers))
        results.append(result)
    recorder.prefix = ""
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


@jax.custom_vjp
def _through(value: Array, change: Array, forced: Forced, real: Array) -> Array:
    """The value, or the forced one. `change` is not read: it takes the gradient."""
    del change
    return jnp.where(real & forced.is_value, forced.value, value)


def _through_forward(value: Array, change: Array, forced: Forced, real: Array) -> tuple[Array, Any]:
    return _through(value, change, forced, real), (forced, real)


def _through_backward(saved: Any, gradient: Array) -> tuple[Array, Array, None, None]:
    forced, real = saved
    return jnp.where(real & forced.is_gradient, forced.gradient, gradient), gradient, None, None


_through.defvjp(_through_forward, _through_backward)
