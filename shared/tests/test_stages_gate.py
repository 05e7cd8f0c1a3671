"""The gate on a NumPy engine: what it passes, what it stops (each a seeded bug), and when a run comes to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych import random
from diptych.data.examples import PromptExample
from diptych.data.tokenizer import Tokenizer
from diptych.engine import Completions, EngineSettings, Finish, Model, ModelSpec, Sampling
from diptych.errors import InvariantError
from diptych.parity.tolerances import TOLERANCES, coarser
from diptych.recipe.load import load_recipe
from diptych.stages import pipeline
from diptych.stages.gate import NEW_TOKENS, Gate, check_gate, gate_prompts, near_ties
from diptych.world import SINGLE

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
LIMIT = TOLERANCES["sampler_gap"].at("float32")
SAMPLING = Sampling(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=40, stop_token_ids=(3,), decode_rows=3)


class TableModel(Model):
    """log p(token | token before) from keyed logits. `wrong`: the generation's bug. calls: what was asked, in order."""

    def __init__(self, spec, calls=None):
        self.spec, self.wrong = spec, None
        size = spec.config["vocab_size"]
        self.logits = random.normal(1, "logits", (size, size), std=2.0).astype(np.float64)
        self.calls = [] if calls is None else calls
        self.updates = 0

    def table(self, temperature):
        scaled = self.logits / temperature
        return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))

    def columns(self, batch, values):
        found = np.zeros(batch.tokens.shape, values.dtype)
        found[:, 1:] = values
        found[:, : batch.first] = 0
        return found

    def logprobs(self, batch, *, temperature):
        return self.columns(batch, self.table(temperature)[batch.tokens[:, :-1], batch.tokens[:, 1:]])

    def greedy_matches(self, batch):
        return self.columns(batch, self.logits[batch.tokens[:, :-1]].argmax(axis=-1) == batch.tokens[:, 1:])

    def scores(self, batch):
        return np.zeros(batch.tokens.shape)

    def update(self, loss, batch, *, learning_rate):
        self.updates += 1
        outputs = self.scores(batch.tokens)
        extra = {}
        if loss.reads == "logprobs":
            outputs = self.logprobs(batch.tokens, temperature=loss.temperature)
            extra = {"entropy": np.zeros_like(outputs)}
        value, metrics = loss(outputs, **batch.arrays, **extra, **batch.denominators)
        return {"loss": float(value), "grad_norm": 0.0} | {name: float(metric) for name, metric in metrics.items()}

    def generate(self, prompts, sampling, uniforms, *, pad_token_id):
        greedy = sampling.temperature == 0
        self.calls.append(("gate" if greedy else "rollout", len(prompts), sampling))
        rows, new = uniforms.shape
        tokens, mask = np.full((rows, new), pad_token_id, np.int32), np.zeros((rows, new), bool)
        logprobs, margins = np.zeros((rows, new)), np.zeros((rows, new))
        table = self.table(sampling.scoring_temperature)
        for row in range(rows):
            last = prompts.tokens[row, -1]
            for column in range(new):
                p = np.exp(table[last])
                order = np.argsort(-p)
                drawn = int(np.searchsorted(np.cumsum(p), uniforms[row, column]))
                token = order[0] if greedy else min(drawn, len(p) - 1)
                tokens[row, column], mask[row, column] = token, True
                logprobs[row, column], margins[row, column] = table[last, token], (p[order[0]] - p[order[1]]) / 2
                if (row, column) == (2, 5) and greedy:
                    self.spoil(tokens, mask, logprobs, margins, table[last], order)
                last = tokens[row, column]
                if last in sampling.stop_token_ids:
                    break
        finish = np.where(np.isin(tokens, sampling.stop_token_ids).any(axis=1), Finish.STOP, Finish.LENGTH)
        return Completions(tokens=tokens, mask=mask, logprobs=logprobs, margins=margins, finish=finish.astype(np.int32))

    def spoil(self, tokens, mask, logprobs, margins, table, order):
        """The seeded bug at row 2, position 5."""
        if self.wrong == "log-probability":
            logprobs[2, 5] -= 1.01 * LIMIT
        elif self.wrong == "token":
            tokens[2, 5], logprobs[2, 5] = order[1], table[order[1]]
        elif self.wrong == "not finite":
            logprobs[2, 5] = np.nan
        elif self.wrong == "margin not finite":
            tokens[2, 5], logprobs[2, 5], margins[2, 5] = order[1], table[order[1]], np.nan
        elif self.wrong == "ended":
            mask[2, 5] = False
        elif self.wrong == "near-tie":
            tokens[2, 5], logprobs[2, 5] = order[1], table[order[1]]
            margins[2, 5] = 0.99 * LIMIT * np.exp(table[order[1]])

    def rollout_metrics(self):
        return {}

    def weights(self, names=None):
        return dict(self.spec.weights)

    def save_checkpoint(self, directory):
        (directory / "updates.json").write_text(json.dumps(self.updates))
        return lambda: None

    def load_checkpoint(self, directory):
        self.updates = json.loads((directory / "updates.json").read_text())


class TableEngine:
    name, world, settings = "table", SINGLE, EngineSettings(precision="float32")

    def __init__(self):
        self.calls = []

    def check_model(self, config, role):
        pass

    def compilations(self):
        return None

    def memory(self):
        return None

    def model(self, spec):
        return TableModel(spec, self.calls)

    def environment(self):
        return {"engine": "table"}

    def instruments(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.train(["sunny greetings from the sea", "rain again"], vocab_size=280, directory=directory)


def examples(lengths, vocab=280):
    rng = np.random.default_rng(0)
    return [
        PromptExample(row=10 * row, tokens=rng.integers(4, vocab, length), text="", data={})
        for row, length in enumerate(lengths)
    ]


def gate(tokenizer, wrong=None, **changes):
    policy = TableModel(
        ModelSpec(config={"vocab_size": 280}, weights={}, head="lm", optimizer=None, micro_batch_size=4)
    )
    policy.wrong = wrong
    settings = {
        "recipe": load_recipe(QUICKSTART), "sampling": SAMPLING, "tokenizer": tokenizer, "precision": "float32",
        "name": "the table engine",
    } | changes  # fmt: skip
    return policy, check_gate(policy, policy, examples([4, 9, 9, 20, 30]), **settings)


def test_a_sound_sampler_passes_and_says_so(tokenizer, capsys):
    policy, found = gate(tokenizer)
    assert found == Gate(rows=4, tokens=4 * NEW_TOKENS, near_ties=0, gap_max=0.0)
    assert "gate: the table engine generates what is trained: 96 greedy tokens of 4 prompts" in capsys.readouterr().err
    [(_, rows, how)] = policy.calls
    assert rows == 4
    # Greedily, to the last column, with rows that take the places of others where the run does that too.
    assert (how.temperature, how.top_k, how.top_p, how.stop_token_ids, how.decode_rows) == (0, 0, 1, (), 2)
    gate(tokenizer, sampling=replace(SAMPLING, max_new_tokens=7, decode_rows=None), quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("log-probability", r"position 5: token \d+ \('.*'\): sampler -\d.\d+, training forward -\d.\d+\n"),
        ("token", "to which another token is likelier"),
        ("not finite", "sampler nan, training forward"),
        ("margin not finite", "to which another token is likelier"),
        ("ended", "position 5: nothing, although no token may end a row here"),
    ],
)
def test_canary_a_broken_sampler_is_stopped(tokenizer, wrong, message):
    with pytest.raises(InvariantError, match=message) as caught:
        gate(tokenizer, wrong)
    text = str(caught.value)
    assert text.startswith("rl: what generates is not what is trained. the table engine completed 4 prompts greedily")
    assert "row 31 of data.prompts (20 tokens), position 5" in text
    assert "in all 1 positions of 1 of the 4 rows" in text
    assert "Likely causes: decode weights" in text


def test_near_ties_are_let_pass_and_counted(tokenizer):
    _, found = gate(tokenizer, "near-tie")
    assert found.near_ties == 1


@pytest.mark.parametrize("limit", [1e-9, 1e-3, 0.3])
def test_a_near_tie_is_what_the_band_can_turn_over(limit):
    """Two tokens p and q: it is a near-tie exactly where q e^limit >= p e^-limit."""
    p = 0.4
    for closer, expected in ((0.999, True), (1.001, False)):
        q = p * np.exp(-2 * limit * closer)
        found = near_ties(np.array([[np.log(p)]]), np.array([[(p - q) / 2]]), limit)
        assert bool(found[0, 0]) is expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 3, 9, 7], [3, 5, 7, 9]),  # the shortest first
        (list(range(1, 101)), [1, 15, 29, 43, 58, 72, 86, 100]),  # spread over all lengths
        ([6, 6, 6], [6, 3, 2, 1]),  # nothing ragged: later halves
        ([12, 20], [12, 20, 10, 5]),
        ([4, 8, 16, 512, 513, 9000], [4, 8, 16, 512]),  # the long ones are passed over
        ([600, 700], [600, 300, 150, 75]),  # nothing else
        ([1], [1, 1, 1, 1]),
    ],
)
def test_prompts_are_few_short_and_ragged(lengths, expected):
    train = examples(lengths)
    chosen = gate_prompts(train)
    assert [len(prompt.tokens) for prompt in chosen] == expected
    for prompt in chosen:  # a row of the data, or the end of one
        whole = train[prompt.row // 10].tokens
        assert (whole[len(whole) - len(prompt.tokens) :] == prompt.tokens).all()


def test_the_coarser_precision_decides():
    assert coarser("float32", "bfloat16") == coarser("bfloat16", "float64") == "bfloat16"
    assert coarser("float32", "float64") == "float32"


RUN = [
    "stages=[rl]", "model.new.vocab_size=400", "model.new.hidden_size=8", "model.new.intermediate_size=8",
    "data.demonstrations.limit=60", "data.prompts.limit=40", "data.max_prompt_tokens=64",
    "rl.reward.function=diptych.data.tasks.postcards:score", "rl.iterations=3", "rl.batch_size=4",
    "rl.micro_batch_size=4", "rl.mini_batches=1", "rl.epochs=1",
    "rl.eval_every=3", "rl.eval_prompts=4", "rl.max_kl=null", "checkpoint.every=1", "rollout.max_new_tokens=8",
]  # fmt: skip


def test_a_run_comes_to_the_gate_before_its_first_rollout_and_after_a_resume(tmp_path, monkeypatch):
    engine = TableEngine()
    monkeypatch.setattr(pipeline, "load_engine", lambda _name, _settings: engine)

    def run(*overrides, output="run", **how):
        engine.calls.clear()
        recipe = load_recipe(QUICKSTART, [*RUN, *overrides])
        pipeline.run_recipe(recipe, engine_name="table", output=tmp_path / output, **how)
        return [name for name, _, _ in engine.calls]

    assert run() == ["gate"] + ["rollout"] * 5  # evaluations before and after among them
    assert run("rollout.gate=false", output="without") == ["rollout"] * 5

    class Interrupted(Exception):
        pass

    def interrupt(model, loss, batch, *, learning_rate):
        if model.updates == 2 and loss.reads == "logprobs":
            raise Interrupted
        return update(model, loss, batch, learning_rate=learning_rate)

    update = TableModel.update
    with monkeypatch.context() as patch:
        patch.setattr(TableModel, "update", interrupt)
        with pytest.raises(Interrupted):
            run(output="again")
    assert run(output="again", resume=True) == ["gate", "rollout", "rollout"]
    # Canary: what the gate finds after a resume stops the run.
    with monkeypatch.context() as patch:
        patch.setattr(TableModel, "update", interrupt)
        with pytest.raises(Interrupted):
            run(output="broken")
    with monkeypatch.context() as patch:
        patch.setattr(TableModel, "greedy_matches", lambda self, batch: np.zeros(batch.tokens.shape, bool))
        with pytest.raises(InvariantError, match=r"the table engine \(rollout.engine auto\) completed"):
            run(output="broken", resume=True)
