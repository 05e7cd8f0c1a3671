"""Plans of the engine's own programs: the program is the engine's, bytes and FLOPs are those counted by hand."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from diptych.algorithms.losses import sft_loss
from diptych.data.batches import TokenBatch
from diptych.engine import Loss, ModelSpec, TrainBatch
from diptych.plan import costs, memory
from diptych.plan.hardware import read_topology
from diptych.plan.workload import read_workload
from diptych.recipe.load import load_recipe
from diptych.recipe.new_model import new_model_config
from diptych.recipe.settings import engine_settings
from diptych.stages.context import optimizer_spec
from diptych.weights.huggingface import initial_checkpoint
from diptych_jax import engine, training
from diptych_jax.plan import _Planner

SIZES = [
    "model.new.hidden_size=32", "model.new.intermediate_size=64", "model.new.num_hidden_layers=1",
    "sft.batch_size=16", "sft.micro_batch_size=8", "rl.batch_size=16", "rl.micro_batch_size=8",
    "data.max_prompt_tokens=8", "data.max_response_tokens=8", "rollout.max_new_tokens=8", "data.buckets=[8, 16]",
    "layout.train={data: 2, fsdp: 2, tensor: 2}", "layout.decode={data: 4, tensor: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    """The workload, and the programs of the sft step and of decoding."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices: --xla_force_host_platform_device_count=8")
    machine = read_topology("cpu:8")
    recipe = load_recipe("recipes/quickstart.yaml", SIZES)
    workload = read_workload(recipe, machine)
    planner = _Planner(workload, machine, lambda line: None)
    tasks = planner.supervised(workload.supervised[0])
    tasks += [task for task in planner.rollout(workload.rollouts) if task.name in ("decode", "switch of a layer")]
    return recipe, workload, tasks, {task.name: planner.compiled(task) for task in tasks}


def test_weights_and_moments_are_those_of_the_exact_count(planned):
    _, workload, _, programs = planned
    parts = memory.held_bytes(workload.supervised[0].model, workload)
    for name, exact in (
        ("policy gradients", parts["policy weights"]),
        ("policy optimizer", sum(parts.values())),
        ("decode", memory.decode_copy(workload.rollouts, workload.compute)),
    ):
        compiled = programs[name].argument - programs[name].batch
        assert compiled == pytest.approx(exact, rel=0.01), name


def test_canary_moments_left_out_are_more_than_a_hundredth(planned):
    _, workload, _, programs = planned
    parts = memory.held_bytes(workload.supervised[0].model, workload)
    one = programs["policy optimizer"]
    assert one.argument - one.batch != pytest.approx(parts["policy weights"], rel=0.01)


def test_the_program_is_the_one_that_the_engine_runs(planned, monkeypatch):
    recipe, _, tasks, _ = planned
    monkeypatch.setenv("DIPTYCH_DEVICES", "8")
    config = new_model_config(recipe.model.new) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    checkpoint = initial_checkpoint(config, seed=0)
    model = engine.create(engine_settings(recipe)).model(
        ModelSpec(
            config=config, weights=checkpoint.weights, head="lm", optimizer=optimizer_spec(recipe.sft.optimizer),
            micro_batch_size=recipe.sft.micro_batch_size, logprob_chunk=recipe.logprob_chunk,
        )
    )  # fmt: skip
    rows = np.ones((16, 16), np.int32)
    tokens = TokenBatch(tokens=rows, attention=rows > 0, positions=np.tile(np.arange(16, dtype=np.int32), (16, 1)))
    batch = TrainBatch(tokens=tokens, arrays={"mask": rows.astype(np.float32)}, denominators={"num_tokens": 256.0})
    loss = Loss(function=sft_loss, reads="logprobs")
    inputs = model._inputs(loss, batch)
    with jax.set_mesh(model._mesh):
        theirs = training.gradients.lower(
            model._state.model, model._frozen, inputs, program=model._program(loss, batch)
        ).as_text()
    ours = tasks[0]
    with jax.set_mesh(ours.mesh):
        mine = training.gradients.lower(*ours.arguments, **ours.static).as_text()

    def body(text):  # scalars that come from the host are replicated without a word; a plan says so
        return text[text.index("\n", text.index("func.func public @main")) :]

    assert body(mine) == body(theirs)


def test_flops_are_those_of_the_formulas(planned):
    _, workload, _, programs = planned
    step, one = workload.supervised[0], programs["policy gradients"]
    size = {"rows": step.rows, "columns": step.columns, "scored": step.columns - 1, "head": "lm"}
    chunks = step.micro * size["scored"] / workload.chunk
    assert one.flops == pytest.approx(
        costs.training(step.model.config, **size, remat=workload.settings.remat, chunks=chunks), rel=0.06
    )
    assert one.needed_flops == pytest.approx(3 * costs.forward(step.model.config, **size).all, rel=0.06)
    # Compiled products are no fewer than each device's share, give or take what the compiler need not repeat.
    assert one.device_flops > 0.85 * one.share
    rollouts, decode = workload.rollouts, programs["decode"]
    counted = costs.decoding(rollouts.policy.config, rows=rollouts.rows, prompt=rollouts.prompt, new=rollouts.new)
    assert decode.flops == pytest.approx(counted, rel=0.1)


def test_a_split_model_talks_and_the_switch_gathers_what_the_layouts_ask(planned):
    _, workload, _, programs = planned
    kinds = {one.kind for one in programs["policy gradients"].collectives}
    assert {"all-gather", "all-reduce"} <= kinds
    # fsdp 2 is gathered, tensor 2 stays: a device receives the other half of its copy of the layer's matrices.
    config = workload.rollouts.policy.config
    matrices = memory.active_numbers(config) * 4 / 2
    gathered = sum(one.bytes for one in programs["switch of a layer"].collectives if one.kind == "all-gather")
    assert gathered == pytest.approx(matrices / 2, rel=0.01)


@pytest.mark.slow
def test_a_plan_for_a_tpu_that_is_not_there(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU's compiler: pip install 'diptych[plan]'")
    path = tmp_path / "plan.json"
    whole_tiles = ["model.new.hidden_size=512", "model.new.intermediate_size=1024", "model.new.num_attention_heads=4"]
    command = [sys.executable, "-m", "diptych.cli", "plan", "recipes/quickstart.yaml", "--topology", "v5e:2x4"]
    overrides = [*SIZES, *whole_tiles, "stages=[sft]", "precision=bfloat16"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([*command, "--json", str(path), *overrides], check=True, env=environment, timeout=300)
    found = json.loads(path.read_text())
    assert found["fits"]
    assert all(abs(one["compiled"] / one["counted"] - 1) < 0.01 for one in found["counted_bytes"])
