"""Safetensors files, one tensor at a time: found in the header, read when asked for, written as a stream.

The format: 8 bytes, the header's length (little-endian); the header, JSON padded with spaces to a multiple of 8 bytes,
{name: {"dtype", "shape", "data_offsets": [begin, end]}}; the tensors' bytes, row-major and little-endian. What is
written here is, byte for byte, what `safetensors.numpy.save_file` writes, without holding a whole file in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from diptych.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# In the order in which the safetensors library lays tensors out: widest first, so that each is aligned.
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
_PIECE = 2**22  # elements that are cast or compared at once


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, not read yet. kind: the file's name of its type. start: its first byte."""

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    def pieces(self) -> Iterator[Shaped[np.ndarray, " elements"]]:
        """The elements in order, some at a time."""
        left = int(np.prod(self.shape, dtype=np.int64))
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                piece = np.fromfile(stream, self.dtype, min(left, _PIECE))
                if not piece.size:
                    raise UserError(f"{self.file}: ends within {self.name}")
                left -= piece.size
                yield piece

    def read(self, dtype: np.dtype | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor, cast to `dtype` (None: as it is stored)."""
        whole = np.empty(self.shape, dtype or self.dtype)
        flat, start = whole.reshape(-1), 0
        for piece in self.pieces():
            flat[start : start + piece.size] = piece
            start += piece.size
        return whole


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a file holds, from its header alone. Raises UserError where it is broken or a type is not read."""
    try:
        with safe_open(file, framework="np") as opened:  # the library checks every offset against the file's size
            opened.keys()
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, _ = entry["data_offsets"]
        found.append(
            StoredTensor(
                name=name, file=file, kind=entry["dtype"], shape=tuple(entry["shape"]), start=8 + size + begin
            )
        )  # fmt: skip
    return found


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and the index's map from tensor to file name (None for a single file)."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise UserError(f"{directory}: no {SINGLE_FILE} (other weight formats are not read: convert them first)")
        return [directory / SINGLE_FILE], None
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not a checkpoint index: {error!r}") from None
    files = sorted({directory / name for name in weight_map.values()})
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: named in {INDEX} but not there")
    return files, weight_map


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by file, in order: a file is closed before it would pass `limit` bytes (one larger tensor has its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def file_order(entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> list[str]:
    """The names in the order in which their tensors lie in a file."""
    rank = {dtype: place for place, dtype in enumerate(DTYPES.values())}
    return sorted(entries, key=lambda name: (rank[entries[name][0]], name))


def write_tensors(
    file: Path,
    entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    fetch: Callable[[list[str]], Iterable[tuple[str, np.ndarray]]],
) -> None:
    """Write a file. entries: name -> type and shape. fetch: names -> the tensors in that order, of any float type.

    Raises UserError where a finite value does not fit the type that it is cast to.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    names = file_order(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = entries[name]
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        written = []
        for name, value in fetch(names):
            dtype, shape = entries[name]
            assert value.shape == shape, f"{name}: shape {value.shape} where {shape} was promised"
            flat = value.reshape(-1)
            for start in range(0, flat.size, _PIECE):
                stream.write(_cast(flat[start : start + _PIECE], dtype, name).view(np.uint8).data)
            written.append(name)
            del value, flat  # before the next one is made
        assert written == names, "the tensors did not come in the order asked for"


def _cast(piece: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(piece.astype(dtype, copy=False))
    narrowed = dtype.itemsize < piece.dtype.itemsize or dtype == DTYPES["F16"]
    if narrowed and not np.array_equal(np.isfinite(cast), np.isfinite(piece)):
        raise UserError(f"{name}: a value is too large for {dtype.name}: choose another dtype")
    return cast
