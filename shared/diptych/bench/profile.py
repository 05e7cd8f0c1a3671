"""Where an iteration's time goes, on one screen: phases, kinds of operations, the dearest (`bench --profile`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diptych.bench.contest import PHASES
from diptych.bench.workloads import Workload

DEAREST = 15
OVERHEAD = "framework overhead"
KINDS: Mapping[str, str] = {
    "communication": r"nccl|gloo|c10d|all.?reduce|all.?gather|all.?to.?all|reduce.?scatter|collective",
    "optimizer": r"optimizer|adam|foreach|multi_tensor|^jit_apply/",
    "attention": r"attention|fmha|flash",
    "calls and views": r"autograd::|backward\d+$|/(while|call|conditional|tuple)\b"
    r"|aten::(as_strided|_?(unsafe_)?view|t|transpose|permute|reshape|slice|select|narrow|expand|expand_as|unsqueeze|squeeze|detach|alias|to|linear|matmul"
    r"|empty\w*|resize_|result_type|resolve_\w+|promote_types|item|_local_scalar_dense|is_nonzero|unbind|split)$|^detach",
    "gather, scatter": r"gather|scatter|index|embedding|dynamic-(update-)?slice|take_along|searchsorted",
    "copies": r"reorder|copy|clone|concat|::cat$|::stack|transpose|memcpy|memset|::fill_|::zero|::new_zeros|pad\b"
    r"|wrapped_(pad|broadcast)|flatten_dense",
    "matrix products": r"ynn_fusion|gemm|gemv|cublas|cutlass|nvjet|xmma|(^|::|/|_)(mm|bmm|addmm|baddbmm|dot|matmul"
    r"|linear|conv[123]d)\b|convolution|_linear_",
}
"""Regular expressions of operations' names by kind; the first that is found counts. The rest is elementwise."""
REST = "elementwise, sums"


@dataclass(frozen=True)
class Row:
    """An operation, or several together: then `of` says how many."""

    name: str
    seconds: float
    calls: int
    of: int = 1


def profile_screen(name: str, profiled: Mapping[str, Any], workload: Workload) -> str:
    """One traced iteration of an engine, of which are all shares. profiled: a worker's answer to "profile"."""
    iteration = profiled["iteration"]
    whole: float = iteration["seconds"]
    operations = [Row(row["name"], row["seconds"], row["calls"]) for row in profiled["operations"]]
    blocks = (_phases(iteration["phases"], whole), _kinds(operations, whole))
    lines = [f"{name}: {workload.describe()}", f"one iteration of {_seconds(whole)} s, traced", ""]
    lines += [f"{left:<46}{right}".rstrip() for left, right in zip_longest(*blocks, fillvalue="")]
    lines += ["", f"{'the dearest operations':<60}{'seconds':>9}{'share':>9}{'calls':>8}  kind"]
    for row in grouped(operations)[:DEAREST]:
        shown = _short(row.name) if row.of == 1 else f"{_short(row.name, 52)} ({row.of})"
        lines.append(f"{shown:<60}{_time(row.seconds, whole)}{row.calls:>8}  {kind(row.name)}")
    return "\n".join([*lines, "", *_files(profiled["files"])])


def kind(operation: str) -> str:
    """What an operation does, by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, operation.lower()))
    return next(found, REST)


def grouped(operations: Sequence[Row]) -> list[Row]:
    """Operations whose names differ by a number alone (XLA's `dot.7` and `dot.12` of one program) as one, the dearest
    first."""
    found: dict[str, list[Row]] = {}
    for row in operations:
        found.setdefault(re.sub(r"(\.(\d+|clone|remat\d*))+$", "", row.name), []).append(row)
    return _sums(found)


def _sums(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows under each name as one, the dearest first."""
    rows = [
        Row(name, sum(row.seconds for row in rows), sum(row.calls for row in rows), len(rows))
        for name, rows in found.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def by_kind(operations: Sequence[Row], whole: float) -> list[Row]:
    """Seconds of each kind, the dearest first, and last what no operation has of `whole`: Python, dispatch, waiting. It
    is 0 where operations ran beside each other for longer than that."""
    found: dict[str, list[Row]] = {}
    for row in operations:
        found.setdefault(kind(row.name), []).append(row)
    overhead = whole - sum(row.seconds for row in operations)
    return [*_sums(found), Row(OVERHEAD, max(0.0, overhead), 0)]


def _phases(phases: Mapping[str, float], whole: float) -> Iterator[str]:
    yield f"{'phase':<18}{'seconds':>9}{'share':>9}"
    order = [phase for phase in ("data", "switch", "rollout", *PHASES) if phase in phases]
    for phase in dict.fromkeys([*order, *phases]):
        yield f"{phase:<18}{_time(phases[phase], whole)}"


def _kinds(operations: Sequence[Row], whole: float) -> Iterator[str]:
    yield f"{'kind of operation':<20}{'seconds':>9}{'share':>9}{'calls':>8}"
    for row in by_kind(operations, whole):
        yield f"{row.name:<20}{_time(row.seconds, whole)}{row.calls or '':>8}"


def _files(files: Sequence[str]) -> Iterator[str]:
    """Where the traces are, and what opens them."""
    for path in map(Path, files):
        if path.name.endswith(".xplane.pb"):
            for beside in sorted(path.parent.glob("*.trace.json.gz")):
                yield f"trace: {beside} (open it at https://ui.perfetto.dev)"
            root = path.parents[3] if path.parent.parent.name == "profile" else path.parent  # of plugins/profile/DATE
            yield f"trace: {path} (pip install xprof; xprof --logdir {root})"
        else:
            yield f"trace: {path} (open it at https://ui.perfetto.dev)"


def _time(seconds: float, whole: float) -> str:
    return f"{_seconds(seconds):>9}{100 * seconds / whole:>7.1f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 10 else f"{seconds:.2f}"


def _short(name: str, length: int = 58) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."
