"""AdamW and SGD with nothing left to a default (law 6), and their state by the names of the module's parameters.

Formulas in `diptych.engine.OptimizerSpec`. AdamW is torch's own, every option given; torch's SGD adds weight decay to
the gradient, so ours is written out. The average of the weights is kept beside the moments, so that it is partitioned,
offloaded and saved as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import OptimizerSpec
from diptych_torch.zero import whole_shape


class SGD(torch.optim.Optimizer):
    """m = momentum m + g; p -= lr (m + weight_decay p)."""

    def __init__(self, groups: Any, *, lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])


def build(spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters; weight decay on those of two or more dimensions. Its lr is set every step."""
    decayed = [parameter for parameter in parameters.values() if len(whole_shape(parameter)) >= 2]
    others = [parameter for parameter in parameters.values() if len(whole_shape(parameter)) < 2]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if spec.name == "sgd":
        return SGD(groups, lr=0.0, momentum=spec.momentum, weight_decay=0.0)
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        foreach=False,
        capturable=False,
        differentiable=False,
        fused=True,  # one pass over each tensor, on the CPU too; the same formula
    )


# torch's names of the first and, for AdamW, the second moment; the average has ours.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
AVERAGE = "average"


def begin(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, flats: list[Tensor]) -> None:
    """Give each tensor that the optimizer updates its state before the first update; the average is what it is now."""
    for flat in flats:
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
        state |= {moment: torch.zeros_like(flat) for moment in MOMENTS[spec.name]}
        if spec.ema_decay is not None:
            state[AVERAGE] = flat.detach().clone()
        optimizer.state[flat] = state


@torch.no_grad()
def average(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, flats: list[Tensor]) -> None:
    """average = decay average + (1 - decay) p, after an update."""
    if spec.ema_decay is not None:
        for flat in flats:
            optimizer.state[flat][AVERAGE].mul_(spec.ema_decay).add_(flat, alpha=1 - spec.ema_decay)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in their own precision (0-d)."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place by max_norm / (norm + 1e-6) where that is below 1."""
    scale = max_norm / (norm + 1e-6)
    for gradient in gradients:
        gradient.mul_(scale.clamp(max=1.0))
