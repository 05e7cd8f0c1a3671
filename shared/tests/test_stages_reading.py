"""Reward model and critic of another family and tokenizer than the policy, through whole stages, on a NumPy engine.

The engine's models are sums of keyed numbers, so that every score can be checked by hand. Canaries: a reading that is
one column off, and one that forgets the EOS.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych import random
from diptych.data.tasks import generate
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Completions, Finish, Model
from diptych.errors import UserError
from diptych.recipe.load import load_recipe
from diptych.stages import pipeline
from diptych.stages.reading import Reading, TextReading, own_reading
from diptych.stages.rl import PPO, build_models
from diptych.weights.huggingface import initial_checkpoint, read_checkpoint, with_scalar_head, write_checkpoint
from diptych.world import SINGLE

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


class NumpyModel(Model):
    """What the stages use of a model: log p(token | before) from keyed logits of the token before; score[t] = the sum
    of keyed numbers of tokens 0..t. An update moves one number, which is added to every score: enough to see that state
    is kept."""

    def __init__(self, spec):
        self.spec = spec
        size = spec.config["vocab_size"]
        name = str(spec.config["model_type"])
        self.logits = random.normal(1, f"{name}/logits", (size, size), std=1.0).astype(np.float64)
        self.worth = random.normal(2, f"{name}/worth", (size,), std=0.1).astype(np.float64)
        self.shift = 0.0

    def table(self, temperature):
        scaled = self.logits / temperature
        return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))

    def logprobs(self, batch, *, temperature):
        found = np.zeros(batch.tokens.shape, np.float32)
        found[:, 1:] = self.table(temperature)[batch.tokens[:, :-1], batch.tokens[:, 1:]]
        found[:, : batch.first] = 0
        return found

    def scores(self, batch):
        worth = np.where(batch.attention, self.worth[batch.tokens], 0)
        return (np.cumsum(worth, axis=1) + self.shift).astype(np.float32)

    def evaluate(self, loss, batch):
        outputs = self.scores(batch.tokens)
        extra = {}
        if loss.reads == "logprobs":
            outputs = self.logprobs(batch.tokens, temperature=loss.temperature)
            extra = {"entropy": np.zeros_like(outputs)} if loss.entropy else {}
        value, metrics = loss(outputs, **batch.arrays, **extra, **batch.denominators)
        return {"loss": float(value)} | {name: float(metric) for name, metric in metrics.items()}

    def update(self, loss, batch, *, learning_rate):
        metrics = self.evaluate(loss, batch) | {"grad_norm": 0.0}
        self.shift += learning_rate
        return metrics

    def generate(self, prompts, sampling, uniforms, *, pad_token_id):
        rows, new = uniforms.shape
        tokens, mask = np.full((rows, new), pad_token_id, np.int32), np.zeros((rows, new), bool)
        logprobs, finish = np.zeros((rows, new), np.float32), np.full(rows, Finish.LENGTH, np.int32)
        table = self.table(sampling.temperature)
        for row in range(rows):
            last = prompts.tokens[row, -1]
            for column in range(new):
                token = min(int(np.searchsorted(np.cumsum(np.exp(table[last])), uniforms[row, column])), len(table) - 1)
                # Stops are made likely, or so small a vocabulary of so many bytes would never end a response.
                token = sampling.stop_token_ids[0] if uniforms[row, column] < 0.06 else token
                tokens[row, column], mask[row, column] = token, True
                logprobs[row, column], last = table[last, token], token
                if token in sampling.stop_token_ids:
                    finish[row] = Finish.STOP
                    break
        return Completions(tokens=tokens, mask=mask, logprobs=logprobs, margins=np.ones_like(logprobs), finish=finish)

    def rollout_metrics(self):
        return {}

    def weights(self, names=None):
        return {name: self.spec.weights[name] for name in names or self.spec.weights}

    def ema_weights(self, names=None):
        return self.weights(names)

    def save_checkpoint(self, directory):
        (directory / "shift.json").write_text(json.dumps(self.shift))
        return lambda: None

    def load_checkpoint(self, directory):
        self.shift = json.loads((directory / "shift.json").read_text())


class NumpyEngine:
    name = "numpy"
    world = SINGLE

    def __init__(self, settings):
        self.settings = settings

    def check_model(self, config, role):
        pass

    def compilations(self):
        return None

    def memory(self):
        return None

    def model(self, spec) -> Model:
        return NumpyModel(spec)

    def environment(self):
        return {"engine": "numpy"}

    def instruments(self):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def numpy_engine(monkeypatch):
    monkeypatch.setattr(pipeline, "load_engine", lambda _name, settings: NumpyEngine(settings))


THEIR_TEMPLATE = (
    "{% for m in messages %}{{ '<|system|>' ~ m.role ~ '\n' ~ m.content ~ '<|end|>' ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|system|>assistant\n' }}{% endif %}"
)
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(root: Path, name: str, config: dict, *, vocab_size: int, head: str = "lm", template=None) -> Path:
    words = root / f"{name}-tokenizer"
    texts = [f"{row['prompt']} {row['response']}" for row in generate("postcards", "demonstrations", count=60, seed=0)]
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, directory=words)
    if template is not None:
        (words / "chat_template.jinja").write_text(template)
    config = config | {"vocab_size": vocab_size, "eos_token_id": tokenizer.eos_token_id}
    checkpoint = initial_checkpoint(config, seed=3)
    checkpoint = with_scalar_head(checkpoint, seed=3) if head == "scalar" else checkpoint
    write_checkpoint(root / name, checkpoint, tokenizer_directory=words)
    return root / name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The policy writes bytes (262 tokens); the reward models read words: of GPT-2's family in a ChatML of their own,
    and one that is as the policy is."""
    root = tmp_path_factory.mktemp("models")
    return {
        "policy": make_model(root, "policy", LLAMA, vocab_size=262),
        "theirs": make_model(root, "theirs", GPT2 | {"n_positions": 256}, vocab_size=330, template=THEIR_TEMPLATE),
        "short": make_model(root, "short", GPT2 | {"n_positions": 12}, vocab_size=330, head="scalar"),
        "scores": make_model(root, "scores", GPT2 | {"n_positions": 256}, vocab_size=330, head="scalar"),
        "ours": make_model(root, "ours", LLAMA, vocab_size=262, head="scalar"),
    }


SETTINGS = [
    "model.new=null", "data.demonstrations.limit=60", "data.preferences.limit=40", "data.prompts.limit=40",
    "data.max_prompt_tokens=96", "data.max_response_tokens=160", "data.buckets=[64,128,256]",
    "rollout.max_new_tokens=24", "rollout.gate=false",
    "rl.evaluation_function=null", "reward.batch_size=8", "reward.micro_batch_size=8", "reward.max_steps=2",
    "reward.optimizer.warmup_steps=0", "rl.iterations=3", "rl.batch_size=8", "rl.mini_batches=2",
    "rl.micro_batch_size=4", "rl.eval_every=2", "rl.eval_prompts=4", "rl.max_kl=null", "checkpoint.every=1",
    "rl.learning_rate=0.001", "rl.critic_learning_rate=0.01",
]  # fmt: skip


def recipe(models, reward_model, *overrides):
    path = f"model.path={models['policy']}"
    return load_recipe(QUICKSTART, [*SETTINGS, path, f"rl.reward.model_path={models[reward_model]}", *overrides])


def start(models, reward_model, tmp_path, *overrides):
    found = recipe(models, reward_model, "stages=[rl]", *overrides)
    context = pipeline.prepare(found, engine_name="numpy", output=tmp_path / "run")
    ppo = PPO(context, build_models(context))
    return ppo, ppo.prompts(context.datasets.prompts.train, 0)


def test_a_foreign_reading_is_scored_and_gathered_where_it_should_be(models, tmp_path):
    ppo, prompts = start(models, "scores", tmp_path)
    rollout = ppo.roll_out(prompts, purpose="rl/rollout", step=0)
    scored = ppo.score(rollout, prompts, 0)
    theirs = Tokenizer.load(models["scores"])
    worth = ppo.models.critic.worth
    assert 0 < rollout.ended.sum() < len(prompts)  # some ended by themselves, some were cut
    forgotten = []
    for row, prompt in enumerate(prompts):
        text = theirs.render(prompt.turns, add_generation_prompt=True)
        before = theirs.encode(text, add_special_tokens=False)
        response, _ = theirs.encode_spans(rollout.texts[row], before[-1])
        ids = [*before, *response] + [theirs.eos_token_id] * bool(rollout.ended[row])
        length = len(ids)
        assert scored.reading.tokens.tokens[row, :length].tolist() == ids
        assert scored.reading.tokens.attention[row].sum() == length
        assert scored.scores[row] == pytest.approx(worth[ids].sum(), abs=1e-5)
        assert scored.values[row, 0] == pytest.approx(worth[before].sum(), abs=1e-5)
        last = rollout.completions.mask[row].sum()
        if last < rollout.completions.mask.shape[1]:  # the state after the response has read all of it
            assert scored.values[row, last] == pytest.approx(worth[ids].sum(), abs=1e-5)
        forgotten.append(abs(worth[ids[:-1]].sum() - scored.scores[row]))
    assert min(forgotten) > 1e-4  # canary: a last token that is forgotten is seen
    assert set(scored.reading.metrics) <= set(ppo.describe(scored))
    batch = ppo.value_batch(scored, np.arange(4))
    assert batch.tokens.tokens.shape[1] != rollout.tokens.tokens.shape[1]
    assert batch.arrays["columns"].shape == (4, rollout.tokens.tokens.shape[1])
    # Fresh values are the old ones: the loss gathers what `score` gathered.
    _, metrics = ppo.value_loss(
        ppo.models.critic.scores(batch.tokens), **(dict(batch.arrays) | {"returns": batch.arrays["old_values"]}),
        **batch.denominators,
    )  # fmt: skip
    assert metrics["loss/value_avg"] == 0
    shifted = dict(batch.arrays) | {"returns": batch.arrays["old_values"], "columns": batch.arrays["columns"] + 1}
    _, metrics = ppo.value_loss(ppo.models.critic.scores(batch.tokens), **shifted, **batch.denominators)
    assert metrics["loss/value_avg"] > 1e-6  # canary: off by one


def test_equal_tokenizers_read_the_same_either_way(models, tmp_path):
    """A policy that writes bytes is tokenised in one way only: its text, read back, must be its tokens."""
    ppo, prompts = start(models, "ours", tmp_path)
    assert ppo.models.read is own_reading
    rollout = ppo.roll_out(prompts, purpose="rl/rollout", step=0)
    words = Tokenizer.load(models["policy"])
    # Letters only: where the vocabulary is bytes, sampled ones are seldom UTF-8.
    tokens = np.where(rollout.completions.mask, 5 + rollout.completions.tokens % 60, words.pad_token_id)
    ends = rollout.completions.mask.sum(axis=1) - 1
    tokens[np.arange(len(ends)), ends] = np.where(rollout.ended, words.eos_token_id, tokens[np.arange(len(ends)), ends])
    done = replace(rollout.completions, tokens=tokens.astype(np.int32))
    joined = rollout.tokens.tokens.copy()
    joined[:, rollout.tokens.first :] = tokens
    rollout = replace(
        rollout,
        completions=done,
        tokens=replace(rollout.tokens, tokens=joined),
        texts=[words.decode(row[mask]) for row, mask in zip(tokens, done.mask, strict=True)],
    )
    own = own_reading(rollout, prompts)
    text = TextReading(ppo.recipe, words, words, max_positions=256)(rollout, prompts)
    critic, mask = ppo.models.critic, done.mask
    values = {name: reading.values(critic.scores(reading.tokens)) for name, reading in (("own", own), ("text", text))}
    np.testing.assert_allclose(values["own"][mask], values["text"][mask], atol=2e-6)
    first = rollout.tokens.first  # what the values were before there was a choice
    assert np.array_equal(values["own"], critic.scores(rollout.tokens)[:, first - 1 : -1])
    scores = [reading.end_scores(critic.scores(reading.tokens)) for reading in (own, text)]
    np.testing.assert_allclose(*scores, atol=2e-6)
    off: Reading = replace(text, columns=text.columns + 1)
    assert np.abs(off.values(critic.scores(text.tokens)) - values["own"])[mask].max() > 0.01  # canary


def test_the_value_batch_of_equal_tokenizers_is_the_one_before(models, tmp_path):
    """Gathering at columns that count up gives the loss the very bits that reading the scores in place gave it."""
    ppo, prompts = start(models, "ours", tmp_path)
    scored = ppo.score(ppo.roll_out(prompts, purpose="rl/rollout", step=0), prompts, 0)
    batch = ppo.value_batch(scored, np.arange(8))
    scores = ppo.models.critic.scores(batch.tokens)
    masked = batch.arrays["mask"].astype(bool)
    gathered = np.take_along_axis(scores, batch.arrays["columns"], axis=1)
    assert np.array_equal(gathered[masked], scores[masked])
    assert np.array_equal(batch.tokens.tokens, scored.rollout.tokens.tokens)
    assert "reading/truncated" not in ppo.describe(scored)


def test_a_whole_run_with_a_reward_model_of_another_family(models, tmp_path):
    """reward and rl: each stage reads and saves its own tokenizer; a run that stopped goes on with the same numbers."""
    settings = ("stages=[reward,rl]", "rl.reward.model_path=null", f"reward.model_path={models['theirs']}")
    found = recipe(models, "theirs", *settings)
    whole = pipeline.run_recipe(found, engine_name="numpy", output=tmp_path / "whole")
    directory = tmp_path / "whole" / "models"
    words = {name: (models[name] / "tokenizer.json").read_bytes() for name in ("policy", "theirs")}
    for name, origin in (("reward", "theirs"), ("rl-critic", "theirs"), ("rl", "policy")):
        assert (directory / name / "tokenizer.json").read_bytes() == words[origin]
        assert Tokenizer.load(directory / name).chat_template == Tokenizer.load(models[origin]).chat_template
        assert read_checkpoint(directory / name, precision="float32").head == ("lm" if name == "rl" else "scalar")
    assert words["policy"] != words["theirs"]
    summary = whole["stages"]["rl"]
    assert summary["reward_reads"] == "retokenised text"
    assert summary["truncated_readings"] == 0
    assert 0 < summary["data"]["longest_prompt_of_reward_model"] < summary["data"]["longest_prompt"]

    class Stop(Exception):
        pass

    def stop_after_one(self, prompts, iteration):
        if iteration == 1:
            raise Stop
        return iterate(self, prompts, iteration)

    iterate = PPO.iterate
    try:
        PPO.iterate = stop_after_one
        with pytest.raises(Stop):
            pipeline.run_recipe(found, engine_name="numpy", output=tmp_path / "halves")
    finally:
        PPO.iterate = iterate
    pipeline.run_recipe(found, engine_name="numpy", output=tmp_path / "halves", resume=True)

    def rows(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        idle = ("time", "eps", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in idle and not k.startswith("timing")} for row in lines]

    assert rows("whole") == rows("halves")
    assert any("reading/tokens_mean" in row for row in rows("whole"))


def test_rows_that_the_reward_model_cannot_take(models, tmp_path):
    """Refused before anything is written where a prompt is too long; in a rollout, refused or cut and counted."""
    with pytest.raises(
        UserError, match=r"row \d+ of data.prompts: the prompt has \d+ tokens as the reward model .* 12 "
    ):
        start(models, "short", tmp_path)
    assert not (tmp_path / "run").exists()
    ppo, prompts = start(models, "scores", tmp_path)
    rollout = ppo.roll_out(prompts, purpose="rl/rollout", step=0)
    words = [Tokenizer.load(models[name]) for name in ("policy", "scores")]
    full = ppo.models.read(rollout, prompts)
    limit = int(full.tokens.attention.sum(axis=1).max()) - 2
    found = recipe(models, "scores", "stages=[rl]", "rl.reward.too_long=truncate")
    cut = TextReading(found, *words, max_positions=limit)(rollout, prompts)
    over = full.tokens.attention.sum(axis=1) > limit
    assert cut.metrics["reading/truncated"] == over.sum() > 0
    assert cut.metrics["reading/tokens_max"] == limit
    assert (cut.columns <= cut.ends[:, None]).all()
    assert (cut.ends[over] == limit - 1).all()
    assert np.array_equal(cut.columns, np.minimum(full.columns, cut.ends[:, None]))
    with pytest.raises(
        UserError, match=r"row \d+ of data.prompts: a sampled response makes .* rl.reward.too_long to tru"
    ):
        TextReading(ppo.recipe, *words, max_positions=limit)(rollout, prompts)
    tight = TextReading(found, *words, max_positions=int(full.columns[:, 0].min()) + 1)
    split = ppo.context.datasets.prompts
    with pytest.raises(
        UserError, match=r"row \d+ of data.prompts: the prompt has \d+ tokens as the reward model reads"
    ):
        tight.fit(split, "error")
    kept = tight.fit(split, "drop")
    assert kept.report["dropped_by_reward_model"] == len(split.train + split.held_out) - len(kept.train + kept.held_out)


IGNORED = {
    "a choice without a use": ("ours", ["rl.reward.too_long=truncate"], "rl.reward.too_long has no effect"),
    "balance without experts": ("ours", ["model.balance_coef=0.1"], "model.balance_coef: no model of this run"),
    "policy beyond its positions": (
        "ours",
        ["rollout.max_new_tokens=250", "data.buckets=[512]"],
        "256 positions of the p",
    ),
}


@pytest.mark.parametrize("case", IGNORED)
def test_settings_that_cannot_be(models, tmp_path, case):
    reward_model, overrides, message = IGNORED[case]
    with pytest.raises(UserError, match=message):
        start(models, reward_model, tmp_path, *overrides)
    assert not (tmp_path / "run").exists()


def test_sft_and_policy_share_one_tokenizer(models, tmp_path):
    found = recipe(models, "scores", "stages=[sft,rl]", f"rl.policy_path={models['theirs']}")
    with pytest.raises(UserError, match="the policy has another tokenizer than"):
        pipeline.prepare(found, engine_name="numpy", output=tmp_path / "run")


def test_the_balance_of_experts_comes_from_recipe_or_config(models, tmp_path):
    mixtral = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    asked = mixtral | {"output_router_logits": True, "router_aux_loss_coef": 0.25}
    coefficients = {}
    for name, config, overrides in (
        ("silent", mixtral, []), ("asked", asked, []), ("set", asked, ["model.balance_coef=0.5"]),
        ("off", asked, ["model.balance_coef=0"]),
    ):  # fmt: skip
        policy = make_model(tmp_path, name, config, vocab_size=262)
        ppo, _ = start(models, "scores", tmp_path / f"of-{name}", f"model.path={policy}", *overrides)
        coefficients[name] = (ppo.policy_loss.balance, ppo.value_loss.balance)
    assert coefficients == {"silent": (0, 0), "asked": (0.25, 0), "set": (0.5, 0), "off": (0, 0)}


def test_stages_that_name_their_models_need_no_base(models, tmp_path):
    found = recipe(models, "scores", "stages=[rl]", "model.path=null", f"rl.policy_path={models['policy']}")
    context = pipeline.prepare(found, engine_name="numpy", output=tmp_path / "run")
    assert context.tokenizer_directory == models["policy"]
    assert context.tokenizers["reward_model"].vocab_size == 330


@pytest.mark.parametrize("family", ["rnn", "bloom"])
def test_a_new_model_of_any_family_has_the_ids_of_its_tokenizer(tmp_path, family):
    found = load_recipe(QUICKSTART.parent / "families" / f"{family}.yaml")
    context = pipeline.prepare(found, engine_name="numpy", output=tmp_path / "run")
    checkpoint = read_checkpoint(context.model_directories["sft"], precision="float32")
    assert checkpoint.config["model_type"] == family
    assert checkpoint.config["vocab_size"] == context.tokenizer.vocab_size == 400
    assert checkpoint.config["eos_token_id"] == context.tokenizer.eos_token_id
    assert checkpoint.config["pad_token_id"] == context.tokenizer.pad_token_id
