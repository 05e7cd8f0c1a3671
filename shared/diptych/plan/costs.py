"""The same costs without a compiler: FLOPs, bytes and activations from the sizes of a model alone.

`search` ranks layouts by them, and the DeepSpeed engine's plan stands on them. A test holds their FLOPs against those
of the traced programs.

Dimensions as in the engines: B rows, T columns, D width, N heads, H head size, F inner width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.engine import Remat
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig
from diptych.plan.memory import active_numbers

PASSES = {"full": 4, "dots": 3, "none": 3}  # forward passes' worth of products in a training step's layers


@dataclass(frozen=True, kw_only=True)
class Forward:
    """FLOPs of a forward pass. layers: of the trunk; head: of the vocabulary, or of the score."""

    layers: float
    head: float

    @property
    def all(self) -> float:
        return self.layers + self.head


def forward(
    config: ModelConfig, *, rows: int, columns: int, scored: int, head: str, keys: float | None = None
) -> Forward:
    """rows of `columns` tokens, of which `scored` go through the head. keys: columns that a token attends to; None: all
    of a row, which is what both engines' products do unless a kernel leaves out the half above the diagonal."""
    tokens = rows * columns
    flops = 2.0 * tokens * active_numbers(config)
    if isinstance(config, DecoderConfig):
        reach = columns if keys is None else keys
        flops += 4.0 * tokens * reach * config.num_heads * config.head_dim * config.num_layers
        width = config.embedding_size
        flops += 4.0 * tokens * width * config.hidden_size if width != config.hidden_size else 0.0
    else:
        width = config.hidden_size
    outputs = config.vocab_size if head == "lm" else 1
    return Forward(layers=flops, head=2.0 * rows * scored * width * outputs)


def training(
    config: ModelConfig, *, rows: int, columns: int, scored: int, head: str, remat: Remat, chunks: float
) -> float:
    """FLOPs of a step's forward and backward pass, and of what the backward pass makes again. chunks: in how many the
    logits of a device's micro-batch are made: those of one are kept, those of more are made again."""
    one = forward(config, rows=rows, columns=columns, scored=scored, head=head)
    return one.layers * PASSES[remat] + one.head * (4 if head == "lm" and chunks > 1 else 3)


def decoding(config: ModelConfig, *, rows: int, prompt: int, new: int) -> float:
    """FLOPs of prefilling `prompt` columns and drawing `new` tokens, each step over all columns of the cache."""
    first = forward(config, rows=rows, columns=prompt, scored=1, head="lm")
    step = forward(config, rows=rows, columns=1, scored=1, head="lm", keys=prompt + new)
    return first.all + (new - 1) * step.all


def activations(
    config: ModelConfig,
    *,
    rows: float,
    columns: int,
    tensor: int,
    itemsize: int,
    remat: Remat,
    chunk: int,
    head: str,
    training: bool,
    flash: bool,
) -> float:
    """Bytes of one device: inputs of all layers (training with remat), the widest layer's own, and a chunk's logits.

    rows: of one device. flash: a kernel that never holds anything of [T, T].
    """
    tokens = rows * columns
    width = config.hidden_size
    kept = tokens * width * itemsize * (config.num_layers if training else 2)
    if isinstance(config, DecoderConfig):
        inner = config.experts.inner * config.experts.top_k if config.experts else config.intermediate_size
        of_layer = 4 * width + (3 * inner + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim) / tensor
        scores = 0.0 if flash else rows * config.num_heads / tensor * columns * columns * (4 + itemsize)
    else:
        of_layer, scores = 4.0 * width, 0.0
    layer = tokens * of_layer * itemsize + scores
    if training and remat == "none":
        kept = layer * config.num_layers
    logits = min(chunk, tokens) * config.vocab_size / tensor * 4 * (3 if training else 2) if head == "lm" else 0.0
    return kept + layer * (3 if training else 1) + logits
