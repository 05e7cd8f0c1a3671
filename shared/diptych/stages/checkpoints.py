"""A stage's training state on disk: each model in its engine's format, and the stage's own counters.

Models write in the background where the engine can: `save` returns once their state is copied, and the checkpoint
counts as soon as all of it is on disk, which is before the next one is begun and before the stage ends, well or badly.
Everything else that a resume needs follows from the step (law 5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from diptych.engine import Model
from diptych.stages.context import StageContext


class Checkpoints:
    """The checkpoints of one stage's `models` (by name). A context manager, which waits for the last one."""

    def __init__(self, context: StageContext, stage: str, models: Mapping[str, Model]) -> None:
        self._context, self._stage, self._models = context, stage, models
        self._unfinished = ExitStack()

    def load(self) -> tuple[int, dict[str, Any]]:
        """Load the newest one into the models; returns its step and counters: (0, {}) where there is none or the run
        does not resume."""
        latest = self._context.run.latest_checkpoint(self._stage) if self._context.resume else None
        if latest is None:
            return 0, {}
        step, directory = latest
        for name, model in self._models.items():
            model.load_checkpoint(directory / name)
        return step, json.loads((directory / "progress.json").read_text(encoding="utf-8"))

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """Begin one. Raises what went wrong in the one before, which then does not count."""
        self._unfinished.close()
        run, keep = self._context.run, self._context.recipe.checkpoint.keep
        with ExitStack() as stack:
            directory = stack.enter_context(run.checkpoint(self._stage, step, keep=keep))
            for name, model in self._models.items():
                (directory / name).mkdir(exist_ok=True)
                stack.callback(model.save_checkpoint(directory / name))
            if run.world.is_main:
                (directory / "progress.json").write_text(json.dumps(dict(progress)), encoding="utf-8")
            self._unfinished = stack.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unfinished.close()
