"""The switch: from the weights that DeepSpeed trains to those that generate, cast, merged with an adapter, and checked.

Up to stage 2 every process holds the whole model in the type that it computes in: decoding reads that memory, and
nothing is copied but what an adapter changes. At stage 3 the parameters are gathered once for the whole rollout, a
group at a time, into a copy of their own, and the training weights stay partitioned. Nothing is ever written to a
training weight (law 7).

What generates is compared with what is trained each time: a number for each parameter's bits, summed over the pieces
that the optimizer updates on the one side and over the copy on the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.engine import AdapterSpec
from diptych.errors import InvariantError
from diptych.families.family import ModelConfig
from diptych.weights.tensors import in_groups
from diptych_torch import adapter as adapters
from diptych_torch import zero
from diptych_torch.zero import Shards, whole_shape

# Bytes that are gathered at a time where the recipe does not say: little beside a model that needs stage 3.
GROUP = 2**30
_FACTOR, _WORD = 2654435761, 0xFFFFFFFF
_AT_ONCE = 2**22  # elements whose fingerprint is computed at a time: eight bytes of integers each


class Switched(NamedTuple):
    """Weights to generate with, by the module's names, and what they cost. bytes_moved: received from other processes,
    all processes together."""

    weights: dict[str, Tensor]
    seconds: float
    bytes_moved: int


def switch(
    weights: Mapping[str, nn.Parameter],
    trained: Mapping[str, nn.Parameter],
    *,
    shards: Shards | None,
    config: ModelConfig,
    adapter: AdapterSpec | None,
    dtype: torch.dtype,
    chunk: int | None,
    part: Callable[[str, Tensor], Tensor] | None = None,
) -> Switched:
    """The decode copy. weights: the base's parameters; trained: what is trained, an adapter's among them; shards: the
    optimizer's pieces, None for a frozen model. chunk: bytes gathered at a time; None: `GROUP`. part: what this process
    keeps of a parameter (`tensor_parallel.cut`); None: all.

    Collective. Raises InvariantError, in every process, where a parameter is not what is trained.
    """
    start = time.perf_counter()
    added = {name: one for name, one in trained.items() if name not in weights}  # an adapter's
    copies: dict[str, Tensor] = {}
    prints: dict[str, Tensor] = {}
    moved = 0
    merge = None
    for everything in (added, weights):
        sizes = {name: whole_shape(one).numel() * dtype.itemsize for name, one in everything.items()}
        for names in in_groups(sizes, chunk or GROUP):
            with zero.whole([everything[name] for name in names]):
                for name in names:
                    parameter = everything[name]
                    is_split = hasattr(parameter, "ds_id")
                    copy = parameter.detach().to(dtype, copy=is_split and part is None)
                    moved += parameter.numel() * parameter.element_size() * (zero.world_size() - 1) * is_split
                    if not _is_same(parameter, copy, shards):
                        prints[name] = fingerprint(copy.reshape(-1))
                    if merge is not None:
                        copy = merge(name, copy)
                    copies[name] = copy if part is None or everything is added else part(name, copy)
                    if part is not None and copies[name].data_ptr() == parameter.data_ptr() and is_split:
                        copies[name] = copies[name].clone()
        if adapter is not None and everything is added:
            merge = adapters.merger(config, adapter, {name: copies[name] for name in trained if name in copies})
    _check({**weights, **added}, prints, shards, dtype)
    if next(iter(copies.values())).is_cuda:
        torch.cuda.synchronize()
    return Switched({name: copies[name] for name in weights}, time.perf_counter() - start, moved)


def fingerprint(flat: Tensor, start: int = 0) -> Tensor:
    """sum over i of bits(flat[i]) ((start + i) * 2654435761 | 1) modulo 2^32, as an int64 scalar: a number for a piece
    of a flattened tensor; the pieces' numbers add up to the whole one's. float64: two words for each element."""
    word = torch.int16 if flat.dtype.itemsize == 2 else torch.int32
    words = flat.dtype.itemsize // word.itemsize
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), _AT_ONCE):
        bits = flat[begin : begin + _AT_ONCE].contiguous().view(word).to(torch.int64)
        first = (start + begin) * words
        index = torch.arange(first, first + len(bits), dtype=torch.int64, device=flat.device)
        # Products and sums wrap around modulo 2^64, of which 2^32 is a divisor.
        total += (bits * ((index * _FACTOR) | 1)).sum()
    return total & _WORD


def _check(
    parameters: Mapping[str, nn.Parameter], prints: Mapping[str, Tensor], shards: Shards | None, dtype: torch.dtype
) -> None:
    names = list(prints)
    if not names:
        return
    ours = torch.stack([_of_training(parameters[name], shards, dtype) for name in names])
    if zero.world_size() > 1:
        dist.all_reduce(ours)
    theirs = torch.stack([prints[name] for name in names])
    wrong = ((ours & _WORD) != theirs).any().to(torch.int64)
    if zero.world_size() > 1:
        dist.all_reduce(wrong)
    if wrong:
        different = [name for name, same in zip(names, ((ours & _WORD) == theirs).tolist(), strict=True) if not same]
        where = f"process {dist.get_rank()}: {', '.join(different[:3])}" if different else "another process"
        raise InvariantError(
            f"the switch to the decode copy: fingerprints differ ({where}; {len(different)} of {len(names)} parameters)"
            ": what would generate is not what is trained"
        )


def _is_same(parameter: nn.Parameter, copy: Tensor, shards: Shards | None) -> bool:
    """Decoding reads the very memory that the optimizer updates, or that nothing does."""
    is_updated_elsewhere = shards is not None and shards.stage > 0 and parameter.requires_grad
    return copy.data_ptr() == parameter.data_ptr() and not hasattr(parameter, "ds_id") and not is_updated_elsewhere


def _of_training(parameter: nn.Parameter, shards: Shards | None, dtype: torch.dtype) -> Tensor:
    """The fingerprint of this process's piece, as the copy's type would hold it."""
    if shards is not None and parameter.requires_grad:
        start, piece = shards.piece(parameter)
        return fingerprint(piece.to(dtype), start).to(parameter.device)
    split: Any = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    start = dist.get_rank() * split.numel()
    size = max(0, min(split.numel(), whole_shape(parameter).numel() - start))
    return fingerprint(split.detach().view(-1)[:size], start).to(parameter.device)
