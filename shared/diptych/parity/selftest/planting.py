"""Planting bugs: an engine and models that do something wrong on purpose, around the real ones.

A bug is planted in one side only, between the stages and the engine, or in a function of the hinge that only this side
calls while it is planted. What is around the bug is the user's own setup.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from diptych.engine import (
    Engine,
    Loss,
    Model,
    ModelSpec,
    OptimizerSpec,
    OptimizerState,
    PromptBatch,
    TokenBatch,
    TrainBatch,
)
from diptych.families.decoder import DecoderConfig
from diptych.families.family import read_model
from diptych.stages.context import StageContext
from diptych.weights.huggingface import read_config

Plant = Callable[[StageContext], AbstractContextManager[StageContext | None]]
"""context -> the context with the bug in it, as long as it is open; None where there is nothing to plant it in."""


class Wrapped:
    """A model that passes everything on; subclasses do one thing wrong."""

    def __init__(self, model: Any):
        self.real = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _Engine(Wrapped):
    def __init__(self, engine: Engine, make: Callable[[Engine, ModelSpec], Any]):
        super().__init__(engine)
        self._make = make

    def model(self, spec: ModelSpec) -> Any:
        return self._make(self.real, spec)


def models(wrap: Callable[[Any], Any], *roles: str) -> Plant:
    """Models of these roles are wrapped (none named: those that are trained)."""

    def make(engine: Engine, spec: ModelSpec) -> Any:
        model = engine.model(spec)
        wanted = spec.role in roles if roles else spec.optimizer is not None
        return wrap(model) if wanted else model

    return engine(make)


def engine(make: Callable[[Engine, ModelSpec], Any]) -> Plant:
    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        yield replace(context, engine=_Engine(context.engine, make))  # pyright: ignore[reportArgumentType]

    return plant


def spec(change: Callable[[ModelSpec], ModelSpec | None]) -> Plant:
    """Trained models are built from another spec; a change that gives None has nothing to change here."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        applies: list[bool] = []

        def make(engine: Engine, spec: ModelSpec) -> Any:
            changed = change(spec) if spec.optimizer is not None else spec
            applies.append(changed is not None)
            return engine.model(changed or spec)

        yield replace(context, engine=_Engine(context.engine, make))  # pyright: ignore[reportArgumentType]
        if not all(applies):
            raise NotApplicable

    return plant


class NotApplicable(Exception):
    """This setup has nothing that the bug could be planted in."""


def config(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Plant:
    """Trained models compute what another config.json says."""

    def changed(old: ModelSpec) -> ModelSpec | None:
        new = change(dict(old.config))
        return None if new is None else replace(old, config=new)

    return spec(changed)


def setting(key: str, value: Any | Callable[[Any], Any]) -> Plant:
    """Another value of a setting of the recipe; a function of the old one."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        changed = _with(context.recipe, key.split("."), value)
        yield None if changed == context.recipe else replace(context, recipe=changed)

    return plant


def _with(group: Any, keys: list[str], value: Any) -> Any:
    assert is_dataclass(group)
    assert keys[0] in {one.name for one in fields(group)}
    old = getattr(group, keys[0])
    new = _with(old, keys[1:], value) if len(keys) > 1 else (value(old) if callable(value) else value)
    return replace(group, **{keys[0]: new})  # pyright: ignore[reportArgumentType]


def function(module: str, name: str, wrong: Callable[[Any], Any]) -> Plant:
    """A function of the hinge is replaced by `wrong(right one)` while the bug is planted."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        place = importlib.import_module(module)
        right = getattr(place, name)
        setattr(place, name, wrong(right))
        try:
            yield context
        finally:
            setattr(place, name, right)

    return plant


def in_attention(inner: Plant) -> Plant:
    """A bug that only models with attention can have: an RNN reads neither positions nor other columns."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        origins = context.tokenizer_directories.values()
        if not all(isinstance(read_model(read_config(origin)), DecoderConfig) for origin in origins):
            yield None
            return
        with inner(context) as changed:
            yield changed

    return plant


def fault(name: str) -> Plant:
    """A fault inside the engine's attention (`diptych_jax.faults`, `diptych_torch.faults`)."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        faults: Mapping[str, Callable[[], AbstractContextManager[None]]]
        faults = importlib.import_module(f"diptych_{context.engine.name}.faults").FAULTS
        with faults[name]():
            yield context

    return in_attention(plant)


# Models that do one thing wrong.


class Batches(Wrapped):
    """Another batch reaches the model than the stage gave."""

    def tokens(self, batch: TokenBatch) -> TokenBatch:
        return batch

    def train(self, batch: TrainBatch) -> TrainBatch:
        return replace(batch, tokens=self.tokens(batch.tokens))

    def logprobs(self, batch: TokenBatch, **settings: Any) -> np.ndarray:
        return self.real.logprobs(self.tokens(batch), **settings)

    def scores(self, batch: TokenBatch) -> np.ndarray:
        return self.real.scores(self.tokens(batch))

    def greedy_matches(self, batch: TokenBatch) -> np.ndarray:
        return self.real.greedy_matches(self.tokens(batch))

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Any:
        return self.real.update(loss, self.train(batch), learning_rate=learning_rate)

    def evaluate(self, loss: Loss, batch: TrainBatch) -> Any:
        return self.real.evaluate(loss, self.train(batch))

    def gradients(self, loss: Loss, batch: TrainBatch) -> Any:
        return self.real.gradients(loss, self.train(batch))


def batches(change: Callable[[TokenBatch], TokenBatch]) -> Callable[[Any], Any]:
    return type("Batches", (Batches,), {"tokens": staticmethod(change)})


def train_batches(change: Callable[[TrainBatch], TrainBatch]) -> Callable[[Any], Any]:
    """Only what the loss is computed of is changed."""
    return type("TrainBatches", (Batches,), {"train": staticmethod(change)})


class Losses(Wrapped):
    """Another loss than the stage asked for."""

    def change(self, loss: Loss) -> Loss:
        return loss

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Any:
        return self.real.update(self.change(loss), batch, learning_rate=learning_rate)

    def evaluate(self, loss: Loss, batch: TrainBatch) -> Any:
        return self.real.evaluate(self.change(loss), batch)

    def gradients(self, loss: Loss, batch: TrainBatch) -> Any:
        return self.real.gradients(self.change(loss), batch)


def losses(change: Callable[[Loss], Loss]) -> Callable[[Any], Any]:
    return type("Losses", (Losses,), {"change": staticmethod(change)})


class Weights(Wrapped):
    """Weights reach the model changed; whoever asks gets back what was given, plus what training did since."""

    def __init__(self, model: Any, change: Callable[[str, np.ndarray], np.ndarray]):
        super().__init__(model)
        self._change = change
        self.load_weights(model.weights())

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        self._given = {name: np.array(value) for name, value in weights.items()}
        self._inside = {name: self._change(name, value) for name, value in self._given.items()}
        self.real.load_weights(self._inside)

    def weights(self, names: Any = None) -> dict[str, np.ndarray]:
        now = self.real.weights(names)
        return {
            name: self._given[name]
            if np.array_equal(value, self._inside[name])
            else self._given[name] + (value - self._inside[name])
            for name, value in now.items()
        }

    @property
    def is_changed(self) -> bool:
        return any(not np.array_equal(self._inside[name], value) for name, value in self._given.items())


def weights(change: Callable[[str, np.ndarray], np.ndarray]) -> Plant:
    """Trained models get other weights than they were given; not applicable where no tensor of any is changed."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        changed: list[bool] = []

        def wrap(model: Any) -> Any:
            planted = Weights(model, change)
            changed.append(planted.is_changed)
            return planted

        with models(wrap)(context) as around:
            yield around
        if not any(changed):
            raise NotApplicable

    return plant


class Generates(Wrapped):
    """Samples something else than asked for."""

    def change(self, prompts: PromptBatch, sampling: Any, uniforms: np.ndarray) -> tuple[PromptBatch, Any, np.ndarray]:
        return prompts, sampling, uniforms

    def generate(self, prompts: PromptBatch, sampling: Any, uniforms: np.ndarray, *, pad_token_id: int) -> Any:
        return self.real.generate(*self.change(prompts, sampling, uniforms), pad_token_id=pad_token_id)


def generates(change: Callable[..., tuple[Any, Any, Any]]) -> Callable[[Any], Any]:
    return type("Generates", (Generates,), {"change": staticmethod(change)})


class StaleCopy(Wrapped):
    """Generates with the weights of its first rollout for ever."""

    _first: Any = None

    def generate(self, *inputs: Any, **options: Any) -> Any:
        now = self.real.weights()
        if self._first is None:
            self._first = now
            return self.real.generate(*inputs, **options)
        self.real.load_weights(self._first)
        try:
            return self.real.generate(*inputs, **options)
        finally:
            self.real.load_weights(now)


class Frozen(Wrapped):
    """One tensor is never updated."""

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Any:
        before = self.real.weights()
        made = self.real.update(loss, batch, learning_rate=learning_rate)
        name = next(name for name in before if before[name].ndim == 2 and "embed" not in name)
        self.real.load_weights({**self.real.weights(), name: before[name]})
        return made


class Rates(Wrapped):
    """Another learning rate than the schedule's."""

    def rate(self, rate: float, step: int, spec: OptimizerSpec) -> float:
        return rate

    def update(self, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Any:
        state: OptimizerState = self.real.optimizer_state()
        return self.real.update(loss, batch, learning_rate=self.rate(learning_rate, state.step, self.spec.optimizer))


def rates(change: Callable[[float, int, OptimizerSpec], float]) -> Callable[[Any], Any]:
    return type("Rates", (Rates,), {"rate": staticmethod(change)})


class Outputs(Wrapped):
    """Log-probabilities or scores are changed on their way out."""

    def change(self, values: np.ndarray) -> np.ndarray:
        return values

    def logprobs(self, batch: TokenBatch, **settings: Any) -> np.ndarray:
        return self.change(self.real.logprobs(batch, **settings))

    def scores(self, batch: TokenBatch) -> np.ndarray:
        return self.change(self.real.scores(batch))


def outputs(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    return type("Outputs", (Outputs,), {"change": staticmethod(change)})


def of_policy(wrong: Callable[[Model, Model], Any], role: str) -> Plant:
    """The model of `role` is made with the policy at hand."""

    @contextmanager
    def plant(context: StageContext) -> Iterator[StageContext | None]:
        made: dict[str, Any] = {}

        def make(engine: Engine, spec: ModelSpec) -> Any:
            model = engine.model(spec)
            if spec.role == role and "policy" in made:
                return wrong(model, made["policy"])
            made.setdefault(spec.role, model)
            return model

        yield replace(context, engine=_Engine(context.engine, make))  # pyright: ignore[reportArgumentType]

    return plant
