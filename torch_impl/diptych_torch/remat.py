"""Activation checkpointing (`layout.remat`): which results the backward pass makes again instead of keeping them.

"full": all of a layer's; "dots": all but the results of matrix products (Chen et al. 2016; torch's selective activation
checkpointing); "none". No number depends on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from diptych.engine import Remat
from diptych_torch.float64 import KeepFloat64
from diptych_torch.linear import HAS_ONEDNN
from diptych_torch.recurrent import RNNLayer

_DOTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    *([torch.ops.mkldnn._linear_pointwise.default] if HAS_ONEDNN else []),
}


def rematerialize(trunk: Any, kind: Remat, dtype: torch.dtype) -> None:
    """Let every layer of a trunk do so, in place. Only passes that gradients follow are concerned."""
    if kind == "none":
        return
    contexts = partial(_contexts, kind, dtype)
    layers = [one for one in trunk.modules() if isinstance(one, GradientCheckpointingLayer | RNNLayer)]
    assert layers, f"{type(trunk).__name__} has no layers that are known to checkpoint"
    for layer in layers:
        # The layer's forward, not the layer: DeepSpeed's hooks on it stay outside.
        layer.forward = partial(_forward, layer.forward, contexts)


def _forward(forward: Callable[..., Any], contexts: Callable[[], Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint.checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **options
    )


def _contexts(kind: Remat, dtype: torch.dtype) -> tuple[Any, Any]:
    """What surrounds the forward pass and its repetition, which happens outside of the network's own forward."""
    again = KeepFloat64() if dtype == torch.float64 else contextlib.nullcontext()
    if kind == "full":
        return contextlib.nullcontext(), again
    keeping, using = checkpoint.create_selective_checkpoint_contexts(_policy)
    return keeping, _both(using, again)


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> checkpoint.CheckpointPolicy:
    del context, inputs, options
    kept = operation in _DOTS
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Any:
    with outer, inner:
        yield
