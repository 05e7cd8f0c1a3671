"""What the engine's models hold, tensor by tensor, against the plan that is made before they are (`diptych.plan`)."""

import gc

import numpy as np
import pytest
import torch

from diptych.algorithms.losses import sft_loss
from diptych.engine import Loss, OptimizerSpec, TokenBatch, TrainBatch
from diptych.families.family import read_model, tensor_shapes
from diptych.layout import MeshShape
from diptych.parity.tolerances import TOLERANCES
from diptych.plan import footprint as plan
from diptych.plan.workload import Held, Workload
from diptych_torch import zero

# Two million parameters, so that what DeepSpeed keeps beside them does not show.
SIZES = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
KINDS = [("float32", stage) for stage in (0, 1, 2, 3)] + [("bfloat16", stage) for stage in (1, 2, 3)]


def held_storages():
    """The storage of every tensor that Python can reach, by its address."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":  # `isinstance` would wake torch's proxies
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return storages


def step(model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (2, 8)).astype(np.int32)
    ones = np.ones(tokens.shape, bool)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    batch = TrainBatch(
        tokens=TokenBatch(tokens=tokens, attention=ones, positions=positions),
        arrays={"mask": ones.astype(np.float32)},
        denominators={"num_tokens": 16.0},
    )
    model.update(Loss(function=sft_loss, reads="logprobs"), batch, learning_rate=1e-4)


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_a_trained_model_holds_what_was_planned(make_model, make_config, precision, stage):
    config = make_config(**SIZES)
    rng = np.random.default_rng(0)
    read = read_model(config)
    weights = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in tensor_shapes(read, "lm").items()}
    optimizer = OptimizerSpec(name="adamw", ema_decay=0.9)
    before = held_storages()  # kept, so that nothing new takes an address of theirs
    model = make_model(config=config, weights=weights, optimizer=optimizer, precision=precision, stage=stage)
    step(model)
    measured = sum(storage.nbytes() for address, storage in held_storages().items() if address not in before)
    workload = Workload(name="", settings=model.settings, chunk=1, supervised=(), rollouts=None)
    held = Held(name="policy", role="policy", config=read, head="lm", optimizer=optimizer, mesh=MeshShape())
    found = plan.footprint(held, workload, 1)
    planned = sum(found.device.values())
    limit = TOLERANCES["memory_relative"].at(precision)
    assert measured == pytest.approx(planned, rel=limit)
    for part in ("policy weights", "policy moments", "policy average"):  # canary: each of them would be missed
        assert measured != pytest.approx(planned - found.device[part], rel=limit)


def test_the_plan_knows_deepspeeds_settings():
    options = {"micro_batch_size": 1, "dtype": torch.float32, "max_grad_norm": None, "more": {}}
    config = zero.ds_config(zero.Zero(stage=3), elements=10**10, **options)["zero_optimization"]
    assert {name: config[name] for name in plan.SETTINGS} == plan.SETTINGS


@pytest.mark.parametrize(("precision", "stage"), [kind for kind in KINDS if kind[1] > 0])
def test_a_model_that_is_no_longer_used_gives_its_memory_back(make_model, make_config, precision, stage):
    """sft's model would stay on the accelerator beside those of rl."""
    config = make_config(**SIZES)
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(read_model(config), "lm")
    weights = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    before = held_storages()
    model = make_model(
        config=config, weights=weights, optimizer=OptimizerSpec(name="adamw"), precision=precision, stage=stage
    )
    step(model)

    def held():
        return sum(storage.nbytes() for address, storage in held_storages().items() if address not in before)

    used = held()
    del model
    gc.collect()
    assert used > 10e6
    assert held() < 0.01 * used
