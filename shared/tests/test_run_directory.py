"""Who may write into a run directory, and what a crash leaves there."""

import dataclasses
import json
import os

import pytest

from diptych.errors import InvariantError, UserError
from diptych.recipe.load import parse_recipe
from diptych.recipe.schema import LayoutRecipe, Recipe, RolloutRecipe, SFTRecipe, TrainMeshRecipe, ZeroRecipe
from diptych.run import directory
from diptych.run.directory import RunDirectory, read_samples, write_json, write_text

RECIPE = Recipe(name="test", seed=3)


def create(path, recipe=RECIPE, *, engine="jax", resume=False, stages=("sft",), **environment):
    return RunDirectory.create(
        path, recipe, engine=engine, environment={"python": "3", **environment}, resume=resume, stages=stages
    )


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_a_new_directory_holds_the_record(tmp_path):
    run = create(tmp_path / "a" / "b")
    assert names(run.path) == ["environment.json", "recipe.yaml", "state.json", "summary.json"]
    assert parse_recipe(run.path / "recipe.yaml") == RECIPE
    record = json.loads((run.path / "environment.json").read_text())
    assert record["engine"] == "jax"
    assert record["python"] == "3"
    assert run.summary() == {"engine": "jax", "name": "test", "stages": {}}
    assert run.status("sft") is None
    assert run.model_path("sft") == run.path / "models" / "sft"
    assert names(tmp_path / "a") == ["b"]


def test_an_empty_directory_is_used_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert names(create(tmp_path / "empty").path) == ["environment.json", "recipe.yaml", "state.json", "summary.json"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    create(tmp_path / "here" / ".")
    assert os.listdir(".")


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch, exists):
    output = tmp_path / "out"
    if exists:
        output.mkdir()

    def full(recipe):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "dump_recipe", full)
    with pytest.raises(UserError, match="cannot be used as a run directory: No space left on device"):
        create(output)
    assert names(tmp_path) == (["out"] if exists else [])
    assert not exists or names(output) == []


def test_a_directory_of_something_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run \(no recipe.yaml\); choose another --output"):
        create(tmp_path)
    with pytest.raises(UserError, match="notes.txt: is a file; choose another --output"):
        create(tmp_path / "notes.txt")
    assert names(tmp_path) == ["notes.txt"]


OTHER_RUNS = {
    "seed": (dataclasses.replace(RECIPE, seed=4), "jax", "its 'seed' is 3, this recipe's is 4"),
    "nested": (
        dataclasses.replace(RECIPE, sft=SFTRecipe(epochs=2)), "jax", "its 'sft.epochs' is 1, this recipe's is 2"),
    "first of two": (
        dataclasses.replace(RECIPE, sft=SFTRecipe(epochs=2), logprob_chunk=9), "jax", "its 'sft.epochs' is 1"),
    "engine": (RECIPE, "torch", "holds a run of the jax engine, not torch; choose another --output"),
}  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("case", OTHER_RUNS)
def test_another_run_is_refused_by_its_first_difference(tmp_path, case, resume):
    recipe, engine, message = OTHER_RUNS[case]
    run = create(tmp_path / "out")
    before = {name: (run.path / name).read_bytes() for name in names(run.path)}
    with pytest.raises(UserError) as caught:
        create(tmp_path / "out", recipe, engine=engine, resume=resume)
    assert message in str(caught.value)
    assert {name: (run.path / name).read_bytes() for name in names(run.path)} == before


MOVES = {
    "meshes": (
        {"layout": LayoutRecipe(train=TrainMeshRecipe(fsdp=4, tensor=2))},
        {"layout.train.fsdp": 4, "layout.train.tensor": 2},
    ),
    "ZeRO": (
        {"layout": LayoutRecipe(zero=ZeroRecipe(stage=3, offload_param="cpu"))},
        {"layout.zero.stage": 3, "layout.zero.offload_param": "cpu"},
    ),
    "the critic's ZeRO": (
        {"layout": LayoutRecipe(zero_critic=ZeroRecipe(stage=1))},
        {"layout.zero_critic.stage": 1, "layout.zero_critic.offload_optimizer": "none",
         "layout.zero_critic.offload_param": "none"},
    ),
    "DeepSpeed's settings": ({"deepspeed": {"steps_per_print": 5}}, {"deepspeed": {"steps_per_print": 5}}),
    "what generates": (
        {"rollout": RolloutRecipe(engine="native", gate=False)}, {"rollout.engine": "native", "rollout.gate": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVES)
def test_a_run_goes_on_with_another_layout_which_is_noted(tmp_path, case):
    changes, noted = MOVES[case]
    create(tmp_path / "out")
    run = create(tmp_path / "out", dataclasses.replace(RECIPE, **changes), resume=True)
    later = json.loads((run.path / "environment.json").read_text())["later_starts"][-1]
    assert {key: value for key, value in later.items() if key.startswith(("layout", "deepspeed", "rollout"))} == noted


def test_what_only_looks_like_a_layout_is_another_run(tmp_path):
    create(tmp_path / "out")
    other = dataclasses.replace(RECIPE, rollout=RolloutRecipe(engine="native", temperature=0.5))
    with pytest.raises(UserError, match=r"its 'rollout.temperature' is 1.0, this recipe's is 0.5"):
        create(tmp_path / "out", other, resume=True)


def test_damaged_records_are_named(tmp_path):
    create(tmp_path / "a")
    (tmp_path / "a" / "environment.json").write_text("{")
    with pytest.raises(UserError, match="environment.json: missing or damaged"):
        create(tmp_path / "a", resume=True)
    create(tmp_path / "b")
    (tmp_path / "b" / "recipe.yaml").write_text("name: [")
    with pytest.raises(UserError, match="holds a run that cannot be continued .*recipe.yaml:1: not valid YAML"):
        create(tmp_path / "b", resume=True)


def test_stages_one_after_the_other_share_a_directory(tmp_path):
    run = create(tmp_path / "out", stages=("sft",))
    run.begin("sft")
    assert run.status("sft") == "running"
    run.finish("sft", {"eval_loss_last": 0.5})
    assert run.is_done("sft")
    other_selection = dataclasses.replace(RECIPE, stages=("reward",))
    again = create(tmp_path / "out", other_selection, stages=("reward",), python="4")
    again.begin("reward")
    again.finish("reward", {"eval_accuracy": 1.0})
    assert again.summary()["stages"] == {"sft": {"eval_loss_last": 0.5}, "reward": {"eval_accuracy": 1.0}}
    assert json.loads((run.path / "state.json").read_text()) == {"sft": "done", "reward": "done"}
    record = json.loads((run.path / "environment.json").read_text())
    assert record["python"] == "3"
    assert record["later_starts"][0]["python"] == "4"


def test_a_begun_or_finished_stage_needs_resume(tmp_path):
    run = create(tmp_path / "out")
    run.begin("sft")
    with pytest.raises(UserError, match="the sft stage was begun here and not finished; go on with --resume"):
        create(tmp_path / "out", stages=("reward", "sft"))
    create(tmp_path / "out", stages=("reward",))  # another stage may start
    assert create(tmp_path / "out", resume=True).status("sft") == "running"
    run.finish("sft", {})
    with pytest.raises(UserError, match="the sft stage is finished here; skip finished stages with --resume"):
        create(tmp_path / "out")
    assert create(tmp_path / "out", resume=True).is_done("sft")


def test_resume_of_nothing_starts_a_run(tmp_path):
    assert create(tmp_path / "out", resume=True).status("sft") is None


def test_a_result_that_is_not_finite_stops_the_run(tmp_path):
    run = create(tmp_path / "out")
    run.begin("sft")
    with pytest.raises(InvariantError, match="sft: a result is not finite"):
        run.finish("sft", {"eval_loss_last": float("nan")})
    assert run.status("sft") == "running"
    assert run.summary()["stages"] == {}


def fill(run, step, *, stage="rl", keep=2):
    with run.checkpoint(stage, step, keep=keep) as folder:
        (folder / "weights").write_text(str(step))


def test_checkpoints_are_found_by_number_and_the_newest_are_kept(tmp_path):
    run = create(tmp_path / "out")
    assert run.latest_checkpoint("rl") is None
    for step in (9, 10, 100):
        fill(run, step)
    assert names(run.path / "checkpoints" / "rl") == ["step-00000010", "step-00000100"]
    assert run.latest_checkpoint("rl") == (100, run.path / "checkpoints" / "rl" / "step-00000100")
    fill(run, 123456789)  # more digits than the name's width
    assert run.latest_checkpoint("rl") == (123456789, run.path / "checkpoints" / "rl" / "step-123456789")
    assert run.latest_checkpoint("sft") is None
    fill(run, 200000000, keep=1)
    assert [step for step, _ in run.checkpoints("rl")] == [200000000]
    with pytest.raises(FileExistsError):
        fill(run, 200000000)
    with pytest.raises(ValueError, match="keep=0"):
        fill(run, 5, keep=0)


def test_a_crash_in_a_checkpoint_leaves_the_older_one(tmp_path):
    run = create(tmp_path / "out")
    fill(run, 1)

    def interrupted():
        with run.checkpoint("rl", 2) as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(run.path / "checkpoints" / "rl") == ["step-00000001"]


def test_a_killed_process_leaves_the_older_checkpoint_and_the_next_one_starts_clean(tmp_path):
    run = create(tmp_path / "out")
    fill(run, 1)
    left_over = run.path / "checkpoints" / "rl" / ".step-00000002.partial"  # as after kill -9
    left_over.mkdir()
    (left_over / "half").write_text("half")
    assert run.latest_checkpoint("rl") == (1, run.path / "checkpoints" / "rl" / "step-00000001")
    fill(run, 2)
    assert names(run.path / "checkpoints" / "rl" / "step-00000002") == ["weights"]
    assert (run.path / "checkpoints" / "rl" / "step-00000002" / "weights").read_text() == "2"


def test_the_older_checkpoint_outlives_the_rename(tmp_path, monkeypatch):
    """The canary of atomicity: pruning before the new one is in place would lose both."""
    run = create(tmp_path / "out")
    fill(run, 1, keep=1)

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(directory.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        fill(run, 2, keep=1)
    monkeypatch.undo()
    assert run.latest_checkpoint("rl") == (1, run.path / "checkpoints" / "rl" / "step-00000001")


def test_samples_of_one_moment_replace_earlier_ones(tmp_path):
    run = create(tmp_path / "out")
    row = {"prompt": "p\u2028", "response": "r\n", "score": None}
    run.add_samples("sft", "before", [row, row])
    run.add_samples("sft", "after", [row])
    run.add_samples("sft", "before", [{**row, "score": 1.0}])  # a resumed stage takes them again
    rows = read_samples(run.samples_path)
    assert [(r["when"], r["score"]) for r in rows] == [("after", None), ("before", 1.0)]
    assert rows[0]["prompt"] == "p\u2028"
    with pytest.raises(ValueError, match="before or after"):
        run.add_samples("sft", "during", [row])


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("inf")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udcff")
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]
