"""AdamW and SGD with nothing left to a default (law 6), and their state by the names of the module's parameters.

Formulas in `diptych.engine.OptimizerSpec`. AdamW is torch's own, every option given; torch's SGD adds weight decay to
the gradient, so ours is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych.engine import OptimizerSpec, OptimizerState, Tensors


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
                if not state:
                    state |= initial_state(parameter, "sgd")
                state["step"] += 1
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(buffer, alpha=-group["lr"])


def build(spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters; weight decay on those of two or more dimensions. Its lr is set every step."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
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


# torch's names of the first and, for AdamW, the second moment.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def initial_state(parameter: Tensor, name: Literal["adamw", "sgd"]) -> dict[str, Tensor]:
    """The state before the first update, of a parameter or of a flat partition of several."""
    moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS[name]}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in their own precision (0-d)."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place by max_norm / (norm + 1e-6) where that is below 1."""
    scale = max_norm / (norm + 1e-6)
    for gradient in gradients:
        gradient.mul_(scale.clamp(max=1.0))


def read_moments(
    spec: OptimizerSpec, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], zero: Any
) -> list[Tensors]:
    """Copies of the moments, in the order of `MOMENTS`, each by the parameter's name.

    zero: DeepSpeed's ZeRO optimizer around `optimizer`, which holds flat partitions of them; None at stage 0.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if zero is not None:
        _prepare_partitions(spec, optimizer, zero)
    moments: list[Tensors] = [{} for _ in MOMENTS[spec.name]]
    for name, parameter in parameters.items():
        for tensors, moment in zip(moments, MOMENTS[spec.name], strict=True):
            if zero is not None:
                value: Any = safe_get_full_optimizer_state(parameter, moment)
            else:
                value = (optimizer.state.get(parameter) or initial_state(parameter, spec.name))[moment]
            tensors[name] = value.detach().cpu().numpy().copy()
    return moments


def write_moments(
    spec: OptimizerSpec,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    zero: Any,
    state: OptimizerState,
) -> None:
    """Replace the moments and the step count; `state` holds the parameters' names and shapes."""
    from deepspeed.utils import safe_set_full_optimizer_state

    given = (state.first, state.second) if spec.name == "adamw" else (state.first,)
    if zero is not None:
        _prepare_partitions(spec, optimizer, zero)
        for partition in _partitions(zero):
            optimizer.state[partition]["step"].fill_(state.step)
    for name, parameter in parameters.items():
        if zero is None:
            optimizer.state[parameter] = initial_state(parameter, spec.name)
            optimizer.state[parameter]["step"].fill_(state.step)
        for tensors, moment in zip(given, MOMENTS[spec.name], strict=True):
            value = torch.tensor(tensors[name], dtype=parameter.dtype, device=parameter.device)
            if zero is not None:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                optimizer.state[parameter][moment].copy_(value)


def _partitions(zero: Any) -> list[Tensor]:
    """The flat float32 tensors that the optimizer under ZeRO updates: one a group (1, 2) or a sub-group (3)."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def _prepare_partitions(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, zero: Any) -> None:
    """Give every partition a state, as its first update would, and let DeepSpeed find the parameters' shares of it."""
    for partition in _partitions(zero):
        if not optimizer.state.get(partition):
            optimizer.state[partition] = initial_state(partition, spec.name)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 link parameters to states only once
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
