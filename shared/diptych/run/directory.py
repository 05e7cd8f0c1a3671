"""The run directory: who may write into it, what each stage has reached there, and checkpoints that survive a crash.

    OUTPUT/
      recipe.yaml        the resolved recipe              metrics.jsonl   one row per step (`metrics`)
      environment.json   versions, devices, the engine    samples.jsonl   sample answers before and after each stage
      state.json         {stage: "running" | "done"}      summary.json    each finished stage's results
      tensorboard/       events, one folder per stage     report.html     `report`
      checkpoints/STAGE/step-00000010/                    models/NAME/, data/

Whatever is replaced is written beside its place and renamed over it, so that a crash leaves the old or the new, never
half of one. Several runs in one directory at the same time are not supported. Of the processes of one run only the
first writes, and what is read here it reads for all of them (`world.World.first`): every process calls the same
methods.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from diptych.errors import InvariantError, UserError
from diptych.recipe.load import dump_recipe, flatten, parse_recipe
from diptych.recipe.schema import Recipe, Stage
from diptych.world import SINGLE, World

Status = Literal["running", "done"]
# Settings, and groups of them, of where and by what the numbers are made, not of what they are.
_PLACES = ("layout", "deepspeed", "rollout.engine", "rollout.gate")
_STEP = re.compile(r"step-(\d{8,})")


class RunDirectory:
    """One run on disk. Made by `create`, which refuses a directory that belongs to another run."""

    def __init__(self, path: Path, world: World = SINGLE) -> None:
        self.path = path
        self.world = world

    @classmethod
    def create(
        cls,
        output: Path,
        recipe: Recipe,
        *,
        engine: str,
        environment: Mapping[str, Any],
        resume: bool,
        stages: Sequence[Stage],
        world: World = SINGLE,
    ) -> RunDirectory:
        """Make OUTPUT, or go on in it where it holds the same recipe on the same engine.

        The list `stages` of the recipe may differ: it selects, and what ran is in state.json. So may the layout on the
        devices (meshes, ZeRO, DeepSpeed's settings) and what generates, which change no number beyond rounding: a run
        goes on on other machines. What is different is noted in environment.json. `stages` are those asked for
        now; without `resume` none of them may have been begun there. Raises UserError and writes nothing otherwise.
        """
        output = Path(output)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"engine": engine, "started": started, **environment}
        run = cls(output, world)

        def make() -> None:
            try:
                if not output.exists() or (output.is_dir() and not any(output.iterdir())):
                    _make_new(output, recipe, record, {"engine": engine, "name": recipe.name, "stages": {}})
                    return
                layout = run._check_same(recipe, engine)
                run._check_stages(stages, resume=resume)
                run._add_start(record | layout)
            except OSError as error:
                raise UserError(f"{output}: cannot be used as a run directory: {error.strerror or error}") from error

        world.first(make, leaves=output / "recipe.yaml")
        return run

    # What a stage has reached.

    def status(self, stage: str) -> Status | None:
        """None where the stage was never begun."""
        return self.world.first(lambda: self._state().get(stage))

    def is_done(self, stage: str) -> bool:
        return self.status(stage) == "done"

    def begin(self, stage: str) -> None:
        """Mark a stage as running."""
        self.world.first(lambda: write_json(self.path / "state.json", {**self._state(), stage: "running"}))

    def finish(self, stage: str, summary: Mapping[str, Any]) -> None:
        """Record a stage's results in summary.json, then mark it as done. InvariantError on a number not finite."""
        whole = self.summary()

        def record() -> None:
            try:
                write_json(self.path / "summary.json", {**whole, "stages": {**whole["stages"], stage: dict(summary)}})
            except ValueError as error:
                raise InvariantError(f"{stage}: a result is not finite ({error}): {dict(summary)}") from error
            write_json(self.path / "state.json", {**self._state(), stage: "done"})

        self.world.first(record)

    def summary(self) -> dict[str, Any]:
        """The contents of summary.json: {"engine", "name", "stages": {stage: results}}."""
        return self.world.first(lambda: json.loads((self.path / "summary.json").read_text(encoding="utf-8")))

    # Places.

    def model_path(self, name: str) -> Path:
        """models/NAME, not made yet."""
        return self.path / "models" / name

    def data_path(self, name: str) -> Path:
        """data/NAME, not made yet."""
        return self.path / "data" / name

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.path / "samples.jsonl"

    def tensorboard_path(self, stage: str) -> Path:
        return self.path / "tensorboard" / stage

    def add_samples(self, stage: str, when: str, samples: Sequence[Mapping]) -> None:
        """Write rows {"prompt", "response", "score"} for (stage, when), in the place of earlier ones of the same."""
        if when not in ("before", "after"):
            raise ValueError(f"samples are taken before or after a stage, got {when!r}")

        def write() -> None:
            kept = [row for row in read_samples(self.samples_path) if (row["stage"], row["when"]) != (stage, when)]
            rows = kept + [{"stage": stage, "when": when, **sample} for sample in samples]
            write_text(self.samples_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        self.world.first(write)

    # Checkpoints.

    @contextmanager
    def checkpoint(self, stage: str, step: int, *, keep: int = 2) -> Iterator[Path]:
        """A folder to write a checkpoint into; it counts from the moment when the block has ended without an error (in
        every process). Afterwards only the `keep` newest checkpoints of the stage are left.
        """
        if keep < 1:
            raise ValueError(f"at least one checkpoint is kept, got keep={keep}")
        folder = self.path / "checkpoints" / stage
        final = folder / f"step-{step:08d}"
        partial = folder / f".{final.name}.partial"

        def begin() -> None:
            if final.exists():
                raise FileExistsError(f"{final}: this step has a checkpoint already")
            shutil.rmtree(partial, ignore_errors=True)  # left by a crash
            partial.mkdir(parents=True)

        def count() -> None:
            os.replace(partial, final)
            for _, old in self.checkpoints(stage)[:-keep]:
                doomed = old.with_name(f".{old.name}.partial")
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(old, doomed)  # so that a crash in the middle leaves nothing that looks whole
                shutil.rmtree(doomed)

        self.world.first(begin, leaves=partial)
        try:
            yield partial
        except BaseException:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.world.first(count)

    def checkpoints(self, stage: str) -> list[tuple[int, Path]]:
        """The finished checkpoints of a stage as (step, folder), oldest first, as this process sees them."""
        folder = self.path / "checkpoints" / stage
        entries = folder.iterdir() if folder.is_dir() else ()
        return sorted((int(match[1]), entry) for entry in entries if (match := _STEP.fullmatch(entry.name)))

    def latest_checkpoint(self, stage: str) -> tuple[int, Path] | None:
        """The newest finished checkpoint as (step, folder)."""
        return self.world.first(lambda: next(reversed(self.checkpoints(stage)), None))

    # Who may write here.

    def _state(self) -> dict[str, Status]:
        path = self.path / "state.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _check_same(self, recipe: Recipe, engine: str) -> dict[str, Any]:
        """UserError where another run is here. Returns the settings in `_PLACES` that are other than at its start."""
        output = self.path
        if not output.is_dir():
            raise UserError(f"{output}: is a file; choose another --output")
        if not (output / "recipe.yaml").is_file():
            raise UserError(f"{output}: is not empty and holds no run (no recipe.yaml); choose another --output")
        try:
            stored = parse_recipe(output / "recipe.yaml")
        except UserError as error:
            raise UserError(
                f"{output}: holds a run that cannot be continued ({error}); choose another --output"
            ) from None
        changed = differences(stored, recipe)
        free = tuple(f"{place}." for place in _PLACES)
        layout = {key: ours for key, _, ours in changed if f"{key}.".startswith(free)}
        other = next((one for one in changed if one[0] not in layout), None)
        if other is not None:
            key, theirs, ours = other
            raise UserError(
                f"{output}: holds another run: its '{key}' is {theirs!r}, this recipe's is {ours!r}; "
                f"choose another --output, or set it back"
            )
        theirs = _read_record(output / "environment.json")["engine"]
        if theirs != engine:
            raise UserError(f"{output}: holds a run of the {theirs} engine, not {engine}; choose another --output")
        _read_record(output / "summary.json")
        return layout

    def _check_stages(self, stages: Sequence[Stage], *, resume: bool) -> None:
        for stage in () if resume else stages:
            status = self._state().get(stage)
            if status == "running":
                raise UserError(
                    f"{self.path}: the {stage} stage was begun here and not finished; "
                    f"go on with --resume, or choose another --output"
                )
            if status == "done":
                raise UserError(
                    f"{self.path}: the {stage} stage is finished here; "
                    f"skip finished stages with --resume, or choose another --output"
                )

    def _add_start(self, record: dict[str, Any]) -> None:
        """Note a later start in environment.json, with what is different about its environment."""
        path = self.path / "environment.json"
        first = json.loads(path.read_text(encoding="utf-8"))
        changed = {key: value for key, value in record.items() if first.get(key) != value}
        write_json(path, {**first, "later_starts": [*first.get("later_starts", []), changed]})


def differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every setting that differs, in the schema's order, `stages` left out."""
    left, right = flatten(a), flatten(b)
    keys = [key for key in dict.fromkeys([*left, *right]) if key != "stages"]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples.jsonl; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step: readers see the old text or the new, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _make_new(output: Path, recipe: Recipe, record: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Fill a folder beside OUTPUT, then rename it to OUTPUT; an empty OUTPUT that exists is filled where it is."""
    folder = output if output.exists() else output.with_name(f".{output.name}.{os.getpid()}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / "environment.json", record)
        write_json(folder / "summary.json", summary)
        write_json(folder / "state.json", {})
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        if folder != output:
            os.replace(folder, output)
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        if folder != output:
            folder.rmdir()
        raise


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: missing or damaged, so the run cannot be continued; choose another --output"
        ) from None
