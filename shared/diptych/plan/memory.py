"""Bytes of one device, counted exactly: from the shapes of a model's parameters and the rules that lay them out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from diptych.families.adapter import adapter_rules
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, model_slots
from diptych.layout import DECODE_RULES, TRAIN_RULES, MeshShape, shard_size
from diptych.plan.workload import Held, Rollouts, Workload

ITEMSIZE: Mapping[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2}
Parts = dict[str, float]  # what -> bytes of one device


@lru_cache
def model_numbers(config: ModelConfig, head: str, mesh: MeshShape, *, decodes: bool = False) -> int:
    """Parameters on one device of a train mesh, or of a decode mesh."""
    rules = DECODE_RULES if decodes else TRAIN_RULES
    table = model_slots(config, "lm" if head == "lm" else "scalar")
    return sum(shard_size(slot, mesh, rules) * (config.num_layers if slot.per_layer else 1) for slot in table.values())


def trained_numbers(held: Held) -> int:
    """Trained parameters on one device: an adapter is whole on each of them."""
    if held.optimizer is None:
        return 0
    if held.adapter is None:
        return model_numbers(held.config, held.head, held.mesh)
    rules = adapter_rules(held.config, held.adapter)
    of_layer = sum(held.adapter.rank * (one.inputs + one.outputs) for one in rules)
    table = model_slots(held.config, held.head)
    score = shard_size(table["score"], held.mesh, TRAIN_RULES) if held.head == "scalar" else 0
    return of_layer * held.config.num_layers + score


def held_bytes(held: Held, workload: Workload) -> Parts:
    """What a model keeps on each device: weights, moments, average."""
    size = ITEMSIZE[workload.stored(held)]
    weights, trained = model_numbers(held.config, held.head, held.mesh), trained_numbers(held)
    if held.adapter is not None:
        weights += trained - (held.config.hidden_size // held.mesh.fsdp if held.head == "scalar" else 0)
    parts: Parts = {f"{held.name} weights": float(weights * size)}
    if held.optimizer is not None:
        moments = 2 if held.optimizer.name == "adamw" else 1
        parts[f"{held.name} moments"] = float(moments * trained * size)
        if held.optimizer.ema_decay is not None:
            parts[f"{held.name} average"] = float(trained * size)
    return parts


def decode_copy(rollouts: Rollouts, compute: str) -> float:
    """The policy in the type and layout in which it decodes."""
    return float(model_numbers(rollouts.policy.config, "lm", rollouts.decode, decodes=True) * ITEMSIZE[compute])


def cache_bytes(rollouts: Rollouts, compute: str, rows: int | None = None) -> float:
    """Keys and values of the rows that decode at once (None: all), or a recurrent model's states."""
    config, mesh = rollouts.policy.config, rollouts.decode
    rows = rollouts.rows if rows is None else rows
    local = rows // mesh.data if rows % mesh.data == 0 else rows
    if not isinstance(config, DecoderConfig):
        return float(local * config.num_layers * config.hidden_size * ITEMSIZE[compute])
    heads = config.num_kv_heads // mesh.tensor if config.num_kv_heads % mesh.tensor == 0 else config.num_kv_heads
    per_column = 2 * config.num_layers * heads * config.head_dim * ITEMSIZE[compute]
    return float(local * rollouts.columns * per_column)


def resident(workload: Workload) -> dict[str, Parts]:
    """What lies on each device through each phase, whatever runs: phase -> part -> bytes."""
    masters, compute = workload.masters, workload.compute
    phases: dict[str, Parts] = {}
    for step in workload.supervised:
        trained = trained_numbers(step.model) * ITEMSIZE[masters]
        phases[step.stage] = held_bytes(step.model, workload) | {"gradients": float(trained)}
    rollouts = workload.rollouts
    if rollouts is None:
        return phases
    always: Parts = {}
    waiting: Parts = {}
    for one in rollouts.models:
        (waiting if one.offloaded else always).update(held_bytes(one, workload))
    trained = max(trained_numbers(one) for one in (rollouts.policy, rollouts.critic))
    copy = {"decode copy": decode_copy(rollouts, compute)}  # until the first update
    cache = {"KV cache": cache_bytes(rollouts, compute, rollouts.sampling.decode_rows)}
    phases["rollout"] = always | copy | cache
    phases["scoring"] = always | waiting | copy
    phases["update"] = always | {"gradients": float(trained * ITEMSIZE[masters])}
    return phases


@lru_cache
def total_numbers(config: ModelConfig, head: str) -> int:
    """Parameters of a model."""
    table = model_slots(config, "lm" if head == "lm" else "scalar")
    return sum(math.prod(slot.shape) * (config.num_layers if slot.per_layer else 1) for slot in table.values())


@lru_cache
def active_numbers(config: ModelConfig) -> int:
    """Numbers in the matrices of the layers that one token meets: of its experts only the chosen ones."""
    total = 0
    for slot in model_slots(config, "scalar").values():
        if slot.per_layer and len(slot.canonical) >= 2:
            size = int(np.prod(slot.canonical))
            chosen = (
                config.experts.top_k if slot.per_expert and isinstance(config, DecoderConfig) and config.experts else 1
            )
            total += size * chosen
    return total * config.num_layers
