"""DeepSpeed's optimizer shards in files, read piece by piece for any other number of processes and ZeRO stage.

DeepSpeed lays masters and moments out as flat tensors, cut by stage and number of processes, and its files say nothing
about which parameter lies where. An index beside them does: for every file, and every parameter in it, which flat
tensor holds it, where in that, and which elements of the parameter they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.errors import UserError
from diptych_torch.zero import Place

# Where a stage's file has its flat masters and torch's state dict of the optimizer. At stage 0 the masters are the
# module's parameters.
_MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
_OPTIMIZER = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}


class Index(NamedTuple):
    """What one file holds. masters: at stage 0 the module's name of each flat tensor; else empty. places: by the name
    of the trained parameter."""

    file: str
    masters: Sequence[str]
    places: Mapping[str, Place]


class StoredShards:
    """The files of a checkpoint of `stage`. Each is opened when it is first needed, and mapped into memory, not read:
    what is looked up is what the disk is asked for."""

    def __init__(self, directory: Path, index: Sequence[Index], stage: int):
        self._directory, self._index, self._stage = directory, index, stage
        self._opened: dict[str, tuple[list[Tensor], Mapping[int, Mapping[str, Tensor]]]] = {}
        self._holding: dict[str, list[tuple[Index, Place]]] = {}
        for one in index:
            for name, place in one.places.items():
                self._holding.setdefault(name, []).append((one, place))

    def check(self, name: str, numel: int, start: int, length: int, keys: Sequence[str]) -> None:
        """Raise UserError unless the files' pieces of a parameter make up its `numel` elements, and those that hold any
        of the `length` from `start` on have them, in the master and in the optimizer's state under every key."""
        reached = 0
        for _, place in sorted(self._holding.get(name, []), key=lambda found: found[1].start):
            if place.start != reached:
                break
            reached += place.length
        if reached != numel:
            raise UserError(f"{self._directory}: {name} is not whole in the checkpoint ({reached} of {numel} elements)")
        for one, place in self._overlapping(name, start, length):
            for key in (None, *keys):
                flat = self._flat(one, place, key)
                if flat is None or flat.numel() < place.offset + place.length:
                    raise UserError(f"{self._directory / one.file}: damaged: lacks {key or 'weights'} of {name}")

    def read(self, name: str, key: str | None, start: int, target: Tensor) -> None:
        """Copy elements of the flattened master (key None) or state from `start` on into `target`, as many as it has.
        Only after `check`."""
        for one, place in self._overlapping(name, start, len(target)):
            flat = self._flat(one, place, key)
            assert flat is not None
            first, last = max(start, place.start), min(start + len(target), place.start + place.length)
            there = place.offset + first - place.start
            target[first - start : last - start].copy_(flat[there : there + last - first])

    def _overlapping(self, name: str, start: int, length: int) -> list[tuple[Index, Place]]:
        return [
            (one, place)
            for one, place in self._holding[name]
            if max(start, place.start) < min(start + length, place.start + place.length)
        ]

    def _flat(self, one: Index, place: Place, key: str | None) -> Tensor | None:
        """A flat tensor of a file; None where it is not there."""
        if one.file not in self._opened:
            self._opened[one.file] = self._open(one)
        masters, states = self._opened[one.file]
        if place.flat >= len(masters):
            return None
        found = masters[place.flat] if key is None else states.get(place.flat, {}).get(key)
        return found.reshape(-1) if isinstance(found, Tensor) else None

    def _open(self, one: Index) -> tuple[list[Tensor], Mapping[int, Mapping[str, Tensor]]]:
        """A file's flat masters, and by their number the optimizer's state."""
        path = self._directory / one.file
        try:
            with torch.serialization.safe_globals(_classes()):
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if self._stage == 0:
                return [found["module"][name] for name in one.masters], found["optimizer"]["state"]
            shards = found["optimizer_state_dict"]
            return list(shards[_MASTERS[self._stage]]), shards[_OPTIMIZER[self._stage]]["state"]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def _classes() -> list[Any]:
    """DeepSpeed's classes in its files; nothing else is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
