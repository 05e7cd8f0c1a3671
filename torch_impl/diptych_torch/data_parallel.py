"""Rows over processes: every process makes the whole batch and works on its own share of the rows.

A micro-batch is the rows that go through the model at once, on all processes together: each takes an equal part. Where
they do not divide, rows of padding fill up the last parts, so that every process makes the same passes (ZeRO-3 gathers
in each); they add nothing to losses, metrics or gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine import Completions, Metrics, TokenBatch


@dataclass(frozen=True)
class Share:
    """Process `index` of `count`."""

    index: int
    count: int

    def filler(self, size: int, group: int = 1) -> int:
        """Rows of padding that a micro-batch of so many rows is filled up with."""
        return -size % (self.count * group)

    def rows(self, start: int, stop: int, group: int = 1) -> np.ndarray:
        """This process's rows of the micro-batch [start, stop), as indices; -1 for a row of padding. group: rows that
        stay with their neighbours."""
        part = (stop - start + self.filler(stop - start, group)) // self.count
        rows = start + self.index * part + np.arange(part)
        return np.where(rows < stop, rows, -1)


def take_tokens(batch: TokenBatch, rows: np.ndarray) -> TokenBatch:
    """These rows of a batch; padding alone where a row is -1."""
    real = (rows >= 0)[:, None]
    taken = batch.take(np.maximum(rows, 0))
    return TokenBatch(
        tokens=taken.tokens * real, attention=taken.attention & real, positions=taken.positions * real,
        first=taken.first,
    )  # fmt: skip


def take_array(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows of a loss's array; zeros where a row is -1."""
    taken = array[np.maximum(rows, 0)]
    return np.where((rows >= 0).reshape(-1, *(1,) * (array.ndim - 1)), taken, np.zeros((), array.dtype))


def gather_rows(parts: Tensor, size: int, count: int) -> Tensor:
    """Outputs of `Share.rows` of micro-batches of `size` rows, [passes * part, ...] here, of all processes in the
    batch's order, [count, ...]."""
    num_processes = dist.get_world_size()
    if num_processes == 1:
        return parts[:count]
    mine = parts.contiguous()
    if mine.dtype == torch.bool:
        mine = mine.to(torch.uint8)
    every = [torch.empty_like(mine) for _ in range(num_processes)]
    dist.all_gather(every, mine)
    pieces, taken = [], 0
    for start in range(0, count, size):
        rows = min(size, count - start)
        part = -(-rows // num_processes)
        pieces.append(torch.cat([one[taken : taken + part] for one in every])[:rows])
        taken += part
    return torch.cat(pieces).to(parts.dtype)


def add_over_processes(metrics: Metrics, device: torch.device) -> Metrics:
    """Sums over the processes; maxima of names in `_max`."""
    if dist.get_world_size() == 1:
        return metrics
    values: dict[bool, list[str]] = {False: [], True: []}
    for name in metrics:
        values[name.endswith("_max")].append(name)
    found: Metrics = {}
    for is_max, names in values.items():
        if names:
            numbers = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=device)
            dist.all_reduce(numbers, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM)
            found |= dict(zip(names, numbers.tolist(), strict=True))
    return {name: found[name] for name in metrics}


def add_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Sums over the processes, in place."""
    if dist.get_world_size() > 1:
        for tensor in tensors.values():
            dist.all_reduce(tensor)


def gather_completions(mine: Completions, count: int, group: int) -> Completions:
    """Rows number, number + groups, ... of each group of `group` processes as the batch of `count` rows; what a group
    has beyond its own is dropped."""
    num_processes = dist.get_world_size()
    if num_processes == 1:
        return mine
    every: list[Any] = [None] * num_processes
    dist.all_gather_object(every, mine)
    every = every[::group]
    rows = [np.arange(number, count, len(every)) for number in range(len(every))]
    order = np.argsort(np.concatenate(rows))
    names = [field.name for field in dataclasses.fields(Completions)]
    parts = {name: [getattr(one, name)[: len(its)] for one, its in zip(every, rows, strict=True)] for name in names}
    return Completions(**{name: np.concatenate(part)[order] for name, part in parts.items()})


def no_completions(new: int, dtype: Any) -> Completions:
    """Those of a process that has no rows, where there are fewer rows than processes."""
    return Completions(
        tokens=np.zeros((0, new), np.int32), mask=np.zeros((0, new), bool), logprobs=np.zeros((0, new), dtype),
        margins=np.zeros((0, new), dtype), finish=np.zeros(0, np.int32),
    )  # fmt: skip
