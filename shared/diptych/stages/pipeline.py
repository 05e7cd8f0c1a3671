"""A whole run: check everything, then work through the stages, then summarise.

Bad input is found before the first byte is written: the engine is loaded, the tokenizer and the data of every requested
stage are read, and the input models' configs are checked; only then is the run directory made.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from diptych.data.examples import load_demonstrations, load_preferences, load_prompts, tokenizer_texts
from diptych.data.tasks import generate, write_jsonl
from diptych.data.tokenizer import Tokenizer, check_vocabulary
from diptych.engine import EngineSettings, load_engine
from diptych.errors import UserError
from diptych.recipe.checks import check_recipe
from diptych.recipe.schema import NewModel, Recipe, Source, Stage
from diptych.rewards.function import load_function
from diptych.run.directory import RunDirectory
from diptych.run.environment import describe_environment
from diptych.run.report import write_report
from diptych.stages.context import Datasets, StageContext
from diptych.stages.reward import run_reward
from diptych.stages.rl import run_rl
from diptych.stages.rollout import sampling_of
from diptych.stages.sft import run_sft
from diptych.weights.huggingface import check_checkpoint, initial_checkpoint, read_config, write_checkpoint
from diptych.weights.llama import parse_config

STAGES: Mapping[Stage, Callable[[StageContext], dict[str, Any]]] = {
    "sft": run_sft,
    "reward": run_reward,
    "rl": run_rl,
}
SOURCES: Mapping[Stage, Literal["demonstrations", "preferences", "prompts"]] = {
    "sft": "demonstrations",
    "reward": "preferences",
    "rl": "prompts",
}  # in recipe.data


def run_recipe(
    recipe: Recipe, *, engine_name: str, output: Path, stages: Sequence[Stage] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Run `stages` (default: the recipe's) on one engine into `output`; returns the contents of summary.json.

    Raises UserError for whatever the user can mend, before anything is written, and InvariantError when a number goes
    wrong.
    """
    context = prepare(recipe, engine_name=engine_name, output=output, stages=stages, resume=resume)
    for stage in tuple(stages or recipe.stages):
        if context.run.is_done(stage):
            continue
        context.run.begin(stage)
        context.run.finish(stage, STAGES[stage](context))
        write_report(context.run.path)
    return context.run.summary()


def prepare(
    recipe: Recipe, *, engine_name: str, output: Path, stages: Sequence[Stage] | None = None, resume: bool = False
) -> StageContext:
    """Everything that `run_recipe` does before its first stage: check, read, start the engine, make the directory."""
    stages = tuple(stages or recipe.stages)
    check_recipe(recipe, where=recipe.name)
    engine = load_engine(engine_name, EngineSettings(precision=recipe.precision, zero_stage=recipe.layout.zero.stage))
    with tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        base, is_new = _base_model(recipe, output, Path(scratch))
        models = input_models(recipe, stages, output, base)
        tokenizer_directory = models.get("policy", base) if "sft" not in stages else base
        tokenizer = Tokenizer.load(tokenizer_directory)
        _check_models(models, tokenizer, tokenizer_directory)
        datasets = _read_data(recipe, stages, tokenizer, tokenizer_directory)
        if "rl" in stages:
            sampling_of(recipe, tokenizer)
            for target in (recipe.rl.reward.function, recipe.rl.evaluation_function):
                if target is not None:
                    load_function(target)
        run = RunDirectory.create(
            output,
            recipe,
            engine=engine_name,
            environment=describe_environment(engine.environment()),
            resume=resume,
            stages=stages,
        )
        if is_new and not run.model_path("base").exists():
            partial = run.model_path("base.partial")
            shutil.copytree(base, partial, dirs_exist_ok=True)
            partial.rename(run.model_path("base"))
    _leave_generated_data(recipe, stages, run)
    if is_new:  # the scratch folder is gone; its contents live in the run
        models = {role: run.model_path("base") if path == base else path for role, path in models.items()}
        tokenizer_directory = run.model_path("base") if tokenizer_directory == base else tokenizer_directory
    return StageContext(
        recipe=recipe,
        engine=engine,
        run=run,
        tokenizer=tokenizer,
        tokenizer_directory=tokenizer_directory,
        datasets=datasets,
        model_directories=models,
        resume=resume,
    )


def _base_model(recipe: Recipe, output: Path, scratch: Path) -> tuple[Path, bool]:
    """The directory of the model that everything starts from, and whether it is a new one (made in `scratch`)."""
    if recipe.model.path is not None:
        directory = Path(recipe.model.path)
        read_config(directory)
        return directory, False
    existing = output / "models" / "base"
    if existing.is_dir():  # RunDirectory.create checks that it belongs to this recipe
        return existing, False
    assert recipe.model.new is not None, "checked with the recipe"
    base = scratch / "base"
    tokenizer_directory = scratch / "tokenizer"
    tokenizer_directory.mkdir()
    texts = tokenizer_texts(recipe.data, seed=recipe.seed)
    tokenizer = Tokenizer.train(texts, vocab_size=recipe.model.new.vocab_size, directory=tokenizer_directory)
    checkpoint = initial_checkpoint(new_config(recipe.model.new, tokenizer), seed=recipe.seed)
    write_checkpoint(base, checkpoint, tokenizer_directory=tokenizer_directory)
    return base, True


def new_config(new: NewModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of a new Llama-family model."""
    shape = asdict(new)
    theta = shape.pop("rope_theta")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "head_dim": new.hidden_size // new.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def input_models(recipe: Recipe, stages: Sequence[Stage], output: Path, base: Path) -> dict[str, Path]:
    """The input directory of each role. What an earlier stage of this call will leave need not exist yet."""
    sft, reward = output / "models" / "sft", output / "models" / "reward"
    tuned = sft if "sft" in stages or sft.is_dir() else base
    models: dict[str, Path] = {}
    if "sft" in stages:
        models["sft"] = base
    if "reward" in stages:
        models["reward"] = Path(recipe.reward.model_path) if recipe.reward.model_path else tuned
    if "rl" in stages:
        models["policy"] = Path(recipe.rl.policy_path) if recipe.rl.policy_path else tuned
        if recipe.rl.reward.function is None:
            models["reward_model"] = Path(recipe.rl.reward.model_path) if recipe.rl.reward.model_path else reward
            if models["reward_model"] == reward and "reward" not in stages and not reward.is_dir():
                raise UserError(
                    f"{reward}: no reward model yet: run --stage reward first, or set rl.reward.model_path or "
                    f"rl.reward.function"
                )
    return models


def _check_models(models: Mapping[str, Path], tokenizer: Tokenizer, tokenizer_directory: Path) -> None:
    """Every input model that exists already fits the family and the run's tokenizer."""
    ours = (tokenizer_directory / "tokenizer.json").read_bytes()
    for role, directory in models.items():
        if not directory.is_dir() and directory.parent.name == "models":
            continue  # an earlier stage of this run makes it
        config = parse_config(read_config(directory), where=str(directory / "config.json"))
        check_vocabulary(tokenizer, config.vocab_size, where=str(directory))
        check_checkpoint(directory)
        theirs = directory / "tokenizer.json"
        if theirs.is_file() and theirs.read_bytes() != ours:
            raise UserError(
                f"{theirs}: the {role} model has another tokenizer than {tokenizer_directory}; "
                f"all models of a run share one tokenizer"
            )


def _leave_generated_data(recipe: Recipe, stages: Sequence[Stage], run: RunDirectory) -> None:
    """Write the rows of `task:` sources to data/, for people to look at."""
    for stage in stages:
        kind = SOURCES[stage]
        source: Source = getattr(recipe.data, kind)
        path = run.data_path(f"{kind}.jsonl")
        if source.path is not None and source.path.startswith("task:") and source.limit and not path.exists():
            name = source.path.removeprefix("task:")
            write_jsonl(generate(name, kind, count=source.limit, seed=recipe.seed), path)


def _read_data(recipe: Recipe, stages: Sequence[Stage], tokenizer: Tokenizer, model_directory: Path) -> Datasets:
    max_positions = parse_config(read_config(model_directory)).max_position_embeddings
    readers = {"sft": load_demonstrations, "reward": load_preferences, "rl": load_prompts}
    splits: dict[str, Any] = {}
    for stage in stages:
        split = readers[stage](recipe.data, tokenizer, seed=recipe.seed, max_positions=max_positions)
        if not split.train:
            raise UserError(f"data.{SOURCES[stage]}: nothing left to train on ({split.report})")
        if not split.held_out:
            raise UserError(f"data.{SOURCES[stage]}: no held-out rows: raise eval_fraction or give eval_path")
        splits[SOURCES[stage]] = split
    return Datasets(**splits)
