"""Where a model lies on many devices: meshes, and which axis of each parameter is split over which axis of a mesh.

Training runs on a mesh (data, fsdp, tensor) and decoding on a mesh (data, tensor) over the same devices. A parameter's
axes have letters (`families.decoder.slots`); one small table per phase maps letters to mesh axes. All of this is
arithmetic: it is checked, and memory is counted, before any device is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diptych.errors import UserError

if TYPE_CHECKING:  # families import the protocol, which imports this file
    from diptych.families.decoder import Slot

Spec = tuple[str | None, ...]  # the mesh axis over which each axis of an array is split
Rules = Mapping[str, str]

# Letters of `families.decoder.slots` and `families.recurrent.slots`: v vocabulary, e and d widths of embeddings and
# model, n and k heads, f inner width; "experts" is the leading axis of what every expert has.
TRAIN_RULES: Rules = {
    "v": "tensor", "n": "tensor", "k": "tensor", "f": "tensor", "experts": "tensor", "e": "fsdp", "d": "fsdp",
}  # fmt: skip
DECODE_RULES: Rules = {"v": "tensor", "n": "tensor", "k": "tensor", "f": "tensor", "experts": "tensor"}


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis; -1 (at most once): whatever is left. A decode mesh has fsdp 1."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def sizes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def rows(self) -> int:
        """How many ways the rows of a batch are split."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.sizes.items() if size > 1) or "one device"


@dataclass(frozen=True, kw_only=True)
class Zero:
    """How DeepSpeed partitions a model over the processes (Rajbhandari et al. 2020), and what waits in host memory."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The meshes of every role and phase, as wanted (`resolve` fills in -1), and how weights move between them.

    critic, reference, reward: None: as `train`. offload: roles that wait in host memory between uses. switch_chunk:
    bytes that the switch moves at a time; None: all. switch_check: what is compared after each. zero, zero_critic,
    zero_reference, zero_reward: the torch engine's (`zero_of`).
    """

    train: MeshShape = field(default_factory=lambda: MeshShape(fsdp=-1))
    decode: MeshShape = field(default_factory=lambda: MeshShape(data=-1))
    critic: MeshShape | None = None
    reference: MeshShape | None = None
    reward: MeshShape | None = None
    offload: tuple[str, ...] = ()
    switch_chunk: int | None = None
    switch_check: Literal["fingerprint", "logprobs"] = "fingerprint"
    zero: Zero = field(default_factory=Zero)
    zero_critic: Zero | None = None
    zero_reference: Zero | None = None
    zero_reward: Zero | None = None

    def zero_of(self, role: str, *, is_trained: bool) -> Zero:
        """ZeRO of a model of this role. A frozen one without settings of its own is split only where all else is."""
        if role == "critic":
            return self.zero_critic or self.zero
        if is_trained:
            return self.zero
        split = Zero(stage=3, offload_param=self.zero.offload_param)
        default = self.zero_reference or (split if self.zero.stage == 3 else Zero())
        return (self.zero_reward or default) if role == "reward" else default

    def of(self, role: str) -> MeshShape:
        """The mesh on which a role is trained or scores."""
        own = {"critic": self.critic, "reference": self.reference, "reward": self.reward}.get(role)
        return own or self.train

    def key_of(self, role: str) -> str:
        """The recipe's key of that mesh."""
        return f"layout.{role}" if role in ("critic", "reference", "reward") and self.of(role) is not self.train else (
            "layout.train"
        )  # fmt: skip


def resolve(wanted: MeshShape, num_devices: int, *, key: str) -> MeshShape:
    """`wanted` with its -1 filled in. UserError, naming the axis, where the sizes do not multiply to the devices."""
    free = [name for name, size in wanted.sizes.items() if size == -1]
    fixed = math.prod(size for size in wanted.sizes.values() if size != -1)
    if bad := [name for name, size in wanted.sizes.items() if size < 1 and size != -1]:
        raise UserError(f"{key}.{bad[0]}: {wanted.sizes[bad[0]]} devices; give a number of at least 1, or -1 once")
    if len(free) > 1:
        raise UserError(f"{key}.{free[1]}: only one axis can be -1, and {key}.{free[0]} is too")
    shown = " x ".join(f"{name} {size}" for name, size in wanted.sizes.items())
    if num_devices % fixed or (not free and fixed != num_devices):
        axis = free[0] if free else max(wanted.sizes, key=lambda name: wanted.sizes[name])
        raise UserError(
            f"{key}.{axis}: {shown} does not fill the {num_devices} device{'s' * (num_devices != 1)} that are here; "
            "the sizes must multiply to their number (-1 takes what is left)"
        )
    return MeshShape(**{**wanted.sizes, **dict.fromkeys(free, num_devices // fixed)})


def check_slots(slots: Mapping[str, Slot], mesh: MeshShape, *, key: str, rules: Rules = TRAIN_RULES) -> None:
    """UserError, naming the mesh axis, where an axis of a model's parameters (`model_slots`) does not divide over it.

    Key-value heads may be fewer than the tensor axis where they divide it: then each device holds all of them.
    """
    names = {
        "v": "vocabulary", "n": "query heads", "k": "key-value heads", "f": "inner width", "d": "hidden size",
        "e": "embedding width", "experts": "experts",
    }  # fmt: skip
    for slot in slots.values():
        for letter, dim, axis in zip(letters(slot), slot.shape, _axes(slot, rules), strict=True):
            size = 1 if axis is None else mesh.sizes[axis]
            if dim % size and not (letter == "k" and size % dim == 0):
                raise UserError(
                    f"{key}.{axis}: {names[letter]} ({dim}) cannot be split over {size} devices: choose a divisor of "
                    f"{dim}"
                )


def letters(slot: Slot) -> tuple[str, ...]:
    """The letter of each axis of `slot.shape`; "experts" for the leading one of what every expert has."""
    found = tuple(slot.pattern.split("->")[1].split())
    return ("experts", *found) if slot.per_expert else found


def slot_spec(slot: Slot, mesh: MeshShape, rules: Rules) -> Spec:
    """The mesh axis of each axis of one layer's parameter; an axis that does not divide (`check_slots` says which may)
    stays whole."""
    return tuple(
        None if axis is None or dim % mesh.sizes[axis] else axis
        for dim, axis in zip(slot.shape, _axes(slot, rules), strict=True)
    )


def _axes(slot: Slot, rules: Rules) -> Spec:
    """The mesh axis over which each axis is to be split. A mesh axis is used once, by the first; vectors of the model's
    width are not split."""
    wanted: list[str | None] = []
    for letter in letters(slot):
        axis = rules.get(letter)
        is_vector = letter in ("d", "e") and len(slot.shape) == 1
        wanted.append(None if axis in wanted or is_vector else axis)
    return tuple(wanted)


def shard_size(slot: Slot, mesh: MeshShape, rules: Rules) -> int:
    """Numbers of one layer's parameter on one device."""
    split = math.prod(mesh.sizes[axis] for axis in slot_spec(slot, mesh, rules) if axis is not None)
    return math.prod(slot.shape) // split
