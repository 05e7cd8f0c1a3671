"""The one configurable decoder: what it computes (`DecoderConfig`) and which parameters it has (`slots`).

Both engines and the checkpoint reader work from this description. A block reads its input x as

    pre          x = x + attention(norm(x));  x = x + mlp(norm(x))                   (Llama, GPT-2, ...)
    post         x = norm(x + attention(x));  x = norm(x + mlp(x))                   (OPT-350m)
    output       x = x + norm(attention(x));  x = x + norm(mlp(x))                   (OLMo 2)
    sandwich     x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)))       (Gemma 2, 3)
    parallel     x = x + attention(norm(x)) + mlp(norm'(x))                          (GPT-NeoX)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from diptych.engine import Head
from diptych.families.rope import Rope

Activation = Literal["silu", "relu", "gelu", "gelu_tanh", "gelu_fast", "gelu_bloom"]
Block = Literal["pre", "post", "output", "sandwich", "parallel"]

# config.json's names of activations.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_fast",
}
# "gelu" is exact (erf); the others are x/2 (1 + tanh(c (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016), with c as each
# was written down: sqrt(2/pi) to the last digit, or cut short.
GELU_SCALES: Mapping[str, float] = {
    "gelu_tanh": math.sqrt(2 / math.pi),
    "gelu_fast": 0.7978845608,
    "gelu_bloom": 0.79788456,
}


@dataclass(frozen=True, kw_only=True)
class Norm:
    """rms: g x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019). layer: g (x - mean) / sqrt(var + eps) + b (Ba et al.
    2016). The gain g is the parameter plus `offset`."""

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of every MLP: each token goes to the `top_k` experts with the largest softmax of
    the router's logits, weighted by it; `normalized`: the weights of the chosen ones sum to 1.

    balance_coef: weight of the balance loss (Fedus et al. 2022, eq. 4 to 6) that config.json asks for.
    """

    count: int
    top_k: int
    inner: int
    normalized: bool
    balance_coef: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the decoder computes; hashable. Sizes as in config.json.

    embedding_size: width of the embeddings where they are projected to hidden_size (else equal to it). windows: per
    layer, how many of the last tokens (itself included) a token reads; None: all. ropes, rope_of_layer: the rotary
    embeddings and which of them each layer takes; empty where positions are learned or ALiBi. position_offset: learned
    positions start in this row of their table; None: not learned. attention_scale multiplies q k. softcaps:
    c tanh(x / c). embedding_scale multiplies embeddings.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    norm: Norm
    activation: Activation
    windows: tuple[int | None, ...]
    attention_scale: float
    gated: bool = True
    block: Block = "pre"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    ropes: tuple[Rope, ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    position_offset: int | None = None
    alibi: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_size: int
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True
    experts: Experts | None = None

    @property
    def num_params(self) -> int:
        """Parameters of the language model."""
        return sum(
            math.prod(slot.shape) * (self.num_layers if slot.per_layer else 1) for slot in slots(self, "lm").values()
        )


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter of the model.

    pattern: an einops pattern from the canonical layout (linear layers [outputs, inputs], as in nn.Linear) to the
    decoder's; the axes it names have these sizes. per_layer, per_expert: there is one for every layer, or expert of a
    layer.
    """

    pattern: str
    axes: tuple[tuple[str, int], ...]
    per_layer: bool = False
    per_expert: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    @property
    def sizes_of_pattern(self) -> dict[str, int]:
        """The sizes of the axes that the pattern itself names, as einops wants them."""
        return {axis: size for axis, size in self.axes if axis in self.pattern}

    @property
    def inverse(self) -> str:
        """The pattern from the decoder's layout back to the canonical one."""
        left, right = self.pattern.split("->")
        return f"{right} -> {left}"

    @property
    def canonical(self) -> tuple[int, ...]:
        """The shape in the canonical layout, of one layer and expert."""
        return pattern_shape(self.pattern.split("->")[0], self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the decoder, of one layer; experts are its first axis."""
        lead = (self.sizes["x"],) if self.per_expert else ()
        return lead + pattern_shape(self.pattern.split("->")[1], self.sizes)


def pattern_shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array that one side of an einops pattern describes."""
    dims: list[int] = []
    group: list[int] | None = None
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            dims.append(math.prod(group or [1]))
            group = None
        else:
            (dims if group is None else group).append(1 if word == "1" else sizes[word])
    return tuple(dims)


def slots(config: DecoderConfig, head: Head) -> dict[str, Slot]:
    """Every parameter of the decoder with this head, by name.

    Axes: v vocabulary, p learned positions, e embedding width, d model width, n query heads, k key-value heads, h head
    size, f inner width, x experts.
    """
    sizes = {
        "v": config.vocab_size, "e": config.embedding_size, "d": config.hidden_size, "n": config.num_heads,
        "k": config.num_kv_heads, "h": config.head_dim, "f": config.intermediate_size,
        "p": config.max_position_embeddings + (config.position_offset or 0),
    }  # fmt: skip
    if config.experts is not None:
        sizes |= {"x": config.experts.count, "f": config.experts.inner}
    found: dict[str, Slot] = {}

    def add(name: str, pattern: str, *, when: bool = True, layer: bool = True, expert: bool = False) -> None:
        if when:
            used = tuple((axis, size) for axis, size in sizes.items() if axis in pattern or (expert and axis == "x"))
            found[name] = Slot(pattern=pattern, axes=used, per_layer=layer, per_expert=expert)

    def add_norm(name: str, pattern: str = "d -> d", *, when: bool = True, layer: bool = True) -> None:
        add(name, pattern, when=when, layer=layer)
        add(f"{name}_bias", pattern, when=when and config.norm.has_bias, layer=layer)

    projected = config.embedding_size != config.hidden_size
    add("embedding", "v e -> v e", layer=False)
    add("positions", "p d -> p d", when=config.position_offset is not None, layer=False)
    add("project_in", "d e -> e d", when=projected, layer=False)
    add_norm("embedding_norm", when=config.embedding_norm, layer=False)

    block, experts = config.block, config.experts is not None
    add_norm("attention_norm", when=block != "output")
    for name, axis in (("query", "n"), ("key", "k"), ("value", "k")):
        add(name, f"({axis} h) d -> d {axis} h")
        add(f"{name}_bias", f"({axis} h) -> {axis} h", when=config.attention_bias)
    if config.qk_norm is not None:
        for name, axis in (("query_norm", "n"), ("key_norm", "k")):
            add(name, "h -> h" if config.qk_norm == "head" else f"({axis} h) -> {axis} h")
    add("output", "d (n h) -> n h d")
    add("output_bias", "d -> d", when=config.output_bias)
    add_norm("attention_out_norm", when=block in ("output", "sandwich"))
    add_norm("mlp_norm", when=block != "output")
    add("router", "x d -> d x", when=experts)
    add("gate", "f d -> d f", when=config.gated, expert=experts)
    add("up", "f d -> d f", expert=experts)
    add("up_bias", "f -> f", when=config.mlp_bias)
    add("down", "d f -> f d", expert=experts)
    add("down_bias", "d -> d", when=config.mlp_bias)
    add_norm("mlp_out_norm", when=block in ("output", "sandwich"))

    add_norm("final_norm", when=config.final_norm, layer=False)
    add("project_out", "e d -> d e", when=projected, layer=False)
    add("head", "v e -> v e", when=head == "lm" and not config.tie_word_embeddings, layer=False)
    add("score", "1 e -> 1 e", when=head == "scalar", layer=False)
    return found


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " heads"]:
    """The slope of each head, float32 (Press et al. 2022): powers of 2^(-8/m) for the largest power of two m that fits,
    then every other power of 2^(-8/2m)."""
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / whole) for head in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / whole) for head in range(num_heads - whole)]
    return np.asarray(slopes, np.float32)
