"""The memory plan before a launch: what is counted in which phase, what is refused, and whether the advice is true."""

import dataclasses
import re
import shlex

import pytest

from diptych.cli import main
from diptych.engine import Engine, EngineSettings, Memory, OptimizerSpec
from diptych.errors import UserError
from diptych.layout import Layout, MeshShape, Zero
from diptych.parity.tolerances import TOLERANCES
from diptych.plan.footprint import Phase, footprint, layer_bytes, phases, prefill_columns
from diptych.plan.hardware import ACCELERATORS, GiB
from diptych.plan.launch import check_launch, describe_launch, misfits, plan_launch, remedy
from diptych.plan.memory import total_numbers
from diptych.plan.workload import NOTHING, Held, Known, Workload, read_workload
from diptych.plan.zero import plan_zero
from diptych.recipe.checks import check_recipe
from diptych.recipe.load import load_recipe
from diptych.stages import pipeline
from diptych.world import SINGLE

LLAMA, OPT, QUICK = "recipes/plans/llama-3-8b-v5e.yaml", "recipes/plans/opt-1.3b-v5e.yaml", "recipes/quickstart.yaml"


def workload(recipe, *overrides, known=NOTHING):
    return read_workload(load_recipe(recipe, list(overrides)), None, known=known)


def launch(recipe, *overrides, num_processes=8, device=79.0, host=200.0, known=NOTHING):
    memory = Memory(device=None if device is None else int(device * GiB), host=int(host * GiB))
    made = load_recipe(recipe, list(overrides))
    return plan_launch(made, made.stages, num_processes=num_processes, memory=memory, known=known)


def phase(found, name) -> Phase:
    return next(one for one in found if one.name == name)


# Footprints --------------------------------------------------------------------------------------------------------

# What DeepSpeed 0.19.8 held on each of two processes after an update, in bytes of tensors for each of 16.7 million
# parameters (buckets of gradients taken off): precision, stage, offloaded, on the device, in host memory.
MEASURED = [
    ("float32", 0, False, 12.0, 0.0),
    ("float32", 1, False, 10.0, 0.0),
    ("float32", 2, False, 10.0, 0.0),
    ("float32", 3, False, 10.0, 0.0),
    ("bfloat16", 1, False, 12.0, 0.0),
    ("bfloat16", 2, False, 8.0, 0.0),
    ("bfloat16", 3, False, 9.0, 0.0),
    ("float32", 1, True, 4.0, 10.0),
    ("float32", 2, True, 4.0, 12.0),
    ("bfloat16", 2, True, 2.0, 11.0),
    ("bfloat16", 3, True, 1.0, 10.0),
]


def held(zero, precision="float32", **fields):
    made = workload(LLAMA).rollouts.policy
    settings = EngineSettings(precision=precision, layout=Layout(zero=zero))
    one = Held(
        name="policy", role="policy", config=made.config, head="lm", optimizer=OptimizerSpec(name="adamw"),
        mesh=MeshShape(), **fields,
    )  # fmt: skip
    return one, Workload(name="w", settings=settings, chunk=1024, supervised=(), rollouts=None)


@pytest.mark.parametrize(("precision", "stage", "offload", "device", "host"), MEASURED)
def test_a_model_holds_what_deepspeed_was_measured_to_hold(precision, stage, offload, device, host):
    one, made = held(Zero(stage=stage, offload_optimizer=offload), precision)
    found, numbers = footprint(one, made, 2), total_numbers(one.config, "lm")
    kept = {name: size for name, size in found.device.items() if "buffers" not in name}
    assert sum(kept.values()) / numbers == pytest.approx(device, rel=TOLERANCES["memory_relative"].at(precision))
    assert sum(found.host.values()) / numbers == pytest.approx(host, rel=TOLERANCES["memory_relative"].at(precision))


def test_canary_the_stages_are_told_apart():
    one, made = held(Zero(stage=2), "bfloat16")
    found, limit = footprint(one, made, 2).device, TOLERANCES["memory_relative"].at("bfloat16")
    for _, stage, offload, device, _ in (row for row in MEASURED if row[0] == "bfloat16"):
        is_close = sum(found.values()) / total_numbers(one.config, "lm") == pytest.approx(device, rel=limit)
        assert is_close == (stage == 2 and not offload)


def test_sgd_has_one_moment_an_average_is_one_more_and_frozen_models_are_weights():
    one, made = held(Zero(stage=1))
    masters = footprint(one, made, 8).device["policy masters"]
    assert footprint(one, made, 8).device["policy moments"] == 2 * masters
    optimizer = OptimizerSpec(name="sgd", ema_decay=0.9)
    other = footprint(dataclasses.replace(one, optimizer=optimizer), made, 8).device
    assert (other["policy moments"], other["policy average"]) == (masters, masters)
    frozen = dataclasses.replace(one, role="reference", optimizer=None)
    assert footprint(frozen, made, 8).device == {"policy weights": 4.0 * total_numbers(one.config, "lm")}


def test_an_adapter_trains_little_above_a_whole_model():
    policy = workload(LLAMA, "layout.zero.stage=2", "rl.adapter={}").rollouts.policy
    found = footprint(policy, workload(LLAMA, "layout.zero.stage=2"), 8).device
    assert found["policy weights"] > 2 * policy.config.num_params
    assert found["policy moments"] < 0.01 * found["policy weights"]


@pytest.mark.parametrize(("family", "layers"), [("llama", 32), ("opt", 24)])
def test_what_is_made_again_is_not_kept(family, layers):
    config = workload(LLAMA if family == "llama" else OPT).rollouts.policy.config
    full, dots, none = (layer_bytes(config, 1, 512, 2, remat) for remat in ("full", "dots", "none"))
    assert full < dots < none
    assert layer_bytes(config, 2, 512, 2, "none") == 2 * none
    inputs = layers * 512 * config.hidden_size * 2
    assert inputs < full < none / 4


# Phases ------------------------------------------------------------------------------------------------------------


def test_every_stage_has_its_phases():
    names = [one.name for one in phases(workload(QUICK), 2)]
    assert names == [
        "sft update", "reward update", "rl rollout", "rl scoring", "rl update, policy", "rl update, critic",
    ]  # fmt: skip
    assert [one.name for one in phases(workload(QUICK, "layout.zero.stage=3"), 2)][1] == "sft samples"
    assert {one.name.split()[0] for one in phases(workload(QUICK, "stages=[sft]"), 2)} == {"sft"}


def test_what_waits_in_the_host_is_on_the_device_only_while_it_scores():
    found = phases(workload(OPT, "layout.zero.stage=1", "layout.offload=[reference,reward]"), 8)
    scoring, update = phase(found, "rl scoring"), phase(found, "rl update, policy")
    waiting = scoring.host["reference weights"]
    assert scoring.device["reference weights"] == waiting > 0
    assert "reward weights" not in scoring.device  # one after the other, and this one is smaller
    assert "reference weights" not in update.device
    assert update.host["reference weights"] == waiting


def test_roles_have_settings_of_their_own():
    plain = phase(phases(workload(OPT, "layout.zero.stage=1"), 8), "rl rollout")
    own = ["layout.zero_critic={stage: 2, offload_optimizer: cpu}", "layout.zero_reference={stage: 3}"]
    split = phase(phases(workload(OPT, "layout.zero.stage=1", *own), 8), "rl rollout")
    assert split.device["policy moments"] == plain.device["policy moments"]
    assert split.device["reference weights"] < plain.device["reference weights"] / 4
    assert "critic moments" not in split.device
    assert split.host["critic moments"] == plain.device["critic moments"]


def test_stage_three_decodes_from_a_copy_and_a_cache_holds_the_rows_that_decode():
    copies = [
        phase(phases(workload(OPT, f"layout.zero.stage={stage}"), 8), "rl rollout").device.get("decode copy", 0.0)
        for stage in (2, 3)
    ]
    made = workload(OPT, "layout.zero.stage=2").rollouts
    assert copies == [0.0, 2.0 * made.policy.config.num_params]
    rows = "rollout.decode_rows=32"
    caches = [
        phase(phases(workload(OPT, "layout.zero.stage=2", *more), 8), "rl rollout").device["KV cache"]
        for more in ([], [rows])
    ]
    assert caches[1] * 8 == caches[0] == 32 * 512 * 2 * 24 * 2048 * 2


def test_several_processes_may_decode_together():
    alone, together = (
        phase(phases(workload(LLAMA, "layout.zero.stage=3", f"layout.decode.tensor={size}"), 8), "rl rollout").device
        for size in (1, 4)
    )
    assert together["KV cache"] == alone["KV cache"]  # four times the rows, a quarter of the heads
    assert together["decode copy"] < alone["decode copy"] / 2


def test_the_cache_is_gone_before_the_updates():
    made = phases(workload(OPT, "layout.zero.stage=1"), 8)
    assert "KV cache" in phase(made, "rl rollout").device
    assert "KV cache" not in phase(made, "rl update, policy").device


@pytest.mark.parametrize(("rows", "micro", "expected"), [(4, 4, 256), (64, 4, 32), (1024, 4, 2), (10**6, 1, 1)])
def test_prompts_are_read_in_pieces_no_larger_than_scoring(rows, micro, expected):
    assert prefill_columns(rows=rows, width=256, micro=micro, columns=512) == expected


def test_a_server_generates_in_memory_of_its_own():
    made = phases(workload(OPT, "layout.zero.stage=3", "rollout.engine=servers.py:start"), 8)
    assert not {"KV cache", "decode copy"} & phase(made, "rl rollout").device.keys()


def test_deepspeeds_own_settings_count():
    small = ["deepspeed.zero_optimization={reduce_bucket_size: 1000000}", "layout.zero.stage=3"]
    found = footprint(workload(OPT).rollouts.policy, workload(OPT, *small), 8)
    assert found.device["policy gradient buffers"] == 4e6


def test_rows_of_the_data_count_where_they_are_known():
    all_of_it = phase(phases(workload(QUICK), 1), "sft update").device["activations"]
    known = Known(longest={"sft": 20})
    short = phase(phases(workload(QUICK, known=known), 1), "sft update").device["activations"]
    assert short < all_of_it / 2


def test_the_table_of_deepspeed_knows_what_is_offloaded():
    gpu = ACCELERATORS["h100"]

    def totals(*overrides):
        made = plan_zero(workload(LLAMA, *overrides), gpu, 64, efficiency=1.0, price=3.0)
        return {one.stage: (one.total, one.host) for one in made}

    plain, offloaded = totals("layout.zero.stage=1"), totals("layout.zero={stage: 1, offload_optimizer: cpu}")
    assert list(plain) == [1, 2, 3]  # bfloat16 has no stage 0
    assert plain[3][0] < plain[2][0]
    assert all(offloaded[stage][1] > plain[stage][1] for stage in plain)
    assert offloaded[2][0] < plain[2][0]


# Refusals and advice -----------------------------------------------------------------------------------------------

TOO_LARGE = [
    (OPT, ["layout.zero.stage=1"], {"num_processes": 1, "device": 45.0}),
    (OPT, ["layout.zero.stage=1", "layout.remat=none", "rollout.decode_rows=8"], {"num_processes": 2, "device": 40.0}),
    (OPT, ["layout.zero.stage=1"], {"num_processes": 8, "device": 11.0}),
    (LLAMA, ["layout.zero.stage=1"], {}),
    (LLAMA, ["layout.zero.stage=3"], {"num_processes": 4, "host": 400.0}),
    (LLAMA, ["layout.zero.stage=3"], {"num_processes": 2, "host": 100.0}),
    (QUICK, [], {"num_processes": 1, "device": 0.05}),
    (QUICK, [], {"num_processes": 1, "device": None, "host": 0.05}),
]


@pytest.mark.parametrize(("recipe", "overrides", "machine"), TOO_LARGE)
def test_what_cannot_fit_is_refused_with_settings_that_make_it_fit(recipe, overrides, machine):
    large = launch(recipe, *overrides, **machine)
    with pytest.raises(UserError, match=r"needs .* are free; the largest part is .*: set ") as caught:
        check_launch(large)
    settings = re.search(r"set (.*) \(then", str(caught.value))[1]
    assert shlex.split(settings) == [one.setting for one in remedy(large)]
    check_recipe(load_recipe(recipe, [*overrides, *settings.split()]), where=recipe)
    fitting = launch(recipe, *overrides, *settings.split(), **machine)
    assert not misfits(fitting, estimated=1.0)
    check_launch(fitting)
    for left_out in settings.split():  # none of them is there for nothing
        rest = [one for one in settings.split() if one != left_out]
        fewer = launch(recipe, *overrides, *rest, **machine)
        assert misfits(fewer, estimated=1.0)


def test_the_cheapest_change_comes_first():
    assert [one.setting for one in remedy(launch(OPT, "layout.zero.stage=1", num_processes=1, device=50.0))] == [
        "rollout.decode_rows=128"
    ]


def test_where_no_settings_help_it_says_how_many_processes_would():
    with pytest.raises(UserError, match=r"no settings make it fit here; \d+ such processes would do, with .*stage=3"):
        check_launch(launch(LLAMA, "layout.zero.stage=1", num_processes=1, device=10.0, host=60.0))
    with pytest.raises(UserError, match="take a smaller model"):
        check_launch(launch(LLAMA, "layout.zero.stage=1", num_processes=1, device=1.0))


def test_host_memory_can_lack_too():
    large = launch(LLAMA, "layout.zero={stage: 3, offload_optimizer: cpu}", num_processes=8, host=20.0)
    with pytest.raises(UserError, match=r"needs .* of host memory, .* the largest part is policy moments"):
        check_launch(large)


def test_an_estimate_alone_refuses_only_what_is_sure():
    made = launch(OPT, "layout.zero.stage=1", num_processes=1)
    fullest = max(made.phases, key=lambda one: one.total)
    close = dataclasses.replace(made, memory=Memory(device=int(fullest.total * 0.99), host=None))
    check_launch(close)
    (said,) = [line for line in describe_launch(close).splitlines() if line.startswith("tight: ")]
    assert fullest.name in said
    assert "tight" not in describe_launch(made)


def test_on_a_cpu_all_lies_in_one_memory():
    made = launch(QUICK, num_processes=2, device=None, host=8.0)
    (table,) = describe_launch(made).split("\n\n")
    assert table.startswith("memory of each of 2 processes, MiB")
    assert "on its device" not in table
    offloaded = launch(QUICK, "layout.zero={stage: 1, offload_optimizer: cpu}", device=None, host=8.0)
    assert "policy moments (host)" in describe_launch(offloaded)


# The commands ------------------------------------------------------------------------------------------------------


class Fake(Engine):
    """An engine that says only how much memory there is."""

    name = "torch"

    def __init__(self, memory):
        self.found = memory
        self.world = SINGLE

    def memory(self):
        return self.found

    def check_model(self, config, role):
        del config, role


@pytest.mark.parametrize(
    ("memory", "refused"),
    [(None, False), (Memory(device=2**32, host=None), False), (Memory(device=2**20, host=None), True)],
)
def test_a_run_prints_its_plan_and_is_refused_before_anything_is_written(
    memory, refused, tmp_path, capsys, monkeypatch
):
    class Reached(Exception):
        pass

    def stop(*_, **__):
        raise Reached

    monkeypatch.setattr(pipeline, "load_engine", lambda *_, **__: Fake(memory))
    monkeypatch.setattr(pipeline.RunDirectory, "create", stop)
    recipe = load_recipe(QUICK, ["data.demonstrations.limit=60", "data.preferences.limit=60", "data.prompts.limit=60"])
    with pytest.raises(UserError if refused else Reached, match="the largest part is" if refused else None):
        pipeline.prepare(recipe, engine_name="torch", output=tmp_path / "run")
    assert ("rl rollout" in capsys.readouterr().err) == (memory is not None)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_plan_without_the_machine(capsys):
    arguments = ["plan", OPT, "--engine", "torch", "--gpu", "h200", "--gpus", "8"]
    assert main([*arguments, "layout.zero.stage=2"]) == 0
    printed = capsys.readouterr().out
    assert "memory of each of 8 processes on its device, GiB" in printed
    assert "139.000" in printed
    assert main([*arguments, "layout.zero.stage=1", "rl.batch_size=16384"]) == 2
    assert "the largest part is KV cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engine", "torch", "--search"], "--search"),
        (["--engine", "torch", "--topology", "v5e:2x4"], "--topology"),
        (["--engine", "torch", "--efficiency", "0.5"], "--efficiency"),
        (["--engine", "torch", "--gpus", "8"], "layout.zero.stage"),  # bfloat16 at stage 0
        (["--engine", "torch", "--gpu", "v5e"], "--gpu v5e"),
        (["--topology", "v5e:2x4", "--host-memory", "10"], "--host-memory"),
        ([], "--topology"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, named, capsys):
    assert main(["plan", OPT, *options]) == 2
    assert named in capsys.readouterr().err
