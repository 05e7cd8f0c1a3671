"""What must hold in a recipe beyond types: one table of ranges by field, one of rules between fields.

Ranges are written as JSON schema keywords, so that `json_schema` publishes the very same limits to editors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from diptych.errors import UserError
from diptych.recipe.checks_layout import Rule, layout_rules, rollout_rules, zero_rules
from diptych.recipe.new_model import config_problem, field_problems, new_model
from diptych.recipe.schema import (
    AdapterRecipe,
    CheckpointRecipe,
    DataRecipe,
    DecodeMeshRecipe,
    ModelRecipe,
    NewModel,
    OptimizerRecipe,
    Recipe,
    RewardRecipe,
    RLRecipe,
    RolloutRecipe,
    SFTRecipe,
    Source,
    Stage,
    SwitchRecipe,
    TrainMeshRecipe,
)

Range = Mapping[str, float]

POSITIVE: Range = {"exclusiveMinimum": 0}
NOT_NEGATIVE: Range = {"minimum": 0}
AT_LEAST_ONE: Range = {"minimum": 1}
OR_WHAT_IS_LEFT: Range = {"minimum": -1}
UNIT: Range = {"minimum": 0, "maximum": 1}
UP_TO_ONE: Range = {"exclusiveMinimum": 0, "maximum": 1}
BELOW_ONE: Range = {"minimum": 0, "exclusiveMaximum": 1}
INSIDE_UNIT: Range = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}

_COMPARISONS: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above", lambda value, limit: value > limit),
    "maximum": ("at most", lambda value, limit: value <= limit),
    "exclusiveMaximum": ("below", lambda value, limit: value < limit),
}

_SUPERVISED: Mapping[str, Range] = {
    "learning_rate": POSITIVE,
    "epochs": AT_LEAST_ONE,
    "max_steps": AT_LEAST_ONE,
    "batch_size": AT_LEAST_ONE,
    "micro_batch_size": AT_LEAST_ONE,
    "eval_every": AT_LEAST_ONE,
}

# Limits of every number in the schema (of each item, for lists of numbers), null excepted.
RANGES: Mapping[type, Mapping[str, Range]] = {
    NewModel: {
        "hidden_size": AT_LEAST_ONE,
        "intermediate_size": AT_LEAST_ONE,
        "num_hidden_layers": AT_LEAST_ONE,
        "num_attention_heads": AT_LEAST_ONE,
        "num_key_value_heads": AT_LEAST_ONE,
        "max_position_embeddings": AT_LEAST_ONE,
        "vocab_size": AT_LEAST_ONE,
        "rope_theta": POSITIVE,
        "rms_norm_eps": POSITIVE,
        "initializer_range": POSITIVE,
    },
    ModelRecipe: {"balance_coef": NOT_NEGATIVE},
    Source: {"eval_fraction": BELOW_ONE, "limit": AT_LEAST_ONE, "eval_limit": AT_LEAST_ONE},
    DataRecipe: {
        "max_prompt_tokens": AT_LEAST_ONE,
        "max_response_tokens": AT_LEAST_ONE,
        "buckets": AT_LEAST_ONE,
    },
    OptimizerRecipe: {
        "betas": BELOW_ONE,
        "eps": POSITIVE,
        "momentum": BELOW_ONE,
        "weight_decay": NOT_NEGATIVE,
        "max_grad_norm": POSITIVE,
        "warmup_steps": NOT_NEGATIVE,
    },
    AdapterRecipe: {"rank": AT_LEAST_ONE, "alpha": POSITIVE},
    SFTRecipe: _SUPERVISED,
    RewardRecipe: {**_SUPERVISED, "center_coef": NOT_NEGATIVE},
    RLRecipe: {
        "learning_rate": POSITIVE,
        "critic_learning_rate": POSITIVE,
        "iterations": AT_LEAST_ONE,
        "batch_size": AT_LEAST_ONE,
        "samples_per_prompt": AT_LEAST_ONE,
        "epochs": AT_LEAST_ONE,
        "mini_batches": AT_LEAST_ONE,
        "micro_batch_size": AT_LEAST_ONE,
        "kl_coef": NOT_NEGATIVE,
        "gamma": UNIT,
        "lam": UNIT,
        "clip_range": POSITIVE,
        "value_clip_range": POSITIVE,
        "value_coef": NOT_NEGATIVE,
        "score_clip": POSITIVE,
        "missing_eos_penalty": NOT_NEGATIVE,
        "ema_decay": INSIDE_UNIT,
        "max_kl": POSITIVE,
        "importance_cap": POSITIVE,
        "eval_every": AT_LEAST_ONE,
        "eval_prompts": AT_LEAST_ONE,
    },
    RolloutRecipe: {
        "temperature": NOT_NEGATIVE,
        "top_k": NOT_NEGATIVE,
        "top_p": UP_TO_ONE,
        "max_new_tokens": AT_LEAST_ONE,
        "decode_rows": AT_LEAST_ONE,
        "response_buckets": AT_LEAST_ONE,
    },
    TrainMeshRecipe: {"data": OR_WHAT_IS_LEFT, "fsdp": OR_WHAT_IS_LEFT, "tensor": OR_WHAT_IS_LEFT},
    DecodeMeshRecipe: {"data": OR_WHAT_IS_LEFT, "tensor": OR_WHAT_IS_LEFT},
    SwitchRecipe: {"chunk_mb": AT_LEAST_ONE},
    CheckpointRecipe: {"every": NOT_NEGATIVE, "keep": AT_LEAST_ONE},
    Recipe: {"seed": NOT_NEGATIVE, "logprob_chunk": AT_LEAST_ONE},
}

STAGE_DATA: Mapping[Stage, str] = {"sft": "demonstrations", "reward": "preferences", "rl": "prompts"}


def check_recipe(recipe: Recipe, where: str | Callable[[Sequence[str]], str]) -> None:
    """Raise UserError "WHERE: 'key': what is wrong; what to do" for the first number out of range or rule broken.

    where: the recipe's name, or a function from the keys concerned to the place that set them.
    """
    for keys, message in problems(recipe):
        place = where if isinstance(where, str) else where(keys)
        raise UserError(f"{place}: {keys[0]!r}: {message}")


def problems(recipe: Recipe) -> Iterator[tuple[Sequence[str], str]]:
    """(keys, message) of everything wrong. Rules are looked at only where all ranges hold: they divide by numbers."""
    out_of_range = list(_out_of_range(recipe))
    yield from out_of_range
    if not out_of_range:
        for rules in (
            _stage_rules,
            _model_rules,
            _data_rules,
            _batch_rules,
            _optimizer_rules,
            _rl_rules,
            rollout_rules,
            layout_rules,
            zero_rules,
        ):
            for broken, keys, message in rules(recipe):
                if broken:
                    yield keys, message


def _out_of_range(group: Any, prefix: str = "") -> Iterator[tuple[Sequence[str], str]]:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from _out_of_range(value, f"{prefix}{field.name}.")
            continue
        limits = RANGES.get(type(group), {}).get(field.name, {})
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if not all(_COMPARISONS[keyword][1](item, limit) for keyword, limit in limits.items()):
                words = " and ".join(f"{_COMPARISONS[keyword][0]} {limit}" for keyword, limit in limits.items())
                yield (f"{prefix}{field.name}",), f"{item} is out of range: it must be {words}"


def _stage_rules(r: Recipe) -> Iterator[Rule]:
    order = get_args(Stage)
    yield not r.name.strip(), ("name",), "is empty; give the run a short name"
    yield not r.stages, ("stages",), f"is empty; name at least one of {', '.join(order)}"
    yield len(set(r.stages)) < len(r.stages), ("stages",), "names a stage twice; each runs once"
    in_order = tuple(sorted(r.stages, key=order.index))
    yield in_order != r.stages, ("stages",), f"is out of order; write [{', '.join(in_order)}]"


def _model_rules(r: Recipe) -> Iterator[Rule]:
    both = r.model.path is not None and r.model.new is not None
    neither = r.model.path is None and r.model.new is None
    yield both, ("model.new", "model.path"), "set together with 'model.path'; set one of them to null"
    sources = {"sft": None, "reward": r.reward.model_path, "rl": r.rl.policy_path}
    for stage in r.stages:
        needs_model = sources[stage] is None and (stage == "sft" or "sft" not in r.stages)
        advice = f"the {stage} stage needs a model; set 'model.path' or 'model.new'"
        yield neither and needs_model, ("model.path",), f"{advice}"
    new = r.model.new
    if new is None:
        return
    key = "model.new"
    faults = list(field_problems(new))
    for name, message in faults:
        yield True, (f"{key}.{name}",), message
    if not faults and new.config is None and new.family == "llama":
        yield from _llama_rules(new, key)
    elif not faults and new.config is not None:
        fault = config_problem(new)
        faults += [("config", fault)] * (fault is not None)
        keys = (f"{key}.config", *(f"{key}.config.{name}" for name in new.config))  # an override of one is to blame
        yield fault is not None, keys, fault or ""
    if not faults:
        longest = r.data.max_prompt_tokens + _longest_response(r)
        positions = new.max_position_embeddings or new_model(new).max_position_embeddings
        yield (
            positions < longest,
            (
                f"{key}.config" if new.config is not None else f"{key}.max_position_embeddings",
                "data.max_prompt_tokens",
                *_RESPONSE_KEYS,
            ),
            f"{positions} positions are less than the longest row, {longest} tokens ({_row_sum(r)}); give it more",
        )
    yield (
        r.data.demonstrations.path is None,
        ("data.demonstrations.path", key),
        "is not set, and the tokenizer of 'model.new' is trained on the demonstrations; give a JSONL file or task:NAME",
    )
    yield (
        r.rollout.top_k > new.vocab_size,
        ("rollout.top_k",),
        f"{r.rollout.top_k} is more than the {new.vocab_size} tokens of model.new.vocab_size; 0 draws from all",
    )


def _llama_rules(new: NewModel, key: str) -> Iterator[Rule]:
    hidden, heads, groups = new.hidden_size, new.num_attention_heads, new.num_key_value_heads
    assert hidden is not None, "required fields were looked at before"
    assert heads is not None
    assert groups is not None
    yield hidden % heads != 0, (f"{key}.hidden_size",), f"{hidden} is not a multiple of num_attention_heads = {heads}"
    yield (
        heads % groups != 0,
        (
            f"{key}.num_attention_heads",
            f"{key}.num_key_value_heads",
        ),
        f"{heads} is not a multiple of num_key_value_heads = {groups}",
    )
    yield (
        hidden // heads % 2 != 0,
        (f"{key}.hidden_size", f"{key}.num_attention_heads"),
        f"{hidden} over {heads} heads is {hidden // heads} a head; rotary positions need an even number",
    )


def _data_rules(r: Recipe) -> Iterator[Rule]:
    data = r.data
    for stage, name in STAGE_DATA.items():
        key, source = f"data.{name}", getattr(data, name)
        needed = stage in r.stages
        yield (
            needed and source.path is None,
            (f"{key}.path",),
            (f"is not set, and the {stage} stage needs it; give a JSONL file or task:NAME"),
        )
        if source.path is None:
            for field in ("eval_path", "limit", "eval_limit"):
                idle = getattr(source, field) is not None
                yield idle, (f"{key}.{field}",), f"has no effect without '{key}.path'"
            continue
        is_task = source.path.startswith("task:")
        has_file = source.eval_path is not None
        yield (
            is_task and source.limit is None,
            (f"{key}.limit", f"{key}.path"),
            (f"is not set; say how many examples {source.path} shall generate"),
        )
        yield (
            is_task and has_file,
            (f"{key}.eval_path",),
            ("has no effect with a task, which holds out its own prompts; use eval_fraction"),
        )
        changed = source.eval_fraction not in (0, type(source)().eval_fraction)
        yield has_file and changed, (f"{key}.eval_fraction",), "has no effect together with 'eval_path'; take one away"
        yield (
            needed and not has_file and source.eval_fraction == 0,
            (f"{key}.eval_fraction",),
            (f"holds out nothing, and the {stage} stage evaluates on held-out rows; raise it or give eval_path"),
        )
    for kind in ("prompt", "response"):
        key, template = f"data.{kind}_template", getattr(data, f"{kind}_template")
        yield f"{{{kind}}}" not in template, (key,), f"must contain {{{kind}}}"
        idle = data.chat == "always" and template != getattr(type(data)(), f"{kind}_template")
        yield idle, (key, "data.chat"), "has no effect with data.chat=always; use data.chat=never, or take it away"
    yield not data.buckets, ("data.buckets",), "is empty; name at least one length"
    rising = all(a < b for a, b in zip(data.buckets, data.buckets[1:], strict=False))
    yield not rising, ("data.buckets",), "must rise from one length to the next"
    longest = data.max_prompt_tokens + _longest_response(r)
    yield (
        max(data.buckets, default=longest) < longest,
        ("data.buckets", "data.max_prompt_tokens", *_RESPONSE_KEYS),
        f"the largest is shorter than the longest row, {longest} tokens ({_row_sum(r)}); add a larger one",
    )
    yield (
        data.packing and "sft" not in r.stages,
        ("data.packing", "stages"),
        "has no effect without the sft stage, which alone packs rows; take it away",
    )
    yield any(not text for text in r.rollout.stop), ("rollout.stop",), "holds an empty text"


def _batch_rules(r: Recipe) -> Iterator[Rule]:
    for name, settings in (("sft", r.sft), ("reward", r.reward)):
        size, micro = settings.batch_size, settings.micro_batch_size
        yield (
            micro < size and size % micro != 0,
            (f"{name}.batch_size", f"{name}.micro_batch_size"),
            f"{size} is not a multiple of {name}.micro_batch_size = {micro}; change one of them",
        )
    rows = r.rl.batch_size * r.rl.samples_per_prompt
    keys = ("rl.batch_size", "rl.samples_per_prompt", "rl.mini_batches", "rl.micro_batch_size")
    mini, micro = rows // r.rl.mini_batches, r.rl.micro_batch_size
    made_of = f"{rows} rows of a rollout (batch_size x samples_per_prompt)"
    uneven = rows % r.rl.mini_batches != 0
    yield uneven, keys, f"the {made_of} do not divide into rl.mini_batches = {r.rl.mini_batches}"
    yield (
        not uneven and micro < mini and mini % micro != 0,
        keys,
        f"{mini} rows of a mini-batch ({made_of} / mini_batches) are not a multiple of rl.micro_batch_size = {micro}",
    )


def _optimizer_rules(r: Recipe) -> Iterator[Rule]:
    steps = {
        "sft": r.sft.max_steps,
        "reward": r.reward.max_steps,
        "rl": r.rl.iterations * r.rl.epochs * r.rl.mini_batches,
    }
    default = OptimizerRecipe()
    for name, last in steps.items():
        optimizer: OptimizerRecipe = getattr(r, name).optimizer
        key = f"{name}.optimizer"
        adamw = optimizer.name == "adamw"
        yield (
            adamw and optimizer.momentum != default.momentum,
            (f"{key}.momentum", f"{key}.name"),
            ("has no effect with adamw; set betas, or name: sgd"),
        )
        for field in ("betas", "eps"):
            changed = getattr(optimizer, field) != getattr(default, field)
            yield not adamw and changed, (f"{key}.{field}", f"{key}.name"), "has no effect with sgd; take it away"
        yield (
            last is not None and optimizer.warmup_steps > last,
            (f"{key}.warmup_steps",),
            (f"{optimizer.warmup_steps} is more than the {last} optimizer steps of the stage"),
        )


def _rl_rules(r: Recipe) -> Iterator[Rule]:
    reward = r.rl.reward
    both = reward.model_path is not None and reward.function is not None
    yield (
        both,
        ("rl.reward.model_path", "rl.reward.function"),
        ("set together with 'rl.reward.function'; set one of them to null"),
    )
    for key, target in (
        ("rl.reward.function", reward.function),
        ("rl.evaluation_function", r.rl.evaluation_function),
    ):
        source, _, name = (target or "").rpartition(":")
        malformed = target is not None and not (source and name.isidentifier())
        yield malformed, (key,), f"{target!r} is not FILE.py:NAME or MODULE:NAME"
    yield (
        reward.too_long != "error" and reward.function is not None,
        ("rl.reward.too_long", "rl.reward.function"),
        "has no effect with 'rl.reward.function', which reads no tokens; take it away",
    )
    if "rl" not in r.stages:
        return
    no_reward = reward.model_path is None and reward.function is None and "reward" not in r.stages
    yield (
        no_reward,
        ("rl.reward.model_path", "stages"),
        ("is not set, and stages has no reward stage; set it or 'rl.reward.function', or add the stage"),
    )
    yield (
        r.rollout.temperature == 0,
        ("rollout.temperature",),
        ("0 is greedy, and greedy answers have no policy gradient; the rl stage needs a temperature above 0"),
    )


_RESPONSE_KEYS = ("data.max_response_tokens", "rollout.max_new_tokens")


def _longest_response(r: Recipe) -> int:
    """Tokens: sampled responses in every stage, read ones where a stage reads them."""
    reads = "sft" in r.stages or "reward" in r.stages
    return max(r.rollout.max_new_tokens, r.data.max_response_tokens if reads else 0)


def _row_sum(r: Recipe) -> str:
    sampled = r.rollout.max_new_tokens == _longest_response(r)
    key = "rollout.max_new_tokens" if sampled else "data.max_response_tokens"
    return f"data.max_prompt_tokens = {r.data.max_prompt_tokens} + {key} = {_longest_response(r)}"
