"""Decoding with the layers split over a group of processes (`layout.decode.tensor`), for models that fit no single one.

Each process keeps its heads of every attention and its columns of every MLP (Shoeybi et al. 2019, Megatron-LM): query,
key, value, gate and up projections are split by outputs, output and down projections by inputs, and the partial sums of
the latter two are added over the group. Embedding and head are whole everywhere. The processes of a group decode the
same rows, in step, from the same uniforms; groups share out the rows.

For the families whose modules are Llama's: their code takes the number of heads from its tensors.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch.distributed as dist
from torch import Tensor

from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig
from diptych_torch.model import Network

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
KEY = "layout.decode.tensor"
_OF_HEADS = re.compile(r"self_attn\.(?P<which>[qkv])_proj\.(weight|bias)$")
_OF_INNER = re.compile(r"mlp\.(gate|up)_proj\.(weight|bias)$")
_SUMMED = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.(?P<kind>weight|bias)$")


class TensorGroup:
    """This process's place among `size` consecutive processes that decode together. Collective to make."""

    def __init__(self, size: int):
        world = dist.get_world_size()
        if size < 1 or world % size:
            raise UserError(
                f"{KEY}: {size} does not divide the {world} process{'es' * (world != 1)} that run; choose a divisor"
            )
        self.size = size
        self.index = dist.get_rank() % size
        self.number = dist.get_rank() // size  # of the group
        self.count = world // size  # groups
        self._group: Any = None
        for first in range(0, world, size):
            group = dist.new_group(list(range(first, first + size))) if size > 1 else None
            if first == self.number * size:
                self._group = group

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the group, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor


def check(config: ModelConfig, size: int) -> None:
    """UserError, naming what does not divide, where a model cannot be decoded on `size` processes together."""
    if size == 1:
        return
    if not isinstance(config, DecoderConfig) or config.family not in FAMILIES:
        raise UserError(
            f"{KEY}: the torch engine splits {', '.join(FAMILIES)} over processes, not {config.family}: set it to 1"
        )
    for what, number in (("query heads", config.num_heads), ("inner width", config.intermediate_size)):
        if number % size:
            raise UserError(f"{KEY}: {what} ({number}) cannot be split over {size} processes: choose a divisor")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        raise UserError(f"{KEY}: key-value heads ({config.num_kv_heads}) cannot be split over {size} processes")


def split(network: Network, group: TensorGroup) -> None:
    """Make a network compute its part, in place. Its parameters are then `cut`'s."""
    config = network.config
    assert isinstance(config, DecoderConfig)
    network.config = dataclasses.replace(
        config,
        num_heads=config.num_heads // group.size,
        num_kv_heads=max(1, config.num_kv_heads // group.size),
        intermediate_size=config.intermediate_size // group.size,
        attention_scale=config.attention_scale,
    )
    network.is_split = True
    for name, module in network.transformer.named_modules():
        if re.search(r"(self_attn\.o_proj|mlp\.down_proj)$", name):
            module.register_forward_hook(lambda _module, _inputs, output: group.add(output))


def cut(name: str, tensor: Tensor, config: DecoderConfig, group: TensorGroup) -> Tensor:
    """This process's part of a parameter, a copy. config: of the whole model."""
    if found := _OF_HEADS.search(name):
        heads = config.num_heads if found["which"] == "q" else config.num_kv_heads
        mine = max(1, heads // group.size)
        first = group.index * heads // group.size  # several processes may hold the same key-value head
        return tensor.unflatten(0, (heads, -1))[first : first + mine].flatten(0, 1).clone()
    if _OF_INNER.search(name):
        return tensor.chunk(group.size, dim=0)[group.index].clone()
    if found := _SUMMED.search(name):
        if found["kind"] == "weight":
            return tensor.chunk(group.size, dim=1)[group.index].contiguous()
        return tensor.clone() if group.index == 0 else tensor.new_zeros(tensor.shape)  # added once
    return tensor
