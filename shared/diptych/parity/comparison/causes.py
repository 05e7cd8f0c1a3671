"""Likely causes of a red rung, by the pattern of its error: data, each with what it looks like and where to look.

A pattern is a hint, not a proof: `explain` prints those that fit, most telling first. They come from faults found in
peers and in ourselves (docs/parity.md has the list).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diptych.parity.comparison.patterns import (
    Evidence,
    affine,
    all_scaled,
    beta1,
    clipped_norm,
    counted,
    cut_rows,
    ddof,
    decay,
    ends_in,
    everywhere,
    first_and_second_scaled,
    first_only,
    from_layer,
    grows,
    grows_backwards,
    is_red,
    last_only,
    left_right,
    many_flips,
    moved_columns,
    not_moved,
    one_row,
    only_clip,
    only_second,
    padded_rows_only,
    same_rows,
    scalars_scaled,
    scaled,
    shift,
    small_gradients,
    stale,
    step_scaled,
    transposed,
    zeros,
)


@dataclass(frozen=True, kw_only=True)
class Cause:
    """key: its name. rungs: where it can be. fits: the pattern. says: what is likely wrong. look: what to check."""

    key: str
    rungs: tuple[str, ...]
    fits: Callable[[Evidence], bool]
    says: str
    look: str


def likely_causes(evidence: Evidence, *, most: int = 3) -> list[Cause]:
    """The causes whose pattern fits, most telling first."""
    with np.errstate(all="ignore"):
        return [one for one in CAUSES if evidence.rung.rung.name in one.rungs and one.fits(evidence)][:most]


GRIDS = ("sampler", "reference", "policy", "values", "next")
CAUSES: tuple[Cause, ...] = (
    Cause(
        key="stale", rungs=("next",), fits=stale,
        says="one side's outputs after the update are those before it: the forward pass reads old weights",
        look="a decode or inference copy that is not refreshed; a compiled function that captured the weights",
    ),
    Cause(
        key="not moved", rungs=("weights", "next"), fits=not_moved, says="one side did not move at all",
        look="learning rate 0 (warmup off by one), skipped step (loss scale overflow), frozen parameters, a stale copy",
    ),
    Cause(
        key="step size", rungs=("weights", "next"), fits=step_scaled,
        says="every tensor moved by one factor more or less: learning rate or bias correction",
        look="schedule off by one (optax counts from 0 inside update), step count after a resume, bias_correction",
    ),
    Cause(
        key="decay mask", rungs=("weights",), fits=lambda e: e.all_of("weights", lambda _, x: x.ndim == 1),
        says="only gains and biases: weight decay touches them on one side",
        look="the mask of weight decay (tensors of two or more dimensions); parameter groups by name (`bias`, `norm`)",
    ),
    Cause(
        key="decay", rungs=("weights", "next"), fits=decay, says="the gap is a multiple of the weights: weight decay",
        look="its value (torch's default 1e-2, optax's 1e-4), L2 against decoupled, times learning rate or not",
    ),
    Cause(
        key="epsilon", rungs=("weights", "next"), fits=small_gradients,
        says="moments agree, and steps part where they are smallest: Adam's epsilon",
        look="eps and its place: outside the root after bias correction (torch, optax eps), not eps_root, not eps-hat",
    ),
    Cause(
        key="premise", rungs=("tokens",), fits=lambda e: any("given to the step" in one.detail for one in e.rung.red),
        says="the sides did not start from the same bits: this is no replay of the other side, or its start was not "
        "loaded (state, sharding, transposed square matrices)",
        look="record B again with --replay A; then compare checksums per tensor (diptych weights check)",
    ),
    Cause(
        key="padding side", rungs=("tokens",), fits=left_right, says="the same tokens, padded on the other side",
        look="padding_side of the tokenizer; prompts are padded on the left, rows of supervised stages on the right",
    ),
    Cause(
        key="data order", rungs=("tokens",), fits=same_rows, says="the same rows in another order",
        look="seed and epoch of the shuffle, drop_last, sharding of the sampler",
    ),
    Cause(
        key="other data", rungs=("tokens",), fits=is_red("rows", "prompts/", "batch/"),
        says="the sides read other data, or make other tokens of it",
        look="tokenizer, chat template, special tokens, truncation, limit and split of the data",
    ),
    Cause(
        key="sampling", rungs=("tokens",), fits=many_flips,
        says="most rows part at a token that is no near-tie: the draws or the distributions differ",
        look="temperature, top-k, top-p and their order; the uniforms (seed, row id, position); stop tokens",
    ),
    Cause(
        key="masks", rungs=("tokens",), fits=is_red("policy_mask", "value_mask", "response/mask", "used/"),
        says="the sides count other tokens",
        look="whether the stop token belongs to the response (pad == eos masks it), off-by-one of the value slots",
    ),
    Cause(
        key="one column off", rungs=(*GRIDS, "returns", "advantages"), fits=moved_columns,
        says="the same numbers, one column beside: labels or states are shifted",
        look="logits[:, :-1] against tokens[:, 1:]; values at the state *before* a token",
    ),
    Cause(
        key="first token", rungs=(*GRIDS, "returns", "advantages"), fits=first_only,
        says="only the first response token: the shift at the boundary of prompt and response",
        look="the slice start of the response; the logits of the last prompt token",
    ),
    Cause(
        key="last token", rungs=GRIDS, fits=last_only,
        says="only the last token of rows: the stop token is treated as padding",
        look="masks made from token ids (seq != pad where pad == eos); cache position of the last token",
    ),
    Cause(
        key="left padding", rungs=GRIDS, fits=padded_rows_only,
        says="only rows that are padded on the left: attention mask or positions count the padding",
        look="position ids (cumsum of the mask, not arange); fully masked rows of attention",
    ),
    Cause(
        key="positions", rungs=GRIDS, fits=grows,
        says="the error grows with the position: positions, rotary base or scaling, attention window, cache",
        look="rope_theta and rope_scaling, float32 tables, half-split against interleaved layout, window off by one",
    ),
    Cause(
        key="zeros", rungs=(*GRIDS, "returns", "advantages"), fits=zeros,
        says="one side has zeros where the other has numbers: it masks tokens that count",
        look="label -100, `first`, masks applied twice",
    ),
    Cause(
        key="ddof", rungs=("returns", "advantages", "rewards"), fits=ddof,
        says="one factor, sqrt(n / (n - 1)): the standard deviation's ddof differs (torch.std 1, numpy and jax 0)",
        look="the whitening of advantages or rewards",
    ),
    Cause(
        key="cut rows", rungs=("rewards",), fits=cut_rows,
        says="only rows without a stop token: the penalty for a missing end, or where a cut row's score is read",
        look="missing_eos_penalty; the column of the last token when there is no eos (end scores one token late)",
    ),
    Cause(
        key="constant", rungs=(*GRIDS, "rewards", "kl", "returns", "advantages"), fits=shift,
        says="off by one constant: a bias, a normaliser, or a mean that is taken over other elements",
        look="bias of the head; padded vocabulary entries in the log-softmax; the mean of whitening",
    ),
    Cause(
        key="whitening", rungs=("returns", "advantages"), fits=affine,
        says="another scale and another shift: whitened over other elements",
        look="the mask of whitening; mean kept or not (shift_mean); whitening before or after GAE",
    ),
    Cause(
        key="scale", rungs=("rewards", "kl", "values", "returns", "advantages", *GRIDS[:3]), fits=scaled,
        says="off by one factor (or a sign)",
        look="kl_coef, reward scale or clip, scale of the value head; a sum taken for a mean; a - b for b - a",
    ),
    Cause(
        key="discount", rungs=("returns", "advantages"), fits=grows_backwards,
        says="right at the last token, worse towards the first: what adds up backwards",
        look="gamma, lambda, the bootstrap value after the last token, done flags",
    ),
    Cause(
        key="terminal", rungs=("returns", "advantages"), fits=last_only,
        says="only the last token: the terminal reward or the value after the end",
        look="on which slot the score lands; whether a cut row is bootstrapped",
    ),
    Cause(
        key="one row", rungs=(*GRIDS, "rewards", "kl"), fits=one_row, says="one row alone",
        look="its tokens (ids beyond the vocabulary are clamped in JAX, an error in torch), its length, its padding",
    ),
    Cause(
        key="everywhere", rungs=("sampler", "reference", "policy", "next"), fits=everywhere,
        says="every token, at every position alike: temperature, or a setting that every token goes through",
        look="temperature of the scores; gelu variant, norm epsilon, scale of attention, matmul precision (TF32, bf16)",
    ),
    Cause(
        key="denominator", rungs=("loss",), fits=counted,
        says="off by the share of columns that count: another denominator",
        look="mean over all columns for the mask's, mean of rows' means, tokens per micro-batch for the step's",
    ),
    Cause(
        key="loss scale", rungs=("loss", "metrics"), fits=scalars_scaled, says="all by one factor",
        look="value_coef, 0.5 of the square, division by gradient accumulation or world size",
    ),
    Cause(
        key="clip", rungs=("loss",), fits=only_clip, says="outputs agree and the share of clipped tokens does not",
        look="clip range; strict or not at the edge; which of both losses is counted",
    ),
    Cause(
        key="gradient scale", rungs=("gradients",), fits=all_scaled("gradient"),
        says="every tensor by one factor: the loss's denominator, or gradients that are clipped or averaged already",
        look="sum over micro-batches divided once by the global count; world size; loss scale; clipping before reading",
    ),
    Cause(
        key="transposed", rungs=("gradients", "optimizer", "weights"), fits=transposed,
        says="a square matrix is transposed", look="(in, out) against (out, in) in the name mapping",
    ),
    Cause(
        key="one-dimensional gradients", rungs=("gradients",),
        fits=lambda e: e.all_of("gradient", lambda _, x: x.ndim == 1),
        says="only gains and biases", look="norm epsilon and its place; sums over padding; a bias that is not trained",
    ),
    Cause(
        key="attention gradients", rungs=("gradients",),
        fits=lambda e: e.all_of("gradient", ends_in("q_proj", "k_proj", "query", "key")),
        says="only queries and keys", look="scale of attention, rotary embedding, softmax mask, query and key norms",
    ),
    Cause(
        key="embedding gradients", rungs=("gradients",),
        fits=lambda e: e.all_of("gradient", ends_in("embed", "wte", "lm_head")),
        says="only the embedding or the head", look="tied heads (both gradients add up), padding_idx, embedding scale",
    ),
    Cause(
        key="from a layer on", rungs=("gradients",), fits=from_layer,
        says="right in the later layers and wrong below: the backward pass parts in the highest wrong layer",
        look="diptych parity blame on traces of depth ops",
    ),
    Cause(
        key="clipped norm", rungs=("norm",), fits=clipped_norm,
        says="one side's norm is a round number below the other's: it was taken after clipping",
        look="where the norm is read; max_grad_norm",
    ),
    Cause(
        key="norm alone", rungs=("norm",), fits=lambda e: bool(e.red),
        says="gradients on the probe batch agree and the norm does not: accumulation over micro-batches or devices",
        look="parameters that count twice (tied, sharded) or not at all; division by accumulation steps",
    ),
    Cause(
        key="beta2", rungs=("optimizer",), fits=only_second,
        says="only second moments: beta2, or the square of another gradient (clipped or not)",
        look="betas; whether v is fed the clipped gradient",
    ),
    Cause(
        key="beta1", rungs=("optimizer",), fits=beta1, says="only first moments: beta1, momentum, dampening",
        look="betas; Nesterov",
    ),
    Cause(
        key="moments' gradient", rungs=("optimizer",), fits=first_and_second_scaled,
        says="both moments: the update had another gradient than the probe batch shows",
        look="gradient clipping (norm + 1e-6), accumulation, reduction over devices, gradients in 16 bits",
    ),
)  # fmt: skip
