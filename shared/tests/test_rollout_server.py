"""Rollout servers: answers that are refused, weights that are sent in pieces and only when they have changed, several
processes, and what a run says about a server that is stale or coarse. The servers here live in this process; one in a
process of its own is in parity_tests/test_gate.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diptych import random
from diptych.engine import AdapterSpec, Finish, Model, ModelSpec, PromptBatch, Sampling
from diptych.errors import InvariantError, UserError
from diptych.families.adapter import initial_adapter, merge
from diptych.families.family import read_model, tensor_shapes
from diptych.rewards.function import load_target
from diptych.rollout_server import BUILT_IN, Answer, Request, is_server, read_answer
from diptych.stages import served
from diptych.stages.served import ServedPolicy
from diptych.world import SINGLE
from shared.tests.test_world import in_all

SAMPLING = Sampling(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=4, stop_token_ids=(2, 3))
REQUEST = Request(
    prompts=[[5, 6], [7], [8, 9, 4]],
    sampling=SAMPLING,
    uniforms=np.linspace(0, 0.9, 12, dtype=np.float32).reshape(3, 4),
)
GOOD = {
    "version": "a-1",
    "tokens": [[5, 2], [6, 7, 8, 9], [3]],
    "logprobs": [[-1.0, -2.0], [-0.1, -0.2, -0.3, -0.4], [-5.0]],
}


def read(request=REQUEST, **changes):
    where = "rollout server s.py:make"
    options = {"version": "a-1", "vocab_size": 16, "pad_token_id": 0, "dtype": np.float32, "where": where}
    return read_answer(Answer(**GOOD | changes), request, **options)


def test_a_good_answer_is_a_samplers():
    done = read()
    assert done.tokens.tolist() == [[5, 2, 0, 0], [6, 7, 8, 9], [3, 0, 0, 0]]
    assert done.mask.sum(axis=1).tolist() == [2, 4, 1]
    assert done.finish.tolist() == [Finish.STOP, Finish.LENGTH, Finish.STOP]
    assert done.logprobs.dtype == np.float32
    assert done.logprobs[0].tolist() == [-1, -2, 0, 0]
    assert np.isinf(done.margins[done.mask]).all()
    told = read(margins=[[0.1, 0.2], [0.3, 0.1, 0.2, 0.4], [0.25]])
    assert told.margins[2].tolist() == [0.25, 0, 0, 0]
    arrays = {name: [np.asarray(row) for row in GOOD[name]] for name in ("tokens", "logprobs")}
    assert (read(**arrays).tokens == done.tokens).all()
    stopped = read(tokens=[[5, 2], [6, 7, 8, 3], [3]])  # at the last column
    assert stopped.finish[1] == Finish.STOP


def tokens(row):
    return {"tokens": [row, *GOOD["tokens"][1:]]}


def logprobs(row):
    return {"logprobs": [row, *GOOD["logprobs"][1:]]}


BAD = {
    "stale": ({"version": "a-0"}, InvariantError, "weights of version 'a-0', and the policy's are 'a-1'"),
    "rows": ({"tokens": GOOD["tokens"][:2]}, UserError, "tokens of 2 rows for 3 prompts"),
    "rows of log-probabilities": ({"logprobs": []}, UserError, "logprobs of 0 rows for 3 prompts"),
    "margins' rows": ({"margins": [[0.1, 0.1]]}, UserError, "margins of 1 rows for 3 prompts"),
    "none": (tokens([]), UserError, "row 0: tokens must be a flat list of integers"),
    "no integers": (tokens([5.0, 2.0]), UserError, "row 0: tokens must be a flat list of integers"),
    "nested": (tokens([[5], [2, 2]]), UserError, "row 0: tokens must be a flat list of integers"),
    "too long": (tokens([5, 5, 5, 5, 2]), UserError, r"row 0: 5 tokens, where 1 to 4 \(rollout.max_new_tokens\)"),
    "vocabulary": (tokens([16, 2]), UserError, "token 16 at position 0 is not in the vocabulary of 16"),
    "negative": (tokens([5, -1]), UserError, "token -1 at position 1"),
    "goes on": (tokens([2, 5]), UserError, "goes on after the stop token at position 0"),
    "missing stop": (tokens([5, 6]), UserError, "ends after 2 of 4 tokens without a stop token"),
    "fewer numbers": (logprobs([-1.0]), UserError, r"row 0: logprobs: shape \[1\], and the row has 2 tokens"),
    "words": (logprobs(["a", "b"]), UserError, "row 0: logprobs must be a flat list of numbers"),
    "nan": (logprobs([-1.0, float("nan")]), InvariantError, "row 0: logprobs: nan at position 1"),
    "infinite": (logprobs([-np.inf, -1.0]), InvariantError, "row 0: logprobs: -inf at position 0"),
    "margins": ({"margins": [[0.1, np.nan], [1] * 4, [1]]}, InvariantError, "row 0: margins: nan at position 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_refused_by_name(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("rollout server s.py:make")


def test_greedy_requests_need_margins():
    with pytest.raises(UserError, match="no margins, and a greedy request asks for them"):
        read(replace(REQUEST, sampling=replace(SAMPLING, temperature=0.0)))
    with pytest.raises(UserError, match="must return an Answer, not dict"):
        read_answer(
            GOOD, REQUEST, version="a-1", vocab_size=16, pad_token_id=0, dtype=np.float32, where="rollout server"
        )


def test_seeds_follow_the_uniforms():
    seeds = REQUEST.seeds
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    other = Request(prompts=REQUEST.prompts[1:], sampling=SAMPLING, uniforms=REQUEST.uniforms[1:])
    assert other.seeds == seeds[1:]  # the same row draws the same in any batch


def test_what_names_a_server():
    assert not any(is_server(engine) for engine in BUILT_IN)
    assert is_server("servers.py:make")


# --- the policy that is served ---------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER = AdapterSpec(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


class Policy(Model):
    """Weights, and which of them were brought to the host."""

    def __init__(self, adapter=None):
        shapes = tensor_shapes(read_model(CONFIG), "lm")
        self.held = {name: random.normal(0, name, shape, std=1.0) for name, shape in shapes.items()}
        self.adapter = {}
        if adapter is not None:
            started = initial_adapter(read_model(CONFIG), adapter, seed=0)
            self.adapter = {name: value + np.float32(0.1) for name, value in started.items()}
        self.spec = ModelSpec(config=CONFIG, weights={}, head="lm", optimizer=None, micro_batch_size=2, adapter=adapter)
        self.asked = []

    def weights(self, names=None):
        self.asked.append(list(names))
        return {name: self.held[name].copy() for name in names}

    def adapter_weights(self):
        return dict(self.adapter)


SERVER = """
from diptych.rollout_server import Answer

made = []


class Server:
    precision = "bfloat16"

    def __init__(self, start):
        self.start, self.pieces, self.closed = start, [], False
        made.append(self)

    def load_weights(self, tensors, *, version, done):
        self.pieces.append((dict(tensors), version, done))
        if done:
            self.version = version

    def generate(self, request):
        rows = len(request.prompts)
        self.request = request
        return Answer(version=self.version, tokens=[[2]] * rows, logprobs=[[-1.0]] * rows)

    def close(self):
        self.closed = True


def fails(start):
    raise RuntimeError("no GPU left")


class Odd(Server):
    precision = "float8"


class Half:
    def __init__(self, start):
        pass

    def close(self):
        pass
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "servers.py").write_text(SERVER)
    return str(tmp_path / "servers.py")


def serve(target, policy, tmp_path, world=SINGLE, **changes):
    settings = {"tokenizer_directory": tmp_path, "precision": "float32", "world": world, **changes}
    return ServedPolicy(target, policy, **settings)


PROMPTS = PromptBatch(
    tokens=np.array([[0, 5, 6], [7, 8, 9]], np.int32),
    attention=np.array([[False, True, True], [True, True, True]]),
    positions=np.array([[0, 0, 1], [0, 1, 2]], np.int32),
)
UNIFORMS = np.full((2, 4), 0.5, np.float32)


def generate(policy):
    return policy.generate(PROMPTS, SAMPLING, UNIFORMS, pad_token_id=0)


def test_weights_are_sent_in_pieces_and_only_when_they_have_changed(target, tmp_path):
    policy = Policy()
    with serve(f"{target}:Server", policy, tmp_path, piece=600) as sampler:
        server = sampler._server
        sampler.load(updates=0)
        sampler.load(updates=0)
        done = generate(sampler)
        sent = {name: value for tensors, _, _ in server.pieces for name, value in tensors.items()}
        assert sent.keys() == policy.held.keys()
        assert all((sent[name] == value).all() for name, value in policy.held.items())
        sizes = [sum(value.nbytes for value in tensors.values()) for tensors, _, _ in server.pieces]
        assert len(sizes) > 3
        assert all(size <= 600 or len(piece[0]) == 1 for size, piece in zip(sizes, server.pieces, strict=True))
        assert [list(tensors) for tensors, _, _ in server.pieces] == policy.asked  # never more than a piece on the host
        assert [done for _, _, done in server.pieces] == [False] * (len(sizes) - 1) + [True]
        versions = {version for _, version, _ in server.pieces}
        assert [version.partition("-")[2] for version in versions] == ["0"]
        assert sampler.rollout_metrics()["timing_s/switch"] > 0
        assert sampler.rollout_metrics() == {}

        assert done.tokens.tolist() == [[2, 0, 0, 0]] * 2
        assert server.request.prompts == [[5, 6], [7, 8, 9]]
        sampler.load(updates=1)
        assert len(server.pieces) == 2 * len(sizes)
        assert server.pieces[-1][1] not in versions
        generate(sampler)
        server.version = versions.pop()  # canary: it runs what it had before
        with pytest.raises(InvariantError, match="its weights are stale"):
            generate(sampler)
    assert server.closed
    assert sampler.precision == "bfloat16"
    assert server.start.precision == "float32"
    assert server.start.config == CONFIG
    assert server.start.tokenizer_directory.is_absolute()


def test_the_version_of_another_run_is_stale(target, tmp_path):
    with serve(f"{target}:Server", Policy(), tmp_path) as one, serve(f"{target}:Server", Policy(), tmp_path) as other:
        one.load(updates=0)
        other.load(updates=0)
        one._server.version = other._server.version
        with pytest.raises(InvariantError, match="another run writes to it"):
            generate(one)


def test_an_adapter_is_merged_into_what_is_sent(target, tmp_path):
    policy = Policy(ADAPTER)
    with serve(f"{target}:Server", policy, tmp_path, piece=600) as sampler:
        sampler.load(updates=0)
        sent = {name: value for tensors, _, _ in sampler._server.pieces for name, value in tensors.items()}
    expected = merge(read_model(CONFIG), ADAPTER, policy.held, policy.adapter)
    assert sent.keys() == expected.keys()
    assert all((sent[name] == value).all() for name, value in expected.items())
    changed = [name for name, value in policy.held.items() if (sent[name] != value).any()]
    assert len(changed) == 4  # two linear layers of two layers


def test_a_server_that_fails_to_take_weights_does_not_count_as_having_them(target, tmp_path, monkeypatch):
    with serve(f"{target}:Server", Policy(), tmp_path) as sampler:
        sampler.load(updates=0)
        with monkeypatch.context() as patch:
            patch.setattr(sampler._server, "load_weights", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sampler.load(updates=1)
        sampler.load(updates=0)
        assert len(sampler._server.pieces) == 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fails", RuntimeError, "no GPU left"),
        ("absent", UserError, "rollout server .*: .* has no 'absent'; it has Answer, Half, Odd, Server, fails"),
        ("Half", UserError, "Half has no precision, load_weights, generate"),
        ("Odd", UserError, "precision 'float8' is none of float32, float64, bfloat16"),
    ],
)
def test_a_factory_that_makes_no_server_is_refused(target, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        serve(f"{target}:{name}", Policy(), tmp_path)


def test_one_process_talks_to_the_server_and_all_have_its_answer(target, tmp_path, monkeypatch):
    servers = []
    monkeypatch.setattr(
        served, "load_target", lambda *names: lambda start: servers.append(made := load_target(*names)(start)) or made
    )
    policies = [Policy() for _ in range(3)]

    def work(world):
        with serve(f"{target}:Server", policies[world.index], tmp_path, world=world, piece=600) as sampler:
            sampler.load(updates=0)
            done = generate(sampler)
            if world.is_main:
                servers[0].version = "stale"
            try:
                generate(sampler)
            except InvariantError as error:
                return sampler.precision, done.tokens.tolist(), str(error)

    results = in_all(work)
    assert len(servers) == 1
    assert servers[0].closed
    # Bringing weights to the host is collective: all processes ask for the same pieces.
    assert policies[0].asked == policies[1].asked == policies[2].asked
    assert [result[:2] for result in results] == [("bfloat16", [[2, 0, 0, 0]] * 2)] * 3
    assert all("its weights are stale" in result[2] for result in results)
