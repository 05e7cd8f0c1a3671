"""Where a model can be looked into: the named values between its operations, the same in both engines and the oracle.

A *tap* is a value inside the forward pass, named by what made it: `layers.3.query` is what the query projection of the
fourth layer gave, bias included. A probe (`diptych.engine.Model.probe`) records every tap's value and the gradient of
the loss by it, and can *force* them: whatever reads a tap then reads the given value, and whatever hands a gradient
down through it hands down the given one (on real columns; padding holds numbers without meaning). With all taps forced
to another engine's, each recorded value is the error of one operation and of nothing before it.
"""

from __future__ import annotations

from typing import Literal

from diptych.engine import Head
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig

Depth = Literal["layers", "ops"]


def taps(config: ModelConfig, head: Head, depth: Depth) -> dict[str, str]:
    """name -> layout of every tap, in the order of the forward pass.

    Layouts: "batch time width" (D, E, F or experts wide), "batch time heads size" (query and key-value heads, never
    repeated), "batch time" (the last tap: log-probabilities at the loss's temperature, or scores).

    embed: what the first layer reads (token and position embeddings, projected, scaled, normed). layers.i.out: what
    layer i gives. final: what the head reads (after the last norm and projection). Within a layer, at depth ops:
    attention_norm, mlp_norm, attention_out_norm, mlp_out_norm: what those norms give (block "post": attention_norm and
    mlp_norm come after the residual, and mlp_norm *is* out, so it has no tap of its own). query, key, value: the
    projections with bias. query_norm, key_norm; query_rotated, key_rotated: after rotary positions. attention: what the
    queries read (softmax mix of values). output: its projection. gate, up: the projections with bias, before the
    activation. inner: what the down projection reads, act(gate) * up or act(up). down: its projection. With experts
    there are router (the logits) and down (the weighted sum over experts) in place of gate, up, inner.
    Recurrent: input (what the drive adds to the state: W_xh x + b_h, 0 on padding).
    """
    wide, heads = "batch time width", "batch time heads size"
    found = {"embed": wide}
    for index in range(config.num_layers):
        if depth == "ops":
            found |= {f"layers.{index}.{name}": heads if name in _HEADS else wide for name in _operations(config)}
        found[f"layers.{index}.out"] = wide
    return found | {"final": wide, "logprobs" if head == "lm" else "scores": "batch time"}


_HEADS = ("query", "key", "value", "query_norm", "key_norm", "query_rotated", "key_rotated", "attention")


def _operations(config: ModelConfig) -> list[str]:
    if not isinstance(config, DecoderConfig):
        return ["input"]
    block = config.block
    names = ["attention_norm"] if block in ("pre", "sandwich", "parallel") else []
    names += ["query", "key", "value"]
    names += ["query_norm", "key_norm"] if config.qk_norm is not None else []
    names += ["query_rotated", "key_rotated"] if config.ropes else []
    names += ["attention", "output"]
    names += ["attention_out_norm"] if block in ("output", "sandwich") else []
    names += ["attention_norm"] if block == "post" else []
    names += ["mlp_norm"] if block in ("pre", "sandwich", "parallel") else []
    if config.experts is not None:
        names += ["router", "down"]
    else:
        names += ["gate", "up", "inner", "down"] if config.gated else ["up", "inner", "down"]
    return names + (["mlp_out_norm"] if block in ("output", "sandwich") else [])
