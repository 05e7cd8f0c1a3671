"""Hand-made steps of rl for the tests of the ladder: one healthy step, and the same one computed "elsewhere"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diptych.parity.trace import Recorded, Step, Trace, TraceWriter

ROWS, PROMPT, NEW, PROBE = 4, 3, 5, 2
LENGTHS = (5, 3, 4, 5)  # response tokens of each row
TENSORS: Mapping[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 8),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.down_proj.weight": (6, 8),
    "model.norm.weight": (6,),
}
RATE, BETA1, BETA2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.2


@cache
def healthy(step: int = 0, *, dtype: Any = np.float32, seed: int = 0) -> Step:
    """A step whose arrays belong together: masks, shapes, moments from gradients, weights from moments."""
    draws = np.random.default_rng((seed, step))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (draws.standard_normal(shape) * scale).astype(dtype)

    mask = np.arange(NEW) < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, draws.integers(3, 50, (ROWS, NEW)), 0).astype(np.int32)
    attention = np.arange(PROMPT) >= np.array([0, 1, 2, 0])[:, None]
    logprobs = np.where(mask, -np.abs(normal(ROWS, NEW)) - dtype(0.1), dtype(0))
    reference = np.where(mask, logprobs + normal(ROWS, NEW, scale=0.1), dtype(0))
    slots = np.arange(NEW + 1) < np.array(LENGTHS)[:, None] + 1
    values = np.where(slots, normal(ROWS, NEW + 1), dtype(0))
    whole = np.concatenate([attention, mask], axis=1)[:PROBE]
    probe_tokens = np.where(whole, np.concatenate([np.ones((ROWS, PROMPT)), tokens], axis=1)[:PROBE], 0)
    columns = np.concatenate([np.zeros((ROWS, PROMPT), bool), mask], axis=1)[:PROBE]

    def made(values: np.ndarray, layout: str, mask: str | None = None) -> Recorded:
        return Recorded(values=values, layout=layout, mask=mask)

    def given(values: np.ndarray, layout: str) -> Recorded:
        return Recorded(values=values, layout=layout, phase="given")

    tensors = {
        "rows": made(np.arange(ROWS, dtype=np.int64) + 10, "rows"),
        "prompts/tokens": made(np.where(attention, 7, 0).astype(np.int32), "rows prompt", "prompts/attention"),
        "prompts/attention": made(attention, "rows prompt"),
        "response/tokens": made(tokens, "rows new", "response/mask"),
        "response/mask": made(mask, "rows new"),
        "response/margins": made(np.full((ROWS, NEW), 0.01, dtype), "rows new", "response/mask"),
        "response/finish": made(np.array([0, 1, 1, 0], np.int32), "rows"),
        "response/logprobs": made(logprobs.copy(), "rows new", "response/mask"),
        "used/tokens": made(tokens.copy(), "rows new"),
        "used/mask": made(mask.copy(), "rows new"),
        "used/slots": made(slots, "rows slots"),
        "scores": made(normal(ROWS), "rows"),
        "ref_logprobs": made(reference, "rows new", "used/mask"),
        "logprobs": made(logprobs, "rows new", "used/mask"),
        "values": made(values, "rows slots", "used/slots"),
        "kl": made(np.where(mask, logprobs - reference, 0).sum(axis=1).astype(dtype), "rows"),
        "returns": made(normal(ROWS, NEW), "rows new", "value_mask"),
        "advantages": made(normal(ROWS, NEW), "rows new", "policy_mask"),
        "policy_mask": made(mask.copy(), "rows new"),
        "value_mask": made(mask.copy(), "rows new"),
    }
    metrics = {"objective/kl": 0.25, "policy/approxkl_avg": 0.01, "timing_s/update": 1.5, "rollout/tokens_crc32": 9e8}
    for role in ("policy", "critic"):
        outputs = np.where(columns, -np.abs(normal(PROBE, PROMPT + NEW)) - dtype(0.1), dtype(0))
        tensors |= {
            f"{role}/probe/tokens": given(probe_tokens.astype(np.int32), "batch time"),
            f"{role}/probe/attention": given(whole, "batch time"),
            f"{role}/probe/arrays/mask": given(columns.astype(dtype), "batch time"),
            f"{role}/probe/arrays/old_logprobs": given(outputs + dtype(0.3) * normal(*outputs.shape), "batch time"),
            f"{role}/probe/arrays/advantages": given(normal(*outputs.shape), "batch time"),
            f"{role}/outputs": made(outputs, "batch time", f"{role}/probe/attention"),
            f"{role}/next_outputs": made(outputs + dtype(0.01), "batch time", f"{role}/probe/attention"),
        }
        for name, shape in TENSORS.items():
            gradient, weight = normal(*shape, scale=0.1), normal(*shape)
            first, second = normal(*shape, scale=0.05), np.abs(normal(*shape, scale=0.01))
            new = [BETA1 * first + (1 - BETA1) * gradient, BETA2 * second + (1 - BETA2) * gradient**2]
            step_size = RATE * (new[0] / (1 - BETA1**3) / (np.sqrt(new[1] / (1 - BETA2**3)) + EPS))
            decay = RATE * DECAY * weight if weight.ndim > 1 else np.zeros_like(weight)
            tensors |= {
                f"{role}/start/weights/{name}": given(weight, "as stored"),
                f"{role}/start/first/{name}": given(first, "as stored"),
                f"{role}/start/second/{name}": given(second, "as stored"),
                f"{role}/gradient/{name}": made(gradient, "as stored"),
                f"{role}/first/{name}": made(new[0].astype(dtype), "as stored"),
                f"{role}/second/{name}": made(new[1].astype(dtype), "as stored"),
                f"{role}/weights/{name}": made((weight - step_size - decay).astype(dtype), "as stored"),
            }
        metrics |= {
            f"{role}/loss": 0.1, f"{role}/loss/loss_avg": 0.1, f"{role}/grad_norm": 0.7, f"{role}/step": 2.0,
            f"{role}/learning_rate": RATE,
        }  # fmt: skip
    return Step(stage="rl", step=step, metrics=metrics, tensors=tensors)


def elsewhere(step: Step, *, noise: float = 3e-8, seed: int = 1) -> Step:
    """The same step computed by another library: what it made differs by rounding, what it was given does not."""
    draws = np.random.default_rng((seed, step.step))
    tensors = {}
    for name, one in step.tensors.items():
        values = one.values
        if one.phase == "made" and values.dtype.kind == "f":
            values = (values * (1 + noise * draws.standard_normal(values.shape))).astype(values.dtype)
        tensors[name] = replace(one, values=values.copy())
    return replace(step, tensors=tensors, metrics=dict(step.metrics))


def change(step: Step, name: str, values: np.ndarray | None = None, **fields: Any) -> Step:
    """The step with one array changed: its values, or its mask, layout, phase."""
    fields = fields if values is None else fields | {"values": values}
    return replace(step, tensors=step.tensors | {name: replace(step.tensors[name], **fields)})


def put(step: Step, name: str, index: Any, value: float) -> Step:
    """The step with some elements of one array changed."""
    values = step.array(name).copy()
    values[index] = value
    return change(step, name, values)


def without(step: Step, *names: str) -> Step:
    """The step without these arrays and scalars."""
    return replace(
        step,
        tensors={name: one for name, one in step.tensors.items() if name not in names},
        metrics={name: one for name, one in step.metrics.items() if name not in names},
    )


def trace(
    directory: Path,
    steps: Sequence[Step],
    *,
    name: str = "jax",
    precision: str = "float32",
    replay: Trace | None = None,
    **provenance: Any,
) -> Trace:
    """A trace on disk of these steps. replay: the trace that it replays."""
    about = {"replay": None if replay is None else {"trace": replay.fingerprint(), "producer": "?"}}
    with TraceWriter(
        directory, producer={"name": name, "precision": precision}, provenance=provenance | about
    ) as writer:
        for step in steps:
            writer.add(step)
    return Trace(directory)
