"""Bytes that a workload's phases must at least move, and with them each phase's limit: the roofline.

Counted: a pass's weights, once (of an embedding that only looks up rows, nothing); what a layer's products put out,
written once and read once; the cache; the optimizer's state. Not counted, because a kernel can do without moving them:
attention's scores, logits, everything elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diptych.bench.contest import GROUPS
from diptych.bench.flops import ITEMSIZE, decode_bytes, embedding_width, phase_flops
from diptych.bench.workloads import Workload
from diptych.engine import Head
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, read_model, tensor_shapes

ADAM = 7  # weights, gradient and two moments are read, weights and moments written


@dataclass(frozen=True)
class Limit:
    """What a phase asks for, and the seconds that a machine needs at least: products at its peak, or bytes at the speed
    of a copy, whichever takes longer. flops, bytes: the phase's; by: "compute" or "memory"."""

    flops: float
    bytes: float
    seconds: float
    by: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes


def phase_bytes(workload: Workload) -> dict[str, float]:
    """Bytes of each phase that has FLOPs (`flops.phase_flops`).

    A pass has `rows_at_once` rows, the prompts' all. A gradient moves twice what a forward pass moves (weights read,
    gradients written; likewise the products' outputs), so an update three times; every optimizer step adds Adam's, in
    float32 at least. Decoding is `flops.decode_bytes`.
    """
    config = read_model(workload.config())
    size = ITEMSIZE[workload.precision]
    columns = workload.prompt + workload.answer
    passes = workload.batch // workload.rows_at_once
    between = workload.batch * columns * _outputs(config) * size
    policy = passes * _read(config, "lm") * size + between
    scalar = passes * _read(config, "scalar") * size + between
    steps = workload.epochs * workload.mini_batches * ADAM * max(size, 4)
    cache = 0.0
    if isinstance(config, DecoderConfig):
        cache = 2.0 * workload.batch * workload.prompt * config.num_layers * config.num_kv_heads * config.head_dim
    prompts = workload.batch * workload.prompt * _outputs(config)
    old = {"score/policy": policy} if workload.trainer_scores else {}
    return {
        "prefill": (_read(config, "lm") + cache + prompts) * size,
        "decode": decode_bytes(workload),
        **old,
        "score/reference": policy,
        "score/critic": scalar,
        "score/reward": scalar,
        "update/policy": 3 * policy * workload.epochs + steps * _weights(config, "lm"),
        "update/critic": 3 * scalar * workload.epochs + steps * _weights(config, "scalar"),
    }


def limits(workload: Workload, ceilings: Mapping[str, float]) -> dict[str, Limit]:
    """Of each phase, then of "rollout", "score", "update" and "iteration": sums, limited by what limits the dearest
    part. Empty where `ceilings` lacks FLOP/s or bytes/s."""
    peak, bandwidth = ceilings.get("flops"), ceilings.get("copy_bytes")
    if not peak or not bandwidth:
        return {}
    moved, found = phase_bytes(workload), {}
    for phase, flops in phase_flops(workload).items():
        compute, memory = flops / peak, moved[phase] / bandwidth
        by = "compute" if compute >= memory else "memory"
        found[phase] = Limit(flops, moved[phase], max(compute, memory), by)
    sums: dict[str, Limit] = {}
    for name, parts in (*GROUPS.items(), ("iteration", list(found))):
        of = [one for phase, one in found.items() if phase in parts or phase.split("/")[0] in parts]
        flops, total, seconds = (sum(getattr(one, what) for one in of) for what in ("flops", "bytes", "seconds"))
        sums[name] = Limit(flops, total, seconds, max(of, key=lambda one: one.seconds).by)
    return found | sums


def _weights(config: ModelConfig, head: Head) -> int:
    """Parameters of a model with this head."""
    return sum(math.prod(shape) for shape in tensor_shapes(config, head).values())


def _read(config: ModelConfig, head: Head) -> int:
    """Parameters that a pass reads: an embedding only where it is the language model's head too."""
    is_head = head == "lm" and config.tie_word_embeddings
    return _weights(config, head) - (0 if is_head else config.vocab_size * embedding_width(config))


def _outputs(config: ModelConfig) -> float:
    """Numbers that the products of all layers put out for a token, each written once and read once."""
    if not isinstance(config, DecoderConfig):
        return 2.0 * config.num_layers * 2 * config.hidden_size  # of the input and of the state
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim  # query, key, value, what attention puts out
    inner = (2 if config.gated else 1) * config.intermediate_size
    return 2.0 * config.num_layers * (heads + inner + 2 * config.hidden_size)
