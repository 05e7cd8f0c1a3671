"""Lockstep: two engines put on the same weights and optimizer state before every step, every rung compared.

Free-running float32 curves part in any two implementations after some hundred steps; the error of a single step does
not grow. The first engine runs the recipe and records every step; the second replays each as it comes (`recorder`), in
the same process, a step behind. So the first side's run is the recipe's own, and nothing is kept on disk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diptych.parity.record import recorded_models
from diptych.parity.recorder import StepRecorder
from diptych.parity.trace import Step
from diptych.recipe.schema import Recipe, Stage
from diptych.stages.context import StageContext
from diptych.stages.pipeline import prepare, run_stages

Compare = Callable[[Step, Step], None]


def lockstep(
    recipe: Recipe,
    *,
    work: Path,
    compare: Compare,
    engines: tuple[str, str] = ("jax", "torch"),
    stages: Sequence[Stage] | None = None,
    begin: Callable[[StageContext, StageContext], None] = lambda _leader, _follower: None,
) -> None:
    """Walk both engines through the stages (default: the recipe's). `compare` gets each step of both sides.

    work: an empty folder for the run directories. begin: gets both sides' contexts before each stage.
    """
    for stage in stages or recipe.stages:
        leader = prepare(recipe, engine_name=engines[0], output=work / "a", stages=(stage,))
        started = recorded_models(recipe, work / "a", (stage,))
        follower = prepare(started, engine_name=engines[1], output=work / f"b-{stage}", stages=(stage,))
        begin(leader, follower)
        _walk(leader, follower, stage, compare)


def _walk(leader: StageContext, follower: StageContext, stage: Stage, compare: Compare) -> None:
    """One stage: the leader in a thread of its own, the follower in this one."""
    steps = Steps()
    seed = leader.recipe.seed

    def lead() -> None:
        try:
            run_stages(replace(leader, recorder=StepRecorder(steps.put, seed=seed)), (stage,))
        except BaseException as error:  # handed to the thread that waits for the next step
            steps.fail(error)
        else:
            steps.finish()

    def compared(step: Step) -> None:
        given = steps.get(step.stage, step.step)
        assert given is not None, "a step is replayed because it was recorded"
        compare(given, step)

    thread = threading.Thread(target=lead, name="leader", daemon=True)
    thread.start()
    try:
        run_stages(replace(follower, recorder=StepRecorder(compared, seed=seed, source=steps.get)), (stage,))
        steps.drain()
    finally:
        steps.close()
        thread.join()


class Steps:
    """Hands the steps of one run to another, each as soon as it is there and at most one ahead."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=1)
        self._current: Step | None = None
        self._is_over = False
        self._closed = threading.Event()

    def put(self, step: Step) -> None:
        self._hand_over(step)

    def finish(self) -> None:
        self._hand_over(None)

    def fail(self, error: BaseException) -> None:
        self._hand_over(error)

    def get(self, stage: str, step: int) -> Step | None:
        """The recorded step; None where the recorded run ended before it. Steps come in order, every one."""
        while not self._is_over and (self._current is None or self._current.step < step):
            arrived = self._waiting.get()
            if isinstance(arrived, BaseException):
                self._is_over = True
                raise arrived
            self._is_over = arrived is None
            self._current = arrived
        found = self._current
        return found if found is not None and (found.stage, found.step) == (stage, step) else None

    def drain(self) -> None:
        """Wait for the end of the recorded run, which leaves its models after its last step."""
        while not self._is_over:
            self.get("", 1 << 62)

    def close(self) -> None:
        """Nobody takes steps any more: the recording run is not held up."""
        self._closed.set()

    def _hand_over(self, item: Step | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._waiting.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
