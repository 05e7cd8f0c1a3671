"""FLOPs and bytes of a workload's phases: what the mathematics asks for, nothing that is computed twice.

Products only, a multiply-add counted as two; attention over whole rows, as both engines' products run. Bytes of
decoding: what every step must read, the weights once and the cache once.
"""

from __future__ import annotations

import math

from diptych.bench.workloads import Workload
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, read_model, tensor_shapes
from diptych.plan.costs import forward

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


def phase_flops(workload: Workload) -> dict[str, float]:
    """FLOPs of each phase of an iteration (`contest.PHASES`) on full-length rows; a phase without products is absent.

    The forward passes that score a rollout read the language-model head at the answer only. A gradient costs two
    forward passes, so an update three. The policy has a pass of its own where the sampler's log-probabilities are not
    taken (`RLRecipe.old_logprobs`): in bfloat16.
    """
    config = read_model(workload.config())
    rows, prompt, answer = workload.batch, workload.prompt, workload.answer
    whole = prompt + answer
    first = forward(config, rows=rows, columns=prompt, scored=1, head="lm")
    # A step at answer token t attends to prompt + t columns: half the answer on average.
    step = forward(config, rows=rows, columns=1, scored=1, head="lm", keys=prompt + answer / 2)
    policy = forward(config, rows=rows, columns=whole, scored=answer, head="lm").all
    scalar = forward(config, rows=rows, columns=whole, scored=whole, head="scalar").all
    old = {"score/policy": policy} if workload.trainer_scores else {}
    return {
        "prefill": first.all,
        "decode": (answer - 1) * step.all,
        **old,
        "score/reference": policy,
        "score/critic": scalar,
        "score/reward": scalar,
        "update/policy": 3 * policy * workload.epochs,
        "update/critic": 3 * scalar * workload.epochs,
    }


def decode_bytes(workload: Workload) -> float:
    """Bytes that decoding must read: at every step all weights but the embedding's other rows, and the cache so far."""
    config = read_model(workload.config())
    size = ITEMSIZE[workload.precision]
    weights = parameters(workload)
    if not config.tie_word_embeddings:  # one row of the embedding for each token
        weights -= config.vocab_size * embedding_width(config)
    cache = 0.0
    if isinstance(config, DecoderConfig):
        columns = workload.prompt + workload.answer / 2
        cache = 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * columns * workload.batch
    return (workload.answer - 1) * size * (weights + cache)


def parameters(workload: Workload) -> int:
    """Of the policy."""
    return sum(math.prod(shape) for shape in tensor_shapes(read_model(workload.config()), "lm").values())


def embedding_width(config: ModelConfig) -> int:
    return config.embedding_size if isinstance(config, DecoderConfig) else config.hidden_size
