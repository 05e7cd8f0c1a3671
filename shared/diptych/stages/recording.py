"""Where a stage lets itself be watched: the calls that a recorder gets, and the one that does nothing.

The stages say what they do (`begin`, `rolled_out`, `scored`, `update`, `end`); a recorder (`diptych.parity.recorder`)
may keep it, and in a replay hand back what another run had computed, so that the stage goes on with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from diptych.engine import Loss, Metrics, Model, TrainBatch

Rollout = Any  # diptych.stages.rollout.Rollout, whose module imports this one's caller
Scored = Any  # diptych.stages.rl.Scored


@runtime_checkable
class Recorder(Protocol):
    """replays: the stage is fed what another run recorded, so its own invariants do not hold; steps that were not
    recorded are passed over (`wants`), and so are evaluations. watches: somebody compares what is computed, so nothing
    is taken over that could be computed anew."""

    replays: bool
    watches: bool

    def wants(self, stage: str, step: int) -> bool: ...

    def begin(self, stage: str, step: int, models: Mapping[str, Model]) -> None:
        """A step (counted from 0) starts. models: what it trains, by role."""
        ...

    def rolled_out(self, rollout: Rollout, rows: Sequence[int]) -> Rollout:
        """What was sampled for these row ids. Returns what to go on with."""
        ...

    def scored(self, scored: Scored, shape: Callable[[Scored], Scored]) -> Scored:
        """What was computed about a rollout; `shape` makes the rewards, returns and advantages anew from the rest.
        Returns what to go on with."""
        ...

    def batch(self, batch: TrainBatch) -> None:
        """The batch of a supervised step."""
        ...

    def update(self, role: str, model: Model, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        """Do `model.update`, and return its metrics."""
        ...

    def end(self, stage: str, step: int, metrics: Metrics, evaluation: Metrics) -> None:
        """A step is over; metrics: what it logged, evaluation: what was logged of held-out rows with it."""
        ...


class NoRecorder:
    """Nobody watches."""

    replays = False
    watches = False

    def wants(self, stage: str, step: int) -> bool:
        del stage, step
        return True

    def begin(self, stage: str, step: int, models: Mapping[str, Model]) -> None:
        pass

    def rolled_out(self, rollout: Rollout, rows: Sequence[int]) -> Rollout:
        del rows
        return rollout

    def scored(self, scored: Scored, shape: Callable[[Scored], Scored]) -> Scored:
        del shape
        return scored

    def batch(self, batch: TrainBatch) -> None:
        pass

    def update(self, role: str, model: Model, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        del role
        return model.update(loss, batch, learning_rate=learning_rate)

    def end(self, stage: str, step: int, metrics: Metrics, evaluation: Metrics) -> None:
        pass
