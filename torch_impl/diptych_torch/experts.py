"""Mixtures of experts: the experts' compute, and what the balance loss needs to know of the routing.

transformers lets a model choose its experts' function by name; ours is `NAME`. It works in any float type, adds in a
fixed order, and gives experts that no token chose a gradient of zeros.

Dimensions: N tokens, D model width, F inner width, E experts, C experts chosen by each token.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from diptych.algorithms.losses import router_balance_loss
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig
from diptych_torch.linear import linear

NAME = "diptych"
Routing = tuple[Tensor, Tensor]  # sums of router probabilities [E], how many times each expert was chosen [E]


def compute_experts(
    module: Any,
    hidden: Float[Tensor, "N D"],
    top_k_index: Int[Tensor, "N C"],
    top_k_weights: Float[Tensor, "N C"],
) -> Float[Tensor, "N D"]:
    """sum_c weight_c down(act(gate x) * up x) of each token's chosen experts; transformers' calling convention.

    module: holds gate_up_proj [E, 2F, D], down_proj [E, D, F] and act_fn.
    """
    chosen, width = top_k_index.shape[1], hidden.shape[1]
    choices = top_k_index.flatten()
    order = choices.argsort(stable=True)
    counts = [int(count) for count in _counts(choices, module.num_experts).tolist()]
    inputs = hidden[:, None].expand(-1, chosen, -1).reshape(-1, width)[order].split(counts)
    # unbind: one backward for all experts, zeros for those without tokens.
    weights = zip(module.gate_up_proj.unbind(0), module.down_proj.unbind(0), strict=True)
    outputs = []
    for x, (gate_up, down) in zip(inputs, weights, strict=True):
        if len(x):
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(linear(module.act_fn(gate) * up, down))
    back = torch.cat(outputs)[order.argsort()].view(-1, chosen, width)
    return (back * top_k_weights[..., None].to(back.dtype)).sum(dim=1)


ExpertsInterface.register(NAME, compute_experts)


def _counts(choices: Int[Tensor, " choices"], num_experts: int) -> Int[Tensor, " E"]:
    return (choices[:, None] == torch.arange(num_experts, device=choices.device)).sum(dim=0)


def balance_loss(
    routing: Routing, choices: Float[Tensor, " E"] | None, config: ModelConfig, num_tokens: int
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """A micro-batch's share of the balance loss, and its metrics.

    choices: how many times each expert is chosen in the whole step; None where the micro-batch is the whole step.
    num_tokens: real tokens of the step.
    """
    assert isinstance(config, DecoderConfig)
    assert config.experts is not None
    num_routed = float(max(num_tokens, 1)) * config.num_layers
    fractions = (routing[1] if choices is None else choices) / num_routed
    return router_balance_loss(routing[0], fractions=fractions, num_routed=num_routed, top_k=config.experts.top_k)


class RoutingRecord:
    """What the routers of one forward pass did. `watch` each router once; `start` before the pass, `finish` after."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] | None = None

    def watch(self, router: nn.Module) -> None:
        """Note this router's logits and choices from now on, while a recording runs."""

        def note(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            if self._seen is not None:
                self._seen.append((output[0], output[2]))

        router.register_forward_hook(note)

    def start(self) -> None:
        self._seen = []

    def finish(self, real: Bool[Tensor, " N"]) -> Routing:
        """Over the layers and the real tokens: sums of softmax(logits) [E], with gradient, and choices [E]."""
        seen, self._seen = self._seen or [], None
        sums, counts = [], []
        for logits, choices in seen:
            # Upcast: softmax in at least float32.
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            sums.append((torch.softmax(wide, dim=-1) * real[:, None]).sum(dim=0))
            counts.append(_counts(choices[real].flatten(), logits.shape[-1]).to(wide.dtype))
        return torch.stack(sums).sum(dim=0), torch.stack(counts).sum(dim=0)
