"""float64 all the way through libraries that stop at float32.

float64 runs compare two engines; they are for the CPU. transformers casts to float32 inside its norms and softmaxes
(an error of 5e-8 on a tiny Llama), and DeepSpeed's CPU accelerator does not list float64 among the gradients that it
reduces. Both are mended here, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Inside this context, float64 tensors stay float64 where the code asks to cast them down to float32.

    Caught: `x.float()`, `x.to(torch.float32)`, and a `dtype=torch.float32` argument (softmax, sum, ...) on a float64
    tensor. Integer tensors are cast as asked.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not (args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64):
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def masters_in_float64() -> Iterator[None]:
    """Inside, what DeepSpeed initializes keeps its masters, sums and gradients in float64, at any stage.

    It has no such setting: its masters are float32 whatever the model is.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    accelerator: Any = get_accelerator()
    if torch.float64 not in accelerator.supported_dtypes():  # gradients that it says it can reduce (gloo can)
        supported = [*accelerator.supported_dtypes(), torch.float64]
        accelerator.supported_dtypes = lambda: supported
    theirs = ZeROOptimizer._configure_master_weights, DeepSpeedEngine.get_data_types
    communication = DeepSpeedEngine.communication_data_type

    def masters(self: Any, *arguments: Any, **options: Any) -> torch.dtype:
        theirs[0](self, *arguments, **options)
        return torch.float64

    ZeROOptimizer._configure_master_weights = masters
    # Without ZeRO the optimizer is the client's own, in its own type, where DeepSpeed believes in float32.
    DeepSpeedEngine.get_data_types = lambda self: (
        (torch.float64, torch.float64) if self.zero_optimization() else theirs[1](self)
    )
    DeepSpeedEngine.communication_data_type = property(lambda self: torch.float64)
    try:
        yield
    finally:
        ZeROOptimizer._configure_master_weights, DeepSpeedEngine.get_data_types = theirs
        DeepSpeedEngine.communication_data_type = communication
