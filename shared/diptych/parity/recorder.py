"""The recorder: keeps what a run computes, step by step, and in a replay feeds it what another run recorded.

It implements `diptych.stages.recording.Recorder`; the names that it writes are those of `diptych.parity.steps`. A run
that is recorded is the run: nothing that is recorded changes what it trains on. Beside it, on a few rows (the probe
batch), gradients, outputs and taps are taken from a pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from diptych import random
from diptych.data.batches import join
from diptych.engine import (
    Completions,
    Loss,
    Metrics,
    Model,
    OptimizerState,
    PromptBatch,
    Taps,
    Tensors,
    TokenBatch,
    TrainBatch,
)  # fmt: skip
from diptych.errors import UserError
from diptych.families.family import read_model
from diptych.families.taps import taps
from diptych.parity.trace import Phase, Recorded, Step
from diptych.stages.recording import NoRecorder
from diptych.stages.rl import Scored
from diptych.stages.rollout import Rollout

Depth = Literal["metrics", "tensors", "layers", "ops"]
PROBE_ROWS = 8
PERTURBATION = 0.3  # standard deviation of the noise on old log-probabilities and values: well past a clip of 0.2
PERTURBED = ("old_logprobs", "old_values")
# Of the first update's metrics: what is not a mean over its tokens, and would only repeat the policy rung.
NOT_OF_UPDATE = ("loss", "grad_norm", "policy/ratio_deviation_max")


class StepRecorder(NoRecorder):
    """sink: gets every finished step. source: (stage, step) -> what another run recorded of it, None where it did not;
    None: no replay. every: tensors of every so many-th step, the first included. fresh: also the loss on this side's
    own unperturbed log-probabilities (ROLE/fresh_loss), which proves next to nothing: for the self-test to show that.
    """

    def __init__(
        self,
        sink: Callable[[Step], None],
        *,
        seed: int,
        depth: Depth = "tensors",
        every: int = 1,
        source: Callable[[str, int], Step | None] | None = None,
        fresh: bool = False,
    ) -> None:
        self.replays = source is not None
        self._sink = sink
        self._source = source
        self._seed = seed
        self._depth: Depth = depth
        self._every = every
        self._fresh = fresh
        self._step: Step | None = None
        self._given: Step | None = None
        self._updated: set[str] = set()

    @property
    def watches(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """In a step whose tensors are kept: each is to be the doing of its own program."""
        return self._step is not None and self._has_tensors

    # Hooks of the stages, in the order in which they are called.

    def wants(self, stage: str, step: int) -> bool:
        return self._source is None or self._source(stage, step) is not None

    def begin(self, stage: str, step: int, models: Mapping[str, Model]) -> None:
        self._step = Step(stage=stage, step=step)
        self._given = None if self._source is None else self._source(stage, step)
        self._updated = set()
        if not self._has_tensors:
            return
        for role, model in models.items():
            if self._given is not None:
                put_state(role, model, self._given)
            state = model.optimizer_state()
            self._keep(f"{role}/start/weights", trained_weights(model), "as stored", phase="given")
            self._keep(f"{role}/start/first", state.first, "as stored", phase="given")
            self._keep(f"{role}/start/second", state.second, "as stored", phase="given")
            self._step.metrics[f"{role}/step"] = float(state.step)

    def batch(self, batch: TrainBatch) -> None:
        if self._has_tensors:
            both = {"tokens": batch.tokens.tokens, "attention": batch.tokens.attention}
            self._keep("batch", both, "batch time")

    def rolled_out(self, rollout: Rollout, rows: Sequence[int]) -> Rollout:
        if not self._has_tensors:
            return rollout
        done = rollout.completions
        self._keep("", {"rows": np.asarray(rows, np.int64)}, "rows")
        prompts = {"tokens": rollout.prompts.tokens, "attention": rollout.prompts.attention}
        self._keep("prompts", prompts, "rows prompt")
        sampled = {"tokens": done.tokens, "mask": done.mask, "margins": done.margins, "logprobs": done.logprobs}
        self._keep("response", sampled, "rows new", mask="response/mask")
        self._keep("response", {"finish": done.finish}, "rows")
        if self._given is not None:
            rollout = given_rollout(rollout, self._given)
        used = {"tokens": rollout.completions.tokens, "mask": rollout.completions.mask}
        self._keep("used", used, "rows new")
        self._keep("used", {"finish": rollout.completions.finish}, "rows")
        return rollout

    def scored(self, scored: Scored, shape: Callable[[Scored], Scored]) -> Scored:
        if not self._has_tensors:
            return scored
        mask = "used/mask"
        self._keep("", {"scores": scored.scores}, "rows")
        outputs = {"logprobs": scored.logprobs, "ref_logprobs": scored.ref_logprobs}
        self._keep("", outputs, "rows new", mask=mask)
        values = scored.values
        if self._given is not None:  # from here on equal inputs
            kind = scored.logprobs.dtype
            given = {
                name: self._given.array(name).astype(kind) for name in ("logprobs", "ref_logprobs", "values", "scores")
            }
            scored = shape(replace(scored, **given))
        made = scored.experience
        slots = made.value_mask | made.policy_mask | scored.rollout.completions.mask
        self._keep("used", {"slots": slots}, "rows new")
        self._keep("", {"values": values}, "rows new", mask="used/slots")
        self._keep("", {"kl": made.kl_per_response}, "rows")
        self._keep("", {"shaped": made.rewards}, "rows new")
        self._keep("", {"policy_mask": made.policy_mask, "value_mask": made.value_mask}, "rows new")
        self._keep("", {"returns": made.returns}, "rows new", mask="value_mask")
        self._keep("", {"advantages": made.advantages}, "rows new", mask="policy_mask")
        if self._given is None:
            return scored
        names = ("returns", "advantages", "policy_mask", "value_mask")
        taken = {name: self._given.array(name).astype(getattr(made, name).dtype) for name in names}
        return replace(scored, made=replace(made, rewards=self._given.array("shaped").astype(kind), **taken))

    def update(self, role: str, model: Model, loss: Loss, batch: TrainBatch, *, learning_rate: float) -> Metrics:
        if not self._has_tensors or role in self._updated:
            return model.update(loss, batch, learning_rate=learning_rate)
        self._updated.add(role)
        step = self._current
        probe = self._probe_batch(role, batch, model.spec.micro_batch_size, loss.group)
        self._look(role, model, loss, probe)
        made = model.update(loss, batch, learning_rate=learning_rate)
        step.metrics[f"{role}/grad_norm"] = made["grad_norm"]
        step.metrics[f"{role}/learning_rate"] = learning_rate
        kept = {name: value for name, value in made.items() if name not in NOT_OF_UPDATE}
        step.metrics.update({f"{role}/update/{name}": value for name, value in kept.items()})
        state = model.optimizer_state()
        self._keep(f"{role}/first", state.first, "as stored")
        self._keep(f"{role}/second", state.second, "as stored")
        self._keep(f"{role}/weights", trained_weights(model), "as stored")
        after = {"next_outputs": outputs_of(model, loss, probe.tokens)}
        self._keep(role, after, "batch time", mask=f"{role}/probe/attention")
        return made

    def end(self, stage: str, step: int, metrics: Metrics, evaluation: Metrics) -> None:
        del stage, step
        if self._has_tensors:  # what was logged of the later updates is not this step's own doing
            updates = ("loss/", "policy/", "val/", "grad_norm", "lr", "router/")
            metrics = {name: value for name, value in metrics.items() if not name.startswith(updates)}
            evaluation = {}
        finished = self._current
        finished.metrics.update(metrics | evaluation)
        self._step = None
        self._sink(finished)

    # What they are made of.

    @property
    def _current(self) -> Step:
        assert self._step is not None, "begin comes first"
        return self._step

    @property
    def _has_tensors(self) -> bool:
        if self._given is not None:
            return True
        return self._depth != "metrics" and self._current.step % self._every == 0

    def _keep(
        self,
        group: str,
        arrays: Mapping[str, np.ndarray],
        layout: str,
        *,
        mask: str | None = None,
        phase: Phase = "made",
    ) -> None:
        """Copies: the engine may go on in the same memory."""
        start = f"{group}/" if group else ""
        for name, values in arrays.items():
            own = None if mask == start + name else mask
            kept = Recorded(values=np.array(values), layout=layout, mask=own, phase=phase)
            self._current.tensors[start + name] = kept

    def _probe_batch(self, role: str, batch: TrainBatch, micro: int, group: int) -> TrainBatch:
        """A few rows of the first mini-batch, as if older weights had made them; of a replay, the given ones."""
        if self._given is not None:
            probe = given_probe(self._given, role)
        else:
            probe = perturbed(first_rows(batch, micro, group), self._seed, self._current.step)
        tokens = {name: getattr(probe.tokens, name) for name in ("tokens", "attention", "positions")}
        self._keep(f"{role}/probe", tokens, "batch time", phase="given")
        self._keep(f"{role}/probe", {"first": np.asarray(probe.tokens.first, np.int64)}, "", phase="given")
        self._keep(f"{role}/probe/arrays", probe.arrays, "batch time", phase="given")
        denominators = {name: np.asarray(value, np.float64) for name, value in probe.denominators.items()}
        self._keep(f"{role}/probe/denominators", denominators, "", phase="given")
        return probe

    def _look(self, role: str, model: Model, loss: Loss, probe: TrainBatch) -> None:
        """Outputs, loss, gradients and taps of the probe batch."""
        mask = f"{role}/probe/attention"
        outputs = outputs_of(model, loss, probe.tokens)
        self._keep(role, {"outputs": outputs}, "batch time", mask=mask)
        if self._depth in ("layers", "ops"):
            forced = None if self._given is None else given_taps(self._given, role)
            free = model.probe(loss, probe, depth=self._depth)
            metrics, gradients = free.metrics, free.gradients
            seen = free if forced is None else model.probe(loss, probe, depth=self._depth, forced=forced)
            layouts = taps(read_model(model.spec.config), model.spec.head, self._depth)
            for name, layout in layouts.items():
                self._keep(f"{role}/taps", {name: seen.taps.values[name]}, layout, mask=mask)
                self._keep(f"{role}/tap_gradients", {name: seen.taps.gradients[name]}, layout, mask=mask)
            if forced is not None:
                self._keep(f"{role}/forced_gradient", seen.gradients, "as stored")
        else:
            metrics, gradients = model.evaluate(loss, probe), model.gradients(loss, probe)
        self._keep(f"{role}/gradient", gradients, "as stored")
        if self._fresh and "old_logprobs" in probe.arrays:
            own = replace(probe, arrays={**probe.arrays, "old_logprobs": outputs})
            self._current.metrics[f"{role}/fresh_loss"] = model.evaluate(loss, own)["loss"]
        self._current.metrics[f"{role}/loss"] = metrics["loss"]
        kept = {name: value for name, value in metrics.items() if name != "loss"}
        self._current.metrics.update({f"{role}/loss/{name}": value for name, value in kept.items()})


def trained_weights(model: Model) -> Tensors:
    """What an update changes: the model's tensors, or its adapter's."""
    return model.weights() if model.spec.adapter is None else model.adapter_weights()


def outputs_of(model: Model, loss: Loss, batch: TokenBatch) -> np.ndarray:
    """What the loss reads: log-probabilities at its temperature, or scores."""
    if loss.reads == "logprobs":
        return model.logprobs(batch, temperature=loss.temperature)
    return model.scores(batch)


def first_rows(batch: TrainBatch, micro: int, group: int) -> TrainBatch:
    """Up to 8 rows, in whole micro-batches where those are smaller, and in whole groups. The denominators stay those of
    the step."""
    count = min(len(batch.tokens), PROBE_ROWS if micro >= PROBE_ROWS else micro * (PROBE_ROWS // micro))
    count -= count % group
    rows = slice(0, count)
    return replace(
        batch, tokens=batch.tokens.take(rows), arrays={name: array[rows] for name, array in batch.arrays.items()}
    )


def perturbed(batch: TrainBatch, seed: int, step: int) -> TrainBatch:
    """The batch with keyed normal noise on old log-probabilities and values: ratios leave 1, both clips work."""
    arrays = dict(batch.arrays)
    for name in PERTURBED:
        if name in arrays:
            draws = random.generator(seed, f"parity/perturbation/{name}", step=step)
            noise = draws.standard_normal(arrays[name].shape) * PERTURBATION
            arrays[name] = (arrays[name] + noise).astype(arrays[name].dtype)
    return replace(batch, arrays=arrays)


# What a replay is given.


def put_state(role: str, model: Model, given: Step) -> None:
    """Start where the recorded run started: its weights, moments and count of updates."""
    weights = given.under(f"{role}/start/weights")
    if not weights:
        raise UserError(f"{given.name}: the trace holds no {role}/start/weights: record it again at depth tensors")
    if model.spec.adapter is None:
        model.load_weights(weights)
    else:
        model.load_adapter(weights)
    first, second = (given.under(f"{role}/start/{name}") for name in ("first", "second"))
    if first:  # a foreign trace may begin without
        model.load_optimizer_state(OptimizerState(step=int(given.metrics[f"{role}/step"]), first=first, second=second))


def given_rollout(own: Rollout, given: Step) -> Rollout:
    """The recorded responses to the recorded prompts."""
    tokens, mask = given.array("prompts/tokens"), given.array("prompts/attention")
    if tokens.shape != own.prompts.tokens.shape:
        raise UserError(
            f"{given.name}: the trace has prompts {list(tokens.shape)}, this recipe makes "
            f"{list(own.prompts.tokens.shape)}: replay it with the recipe and data that it was recorded with (diptych "
            "parity doctor says what differs)"
        )
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    prompts = PromptBatch(tokens=tokens, attention=mask, positions=positions)
    kind = own.completions.logprobs.dtype
    completions = Completions(
        tokens=given.array("used/tokens"),
        mask=given.array("used/mask"),
        logprobs=given.array("response/logprobs").astype(kind),
        margins=given.array("response/margins").astype(kind),
        finish=given.array("used/finish"),
    )
    return replace(own, prompts=prompts, completions=completions, tokens=join(prompts, completions))


def given_probe(given: Step, role: str) -> TrainBatch:
    """The recorded probe batch."""
    return TrainBatch(
        tokens=TokenBatch(
            tokens=given.array(f"{role}/probe/tokens"),
            attention=given.array(f"{role}/probe/attention"),
            positions=given.array(f"{role}/probe/positions"),
            first=int(given.array(f"{role}/probe/first")),
        ),
        arrays=given.under(f"{role}/probe/arrays"),
        denominators={name: float(value) for name, value in given.under(f"{role}/probe/denominators").items()},
    )


def given_taps(given: Step, role: str) -> Taps:
    """The recorded taps, to be forced."""
    values, gradients = given.under(f"{role}/taps"), given.under(f"{role}/tap_gradients")
    if not values:
        raise UserError(f"{given.name}: the trace holds no taps: record it again with --depth layers or ops")
    return Taps(values=values, gradients=gradients)
