"""The bugs that the self-test plants: each one that was really made in some trainer, or that the facts warn of.

Known from DeepSpeed-Chat, TRL, Tunix, OpenRLHF, verl and the two frameworks' defaults. A bug that this setup has
nothing for (a GELU in a model without one) is said to be not applicable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from diptych.algorithms.advantages import Whitening
from diptych.engine import Completions, Finish, OptimizerSpec, TokenBatch, TrainBatch
from diptych.parity.selftest import planting as plant
from diptych.recipe.schema import Stage


@dataclass(frozen=True, kw_only=True)
class Bug:
    """what: in one line. stage: where it shows. plants: how (`diptych.parity.selftest.planting`)."""

    name: str
    what: str
    plants: plant.Plant
    stage: Stage = "rl"


# config.json


def _first_of(config: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in config), None)


def _wider_eps(config: dict[str, Any]) -> dict[str, Any] | None:
    name = _first_of(config, ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"))
    if name is None:  # families without it in config.json have 1e-5
        return config | {"layer_norm_eps": 1e-4} if config["model_type"] in ("opt",) else None
    return config | {name: config[name] * 10}


OTHER = {
    "silu": "gelu", "gelu": "gelu_new", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
    "relu": "gelu", "tanh": "relu",
}  # fmt: skip


def _other_activation(config: dict[str, Any]) -> dict[str, Any] | None:
    name = _first_of(
        config, ("hidden_activation", "hidden_act", "activation_function", "activation", "nonlinearity")
    )  # fmt: skip
    return None if name is None or config[name] not in OTHER else config | {name: OTHER[config[name]]}


def _other_base(config: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_parameters" in config and "rope_theta" in config["rope_parameters"]:
        inside = config["rope_parameters"]
        return config | {"rope_parameters": {**inside, "rope_theta": inside["rope_theta"] * 1.1}}
    return config | {"rope_theta": config["rope_theta"] * 1.1} if "rope_theta" in config else None


# Weights, by what they are named after.


def _is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name or "_ln" in name


def _transposed(name: str, value: np.ndarray) -> np.ndarray:
    chosen = name.endswith(("o_proj.weight", "out_proj.weight", "c_proj.weight", "dense.weight", "recurrent.weight"))
    return value.T.copy() if chosen and value.ndim == 2 and value.shape[0] == value.shape[1] else value


def _interleaved(name: str, value: np.ndarray) -> np.ndarray:
    """Rows of the queries as if neighbouring columns of a head were a pair, not the columns of its two halves."""
    if not name.endswith(("q_proj.weight", "c_attn.weight", "query_key_value.weight", "qkv_proj.weight")):
        return value
    half = len(value) // 2
    return np.concatenate([value[0::2], value[1::2]]) if half * 2 == len(value) else value


def _gain_dropped(name: str, value: np.ndarray) -> np.ndarray:
    last = name.endswith(("model.norm.weight", "ln_f.weight", "final_layer_norm.weight"))
    return np.ones_like(value) if last and ".layers." not in name else value


def _one_more(name: str, value: np.ndarray) -> np.ndarray:
    return value + 1 if _is_norm(name) and name.endswith("weight") else value


def _heads_turned(name: str, value: np.ndarray) -> np.ndarray:
    return np.roll(value, len(value) // 2, axis=0) if name.endswith(("v_proj.weight", "attn.c_attn.bias")) else value


def _in_bfloat16(_name: str, value: np.ndarray) -> np.ndarray:
    return value.astype(ml_dtypes.bfloat16).astype(value.dtype)


# Batches


def _skipping(batch: TokenBatch) -> TokenBatch:
    return replace(batch, positions=np.where(batch.attention, batch.positions + (batch.positions > 3), 0))


def _padding_read(batch: TokenBatch) -> TokenBatch:
    """Padding is text like any other."""
    columns = np.broadcast_to(np.arange(batch.tokens.shape[1], dtype=np.int32), batch.tokens.shape)
    return replace(batch, attention=np.ones_like(batch.attention), positions=columns.copy())


def _whole_count(batch: TrainBatch) -> TrainBatch:
    """The mean over all columns of the batch, padding included."""
    return replace(batch, denominators={name: float(batch.tokens.tokens.size) for name in batch.denominators})


def _mean_of_means(batch: TrainBatch) -> TrainBatch:
    """Each half of the rows is divided by its own count, then the two are averaged."""
    mask = batch.arrays["mask"]
    half = len(mask) // 2
    counts = np.array([mask[:half].sum(), mask[half:].sum()], np.float64)
    if half == 0 or not counts.all():
        return batch
    factor = np.repeat(counts.sum() / (2 * counts), [half, len(mask) - half])
    scaled = "advantages" if "advantages" in batch.arrays else "returns"
    changed = (batch.arrays[scaled] * factor[:, None]).astype(batch.arrays[scaled].dtype)
    return replace(batch, arrays={**batch.arrays, scaled: changed})


def _last_rows_lost(batch: TrainBatch) -> TrainBatch:
    """The last micro-batch of an accumulation never arrives."""
    lost = max(1, len(batch.tokens) // 4)

    def cut(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[:-lost], np.zeros_like(array[-lost:])])

    arrays = {name: array if name == "columns" else cut(array) for name, array in batch.arrays.items()}
    return replace(batch, arrays=arrays)


def _without_end(batch: TrainBatch) -> TrainBatch:
    """The last trained token of each row, its end-of-sequence, is not trained."""
    mask = batch.arrays["mask"].copy()
    for row in mask:
        trained = np.flatnonzero(row)
        if len(trained):
            row[trained[-1]] = 0
    return replace(batch, arrays={**batch.arrays, "mask": mask})


def _prompt_trained(batch: TrainBatch) -> TrainBatch:
    return replace(
        batch, arrays={**batch.arrays, "mask": batch.tokens.attention.astype(batch.arrays["mask"].dtype)}
    )  # fmt: skip


def _pairs_swapped(batch: TrainBatch) -> TrainBatch:
    order = np.arange(len(batch.tokens)) ^ 1
    return replace(
        batch, tokens=batch.tokens.take(order), arrays={name: array[order] for name, array in batch.arrays.items()}
    )


def _read_at_padding(batch: TrainBatch) -> TrainBatch:
    """The score is read in the last column, padding or not."""
    ends = np.zeros_like(batch.arrays["end_mask"])
    ends[:, -1] = batch.arrays["end_mask"].any(axis=1)
    return replace(batch, arrays={**batch.arrays, "end_mask": ends})


# Losses, rewards, advantages


def _not_shifted(loss: Any) -> Any:
    """Token t is scored by what the model says after it."""
    inner = loss.function

    def wrong(outputs: Any, **inputs: Any) -> Any:
        return inner(array_namespace(outputs).roll(outputs, -1, axis=1), **inputs)

    return replace(loss, function=wrong)


def _bessel(right: Callable[..., Any]) -> Callable[..., Any]:
    def whiten(x: Any, mask: Any, *, whitening: Whitening) -> Any:
        other = "population" if whitening.variance == "bessel" else "bessel"
        return right(x, mask, whitening=replace(whitening, variance=other))

    return whiten


def _unmasked_whitening(right: Callable[..., Any]) -> Callable[..., Any]:
    def whiten(x: Any, mask: Any, *, whitening: Whitening) -> Any:
        return np.where(mask, right(x, np.ones_like(mask), whitening=whitening), 0)

    return whiten


def _one_early(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rewards, scores, *, slots: right(rewards, scores, slots=np.maximum(slots - 1, 0))


def _stop_not_trained(right: Any) -> Any:
    return {name: replace(dialect, trains_stop=not dialect.trains_stop) for name, dialect in right.items()}


def _kl_reversed(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logprobs, ref_logprobs, *, estimator: right(ref_logprobs, logprobs, estimator=estimator)


def _no_discount_of_the_tail(right: Callable[..., Any]) -> Callable[..., Any]:
    """One-step advantages: the recursion is forgotten."""
    return lambda rewards, values, *, gamma, lam: right(rewards, values, gamma=gamma, lam=0.0)


class _Truncated(plant.Wrapped):
    def scores(self, batch: TokenBatch) -> np.ndarray:
        return np.trunc(self.real.scores(batch))


class _Late(plant.Wrapped):
    """Values one column late."""

    def scores(self, batch: TokenBatch) -> np.ndarray:
        return np.roll(self.real.scores(batch), -1, axis=1)


class _Moving(plant.Wrapped):
    """The reference is the policy that is trained."""

    def __init__(self, model: Any, policy: Any):
        super().__init__(model)
        self.policy = policy

    def logprobs(self, batch: TokenBatch, **settings: Any) -> np.ndarray:
        return self.policy.logprobs(batch, **settings)


class _OtherTemperature(plant.Wrapped):
    def logprobs(self, batch: TokenBatch, *, temperature: float, **settings: Any) -> np.ndarray:
        return self.real.logprobs(batch, temperature=_wrong(temperature), **settings)


def _wrong(temperature: float) -> float:
    """1 where it is another, as if it were forgotten; else a wrong one."""
    return 1.0 if temperature != 1.0 else 0.9


class _StopCutOff(plant.Wrapped):
    """The stop token is no part of the response."""

    def generate(self, *inputs: Any, **options: Any) -> Completions:
        done: Completions = self.real.generate(*inputs, **options)
        mask = done.mask.copy()
        for row in np.flatnonzero(done.finish == Finish.STOP):
            length = int(mask[row].sum())
            if length > 1:
                mask[row, length - 1] = False
        return replace(done, mask=mask)


class _StepTwice(plant.Wrapped):
    """Every update is made a second time, as by a loop that counts epochs from 0 to n."""

    def update(self, loss: Any, batch: TrainBatch, *, learning_rate: float) -> Any:
        made = self.real.update(loss, batch, learning_rate=learning_rate)
        self.real.update(loss, batch, learning_rate=learning_rate)
        return made


def _optimizer(change: Callable[[OptimizerSpec], dict[str, Any]]) -> plant.Plant:
    def changed(spec: Any) -> Any:
        new = replace(spec, optimizer=replace(spec.optimizer, **change(spec.optimizer)))
        return None if spec.optimizer.name != "adamw" or new.optimizer == spec.optimizer else new

    return plant.spec(changed)


def _uncorrected(rate: float, step: int, spec: OptimizerSpec) -> float:
    """Adam without bias correction, as a rate: m / sqrt(v) is too large by sqrt(1 - b2^t) / (1 - b1^t)."""
    return rate * (1 - spec.beta1 ** (step + 1)) / np.sqrt(1 - spec.beta2 ** (step + 1))


POLICY = ("policy",)
BUGS: tuple[Bug, ...] = (
    # The model
    Bug(name="norm eps", what="norm epsilon ten times too large", plants=plant.config(_wider_eps)),
    Bug(name="activation", what="another activation (GELU for SiLU, tanh GELU for exact)",
        plants=plant.config(_other_activation)),
    Bug(name="rope base", what="rotary base off by a tenth", plants=plant.config(_other_base)),
    Bug(name="position skipped", what="positions skip one after the fourth",
        plants=plant.in_attention(plant.models(plant.batches(_skipping)))),
    Bug(name="padding read", what="left padding is read like text", plants=plant.models(plant.batches(_padding_read))),
    Bug(name="future leaks", what="a token sees the next one", plants=plant.fault("future")),
    Bug(name="transposed", what="a square projection is transposed", plants=plant.weights(_transposed)),
    Bug(name="rope layout", what="query rows interleaved where halves are meant",
        plants=plant.weights(_interleaved)),
    Bug(name="heads turned", what="value heads in another order", plants=plant.weights(_heads_turned)),
    Bug(name="final gain dropped", what="the last norm's gain is 1", plants=plant.weights(_gain_dropped)),
    Bug(name="gain plus one", what="norm gains read as 1 + g", plants=plant.weights(_one_more)),
    Bug(name="bfloat16 weights", what="weights rounded to bfloat16 on the way",
        plants=plant.weights(_in_bfloat16)),
    Bug(name="bfloat16 log-softmax", what="log-probabilities rounded to bfloat16",
        plants=plant.models(plant.outputs(lambda x: x.astype(ml_dtypes.bfloat16).astype(x.dtype)), "policy")),
    # Sampling
    Bug(name="sampler temperature", what="samples at another temperature",
        plants=plant.models(plant.generates(
            lambda p, s, u: (p, replace(s, temperature=s.temperature * 1.1), u)), *POLICY)),
    Bug(name="sampler noise", what="every row draws with its neighbour's noise",
        plants=plant.models(plant.generates(lambda p, s, u: (p, s, np.roll(u, 1, axis=0))), *POLICY)),
    Bug(name="stale decode copy", what="generates with the weights of the first rollout",
        plants=plant.models(plant.StaleCopy, *POLICY)),
    Bug(name="stop cut off", what="the stop token is no part of the response",
        plants=plant.models(_StopCutOff, *POLICY)),
    # Rewards, KL, advantages
    Bug(name="scoring temperature", what="log-probabilities at another temperature than the sampler's",
        plants=plant.models(_OtherTemperature, *POLICY)),
    Bug(name="reward truncated", what="scores become integers", plants=plant.models(_Truncated, "reward")),
    Bug(name="score one early", what="the score lands one token before the end",
        plants=plant.function("diptych.algorithms.dialects", "add_scores", _one_early)),
    Bug(name="moving reference", what="the reference is the policy that is trained",
        plants=plant.of_policy(_Moving, "reference")),
    Bug(name="KL reversed", what="KL of the reference to the policy",
        plants=plant.function("diptych.algorithms.dialects", "kl_estimate", _kl_reversed)),
    Bug(name="KL coefficient", what="KL coefficient a tenth too large",
        plants=plant.setting("rl.kl_coef", lambda old: old * 1.1)),
    Bug(name="values one late", what="values one column late", plants=plant.models(_Late, "critic")),
    Bug(name="GAE lambda", what="one-step advantages: lambda 0",
        plants=plant.function("diptych.algorithms.dialects", "gae", _no_discount_of_the_tail)),
    Bug(name="whitening ddof", what="whitening by n - 1 where n is meant, or the other way round",
        plants=plant.function("diptych.algorithms.dialects", "whiten", _bessel)),
    Bug(name="whitening over padding", what="whitening over all columns",
        plants=plant.function("diptych.algorithms.dialects", "whiten", _unmasked_whitening)),
    Bug(name="stop not trained", what="the stop token is outside the policy mask",
        plants=plant.function("diptych.stages.rl", "DIALECTS", _stop_not_trained)),
    # Losses
    Bug(name="clip range", what="ratios clipped half as wide again",
        plants=plant.setting("rl.clip_range", lambda old: old * 1.5)),
    Bug(name="value clip", what="value clip range off by a twentieth",
        plants=plant.setting("rl.value_clip_range", lambda old: old * 1.05)),
    Bug(name="labels not shifted", what="token t is scored by what the model says after it",
        plants=plant.models(plant.losses(_not_shifted), *POLICY)),
    Bug(name="mean over padding", what="divided by all columns, padding included",
        plants=plant.models(plant.train_batches(_whole_count))),
    Bug(name="mean of means", what="micro-batches' means are averaged",
        plants=plant.models(plant.train_batches(_mean_of_means), *POLICY)),
    Bug(name="last micro-batch lost", what="the last micro-batch of an accumulation is dropped",
        plants=plant.models(plant.train_batches(_last_rows_lost))),
    # Optimizer
    Bug(name="Adam eps", what="the framework's epsilon, 1e-8, where 1e-5 is meant, or the other way round",
        plants=_optimizer(lambda old: {"eps": 1e-8 if old.eps > 1e-7 else 1e-5})),
    Bug(name="Adam beta2", what="the framework's beta2, 0.999, where another is meant",
        plants=_optimizer(lambda old: {"beta2": 0.999 if old.beta2 != 0.999 else 0.99})),
    Bug(name="weight decay", what="a framework's default weight decay, 1e-2",
        plants=_optimizer(lambda old: {"weight_decay": old.weight_decay + 1e-2})),
    Bug(name="no bias correction", what="Adam's moments are not corrected",
        plants=plant.models(plant.rates(_uncorrected))),
    Bug(name="clip norm", what="gradients are clipped at a hundredth",
        plants=_optimizer(lambda old: {"max_grad_norm": 0.01})),
    Bug(name="learning rate", what="learning rate one percent too high",
        plants=plant.models(plant.rates(lambda rate, step, spec: rate * 1.01))),
    Bug(name="frozen tensor", what="one tensor is never updated", plants=plant.models(plant.Frozen)),
    Bug(name="stepped twice", what="every update is made twice", plants=plant.models(_StepTwice)),
    # Supervised stages
    Bug(name="prompt trained", what="the prompt's tokens are in the SFT mask", stage="sft",
        plants=plant.models(plant.train_batches(_prompt_trained))),
    Bug(name="EOS not trained", what="the end-of-sequence token is outside the SFT mask", stage="sft",
        plants=plant.models(plant.train_batches(_without_end))),
    Bug(name="pairs swapped", what="chosen and rejected change places", stage="reward",
        plants=plant.models(plant.train_batches(_pairs_swapped))),
    Bug(name="score at padding", what="the score is read in the last column, padding or not", stage="reward",
        plants=plant.models(plant.train_batches(_read_at_padding))),
)  # fmt: skip
