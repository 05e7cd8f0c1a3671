"""The known traps between two trainers, and which of them a setup has stepped into.

The first 34 are those of our survey of PyTorch and JAX trainers, each with a measured size; the others make a
comparison blind, or are what users' reports turned out to be. A trap is

    SET                       found: the file, the line, and what to write there instead
    clear                     looked at, or ruled out by how Diptych computes
    not applicable            the setup has nothing of the kind (no rotary positions, no groups)
    cannot be seen from here  nothing that was read says it; then `look` says where to look in the other trainer

The checks are in `model_traps` and `trainer_traps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diptych.parity.doctor import model_traps as model
from diptych.parity.doctor import trainer_traps as trainer
from diptych.parity.doctor.setups import Setup
from diptych.parity.doctor.trap_finding import NOT_APPLICABLE, Answer, Check, Finding, Pair, differ, is_not

State = Literal["SET", "clear", "not applicable", "cannot be seen from here"]


@dataclass(frozen=True, kw_only=True)
class Trap:
    """ours: how Diptych rules it out ("": it does not). look: what to look at in another trainer."""

    number: int
    title: str
    ours: str
    look: str
    checks: tuple[Check, ...] = ()
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A trap's state. why: for clear and not seen, in words."""

    trap: Trap
    state: State
    findings: Sequence[Finding] = ()
    why: str = ""


def look_for_traps(a: Setup, b: Setup | None = None) -> list[Verdict]:
    """Every trap's state in one setup, or in two that are to be compared."""
    return [_verdict(trap, [a] if b is None else [a, b]) for trap in TRAPS]


def _verdict(trap: Trap, setups: Sequence[Setup]) -> Verdict:
    seen = []
    for index, setup in enumerate(setups):
        other = setups[1 - index] if len(setups) == 2 else None
        seen.append([one(setup, other) for one in trap.checks])
    paired = [pair(setups[0], setups[1]) for pair in trap.pairs] if len(setups) == 2 else []
    found = [
        finding for answers in [*seen, paired] for answer in answers if isinstance(answer, list) for finding in answer
    ]
    if found:
        return Verdict(trap=trap, state="SET", findings=found)
    states = [_state(trap, setup, [*answers, *paired]) for setup, answers in zip(setups, seen, strict=True)]
    unseen = [setup for setup, (state, _) in zip(setups, states, strict=True) if state == "cannot be seen from here"]
    if unseen:
        of = f" (of {', '.join(str(one.source) for one in unseen)})" if len(unseen) < len(setups) else ""
        return Verdict(trap=trap, state="cannot be seen from here", why=trap.look + of)
    if all(state == "not applicable" for state, _ in states):
        return Verdict(trap=trap, state="not applicable")
    return Verdict(trap=trap, state="clear", why=next(why for state, why in states if state == "clear"))


def _state(trap: Trap, setup: Setup, answers: Sequence[Answer]) -> tuple[State, str]:
    """A setup's state where nothing was found."""
    if answers and all(answer == NOT_APPLICABLE for answer in answers):
        return "not applicable", ""
    if setup.is_ours and trap.ours:
        return "clear", f"Diptych: {trap.ours}"
    if any(isinstance(answer, list) for answer in answers):
        return "clear", "looked at"
    if setup.is_ours and not trap.checks:
        return "clear", "one recipe"
    return "cannot be seen from here", ""


def _trap(number: int, title: str, ours: str, look: str, *checks: Check, pairs: Sequence[Pair] = ()) -> Trap:
    return Trap(number=number, title=title, ours=ours, look=look, checks=checks, pairs=tuple(pairs))


TRAPS: tuple[Trap, ...] = (
    _trap(1, "which GELU, which activation", "config.json names it; unknown names are errors",
          "the activation's name: torch's gelu is exact, jax.nn.gelu approximates by tanh (4.7e-4 apart)",
          model.activation, pairs=[model.activations_differ]),
    _trap(2, "epsilon of the norms", "config.json's, else the family's own default, never a framework's",
          "the norm's eps: torch LayerNorm 1e-5, flax 1e-6, torch RMSNorm the machine's",
          model.norm_eps, pairs=[model.norm_eps_differ]),
    _trap(3, "LayerNorm by E[x2] - E[x]2", "two passes over x", "flax.linen.LayerNorm(use_fast_variance=False)",
          is_not("fast_variance", True, instead="fast_variance: false")),
    _trap(4, "norms, softmax or log-softmax in bfloat16", "float32 or wider, in both engines",
          "casts to float32 before norm, softmax and log_softmax",
          is_not("norm_precision", "bfloat16", "float16", instead="norm_precision: float32"),
          is_not("softmax_precision", "bfloat16", "float16", instead="softmax_precision: float32"),
          is_not("logprob_precision", "bfloat16", "float16", instead="logprob_precision: float32")),
    _trap(5, "standard deviation by n or by n - 1", "the recipe's dialect says which",
          "x.std(): torch divides by n - 1, NumPy and JAX by n", pairs=[differ("whiten_ddof"), differ("whiten_eps")]),
    _trap(6, "groups whose rewards are all equal", "no division within groups",
          "reward std of a group plus 1e-8: advantages of 0.8 instead of 0; set them to 0, or eps to 1e-4",
          trainer.constant_group),
    _trap(7, "label -100", "labels in range, times a mask",
          "optax's integer cross-entropy takes class V-100 for -100", trainer.ignored_labels),
    _trap(8, "token ids beyond the vocabulary", "checked on the host before any model reads them",
          "ids >= vocab_size: torch raises, x[i] in JAX takes the last row, jnp.take gives NaN", model.ids_in_range),
    _trap(9, "rows whose every key is masked", "padded queries never reach a loss",
          "outputs at padded positions: 0, a mean, or NaN; is the mask applied to them before a sum?",
          is_not("attention_mask", "-inf", "inf", instead="attention_mask: where (a large finite number)")),
    _trap(10, "positions under left padding", "positions are made once, in NumPy, and given to both engines",
          "position_ids passed to the model explicitly; padding_side left for generation",
          trainer.positions, trainer.padding_side),
    _trap(11, "rotary tables", "float32 tables from float64 frequencies, made once for both engines",
          "angles in float32 at the least; half-split or interleaved layout", model.rope),
    _trap(12, "default precision of float32 matrix products", "highest in both engines, recorded",
          "jax_default_matmul_precision, torch.set_float32_matmul_precision, both TF32 switches",
          trainer.matmul_precision, trainer.tf32),
    _trap(13, "reduced-precision sums", "",
          "allow_bf16_reduced_precision_reduction; XLA_FLAGS with fast-math or excess precision", trainer.reductions),
    _trap(14, "default weight decay", "in the recipe, 0 where it is not written",
          "AdamW(weight_decay=...) written out: torch 1e-2, optax 1e-4", pairs=[differ("weight_decay")]),
    _trap(15, "where Adam's epsilon stands, and how large it is", "outside the root, after bias correction; 1e-5",
          "eps and its place: torch and optax are Algorithm 1, TensorFlow is eps-hat", trainer.eps_placement,
          pairs=[differ("eps"), differ("eps_placement"), differ("betas")]),
    _trap(16, "which parameters are decayed", "tensors of two or more dimensions, in both engines",
          "the mask of decayed parameters: biases and gains in or out", pairs=[trainer.decay_mask]),
    _trap(17, "gradient clipping", "max_norm / (norm + 1e-6) in both engines",
          "the 1e-6 of torch's clip_grad_norm_, which optax has not",
          pairs=[differ("max_grad_norm"), differ("clip_norm_eps")]),
    _trap(18, "a schedule that is a step early", "the rate of every step is computed in the hinge",
          "the rate of the first update: optax counts from 0, torch steps afterwards",
          trainer.schedule_offset, pairs=[differ("schedule"), differ("warmup_steps"), differ("schedule_offset")]),
    _trap(19, "mean of the micro-batches' means", "sums over the step, divided once by its tokens",
          "the loss's denominator under gradient accumulation", trainer.accumulation,
          pairs=[differ("gradient_accumulation")]),
    _trap(20, "initial weights", "made once, in NumPy, for both engines",
          "both trainers load one checkpoint; heads that are made new", trainer.init, pairs=[trainer.weights_differ]),
    _trap(21, "dropout", "0 in both engines, whatever config.json says",
          "dropout fields of config.json and of the trainer", model.dropout),
    _trap(22, "sampling", "one uniform a token, drawn in NumPy; log-probabilities at the sampling temperature",
          "temperature of sampling and of the log-probabilities; replay tokens instead of sampling anew",
          trainer.temperature, pairs=[differ("temperature"), differ("top_k"), differ("top_p")]),
    _trap(23, "ties in argmax and top-k", "upcast, in a stable order of (-value, index); margins are recorded",
          "top-k or greedy on bfloat16 logits: 4.8% of rows tie", trainer.ties),
    _trap(24, "gradient at a clip's edge", "where and strict inequalities in one shared definition",
          "clamp at ratio 0.8 or 1.2 exactly: torch 1.0, JAX 0.75",
          is_not("clip_gradient", "clamp", "clip", instead="clip_gradient: where")),
    _trap(25, "where(x > 0, log x, 0)", "entries outside a mask are set to 0 before any formula",
          "NaN gradients: a where inside the log as well",
          is_not("double_where", False, instead="double_where: true")),
    _trap(26, "bfloat16 array times float32 scalar", "losses tested under strict promotion",
          "NumPy scalars and 0-d tensors in formulas: float32 in JAX, bfloat16 in torch",
          is_not("promotion", "standard", instead="promotion: strict (jax_numpy_dtype_promotion)")),
    _trap(27, "64 bits off in JAX", "on in float64 runs; counters live on the host",
          "JAX_ENABLE_X64=1 where float64 or large integers are asked for", trainer.x64),
    _trap(28, "masks added to scores", "where", "finfo.min + (-100) is -inf in float16",
          is_not("attention_mask", "add", instead="attention_mask: where")),
    _trap(29, "exp of large log-ratios", "clamped at the same place in one shared definition, hits counted",
          "a clamp of the log-ratio before exp", pairs=[differ("log_ratio_clamp")]),
    _trap(30, "micro-batch sizes", "", "rows that go through the model at once: equal on both sides",
          pairs=[differ("micro_batch_size")]),
    _trap(31, "layout of weights", "a checked bijection with nothing left over; checksums of tensors",
          "(out, in) or (in, out): a square matrix transposes silently; count the tensors",
          pairs=[trainer.tensor_counts]),
    _trap(32, "which KL, and where", "the recipe names the estimator; KL is in the reward, per token",
          "k1, k2 or k3; in the reward or in the loss; sum or mean over tokens",
          pairs=[differ("kl_estimator"), differ("kl_place"), differ("kl_coef")]),
    _trap(33, "maximum of two equal losses", "elementwise maximum in one shared definition",
          "max(dim) of stacked losses sends the whole gradient to one of two equal ones",
          is_not("value_loss_max", "max(dim)", instead="value_loss_max: maximum")),
    _trap(34, "large sums", "losses and norms are summed in float32 or wider",
          "the type in which losses and norms are summed on an accelerator",
          is_not("sum_precision", "bfloat16", "float16", instead="sum_precision: float32")),
    _trap(35, "the loss of a policy that has not moved", "", "several updates a rollout, or perturbed old log-probs",
          trainer.on_policy),
    _trap(36, "sequences too short to see positions", "", "rows of 64 tokens and more: a partial-RoPE bug hid below",
          trainer.short_rows),
    _trap(37, "weights like new", "", "trained weights, or gains and biases moved away from 1 and 0", model.near_init),
    _trap(38, "correctness tested in bfloat16", "", "float64 or float32: bfloat16 moves x1.01 under a wrong GELU",
          trainer.bfloat16),
    _trap(39, "tied embeddings, stored twice and different", "", "lm_head beside tied embeddings: which is read?",
          model.tied_copies),
    _trap(40, "padding that is also the stop token", "masks come from lengths, never from ids",
          "masks made by ids == pad: with pad == eos the stop token is never trained", model.pad_is_eos),
    _trap(41, "scores clipped, texts cut", "", "limits of scores and lengths, equal on both sides",
          trainer.clipped, pairs=[differ("score_clip")]),
    _trap(42, "a stop token that is never trained", "", "is the stop token in the loss's mask?", trainer.stop_token),
)  # fmt: skip
