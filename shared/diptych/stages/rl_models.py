"""The models of rl: actor, reference, critic and reward, put on the accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from diptych.data.examples import PromptExample
from diptych.engine import MASTERS, Model
from diptych.errors import UserError
from diptych.parity.tolerances import coarser
from diptych.rewards.function import call, load_function
from diptych.rollout_server import is_server
from diptych.stages.adapters import BelowAdapter
from diptych.stages.context import StageContext, optimizer_spec
from diptych.stages.reading import Reader, Reading, own_reading
from diptych.stages.rollout import Rollout
from diptych.stages.served import ServedPolicy
from diptych.weights.huggingface import Checkpoint, read_checkpoint, with_scalar_head
from diptych.world import World

Scorer = Callable[[Rollout, Reading, Sequence[PromptExample]], Float[np.ndarray, " rows"]]


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models. score: the reward model or function; evaluate: scores held-out answers; read: how reward model and
    critic see a rollout; server: what generates in place of the policy's engine, to be closed."""

    policy: Model
    reference: Model | BelowAdapter
    critic: Model
    score: Scorer
    evaluate: Scorer
    read: Reader
    policy_checkpoint: Checkpoint
    critic_checkpoint: Checkpoint
    server: ServedPolicy | None = None


def build_models(context: StageContext) -> Models:
    """Put actor, reference, critic and reward on the accelerator."""
    recipe, settings = context.recipe, context.recipe.rl
    policy_checkpoint = read_checkpoint(context.model_directories["policy"], precision=MASTERS[recipe.precision])
    rows = settings.micro_batch_size
    optimizer = optimizer_spec(settings.optimizer)
    if "reward_model" in context.model_directories:
        critic_checkpoint = read_checkpoint(
            context.model_directories["reward_model"], precision=MASTERS[recipe.precision]
        )
        reward_model = context.model(critic_checkpoint, optimizer=None, micro_batch_size=rows, role="reward")
        score = _model_scorer(reward_model)
    else:
        critic_checkpoint = with_scalar_head(policy_checkpoint, seed=recipe.seed, zero=True)
        assert settings.reward.function is not None, "checked with the recipe"
        score = _function_scorer(settings.reward.function, context.run.world)
    evaluation = settings.evaluation_function
    policy = context.model(
        policy_checkpoint,
        optimizer=optimizer_spec(settings.optimizer, ema_decay=settings.ema_decay),
        micro_batch_size=rows,
        adapter=settings.adapter,
    )
    if settings.adapter is not None and settings.adapter.path is None:
        reference = BelowAdapter(policy)  # a new adapter changes nothing: below it is what the policy starts as
    else:
        reference = context.model(
            policy_checkpoint, optimizer=None, micro_batch_size=rows, role="reference", adapter=settings.adapter
        )
    return Models(
        policy=policy,
        reference=reference,
        critic=context.model(
            critic_checkpoint,
            optimizer=optimizer,
            micro_batch_size=rows,
            role="critic",
            adapter=settings.critic_adapter,
        ),
        score=score,
        evaluate=_function_scorer(evaluation, context.run.world) if evaluation else score,
        read=context.reader or own_reading,
        policy_checkpoint=policy_checkpoint,
        critic_checkpoint=critic_checkpoint,
        server=_server(context, policy) if is_server(recipe.rollout.engine) else None,
    )


def _server(context: StageContext, policy: Model) -> ServedPolicy:
    """Start the rollout server. UserError where it is coarser than the trainer and nothing corrects that."""
    recipe = context.recipe
    server = ServedPolicy(
        recipe.rollout.engine,
        policy,
        tokenizer_directory=context.tokenizer_directories["policy"],
        precision=recipe.precision,
        world=context.run.world,
        piece=context.engine.settings.layout.switch_chunk,
    )
    if coarser(server.precision, recipe.precision) != recipe.precision and recipe.rl.importance_cap is None:
        server.close()
        raise UserError(
            f"{server.where} computes in {server.precision} and the policy is trained in {recipe.precision}: set "
            "rl.importance_cap (2 is usual), which weighs its tokens by how much likelier the trainer finds them"
        )
    return server


def _model_scorer(reward: Model) -> Scorer:
    return lambda _rollout, reading, _prompts: reading.end_scores(reward.scores(reading.tokens))


def _function_scorer(target: str, world: World) -> Scorer:
    """Process 0 asks the function, and the others take its answers: a judge may answer twice differently."""
    function = load_function(target)
    return lambda rollout, _reading, prompts: world.first(
        lambda: call(function, [prompt.text for prompt in prompts], rollout.texts, [prompt.data for prompt in prompts])
    )
