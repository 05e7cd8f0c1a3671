"""Metrics on disk: one JSON row per step in metrics.jsonl at full precision, and the same numbers for TensorBoard.

TensorBoard's record writer is used directly, without its EventFileWriter: that one loads TensorFlow where it happens to
be installed, and holds events back in a thread.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from diptych.errors import InvariantError, UserError
from diptych.run.directory import RunDirectory, write_text

_BOOKKEEPING = ("stage", "step", "time")


class MetricsLogger:
    """Writes the rows of one stage. A context manager.

    resume_from: the step of the checkpoint that the stage goes on from; rows of this stage beyond it are cut out of
    metrics.jsonl (0: all of them, the row of step 0 included, as the stage starts over). Of the processes of a run only
    the first writes; the numbers are checked in all of them, and are the same but for times.
    """

    def __init__(self, run: RunDirectory, stage: str, *, resume_from: int = 0) -> None:
        self._stage = stage
        self._file = self._events = None
        if not run.world.is_main:
            return
        keep_to = resume_from if resume_from > 0 else -1
        if run.metrics_path.exists():
            _cut(run.metrics_path, stage, keep_to)
        self._file = run.metrics_path.open("a", encoding="utf-8", newline="\n")
        self._events = _EventFile(run.tensorboard_path(stage), first_step=keep_to + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the row of a step: {"stage", "step", "time" (seconds since 1970), name: value, ...}.

        Raises InvariantError for a value that is not finite; then nothing of the row is written.
        """
        row = {name: float(value) for name, value in metrics.items()}
        for name, value in row.items():
            if name in _BOOKKEEPING:
                raise ValueError(f"{name!r} is not a name for a metric: every row has it")
            if not math.isfinite(value):
                raise InvariantError(
                    f"{self._stage} step {step}: metric {name!r} is {value}; every metric must be finite "
                    f"(likely causes: a learning rate too high, an overflow, a damaged input model)"
                )
        if self._file is None or self._events is None:
            return
        now = time.time()
        self._file.write(json.dumps({"stage": self._stage, "step": int(step), "time": now, **row}) + "\n")
        self._file.flush()
        self._events.add(int(step), now, row)

    def close(self) -> None:
        for file in (self._file, self._events):
            if file is not None:
                file.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; none where there is no such file.

    A last line without its newline is still being written, or was when the run was stopped, and is left out. Any other
    malformed line is a UserError with FILE:LINE.
    """
    return [row for _, row in _rows(path)] if path.exists() else []


def by_stage(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """stage -> step -> metrics. Rows of one step are joined."""
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        metrics = {name: value for name, value in row.items() if name not in _BOOKKEEPING}
        stages.setdefault(row["stage"], {}).setdefault(row["step"], {}).update(metrics)
    return {stage: dict(sorted(steps.items())) for stage, steps in stages.items()}


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _stage, _step = row["stage"], row["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: not a row of metrics; something else wrote here: mend or remove the line"
            ) from None
        yield line, row


def _cut(path: Path, stage: str, last_step: int) -> None:
    """Take out the rows of `stage` beyond `last_step`, and an unfinished last line."""
    kept = [line for line, row in _rows(path) if row["stage"] != stage or row["step"] <= last_step]
    write_text(path, "".join(line + "\n" for line in kept))


class _EventFile:
    """A TensorBoard event file. Steps of earlier files from `first_step` on are declared void: a resume redoes them."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        self._write(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(wall_time=wall_time, step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._file.flush()
