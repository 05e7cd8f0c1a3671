"""float64 all the way through libraries that stop at float32.

float64 runs compare two engines; they are for the CPU. transformers casts to float32 inside its norms and softmaxes
(an error of 5e-8 on a tiny Llama), and DeepSpeed's CPU accelerator does not list float64 among the gradients that it
reduces. Both are mended here, and nowhere else.
"""

from __future__ import annotations

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


def let_deepspeed_reduce_float64() -> None:
    """Add float64 to the gradient types that DeepSpeed's accelerator says it can reduce (gloo can)."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if torch.float64 not in accelerator.supported_dtypes():
        supported = [*accelerator.supported_dtypes(), torch.float64]
        accelerator.supported_dtypes = lambda: supported
