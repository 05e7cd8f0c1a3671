"""Every rule between a recipe's settings, each broken once, and the key that its message must name."""

import dataclasses
import typing

import pytest

from diptych.errors import UserError
from diptych.recipe.checks import RANGES, check_recipe, problems
from diptych.recipe.load import hints, without_none
from diptych.recipe.schema import (
    DataRecipe,
    ModelRecipe,
    NewModel,
    OptimizerRecipe,
    Recipe,
    RewardRecipe,
    RLRecipe,
    SFTRecipe,
    Source,
    ZeroRecipe,
)

NEW = NewModel(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, vocab_size=512,
)  # fmt: skip
GOOD = Recipe(
    name="good",
    model=ModelRecipe(new=NEW),
    data=DataRecipe(
        demonstrations=Source(path="d.jsonl"), preferences=Source(path="p.jsonl"), prompts=Source(path="q.jsonl")
    ),
)


def change(recipe, key, value):
    """The recipe with one dotted key changed."""
    first, _, rest = key.partition(".")
    new = change(getattr(recipe, first), rest, value) if rest else value
    return dataclasses.replace(recipe, **{first: new})


def changed(**values):
    recipe = GOOD
    for key, value in values.items():
        recipe = change(recipe, key.replace("__", "."), value)
    return recipe


RNN = NewModel(family="rnn", hidden_size=8, num_hidden_layers=1, max_position_embeddings=512, vocab_size=512)
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 512}


def new(model=RNN, **fields):
    return {"model__new": dataclasses.replace(model, **fields)}


def configured(**fields):
    return {"model__new": NewModel(vocab_size=512, config=GPT2 | fields)}


SERVED = {"rollout__engine": "server.py:make", "stages": ("rl",), "rl__reward__function": "a.py:b"}

# changes -> the key named first, a piece of the message
BROKEN = {
    "empty name": ({"name": " "}, "name", "is empty"),
    "no stages": ({"stages": ()}, "stages", "is empty"),
    "stage twice": ({"stages": ("sft", "sft")}, "stages", "twice"),
    "stages out of order": ({"stages": ("rl", "sft")}, "stages", "write [sft, rl]"),
    "two models": ({"model__path": "x"}, "model.new", "set together with 'model.path'"),
    "no model": ({"model__new": None}, "model.path", "the sft stage needs a model"),
    "no model for rl": (
        {"model__new": None, "stages": ("rl",), "rl__reward__function": "a:b"},
        "model.path",
        "the rl stage",
    ),
    "no model for reward": (
        {"model__new": None, "stages": ("reward",)},
        "model.path",
        "the reward stage needs a model",
    ),
    "heads": ({"model__new__num_attention_heads": 3}, "model.new.hidden_size", "multiple of num_attention_heads = 3"),
    "kv heads": ({"model__new__num_key_value_heads": 3}, "model.new.num_attention_heads", "num_key_value_heads = 3"),
    "odd head": ({"model__new__hidden_size": 60}, "model.new.hidden_size", "15 a head"),
    "short positions": (
        {"model__new__max_position_embeddings": 511},
        "model.new.max_position_embeddings",
        "512 tokens",
    ),
    "long samples": (
        {"rollout__max_new_tokens": 300},
        "model.new.max_position_embeddings",
        "rollout.max_new_tokens = 300",
    ),
    "llama without a field": ({"model__new__intermediate_size": None}, "model.new.intermediate_size", "is not set"),
    "llama with a nonlinearity": ({"model__new__nonlinearity": "relu"}, "model.new.nonlinearity", "in a llama model"),
    "rnn without a field": (new(num_hidden_layers=None), "model.new.num_hidden_layers", "a new rnn model needs"),
    "rnn with heads": (new(num_attention_heads=2), "model.new.num_attention_heads", "no effect in a rnn model"),
    "rnn with an MLP": (new(intermediate_size=2), "model.new.intermediate_size", "no effect in a rnn model"),
    "rnn with a base": (new(rope_theta=5.0), "model.new.rope_theta", "no effect in a rnn model"),
    "rnn, short": (new(max_position_embeddings=511), "model.new.max_position_embeddings", "512 tokens"),
    "config and fields": (
        {"model__new": NewModel(vocab_size=512, config=GPT2, hidden_size=8)},
        "model.new.hidden_size",
        "no effect beside 'model.new.config'",
    ),
    "config and a family": (
        {"model__new": NewModel(vocab_size=512, config=GPT2, family="rnn")},
        "model.new.family",
        "no effect beside",
    ),
    "config of no family": (configured(model_type="elephant"), "model.new.config", "supported families: llama"),
    "config with a field that nobody knows": (configured(n_trunks=2), "model.new.config", "n_trunks: not understood"),
    "config with a vocabulary": (configured(vocab_size=9), "model.new.config", "holds vocab_size"),
    "config with an id": (configured(eos_token_id=9), "model.new.config", "holds eos_token_id"),
    "config, short": (configured(n_positions=511), "model.new.config", "512 tokens"),
    "too_long without tokens": (
        {"rl__reward__function": "a:b", "rl__reward__too_long": "truncate"},
        "rl.reward.too_long",
        "no effect with 'rl.reward.function'",
    ),
    "top_k beyond vocabulary": ({"rollout__top_k": 513}, "rollout.top_k", "512"),
    "no demonstrations": ({"data__demonstrations__path": None}, "data.demonstrations.path", "is not set"),
    "tokenizer without text": (
        {"stages": ("reward",), "data__demonstrations__path": None},
        "data.demonstrations.path",
        "tokenizer",
    ),
    "no preferences": ({"data__preferences__path": None}, "data.preferences.path", "the reward stage needs it"),
    "no prompts": ({"data__prompts__path": None}, "data.prompts.path", "the rl stage needs it"),
    "task without limit": ({"data__prompts__path": "task:x"}, "data.prompts.limit", "how many"),
    "task with a file": (
        {"data__prompts__path": "task:x", "data__prompts__limit": 4, "data__prompts__eval_path": "e"},
        "data.prompts.eval_path",
        "has no effect with a task",
    ),
    "limit of nothing": (
        {"stages": ("sft",), "data__prompts__path": None, "data__prompts__limit": 5},
        "data.prompts.limit",
        "no effect",
    ),
    "two held-out sets": (
        {"data__prompts__eval_path": "e", "data__prompts__eval_fraction": 0.2},
        "data.prompts.eval_fraction",
        "no effect",
    ),
    "nothing held out": (
        {"data__preferences__eval_fraction": 0.0},
        "data.preferences.eval_fraction",
        "holds out nothing",
    ),
    "prompt template": ({"data__prompt_template": "Q:"}, "data.prompt_template", "must contain {prompt}"),
    "response template": ({"data__response_template": "{prompt}"}, "data.response_template", "must contain {response}"),
    "template with chat": (
        {"data__chat": "always", "data__prompt_template": "Q: {prompt}"},
        "data.prompt_template",
        "data.chat=always",
    ),
    "no buckets": ({"data__buckets": ()}, "data.buckets", "is empty"),
    "falling buckets": ({"data__buckets": (512, 64)}, "data.buckets", "must rise"),
    "equal buckets": ({"data__buckets": (512, 512)}, "data.buckets", "must rise"),
    "small buckets": ({"data__buckets": (64, 511)}, "data.buckets", "512 tokens"),
    "packing without sft": (
        {"data__packing": True, "stages": ("reward", "rl"), "reward__model_path": "m", "rl__policy_path": "m"},
        "data.packing",
        "without the sft stage",
    ),
    "empty stop": ({"rollout__stop": ("",)}, "rollout.stop", "empty text"),
    "sft batch": ({"sft__micro_batch_size": 5}, "sft.batch_size", "multiple of sft.micro_batch_size = 5"),
    "reward batch": ({"reward__micro_batch_size": 5}, "reward.batch_size", "reward.micro_batch_size = 5"),
    "mini-batches": ({"rl__mini_batches": 3}, "rl.batch_size", "64 rows of a rollout"),
    "rl micro-batch": ({"rl__mini_batches": 2, "rl__micro_batch_size": 12}, "rl.batch_size", "32 rows of a mini-batch"),
    "momentum with adamw": ({"sft__optimizer__momentum": 0.9}, "sft.optimizer.momentum", "no effect with adamw"),
    "betas with sgd": (
        {"rl__optimizer__name": "sgd", "rl__optimizer__betas": (0.5, 0.9)},
        "rl.optimizer.betas",
        "no effect with sgd",
    ),
    "eps with sgd": (
        {"reward__optimizer__name": "sgd", "reward__optimizer__eps": 1.0},
        "reward.optimizer.eps",
        "with sgd",
    ),
    "warm-up longer than the stage": (
        {"sft__max_steps": 5, "sft__optimizer__warmup_steps": 6},
        "sft.optimizer.warmup_steps",
        "the 5 optimizer steps",
    ),
    "warm-up longer than rl": (
        {"rl__optimizer__warmup_steps": 401},
        "rl.optimizer.warmup_steps",
        "the 400 optimizer steps",
    ),
    "two rewards": (
        {"rl__reward__model_path": "x", "rl__reward__function": "a:b"},
        "rl.reward.model_path",
        "set together",
    ),
    "no reward": ({"stages": ("sft", "rl")}, "rl.reward.model_path", "no reward stage"),
    "malformed function": ({"rl__reward__function": "score"}, "rl.reward.function", "FILE.py:NAME or MODULE:NAME"),
    "malformed evaluation": ({"rl__evaluation_function": "a.py:"}, "rl.evaluation_function", "FILE.py:NAME"),
    "greedy rl": ({"rollout__temperature": 0.0}, "rollout.temperature", "greedy"),
    "unknown rollout engine": (
        {"rollout__engine": "vllm"},
        "rollout.engine",
        "'vllm' is none of auto, native, deepspeed, nor FILE.py:NAME or MODULE:NAME",
    ),
    "malformed rollout server": ({"rollout__engine": "server.py:"}, "rollout.engine", "which names a server"),
    "decode rows of a server": (
        {**SERVED, "rollout__decode_rows": 4},
        "rollout.decode_rows",
        "no effect with a server in 'rollout.engine'",
    ),
    "switch check of a server": (
        {**SERVED, "layout__switch__check": "logprobs"},
        "layout.switch.check",
        "nothing here has a decode copy",
    ),
    "the sampler's log-probabilities weighed against themselves": (
        {"rl__old_logprobs": "sampler", "rl__importance_cap": 2.0},
        "rl.old_logprobs",
        "leaves nothing to weigh",
    ),
    "a server's log-probabilities as old ones": (
        {**SERVED, "rl__old_logprobs": "sampler"},
        "rl.old_logprobs",
        "for the engine's own rollouts",
    ),
    "a response bucket that is no shorter": (
        {"rollout__response_buckets": (8, 10**6)},
        "rollout.response_buckets",
        "stay below rollout.max_new_tokens",
    ),
    "response buckets that do not rise": (
        {"rollout__response_buckets": (16, 8)},
        "rollout.response_buckets",
        "must rise",
    ),
    "a frozen model's optimizer": (
        {"layout__zero_reference": ZeroRecipe(stage=2)},
        "layout.zero_reference.stage",
        "a frozen model has none",
    ),
    "offload of a frozen model's optimizer": (
        {"layout__zero_reward": ZeroRecipe(stage=3, offload_optimizer="cpu")},
        "layout.zero_reward.offload_optimizer",
        "has no effect on a frozen model",
    ),
    "offload at stage 0": (
        {"layout__zero__offload_optimizer": "cpu"},
        "layout.zero.offload_optimizer",
        "needs stage 1 or above",
    ),
    "offload of whole parameters": (
        {"layout__zero": ZeroRecipe(stage=2, offload_param="cpu")},
        "layout.zero.offload_param",
        "needs stage 3",
    ),
    "a critic's ZeRO without rl": (
        {"stages": ("sft",), "layout__zero_critic": ZeroRecipe(stage=1)},
        "layout.zero_critic",
        "without the rl stage",
    ),
    "a reward function's ZeRO": (
        {"rl__reward__function": "a:b", "layout__zero_reward": ZeroRecipe(stage=3)},
        "layout.zero_reward",
        "no model",
    ),
    "rows at once with deepspeed": (
        {"rollout__engine": "deepspeed", "rollout__decode_rows": 4},
        "rollout.decode_rows",
        "takes all rows at once",
    ),
    "processes together with deepspeed": (
        {"rollout__engine": "deepspeed", "layout__decode__tensor": 2},
        "layout.decode.tensor",
        "on every process",
    ),
    "a copy's check with deepspeed": (
        {"rollout__engine": "deepspeed", "layout__switch__check": "logprobs"},
        "layout.switch.check",
        "themselves",
    ),
    "a copy's pieces with deepspeed": (
        {"rollout__engine": "deepspeed", "layout__switch__chunk_mb": 64},
        "layout.switch.chunk_mb",
        "themselves",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_names_its_key(case):
    changes, key, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        check_recipe(changed(**changes), where="here")
    assert str(caught.value).startswith(f"here: '{key}': ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ALLOWED = {
    "good": {},
    "micro larger than batch": {
        "sft__micro_batch_size": 64,
        "reward__micro_batch_size": 64,
        "rl__micro_batch_size": 512,
    },
    "several samples": {
        "rl__batch_size": 6,
        "rl__samples_per_prompt": 4,
        "rl__mini_batches": 3,
        "rl__micro_batch_size": 4,
    },
    "a new rnn": new(nonlinearity="relu", tie_word_embeddings=False),
    "a new model of any family": configured(),
    "a rollout server": SERVED,
    "a rollout server, and answers that sft samples": {
        "rollout__engine": "a:b",
        "rollout__decode_rows": 4,
        "layout__switch__check": "logprobs",
    },
    "the sampler's log-probabilities": {"rl__old_logprobs": "sampler", "rollout__response_buckets": (8, 16)},
    "greedy without rl": {"rollout__temperature": 0.0, "stages": ("sft",)},
    "function without reward stage": {"stages": ("sft", "rl"), "rl__reward__function": "a.py:b"},
    "reward model from outside": {"stages": ("sft", "rl"), "rl__reward__model_path": "x"},
    "nothing held out by share": {"data__prompts__eval_path": "e", "data__prompts__eval_fraction": 0.0},
    "own policy only": {"model__new": None, "stages": ("rl",), "rl__policy_path": "x", "rl__reward__function": "a:b"},
    "other stages' data missing": {"stages": ("sft",), "data__prompts__path": None, "data__preferences__path": None},
    "long read responses that no stage reads": {
        "stages": ("rl",),
        "rl__reward__function": "a:b",
        "data__max_response_tokens": 9999,
    },
    "sgd with momentum": {"rl__optimizer__name": "sgd", "rl__optimizer__momentum": 0.9},
    "float64": {"precision": "float64"},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_possible_passes(case):
    assert list(problems(changed(**ALLOWED[case]))) == []


OUT_OF_RANGE = {
    "sft.learning_rate": 0.0, "reward.epochs": 0, "rl.iterations": -1, "rl.gamma": 1.01, "rl.lam": -0.1,
    "rl.clip_range": 0.0, "rl.value_clip_range": 0.0, "rl.ema_decay": 1.0, "rl.kl_coef": -0.1, "rl.score_clip": 0.0,
    "rollout.temperature": -1.0, "rollout.top_p": 0.0, "rollout.top_k": -1, "rollout.max_new_tokens": 0,
    "data.buckets": (0, 4096), "data.prompts.eval_fraction": 1.0, "data.prompts.limit": 0, "logprob_chunk": 0,
    "sft.optimizer.betas": (0.9, 1.0), "sft.optimizer.eps": 0.0, "sft.optimizer.max_grad_norm": 0.0,
    "rl.optimizer.weight_decay": -1.0, "rl.optimizer.warmup_steps": -1, "checkpoint.keep": 0, "checkpoint.every": -1,
    "sft.eval_every": 0, "rl.mini_batches": 0, "rl.micro_batch_size": 0, "model.new.num_key_value_heads": 0,
    "model.balance_coef": -0.1, "rl.eval_prompts": 0, "rl.max_kl": 0.0, "rl.missing_eos_penalty": -1.0, "seed": -1,
}  # fmt: skip


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_number_out_of_range_names_its_key(key):
    with pytest.raises(UserError, match=f"^here: '{key}': .* is out of range: it must be "):
        check_recipe(change(GOOD, key, OUT_OF_RANGE[key]), where="here")


def test_every_number_in_the_schema_has_a_range_and_every_range_a_number():
    numbers: dict[type, set[str]] = {}

    def collect(cls):
        for name, annotation in hints(cls).items():
            inner, _ = without_none(annotation)
            if dataclasses.is_dataclass(inner):
                collect(inner)
            elif inner in (int, float) or {int, float} & set(typing.get_args(inner)):
                numbers.setdefault(cls, set()).add(name)

    collect(Recipe)
    assert {cls: set(fields) for cls, fields in RANGES.items()} == numbers


def test_the_place_may_depend_on_the_key():
    with pytest.raises(UserError, match="^place of sft.batch_size: 'sft.batch_size': "):
        check_recipe(changed(sft__micro_batch_size=5), where=lambda keys: f"place of {keys[0]}")


def test_defaults_are_within_their_ranges():
    for cls in (SFTRecipe, RewardRecipe, RLRecipe, OptimizerRecipe):
        assert cls() is not None
    assert list(problems(GOOD)) == []
