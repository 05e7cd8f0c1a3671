"""Planning by arithmetic: what is counted, split, refused and searched without a compiler."""

import dataclasses
import math
import subprocess
import sys
import types

import pytest

from diptych.cli import main
from diptych.errors import UserError
from diptych.families.family import model_slots
from diptych.layout import MeshShape
from diptych.plan import costs, memory, zero
from diptych.plan.footprint import footprint
from diptych.plan.hardware import ACCELERATORS, read_topology
from diptych.plan.plan import Options, make_plan
from diptych.plan.programs import Collective, Program
from diptych.plan.report import describe
from diptych.plan.roofline import collective_seconds, phase_seconds, rates
from diptych.plan.search import can_switch, search
from diptych.plan.workload import filled, read_workload
from diptych.recipe.load import load_recipe

LLAMA, OPT = "recipes/plans/llama-3-8b-v5e.yaml", "recipes/plans/opt-1.3b-v5e.yaml"


def workload(recipe, topology, *overrides, search=False):
    return read_workload(load_recipe(recipe, list(overrides)), read_topology(topology), search=search)


def llama(topology="v5e:16x16", *overrides):
    return workload(LLAMA, topology, *overrides)


# Hardware ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v5p:4x4", "h100:8", "v5e:0x4", "v9:2x2", "cpu:2x2"])
def test_a_topology_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--topology"):
        read_topology(text)


def test_rings_are_where_the_grid_is_wired_to_them():
    assert [read_topology("v5e:16x16").is_ring(axis) for axis in (0, 1)] == [True, True]
    assert [read_topology("v5e:8x16").is_ring(axis) for axis in (0, 1)] == [False, True]
    assert not any(read_topology("v5p:2x2x4").is_ring(axis) for axis in range(3))
    assert all(read_topology("v5p:4x4x4").is_ring(axis) for axis in range(3))


# Memory ------------------------------------------------------------------------------------------------------------


def test_one_device_holds_every_parameter_and_many_share_them():
    config = llama().rollouts.policy.config
    assert config.num_params == 8_030_261_248
    assert memory.model_numbers(config, "lm", MeshShape()) == config.num_params
    norms = sum(
        math.prod(slot.shape) * (config.num_layers if slot.per_layer else 1)
        for slot in model_slots(config, "lm").values()
        if len(slot.shape) == 1
    )
    shared = memory.model_numbers(config, "lm", MeshShape(fsdp=32, tensor=8))
    assert shared == (config.num_params - norms) // 256 + norms  # vectors of the model's width are whole


def test_moments_are_two_of_float32_and_frozen_models_are_as_they_compute():
    made = llama()
    policy = memory.held_bytes(made.rollouts.policy, made)
    assert policy["policy moments"] == 2 * policy["policy weights"]
    reference = memory.held_bytes(made.rollouts.reference, made)
    assert reference["reference weights"] * 2 == policy["policy weights"]


def test_the_cache_is_split_over_rows_and_heads():
    rollouts = llama().rollouts
    whole = rollouts.rows * rollouts.columns * 2 * 32 * 8 * 128 * 2
    assert memory.cache_bytes(rollouts, "bfloat16") == whole / 256


def test_what_waits_in_the_host_is_there_only_while_it_scores():
    phases = memory.resident(llama("v5e:16x16", "layout.offload=[reference]"))
    assert "reference weights" in phases["scoring"]
    assert "reference weights" not in phases["update"]
    assert "decode copy" not in phases["update"]


def test_rows_are_filled_up_to_the_mesh():
    assert filled(100, MeshShape(fsdp=32)) == 128
    assert filled(64, MeshShape(fsdp=32, tensor=2)) == 64


# Roofline ----------------------------------------------------------------------------------------------------------


def test_a_collective_takes_its_bytes_and_its_way():
    one = Collective(kind="all-gather", devices=16, links=2, hops=8, count=3.0, bytes=1e9)
    chip = ACCELERATORS["v5e"]
    assert collective_seconds(one, chip) == pytest.approx(1e9 / (2 * 50e9) + 3 * 8 * 1e-6)


def test_a_phase_is_bounded_by_its_longest_term():
    one = Program(
        name="policy gradients", phase="update", role="policy", calls=2, devices=4, seconds=1.0, flops=4 * 197e12,
        device_flops=2 * 197e12, hbm=819e9 / 2,
    )  # fmt: skip
    found = phase_seconds([one], ACCELERATORS["v5e"], precision="bfloat16")["update"]
    assert (found.compute, found.memory, found.bound, found.limit) == (4.0, 1.0, 4.0, "compute")
    half = phase_seconds([one], ACCELERATORS["v5e"], precision="bfloat16", efficiency=0.5)["update"]
    assert half.bound == 8.0


def test_dollars_follow_from_seconds():
    made = rates([1800.0, 1800.0], generated=2_000_000, trained=4_000_000, num_chips=10, price=1.5)
    assert (made.generated, made.dollars, made.dollars_per_hour) == (2_000_000 / 3600, 7.5, 15.0)


def test_formulas_grow_with_what_they_count():
    config = llama().rollouts.policy.config
    one = costs.forward(config, rows=1, columns=1024, scored=512, head="lm")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    attention = 4 * 1024 * 1024 * 32 * 128 * 32
    assert one.layers == 2 * 1024 * matrices + attention
    assert one.head == 2 * 512 * 4096 * 128256
    size = {"rows": 1, "columns": 1024, "scored": 512, "head": "lm"}
    assert costs.training(config, **size, remat="full", chunks=2) == 4 * one.all
    assert costs.training(config, **size, remat="full", chunks=1) == 4 * one.all - one.head  # kept, not made again
    assert costs.training(config, **size, remat="none", chunks=1) == 3 * one.all


# DeepSpeed ---------------------------------------------------------------------------------------------------------


def test_the_optimizer_is_shared_out_as_in_the_paper():
    # Rajbhandari et al. 2020: of P parameters in bfloat16 masters and moments take 12 P bytes, of N GPUs 12 P / N.
    made = llama().rollouts.policy
    numbers = made.config.num_params
    for num_gpus in (1, 8, 64):
        found = footprint(made, zero.at_stage(llama(), 2), num_gpus).device
        states = found["policy masters"] + found["policy moments"]
        assert states == pytest.approx(12 * numbers / num_gpus)
    whole = footprint(made, zero.at_stage(llama(), 2), 64).device["policy weights"]
    split = footprint(made, zero.at_stage(llama(), 3), 64).device["policy weights"]
    assert whole == 2 * numbers
    assert split == pytest.approx(whole / 64, rel=0.05)


def test_stage_three_holds_least_and_waits_for_the_network():
    plans = {one.stage: one for one in zero.plan_zero(llama(), ACCELERATORS["h100"], 64, efficiency=1.0, price=3.0)}
    assert plans[3].total == min(one.total for one in plans.values())
    assert plans[3].times["update"].network > plans[2].times["update"].network


# Search ------------------------------------------------------------------------------------------------------------


def test_a_search_ranks_what_fits():
    found = search(workload(OPT, "v5e:2x4", search=True), read_topology("v5e:2x4"))
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    limit = ACCELERATORS["v5e"].memory
    for one in found:
        assert one.train.size == one.decode.size == 8
        assert one.bytes <= limit
        assert can_switch(one.train, one.decode)
    assert "train: {data:" in found[0].recipe_lines


def test_a_search_says_when_nothing_fits():
    with pytest.raises(UserError, match="no layout fits"):
        search(workload(LLAMA, "v5e:2x2", search=True), read_topology("v5e:2x2"))


# The command -------------------------------------------------------------------------------------------------------


def test_a_layout_that_cannot_fit_is_refused_before_anything_is_compiled(capsys, tmp_path):
    page = tmp_path / "plan.html"
    meshes = ["layout.train={data: 1, fsdp: 8, tensor: 1}", "layout.decode={data: 8, tensor: 1}"]
    arguments = ["plan", LLAMA, "--topology", "v5e:2x4", "--html", str(page), *meshes]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "it does not fit" in printed.out
    assert "the largest part is policy moments" in printed.out
    assert "give layout.train more fsdp or tensor" in " ".join(printed.out.split())
    assert "ZeRO stage 3" in printed.out
    assert "compiled" not in printed.err
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http-equiv", "")


def test_of_several_phases_the_one_is_named_that_lacks_least(capsys):
    meshes = ["layout.train={data: 1, fsdp: 16, tensor: 1}", "layout.decode={data: 16, tensor: 1}"]
    assert main(["plan", LLAMA, "--topology", "v5e:4x4", *meshes]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "scoring needs" in printed
    assert "the largest part is decode copy" in printed
    assert "layout.decode.tensor" in printed


def test_a_program_that_multiplies_more_than_was_asked_for_is_named(monkeypatch):
    one = Program(
        name="policy gradients", phase="update", role="policy", calls=4, devices=256, seconds=1.0, flops=256e12,
        device_flops=20e12,
    )  # fmt: skip
    sane = dataclasses.replace(one, device_flops=1e12)
    decode = dataclasses.replace(sane, name="decode", phase="rollout")
    scoring = dataclasses.replace(sane, name="policy log-probabilities", phase="scoring")
    planner = types.SimpleNamespace(plan_programs=lambda *_, **__: [decode, scoring, one])
    monkeypatch.setattr("diptych.plan.plan.load_planner", lambda engine: planner)
    text = describe(make_plan(load_recipe(LLAMA, []), "v5e:16x16", Options(), report=print))
    assert "policy gradients: the compiled program multiplies 20.0 times a device's share" in text
    assert "decode: the compiled" not in text


def test_canary_the_recipes_own_layout_is_not_refused():
    phases = memory.resident(llama())
    assert max(sum(parts.values()) for parts in phases.values()) < ACCELERATORS["v5e"].memory


def test_meshes_that_do_not_fill_the_machine_are_named():
    with pytest.raises(UserError, match=r"layout\.train"):
        llama("v5e:4x4")


@pytest.mark.parametrize(("option", "value"), [("--efficiency", "0"), ("--gpus", "0"), ("--gpu", "tpu")])
def test_options_out_of_range_are_refused(option, value, capsys):
    assert main(["plan", OPT, "--topology", "v5e:2x4", option, value]) == 2
    assert option in capsys.readouterr().err


def test_planning_without_a_compiler_loads_no_framework():
    code = (
        "import sys\nfrom diptych.cli import main\n"
        f"main(['plan', {LLAMA!r}, '--topology', 'v5e:2x4', 'layout.train={{data: 1, fsdp: 8, tensor: 1}}', "
        "'layout.decode={data: 8, tensor: 1}'])\n"
        "print([name for name in ('jax', 'torch', 'diptych_jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
