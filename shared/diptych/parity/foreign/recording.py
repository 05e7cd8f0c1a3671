"""Bring your own trainer: record a Diptych trace inside another trainer's process, from its own arrays.

    from diptych.parity.foreign.recording import Recording, Update, gradients_of, weights_of

    with Recording("trace", producer="mine", precision="float32", models={"policy": config}, settings={...}) as trace:
        ...                                             # in the loop, once a step:
        before = weights_of(policy)                     # a copy, before optimizer.step()
        loss.backward()
        gradients = gradients_of(policy)                # a copy, before clipping and zero_grad()
        optimizer.step()
        update = Update(weights_before=before, gradients=gradients, weights_after=weights_of(policy), loss=loss)
        trace.ppo_step(prompts=..., prompt_mask=..., responses=..., response_mask=..., logprobs=..., policy=update, ...)

Arrays may be torch's, JAX's or NumPy's. Whatever cannot be what its name says (shape, dtype, a mask with a hole, NaN,
weights that did not move, gradients read after they were zeroed) is an error at once, where it was made. This module
needs NumPy and safetensors and nothing else of what Diptych depends on: put the folder of `diptych` on PYTHONPATH.

The names are those of `diptych.parity.steps`. `diptych parity record RECIPE --engine E --replay trace` goes through the
same steps on one of our engines, and `diptych parity compare` walks the ladder. An array's slots outside its mask hold
whatever the trainer keeps there; they are written as 0. bfloat16 and float16 are written as float32, which is exact.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych.errors import UserError
from diptych.parity.foreign.arrays import (
    Array,
    check_contiguous,
    check_finite,
    check_left_padded,
    check_logprobs,
    check_matches,
    check_moved,
    check_norm,
    check_prefix,
    config_of,
    gradients_of,
    integers_of,
    mask_of,
    numpy_of,
    placed,
    positions_of,
    same_shape,
    scalars_of,
    typed,
    weights_of,
)
from diptych.parity.trace import Recorded, Step, TraceWriter

__all__ = ["SETTINGS", "Recording", "Update", "gradients_of", "numpy_of", "weights_of"]

Tensors = Mapping[str, Array]

# What a replay on one of our engines is run under, by the names of `diptych.parity.doctor.vocabulary`. Other names of
# that vocabulary are for `diptych parity doctor`.
SETTINGS = (
    "learning_rate", "critic_learning_rate", "schedule", "warmup_steps", "optimizer", "betas", "eps", "weight_decay",
    "max_grad_norm", "batch_size", "micro_batch_size", "epochs", "mini_batches", "kl_coef", "kl_estimator", "gamma",
    "lam", "clip_range", "value_clip_range", "value_coef", "whiten_rewards", "score_clip", "missing_eos_penalty",
    "temperature", "top_k", "top_p", "max_new_tokens",
)  # fmt: skip
HEADS = {"policy": "lm", "critic": "scalar", "sft": "lm"}


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step of one model: the first that a recorded step makes. Tensors go by their names in the model's
    Hugging Face checkpoint, in the checkpoint's layout; tied tensors are there once.

    gradients: of the loss of the whole optimizer step, before clipping. loss: that loss (for a critic with its
    coefficient). metrics: what else the loss gave, by our names where there is one ("loss/policy_avg", ...). grad_norm:
    before clipping, as the trainer reports it; None: taken from the gradients. updates: optimizer steps made before.
    first_*, second_*: the optimizer's moments; None where they are all zero (before the first update) or not known.
    outputs, next_outputs: log-probabilities of the tokens trained on, before and after the step, shaped as the step's
    own (`ppo_step`: [rows, new], `sft_step`: [rows, time]).
    """

    weights_before: Tensors
    gradients: Tensors | None = None
    weights_after: Tensors | None = None
    loss: float | Array | None = None
    metrics: Mapping[str, float | Array] = field(default_factory=dict)
    grad_norm: float | Array | None = None
    learning_rate: float | None = None
    updates: int | None = None
    first_before: Tensors | None = None
    second_before: Tensors | None = None
    first_after: Tensors | None = None
    second_after: Tensors | None = None
    outputs: Array | None = None
    next_outputs: Array | None = None


class Recording:
    """Writes the trace of a foreign run: one `ppo_step` or `sft_step` for each step. Use as a context manager."""

    def __init__(
        self,
        directory: Path | str,
        *,
        producer: str,
        precision: Literal["float32", "float64", "bfloat16"],
        models: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        their_names: Mapping[str, str] | None = None,
        dialect: str | None = None,
        tokenizers: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int | None = None,
        versions: Mapping[str, str] | None = None,
    ):
        """directory: new or empty. producer: the trainer's name. precision: of the weights that are trained. models:
        "policy" and "critic", or "sft" -> the contents of its config.json, or a configuration of transformers.
        settings: by our names (`SETTINGS` and more: `diptych.parity.doctor.vocabulary`); what is not known is left out.
        their_names: our name -> what the trainer calls it, for people. dialect: the one of
        `diptych.algorithms.dialects` that the trainer speaks. tokenizers: "policy" -> {"pad_token_id", ...}. versions:
        of what computes.

        Raises UserError for an unknown role, for what is not JSON, and for a name that is almost a setting's.
        """
        settings, their_names = dict(settings or {}), dict(their_names or {})
        for name in (*settings, *their_names):
            near = [] if name in SETTINGS else difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.88)
            if near:
                raise UserError(f"{directory}: settings: {name!r}: did you mean {near[0]}?")
        for role in models:
            if role not in HEADS:
                raise UserError(f"{directory}: models: unknown role {role!r}: policy and critic, or sft")
        self.directory = Path(directory)
        self.dtype = np.dtype("float64" if precision == "float64" else "float32")
        configs = {role: config_of(directory, role, config) for role, config in models.items()}
        self._vocabularies = [config["vocab_size"] for config in configs.values() if "vocab_size" in config]
        self._count = 0
        provenance = {
            "foreign": True, "name": producer, "seed": seed, "settings": settings, "their_names": their_names,
            "dialect": dialect,
            "models": {role: {"config": config, "head": HEADS[role]} for role, config in configs.items()},
            "tokenizers": dict(tokenizers or {}), "pad_side": "left", "depth": "tensors", "every": 1, "replay": None,
        }  # fmt: skip
        about = {"name": producer, "precision": precision, **(versions or {})}
        try:
            json.dumps([about, provenance], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{directory}: settings, tokenizers and versions must be JSON: {error}") from None
        self._writer = TraceWriter(self.directory, producer=about, provenance=provenance)

    def ppo_step(
        self,
        *,
        prompts: Array,
        prompt_mask: Array,
        responses: Array,
        response_mask: Array,
        logprobs: Array,
        scores: Array | None = None,
        ref_logprobs: Array | None = None,
        values: Array | None = None,
        kl: Array | None = None,
        shaped: Array | None = None,
        returns: Array | None = None,
        advantages: Array | None = None,
        policy_mask: Array | None = None,
        value_mask: Array | None = None,
        sampler_logprobs: Array | None = None,
        ended: Array | None = None,
        rows: Array | None = None,
        policy: Update | None = None,
        critic: Update | None = None,
        trained_rows: Array | None = None,
        reference_weights: Tensors | None = None,
        metrics: Mapping[str, float | Array] | None = None,
        step: int | None = None,
    ) -> None:
        """One iteration of PPO: its rollout, what was made of it, and the first update of each model.

        prompts, prompt_mask: [rows, prompt], padded on the left. Everything else is response-aligned, [rows, new], and
        the mask of a row is True from slot 0 to its last token, stop token included. logprobs: the old ones of the
        policy loss; sampler_logprobs: the generator's own where they are others. values: of the state *before* each
        token. kl [rows]: nats of each response, as it was penalised. shaped: rewards as GAE saw them. policy_mask,
        value_mask: the slots of the two losses (None: response_mask); the value mask may be one slot longer. scores
        [rows]: before any penalty. ended [rows]: the row stopped by itself (None: it is shorter than others may be).
        rows [rows]: ids of the prompts (None: in order of appearance). trained_rows: the rows that the first update
        trained on (None: all). reference_weights: once, in the first step. step: None: the next.
        """
        step = self._next(step)
        where = f"{self.directory}: rl step {step}"
        left, attention = self._tokens(where, "prompts", prompts), mask_of(where, "prompt_mask", prompt_mask)
        same_shape(where, "prompt_mask", attention, left.shape, "prompts")
        check_left_padded(where, attention)
        right, mask = self._tokens(where, "responses", responses), mask_of(where, "response_mask", response_mask)
        same_shape(where, "response_mask", mask, right.shape, "responses")
        check_prefix(where, "response_mask", mask, empty=False)
        if len(left) != len(right):
            raise UserError(f"{where}: prompts has {len(left)} rows, responses {len(right)}")
        count, new = right.shape
        trained = mask if policy_mask is None else mask_of(where, "policy_mask", policy_mask)
        slots = trained if value_mask is None else mask_of(where, "value_mask", value_mask)
        for name, one in (("policy_mask", trained), ("value_mask", slots)):
            same_shape(where, name, one, right.shape, "responses")
            check_prefix(where, name, one, empty=True)
        stopped = mask.sum(axis=1) < new if ended is None else mask_of(where, "ended", ended)
        ids = np.arange(count) + step * count if rows is None else integers_of(where, "rows", rows)
        for name, one in (("ended", stopped), ("rows", ids)):
            same_shape(where, name, one, (count,), "responses")

        left, right = (np.where(kept, one, 0).astype(np.int32) for kept, one in ((attention, left), (mask, right)))
        live = slots | trained | mask
        fields = {
            "rows": _made(ids.astype(np.int64), "rows"),
            "prompts/tokens": _made(left, "rows prompt"),
            "prompts/attention": _made(attention, "rows prompt"),
            "response/tokens": _made(right, "rows new", "response/mask"),
            "response/mask": _made(mask, "rows new"),
            "response/finish": _made(stopped.astype(np.int32), "rows"),
            "used/tokens": _made(right, "rows new"),
            "used/mask": _made(mask, "rows new"),
            "used/finish": _made(stopped.astype(np.int32), "rows"),
            "used/slots": _made(live, "rows new"),
            "policy_mask": _made(trained, "rows new"),
            "value_mask": _made(slots, "rows new"),
        }
        for name, array, keep, by in (
            ("response/logprobs", sampler_logprobs, mask, "response/mask"),
            ("logprobs", logprobs, mask, "used/mask"),
            ("ref_logprobs", ref_logprobs, mask, "used/mask"),
            ("values", values, live, "used/slots"),
            ("shaped", shaped, live, None),
            ("returns", returns, slots, "value_mask"),
            ("advantages", advantages, trained, "policy_mask"),
        ):
            if array is not None:
                fields[name] = _made(self._floats(where, name, array, right.shape, keep), "rows new", by)
                if name.endswith("logprobs"):
                    check_logprobs(where, name, fields[name].values)
        for name, array in (("scores", scores), ("kl", kl)):
            if array is not None:
                fields[name] = _made(self._floats(where, name, array, (count,), None), "rows")
        for name, array in self._named(where, "reference_weights", reference_weights or {}).items():
            fields[f"reference/start/weights/{name}"] = _given(array, "as stored")

        chosen = np.arange(count) if trained_rows is None else integers_of(where, "trained_rows", trained_rows)
        if not len(chosen) or len(np.unique(chosen)) != len(chosen) or chosen.min() < 0 or chosen.max() >= count:
            raise UserError(f"{where}: trained_rows must be different rows, each from 0 to {count - 1}")
        tokens, whole = np.concatenate([left, right], axis=1), np.concatenate([attention, mask], axis=1)
        scalars = scalars_of(where, "metrics", metrics or {})
        for role, update, keep, start, needed in (
            ("policy", policy, trained, left.shape[1], {"old_logprobs": "logprobs", "advantages": "advantages"}),
            ("critic", critic, slots, left.shape[1] - 1, {"old_values": "values", "returns": "returns"}),
        ):
            if update is None:
                continue
            arrays = self._loss_arrays(where, role, fields, keep, needed)
            if role == "critic":
                arrays["columns"] = np.broadcast_to(np.arange(start, start + new, dtype=np.int32), keep.shape)
            arrays = {name: placed(array, whole.shape, start)[chosen] for name, array in arrays.items()}
            fields |= _probe(role, tokens[chosen], whole[chosen], left.shape[1], arrays, float(keep[chosen].sum()))
            more, about = self._update(f"{where}: {role}", role, update)
            fields, scalars = fields | more | self._outputs(where, role, update, mask[chosen], start), scalars | about
        self._write(Step(stage="rl", step=step, metrics=scalars, tensors=fields))

    def sft_step(
        self,
        *,
        tokens: Array,
        attention: Array,
        trained: Array,
        model: Update,
        metrics: Mapping[str, float | Array] | None = None,
        step: int | None = None,
    ) -> None:
        """One step of supervised fine-tuning. tokens, attention: [rows, time], each row's tokens next to each other.

        trained: True on the tokens whose log-probabilities the loss sums, token-aligned (a token's own column, not that
        of the token before it; a row's first token has no log-probability). model.outputs: token-aligned likewise.
        """
        step = self._next(step)
        where = f"{self.directory}: sft step {step}"
        ids, real = self._tokens(where, "tokens", tokens), mask_of(where, "attention", attention)
        mask = mask_of(where, "trained", trained)
        for name, one in (("attention", real), ("trained", mask)):
            same_shape(where, name, one, ids.shape, "tokens")
        check_contiguous(where, real)
        begins = real & (positions_of(real) == 0)
        for wrong, why in ((mask & ~real, "is padding"), (mask & begins, "is its row's first and has no log-prob")):
            if wrong.any():
                row, column = (int(index) for index in np.argwhere(wrong)[0])
                raise UserError(
                    f"{where}: trained marks row {row}, column {column}, which {why}: it must be token-aligned "
                    "(column t for the log-probability of tokens[:, t])"
                )
        if not mask.any():
            raise UserError(f"{where}: trained marks no token: there is nothing to learn from")
        ids = np.where(real, ids, 0).astype(np.int32)
        fields = {"batch/tokens": _made(ids, "batch time"), "batch/attention": _made(real, "batch time")}
        fields |= _probe("model", ids, real, 1, {"mask": mask.astype(self.dtype)}, float(mask.sum()))
        for name, outputs in (("outputs", model.outputs), ("next_outputs", model.next_outputs)):
            if outputs is not None:
                array = self._floats(where, f"model/{name}", outputs, ids.shape, real & ~begins)
                check_logprobs(where, f"model/{name}", array)
                fields[f"model/{name}"] = _made(array, "batch time", "model/probe/attention")
        more, about = self._update(f"{where}: model", "model", model)
        scalars = scalars_of(where, "metrics", metrics or {}) | about
        self._write(Step(stage="sft", step=step, metrics=scalars, tensors=fields | more))

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if kind is None and not self._count:
            raise UserError(f"{self.directory}: nothing was recorded: no hook called ppo_step or sft_step")

    def _next(self, step: int | None) -> int:
        if step is not None and step < self._count:
            raise UserError(f"{self.directory}: step {step} after step {self._count - 1}: steps count up")
        return self._count if step is None else step

    def _write(self, step: Step) -> None:
        self._writer.add(step)
        self._count = step.step + 1

    def _update(self, where: str, role: str, update: Update) -> tuple[dict[str, Recorded], dict[str, float]]:
        """One model's update, checked: its tensors and its scalars."""
        before = self._named(where, "weights_before", update.weights_before)
        if not before:
            raise UserError(f"{where}: weights_before is empty: give weights_of(model), taken before the step")
        groups = {"start/weights": before}
        for group, given in (
            ("gradient", "gradients"), ("weights", "weights_after"), ("start/first", "first_before"),
            ("start/second", "second_before"), ("first", "first_after"), ("second", "second_after"),
        ):  # fmt: skip
            tensors = getattr(update, given)
            if tensors is not None:
                groups[group] = self._named(where, given, tensors)
                check_matches(where, given, groups[group], before)
        gradients, after = groups.get("gradient"), groups.get("weights")
        scalars = scalars_of(where, "metrics", update.metrics)
        scalars = {f"{role}/loss/{name}": value for name, value in scalars.items()}
        for name in ("loss", "grad_norm", "learning_rate", "updates"):
            value = getattr(update, name)
            if value is not None:
                key = "step" if name == "updates" else name
                scalars[f"{role}/{key}"] = scalars_of(where, name, {name: value})[name]
        if gradients is not None:
            norm = float(np.sqrt(sum((one.astype(np.float64) ** 2).sum() for one in gradients.values())))
            check_norm(where, norm, scalars.get(f"{role}/grad_norm"))
            scalars.setdefault(f"{role}/grad_norm", norm)
            if after is not None and norm > 0 and scalars.get(f"{role}/learning_rate") != 0:
                check_moved(where, before, after)
        fields = {
            f"{role}/{group}/{name}": (_given if group.startswith("start/") else _made)(array, "as stored")
            for group, tensors in groups.items()
            for name, array in tensors.items()
        }
        return fields, scalars

    def _loss_arrays(
        self, where: str, role: str, fields: Mapping[str, Recorded], keep: np.ndarray, needed: Mapping[str, str]
    ) -> dict[str, np.ndarray]:
        """What the role's loss reads, response-aligned."""
        missing = [name for name in needed.values() if name not in fields]
        if missing:
            raise UserError(f"{where}: the update of the {role} was given without {' and '.join(missing)}")
        arrays = {name: np.where(keep, fields[own].values, 0).astype(self.dtype) for name, own in needed.items()}
        return arrays | {"mask": keep.astype(self.dtype)}

    def _outputs(self, where: str, role: str, update: Update, mask: np.ndarray, start: int) -> dict[str, Recorded]:
        """The log-probabilities of the tokens that an update trained on, in their columns."""
        fields = {}
        for name in ("outputs", "next_outputs"):
            outputs = getattr(update, name)
            if outputs is not None and role == "critic":
                raise UserError(f"{where}: critic: {name} are log-probabilities; a critic's outputs are `values`")
            if outputs is not None:
                array = self._floats(where, f"{role}/{name}", outputs, mask.shape, mask)
                check_logprobs(where, f"{role}/{name}", array)
                array = placed(array, (len(mask), start + mask.shape[1]), start)
                fields[f"{role}/{name}"] = _made(array, "batch time", f"{role}/probe/attention")
        return fields

    def _tokens(self, where: str, name: str, array: Array) -> np.ndarray:
        tokens = integers_of(where, name, array)
        if tokens.ndim != 2 or not tokens.size:
            raise UserError(f"{where}: {name} must be [rows, columns], got shape {list(tokens.shape)}")
        beyond = min(self._vocabularies, default=2**31)
        if tokens.min() < 0 or tokens.max() >= beyond:
            raise UserError(
                f"{where}: {name} holds ids from {tokens.min()} to {tokens.max()}, the model has 0 to {beyond - 1}: "
                "labels such as -100 are no tokens; give the tokens, and say with a mask which count"
            )
        return tokens

    def _floats(
        self, where: str, name: str, array: Array, shape: tuple[int, ...], mask: np.ndarray | None
    ) -> np.ndarray:
        """In the trace's dtype, finite where `mask` (None: everywhere), 0 elsewhere."""
        found = typed(where, name, array, self.dtype)
        same_shape(where, name, found, shape, "the step's rows")
        found = found if mask is None else np.where(mask, found, np.zeros_like(found))
        check_finite(where, name, found)
        return found

    def _named(self, where: str, name: str, tensors: Tensors) -> dict[str, np.ndarray]:
        found = {key: typed(where, f"{name}: {key}", one, self.dtype) for key, one in tensors.items()}
        for key, one in found.items():
            check_finite(where, f"{name}: {key}", one)
        return found


def _made(values: np.ndarray, layout: str, mask: str | None = None) -> Recorded:
    return Recorded(values=values, layout=layout, mask=mask)


def _given(values: np.ndarray, layout: str) -> Recorded:
    return Recorded(values=values, layout=layout, phase="given")


def _probe(
    role: str,
    tokens: np.ndarray,
    attention: np.ndarray,
    first: int,
    arrays: Mapping[str, np.ndarray],
    num_tokens: float,
) -> dict[str, Recorded]:
    """The batch of the recorded update is the probe batch: a foreign run computes gradients of nothing else."""
    whole = {"tokens": tokens, "attention": attention, "positions": positions_of(attention)}
    whole |= {f"arrays/{name}": array for name, array in arrays.items()}
    fields = {f"{role}/probe/{name}": _given(array, "batch time") for name, array in whole.items()}
    fields[f"{role}/probe/first"] = _given(np.array(first, np.int64), "")
    fields[f"{role}/probe/denominators/num_tokens"] = _given(np.array(num_tokens, np.float64), "")
    return fields
