"""Settings of any trainer under one name each, so that TRL's can be laid beside a recipe's.

A trace of another trainer holds `provenance["settings"]`: names of this table, or that trainer's own (`ALIASES` knows
those of transformers, TRL, Tunix and optax). A name that neither knows is kept and compared as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.algorithms.dialects import DIALECTS, Dialect
from diptych.recipe.schema import Recipe

# Name -> what it changes.
MEANINGS: Mapping[str, str] = {
    "learning_rate": "the size of every update",
    "critic_learning_rate": "the size of every update of the critic",
    "optimizer": "the update itself",
    "betas": "Adam's memory: every update",
    "eps": "Adam's updates where the gradient is small",
    "eps_placement": "Adam's eps: Algorithm 1, or before bias correction (TF's eps-hat): first steps x1.3 to x29",
    "weight_decay": "pulls weights to 0 (torch's default 1e-2, optax's 1e-4)",
    "weight_decay_mask": "which parameters are decayed",
    "max_grad_norm": "how much of the gradient is taken",
    "clip_norm_eps": "max_norm / (norm + this): 1e-4 relative at norm 0.01",
    "schedule": "the learning rate over time",
    "schedule_offset": "learning rates of the scheduler, in steps early or late",
    "warmup_steps": "the learning rate of the first steps",
    "batch_size": "which rows make up an update",
    "micro_batch_size": "rounding; with a mean of means, the loss",
    "gradient_accumulation": "sums divided once (token_mean), or a mean of the micro-batches' means (mean_of_means)",
    "samples_per_prompt": "size of a group",
    "epochs": "passes over a rollout",
    "mini_batches": "updates of a pass",
    "kl_coef": "weight of the KL penalty",
    "kl_estimator": "the KL that is penalised and logged (k1, k2, k3)",
    "kl_place": "whether KL is in the reward or in the loss",
    "gamma": "discount of rewards",
    "lam": "lambda of GAE",
    "clip_range": "clip of the policy's ratio",
    "value_clip_range": "clip of the value loss",
    "value_coef": "weight of the value loss",
    "value_loss_max": "gradient at ties of the value loss: elementwise maximum 0.5/0.5, max(dim) 1/0",
    "clip_gradient": "gradient at a clip's edge: where (1 or 0), or clamp (torch 1, JAX 0.5)",
    "log_ratio_clamp": "bound on the log-ratio before exp",
    "whiten_advantages": "whether advantages are whitened",
    "whiten_ddof": "advantages x1.41 in groups of 2, x1.069 in groups of 8 (torch 1, NumPy and JAX 0)",
    "whiten_eps": "advantages where the spread is small",
    "whiten_rewards": "scale of rewards",
    "group_std_eps": "advantages of a group whose rewards are equal",
    "constant_group": "advantages of a group whose rewards are equal (zero: set to 0)",
    "score_clip": "large scores",
    "missing_eos_penalty": "scores of unfinished responses",
    "trains_stop": "whether the stop token is in the loss",
    "score_slot": "the token on which the score lands",
    "temperature": "what is sampled",
    "logprob_temperature": "log-probabilities of the loss",
    "top_k": "what is sampled",
    "top_p": "what is sampled",
    "max_new_tokens": "length of responses",
    "max_prompt_tokens": "length of prompts",
    "seed": "data order, initial weights, samples",
    "sampling_noise": "which tokens are drawn: each framework's own generator, or one shared",
    "dropout": "every forward pass in training",
    "pad_side": "where positions begin",
    "position_ids": "positions of left-padded rows: from the attention mask (mask), or 0, 1, 2, ... (arange)",
    "masks_from": "padding and stop tokens: known from lengths, or guessed from token ids (ids)",
    "label_mask": "labels -100 (ignore_index), or a mask that multiplies (mask)",
    "attention_mask": "masked scores: replaced (where), added (add), or -inf",
    "attention_kernel": "rounding of attention",
    "activation": "every MLP",
    "norm_eps": "every norm",
    "norm_precision": "rounding of norms",
    "softmax_precision": "rounding of attention's softmax",
    "logprob_precision": "log-probabilities: 0.1 apart in bfloat16",
    "rope_precision": "positions: cosines off by 0.2 at position 300 in bfloat16",
    "fast_variance": "LayerNorm by E[x2] - E[x]2: 0.5 off where the mean is large",
    "promotion": "bfloat16 array times float32 scalar: float32 in JAX, bfloat16 in torch",
    "out_of_range_ids": "ids beyond the vocabulary: raise, clamp or NaN",
    "double_where": "gradients of where(x > 0, log x, 0): NaN without a second where",
    "matmul_precision": "every matrix product in float32",
    "tf32": "every matrix product in float32: 10 bits instead of 23",
    "x64": "float64 becomes float32, 64-bit integers wrap",
    "bf16_reduced_reduction": "sums of bfloat16 matrix products",
    "sum_precision": "sums of many numbers",
    "weight_layout": "(out, in) or (in, out): square matrices transpose silently",
    "init": "initial weights",
    "precision": "everything",
    "perturbation": "whether old log-probabilities are moved off the policy's own before losses are compared",
    "disable_dropout": "whether the trainer sets dropout to 0",
}  # fmt: skip

ROUNDING = frozenset({"micro_batch_size", "attention_kernel", "clip_norm_eps", "norm_precision", "softmax_precision"})

ALIASES: Mapping[str, str] = {
    "lr": "learning_rate", "adam_epsilon": "eps", "adam_eps": "eps", "optim": "optimizer",
    "lr_scheduler_type": "schedule", "clip_grad_norm": "max_grad_norm", "max_norm": "max_grad_norm",
    "num_ppo_epochs": "epochs", "ppo_epochs": "epochs", "num_iterations": "epochs", "num_mini_batches": "mini_batches",
    "cliprange": "clip_range", "cliprange_value": "value_clip_range", "vf_coef": "value_coef", "epsilon": "clip_range",
    "beta": "kl_coef", "init_kl_coef": "kl_coef", "per_device_train_batch_size": "micro_batch_size",
    "num_generations": "samples_per_prompt", "response_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens", "max_tokens_to_generate": "max_new_tokens", "padding_side": "pad_side",
    "gae_lambda": "lam", "max_prompt_length": "max_prompt_tokens", "attn_implementation": "attention_kernel",
    "allow_tf32": "tf32",
    "use_fast_variance": "fast_variance", "enable_x64": "x64", "jax_enable_x64": "x64",
    "jax_default_matmul_precision": "matmul_precision", "float32_matmul_precision": "matmul_precision",
    "allow_bf16_reduced_precision_reduction": "bf16_reduced_reduction",
}  # fmt: skip


def canonical(settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Canonical name -> (the name as it is written, value). `adam_beta1` and `adam_beta2` become `betas`, a dialect
    what it says; a recipe's dotted keys (`rl.optimizer.eps`) go by their ends.

    Where a canonical name and an alias of it are both there, each keeps its own name.
    """
    named: dict[str, tuple[str, Any]] = {}
    for name, value in settings.items():
        end = "optimizer" if name.endswith("optimizer.name") else name.split(".")[-1]
        common = ALIASES.get(end, end)
        taken = common != name and (common in settings or common in named)
        named[name if taken else common] = (name, value)
    first, second = named.pop("adam_beta1", None), named.pop("adam_beta2", None)
    if first is not None and second is not None and "betas" not in named:
        named["betas"] = (first[0], [first[1], second[1]])
    else:
        named |= {name: one for name, one in (("adam_beta1", first), ("adam_beta2", second)) if one is not None}
    written, dialect = named.pop("dialect", ("", None))
    if dialect in DIALECTS:
        answers = {name: (written, value) for name, value in _answers(DIALECTS[dialect]).items()}
        named = {**answers, **{name: one for name, one in named.items() if not (name in answers and one[1] is None)}}
    elif dialect is not None:
        named["dialect"] = (written, dialect)
    return named


def _answers(dialect: Dialect) -> dict[str, Any]:
    """What a dialect says, in this vocabulary."""
    found: dict[str, Any] = {
        "trains_stop": dialect.trains_stop,
        "score_slot": dialect.score_slot,
        "score_clip": dialect.score_clip,
        "whiten_advantages": dialect.whitening is not None,
    }
    if dialect.whitening is not None:
        found["whiten_ddof"] = {"population": 0, "bessel": 1}[dialect.whitening.variance]
        found["whiten_eps"] = dialect.whitening.eps
    return found


def settings_of(recipe: Recipe) -> dict[str, tuple[str, Any]]:
    """Canonical name -> (the recipe's key, value): rl's where it runs, else the last stage's."""
    stage = "rl" if "rl" in recipe.stages else recipe.stages[-1]
    part = {"rl": recipe.rl, "reward": recipe.reward, "sft": recipe.sft}[stage]
    optimizer = part.optimizer
    found: dict[str, tuple[str, Any]] = {
        "precision": ("precision", recipe.precision),
        "seed": ("seed", recipe.seed),
        "max_prompt_tokens": ("data.max_prompt_tokens", recipe.data.max_prompt_tokens),
        "max_new_tokens": ("data.max_response_tokens", recipe.data.max_response_tokens),
        "learning_rate": (f"{stage}.learning_rate", part.learning_rate),
        "batch_size": (f"{stage}.batch_size", part.batch_size),
        "micro_batch_size": (f"{stage}.micro_batch_size", part.micro_batch_size),
        "epochs": (f"{stage}.epochs", part.epochs),
        "optimizer": (f"{stage}.optimizer.name", optimizer.name),
        "betas": (f"{stage}.optimizer.betas", list(optimizer.betas)),
        "eps": (f"{stage}.optimizer.eps", optimizer.eps),
        "weight_decay": (f"{stage}.optimizer.weight_decay", optimizer.weight_decay),
        "max_grad_norm": (f"{stage}.optimizer.max_grad_norm", optimizer.max_grad_norm),
        "schedule": (f"{stage}.optimizer.schedule", optimizer.schedule),
        "warmup_steps": (f"{stage}.optimizer.warmup_steps", optimizer.warmup_steps),
    }
    # What Diptych fixes, in every recipe.
    fixed = {
        "eps_placement": "algorithm 1", "clip_norm_eps": 1e-6, "schedule_offset": 0, "weight_decay_mask": "matrices",
        "gradient_accumulation": "token_mean", "dropout": 0.0, "pad_side": "left", "position_ids": "mask",
        "masks_from": "lengths", "label_mask": "mask", "fast_variance": False,
    }  # fmt: skip
    found |= {name: (f"every {stage} stage of Diptych", value) for name, value in fixed.items()}
    if stage == "rl":
        rl, rollout = recipe.rl, recipe.rollout
        critic_rate = rl.learning_rate if rl.critic_learning_rate is None else rl.critic_learning_rate
        found |= {name: ("rl.dialect", value) for name, value in _answers(DIALECTS[rl.dialect]).items()}
        if rl.score_clip is not None:
            found["score_clip"] = ("rl.score_clip", rl.score_clip)
        found |= {
            "critic_learning_rate": ("rl.critic_learning_rate", critic_rate),
            "kl_place": ("every rl stage of Diptych", "reward"),
            "logprob_temperature": ("rollout.temperature", rollout.temperature),
        }
        for name in (
            "samples_per_prompt", "mini_batches", "kl_coef", "kl_estimator", "gamma", "lam", "clip_range",
            "value_clip_range", "value_coef", "whiten_rewards", "missing_eos_penalty",
        ):  # fmt: skip
            found[name] = (f"rl.{name}", getattr(rl, name))
        for name in ("temperature", "top_k", "top_p", "max_new_tokens"):
            found[name] = (f"rollout.{name}", getattr(rollout, name))
    return found
