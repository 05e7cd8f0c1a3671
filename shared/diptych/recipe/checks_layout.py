"""What must hold in the settings that say where and how a recipe runs: layout, ZeRO, rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise

from diptych.recipe.schema import Recipe, SwitchRecipe
from diptych.rollout_server import BUILT_IN, is_server

# As in `checks`: (broken?, the keys concerned with the one to change first, what is wrong and what to do)
Rule = tuple[bool, Sequence[str], str]


def rollout_rules(r: Recipe) -> Iterator[Rule]:
    engine = r.rollout.engine
    is_samplers = "rl" in r.stages and r.rl.old_logprobs == "sampler"
    keys, why = (
        ("rl.old_logprobs", "rl.importance_cap"),
        "'sampler' leaves nothing to weigh: rl.importance_cap compares {}",
    )
    yield is_samplers and r.rl.importance_cap is not None, keys, why.format("both; set trainer, or take it away")
    keys, why = ("rl.old_logprobs", "rollout.engine"), "'sampler' is for the engine's own rollouts: {}"
    yield is_samplers and is_server(engine), keys, why.format("a server's numbers are others; set trainer or auto")
    widths = (*r.rollout.response_buckets, r.rollout.max_new_tokens)
    rising = all(a < b for a, b in pairwise(widths))
    keys = ("rollout.response_buckets", "rollout.max_new_tokens")
    yield not rising, keys, "must rise, and stay below rollout.max_new_tokens, which is always the last"
    if engine == "deepspeed":
        why = "has no effect with rollout.engine = deepspeed, {}; take it away"
        whole = "whose module takes all rows at once on every process"
        yield r.rollout.decode_rows is not None, ("rollout.decode_rows", "rollout.engine"), why.format(whole)
        yield r.layout.decode.tensor != 1, ("layout.decode.tensor", "rollout.engine"), why.format(whole)
        for name in ("check", "chunk_mb"):
            changed = getattr(r.layout.switch, name) != getattr(SwitchRecipe(), name)
            keys = (f"layout.switch.{name}", "rollout.engine")
            yield changed, keys, why.format("which generates from the training weights themselves")
    if not is_server(engine):
        return
    source, _, name = engine.rpartition(":")
    yield (
        not (source and name.isidentifier()),
        ("rollout.engine",),
        f"{engine!r} is none of {', '.join(BUILT_IN)}, nor FILE.py:NAME or MODULE:NAME, which names a server",
    )
    idle = "rl" in r.stages and "sft" not in r.stages  # sft samples a few answers by itself
    why = "has no effect with a server in 'rollout.engine', which schedules its own rows; take it away"
    yield idle and r.rollout.decode_rows is not None, ("rollout.decode_rows", "rollout.engine"), why
    why = "has no effect with a server in 'rollout.engine': nothing here has a decode copy; take it away"
    yield idle and r.layout.switch.check != "fingerprint", ("layout.switch.check", "rollout.engine"), why


def layout_rules(r: Recipe) -> Iterator[Rule]:
    layout, has_rl = r.layout, "rl" in r.stages
    for name in ("train", "decode", "critic", "reference", "reward"):
        mesh, key = getattr(layout, name), f"layout.{name}"
        if mesh is None:
            continue
        sizes = {field.name: getattr(mesh, field.name) for field in dataclasses.fields(mesh)}
        free = [axis for axis, size in sizes.items() if size == -1]
        for axis in (axis for axis, size in sizes.items() if size == 0):
            yield True, (f"{key}.{axis}",), "is 0 devices; give at least 1, or -1 for whatever is left"
        keys = tuple(f"{key}.{axis}" for axis in free) or (key,)
        yield len(free) > 1, keys, f"only one axis can be -1 (whatever is left), and {len(free)} are"
        yield name in ("critic", "reference", "reward") and not has_rl, (key,), "has no effect without the rl stage"
    below = r.rl.adapter is not None and r.rl.adapter.path is None
    no_model = {"reference": below, "reward": r.rl.reward.function is not None}
    why = {
        "reference": "the reference is the policy without its new adapter ('rl.adapter'), no model of its own",
        "reward": "the reward is 'rl.reward.function', no model",
    }
    for name, is_none in no_model.items():
        is_set = getattr(layout, name) is not None
        yield has_rl and is_none and is_set, (f"layout.{name}",), f"has no effect: {why[name]}"
        waits = name in layout.offload
        yield waits and not has_rl, ("layout.offload",), "has no effect without the rl stage"
        yield waits and has_rl and is_none, ("layout.offload",), f"{name} has no effect: {why[name]}"


def zero_rules(r: Recipe) -> Iterator[Rule]:
    has_rl = "rl" in r.stages
    for name in ("zero", "zero_critic", "zero_reference", "zero_reward"):
        wanted, key = getattr(r.layout, name), f"layout.{name}"
        if wanted is None:
            continue
        is_frozen = name in ("zero_reference", "zero_reward")
        yield name != "zero" and not has_rl, (key,), "has no effect without the rl stage"
        yield (
            is_frozen and wanted.stage not in (0, 3),
            (f"{key}.stage",),
            f"{wanted.stage} splits gradients or optimizer state, and a frozen model has none; choose 0 or 3",
        )
        yield (
            wanted.offload_optimizer == "cpu" and (is_frozen or wanted.stage == 0),
            (f"{key}.offload_optimizer", f"{key}.stage"),
            "has no effect on a frozen model; take it away"
            if is_frozen
            else "needs stage 1 or above: at stage 0 DeepSpeed keeps optimizer state on the accelerator",
        )
        yield (
            wanted.offload_param == "cpu" and wanted.stage != 3,
            (f"{key}.offload_param", f"{key}.stage"),
            "needs stage 3, which alone splits parameters",
        )
    below = r.rl.adapter is not None and r.rl.adapter.path is None
    for name, is_none, why in (
        ("zero_reference", below, "the reference is the policy without its new adapter ('rl.adapter')"),
        ("zero_reward", r.rl.reward.function is not None, "the reward is 'rl.reward.function', no model"),
    ):
        is_set = getattr(r.layout, name) is not None
        yield has_rl and is_none and is_set, (f"layout.{name}",), f"has no effect: {why}"
