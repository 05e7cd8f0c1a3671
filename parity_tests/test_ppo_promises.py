"""What other trainers get wrong, held on both engines (the defects are listed in docs/algorithms.md): optimizer steps
per rollout, micro-batches that change nothing, EOS in the loss, draws that follow the prompt, and runs that stop
themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.engine import Completions, Finish
from diptych.errors import InvariantError
from diptych.parity.tolerances import TOLERANCES
from diptych.recipe.load import load_recipe
from diptych.run.compare import is_timing
from diptych.stages.pipeline import prepare
from diptych.stages.rl import PPO, build_models
from diptych.stages.rollout import fitted

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SETTINGS = [
    "data.demonstrations.limit=300",
    "data.preferences.limit=300",
    "data.prompts.limit=200",
    "stages=[rl]",
    "model.new=null",
    "rl.iterations=4",
    "rl.batch_size=8",
    "rl.micro_batch_size=8",
    "rl.epochs=1",
    "rl.mini_batches=1",
    "rollout.max_new_tokens=16",
    "rollout.temperature=0.7",
]
ENGINES = ["jax", "torch"]


@pytest.fixture
def start(hot_models, tmp_path):
    made = []

    def start(engine: str, *overrides: str):
        settings = [
            *SETTINGS,
            f"model.path={hot_models['policy']}",
            f"rl.reward.model_path={hot_models['reward']}",
            *overrides,
        ]
        made.append(engine)
        output = tmp_path / f"{engine}-{len(made)}"
        context = prepare(load_recipe(QUICKSTART, settings), engine_name=engine, output=output)
        return PPO(context, build_models(context)), context.datasets.prompts.train

    return start


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_mini_batches_are_optimizer_steps_and_metrics_do_not_depend_on_their_number(engine, mini_batches, start):
    ppo, train = start(engine, f"rl.mini_batches={mini_batches}", "rl.micro_batch_size=2", "rl.learning_rate=1e-12")
    metrics, _ = ppo.iterate(ppo.prompts(train, 0), 0)
    assert ppo.models.policy.optimizer_state().step == mini_batches
    assert ppo.models.critic.optimizer_state().step == mini_batches
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-5)  # TRL 1.12 reads 1, 0.5, 0.25 here
    assert metrics["val/ratio_var"] < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_micro_batch_size_changes_nothing_beyond_rounding(engine, start):
    rows = []
    for size in (2, 4, 8):
        ppo, train = start(engine, f"rl.micro_batch_size={size}", "rl.epochs=2")
        metrics, _ = ppo.iterate(ppo.prompts(train, 0), 0)
        rows.append({k: v for k, v in metrics.items() if not is_timing(k)})
    for other in rows[1:]:
        assert other.keys() == rows[0].keys()
        for name, value in rows[0].items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
        assert other["rollout/tokens_crc32"] == rows[0]["rollout/tokens_crc32"]


@pytest.mark.parametrize("engine", ENGINES)
def test_eos_is_trained_and_carries_the_score(engine, start):
    ppo, train = start(engine)
    ended = ppo.roll_out(ppo.prompts(train, 0), purpose="rl/rollout", step=0)
    # Whatever the model samples, make row 0 end with EOS in its fourth position.
    done = ended.completions
    tokens, mask, finish = done.tokens.copy(), done.mask.copy(), done.finish.copy()
    tokens[0, 3] = ppo.context.tokenizer.eos_token_id
    tokens[0, 4:] = ppo.context.tokenizer.pad_token_id
    mask[0] = np.arange(mask.shape[1]) < 4
    finish[0] = Finish.STOP
    from diptych.data.batches import join

    completions = replace(done, tokens=tokens, mask=mask, finish=finish)
    rollout = replace(ended, completions=completions, tokens=join(ended.prompts, completions))
    scored = ppo.score(rollout, ppo.prompts(train, 0), 0)
    made = scored.experience
    assert made.policy_mask[0].tolist() == [True] * 4 + [False] * (mask.shape[1] - 4)
    kl_only = -ppo.settings.kl_coef * (scored.logprobs - scored.ref_logprobs)[0]
    assert made.rewards[0, 3] - kl_only[3] == pytest.approx(scored.scores[0], rel=1e-5)
    batch = ppo.policy_batch(scored, np.arange(len(tokens)))
    column = rollout.tokens.first + 3
    assert batch.arrays["mask"][0, column] == 1
    # The gradient sees the EOS: dropping its column from the mask changes it.
    arrays = {name: value.copy() for name, value in batch.arrays.items()}
    arrays["mask"][0, column] = 0
    with_eos = ppo.models.policy.gradients(ppo.policy_loss, batch)
    without = ppo.models.policy.gradients(ppo.policy_loss, replace(batch, arrays=arrays))
    name = "model.norm.weight"
    assert np.linalg.norm(with_eos[name] - without[name]) > 1e-3 * np.linalg.norm(with_eos[name])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_draws_the_same_in_any_batch_and_its_repeats_differ(engine, start):
    ppo, train = start(engine)
    alone = ppo.roll_out(train[3:4], purpose="rl/rollout", step=5)
    crowd = ppo.roll_out([*train[8:11], train[3], *train[20:23]], purpose="rl/rollout", step=5)
    assert np.array_equal(alone.completions.tokens[0], crowd.completions.tokens[3])
    repeats = ppo.roll_out([train[3], train[3]], purpose="rl/rollout", step=5).completions.tokens
    assert np.array_equal(repeats[0], alone.completions.tokens[0])
    assert not np.array_equal(repeats[0], repeats[1])
    another = ppo.roll_out(train[3:4], purpose="rl/rollout", step=6).completions.tokens
    assert not np.array_equal(another[0], alone.completions.tokens[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_invariants_stop_a_broken_run(engine, start):
    ppo, train = start(engine)
    prompts = ppo.prompts(train, 0)
    ppo.iterate(prompts, 0)  # an unbroken one goes on

    # The reference is not the policy that the run started from.
    other, _ = start(engine)
    weights = other.models.reference.weights()
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.05
    other.models.reference.load_weights(weights)
    with pytest.raises(InvariantError, match="policy and reference have equal weights"):
        other.iterate(prompts, 0)

    # Generation runs stale weights.
    class Stale:
        def __init__(self, model, generator):
            self.model, self.generator = model, generator

        def __getattr__(self, name):
            return getattr(self.generator if name == "generate" else self.model, name)

    ppo.models = replace(ppo.models, policy=Stale(ppo.models.policy, other.models.reference))
    with pytest.raises(InvariantError, match="sampler's log-probabilities differ"):
        ppo.iterate(prompts, 0)
    with pytest.raises(InvariantError, match="first update's ratio.*stale decode weights"):  # no pass of their own
        ppo.iterate(prompts, 1)

    # Scoring and update disagree about the temperature.
    hot, _ = start(engine)
    hot.policy_loss = replace(hot.policy_loss, temperature=0.9)
    with pytest.raises(InvariantError, match="first update's ratio"):
        hot.iterate(prompts, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_kl_bound_stops_the_run(engine, start):
    ppo, train = start(engine, "rl.max_kl=0.0001", "rl.learning_rate=0.01")
    ppo.iterate(ppo.prompts(train, 0), 0)
    with pytest.raises(InvariantError, match=r"rl\.max_kl"):
        ppo.iterate(ppo.prompts(train, 1), 1)


def logged(ppo: PPO, train, iterations: int = 3) -> list[dict[str, float]]:
    """What some iterations log, without clocks."""
    found = [ppo.iterate(ppo.prompts(train, step), step)[0] for step in range(iterations)]
    return [{k: v for k, v in row.items() if not is_timing(k) and k != "compilations"} for row in found]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_samplers_log_probabilities_save_a_pass_and_change_nothing(engine, start, monkeypatch):
    """float64: the old log-probabilities are the sampler's after the first iteration, and the numbers stay."""
    double = "precision=float64"
    rows = logged(*start(engine, double, "rl.old_logprobs=trainer"))
    ppo, train = start(engine, double)
    passes = []
    own = ppo.models.policy.logprobs
    monkeypatch.setattr(ppo.models.policy, "logprobs", lambda *a, **k: passes.append(1) or own(*a, **k))
    saved = logged(ppo, train)
    assert len(passes) == 1
    assert "rollout/logprob_gap_max" in saved[0]
    assert "rollout/logprob_gap_max" not in saved[1]
    limit = TOLERANCES["trajectory_relative"].float64
    for row, other in zip(rows, saved, strict=True):
        for name, value in other.items():
            assert value == pytest.approx(row[name], rel=limit, abs=1e-9), name
        assert other["rollout/tokens_crc32"] == row["rollout/tokens_crc32"]


@pytest.mark.parametrize("settings", [["precision=bfloat16", "layout.zero.stage=1"], ["rl.importance_cap=2"]])
def test_where_sampler_and_trainer_may_differ_the_trainer_is_asked(settings, start):
    ppo, train = start("torch", *settings)
    assert all("rollout/logprob_gap_max" in row for row in logged(ppo, train, 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_responses_are_cut_to_a_bucket_and_no_number_changes(engine, start):
    double = "precision=float64"
    words = (double, "rollout.temperature=0.05", "rollout.max_new_tokens=48")  # cold: stops are drawn early or never
    rows = logged(*start(engine, *words))
    ppo, train = start(engine, *words, "rollout.response_buckets=[4,8,16,24,32,40]")
    seen = []
    own = ppo.models.critic.scores
    ppo.models.critic.scores = lambda batch: seen.append(batch.tokens.shape[1] - batch.first) or own(batch)
    cut = logged(ppo, train)
    assert seen == [
        next(width for width in (4, 8, 16, 24, 32, 40, 48) if width >= row["response_length/max"]) for row in rows
    ]
    limit = TOLERANCES["trajectory_relative"].float64
    for row, other in zip(rows, cut, strict=True):
        for name, value in other.items():
            assert value == pytest.approx(row[name], rel=limit, abs=1e-9), name


def test_a_cut_keeps_every_token():
    mask = np.arange(10) < np.array([3, 5, 1])[:, None]
    done = Completions(
        tokens=np.where(mask, 7, 0).astype(np.int32), mask=mask, logprobs=-mask.astype(np.float32),
        margins=mask.astype(np.float32), finish=np.ones(3, np.int32),
    )  # fmt: skip
    for widths, expected in (((), 10), ((4,), 10), ((4, 5), 5), ((6, 8), 6)):
        cut = fitted(done, widths)
        assert cut.tokens.shape == cut.mask.shape == cut.logprobs.shape == cut.margins.shape == (3, expected)
        assert cut.mask.sum() == mask.sum()
