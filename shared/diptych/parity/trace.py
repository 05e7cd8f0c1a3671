"""A trace: what one training run computed, step by step, for another machine to compare. NumPy and safetensors only.

A directory:

    trace.json           {"format": "diptych-trace", "version": 1, "producer": {...}, "provenance": {...}, ...}
    index.jsonl          one line for each step, in order:
                           {"stage", "step", "file", "metrics": {name: number},
                            "tensors": {name: {"dtype", "shape", "layout", "mask", "phase", "key"}}}
    rl-00003.safetensors the step's tensors by "key" (absent where a step has only metrics)

Nothing but this is needed to read it: `json` and `safetensors.numpy.load_file`. A step is written whole or not at all,
and a trace whose run was killed holds every step before. What the names mean is in `diptych.parity.steps`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from diptych.errors import UserError

FORMAT = "diptych-trace"
VERSION = 1
Phase = Literal["given", "made"]  # an input that the step was given, or something that it computed


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One array of a step.

    layout: its axes in words ("rows new", "batch time", "as stored" for weights by their Hugging Face names). mask: the
    name of the array of the same step that says where it counts; None: everywhere. phase: "given" or "made".
    """

    values: np.ndarray
    layout: str
    mask: str | None = None
    phase: Phase = "made"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a stage: `step` counts from 0 within the stage. metrics: what the run logged, and scalars."""

    stage: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Recorded] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.stage} step {self.step}"

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name].values

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix` and a slash, by the rest of their names."""
        return {
            name[len(prefix) + 1 :]: one.values for name, one in self.tensors.items() if name.startswith(f"{prefix}/")
        }


class TraceWriter:
    """Writes a new trace. Use as a context manager, or call `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        producer: Mapping[str, Any],
        provenance: Mapping[str, Any],
        beside: Sequence[str] = (),
    ):
        """producer: who computed it, {"name": "jax"|"torch"|"trl"|..., "precision": ..., versions}. provenance: of what
        and under which settings (`diptych.parity.provenance`). Both must be JSON.

        beside: names of what may lie in the directory already. Raises UserError where anything else does.
        """
        if directory.exists() and (
            not directory.is_dir() or any(one.name not in beside for one in directory.iterdir())
        ):
            raise UserError(f"{directory}: is there already; name a new directory for the trace")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.provenance = dict(provenance)
        header = {"format": FORMAT, "version": VERSION, "producer": dict(producer), "provenance": dict(provenance)}
        text = json.dumps(header, indent=2, allow_nan=False)
        (directory / "trace.json").write_text(text + "\n", encoding="utf-8")
        self._index = (directory / "index.jsonl").open("w", encoding="utf-8")

    def add(self, step: Step) -> None:
        """Append a step."""
        described = {}
        arrays = {}
        for number, (name, one) in enumerate(step.tensors.items()):
            key = str(number)
            arrays[key] = np.array(one.values, order="C")  # (0-d stays 0-d)
            described[name] = {
                "dtype": str(one.values.dtype),
                "shape": list(one.values.shape),
                "layout": one.layout,
                "mask": one.mask,
                "phase": one.phase,
                "key": key,
            }
        file = None
        if arrays:
            file = f"{step.stage}-{step.step:05d}.safetensors"
            save_file(arrays, self.directory / file)
        line = {
            "stage": step.stage,
            "step": step.step,
            "file": file,
            "metrics": {name: _written(value) for name, value in step.metrics.items()},
            "tensors": described,
        }
        self._index.write(json.dumps(line, allow_nan=False) + "\n")
        self._index.flush()

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Trace:
    """A trace on disk. Steps are read when they are asked for."""

    def __init__(self, directory: Path):
        """Raises UserError, with file and line, for what is no trace, or of another version."""
        self.directory = directory
        header = _json(directory / "trace.json")
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise UserError(f"{directory / 'trace.json'}: is not a Diptych trace")
        if header.get("version") != VERSION:
            raise UserError(f"{directory}: trace version {header.get('version')}, this Diptych reads {VERSION}")
        self.producer: dict[str, Any] = header["producer"]
        self.provenance: dict[str, Any] = header["provenance"]
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        path = directory / "index.jsonl"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                key = (str(row["stage"]), int(row["step"]))
                _ = row["metrics"], row["tensors"], row["file"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: is not a step of a trace ({error}); record it again") from None
            if key in self._lines:
                raise UserError(f"{path}:{number}: {key[0]} step {key[1]} is there twice; record it again")
            self._lines[key] = row

    @property
    def name(self) -> str:
        """The producer and the directory, for people."""
        return f"{self.producer.get('name', '?')} ({self.directory})"

    @property
    def steps(self) -> list[tuple[str, int]]:
        """(stage, step) of every step, in order."""
        return list(self._lines)

    def has_tensors(self, stage: str, step: int) -> bool:
        return bool(self._lines[stage, step]["tensors"])

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._lines

    def metrics(self, stage: str, step: int) -> dict[str, float]:
        """A step's scalars alone, without reading its arrays."""
        return {name: _read(value) for name, value in self._lines[stage, step]["metrics"].items()}

    def read(self, stage: str, step: int) -> Step:
        """A whole step. Raises UserError where its file is missing, broken, or not what the index says."""
        line = self._lines[stage, step]
        where = f"{self.directory}: {stage} step {step}"
        arrays: dict[str, np.ndarray] = {}
        if line["file"] is not None:
            path = self.directory / line["file"]
            try:
                arrays = load_file(path)
            except Exception as error:  # safetensors has its own error type
                raise UserError(f"{path}: cannot be read: {error}") from None
        tensors = {}
        for name, about in line["tensors"].items():
            values = arrays.pop(about["key"], None)
            if values is None:
                raise UserError(f"{where}: {name} is in the index and not in {line['file']}")
            if str(values.dtype) != about["dtype"] or list(values.shape) != about["shape"]:
                raise UserError(
                    f"{where}: {name} is {values.dtype} {list(values.shape)} in the file, {about['dtype']} "
                    f"{about['shape']} in the index"
                )
            tensors[name] = Recorded(values=values, layout=about["layout"], mask=about["mask"], phase=about["phase"])
        if arrays:
            raise UserError(f"{where}: {line['file']} holds arrays that the index does not name")
        return Step(stage=stage, step=step, metrics=self.metrics(stage, step), tensors=tensors)

    def __iter__(self) -> Iterator[Step]:
        return (self.read(*key) for key in self.steps)

    def fingerprint(self) -> str:
        """A checksum of the header and the index: which trace this is."""
        mark = 0
        for name in ("trace.json", "index.jsonl"):
            mark = zlib.crc32((self.directory / name).read_bytes(), mark)
        return f"{mark:08x}"


def _written(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as words, and stay what they are."""
    return float(value) if math.isfinite(value) else str(float(value))


def _read(value: float | str) -> float:
    return float(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: not a trace?") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
