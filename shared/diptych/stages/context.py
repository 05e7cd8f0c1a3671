"""What every stage is given, and the bookkeeping that all stages share."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.algorithms.schedules import learning_rate
from diptych.data.examples import PairExample, PromptExample, Split, TokenExample
from diptych.data.tokenizer import Tokenizer
from diptych.engine import MASTERS, Engine, Metrics, Model, ModelSpec, OptimizerSpec, Role, Tensors
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, tensor_shapes
from diptych.recipe.schema import AdapterRecipe, OptimizerRecipe, Recipe
from diptych.run.directory import RunDirectory
from diptych.stages.adapters import merged_weights, start_adapter
from diptych.stages.recording import NoRecorder, Recorder
from diptych.weights.adapters import Adapter, write_adapter
from diptych.weights.huggingface import Checkpoint, write_checkpoint
from diptych.weights.tensors import StreamedTensors

NUM_SAMPLES = 6  # answers shown in the report before and after a stage


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """The data of the requested stages, read and checked before anything is written."""

    demonstrations: Split[TokenExample] | None = None
    preferences: Split[PairExample] | None = None
    prompts: Split[PromptExample] | None = None

    def longest(self) -> dict[str, int]:
        """Tokens of the longest row of each stage; of rl: of its longest prompt."""
        splits = {"sft": self.demonstrations, "reward": self.preferences, "rl": self.prompts}
        return {
            stage: max(len(part.tokens) for example in (*split.train, *split.held_out) for part in _parts(example))
            for stage, split in splits.items()
            if split is not None
        }

    def describe(self) -> dict[str, Any]:
        """Of each kind of data that was read: rows to train on and held out, and a checksum of every token of every
        example, in their order."""
        found = {}
        for name in ("demonstrations", "preferences", "prompts"):
            split = getattr(self, name)
            if split is None:
                continue
            mark = 0
            for example in (*split.train, *split.held_out):
                for part in _parts(example):
                    mark = zlib.crc32(np.asarray(part.tokens, "<i4").tobytes(), mark)
            found[name] = {"train": len(split.train), "held_out": len(split.held_out), "fingerprint": f"{mark:08x}"}
        return found


def _parts(example: TokenExample | PairExample | PromptExample) -> tuple[TokenExample | PromptExample, ...]:
    return (example.chosen, example.rejected) if isinstance(example, PairExample) else (example,)


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """A run in progress.

    model_directories: the input of each stage by role ("sft", "reward", "policy", "reward_model"). tokenizers,
    tokenizer_directories: what each role reads with, and where its files are; sft and policy have the same. reader:
    how a reward model with another tokenizer reads rollouts (`reading.TextReading`); None where it takes the policy's
    tokens.

    resume: go on from the newest checkpoint of the stage where there is one. recorder: watches (`recording.py`).
    """

    recipe: Recipe
    engine: Engine
    run: RunDirectory
    tokenizers: Mapping[str, Tokenizer]
    tokenizer_directories: Mapping[str, Path]
    datasets: Datasets
    model_directories: Mapping[str, Path] = field(default_factory=dict)
    reader: Callable[..., Any] | None = None
    resume: bool = False
    recorder: Recorder = field(default_factory=NoRecorder)

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's; of a run that trains a reward model only, that model's."""
        return self.tokenizers[self._main]

    @property
    def tokenizer_directory(self) -> Path:
        return self.tokenizer_directories[self._main]

    @property
    def _main(self) -> str:
        return next(role for role in ("policy", "sft", "reward") if role in self.tokenizers)

    def balance(self, model: ModelConfig) -> float:
        """The weight of the router's balance loss for a model: the recipe's, else its config.json's; 0 without
        experts."""
        experts = model.experts if isinstance(model, DecoderConfig) else None
        if experts is None:
            return 0.0
        wanted = self.recipe.model.balance_coef
        return experts.balance_coef if wanted is None else wanted

    def model(
        self,
        checkpoint: Checkpoint,
        *,
        optimizer: OptimizerSpec | None,
        micro_batch_size: int,
        role: Role = "policy",
        adapter: AdapterRecipe | None = None,
    ) -> Model:
        """Put a checkpoint on the accelerator, to be trained where `optimizer` is given: an adapter of it, or all."""
        started = None
        if adapter is not None:
            checkpoint, started = start_adapter(
                adapter, checkpoint, seed=self.recipe.seed, precision=MASTERS[self.recipe.precision]
            )
        return self.engine.model(
            ModelSpec(
                adapter=None if started is None else started.spec,
                adapter_weights={} if started is None else started.weights,
                config=checkpoint.config,
                weights=checkpoint.weights,
                head=checkpoint.head,
                optimizer=optimizer,
                micro_batch_size=micro_batch_size,
                role=role,
                logprob_chunk=self.recipe.logprob_chunk,
            )
        )

    def save_trained(self, name: str, like: Checkpoint, model: Model, *, role: str, ema: bool = False) -> None:
        """Leave what was trained (or its average): models/NAME whole, and of an adapter models/NAME-adapter too."""
        spec = model.spec.adapter
        if spec is None:
            self.save_model(name, like, model.ema_weights if ema else model.weights, role=role)
            return
        adapter = Adapter(spec=spec, weights=model.ema_weights() if ema else model.adapter_weights())
        directory, origin = self.run.model_path(f"{name}-adapter"), self.tokenizer_directories[role]
        base = str(self.model_directories[role])
        self.run.world.first(
            lambda: write_adapter(directory, adapter, like.model, like.head, base=base, tokenizer_directory=origin),
            leaves=directory,
        )

        def merged(names: Sequence[str]) -> Tensors:
            return merged_weights(like, spec, model.weights(names), adapter.weights)

        self.save_model(name, like, merged, role=role)

    def save_model(self, name: str, like: Checkpoint, read: Callable[[Sequence[str]], Tensors], *, role: str) -> Path:
        """Write models/NAME with `like`'s config and the tokenizer of the role that it started from.

        read: names -> those tensors of the model. Every process reads all of them, some at a time; process 0 writes.
        """
        directory = self.run.model_path(name)
        tokenizer = self.tokenizers[role]
        ends = tokenizer.eos_token_ids  # Llama 3 has several
        tokens = {
            "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
        shapes = tensor_shapes(like.model, like.head)
        kind = np.dtype(MASTERS[self.recipe.precision])
        weights = StreamedTensors(shapes, dict.fromkeys(shapes, kind), read)
        checkpoint = replace(like, config=like.config | tokens, weights=weights)
        origin = self.tokenizer_directories[role]
        write_checkpoint(directory, checkpoint, tokenizer_directory=origin, world=self.run.world)
        return directory


@dataclass
class Clock:
    """Seconds that a stage has worked, over all its resumed parts."""

    before: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._start


def optimizer_spec(recipe: OptimizerRecipe, *, ema_decay: float | None = None) -> OptimizerSpec:
    """The engine's view of a recipe's optimizer."""
    return OptimizerSpec(
        name=recipe.name,
        beta1=recipe.betas[0],
        beta2=recipe.betas[1],
        eps=recipe.eps,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        ema_decay=ema_decay,
    )


def schedule(peak: float, recipe: OptimizerRecipe, num_steps: int) -> Callable[[int], float]:
    """step -> learning rate, an explicit number for every optimizer step."""
    return lambda step: learning_rate(
        step, peak=peak, num_steps=num_steps, schedule=recipe.schedule, warmup_steps=recipe.warmup_steps
    )


def add_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Combine metrics that were divided by one global denominator: sums, and maxima for names in `_max`."""
    total: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            else:
                total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value
    return total
