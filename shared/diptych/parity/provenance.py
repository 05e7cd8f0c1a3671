"""What a trace was computed of, and under which settings: enough to say what differs before any number does.

    {"recipe": the resolved recipe as YAML text, "name", "seed", "stages" (those that ran), "engine",
     "environment": `diptych.run.environment.describe_environment` with the engine's own account (versions, devices,
                    precision switches) under "engine_environment",
     "variables": environment variables that can reach a number,
     "models": {"sft"|"reward"|"policy"|"critic": {"config": config.json, "head": "lm"|"scalar",
                "weights": checksum of all tensors (`diptych weights check`); None where a stage of this run makes it}},
     "tokenizers": {the same keys: {"fingerprint", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_ids",
                    "chat_template": its text or None}},
     "data": {"demonstrations"|"preferences"|"prompts": {"train", "held_out": rows, "fingerprint": tokens in order}},
     "dropout": 0.0, "pad_side": "left" (prompts; rows of supervised stages are padded on the right),
     "depth", "every", "replay": None or {"trace": fingerprint, "producer": name}}

In a supervised stage the role "model" is the one that the stage is named after. The folder tokenizer/ of a trace is the
policy's tokenizer. Traces of other trainers (`diptych.parity.foreign`) hold what they know; what is missing is reported
as not known.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.data.tokenizer import Tokenizer
from diptych.parity.trace import Trace
from diptych.recipe.load import dump_recipe
from diptych.recipe.schema import Recipe
from diptych.run.environment import describe_environment
from diptych.stages.context import StageContext
from diptych.weights.huggingface import read_config
from diptych.weights.inspection import check_weights

PREFIXES = (
    "JAX_", "XLA_", "TF_", "NVIDIA_TF32", "CUBLAS_", "CUDA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_",
    "DS_", "DEEPSPEED_", "LIBTPU_", "DIPTYCH_",
)  # fmt: skip


def provenance(
    context: StageContext, recipe: Recipe, *, stages: Sequence[str], depth: str, every: int, replay: Trace | None
) -> dict[str, Any]:
    """The provenance of a run in progress. recipe: what the user asked for, before a replay put the recorded run's
    models in."""
    environment = describe_environment(context.engine.environment())
    return {
        "recipe": dump_recipe(recipe),
        "name": recipe.name,
        "seed": recipe.seed,
        "stages": list(stages),
        "engine": context.engine.name,
        "environment": environment,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        "models": _models(context),
        "tokenizers": {
            _key(role): describe_tokenizer(one) for role, one in context.tokenizers.items() if role != "reward_model"
        },
        "data": context.datasets.describe(),
        "dropout": 0.0,
        "pad_side": "left",
        "depth": depth,
        "every": every,
        "replay": None if replay is None else {"trace": replay.fingerprint(), "producer": replay.producer.get("name")},
    }


def _key(role: str) -> str:
    return "critic" if role == "reward_model" else role


def _models(context: StageContext) -> dict[str, Any]:
    found = {}
    heads = {"sft": "lm", "policy": "lm", "reward": "scalar", "reward_model": "scalar"}
    for role, origin in context.tokenizer_directories.items():
        directory = context.model_directories[role]
        found[_key(role)] = {
            "config": read_config(origin),
            "head": heads[role],
            "weights": check_weights(directory)["checksum"] if directory.is_dir() else None,
        }
    if "policy" in found and "critic" not in found:  # it starts from the policy
        found["critic"] = {**found["policy"], "head": "scalar", "weights": None}
    return found


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What reads alike has equal descriptions."""
    return {
        "fingerprint": f"{zlib.crc32(tokenizer.source().encode()):08x}",
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "chat_template": tokenizer.chat_template,
    }


def producer(context: StageContext) -> dict[str, Any]:
    """Who computes: engine, precision and the versions of what computes."""
    environment = context.engine.environment()
    versions = {
        name: environment[name] for name in ("jax", "torch", "transformers", "deepspeed") if name in environment
    }
    return {"name": context.engine.name, "precision": context.recipe.precision, **versions}


def leave_tokenizer(context: StageContext, directory: Path) -> None:
    """A copy of the policy's tokenizer, so that a trace can show its tokens as text."""
    directory.mkdir()
    context.tokenizer.save(directory)
