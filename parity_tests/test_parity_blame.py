"""Blame on both real engines: JAX records, torch replays with every tap forced. 20 single-layer bugs planted at random
depth in 6-layer models, forward and backward: the right layer and the right operation; and no blame without a bug."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import pytest

from diptych import random
from diptych.algorithms.losses import ppo_policy_loss
from diptych.engine import Loss, Probed, Taps, TrainBatch
from diptych.families.family import read_model
from diptych.families.taps import taps
from diptych.parity.blame.blame import blame
from diptych.parity.blame.report import as_text
from diptych.parity.trace import Recorded, Step, Trace, TraceWriter
from parity_tests import families
from parity_tests.blame_bugs import BUGS, Layer
from parity_tests.families import hot_weights, left_padded
from parity_tests.family_checks import build, quick_compilation

LAYERS, LENGTHS = 6, (20, 14, 9)
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": families.CASES["llama"] | {"num_hidden_layers": LAYERS},
    "gpt2": families.CASES["gpt2"] | {"num_hidden_layers": LAYERS},
}
LOSS = Loss(function=ppo_policy_loss, reads="logprobs", options=(("clip_range", 0.2),), temperature=1.0, entropy=True)
RECIPE = """
name: blame
stages: [rl]
model: {path: nowhere}
data: {prompts: {path: "task:postcards", limit: 20}}
rl: {reward: {model_path: nowhere}}
"""


@cache
def batch_of(name: str) -> TrainBatch:
    tokens, real, positions = left_padded(LENGTHS, max(LENGTHS), "blame")
    tokens = families.TokenBatch(tokens=tokens, attention=real, positions=positions, first=4)
    mask = (real & np.pad(real[:, :-1], ((0, 0), (1, 0))) & (np.arange(max(LENGTHS)) >= 4)).astype(np.float32)
    old = model(name, "torch").logprobs(tokens, temperature=1.0)
    draws = random.generator(2, "blame")
    arrays = {
        "old_logprobs": (old + 0.3 * draws.standard_normal(mask.shape)).astype(np.float32),
        "advantages": draws.standard_normal(mask.shape).astype(np.float32),
        "mask": mask,
    }
    return TrainBatch(tokens=tokens, arrays=arrays, denominators={"num_tokens": float(mask.sum())})


@cache
def weights(name: str):
    held = hot_weights(CONFIGS[name], "lm", "float32")
    # Six hot layers on each other saturate; matrices two thirds as hot keep every head and activation at work.
    return {key: value * np.float32(0.7) if value.ndim == 2 else value for key, value in held.items()}


@cache
def model(name: str, engine: str):
    with quick_compilation():
        return build(engine, CONFIGS[name], weights(name), rows=len(LENGTHS))


@cache
def recorded(name: str) -> Probed:
    with quick_compilation():
        return model(name, "jax").probe(LOSS, batch_of(name), depth="ops")


def replayed(name: str, depth="ops") -> Probed:
    given = recorded(name).taps
    names = taps(read_model(CONFIGS[name]), "lm", depth)
    forced = Taps(values={n: given.values[n] for n in names}, gradients={n: given.gradients[n] for n in names})
    return model(name, "torch").probe(LOSS, batch_of(name), depth=depth, forced=forced)


def step_of(name: str, seen: Probed, *, forced: bool) -> Step:
    batch, config = batch_of(name), read_model(CONFIGS[name])
    mask = "policy/probe/attention"
    arrays = {f"policy/start/weights/{key}": value for key, value in weights(name).items()}
    arrays |= {f"policy/probe/{key}": getattr(batch.tokens, key) for key in ("tokens", "attention", "positions")}
    arrays |= {"policy/probe/first": np.asarray(batch.tokens.first, np.int64)}
    arrays |= {f"policy/probe/arrays/{key}": value for key, value in batch.arrays.items()}
    arrays |= {f"policy/probe/denominators/{key}": np.asarray(value) for key, value in batch.denominators.items()}
    arrays |= {f"policy/{'forced_gradient' if forced else 'gradient'}/{key}": v for key, v in seen.gradients.items()}
    tensors = {key: Recorded(values=value, layout="") for key, value in arrays.items()}
    for tap, layout in taps(config, "lm", "ops").items():
        if tap in seen.taps.values:
            tensors[f"policy/taps/{tap}"] = Recorded(values=seen.taps.values[tap], layout=layout, mask=mask)
            tensors[f"policy/tap_gradients/{tap}"] = Recorded(values=seen.taps.gradients[tap], layout=layout, mask=mask)
    return Step(stage="rl", step=0, tensors=tensors)


def trace(path, name: str, engine: str, seen: Probed, replay: Trace | None = None) -> Trace:
    about: dict[str, Any] = {"recipe": RECIPE, "models": {"policy": {"config": CONFIGS[name], "head": "lm"}}}
    about["replay"] = None if replay is None else {"trace": replay.fingerprint(), "producer": "jax"}
    with TraceWriter(path, producer={"name": engine, "precision": "float32"}, provenance=about) as writer:
        writer.add(step_of(name, seen, forced=replay is not None))
    return Trace(path)


@pytest.fixture(scope="module", params=CONFIGS)
def clean(request):
    return request.param


def planted(tmp_path, bug, *, truth: bool):
    """What blame says of one bug, and the layer that it was planted in."""
    layer = int(random.generator(3, f"blame/{bug.name}").integers(LAYERS))
    a = trace(tmp_path / "a", bug.family, "jax", recorded(bug.family))
    held: Any = model(bug.family, "torch")
    with held._view():  # so that there is a network to probe
        path = {"llama": "model.layers", "gpt2": "transformer.h"}[bug.family] + f".{layer}"
    networks = (held._network.transformer, held._plain_network.transformer)
    with ExitStack() as undo:
        bug.plant(Layer(*(network.get_submodule(path) for network in networks)), layer, undo)
        seen = replayed(bug.family)
    return blame(a, trace(tmp_path / "b", bug.family, "torch", seen, a), truth=truth), layer


def test_without_a_bug_nothing_is_blamed(tmp_path, clean):
    a = trace(tmp_path / "a", clean, "jax", recorded(clean))
    found = blame(a, trace(tmp_path / "b", clean, "torch", replayed(clean), a))
    assert found.code == 0, as_text(found)
    looked = found.looked[0]
    worst = max([*looked.forward.values(), *looked.backward.values(), *looked.weights.values()])
    assert 1e-9 < worst < found.limit / 2  # there is noise, and room


@pytest.mark.slow
def test_20_planted_bugs_right_layer_right_operation(tmp_path):
    right_layer = right_operation = right_side = 0
    for index, bug in enumerate(BUGS.values()):
        found, layer = planted(tmp_path / str(index), bug, truth=True)
        worst = found.culprits[0] if found.culprits else None
        named = [] if worst is None else [name.split(".")[-1] for name in worst.operations]
        if worst is not None and worst.title.startswith("the residual sum after attention"):
            named = ["residual"]
        if worst is not None and worst.title.startswith("the rotary positions in"):
            named = ["rotary"]
        is_right = worst is not None and worst.direction == bug.direction and named == [bug.operation]
        right_layer += worst is not None and worst.layer == layer
        right_operation += is_right
        right_side += worst is not None and worst.verdict.startswith("B is wrong")
        print(f"{'ok ' if is_right else 'NO '} layer {layer} {bug.name:<42} {'' if worst is None else worst.text}: "
              f"{'' if worst is None else worst.verdict}")  # fmt: skip
    print(f"layer {right_layer} of {len(BUGS)}, operation {right_operation}, side by the oracle {right_side}")
    assert len(BUGS) == 20
    assert right_layer == 20
    assert right_operation >= 18
    assert right_side == 20
