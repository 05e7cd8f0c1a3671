"""A foreign trace's step gone through on one of our engines: every rung from the foreign side's numbers.

Models are built from the trace alone (config.json, weights, moments); responses, scores, log-probabilities, values and
masks are given, and what the engine computes of them is written under the same names. There is no sampling: no engine
can draw a foreign generator's tokens again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.algorithms.dialects import experience
from diptych.algorithms.losses import ppo_policy_loss, ppo_value_loss, sft_loss
from diptych.engine import (
    Engine,
    EngineSettings,
    Loss,
    Model,
    ModelSpec,
    OptimizerSpec,
    OptimizerState,
    Tensors,
    TokenBatch,
    TrainBatch,
    load_engine,
)
from diptych.errors import UserError
from diptych.parity.foreign.terms import terms_of
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter
from diptych.run.environment import describe_environment
from diptych.run.progress import Progress

# What the engine does not compute: the tokens, and what a reward model or a generator gave.
FED = ("rows", "prompts/", "response/", "used/", "scores", "batch/", "reference/start/")


def record_foreign(trace: Trace, *, engine: str, output: Path) -> Trace:
    """Every step of a foreign trace as one of our engines computes it; the trace of that, in `output`, a new folder.

    Raises UserError for settings that a replay needs and the trace does not tell.
    """
    settings = trace.provenance["settings"]
    needed = ("betas", "temperature", "clip_range", "value_clip_range", "value_coef")
    is_rl = any(stage == "rl" for stage, _ in trace.steps)
    missing = [name for name in (needed if is_rl else needed[:1]) if name not in settings]
    if missing:
        raise UserError(
            f"{trace.directory / 'trace.json'}: provenance.settings does not tell {', '.join(missing)}, which a replay "
            "needs: give them to Recording(settings=...)"
        )
    ours = load_engine(engine, EngineSettings(precision=trace.producer["precision"]))
    about = {
        **trace.provenance,
        "engine": engine,
        "environment": describe_environment(ours.environment()),
        "replay": {"trace": trace.fingerprint(), "producer": trace.producer.get("name")},
    }
    producer = {"name": engine, "precision": trace.producer["precision"]}
    with (
        TraceWriter(output, producer=producer, provenance=about) as writer,
        Progress(len(trace.steps), "replay") as bar,
    ):
        for step in trace:
            writer.add(replay(trace, step, ours))
            bar.advance()
    return Trace(output)


def replay(trace: Trace, step: Step, engine: Engine) -> Step:
    """The step as `engine` computes it, with nothing in it that the foreign side did not record."""
    found: dict[str, Any] = {name: one.values for name, one in step.tensors.items() if is_given(name, one)}
    scalars: dict[str, float] = {}
    settings = trace.provenance["settings"]
    if step.stage == "rl":
        found |= _scored(trace, step, engine)
    for role, loss in losses(settings).items():
        if f"{role}/probe/tokens" in step.tensors:
            arrays, numbers = _updated(trace, step, engine, role, loss)
            found, scalars = found | arrays, scalars | numbers
    tensors = {name: replace(one, values=found[name]) for name, one in step.tensors.items() if name in found}
    lost = step.tensors.keys() - tensors.keys()
    assert not lost, f"nothing computes {sorted(lost)}"
    metrics = {name: scalars[name] for name in step.metrics if name in scalars}
    return replace(step, tensors=tensors, metrics=metrics)


def is_given(name: str, one: Recorded) -> bool:
    return one.phase == "given" or name.startswith(FED)


def losses(settings: Mapping[str, Any]) -> dict[str, Loss]:
    """The losses of each role under the trace's settings."""
    found = {"model": Loss(function=sft_loss, reads="logprobs")}
    if "clip_range" in settings:
        found["policy"] = Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", settings["clip_range"]),),
            temperature=settings["temperature"],
            entropy=True,
        )
        clip = settings["value_clip_range"]
        options = (("value_clip_range", clip), ("value_coef", settings["value_coef"]))
        found["critic"] = Loss(function=ppo_value_loss, reads="scores", options=options)
    return found


def model_of(trace: Trace, step: Step, engine: Engine, role: str, *, weights: Tensors | None = None) -> Model:
    """The role's model as the recorded step started it."""
    about = trace.provenance["models"]["sft" if role == "model" else role]
    settings = trace.provenance["settings"]
    named = {name: settings[name] for name in ("eps", "weight_decay", "max_grad_norm") if name in settings}
    beta1, beta2 = settings["betas"]
    weights = step.under(f"{role}/start/weights") if weights is None else weights
    kind = engine.settings.precision
    spec = ModelSpec(
        config=about["config"],
        weights={name: value.astype(kind) for name, value in weights.items()},
        head=about["head"],
        optimizer=OptimizerSpec(name="adamw", beta1=beta1, beta2=beta2, **named),
        micro_batch_size=len(step.array("used/tokens" if step.stage == "rl" else "batch/tokens")),
    )
    model = engine.model(spec)
    first, second = (step.under(f"{role}/start/{name}") for name in ("first", "second"))
    if first:
        model.load_optimizer_state(OptimizerState(step=int(step.metrics[f"{role}/step"]), first=first, second=second))
    return model


def token_batch(step: Step) -> TokenBatch:
    """Prompts and responses of all rows."""
    tokens = np.concatenate([step.array("prompts/tokens"), step.array("used/tokens")], axis=1)
    attention = np.concatenate([step.array("prompts/attention"), step.array("used/mask")], axis=1)
    positions = np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32)
    return TokenBatch(
        tokens=tokens, attention=attention, positions=positions, first=step.array("prompts/tokens").shape[1]
    )


def train_batch(step: Step, role: str) -> TrainBatch:
    """The batch of the recorded update."""
    parts = step.under(f"{role}/probe")
    whole = {name: parts[name] for name in ("tokens", "attention", "positions")}
    return TrainBatch(
        tokens=TokenBatch(**whole, first=int(parts["first"])),
        arrays=step.under(f"{role}/probe/arrays"),
        denominators={name: float(value) for name, value in step.under(f"{role}/probe/denominators").items()},
    )


def _scored(trace: Trace, step: Step, engine: Engine) -> dict[str, np.ndarray]:
    """Log-probabilities, values, and what the dialect makes of the *recorded* ones."""
    settings = trace.provenance["settings"]
    batch, temperature = token_batch(step), settings["temperature"]
    first, new = batch.first, step.array("used/tokens").shape[1]
    policy = model_of(trace, step, engine, "policy")
    found = {"logprobs": policy.logprobs(batch, temperature=temperature)[:, first:]}
    if weights := trace.read(*trace.steps[0]).under("reference/start/weights"):
        reference = model_of(trace, step, engine, "policy", weights=weights)
        found["ref_logprobs"] = reference.logprobs(batch, temperature=temperature)[:, first:]
    elif "ref_logprobs" in step.tensors:
        found["ref_logprobs"] = step.array("ref_logprobs")  # its weights are not known
    if "values" in step.tensors:
        values = model_of(trace, step, engine, "critic").scores(batch)[:, first - 1 : first - 1 + new]
        found["values"] = values
    terms = terms_of(trace.provenance)
    if terms is None or "values" not in step.tensors:
        return found
    kind = step.array("logprobs").dtype
    ended = step.array("used/finish").astype(bool)
    made = experience(
        terms.dialect,
        logprobs=step.array("logprobs"),
        ref_logprobs=step.array("ref_logprobs"),
        values=step.array("values"),
        scores=step.array("scores") - (terms.missing_eos_penalty * ~ended).astype(kind),
        mask=step.array("used/mask"),
        ended=ended,
        **terms.options,
    )
    return found | {
        "kl": made.kl_per_response,
        "shaped": made.rewards,
        "returns": made.returns,
        "advantages": made.advantages,
        "policy_mask": made.policy_mask,
        "value_mask": made.value_mask,
    }


def _updated(
    trace: Trace, step: Step, engine: Engine, role: str, loss: Loss
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Gradients, and one optimizer step, on the recorded batch."""
    model, batch = model_of(trace, step, engine, role), train_batch(step, role)
    arrays: dict[str, np.ndarray] = {}
    if loss.reads == "logprobs":
        arrays[f"{role}/outputs"] = model.logprobs(batch.tokens, temperature=loss.temperature)
    arrays |= {f"{role}/gradient/{name}": value for name, value in model.gradients(loss, batch).items()}
    rate = step.metrics[f"{role}/learning_rate"]
    metrics = model.update(loss, batch, learning_rate=rate)
    state = model.optimizer_state()
    for group, tensors in (("first", state.first), ("second", state.second), ("weights", model.weights())):
        arrays |= {f"{role}/{group}/{name}": value for name, value in tensors.items()}
    if loss.reads == "logprobs":
        arrays[f"{role}/next_outputs"] = model.logprobs(batch.tokens, temperature=loss.temperature)
    scalars = {f"{role}/loss/{name}": value for name, value in metrics.items() if name not in ("loss", "grad_norm")}
    scalars |= {f"{role}/{name}": metrics[name] for name in ("loss", "grad_norm")}
    return arrays, scalars | {f"{role}/learning_rate": rate, f"{role}/step": float(state.step - 1)}
