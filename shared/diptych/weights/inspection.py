"""`diptych weights check`: where every tensor of a directory goes in the model, its checksum, and what would not load.

Checksums: a tensor's is the SHA-256 of the line `NAME DTYPE [SHAPE]` (`model.norm.weight float32 [64]`, UTF-8, one
newline) and then its bytes as they are stored (row-major, little-endian), NAME being transformers' own. The whole's is
the SHA-256 of the tensors' hexadecimal checksums, a line each, by name in byte order. So a directory keeps its checksum
when it is sharded otherwise, loses its prefixes, or goes through an engine; it changes with a bit, a name, a shape or
a type.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.engine import Head
from diptych.errors import UserError
from diptych.families.family import ModelConfig, TensorRule, family, model_slots, tensor_rules
from diptych.weights.contents import Contents, read_contents, tied_copy_differs
from diptych.weights.files import DTYPES, StoredTensor


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor: where it lies, which slots of the model it fills and how, and its checksum ("" where it was not
    read)."""

    name: str
    stored_as: str
    file: str
    shape: list[int]
    dtype: str
    slots: list[str]
    how: str
    checksum: str


def check_weights(directory: Path, *, checksums: bool = True) -> dict[str, Any]:
    """The report on a model directory, as JSON has it; `problems` is empty where the directory loads.

    Raises UserError only where there is no directory.
    """
    report: dict[str, Any] = {"directory": str(directory), "problems": []}
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    try:
        contents = read_contents(directory)
    except UserError as error:
        return report | {"problems": [str(error)]}
    problems = list(contents.problems)
    if not problems:
        difference = tied_copy_differs(contents)
        problems += [difference] * (difference is not None)
    tensors = _tensor_reports(contents, checksums=checksums)
    whole = hashlib.sha256("".join(f"{tensor.checksum}\n" for tensor in sorted(tensors, key=_name)).encode())
    return report | {
        "family": contents.model.family,
        "title": family(contents.model.family).title,
        "head": contents.head,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "bytes": sum(
            math.prod(tensor.shape) * tensor.dtype.itemsize
            for tensor in contents.tensors.values()
            if tensor.kind in DTYPES
        ),
        "checksum": whole.hexdigest() if checksums and not problems else "",
        "skipped": list(contents.skipped),
        "tied_copy": contents.tied_copy.name if contents.tied_copy else None,
        "tensors": [vars(tensor) for tensor in tensors],
        "problems": problems,
    }


def checksum(name: str, tensor: StoredTensor) -> str:
    """SHA-256 over the line `NAME DTYPE [SHAPE]` and the stored bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
    for piece in tensor.pieces():
        digest.update(piece.view(np.uint8).data)
    return digest.hexdigest()


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{tensor['name']:<{width}}  {tensor['dtype']:<9} {tensor['shape']!s:<16} -> {', '.join(tensor['slots'])}"
        f"{'  (' + tensor['how'] + ')' if tensor['how'] else ''}  {tensor['checksum'][:16]}".rstrip()
        for width in [max((len(tensor["name"]) for tensor in report.get("tensors", [])), default=0)]
        for tensor in report.get("tensors", [])
    ]
    if "family" in report:
        lines += [
            "",
            f"family      {report['family']} ({report['title']})",
            f"head        {report['head']}",
            f"parameters  {report['parameters']:,} in {len(report['tensors'])} tensors, {report['bytes']:,} bytes",
        ]
        lines += [f"skipped     {name} (config.json determines it)" for name in report["skipped"]]
        lines += [f"tied        {report['tied_copy']} is a copy of the embeddings"] if report["tied_copy"] else []
        lines += [f"checksum    sha256 {report['checksum']}"] if report["checksum"] else []
    lines += [f"problem     {problem}" for problem in report["problems"]]
    lines.append(f"{report['directory']}: {'does not load' if report['problems'] else 'loads'}")
    return "\n".join(lines)


def _tensor_reports(contents: Contents, *, checksums: bool) -> list[TensorReport]:
    places = _places(contents.model, contents.head)
    table = model_slots(contents.model, contents.head)
    reports = []
    for name, tensor in contents.tensors.items():
        rule, slots = places.get(name, (None, []))
        readable = tensor.kind in DTYPES
        reports.append(
            TensorReport(
                name=name,
                stored_as=tensor.name,
                file=tensor.file.name,
                shape=list(tensor.shape),
                dtype=tensor.dtype.name if readable else tensor.kind,
                slots=slots,
                how=how(rule, table) if rule else "left over",
                checksum=checksum(name, tensor) if checksums and readable else "",
            )
        )
    return reports


def how(rule: TensorRule, table: dict[str, Any]) -> str:
    """The way from a tensor to its slots, in words and einops patterns."""
    parts = [f"reordered {rule.order}"] if rule.order else []
    if len(rule.slots) > 1:
        parts.append(f"split into rows {' + '.join(map(str, rule.rows))}")
    patterns = dict.fromkeys(table[slot].pattern for slot in rule.slots)
    return ", ".join(parts + [pattern for pattern in patterns if not _is_identity(pattern)])


def _is_identity(pattern: str) -> bool:
    left, right = pattern.split("->")
    return left.split() == right.split()


def _places(model: ModelConfig, head: Head) -> dict[str, tuple[TensorRule, list[str]]]:
    """Every tensor's rule and slots, with its layer and expert: `gate[3, 0]`."""
    found = {}
    for rule in tensor_rules(model, head):
        for layer in rule.layers(model):
            for expert, name in enumerate(rule.names(model, layer)):
                place = [layer] * rule.per_layer + [expert] * rule.per_expert
                found[name] = rule, [f"{slot}{place if place else ''}" for slot in rule.slots]
    return found


def _name(tensor: TensorReport) -> bytes:
    return tensor.name.encode()
