"""A decoder's forward pass as one short program over its weights: what rollouts run in float32 on the CPU.

There a decode step through transformers' modules spends most of its time between the products: a layer is some forty
small operations. Here it is fifteen: queries, keys and values are one product, rotation is one product of complex
numbers, sums, activations and gates happen inside oneDNN's products, and weights are laid out for it once a rollout.
One program reads prompts and makes steps, for every family that the slots of `diptych.families.decoder` describe; it is
held to the training forward by the same tests, and by the gate before a run's first rollout. Where it cannot run
(`obstacle`) rollouts run the modules.

Heads are stored with the two halves of each rotated pair side by side, in queries and keys alike, so products of the
two are what they were; a cache that a program has filled is the program's alone.

Dimensions: B rows, T new columns, R = B T, S columns of the cache, D model width, N query heads, K key-value heads, H
head size; Q = R, behind the last layer B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from diptych.families.decoder import GELU_SCALES, Activation, DecoderConfig
from diptych.families.family import tensor_rules
from diptych_torch.attention import attend
from diptych_torch.cache import Cache
from diptych_torch.linear import LIMIT, PackedLinear, no_onednn
from diptych_torch.model import Network


def obstacle(network: Network, device: torch.device) -> str | None:
    """Why rollouts of this network do not run as a program."""
    config = network.config
    if (reason := no_onednn(network.dtype, device)) is not None:
        return reason
    if not isinstance(config, DecoderConfig):
        return "a recurrent model"
    if config.experts is not None or config.alibi:
        return "a mixture of experts" if config.experts is not None else "ALiBi"
    if network.is_split:
        return "several processes decode together"
    if config.head_dim % 2:
        return "heads of an odd size"
    size = sum(weight.nbytes for weight in network.named_weights().values())
    return None if size <= LIMIT else f"weights of {size / 2**30:.0f} GiB, which would lie there twice"


class Program:
    """The network as it is now; later changes of its weights are not seen. Inside `torch.inference_mode` only."""

    def __init__(self, network: Network, rows: int):
        """rows: of the products that matter most."""
        assert isinstance(network.config, DecoderConfig)
        self.config = config = network.config
        top, layers = _slots(network)
        self._top = top
        self._rotary = network.trunk.rotary_emb if config.ropes else None
        rotated = self._rotary.rotated if self._rotary is not None else 0
        half = torch.arange(rotated // 2)
        order = torch.cat(
            [torch.stack((half, half + rotated // 2), dim=1).flatten(), torch.arange(rotated, config.head_dim)]
        )
        self._layers = [_Layer(config, layer, order, rows) for layer in layers]
        self._project_in, self._project_out = (
            PackedLinear(top[name], None, rows) if name in top else None for name in ("project_in", "project_out")
        )
        self._head = PackedLinear(top.get("head", top["embedding"]), None, rows)

    def hidden_states(
        self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], segments: Shaped[Tensor, "B S"], cache: Cache
    ) -> Float[Tensor, "B 1 D"]:
        """`Network.hidden_states` of the last column: a rollout reads no other."""
        config, top, count = self.config, self._top, tokens.shape[1]
        x = nn.functional.embedding(tokens.flatten(), top["embedding"])
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self._project_in is not None:
            x = self._project_in(x)
        if config.position_offset is not None:
            x = x + nn.functional.embedding(positions.flatten() + config.position_offset, top["positions"])
        if config.embedding_norm:
            x = normalize(config, "embedding_norm", top, x)
        masks = {}
        for window in dict.fromkeys(config.windows):
            masks[window] = mask = cache.mask(segments, count, window)
            if cache.is_step:  # what attention adds, for each key-value head
                added = torch.where(mask[:, 0], 0.0, torch.finfo(x.dtype).min)
                masks[window] = added.expand(-1, config.num_kv_heads, -1).reshape(-1, 1, added.shape[-1])
        turns = [self._turns(positions, which) for which in range(len(config.ropes))]
        for index, layer in enumerate(self._layers):
            turn = turns[config.rope_of_layer[index]] if turns else None
            x = layer(x, turn, masks[config.windows[index]], cache, index, len(tokens))
        if config.final_norm:
            x = normalize(config, "final_norm", top, x)
        if self._project_out is not None:
            x = self._project_out(x)
        return x[:, None]

    def logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """`Network.logits`."""
        logits, cap = self._head(hidden), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _turns(self, positions: Int[Tensor, "B T"], which: int) -> Tensor:
        """A rope's rotation of each pair of columns, complex [R, 1, A]."""
        assert self._rotary is not None
        angles, factor = self._rotary.angles(positions, which, torch.float32)
        return torch.polar(torch.full_like(angles, factor), angles).flatten(0, 1)[:, None]


class _Layer:
    """Attention and MLP of one layer (`diptych.families.decoder` names the five kinds of block)."""

    def __init__(self, config: DecoderConfig, slots: Mapping[str, Tensor], order: Tensor, rows: int):
        """order: how the columns of a head of queries and keys are to lie."""
        self.config, self.slots = config, slots
        kinds = ("query", "key", "value")

        def in_order(kind: str, what: Tensor) -> Tensor:
            return what if kind == "value" else what.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)

        weight = torch.cat([in_order(kind, slots[kind]) for kind in kinds])
        bias = None
        if config.attention_bias:
            bias = torch.cat([in_order(kind, slots[f"{kind}_bias"]) for kind in kinds])
        self.heads = PackedLinear(weight, bias, rows)
        if config.qk_norm is not None:
            heads = {"query": config.num_heads, "key": config.num_kv_heads}
            gains = {
                kind: slots[f"{kind}_norm"].repeat(number if config.qk_norm == "head" else 1) + config.norm.offset
                for kind, number in heads.items()
            }
            self.gains = torch.cat([in_order(kind, gains[kind]) for kind in heads]).view(-1, config.head_dim)
        self.output = PackedLinear(slots["output"], slots.get("output_bias"), rows)
        self.gate = PackedLinear(slots["gate"], None, rows) if config.gated else None
        self.up = PackedLinear(slots["up"], slots.get("up_bias"), rows)
        self.down = PackedLinear(slots["down"], slots.get("down_bias"), rows)

    def __call__(
        self, x: Float[Tensor, "R D"], turns: Tensor | None, mask: Tensor, cache: Cache, index: int, rows: int
    ) -> Float[Tensor, "Q D"]:
        block = self.config.block
        before, after = block in ("pre", "sandwich", "parallel"), block in ("output", "sandwich")
        read = self._attention(self._norm("attention_norm", x) if before else x, turns, mask, cache, index, rows)
        x = x.view(len(read), -1, x.shape[-1])[:, -1]  # the last layer goes on with the last column
        if block == "parallel":
            inner = self._inner(self._norm("mlp_norm", x))
            return self.down.plus(inner, self.output.plus(read, x))
        x = x + self._norm("attention_out_norm", self.output(read)) if after else self.output.plus(read, x)
        if block == "post":
            x = self._norm("attention_norm", x)
        inner = self._inner(self._norm("mlp_norm", x) if before else x)
        x = x + self._norm("mlp_out_norm", self.down(inner)) if after else self.down.plus(inner, x)
        return self._norm("mlp_norm", x) if block == "post" else x

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return normalize(self.config, name, self.slots, x)

    def _attention(
        self, x: Float[Tensor, "R D"], turns: Tensor | None, mask: Tensor, cache: Cache, index: int, rows: int
    ) -> Float[Tensor, "Q NH"]:
        """What the queries read."""
        config = self.config
        num_queries, num_keys, size = config.num_heads, config.num_kv_heads, config.head_dim
        heads = self.heads(x).view(-1, num_queries + 2 * num_keys, size)
        if config.qk_norm is not None:
            heads = torch.cat((self._normed(heads[:, :-num_keys]), heads[:, -num_keys:]), dim=1)
        if turns is not None:
            pairs = torch.view_as_complex(heads.view(-1, num_queries + 2 * num_keys, size // 2, 2))
            pairs[:, :-num_keys, : turns.shape[-1]].mul_(turns)
        if cache.is_step:
            keys, values = cache.write(heads[:, num_queries:].reshape(-1, size), index)
            queries = heads[:, :num_queries].reshape(rows * num_keys, num_queries // num_keys, size)
            keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
            if config.attention_softcap is None:
                logits = torch.baddbmm(mask, queries, keys, alpha=config.attention_scale)
            else:
                cap = config.attention_softcap
                logits = mask + cap * torch.tanh(torch.bmm(queries, keys) * (config.attention_scale / cap))
            return torch.bmm(torch.softmax(logits, dim=-1), values).view(rows, -1)
        queries, keys, values = (
            heads.view(rows, -1, *heads.shape[1:]).transpose(1, 2).split((num_queries, num_keys, num_keys), dim=1)
        )
        keys, values = cache.update(keys, values, index)
        if index == config.num_layers - 1:
            queries, mask = queries[:, :, -1:], mask[:, :, -1:]
        read, _ = attend(
            self, queries, keys, values, mask, scaling=config.attention_scale, softcap=config.attention_softcap
        )
        return read.flatten(0, 1).flatten(1)

    def _normed(self, heads: Float[Tensor, "R NK H"]) -> Float[Tensor, "R NK H"]:
        """Queries and keys with their norm's gain."""
        config = self.config
        if config.qk_norm == "head":
            return nn.functional.rms_norm(heads, heads.shape[-1:], None, config.norm.eps) * self.gains
        parts = heads.split((config.num_heads, config.num_kv_heads), dim=1)
        return (
            torch.cat([nn.functional.rms_norm(one, one.shape[1:], None, config.norm.eps) for one in parts], dim=1)
            * self.gains
        )

    def _inner(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R F"]:
        """What the projection down reads."""
        kind = self.config.activation
        first = self.up if self.gate is None else self.gate
        inside = {"relu": "relu", "silu": "swish"}.get(kind)  # oneDNN's names
        active = activate(kind, first(x)) if inside is None else first(x, inside)
        return active if self.gate is None else self.up.times(x, active)


def normalize(config: DecoderConfig, name: str, slots: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`diptych.families.decoder.Norm` over the last axis; the gains are `_slots`'."""
    if config.norm.kind == "layer":
        return nn.functional.layer_norm(x, x.shape[-1:], slots[name], slots[f"{name}_bias"], config.norm.eps)
    # g x / sqrt(mean(x^2) + eps) in half the operations of torch's: sqrt(D) stands in the gain.
    return slots[name] * x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), slots["eps"])


def activate(kind: Activation, x: Tensor) -> Tensor:
    """The activation, every constant named."""
    match kind:
        case "silu":
            return nn.functional.silu(x)
        case "relu":
            return torch.relu(x)
        case "gelu":
            return nn.functional.gelu(x, approximate="none")
        case _:
            return 0.5 * x * (1 + torch.tanh(GELU_SCALES[kind] * (x + 0.044715 * x**3)))


def _slots(network: Network) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The slots' tensors in the canonical layout (linear layers [outputs, inputs]): the model's own, and each layer's.
    Gains of RMS norms with their offset and times sqrt(D); "eps" is sqrt(D eps)."""
    config: Any = network.config
    weights = network.named_weights()
    tensors: dict[str, Tensor] = {}
    for name, held in network.held.items():
        tensors |= held.split(weights[name].detach())
    top: dict[str, Tensor] = {}
    layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_layers)]
    for rule in tensor_rules(config, network.head):
        for layer in rule.layers(config):
            (name,) = rule.names(config, layer)
            tensor = rearrange(tensors[name], rule.order, **dict(rule.axes)) if rule.order else tensors[name]
            pieces = tensor.split(rule.rows) if len(rule.slots) > 1 else [tensor]
            (top if layer is None else layers[layer]).update(zip(rule.slots, pieces, strict=True))
    if config.norm.kind == "rms":
        root = math.sqrt(config.hidden_size)
        for one in (top, *layers):
            for name in one:
                if name.endswith("_norm") and not name.startswith(("query", "key")):
                    one[name] = (one[name] + config.norm.offset) * root
            one["eps"] = torch.tensor(root * math.sqrt(config.norm.eps))
    return top, layers
