"""Tensors that are made when they are asked for, so that a model need never be in host memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

# Bytes of tensors that are asked for at once where several at a time cost less than one by one.
GROUP = 2**30


def in_groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most `limit` bytes (of one tensor at least). sizes: bytes of each."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


class LazyTensors(Mapping[str, np.ndarray]):
    """A mapping from name to tensor, each read or computed anew when it is looked up.

    shapes, dtypes: of every tensor, known without reading it; `dtypes` are those to write it in (as it is on disk,
    say), while `read` may give another. The arrays are read-only: a change made to one would be lost at the next
    look-up. `.items()` and `.values()` read everything, though one at a time.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        read: Callable[[str], np.ndarray],
    ) -> None:
        assert list(shapes) == list(dtypes)
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self._read = read

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self._finished(name, self._read(name) if name in self.shapes else _missing(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.shapes

    def _finished(self, name: str, value: np.ndarray) -> np.ndarray:
        assert value.shape == self.shapes[name], f"{name}: shape {value.shape} where {self.shapes[name]} was promised"
        value.flags.writeable = False
        return value


class StreamedTensors(LazyTensors):
    """Tensors of a model on an accelerator, some at a time. read: names -> tensors; where the model lies on several
    processes it is collective, and so is then whatever reads them."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        read: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    ) -> None:
        super().__init__(shapes, dtypes, lambda name: read([name])[name])
        self._read_group = read

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """These tensors in order, read in groups of at most `GROUP` bytes (of one tensor at least)."""
        sizes = {name: int(np.prod(self.shapes[name], dtype=np.int64)) * self.dtypes[name].itemsize for name in names}
        for group in in_groups(sizes, GROUP):
            yield from self._read_in_order(group)

    def _read_in_order(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        found = dict(self._read_group(names))
        for name in names:
            yield name, self._finished(name, found.pop(name))


def stream(weights: Mapping[str, np.ndarray], names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors in order, no more of them in memory at a time than reading takes."""
    if isinstance(weights, StreamedTensors):
        yield from weights.stream(names)
    else:
        for name in names:
            yield name, weights[name]


def tensor_shapes_of(weights: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; lazy ones are not read."""
    if isinstance(weights, LazyTensors):
        return dict(weights.shapes)
    return {name: tuple(value.shape) for name, value in weights.items()}


def tensor_dtypes_of(weights: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    """The type that every tensor is written in where none is chosen; lazy ones are not read."""
    if isinstance(weights, LazyTensors):
        return dict(weights.dtypes)
    return {name: value.dtype for name, value in weights.items()}


def _missing(name: str) -> np.ndarray:
    raise KeyError(name)
