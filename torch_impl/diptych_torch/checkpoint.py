"""Training checkpoints: DeepSpeed's own sharded format, and beside it what it takes to go on anywhere.

    DIRECTORY/deepspeed/        DeepSpeed: weights, optimizer state (averages too), each process its own part
    DIRECTORY/pieces.json       which parameter lies where in those files (`shards_on_disk.Index`)
    DIRECTORY/diptych.json      what the checkpoint is of, and every file's size; written last, so that without it
                                nothing is whole

Going on from one is bit for bit the same as not having stopped, on as many processes; on another number of them or at
another ZeRO stage the state is the same bits, and sums are made in another order. Each process reads its own pieces,
and no process ever holds the whole model. What an adapter leaves frozen is not in it: the model that goes on is built
on the same base. Everything here is collective.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from diptych.errors import UserError
from diptych_torch import zero
from diptych_torch.shards_on_disk import Index, StoredShards
from diptych_torch.zero import Place, Shards

MANIFEST = "diptych.json"
PIECES = "pieces.json"
TAG = "deepspeed"

T = TypeVar("T")


def save(
    directory: Path,
    deepspeed_engine: Any,
    shards: Shards,
    trained: Mapping[str, nn.Parameter],
    description: Mapping[str, Any],
    *,
    step: int,
) -> None:
    """Write a checkpoint into a new or empty folder that every process sees. trained: parameters by name. description:
    what `load` must find equal (JSON). step: updates made.

    What goes wrong in one process is raised in all of them.
    """
    _together(lambda: _begin(directory) if dist.get_rank() == 0 else None)
    with _careful(deepspeed_engine) as writer:
        deepspeed_engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    sizes = _together(lambda: writer.finish(directory))
    indices = _together(lambda: _index(deepspeed_engine, shards, trained, writer))
    contents = {
        **description,
        "step": step,
        "optimizer_step": shards.step(),
        "zero_stage": shards.stage,
        "processes": zero.world_size(),
    }
    files = {name: size for part in sizes for name, size in part.items()}

    def finish() -> None:
        pieces = json.dumps([one._asdict() for one in indices if one is not None], separators=(",", ":"))
        (directory / PIECES).write_text(pieces + "\n", encoding="utf-8")
        files[PIECES] = (directory / PIECES).stat().st_size
        manifest = json.dumps({**contents, "files": files}, indent=2)
        (directory / MANIFEST).write_text(manifest + "\n", encoding="utf-8")

    _together(lambda: finish() if dist.get_rank() == 0 else None)


@torch.no_grad()
def load(directory: Path, shards: Shards, trained: Mapping[str, nn.Parameter], description: Mapping[str, Any]) -> int:
    """Read a checkpoint of any number of processes and ZeRO stage; returns the updates made before it was written.

    Raises UserError in every process, before anything is changed, when there is none, when a file is missing or
    damaged, or when it is of another model, adapter, optimizer or precision.
    """
    keys = shards.keys()

    def open_all() -> tuple[dict[str, Any], StoredShards]:
        manifest = _manifest(directory, description)
        stored = StoredShards(directory, _read_index(directory), manifest["zero_stage"])
        for name, parameter in trained.items():
            start, piece = shards.piece(parameter)
            stored.check(name, zero.whole_shape(parameter).numel(), start, len(piece), keys)
        return manifest, stored

    opened: list[tuple[dict[str, Any], StoredShards]] = []
    _together(lambda: opened.append(open_all()))
    ((manifest, stored),) = opened
    for name, parameter in trained.items():
        for key in (None, *keys):
            start, piece = shards.piece(parameter, key)
            stored.read(name, key, start, piece)
        if shards.stage > 0:  # what is computed with follows from the masters
            values = shards.read(parameter)
            with zero.whole([parameter], write=True):
                parameter.copy_(values)
    shards.set_step(manifest["optimizer_step"])
    return manifest["step"]


def _begin(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UserError(f"{directory}: not empty; checkpoints are not written over")


class _Writer:
    """In the place of DeepSpeed's writer of files: keeps what goes wrong for later, because the other processes wait
    in collective calls of `save_checkpoint` that this one has still to make."""

    def __init__(self, theirs: Any):
        self._theirs = theirs
        self.paths: list[Path] = []
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            self.paths.append(Path(path))
        except Exception as error:  # whatever a file system and torch make of a full disk
            self.failure = self.failure or error

    def finish(self, directory: Path) -> dict[str, int]:
        """The sizes of the files that this process has written, by name; raises what went wrong."""
        if self.failure is not None:
            raise self.failure
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in self.paths}


@contextlib.contextmanager
def _careful(engine: Any) -> Iterator[_Writer]:
    """Inside, nothing that DeepSpeed writes leaves the other processes waiting (`_Writer`)."""
    theirs = engine.checkpoint_engine
    engine.checkpoint_engine = writer = _Writer(theirs)
    # Copies scripts of DeepSpeed's that are installed with it: two files more that a full disk would refuse.
    engine._copy_recovery_script = lambda directory: None
    try:
        yield writer
    finally:
        engine.checkpoint_engine = theirs
        del engine._copy_recovery_script


def _index(engine: Any, shards: Shards, trained: Mapping[str, nn.Parameter], writer: _Writer) -> Index | None:
    """What this process's file holds. At stage 0 there is one file, of process 0."""
    if shards.stage == 0 and dist.get_rank() > 0:
        return None
    path = next(path for path in writer.paths if shards.stage == 0 or path.name.endswith("optim_states.pt"))
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    masters = [names[flat] for flat in shards.flats()] if shards.stage == 0 else []
    places = {name: shards.place(parameter) for name, parameter in trained.items()}
    return Index(f"{TAG}/{path.name}", masters, {name: place for name, place in places.items() if place.length})


def _read_index(directory: Path) -> list[Index]:
    try:
        entries = json.loads((directory / PIECES).read_text(encoding="utf-8"))
        return [
            Index(one["file"], one["masters"], {name: Place(*place) for name, place in one["places"].items()})
            for one in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / PIECES}: damaged: {error!r}") from None


def _manifest(directory: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and fits `description`; UserError of any other."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory}: not a checkpoint of the torch engine (no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    _compare(directory, manifest, json.loads(json.dumps(description)))
    for name, size in manifest["files"].items():
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            raise UserError(f"{directory / name}: missing: the checkpoint is incomplete ({error.strerror})") from None
        if found != size:
            raise UserError(f"{directory / name}: damaged: {found} bytes, {size} were written")
    return manifest


def _compare(directory: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        found = manifest.get(key)
        if key == "shapes" and isinstance(found, dict):
            for name in sorted(value.keys() | found.keys()):
                if value.get(name) != found.get(name):
                    shapes = f"shape {found.get(name)} in the checkpoint, {value.get(name)} in the model"
                    raise UserError(f"{directory}: {name} has {shapes}")
        elif found != value:
            raise UserError(f"{directory}: the checkpoint has {key} = {found!r}, this run has {value!r}")


def _together(action: Callable[[], T]) -> list[T]:
    """What `action` returns in every process. Where it fails in one, all of them raise."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if zero.world_size() > 1:
        text = None if failure is None else f"process {dist.get_rank()}: {type(failure).__name__}: {failure}"
        every: list[Any] = [None] * zero.world_size()
        dist.all_gather_object(every, (result if failure is None else None, text, isinstance(failure, UserError)))
    else:
        every = [(result, None, False)]
    if failure is not None:
        raise failure
    for _, text, is_users in every:
        if text is not None:
            raise UserError(text) if is_users else RuntimeError(text)
    return [result for result, *_ in every]
