"""Who is wrong: the float64 truth of what a step of a trace recorded, from what that step was given.

Formulas (rewards, returns, advantages, KL) are run again in float64 on the recorded inputs; log-probabilities, values,
scores and losses come from the oracle (`oracle.py`) on the recorded weights. A gradient has no oracle, but the slope
of the oracle's loss along the direction in which two sides differ says which of them is right. Moments and new weights
depend on a gradient that nobody knows, so a side is checked against itself (`consistency`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Literal, TypeVar

import numpy as np

from diptych.algorithms.dialects import Experience, experience
from diptych.algorithms.losses import (
    dschat_reward_loss,
    pairwise_reward_loss,
    ppo_policy_loss,
    ppo_value_loss,
    sft_loss,
)
from diptych.engine import Finish, Head, Loss, Metrics, TokenBatch, TrainBatch
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, read_model, tensor_shapes
from diptych.parity.foreign.terms import terms_of
from diptych.parity.steps import ROLES
from diptych.parity.trace import Step, Trace
from diptych.parity.truth.oracle import evaluate, forward
from diptych.parity.truth.slope import Slope, direction, first_step, slope
from diptych.parity.truth.update import consistency
from diptych.recipe.load import recipe_from_text
from diptych.recipe.schema import Recipe
from diptych.stages.rl import experience_settings

T = TypeVar("T")
Weights = Mapping[str, np.ndarray]
Verdict = Literal["A is wrong", "B is wrong", "both", "neither: the limit is too tight", "cannot tell"]
CLEARLY = 10.0  # one side is wrong alone where its error is this many times the other's


def who(a_error: float, b_error: float, noise: float) -> Verdict:
    """Whose error against the truth is more than honest noise, all three in one unit. An error that is NaN (no truth)
    or two infinite ones decide nothing."""
    if math.isnan(a_error) or math.isnan(b_error) or (math.isinf(a_error) and math.isinf(b_error)):
        return "cannot tell"
    if max(a_error, b_error) <= noise:
        return "neither: the limit is too tight"
    if min(a_error, b_error) > noise and max(a_error, b_error) < CLEARLY * min(a_error, b_error):
        return "both"
    return "A is wrong" if a_error > b_error else "B is wrong"


def explained(a_error: float, b_error: float, noise: float) -> str:
    """`who`, with the errors that it goes by."""
    verdict = who(a_error, b_error, noise)
    return f"{verdict} (off the float64 truth: A {a_error:.2g}, B {b_error:.2g}; noise {noise:.1g})"


class Truth:
    """What the float64 truth says about one recorded step. Forward passes are made when they are asked for, once."""

    def __init__(self, trace: Trace, step: Step):
        """step: of `trace`; its arrays are the inputs of everything here. In a replay both sides had the recorded
        side's, so give that side's trace."""
        self.trace = trace
        self.step = step

    def of(self, name: str, *, other: np.ndarray | None = None) -> np.ndarray | float | None:
        """The truth of an array or scalar of the step (names: `diptych.parity.steps`); None where it cannot be known.

        A gradient (ROLE/gradient/TENSOR) needs the other side's, `other`: the step's own is then returned with its
        component along their difference replaced by the true one, so that each side's distance to it is its error along
        that direction.
        """
        if name in _MADE:
            made = self.experience
            return None if made is None else _MADE[name](made)
        if name in ("logprobs", "ref_logprobs", "values", "scores"):
            return getattr(self, f"_{name}")()
        role, _, rest = name.partition("/")
        if role not in ROLES:
            return None
        if rest in ("outputs", "next_outputs"):
            return self._outputs(role, "start/weights" if rest == "outputs" else "weights")
        if rest == "loss" or rest.startswith("loss/"):
            metrics = self._losses(role)
            return None if metrics is None else metrics.get(rest.removeprefix("loss/"))
        if rest.startswith("gradient/") and other is not None and name in self.step.tensors:
            own = self.step.array(name)
            true, a, _ = self.gradient_verdict(name, own, other)
            along, _ = direction(own, other)
            return None if math.isnan(true) else own + (true - a) * along
        return None

    def gradient_verdict(self, name: str, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
        """(<g, d>, <a, d>, <b, d>) for the true gradient g of the loss by the tensor of ROLE/gradient/TENSOR, along
        d = (a - b) / |a - b|. The first is NaN where it cannot be known: no weights, or a slope that is no surer than
        the sides are close."""
        along, distance = direction(a, b)
        found = self.gradient_along(name, along)
        known = found is not None and found.uncertainty <= 0.1 * distance
        true = found.value if found is not None and known else math.nan
        return true, float(np.sum(a * along)), float(np.sum(b * along))

    def gradient_along(self, name: str, along: np.ndarray) -> Slope | None:
        """The slope of the loss on the probe batch as the tensor of ROLE/gradient/TENSOR moves along `along`, of length
        1."""
        role, _, rest = name.partition("/")
        tensor = rest.removeprefix("gradient/")
        ready = self.ready(role, "start/weights")
        batch, loss = self.probe(role), self.loss(role)
        if ready is None or batch is None or loss is None or tensor not in ready[1]:
            return None
        config, weights = ready
        middle = np.asarray(weights[tensor], np.float64)

        def at(step: float) -> float:
            return evaluate(loss, config, {**weights, tensor: middle + step * along}, batch)["loss"]

        return slope(lambda step: at(step) - at(-step), scale=first_step(middle))

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe that the trace was recorded with; None in a foreign trace."""
        text = self.trace.provenance.get("recipe")
        return None if text is None else _recipe(text, str(self.trace.directory / "trace.json"))

    @cached_property
    def experience(self) -> Experience | None:
        """Rewards, advantages and returns from the recorded log-probabilities, values and scores, in float64."""
        needed = ("logprobs", "ref_logprobs", "values", "scores", "used/mask")
        ended = self._ended
        if ended is None or not self.step.tensors.keys() >= set(needed):
            return None
        if self.recipe is not None:
            rl = self.recipe.rl
            dialect, penalty, options = rl.dialect, rl.missing_eos_penalty, experience_settings(rl)
        elif terms := terms_of(self.trace.provenance):
            dialect, penalty, options = terms.dialect, terms.missing_eos_penalty, terms.options
        else:
            return None
        wide = {name: self.step.array(name).astype(np.float64) for name in needed[:4]}
        wide["scores"] = wide["scores"] - penalty * ~ended
        mask = self.step.array("used/mask").astype(bool)
        return experience(dialect, **wide, mask=mask, ended=ended, **options)

    def loss(self, role: str) -> Loss | None:
        """The loss that trains the role, as the stages make it."""
        config = self.config(role)
        if self.recipe is None or config is None:
            return None
        return loss_of(self.recipe, self.step.stage, role, config)

    @property
    def _ended(self) -> np.ndarray | None:
        """Rows whose response stopped by itself."""
        finish = self.step.tensors.get("used/finish")
        return None if finish is None else finish.values == int(Finish.STOP)

    def config(self, role: str) -> ModelConfig | None:
        """What the role's model computes; None in a trace that does not say."""
        key = self.step.stage if role == "model" else role
        about = self.trace.provenance.get("models", {}).get(key)
        if about is None:
            return None
        return read_model(about["config"], where=f"{self.trace.directory / 'trace.json'}: models.{key}.config")

    def ready(self, role: str, which: str, step: Step | None = None) -> tuple[ModelConfig, Weights] | None:
        """The role's model and all of its weights; None where the step does not hold them (an adapter's alone do not
        make a model)."""
        config = self.config(role)
        weights = (step or self.step).under(f"{role}/{which}")
        if config is None or weights.keys() != tensor_shapes(config, self.head(role)).keys():
            return None
        return config, weights

    def head(self, role: str) -> Head:
        return "lm" if role == "policy" or self.step.stage == "sft" else "scalar"

    def probe(self, role: str) -> TrainBatch | None:
        """The recorded probe batch."""
        start = f"{role}/probe"
        if f"{start}/tokens" not in self.step.tensors:
            return None
        return TrainBatch(
            tokens=TokenBatch(
                tokens=self.step.array(f"{start}/tokens"),
                attention=self.step.array(f"{start}/attention"),
                positions=self.step.array(f"{start}/positions"),
                first=int(self.step.array(f"{start}/first")),
            ),
            arrays=self.step.under(f"{start}/arrays"),
            denominators={name: float(value) for name, value in self.step.under(f"{start}/denominators").items()},
        )

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]

    @cached_property
    def _results(self) -> dict:
        return {}

    def _outputs(self, role: str, which: str) -> np.ndarray | None:
        """Log-probabilities or scores of the probe batch."""
        ready, batch, loss = self.ready(role, which), self.probe(role), self.loss(role)
        if ready is None or batch is None or loss is None:
            return None
        config, weights = ready
        return self._once(
            (role, which),
            lambda: forward(
                config, self.head(role), weights, batch.tokens, temperature=loss.temperature
            ).outputs,
        )  # fmt: skip

    def _losses(self, role: str) -> Metrics | None:
        """The loss on the probe batch and its metrics."""
        ready, batch, loss = self.ready(role, "start/weights"), self.probe(role), self.loss(role)
        if ready is None or batch is None or loss is None:
            return None
        return self._once((role, "loss"), lambda: evaluate(loss, *ready, batch))

    def _rollout(self) -> TokenBatch | None:
        """Prompts and the responses that the step went on with, as `diptych.data.batches.join` lays them out."""
        needed = ("prompts/tokens", "prompts/attention", "used/tokens", "used/mask")
        if not self.step.tensors.keys() >= set(needed):
            return None
        prompt, real, response, mask = (self.step.array(name) for name in needed)
        attention = np.concatenate([real, mask], axis=1).astype(bool)
        positions = np.where(attention, np.cumsum(attention, axis=1) - 1, 0).astype(np.int32)
        tokens = np.concatenate([prompt, response], axis=1).astype(np.int32)
        return TokenBatch(tokens=tokens, attention=attention, positions=positions, first=prompt.shape[1])

    def _of_rollout(self, role: str, step: Step | None) -> np.ndarray | None:
        """The role's outputs on the whole rollout [rows, prompt + new] with the weights that `step` starts from."""
        ready = None if step is None else self.ready(role, "start/weights", step)
        batch = self._rollout()
        if ready is None or batch is None or self.recipe is None:
            return None
        temperature = scoring_temperature(self.recipe) if role == "policy" else 1.0
        return self._once(
            (role, "rollout", step.step if step else None),
            lambda: forward(ready[0], self.head(role), ready[1], batch, temperature=temperature).outputs,
        )

    def _logprobs(self) -> np.ndarray | None:
        outputs, batch = self._of_rollout("policy", self.step), self._rollout()
        return None if outputs is None or batch is None else outputs[:, batch.first :]

    def _ref_logprobs(self) -> np.ndarray | None:
        """The reference is what the policy was before the first step."""
        outputs, batch = self._of_rollout("policy", self._first_step), self._rollout()
        return None if outputs is None or batch is None else outputs[:, batch.first :]

    def _values(self) -> np.ndarray | None:
        """The critic at the state before each response token."""
        outputs, batch = self._of_rollout("critic", self.step), self._rollout()
        if outputs is None or batch is None or not self._reads_own_tokens:
            return None
        return outputs[:, batch.first - 1 : -1]

    def _scores(self) -> np.ndarray | None:
        """The reward model is what the critic was before the first step, unless a function gives the reward."""
        outputs, batch = self._of_rollout("critic", self._first_step), self._rollout()
        if outputs is None or batch is None or self.recipe is None or not self._reads_own_tokens:
            return None
        if self.recipe.rl.reward.function is not None:
            return None
        ends = batch.first + self.step.array("used/mask").astype(bool).sum(axis=1) - 1
        return outputs[np.arange(len(ends)), ends]

    @cached_property
    def _first_step(self) -> Step | None:
        """The stage's first step, where the trace holds its tensors."""
        key = (self.step.stage, 0)
        if self.step.step == 0:
            return self.step
        return self.trace.read(*key) if key in self.trace and self.trace.has_tensors(*key) else None

    @property
    def _reads_own_tokens(self) -> bool:
        """Reward model and critic read the policy's tokens, not its text in their own."""
        known = self.trace.provenance.get("tokenizers", {})
        policy, critic = known.get("policy"), known.get("critic")
        return critic is None or (policy is not None and policy["fingerprint"] == critic["fingerprint"])

    def consistency(self, role: str) -> dict[str, float]:
        """Does the role's first update follow from its own moments (`diptych.parity.truth.update`)? {} where the step
        does not hold what that takes."""
        if self.recipe is None:
            return {}
        return consistency(self.step, role, getattr(self.recipe, self.step.stage).optimizer)


_MADE: Mapping[str, Callable[[Experience], np.ndarray]] = {
    "kl": lambda made: made.kl_per_response,
    "shaped": lambda made: made.rewards,
    "returns": lambda made: made.returns,
    "advantages": lambda made: made.advantages,
    "policy_mask": lambda made: made.policy_mask,
    "value_mask": lambda made: made.value_mask,
}


@lru_cache(maxsize=4)
def _recipe(text: str, name: str) -> Recipe:
    return recipe_from_text(text, name=name)


def scoring_temperature(recipe: Recipe) -> float:
    """The temperature of log-probabilities in rl (`diptych.engine.Sampling`)."""
    return recipe.rollout.temperature if recipe.rollout.temperature > 0 else 1.0


def loss_of(recipe: Recipe, stage: str, role: str, config: ModelConfig) -> Loss:
    """The loss that a stage trains a role with (`diptych.stages`)."""
    experts = config.experts if isinstance(config, DecoderConfig) else None
    wanted = recipe.model.balance_coef
    balance = 0.0 if experts is None else experts.balance_coef if wanted is None else wanted
    if stage == "sft":
        return Loss(function=sft_loss, reads="logprobs", balance=balance)
    if stage == "reward":
        function = dschat_reward_loss if recipe.reward.dialect == "dschat" else pairwise_reward_loss
        options = (("center_coef", recipe.reward.center_coef),)
        return Loss(function=function, reads="scores", options=options, balance=balance, group=2)
    if role == "policy":
        return Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", recipe.rl.clip_range),),
            temperature=scoring_temperature(recipe),
            entropy=True,
            balance=balance,
        )
    options = (("value_clip_range", recipe.rl.value_clip_range), ("value_coef", recipe.rl.value_coef))
    return Loss(function=ppo_value_loss, reads="scores", options=options, balance=balance)
