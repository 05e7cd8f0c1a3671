"""Which operation makes each tap, what it reads and which weights it holds: the graph that blame walks.

Every tap is made by one operation, and an operation is named by the tap that it makes. Between taps lie no values that
two operations share but one: the middle of the residual stream, x + attention, which has no tap of its own. What reads
it reads both of its parts (`Operation.reads`), so where all of its readers are wrong at once, the sum is at fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diptych.engine import Head
from diptych.errors import UserError
from diptych.families.adapter import SCORE, linear_rules
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, model_slots, tensor_places
from diptych.families.taps import Depth, taps

LOSS = "loss"  # the operation that reads the last tap and makes none

_TITLES = {
    "embed": "the embeddings",
    "final": "the last norm (and projection)",
    "logprobs": "the head and its log-probabilities",
    "scores": "the scalar head",
    LOSS: "the loss",
    "attention_norm": "the norm before attention",
    "mlp_norm": "the norm before the MLP",
    "attention_out_norm": "the norm after attention",
    "mlp_out_norm": "the norm after the MLP",
    "query": "the query projection",
    "key": "the key projection",
    "value": "the value projection",
    "query_norm": "the norm of the queries",
    "key_norm": "the norm of the keys",
    "query_rotated": "the rotary positions of the queries",
    "key_rotated": "the rotary positions of the keys",
    "attention": "attention (mask, softmax, mix of the values)",
    "output": "the output projection of attention",
    "router": "the router",
    "gate": "the gate projection",
    "up": "the up projection",
    "inner": "the activation",
    "down": "the down projection",
    "input": "the input projection",
    "out": "the residual sum at the layer's end",
    "residual": "the residual sum after attention",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """makes: the tap it is named by. reads: taps. slots: of the weights it holds, (name, layer or None).

    linear: it is a matrix product with its first slot, so what its backward hands down is known from the weights."""

    makes: str
    layer: int | None
    reads: tuple[str, ...]
    slots: tuple[tuple[str, int | None], ...] = ()
    title: str = ""
    linear: bool = False


def operations(config: ModelConfig, head: Head, depth: Depth, *, balance: bool = False) -> dict[str, Operation]:
    """Every operation in the order of the forward pass, by the tap that it makes; the loss comes last.

    balance: the loss also reads the routers' logits.
    """
    names = list(taps(config, head, depth))
    held = model_slots(config, head)
    made: list[Operation] = []

    def add(tap: str, reads: tuple[str, ...], *slots: str, layer: int | None = None, linear: bool = False) -> None:
        every = [name for slot in slots for name in (slot, f"{slot}_bias") if name in held]
        lies = tuple((name, layer if held[name].per_layer else None) for name in every)
        title = _title(config, tap, depth, layer)
        made.append(Operation(makes=tap, layer=layer, reads=reads, slots=lies, title=title, linear=linear))

    add("embed", (), "embedding", "positions", "project_in", "embedding_norm")
    below = "embed"
    for layer in range(config.num_layers):
        out = f"layers.{layer}.out"
        if depth == "layers":
            whole = [name for name, slot in held.items() if slot.per_layer and not _is_bias_of(name, held)]
            add(out, (below,), *whole, layer=layer)
        elif isinstance(config, DecoderConfig):
            _decoder_layer(config, layer, below, add)
        else:
            add(f"layers.{layer}.input", (below,), "input", layer=layer)
            made[-1] = _with(made[-1], ("recurrent_bias", layer))
            add(out, (f"layers.{layer}.input",), layer=layer)
            made[-1] = _with(made[-1], ("recurrent", layer))
        below = out
    add("final", (below,), "final_norm", "project_out")
    unembedding = "score" if head == "scalar" else "head" if "head" in held else "embedding"
    add(names[-1], ("final",), unembedding)
    if "head_bias" in held and unembedding == "embedding":
        made[-1] = _with(made[-1], ("head_bias", None))
    routers = tuple(name for name in names if name.endswith(".router")) if balance else ()
    made.append(Operation(makes=LOSS, layer=None, reads=(names[-1], *routers), title=_TITLES[LOSS]))
    found = {one.makes: one for one in made}
    assert [name for name in names if name not in found] == []
    return {name: found[name] for name in [*names, LOSS]}


def _with(operation: Operation, slot: tuple[str, int | None]) -> Operation:
    return Operation(**{**vars(operation), "slots": (*operation.slots, slot)})


def _is_bias_of(name: str, held: Mapping[str, object]) -> bool:
    return name.endswith("_bias") and name.removesuffix("_bias") in held


def _decoder_layer(config: DecoderConfig, layer: int, x: str, add) -> None:
    """The operations of a layer that reads `x` (`diptych.families.decoder` has the five kinds of block)."""

    def at(name: str) -> str:
        return f"layers.{layer}.{name}"

    block = config.block
    before, after = block in ("pre", "sandwich", "parallel"), block in ("output", "sandwich")
    if before:
        add(at("attention_norm"), (x,), "attention_norm", layer=layer)
    read = (at("attention_norm"),) if before else (x,)
    attended = ["query", "key", "value"]
    for name in attended:
        add(at(name), read, name, layer=layer, linear=True)
    for suffix, there in (("_norm", config.qk_norm is not None), ("_rotated", bool(config.ropes))):
        for index, name in enumerate(("query", "key")):
            if there:
                add(at(name + suffix), (at(attended[index]),), *([name + suffix] if suffix == "_norm" else []),
                    layer=layer)  # fmt: skip
                attended[index] = name + suffix
    add(at("attention"), tuple(at(name) for name in attended), layer=layer)
    add(at("output"), (at("attention"),), "output", layer=layer, linear=True)
    branch = at("output")
    if after:
        add(at("attention_out_norm"), (branch,), "attention_out_norm", layer=layer)
        branch = at("attention_out_norm")
    middle = (x,) if block == "parallel" else (x, branch)
    if block == "post":
        add(at("attention_norm"), middle, "attention_norm", layer=layer)
        middle = (at("attention_norm"),)
    if before:
        add(at("mlp_norm"), middle, "mlp_norm", layer=layer)
    read = (at("mlp_norm"),) if before else middle
    if config.experts is not None:
        add(at("router"), read, "router", layer=layer)
        add(at("down"), (*read, at("router")), "gate", "up", "down", layer=layer)
    else:
        inner = ["gate", "up"] if config.gated else ["up"]
        for name in inner:
            add(at(name), read, name, layer=layer, linear=len(read) == 1)
        add(at("inner"), tuple(at(name) for name in inner), layer=layer)
        add(at("down"), (at("inner"),), "down", layer=layer, linear=True)
    last = at("down")
    if after:
        add(at("mlp_out_norm"), (last,), "mlp_out_norm", layer=layer)
        last = at("mlp_out_norm")
    parts = (x, branch, last) if block == "parallel" else (*middle, last)
    add(at("out"), parts, *(["mlp_norm"] if block == "post" else []), layer=layer)


def _title(config: ModelConfig, tap: str, depth: Depth, layer: int | None) -> str:
    if layer is None:
        return _TITLES[tap]
    name = tap.split(".")[-1]
    if depth == "layers":
        return f"layer {layer}"
    words = _TITLES[name]
    if not isinstance(config, DecoderConfig):
        words = {"out": "the recurrence"}.get(name, words)
    elif name == "out" and config.block == "post":
        words = "the norm after the MLP's residual sum"
    elif name == "attention_norm" and config.block == "post":
        words = "the norm after attention's residual sum"
    elif name == "down" and config.experts is not None:
        words = "the experts"
    return f"{words} in layer {layer}"


def residual_title(layer: int) -> str:
    """The sum that has no tap."""
    return f"{_TITLES['residual']} in layer {layer}"


def rotary_title(layer: int) -> str:
    """Queries and keys are turned by one operation that has two taps."""
    return f"the rotary positions in layer {layer}"


def slot_gradients(
    config: ModelConfig, head: Head, gradients: Mapping[str, np.ndarray]
) -> dict[tuple[str, int | None], list[np.ndarray]]:
    """Gradients (or weights) by Hugging Face name as (slot, layer) -> the slot's arrays, of experts several. A fused
    tensor's parts each belong to their own; an adapter's A and B, by PEFT's names, to every slot below them.

    Raises UserError for a name that is neither.
    """
    table, places = model_slots(config, head), tensor_places(config, head)
    adapted = {SCORE: (("score",), None)}
    adapted |= {
        name: (one.rule.slots, layer)
        for one in linear_rules(config)
        for layer in range(config.num_layers)
        for name in one.names(layer)
    }
    found: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for name, array in gradients.items():
        if name in places:
            rule, layer, _ = places[name]
            parts = rule.split(array, table)
        elif name in adapted:
            slots, layer = adapted[name]
            parts = dict.fromkeys(slots, array)
        else:
            raise UserError(f"{name} is no tensor of this {config.family}, nor of an adapter of it: record it again")
        for slot, part in parts.items():
            found.setdefault((slot, layer), []).append(part)
    return found
