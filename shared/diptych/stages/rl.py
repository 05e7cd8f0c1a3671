"""Stage 3, PPO: rollout, score, shape, update; actor and critic trained, reference and reward frozen.

Down into the engine for tokens, log-probabilities and scores; up once; rewards, advantages and masks in NumPy; down
again for the updates. The formulas are in `diptych.algorithms`, the run-time invariants in `invariants.py`.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diptych import random
from diptych.algorithms.dialects import DIALECTS, Experience, experience
from diptych.algorithms.importance import importance_metrics, importance_weights
from diptych.algorithms.losses import ppo_policy_loss, ppo_value_loss
from diptych.data.batches import order
from diptych.data.examples import PromptExample
from diptych.engine import Loss, Metrics, TrainBatch
from diptych.errors import InvariantError
from diptych.parity.tolerances import coarser
from diptych.recipe.schema import RLRecipe
from diptych.run.metrics import MetricsLogger
from diptych.run.progress import Progress
from diptych.stages.checkpoints import Checkpoints
from diptych.stages.context import NUM_SAMPLES, Clock, StageContext, schedule
from diptych.stages.gate import Gate, check_gate
from diptych.stages.invariants import check_first_ratio, check_reference, check_sampler_gap
from diptych.stages.reading import Reading
from diptych.stages.rl_models import Models, build_models
from diptych.stages.rollout import Rollout, Sampler, roll_out, sampling_of


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A rollout with everything that was computed about it; arrays [rows, new], response-aligned. logprobs: the old
    ones of the ratio. trainer_logprobs: by the training forward; None where the sampler's are the old ones. made: what
    the dialect makes of them (`PPO.shape`). weights: of truncated importance sampling, where there is."""

    rollout: Rollout
    reading: Reading
    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    trainer_logprobs: np.ndarray | None = None
    made: Experience | None = None
    weights: np.ndarray | None = None

    @property
    def experience(self) -> Experience:
        assert self.made is not None, "PPO.shape comes first"
        return self.made


@dataclass
class Timer:
    """Seconds by phase of one iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_rl(context: StageContext) -> dict[str, Any]:
    """Train the policy by PPO, leave models/rl, rl-critic and (where kept) rl-ema, and return the stage's summary."""
    models = build_models(context)
    with models.server or nullcontext():
        return _train(context, PPO(context, models))


def _train(context: StageContext, ppo: PPO) -> dict[str, Any]:
    settings, models = context.recipe.rl, ppo.models
    split = context.datasets.prompts
    assert split is not None, "the pipeline reads the data of every stage that it runs"
    checkpoints = Checkpoints(context, "rl", {"policy": models.policy, "critic": models.critic})
    start, progress = checkpoints.load()
    ppo.updates = start * settings.epochs * settings.mini_batches
    clock = Clock(before=progress.get("seconds", 0.0))
    generated = int(progress.get("generated_tokens", 0))
    before: Metrics = progress.get("eval_before", {})
    latest: Metrics = progress.get("eval_latest", {})
    last_kl = float(progress.get("kl", 0.0))
    truncated = int(progress.get("truncated_readings", 0))
    held_out = split.held_out[: settings.eval_prompts]

    with (
        MetricsLogger(context.run, "rl", resume_from=start) as logger,
        Progress(settings.iterations, "rl", initial=start, silent=not context.run.world.is_main) as bar,
        checkpoints,
    ):
        if context.recipe.rollout.gate and start < settings.iterations:
            ppo.gate(split.train)
        if start == 0:
            before = latest = ppo.evaluate(held_out, when="before")
            logger.log(0, before)
        for iteration in range(start, settings.iterations):
            if not context.recorder.wants("rl", iteration):
                continue
            prompts = ppo.prompts(split.train, iteration)
            metrics, tokens = ppo.iterate(prompts, iteration)
            generated += tokens
            last_kl = metrics["objective/kl"]
            truncated += int(metrics.get("reading/truncated", 0))
            done = iteration + 1
            evaluation: Metrics = {}
            if (done % settings.eval_every == 0 and not context.recorder.replays) or done == settings.iterations:
                when = "after" if done == settings.iterations else None
                evaluation = latest = ppo.evaluate(held_out, when=when)
            metrics["episode"] = float(done * settings.batch_size * settings.samples_per_prompt)
            logger.log(done, metrics | evaluation)
            context.recorder.end("rl", iteration, metrics, evaluation)
            bar.advance(
                tokens=tokens,
                shown={"score": metrics["objective/scores"], "kl": last_kl, "eval": latest["eval/score"]},
            )
            every = context.recipe.checkpoint.every
            if every and (done % every == 0 or done == settings.iterations):
                state = {
                    "seconds": clock.seconds(),
                    "generated_tokens": generated,
                    "eval_before": before,
                    "eval_latest": latest,
                    "kl": last_kl,
                    "truncated_readings": truncated,
                }
                checkpoints.save(done, state)

    context.save_trained("rl", models.policy_checkpoint, models.policy, role="policy")
    origin = "reward_model" if "reward_model" in context.model_directories else "policy"
    context.save_trained("rl-critic", models.critic_checkpoint, models.critic, role=origin)
    if settings.ema_decay is not None:
        context.save_trained("rl-ema", models.policy_checkpoint, models.policy, role="policy", ema=True)
    read = {} if context.reader is None else {"reward_reads": "retokenised text", "truncated_readings": truncated}
    return read | {
        "eval_score_before": before["eval/score"],
        "eval_score_after": latest["eval/score"],
        "eval_reward_before": before["eval/reward"],
        "eval_reward_after": latest["eval/reward"],
        "kl": latest["eval/kl"],
        "kl_last_rollout": last_kl,
        "kl_bound": settings.max_kl,
        "iterations": settings.iterations,
        "generated_tokens": generated,
        "seconds": clock.seconds(),
        "data": split.report,
    }


class PPO:
    """One PPO run's fixed parts, and an iteration of it."""

    def __init__(self, context: StageContext, models: Models) -> None:
        self.context = context
        self.models = models
        self.recipe = context.recipe
        self.settings = settings = context.recipe.rl
        self.sampling = sampling_of(self.recipe, context.tokenizer)
        self.dialect = DIALECTS[settings.dialect]
        self.updates = 0  # optimizer steps of the policy so far
        num_updates = settings.iterations * settings.epochs * settings.mini_batches
        self.policy_rate = schedule(settings.learning_rate, settings.optimizer, num_updates)
        critic_peak = settings.learning_rate if settings.critic_learning_rate is None else settings.critic_learning_rate
        self.critic_rate = schedule(critic_peak, settings.optimizer, num_updates)
        self.policy_loss = Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", settings.clip_range),),
            temperature=self.sampling.scoring_temperature,
            entropy=True,
            balance=context.balance(models.policy_checkpoint.model),
        )
        self.value_loss = Loss(
            function=ppo_value_loss,
            reads="scores",
            options=(("value_clip_range", settings.value_clip_range), ("value_coef", settings.value_coef)),
            balance=context.balance(models.critic_checkpoint.model),
        )

    @property
    def sampler(self) -> Sampler:
        """What generates: the server where there is one, else the policy itself."""
        return self.models.policy if self.models.server is None else self.models.server

    def prompts(self, train: Sequence[PromptExample], iteration: int) -> list[PromptExample]:
        """The prompts of an iteration, each `samples_per_prompt` times in a row."""
        settings = self.settings
        chosen = order(
            len(train), seed=self.recipe.seed, purpose="rl/order",
            start=iteration * settings.batch_size, count=settings.batch_size,
        )  # fmt: skip
        return [train[int(index)] for index in chosen for _ in range(settings.samples_per_prompt)]

    def iterate(self, prompts: Sequence[PromptExample], iteration: int) -> tuple[Metrics, int]:
        """One iteration: the metrics to log, and the number of generated tokens."""
        recorder = self.context.recorder
        timer = Timer()
        began = time.perf_counter()
        compiled = self.context.engine.compilations()
        metrics = self.sampler.rollout_metrics()  # of an evaluation before
        recorder.begin("rl", iteration, {"policy": self.models.policy, "critic": self.models.critic})
        with timer.phase("rollout"):
            rollout = self.roll_out(prompts, purpose="rl/rollout", step=iteration)
            rollout = recorder.rolled_out(rollout, row_ids(prompts))
        switched = self.sampler.rollout_metrics()
        timer.seconds["rollout"] -= switched.get("timing_s/switch", 0.0)
        metrics |= switched
        with timer.phase("score"):
            scored = recorder.scored(self.score(rollout, prompts, iteration), self.shape)
        metrics |= self.describe(scored)
        is_own = not recorder.replays
        gap = metrics.get("rollout/logprob_gap_max")
        if is_own and gap is not None and (self.models.server is None or self.settings.importance_cap is None):
            check_sampler_gap(gap, rollout, self.recipe.precision, iteration)
        if is_own and iteration == 0:
            check_reference(scored.logprobs, scored.ref_logprobs, rollout.completions.mask, self.recipe.precision)
        if self.settings.max_kl is not None and metrics["objective/kl"] > self.settings.max_kl:
            raise InvariantError(
                f"rl iteration {iteration + 1}: mean KL to the reference is {metrics['objective/kl']:.3f} nats per "
                f"response, above rl.max_kl = {self.settings.max_kl}: raise rl.kl_coef, lower rl.learning_rate, or "
                f"raise the bound"
            )
        with timer.phase("update"):
            metrics |= self.update(scored, iteration)
        tokens = int(rollout.completions.mask.sum())
        seconds = time.perf_counter() - began
        metrics |= {f"timing_s/{name}": value for name, value in timer.seconds.items()}
        metrics["timing_s/iteration"] = seconds
        if (made := self.context.engine.compilations()) is not None and compiled is not None:
            metrics["compilations"] = float(made - compiled)
        metrics["eps"] = len(prompts) / seconds
        metrics["tokens_per_second"] = tokens / timer.seconds["rollout"]
        return metrics, tokens

    def score(self, rollout: Rollout, prompts: Sequence[PromptExample], iteration: int) -> Scored:
        """Log-probabilities of actor and reference, values, scores, and what the dialect makes of them."""
        models = self.models
        temperature = self.sampling.scoring_temperature
        trainer_logprobs = None
        if iteration == 0 or not self._takes_samplers:
            trainer_logprobs = rollout.of_response(models.policy.logprobs(rollout.tokens, temperature=temperature))
        logprobs = rollout.completions.logprobs if trainer_logprobs is None else trainer_logprobs
        ref_logprobs = rollout.of_response(models.reference.logprobs(rollout.tokens, temperature=temperature))
        reading = models.read(rollout, prompts)
        values = reading.values(models.critic.scores(reading.tokens))
        scores = np.asarray(models.score(rollout, reading, prompts), dtype=logprobs.dtype)
        return self.shape(
            Scored(
                rollout=rollout,
                reading=reading,
                logprobs=logprobs,
                ref_logprobs=ref_logprobs,
                values=values,
                scores=scores,
                trainer_logprobs=trainer_logprobs,
            )
        )

    @property
    def _takes_samplers(self) -> bool:
        """Are the sampler's log-probabilities the old ones of the ratio, once the first iteration has compared them
        with the trainer's? From then on the ratios of every first mini-batch compare them (`check_first_ratio`)."""
        settings, wanted = self.settings, self.settings.old_logprobs
        if wanted == "auto":
            is_own = self.models.server is None and settings.importance_cap is None
            wanted = "sampler" if is_own and self.recipe.precision != "bfloat16" else "trainer"
        return wanted == "sampler" and not self.context.recorder.watches

    def shape(self, scored: Scored) -> Scored:
        """What the dialect makes of the numbers of a rollout: rewards, returns, advantages, masks."""
        settings, rollout = self.settings, scored.rollout
        done, cap = rollout.completions, settings.importance_cap
        made = experience(
            self.dialect,
            logprobs=scored.logprobs,
            ref_logprobs=scored.ref_logprobs,
            values=scored.values,
            scores=self._penalised(scored.scores, rollout),
            mask=done.mask,
            ended=rollout.ended,
            **experience_settings(settings),
        )
        weights = None if cap is None else importance_weights(scored.logprobs, done.logprobs, done.mask, cap=cap)
        return replace(scored, made=made, weights=weights)

    def update(self, scored: Scored, iteration: int) -> Metrics:
        """All optimizer steps on one rollout. Metrics are means over the steps; norms too."""
        settings, recorder = self.settings, self.context.recorder
        rows = len(scored.scores)
        size = rows // settings.mini_batches
        per_step: list[Metrics] = []
        for epoch in range(settings.epochs):
            turn = iteration * settings.epochs + epoch
            shuffled = random.permutation(self.recipe.seed, "rl/mini_batches", rows, step=turn)
            for index in range(settings.mini_batches):
                chosen = np.sort(shuffled[index * size : (index + 1) * size])
                step = turn * settings.mini_batches + index
                policy = recorder.update(
                    "policy",
                    self.models.policy,
                    self.policy_loss,
                    self.policy_batch(scored, chosen),
                    learning_rate=self.policy_rate(step),
                )
                self.updates += 1
                if not per_step and not recorder.replays:
                    check_first_ratio(policy["policy/ratio_deviation_max"], self.recipe.precision, iteration)
                critic = recorder.update(
                    "critic",
                    self.models.critic,
                    self.value_loss,
                    self.value_batch(scored, chosen),
                    learning_rate=self.critic_rate(step),
                )
                policy["grad_norm/policy"] = policy.pop("grad_norm")
                critic["grad_norm/critic"] = critic.pop("grad_norm")
                policy.pop("loss")
                critic.pop("loss")
                critic = {f"{name}_critic" if name.startswith("router/") else name: critic[name] for name in critic}
                per_step.append(policy | critic | {"lr": self.policy_rate(step), "lr_critic": self.critic_rate(step)})
        first_deviation = per_step[0]["policy/ratio_deviation_max"]
        deviation = max(metrics["policy/ratio_deviation_max"] for metrics in per_step)
        metrics = {name: float(np.mean([row[name] for row in per_step])) for name in per_step[0]}
        metrics["policy/ratio_deviation_max"] = deviation
        metrics["policy/first_ratio_deviation_max"] = first_deviation
        # The variance over response tokens, taken around 1 so that nothing cancels at ratios near 1.
        metrics["val/ratio_var"] = max(0.0, metrics.pop("val/ratio_excess_square") - (metrics["val/ratio"] - 1) ** 2)
        return metrics

    def policy_batch(self, scored: Scored, rows: np.ndarray) -> TrainBatch:
        """Token-aligned arrays of the policy loss; the denominator counts all response tokens of the step."""
        made, rollout = scored.experience, scored.rollout
        mask = made.policy_mask.astype(scored.logprobs.dtype)
        arrays = {"old_logprobs": scored.logprobs, "advantages": made.advantages, "mask": mask}
        if scored.weights is not None:
            arrays["weights"] = scored.weights
        return TrainBatch(
            tokens=rollout.tokens.take(rows),
            arrays={name: rollout.at_response(value)[rows] for name, value in arrays.items()},
            denominators={"num_tokens": float(mask[rows].sum())},
        )

    def value_batch(self, scored: Scored, rows: np.ndarray) -> TrainBatch:
        """The critic's tokens, and the arrays of the value loss in the policy's columns: one for each of its states."""
        made, rollout, reading = scored.experience, scored.rollout, scored.reading
        mask = made.value_mask.astype(scored.values.dtype)
        arrays = {"columns": reading.columns, "old_values": made.values, "returns": made.returns, "mask": mask}
        return TrainBatch(
            tokens=reading.tokens.take(rows),
            arrays={name: rollout.at_state(value)[rows] for name, value in arrays.items()},
            denominators={"num_tokens": float(mask[rows].sum())},
        )

    def describe(self, scored: Scored) -> Metrics:
        """The metrics of a rollout before any update: TRL's names, and what its users miss."""
        made, done = scored.experience, scored.rollout.completions
        mask = done.mask
        lengths = mask.sum(axis=1)
        kl = (scored.logprobs - scored.ref_logprobs)[mask]
        penalty = -self.settings.kl_coef * made.kl_per_response
        metrics = dict(scored.reading.metrics)
        if (cap := self.settings.importance_cap) is not None and scored.weights is not None:
            metrics |= importance_metrics(scored.weights, mask, cap=cap)
        if np.isfinite(done.margins[mask]).all():  # a server need not tell them
            metrics["rollout/margin_min"] = float(done.margins[mask].min())
        if scored.trainer_logprobs is not None:
            gap = np.where(mask, np.abs(done.logprobs - scored.trainer_logprobs), 0.0)
            metrics["rollout/logprob_gap_max"] = float(gap.max())
            metrics["rollout/logprob_gap_mean"] = float(gap.sum() / mask.sum())
            metrics["rollout/token_mult_prob_error"] = float(np.exp(gap[mask]).mean())
        return metrics | {
            "objective/kl": float(np.where(mask, scored.logprobs - scored.ref_logprobs, 0.0).sum(axis=1).mean()),
            "objective/kl_k3_per_token": float(np.mean(np.exp(-kl) - 1 + kl)),
            "objective/entropy": float(-(np.where(mask, scored.logprobs, 0.0)).sum(axis=1).mean()),
            "objective/non_score_reward": float(penalty.mean()),
            "objective/rlhf_reward": float((penalty + scored.scores).mean()),
            "objective/scores": float(scored.scores.mean()),
            "objective/scores_std": float(scored.scores.std()),
            "objective/values": float(scored.values[mask].mean()),
            "objective/returns": float(made.returns[made.value_mask].mean()),
            "objective/advantages_std": float(made.advantages[made.policy_mask].std()),
            "val/num_eos_tokens": float(scored.rollout.ended.sum()),
            "eos_rate": float(scored.rollout.ended.mean()),
            "response_length/mean": float(lengths.mean()),
            "response_length/max": float(lengths.max()),
            "response_length/min": float(lengths.min()),
            # Exact in a float64: equal checksums are equal tokens, on another engine or after a resume.
            "rollout/tokens_crc32": float(zlib.crc32(np.where(mask, done.tokens, -1).astype("<i4").tobytes())),
        }

    def evaluate(self, held_out: Sequence[PromptExample], *, when: str | None) -> Metrics:
        """Score held-out prompts, always with the same draws; write samples before and after the stage."""
        rollout = self.roll_out(held_out, purpose="rl/eval", step=0)
        temperature = self.sampling.scoring_temperature
        logprobs = rollout.of_response(self.models.policy.logprobs(rollout.tokens, temperature=temperature))
        reference = rollout.of_response(self.models.reference.logprobs(rollout.tokens, temperature=temperature))
        mask = rollout.completions.mask
        reading = self.models.read(rollout, held_out)
        truth = self.models.evaluate(rollout, reading, held_out)
        rewards = self.models.score(rollout, reading, held_out)
        if when is not None:
            samples = [
                {"prompt": prompt.text, "response": text, "score": float(score)}
                for prompt, text, score in zip(held_out, rollout.texts, truth, strict=True)
            ]
            self.context.run.add_samples("rl", when, samples[:NUM_SAMPLES])
        return {
            "eval/score": float(np.mean(truth)),
            "eval/reward": float(np.mean(rewards)),
            "eval/kl": float(np.where(mask, logprobs - reference, 0.0).sum(axis=1).mean()),
            "eval/response_length": float(mask.sum(axis=1).mean()),
            "eval/eos_rate": float(rollout.ended.mean()),
        }

    def roll_out(self, prompts: Sequence[PromptExample], *, purpose: str, step: int) -> Rollout:
        """Sample a response to each prompt; a prompt's repeats have row ids, and so draws, of their own."""
        return roll_out(
            self._ready(),
            prompts,
            rows=row_ids(prompts),
            sampling=self.sampling,
            tokenizer=self.context.tokenizer,
            buckets=self.recipe.data.buckets,
            seed=self.recipe.seed,
            purpose=purpose,
            step=step,
            # A step that is compared keeps its shape, whatever was drawn.
            widths=() if self.context.recorder.watches else self.recipe.rollout.response_buckets,
        )

    def gate(self, train: Sequence[PromptExample]) -> Gate:
        """Stop the run unless what generates is what is trained."""
        server = self.models.server
        return check_gate(
            self._ready(),
            self.models.policy,
            train,
            recipe=self.recipe,
            sampling=self.sampling,
            tokenizer=self.context.tokenizer,
            precision=self.recipe.precision if server is None else coarser(server.precision, self.recipe.precision),
            name=f"the {self.context.engine.name} engine (rollout.engine {self.recipe.rollout.engine})"
            if server is None
            else server.where,
            quiet=not self.context.run.world.is_main,
        )

    def _ready(self) -> Sampler:
        """The sampler, with the weights that the policy has now."""
        if self.models.server is not None:
            self.models.server.load(updates=self.updates)
        return self.sampler

    def _penalised(self, scores: np.ndarray, rollout: Rollout) -> np.ndarray:
        penalty = self.settings.missing_eos_penalty
        return scores - penalty * (~rollout.ended).astype(scores.dtype)


def experience_settings(settings: RLRecipe) -> dict[str, Any]:
    """What the recipe tells `diptych.algorithms.dialects.experience`, beside the dialect."""
    names = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards", "score_clip")
    return {name: getattr(settings, name) for name in names}


def row_ids(prompts: Sequence[PromptExample]) -> list[int]:
    """What keys the draws of each prompt: its row, and for its repeats ids of their own."""
    repeats: dict[int, int] = {}
    rows = []
    for prompt in prompts:
        repeat = repeats.get(prompt.row, 0)
        repeats[prompt.row] = repeat + 1
        rows.append(prompt.row + (repeat << 40))
    return rows
