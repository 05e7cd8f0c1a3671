"""The hybrid engine: what generates is what is trained, at every stage; and what is not so is seen."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.engine import (
    AdapterSpec,
    EngineSettings,
    Loss,
    ModelSpec,
    OptimizerSpec,
    PromptBatch,
    Sampling,
    TrainBatch,
    load_engine,
)
from diptych.errors import InvariantError, UserError
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model
from diptych.layout import DECODE_RULES, Layout, MeshShape, Zero, check_slots
from diptych_torch import deepspeed_rollout, switch, tensor_parallel, zero

ADAMW = OptimizerSpec(name="adamw")
SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=6, stop_token_ids=(1, 2))
LOSS = Loss(function=lambda logprobs, **_: ((logprobs * 0.1).sum(), {}), reads="logprobs")
OPT: dict[str, Any] = {
    "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip


@pytest.fixture
def make(hot_weights, make_config):
    def build(*, config: Any = None, precision: Any = "float32", adapter: bool = False, **layout: Any) -> Any:
        settings = {"rollout": layout.pop("rollout", "auto")}
        config = config or make_config()
        spec = AdapterSpec(rank=2, alpha=4.0, targets=("all-linear",)) if adapter else None
        rng = np.random.default_rng(5)
        added = {} if spec is None else adapter_shapes(read_model(config), spec)
        engine = load_engine("torch", EngineSettings(precision=precision, layout=Layout(**layout), **settings))
        return engine.model(
            ModelSpec(
                config=config, weights=hot_weights(config), head="lm", optimizer=ADAMW, micro_batch_size=2,
                adapter=spec, adapter_weights={name: rng.normal(0, 0.1, shape) for name, shape in added.items()},
            )
        )  # fmt: skip

    return build


@pytest.fixture
def prompts(make_batch):
    batch = make_batch(rows=5, length=7)
    attention = np.arange(7) >= np.array([[3], [0], [1], [6], [0]])
    positions = np.maximum(attention.cumsum(axis=1) - 1, 0).astype(np.int32)
    return PromptBatch(tokens=batch.tokens, attention=attention, positions=positions)


def sample(model: Any, prompts: PromptBatch, sampling: Sampling = SAMPLING) -> Any:
    uniforms = np.random.default_rng(3).random((len(prompts), sampling.max_new_tokens))
    return model.generate(prompts, sampling, uniforms, pad_token_id=0)


def train(model: Any, batch: Any) -> None:
    model.update(LOSS, TrainBatch(tokens=batch, arrays={}, denominators={}), learning_rate=1e-2)


# -- fingerprints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fingerprints_of_pieces_add_up_and_tell_tensors_apart(dtype, monkeypatch):
    monkeypatch.setattr(switch, "_AT_ONCE", 5)
    x = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(switch.fingerprint(x))
    cuts = [0, 1, 7, 7, 20, 37]
    pieces = [switch.fingerprint(x[a:b], a) for a, b in itertools.pairwise(cuts)]
    assert int(sum(pieces)) % 2**32 == whole
    swapped = x.clone()
    swapped[[3, 30]] = swapped[[30, 3]]
    nudged = x.clone()
    nudged[11] = torch.nextafter(nudged[11], torch.tensor(torch.inf, dtype=dtype))
    for other in (swapped, nudged, x.roll(1), -x, torch.zeros_like(x)):
        assert int(switch.fingerprint(other)) != whole


# -- the decode copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("stage", "precision"), [(0, "float64"), (1, "bfloat16"), (2, "float32"), (3, "float64")])
def test_generating_is_scoring_and_leaves_no_trace(make, prompts, make_batch, stage, precision, adapter):
    """After a step: log-probabilities are the training forward's, and the weights, moments and future are the same as
    without a rollout."""
    limit = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.3}[precision]
    batch = make_batch()
    model, other = (make(precision=precision, adapter=adapter, zero=Zero(stage=stage)) for _ in range(2))
    for one in (model, other):
        train(one, batch)
    done = sample(model, prompts)
    scored = model.logprobs(joined(prompts, done), temperature=1.0)[:, prompts.tokens.shape[1] :]
    assert np.abs(np.where(done.mask, scored - done.logprobs, 0)).max() <= limit
    assert done.mask.sum() > len(prompts)
    for one in (model, other):
        train(one, batch)
    read = (lambda one: one.adapter_weights()) if adapter else (lambda one: one.weights())
    assert all(np.array_equal(value, read(other)[name]) for name, value in read(model).items())
    assert model.rollout_metrics()["timing_s/switch"] > 0
    assert not model.rollout_metrics()


def joined(prompts: PromptBatch, done: Any) -> Any:
    from diptych.data.batches import join

    return join(prompts, done)


@pytest.mark.parametrize("chunk", [1, 2**12])
def test_the_size_of_groups_changes_nothing(make, prompts, chunk):
    made = [sample(make(precision="float64", zero=Zero(stage=3), switch_chunk=size), prompts) for size in (None, chunk)]
    assert np.array_equal(made[0].tokens, made[1].tokens)
    assert np.array_equal(made[0].logprobs, made[1].logprobs)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")])
def test_canary_a_network_that_is_not_what_is_trained_is_seen(make, prompts, monkeypatch, stage, precision):
    """DeepSpeed's copy of a weight is stale or damaged: the masters say otherwise."""
    model = make(precision=precision, zero=Zero(stage=stage))
    sample(model, prompts)
    weight = model._weights["model.layers.1.mlp.down_proj.weight"]
    if stage == 3 and precision == "float32":  # the optimizer updates this very memory: the pieces are misplaced
        piece = zero.Shards.piece
        monkeypatch.setattr(
            zero.Shards, "piece", lambda self, one, key=None: shifted(piece(self, one, key), one is weight)
        )
    else:
        (weight.ds_tensor if stage == 3 else weight).data.view(-1)[7] += 1
    with pytest.raises(InvariantError, match=r"model\.layers\.1\.mlp\.down_proj"):
        sample(model, prompts)


def shifted(piece: Any, is_wrong: bool) -> Any:
    return piece[0] + is_wrong, piece[1]


def test_the_copys_logprobs_are_compared_when_asked(make, prompts, monkeypatch):
    model = make(precision="float64", zero=Zero(stage=3), switch_check="logprobs")
    sample(model, prompts)
    assert model.rollout_metrics()["switch/logprob_gap_max"] <= 1e-12
    original = switch.switch

    def wrong(*arguments: Any, **options: Any) -> Any:
        made = original(*arguments, **options)
        made.weights["model.norm.weight"] *= 1.001
        return made

    monkeypatch.setattr("diptych_torch.hybrid.switch", wrong)
    with pytest.raises(InvariantError, match="log-probabilities of the prompts"):
        sample(model, prompts)


# -- DeepSpeed's own hybrid engine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "precision"), [(0, "float64"), (2, "float32"), (3, "float64"), (3, "bfloat16")])
def test_deepspeeds_hybrid_engine_draws_our_tokens(make, prompts, make_batch, stage, precision):
    made, batch = [], make_batch()
    for rollout in ("native", "deepspeed"):
        model = make(config=OPT, precision=precision, rollout=rollout, zero=Zero(stage=stage))
        train(model, batch)
        made.append(sample(model, prompts))
        train(model, batch)  # goes on training after it
        assert type(model._deepspeed).__name__ == (
            "DeepSpeedHybridEngine" if rollout == "deepspeed" else "DeepSpeedEngine"
        )
    ours, theirs = made
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert np.array_equal(ours.mask, theirs.mask)
    assert np.array_equal(ours.finish, theirs.finish)
    assert np.abs(ours.logprobs - theirs.logprobs).max() <= (1e-12 if precision == "float64" else 1e-2)
    assert 0 < ours.mask.sum() < ours.mask.size


@pytest.mark.parametrize(
    ("family", "reason"), [("qwen2", "no inference policy for Qwen2ForCausalLM"), ("llama", "do not exist for the CPU")]
)
def test_deepspeeds_hybrid_engine_is_refused_with_the_reason(make, make_config, family, reason):
    with pytest.raises(UserError, match=reason):
        make(config=make_config(model_type=family), rollout="deepspeed")


def test_deepspeeds_kernels_are_refused_beside_an_adapter_and_where_they_break(make, prompts, monkeypatch):
    with pytest.raises(UserError, match="do not know peft's adapters"):
        make(rollout="deepspeed", adapter=True)
    monkeypatch.setattr(deepspeed_rollout, "check", lambda *_: None)
    with pytest.raises(UserError, match="could not set its kernels up for LlamaForCausalLM"):
        make(rollout="deepspeed")
    model = make(config=OPT, rollout="deepspeed")
    with pytest.raises(UserError, match="rollout.decode_rows needs rollout.engine=native"):
        sample(model, prompts, Sampling(**{**SAMPLING.__dict__, "decode_rows": 2}))


def test_auto_says_what_it_took_and_why():
    assert "native (auto: " in load_engine("torch", EngineSettings(precision="float32")).environment()["rollout"]


# -- decoding on several processes together ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "query heads"),
        ({"intermediate_size": 50}, 4, "inner width"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48}, 2, "key-value heads"),
        ({"model_type": "opt"}, 2, "not opt"),
    ],
)
def test_what_cannot_be_split_is_refused(make_config, changes, size, message):
    config = OPT if "model_type" in changes else make_config(**changes)
    with pytest.raises(UserError, match=message):
        tensor_parallel.check(read_model(config), size)
    tensor_parallel.check(read_model(config), 1)


def test_a_group_must_divide_the_processes():
    settings = EngineSettings(precision="float32", layout=Layout(decode=MeshShape(data=-1, tensor=2)))
    with pytest.raises(UserError, match=r"layout\.decode\.tensor: 2 does not divide the 1 process"):
        load_engine("torch", settings)


CASES: dict[str, dict[str, Any]] = {
    "llama, GQA": {},
    "llama, one kv head, biases": {"num_key_value_heads": 1, "attention_bias": True},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
}  # fmt: skip

WORKER = """
import json, re, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from conftest import CONFIG
from diptych.engine import AdapterSpec, EngineSettings, ModelSpec, OptimizerSpec, PromptBatch, Sampling, load_engine
from diptych.families.adapter import adapter_shapes
from diptych.families.family import read_model, tensor_shapes
from diptych.layout import Layout, MeshShape, Zero
from diptych_torch import tensor_parallel

cases = json.loads(sys.argv[2])
BUGS = {
    "sums left out": (tensor_parallel.TensorGroup, "add", lambda self, tensor: tensor),
    "biases added by every process": (
        tensor_parallel, "_SUMMED", re.compile(r"(self_attn.o_proj|mlp.down_proj)[.](?P<kind>weight)$")
    ),
}
rng = np.random.default_rng(0)
attention = np.arange(7) >= np.array([[3], [0], [1], [6], [0]])
prompts = PromptBatch(tokens=rng.integers(0, 64, (5, 7)).astype(np.int32), attention=attention,
                      positions=np.maximum(attention.cumsum(1) - 1, 0).astype(np.int32))
sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=6, stop_token_ids=(1, 2), decode_rows=3)
found = {}
for name, (bug, changes) in cases.items():
    place, attribute, wrong = BUGS.get(bug, (tensor_parallel, "KEY", tensor_parallel.KEY))
    right = getattr(place, attribute)
    setattr(place, attribute, wrong)
    config = {**CONFIG, **changes}
    spec = AdapterSpec(rank=2, alpha=4.0, targets=("all-linear",)) if name.startswith("llama, GQA") else None
    draws = np.random.default_rng(1)
    weights = {one: draws.normal(0, 0.15, shape) for one, shape in tensor_shapes(read_model(config), "lm").items()}
    added = {} if spec is None else {one: draws.normal(0, 0.1, shape) for one, shape in
                                     adapter_shapes(read_model(config), spec).items()}
    made = []
    for tensor in (1, 2):
        layout = Layout(zero=Zero(stage=3 if "qwen2" in name else 0), decode=MeshShape(data=-1, tensor=tensor))
        engine = load_engine("torch", EngineSettings(precision="float64", distributed=True, layout=layout))
        model = engine.model(ModelSpec(config=config, weights=weights, head="lm", optimizer=OptimizerSpec(name="adamw"),
                                       micro_batch_size=2, adapter=spec, adapter_weights=added))
        made.append(model.generate(prompts, sampling, np.random.default_rng(2).random((5, 6)), pad_token_id=0))
    setattr(place, attribute, right)
    one, two = made
    found[name] = [bool((one.tokens == two.tokens).all()), float(np.abs(one.logprobs - two.logprobs).max())]
if engine.world.is_main:
    print("FOUND", json.dumps(found), flush=True)
"""


BUGS = {"sums left out": "qwen3", "biases added by every process": "llama, one kv head, biases"}


@pytest.mark.slow
def test_decoding_on_two_processes_together_draws_the_same_tokens():
    """Real processes; and canaries: seeded bugs, which draw others."""
    cases = {name: ("", changes) for name, changes in CASES.items()}
    cases |= {bug: (bug, CASES[case]) for bug, case in BUGS.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", WORKER, str(Path(__file__).parent), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    for name, (same, gap) in found.items():
        if name in BUGS:
            assert not same or gap > 1e-3, name
        else:
            assert same, name
            assert gap < 1e-12, name


def test_the_rules_of_the_split_are_the_hinges(make_config):
    """Where check() lets a model through, the hinge's rules for the JAX engine's decode mesh do too."""
    from diptych.families.family import model_slots

    check_slots(model_slots(read_model(make_config()), "lm"), MeshShape(tensor=2), key="k", rules=DECODE_RULES)
