"""A workload on disk, as any user's work would be: model directories, a tokenizer, prompts, a recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from diptych import random
from diptych.bench.workloads import Workload
from diptych.recipe.load import recipe_from_text
from diptych.recipe.schema import Recipe
from diptych.weights.huggingface import initial_checkpoint, with_scalar_head, write_checkpoint

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}


def write_work(workload: Workload, folder: Path) -> None:
    """Leave tokenizer, policy, reward model and prompts of a workload in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workload.json").write_text(json.dumps(dataclasses.asdict(workload)), encoding="utf-8")
    _write_tokenizer(folder / "tokenizer", workload.vocabulary)
    config = workload.config() | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    policy = initial_checkpoint(config, seed=workload.seed)
    reward = with_scalar_head(initial_checkpoint(config, seed=workload.seed + 1), seed=workload.seed + 1)
    for name, checkpoint in (("policy", policy), ("reward", reward)):
        write_checkpoint(folder / name, checkpoint, tokenizer_directory=folder / "tokenizer")
    # As many prompts as ten batches have, and held-out ones, which are never used.
    rows = 10 * workload.batch
    draws = random.uniforms(workload.seed, "bench/prompts", step=0, rows=range(rows), num_positions=workload.prompt + 1)
    first = len(SPECIAL)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for row in draws:
            length = workload.prompt - int(row[0] * (workload.prompt // 2 + 1)) if workload.ragged else workload.prompt
            ids = first + np.floor(row[1 : 1 + length] * (workload.vocabulary - first)).astype(int)
            file.write(json.dumps({"prompt": " ".join(f"t{token}" for token in ids)}) + "\n")


def read_work(folder: Path) -> Workload:
    """The workload whose files are in `folder`."""
    return Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word, one token: `t17` is token 17."""
    folder.mkdir(parents=True, exist_ok=True)
    words = SPECIAL | {f"t{token}": token for token in range(len(SPECIAL), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**9, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


def recipe(workload: Workload, folder: Path) -> Recipe:
    """The recipe of a workload whose files are in `folder`."""
    longest = workload.prompt + workload.answer
    settings = {
        "name": workload.name,
        "seed": workload.seed,
        "stages": ["rl"],
        "precision": workload.precision,
        "model": {"path": str(folder / "policy")},
        "data": {
            "prompts": {"path": str(folder / "prompts.jsonl"), "eval_fraction": 0.1},
            "chat": "never",
            "max_prompt_tokens": workload.prompt,
            "max_response_tokens": workload.answer,
            "buckets": sorted({workload.prompt, longest}),
        },
        "rl": {
            "reward": {"model_path": str(folder / "reward")},
            "learning_rate": 1e-5,
            "iterations": 1_000_000,
            "batch_size": workload.batch,
            "epochs": workload.epochs,
            "mini_batches": workload.mini_batches,
            "micro_batch_size": workload.rows_at_once,
        },
        "rollout": {"max_new_tokens": workload.answer},
        "layout": {"remat": workload.remat, "zero": {"stage": workload.zero}},
    }
    return recipe_from_text(json.dumps(settings), name=workload.name)
