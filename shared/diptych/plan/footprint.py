"""What DeepSpeed's ZeRO keeps of each model, on the accelerator and in host memory, in every phase of a recipe.

Rajbhandari et al. 2020 (ZeRO: Memory Optimizations Toward Training Trillion Parameter Models) divides optimizer state
(stage 1), gradients (2) and weights (3) by the N processes. DeepSpeed 0.19 holds more than the paper's table: these are
the formulas of its code, and a test holds them against its tensors. Bytes of each GPU, of P parameters of which T are
trained, c bytes for a number that is computed with and m for a master (float32 where the former is bfloat16):

    stage           weights   masters   moments     gradients
    0               c P       -         2 m T       c T
    1               c P       m T / N   2 m T / N   c T and m T / N; in bfloat16 m T all the time, and c T
    2               c P       m T / N   2 m T / N   m T / N, twice in float32
    3               c P / N   m T / N   2 m T / N   m T / N all the time, once more in the step

and beside them the buffers in which gradients are reduced. With offload_optimizer the masters, the moments and copies
of what crosses over lie in host memory, with offload_param (stage 3) the weights. A frozen model is c P, at stage 3
c P / N. Where it runs, stage 3 makes weights whole: all of them, up to a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from diptych.engine import Head, Remat
from diptych.families.adapter import adapter_rules
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, model_slots
from diptych.layout import Zero
from diptych.plan.memory import ITEMSIZE, Parts, active_numbers, total_numbers
from diptych.plan.workload import Held, Rollouts, Supervised, Workload
from diptych.rollout_server import is_server

# DeepSpeed's settings as the torch engine has them, in elements; the recipe's `deepspeed` block may have others.
SETTINGS = {
    "reduce_bucket_size": 100_000_000,  # gradients reduced at a time
    "stage3_max_live_parameters": 1_000_000_000,  # weights that stage 3 keeps gathered
    "sub_group_size": 1_000_000_000,  # weights that stage 3 updates at a time
    "stage3_param_persistence_threshold": 100_000,  # parameters of fewer stay whole at stage 3
}
NORM_ITEMSIZE = 8  # bytes of a number in the norm of gradients, taken of one parameter after another
SWITCH_GROUP = 2**30  # bytes that the switch to the decode copy gathers at a time where the recipe does not say
LOGITS = 4  # float32 arrays of [tokens, vocabulary] that log-probabilities with their gradient, and drawing, take
REDUCED = "gradients in reduction"
ESTIMATED = ("activations", "vocabulary chunk", "gathered weights", REDUCED)  # parts that are not counted exactly


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One model's bytes by part: all the time on each GPU (device) and for each process in host memory (host), and on
    each GPU on top of that while it runs (running), while gradients are made (making) and applied (applying)."""

    device: Parts
    host: Parts = field(default_factory=dict)
    running: Parts = field(default_factory=dict)
    making: Parts = field(default_factory=dict)
    applying: Parts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The fullest moment of a phase: part -> bytes of each GPU (device), and of each process in host memory (host)."""

    name: str
    device: Parts
    host: Parts

    @property
    def total(self) -> float:
        """Bytes of a GPU."""
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        """Bytes of a process in host memory."""
        return sum(self.host.values())


def added(*parts: Parts) -> Parts:
    """The sum of each part, in the order in which they come; parts of nothing are left out."""
    total: Parts = {}
    for one in parts:
        for name, size in one.items():
            total[name] = total.get(name, 0.0) + size
    return {name: size for name, size in total.items() if size > 0}


def _setting(workload: Workload, name: str) -> int:
    return int(workload.settings.deepspeed.get("zero_optimization", {}).get(name, SETTINGS[name]))


def footprint(held: Held, workload: Workload, num_processes: int) -> Footprint:
    """What a model keeps under the ZeRO settings of its role."""
    size = ITEMSIZE[workload.compute]
    zero = workload.settings.layout.zero_of(held.role, is_trained=held.optimizer is not None)
    name = f"{held.name} weights"
    numbers = total_numbers(held.config, held.head) + adapted_numbers(held)
    weights: Parts = {name: float(numbers * size)}
    running: Parts = {}
    if zero.stage == 3 and (num_processes > 1 or zero.offload_param):
        small = small_numbers(held.config, held.head, _setting(workload, "stage3_param_persistence_threshold"))
        weights = {name: (numbers / num_processes + small) * size}
        running = {"gathered weights": float(min(numbers, _setting(workload, "stage3_max_live_parameters")) * size)}
    in_host = zero.offload_param or held.offloaded
    if held.optimizer is None:
        if held.offloaded:
            running = added(weights, running)
        return Footprint(device={} if in_host else weights, host=weights if in_host else {}, running=running)
    states = _states(held, workload, zero, num_processes)
    return Footprint(
        device=added({} if in_host else weights, states.device),
        host=added(weights if in_host else {}, states.host),
        running=running,
        making=states.making,
        applying=states.applying,
    )


def _states(held: Held, workload: Workload, zero: Zero, num_processes: int) -> Footprint:
    """Masters, moments, average and gradients."""
    assert held.optimizer is not None
    size, wide = ITEMSIZE[workload.compute], ITEMSIZE[workload.masters]
    stage, is_cast, trained = zero.stage, size != wide, trained_numbers(held)
    part = trained / num_processes if stage else float(trained)
    largest = float(largest_numbers(held))
    elements = _setting(workload, "reduce_bucket_size")
    bucket = float(min(trained, elements) * wide)  # sums over processes are in the masters' type
    gradients, buffers = f"{held.name} gradients", f"{held.name} gradient buffers"
    states: Parts = {f"{held.name} masters": part * wide} if stage else {}
    states[f"{held.name} moments"] = part * wide * (2 if held.optimizer.name == "adamw" else 1)
    if held.optimizer.ema_decay is not None:
        states[f"{held.name} average"] = part * wide

    if stage == 0:
        every = {gradients: float(trained * size)}
        return Footprint(device=states, making=every, applying=every)
    if zero.offload_optimizer:
        crossing = {1: wide + size, 2: 2 * wide + size, 3: 2 * wide}[stage]
        host = states | {gradients: part * crossing}
        if stage == 3:
            return Footprint(device={buffers: bucket}, host=host, making={REDUCED: bucket + 2 * largest * size})
        own = {buffers: largest * size}
        if stage == 2:
            return Footprint(device=own, host=host, making={REDUCED: 2 * (bucket + largest * size)})
        every = {gradients: float(trained * (size + wide if is_cast else size))}
        return Footprint(device=own, host=host, making=added(every, {REDUCED: bucket}), applying=every)
    if stage == 3:
        return Footprint(
            device=states | {gradients: part * wide, buffers: bucket},
            making={REDUCED: bucket + 2 * largest * size},
            applying={gradients: min(part, _setting(workload, "sub_group_size")) * wide},
        )
    if stage == 1 and is_cast:
        reduced = min(trained, elements) * (wide + size) if num_processes > 1 else 0
        narrow = {gradients: float(trained * size)}
        return Footprint(
            device=states | {gradients: float(trained * wide)},
            making=added(narrow, {REDUCED: reduced + largest * size}),
            applying=narrow,
        )
    summed = part * wide * (1 if is_cast else 2)
    applying = {gradients: max(summed, part * wide + min(part, largest) * NORM_ITEMSIZE)}
    if stage == 1:
        making = {gradients: trained * size + part * wide, REDUCED: bucket + largest * size}
    else:
        making = {gradients: summed, REDUCED: 2 * (bucket + largest * size)}
    return Footprint(device=states, making=making, applying=applying)


@lru_cache
def adapted_numbers(held: Held) -> int:
    """Numbers of an adapter's A and B; 0 without one."""
    if held.adapter is None:
        return 0
    rules = adapter_rules(held.config, held.adapter)
    return held.adapter.rank * sum(one.inputs + one.outputs for one in rules) * held.config.num_layers


def trained_numbers(held: Held) -> int:
    """Numbers that training changes, on all devices together."""
    if held.adapter is None:
        return total_numbers(held.config, held.head)
    return adapted_numbers(held) + (held.config.hidden_size if held.head == "scalar" else 0)


@lru_cache
def merged_numbers(held: Held) -> int:
    """Numbers of the weights that an adapter changes; 0 without one."""
    if held.adapter is None:
        return 0
    rules = adapter_rules(held.config, held.adapter)
    return sum(one.inputs * one.outputs for one in rules) * held.config.num_layers


@lru_cache
def largest_numbers(held: Held) -> int:
    """Numbers of the largest trained parameter."""
    if held.adapter is not None:
        rules = adapter_rules(held.config, held.adapter)
        return held.adapter.rank * max(max(one.inputs, one.outputs) for one in rules)
    return max(math.prod(slot.shape) for slot in model_slots(held.config, held.head).values())


@lru_cache
def small_numbers(config: ModelConfig, head: Head, limit: int) -> int:
    """Numbers of the parameters of fewer than `limit`, which stage 3 leaves whole."""
    table = model_slots(config, head)
    sizes = [(math.prod(slot.shape), config.num_layers if slot.per_layer else 1) for slot in table.values()]
    return sum(size * count for size, count in sizes if size < limit)


# Phases ------------------------------------------------------------------------------------------------------------


def phases(workload: Workload, num_processes: int) -> list[Phase]:
    """Every phase of every stage of the workload on so many processes, in the order in which they come."""
    found: list[Phase] = []
    for step in workload.supervised:
        found += _supervised(workload, step, num_processes)
    if workload.rollouts is not None:
        found += _rl(workload, workload.rollouts, num_processes)
    return found


def _supervised(workload: Workload, step: Supervised, num_processes: int) -> Iterator[Phase]:
    model = footprint(step.model, workload, num_processes)
    copy = _decode_copy(workload, step.model, num_processes)
    working = _updating(workload, step.model, model, step.micro, step.columns, num_processes)
    yield Phase(name=f"{step.stage} update", device=added(model.device, working), host=model.host)
    if step.stage == "sft" and copy:  # answers for the report
        yield Phase(name="sft samples", device=added(model.device, copy), host=model.host)


def _rl(workload: Workload, rollouts: Rollouts, num_processes: int) -> Iterator[Phase]:
    each = {one.name: footprint(one, workload, num_processes) for one in rollouts.models}
    device = added(*(one.device for one in each.values()))
    host = added(*(one.host for one in each.values()))
    copy, cache, drawing = {}, {}, {}
    if not is_server(workload.settings.rollout):  # which generates in memory of its own
        cache, drawing = _decoding(workload, rollouts, num_processes)
        copy = _decode_copy(workload, rollouts.policy, num_processes)
    yield Phase(name="rl rollout", device=added(device, copy, cache, drawing), host=host)
    forward = {
        one.name: added(
            each[one.name].running,
            _activations(workload, one, rollouts.micro, rollouts.columns, num_processes, training=False),
        )
        for one in rollouts.models
    }
    yield Phase(name="rl scoring", device=added(device, max(forward.values(), key=_sum)), host=host)
    for one in (rollouts.policy, rollouts.critic):
        working = _updating(workload, one, each[one.name], rollouts.micro, rollouts.columns, num_processes)
        yield Phase(name=f"rl update, {one.name}", device=added(device, working), host=host)


def _updating(workload: Workload, held: Held, own: Footprint, micro: int, columns: int, num_processes: int) -> Parts:
    """What an optimizer step takes: the fuller of making gradients and applying them."""
    working = _activations(workload, held, micro, columns, num_processes, training=True)
    return max(added(own.running, own.making, working), own.applying, key=_sum)


def _sum(parts: Parts) -> float:
    return sum(parts.values())


def _activations(
    workload: Workload, held: Held, micro: int, columns: int, num_processes: int, *, training: bool
) -> Parts:
    """Of the rows that a process takes of a micro-batch, under `layout.remat` where gradients follow."""
    config, size = held.config, ITEMSIZE[workload.compute]
    rows = math.ceil(micro / num_processes)
    layers = layer_bytes(config, rows, columns, size, workload.settings.remat if training else None)
    logits = min(workload.chunk, rows * columns) * config.vocab_size * (4 * LOGITS + (size if size < 4 else 0))
    return {"activations": layers, "vocabulary chunk": float(logits if held.head == "lm" else 0)}


def layer_bytes(config: ModelConfig, rows: int, columns: int, size: int, remat: Remat | None) -> float:
    """Bytes of activations in all layers of rows x columns tokens of `size` bytes a number. remat None: without
    gradients.

    Numbers for each token of one layer: `kept` for a backward pass (inputs of norms, products and activation function;
    norms work in float32), of which `dots` are results of products, and about half of it again while the layer runs.
    Measured on Llama's layers, within a tenth.
    """
    width, num_layers, is_cast = config.hidden_size, config.num_layers, size < 4
    scores = mask = 0.0
    if isinstance(config, DecoderConfig):
        inner = config.experts.inner * config.experts.top_k if config.experts else config.intermediate_size
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        kept = (10 if is_cast else 6) * width + (4 if config.gated else 2) * inner + heads
        dots = heads + 2 * width + (2 if config.gated else 1) * inner
        pairs = float(rows * columns * columns)
        mask = pairs * (1 + size)
        if config.attention_softcap is not None or config.alibi:  # attention written out, not a fused kernel
            scores = pairs * config.num_heads * (4 + size)
    else:
        kept, dots = 4 * width, width
    token = rows * columns * size
    if remat is None:
        return token * (2 * width + kept) + scores + mask
    if remat == "none":
        return (num_layers + 1) * (token * kept + scores) + mask
    saved = width + (dots if remat == "dots" else 0)
    return token * (num_layers * saved + 1.5 * kept) + 2 * scores + mask


def _decode_copy(workload: Workload, held: Held, num_processes: int) -> Parts:
    """What generating reads beside the training weights: all of them at stage 3, else what an adapter changes; where
    several processes decode together, each its part of the layers."""
    layout, size = workload.settings.layout, ITEMSIZE[workload.compute]
    tensor, merged = layout.decode.tensor, merged_numbers(held)
    numbers = total_numbers(held.config, held.head)
    layers = active_numbers(held.config)
    if layout.zero_of(held.role, is_trained=True).stage < 3:
        return added({"decode copy": float((layers / tensor if tensor > 1 else merged) * size)})
    group = min(numbers * size, layout.switch_chunk or SWITCH_GROUP) if num_processes > 1 else 0
    copied = numbers - layers + layers / tensor
    return added({"decode copy": copied * size, "gathered weights": float(group)})


def _decoding(workload: Workload, rollouts: Rollouts, num_processes: int) -> tuple[Parts, Parts]:
    """The cache of the rows that decode at once on a process, and beside it their logits and a layer of their
    prompts."""
    config, size, tensor = rollouts.policy.config, ITEMSIZE[workload.compute], workload.settings.layout.decode.tensor
    rows = max(rollouts.rows, rollouts.evaluated)
    rows = math.ceil(min(rollouts.sampling.decode_rows or rows, rows) / max(1, num_processes // tensor))
    heads = config.num_kv_heads if isinstance(config, DecoderConfig) else 1
    share = max(1, heads // tensor) / heads
    at_once = prefill_columns(
        rows=rows, width=rollouts.prompt, micro=math.ceil(rollouts.micro / num_processes), columns=rollouts.columns
    )
    return {"KV cache": rows * rollouts.columns * cache_per_token(config, size) * share}, {
        "activations": layer_bytes(config, rows, at_once, size, None),
        "vocabulary chunk": float(rows * config.vocab_size * LOGITS * 4),
    }


def prefill_columns(*, rows: int, width: int, micro: int, columns: int) -> int:
    """Columns of `rows` prompts that decoding reads at once (of `width`): no more tokens than scoring reads of a
    micro-batch, `micro` rows of prompt and response, `columns` together."""
    return max(1, min(width, micro * columns // rows))


def cache_per_token(config: ModelConfig, itemsize: int) -> float:
    """Bytes of keys and values of one column of one row."""
    if not isinstance(config, DecoderConfig):
        return 0.0
    return 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
