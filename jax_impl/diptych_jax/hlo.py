"""What a compiled program does, read from its HLO text: collectives, matrix products and bytes through the memory.

XLA's own cost analysis counts the body of a loop once; here every computation is counted as often as it runs. The text
is that of one device, after partitioning, so that its shapes are the device's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Names for buffers, and instructions whose work is counted elsewhere: they move nothing.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "call-start", "async-start", "async-update", "async-done",
    "copy-done", "domain", "add-dependency", "get-dimension-size",
}  # fmt: skip
# Inside a fusion: the same numbers under another shape or type.
RESHAPING = {"bitcast", "pad", "reshape", "convert", "copy", "transpose"}

_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_NOISE = re.compile(r'(metadata|frontend_attributes)=\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\}')


@dataclass(frozen=True)
class Shape:
    """One array. fast: it lies in the chip's scratch memory, not in its main memory."""

    kind: str
    sizes: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * bits(self.kind) / 8

    @property
    def moved(self) -> float:
        """Bytes of main memory."""
        return 0.0 if self.fast else self.bytes


@dataclass
class Instruction:
    """One line. shapes: of its results, in order. operands: names. rest: the text after the operands."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    inner: str
    rest: str

    def called(self, *keys: str) -> list[str]:
        """The computations that these attributes name."""
        found: list[str] = []
        for key in keys:
            for one in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest):
                found += re.findall(r"[\w.\-]+", one)
        return found


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operand(self, instruction: Instruction, index: int) -> Shape:
        return self.instructions[instruction.operands[index]].shapes[0]


@dataclass(frozen=True)
class Move:
    """One collective instruction. payload: bytes of the whole array that it makes or reduces, on one device. times: how
    often it runs. group: the partitions of its first group (of a permutation: of its first pair)."""

    kind: str
    payload: float
    times: float
    group: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that one device sends, by the ring algorithms that are known to be best (Chan et al. 2007)."""
        share = (len(self.group) - 1) / len(self.group) if self.group else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.payload * factor


@dataclass(frozen=True)
class Work:
    """One run of a program on one device. flops: of matrix products. moved: bytes through main memory."""

    flops: float
    moved: float
    collectives: tuple[Move, ...]


def bits(kind: str) -> int:
    """Bits of an element: `s32`, `bf16`, `f8e4m3fn`, `u4`, ..."""
    if kind in BITS:
        return BITS[kind]
    digits = re.match(r"[a-z]+([0-9]+)", kind)
    return int(digits[1]) if digits else 0


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Every computation by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = found[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread="):  # (instructions may span lines)
            current = None
        elif match := _LINE.match(line):
            instruction = _instruction(match[2], match[3])
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction.name
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    text = _NOISE.sub("", text)
    end = _balanced(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _balanced(text, start)
    inner = text[start + 1 : end - 1]
    return Instruction(
        name=name,
        opcode=text[:start],
        shapes=_shapes(shape),
        operands=re.findall(r"%([\w.\-]+)", inner),
        inner=inner,
        rest=text[end:],
    )


def _balanced(text: str, start: int) -> int:
    """The end of the parenthesis that opens at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"HLO: a parenthesis never closes: {text[:80]!r}")


def _shapes(text: str) -> list[Shape]:
    return [
        Shape(kind, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), fast="S(1)" in (layout or ""))
        for kind, sizes, layout in _ARRAY.findall(text)
    ]


def work(text: str, *, unknown_trips: float = 1.0) -> Work:
    """All that one run of the program does. unknown_trips: how often a loop runs whose length its text does not say."""
    computations, entry = parse(text)
    flops = moved = 0.0
    moves: list[Move] = []
    for computation, times, is_fused in _runs(computations, entry, unknown_trips):
        under_way = _is_under_way(computation)
        for one in computation.instructions.values():
            flops += times * _flops(computation, one)
            moved += 0.0 if is_fused else times * _moved(computations, computation, one)
            if found := [] if under_way else _moves(computation, one, times):
                moves += found
                moved += times * _touched(computation, one) if is_fused else 0.0
    return Work(flops=flops, moved=moved, collectives=tuple(moves))


def _runs(
    computations: dict[str, Computation], entry: str, unknown_trips: float
) -> Iterator[tuple[Computation, float, bool]]:
    """(computation, how often it runs, inside a fusion?) of everything that the entry reaches; of a conditional's
    branches the dearest stands for all."""
    waiting = [(entry, 1.0, False)]
    while waiting:
        name, times, is_fused = waiting.pop()
        computation = computations[name]
        yield computation, times, is_fused
        for one in computation.instructions.values():
            if one.opcode == "while":
                trips = _trips(computations, computation, one)
                times_of_body = times * (unknown_trips if trips is None else trips)
                waiting += [(body, times_of_body, is_fused) for body in one.called("body")]
            elif one.opcode == "conditional":
                branches = one.called("branch_computations", "true_computation", "false_computation")
                dearest = max(branches, key=lambda branch: _size(computations, branch))
                waiting.append((dearest, times, is_fused))
            elif one.opcode in ("call", "call-start", "async-start"):
                waiting += [(callee, times, is_fused) for callee in one.called("to_apply", "calls")]
            elif one.opcode == "fusion":
                waiting += [(callee, times, True) for callee in one.called("calls")]


def _size(computations: dict[str, Computation], name: str) -> float:
    """Bytes that the instructions of a computation move."""
    computation = computations[name]
    return float(sum(_moved(computations, computation, one) for one in computation.instructions.values()))


def _trips(computations: dict[str, Computation], caller: Computation, loop: Instruction) -> int | None:
    """How often a loop runs: as the compiler notes it, or from its counter's start, step and limit. (Loops that a TPU's
    compiler has unrolled count in larger steps.)"""
    noted = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.rest)
    if noted:
        return int(noted[1])
    condition = computations[loop.called("condition")[0]]
    seen = [condition, *(computations[name] for one in condition.instructions.values() for name in one.called("calls"))]
    instructions = [one for computation in seen for one in computation.instructions.values()]
    compared = [one for one in instructions if one.opcode == "compare"]
    limits = [int(one.inner) for one in instructions if one.opcode == "constant" and one.inner.isdigit()]
    joined = any(one.opcode in ("and", "or", "not", "reduce") for one in instructions)
    if len(compared) != 1 or len(limits) != 1 or "direction=LT" not in compared[0].rest or joined:
        return None
    counters = [re.search(r"index=(\d+)", one.rest) for one in instructions if one.opcode == "get-tuple-element"]
    start, step = 0, 1
    if len(counters) == 1 and counters[0] is not None:
        index = int(counters[0][1])
        start = _constant(caller, caller.instructions[loop.operands[0]], index) or 0
        body = computations[loop.called("body")[0]]
        added = body.instructions[body.instructions[body.root].operands[index]]
        steps = [_constant(body, added, position) for position in range(len(added.operands))]
        if added.opcode == "add" and (found := [one for one in steps if one]):
            step = found[0]
    return max(0, -(-(limits[0] - start) // step))


def _constant(computation: Computation, one: Instruction, position: int) -> int | None:
    """The number that an operand is, through copies; None where it is none."""
    operand = computation.instructions.get(one.operands[position]) if position < len(one.operands) else None
    while operand is not None and operand.opcode in ("copy", "bitcast"):
        operand = computation.instructions.get(operand.operands[0])
    return (
        int(operand.inner) if operand is not None and operand.opcode == "constant" and operand.inner.isdigit() else None
    )


# Matrix products ---------------------------------------------------------------------------------------------------


def _flops(computation: Computation, one: Instruction) -> float:
    if one.opcode == "dot":
        left = computation.operand(one, 0)
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(one.shapes[0].sizes) * math.prod(left.sizes[axis] for axis in axes)
    if one.opcode == "convolution":
        return _convolution_flops(computation.operand(one, 0), computation.operand(one, 1), one)
    return 0.0


def _convolution_flops(left: Shape, right: Shape, one: Instruction) -> float:
    """A product of matrices is a convolution on a TPU, batches as dilated windows: what falls on padding is no work."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, one.rest
    image, kernel, out = labels.groups()
    written = re.search(r"window=\{([^}]*)\}", one.rest)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", written[1] if written else ""))
    result = one.shapes[0]
    pairs = 1
    for index in range(sum(letter.isdigit() for letter in out)):

        def setting(key: str, default: int, index: int = index) -> int:
            return int(window[key].split("x")[index]) if key in window else default

        axis = str(index)
        pairs *= _window_pairs(
            out=result.sizes[out.index(axis)],
            kernel=right.sizes[kernel.index(axis)],
            image=left.sizes[image.index(axis)],
            stride=setting("stride", 1),
            kernel_dilation=setting("rhs_dilate", 1),
            image_dilation=setting("lhs_dilate", 1),
            low=int(window["pad"].split("x")[index].split("_")[0]) if "pad" in window else 0,
        )
    batch, features = result.sizes[out.index("b")], result.sizes[out.index("f")]
    return 2.0 * pairs * batch * features * right.sizes[kernel.index("i")]


def _window_pairs(
    *, out: int, kernel: int, image: int, stride: int, kernel_dilation: int, image_dilation: int, low: int
) -> int:
    """How many (output, kernel) positions of one window axis meet a real position of the image."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - low
    return int(((at >= 0) & (at % image_dilation == 0) & (at // image_dilation < image)).sum())


# Collectives -------------------------------------------------------------------------------------------------------


def _is_under_way(computation: Computation) -> bool:
    """Is this the start of a collective that a TPU runs beside other work, or some of that work? Each has a copy of the
    instruction in it, and so has its end, where it is counted."""
    started = any("AsyncCollectiveStart" in one.rest for one in computation.instructions.values())
    return started or computation.name.startswith("async_collective_fusion")


def _moves(computation: Computation, one: Instruction, times: float) -> list[Move]:
    kind = one.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return []
    operands = [computation.instructions[name].shapes[0] for name in one.operands if name in computation.instructions]
    taken = sum(shape.bytes for shape in operands)
    group = _first_group(one.rest)
    if kind == "collective-permute":
        taken = operands[0].bytes
    elif kind == "all-gather":
        taken *= len(group)
    elif kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU fuses the slice that makes it one
    return [Move(kind.removeprefix("ragged-"), taken, times, group)] if len(group) > 1 else []


def _first_group(text: str) -> tuple[int, ...]:
    """The partitions of the first group of a collective, in any of the ways in which HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", text):
        return tuple(_numbers(listed[1]))
    if tiled := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        dims = _numbers(tiled[2])
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(_numbers(tiled[3]) if tiled[3] else None)
        return tuple(int(one) for one in ids.reshape(_numbers(tiled[1]))[0])
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))?\s*\{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = np.arange(math.prod(sizes.values()))
        if named[2]:
            ids = ids.reshape(_numbers(named[2])).transpose(_numbers(named[3]) if named[3] else None)
        names = list(sizes)
        kept = [names.index(one) for one in re.findall(r"'([^']+)'", named[4])]
        others = [axis for axis in range(len(names)) if axis not in kept]
        ids = ids.reshape(list(sizes.values())).transpose(others + kept)
        return tuple(int(one) for one in ids.reshape(-1, math.prod(ids.shape[len(others) :]))[0])
    raise ValueError(f"HLO: a collective whose groups are written in a way that is not known: {text[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


# Memory ------------------------------------------------------------------------------------------------------------


def _moved(computations: dict[str, Computation], computation: Computation, one: Instruction) -> float:
    """Bytes that an instruction reads from main memory and writes to it. Who updates or reads a slice touches only
    that slice."""
    if one.opcode in FREE or one.opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in one.rest:
        return 0.0
    operands = [computation.instructions[name].shapes[0] for name in one.operands if name in computation.instructions]
    if one.opcode in ("slice", "dynamic-slice"):
        return 2 * one.shapes[0].moved
    if one.opcode == "slice-start":  # results: source, destination, context
        return one.shapes[1].moved + (0.0 if one.shapes[0].fast else one.shapes[1].bytes)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if one.opcode == "dynamic-update-slice" else -1]
        return 2 * update.moved
    if one.opcode == "gather":
        return 2 * one.shapes[0].moved + operands[1].moved
    if one.opcode == "copy-start":  # results: destination, source, context
        return float(sum(shape.moved for shape in one.shapes[:2]))
    if one.opcode == "fusion":
        return _moved_by_fusion(computations[one.called("calls")[0]], operands, one)
    return _touched(computation, one)


def _touched(computation: Computation, one: Instruction) -> float:
    """All of its operands and results."""
    operands = [computation.instructions[name].shapes[0] for name in one.operands if name in computation.instructions]
    return float(sum(shape.moved for shape in (*operands, *one.shapes)))


def _moved_by_fusion(fused: Computation, operands: Sequence[Shape], one: Instruction) -> float:
    # A collective under way beside this fusion's own work: its buffers only pass through.
    carried = {
        (shape.kind, shape.sizes)
        for instruction in fused.instructions.values()
        if instruction.opcode in COLLECTIVES
        for shape in (*instruction.shapes, fused.operand(instruction, 0))
    }
    parameters = sorted(
        (instruction for instruction in fused.instructions.values() if instruction.opcode == "parameter"),
        key=lambda instruction: int(instruction.inner),
    )
    users = {parameter.name: _users(fused, parameter.name) for parameter in parameters}
    total = 0.0
    for shape, parameter in zip(operands, parameters, strict=False):
        touched = users[parameter.name]
        if (shape.kind, shape.sizes) in carried:
            continue
        if touched and None not in touched:
            total += 0.0 if shape.fast else min(sum(size or 0.0 for size in touched), shape.bytes)
        else:
            total += shape.moved
    root = fused.instructions[fused.root]
    parts = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for shape, part in zip(one.shapes, parts, strict=False):
        if (shape.kind, shape.sizes) in carried:
            continue
        is_update = part.opcode == "dynamic-update-slice" and part.operands[1] in fused.instructions
        total += 0.0 if shape.fast else fused.operand(part, 1).bytes if is_update else shape.bytes
    return total


def _users(fused: Computation, name: str) -> list[float | None]:
    """What each user of a value inside a fusion reads of it, in bytes; None: all."""
    found: list[float | None] = []
    for one in fused.instructions.values():
        for position, operand in enumerate(one.operands):
            if operand != name:
                continue
            if one.opcode in RESHAPING and one.name != fused.root:
                found += _users(fused, one.name)
            elif one.opcode in ("slice", "dynamic-slice", "gather") and position == 0:
                found.append(one.shapes[0].bytes)
            elif one.opcode == "dynamic-update-slice" and position == 0:
                found.append(0.0)
            else:
                found.append(None)
    return found
