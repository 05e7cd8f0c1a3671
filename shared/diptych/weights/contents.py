"""What a model directory holds, from its files' headers alone, against what its config.json says it must.

Names are made canonical: those of transformers' `save_pretrained`. Files that leave out the trunk's prefix (`h.0...`
for `transformer.h.0...`), tables that config.json determines, and copies of tied embeddings are understood.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diptych.engine import Head
from diptych.errors import UserError
from diptych.families.family import Family, Line, ModelConfig, family, read_model, tensor_shapes
from diptych.weights.files import DTYPES, StoredTensor, stored_tensors, tensor_files


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A directory's tensors by canonical name, in the checkpoint's order as far as they fit.

    tied_copy: an output projection beside tied embeddings. skipped: stored names of tables that config.json determines.
    problems: one sentence each; empty where the directory loads.
    """

    directory: Path
    config: dict[str, Any] = field(repr=False)
    model: ModelConfig
    head: Head
    tensors: dict[str, StoredTensor] = field(repr=False)
    tied_copy: StoredTensor | None
    skipped: tuple[str, ...]
    problems: tuple[str, ...]


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of DIRECTORY/config.json. Raises UserError when it is not there or not JSON."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory (no config.json)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def read_contents(directory: Path) -> Contents:
    """Read config.json and the headers.

    Raises UserError where one of them cannot be read or the family is not supported; tensors that do not fit are
    `problems`.
    """
    config = read_config(directory)
    model = read_model(config, where=str(directory / "config.json"))
    entry = family(model.family)
    files, weight_map = tensor_files(directory)
    stored = [tensor for file in files for tensor in stored_tensors(file)]
    problems = _index_problems(stored, weight_map)
    head: Head = "scalar" if any(tensor.name == "score.weight" for tensor in stored) else "lm"
    expected = tensor_shapes(model, head)
    found: dict[str, StoredTensor] = {}
    skipped, tied_copy = [], None
    for tensor in stored:
        name = _canonical(tensor.name, entry, expected)
        if name not in expected and name.endswith(entry.derived):
            skipped.append(tensor.name)
        elif name not in expected and model.tie_word_embeddings and name == output_projection(entry):
            tied_copy = tensor
        elif name in found:
            problems.append(f"{found[name].name} and {tensor.name} are the same tensor")
        else:
            found[name] = tensor
    problems += _misfits(found, expected)
    if tied_copy is not None and tied_copy.shape != expected[embeddings(entry)]:
        problems.append(f"{tied_copy.name} is no copy of the embeddings: its shape is {list(tied_copy.shape)}")
    ordered = {name: found[name] for name in expected if name in found} | found
    return Contents(
        directory=directory, config=config, model=model, head=head, tensors=ordered, tied_copy=tied_copy,
        skipped=tuple(skipped), problems=tuple(problems),
    )  # fmt: skip


def misfits(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What is missing, left over or misshapen, a sentence each."""
    missing = [name for name in expected if name not in shapes]
    left_over = [name for name in shapes if name not in expected]
    parts = [f"missing {_some(missing)}"] * bool(missing) + [f"left over {_some(left_over)}"] * bool(left_over)
    return parts + [
        f"{name} has shape {list(shapes[name])}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]


def tied_copy_differs(contents: Contents) -> str | None:
    """A sentence where the stored copy of tied embeddings is not equal to them: one of the two would be lost."""
    copy = contents.tied_copy
    if copy is None:
        return None
    original = contents.tensors[embeddings(family(contents.model.family))]
    pairs = zip(copy.pieces(), original.pieces(), strict=True)
    # float64 holds the values of every type that is read.
    if all(np.array_equal(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs):
        return None
    return f"{copy.name} differs from the embeddings, yet tie_word_embeddings is true"


def output_projection(entry: Family) -> str:
    """The family's name of the output projection."""
    return _filled_by(entry, "head")


def embeddings(entry: Family) -> str:
    """The family's name of the embeddings."""
    return _filled_by(entry, "embedding")


def _filled_by(entry: Family, slot: str) -> str:
    for name, held in entry.names.items():
        if slot in ((held,) if isinstance(held, str) else held.slots if isinstance(held, Line) else held):
            return name
    raise AssertionError(f"{entry.title} has no {slot}")


def _canonical(name: str, entry: Family, expected: dict[str, tuple[int, ...]]) -> str:
    return entry.prefix + name if name not in expected and entry.prefix + name in expected else name


def _index_problems(stored: list[StoredTensor], weight_map: dict[str, str] | None) -> list[str]:
    if weight_map is None:
        return []
    places = {tensor.name: tensor.file.name for tensor in stored}
    twice = sorted({tensor.name for tensor in stored if places[tensor.name] != tensor.file.name})
    wrong = sorted(name for name in places.keys() | weight_map.keys() if places.get(name) != weight_map.get(name))
    return [f"in two files: {_some(twice)}"] * bool(twice) + [
        f"the index and the files disagree about {_some(wrong)}"
    ] * bool(wrong and not twice)


def _misfits(found: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = misfits({name: tensor.shape for name, tensor in found.items()}, expected)
    odd = sorted({tensor.kind for tensor in found.values()} - DTYPES.keys())
    if odd:
        names = [tensor.name for tensor in found.values() if tensor.kind in odd]
        problems.append(f"stored as {', '.join(odd)}, of which only {', '.join(DTYPES)} are read: {_some(names)}")
    return problems


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
