"""A whole run: check everything, then work through the stages, then summarise.

Bad input is found before the first byte is written: the engine is loaded, the tokenizer and the data of every requested
stage are read, the input models' configs are checked, and what they will take of the memory is counted; only then is
the run directory made.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diptych.data.examples import load_demonstrations, load_preferences, load_prompts, tokenizer_texts
from diptych.data.tasks import generate, write_jsonl
from diptych.data.tokenizer import Tokenizer, check_vocabulary
from diptych.engine import Engine, Role, load_engine
from diptych.errors import UserError
from diptych.families.decoder import DecoderConfig
from diptych.families.family import ModelConfig, read_model
from diptych.plan.launch import check_launch, describe_launch, plan_launch
from diptych.plan.workload import Known
from diptych.recipe.checks import check_recipe
from diptych.recipe.load import dump_recipe
from diptych.recipe.new_model import new_model_config
from diptych.recipe.schema import NewModel, Recipe, Source, Stage
from diptych.recipe.settings import engine_settings
from diptych.rewards.function import load_function, load_target
from diptych.rollout_server import is_server
from diptych.run.directory import RunDirectory
from diptych.run.environment import describe_environment
from diptych.run.report import write_report
from diptych.stages.context import Datasets, StageContext
from diptych.stages.reading import TextReading
from diptych.stages.reward import run_reward
from diptych.stages.rl import run_rl
from diptych.stages.rollout import sampling_of
from diptych.stages.sft import run_sft
from diptych.weights.huggingface import check_checkpoint, initial_checkpoint, read_config, write_checkpoint

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
    recipe: Recipe,
    *,
    engine_name: str,
    output: Path,
    stages: Sequence[Stage] | None = None,
    resume: bool = False,
    distributed: bool = False,
) -> dict[str, Any]:
    """Run `stages` (default: the recipe's) on one engine into `output`; returns the contents of summary.json.

    distributed: this is one of several processes that do the same; the first of them writes.

    Raises UserError for whatever the user can mend, before anything is written, and InvariantError when a number goes
    wrong.
    """
    context = prepare(
        recipe, engine_name=engine_name, output=output, stages=stages, resume=resume, distributed=distributed
    )
    return run_stages(context, stages)


def run_stages(context: StageContext, stages: Sequence[Stage] | None = None) -> dict[str, Any]:
    """What `run_recipe` does once everything is prepared."""
    run = context.run
    for stage in tuple(stages or context.recipe.stages):
        if run.is_done(stage):
            continue
        run.begin(stage)
        run.finish(stage, STAGES[stage](context))
        gc.collect()  # its models refer to themselves, and the next stage needs the memory
        run.world.first(lambda: write_report(run.path))
    return run.summary()


def prepare(
    recipe: Recipe,
    *,
    engine_name: str,
    output: Path,
    stages: Sequence[Stage] | None = None,
    resume: bool = False,
    distributed: bool = False,
) -> StageContext:
    """Everything that `run_recipe` does before its first stage: check, read, start the engine, make the directory."""
    stages = tuple(stages or recipe.stages)
    check_recipe(recipe, where=recipe.name)
    engine = load_engine(engine_name, engine_settings(recipe, distributed=distributed))
    with tempfile.TemporaryDirectory(prefix="diptych-") as scratch:
        base, is_new = _base_model(recipe, output, Path(scratch))
        models = input_models(recipe, stages, output, base)
        origins = _origins(models, stages, output)
        loaded = {directory: Tokenizer.load(directory) for directory in dict.fromkeys(origins.values())}
        tokenizers = {role: loaded[directory] for role, directory in origins.items()}
        configs = _check_models(recipe, models, origins, tokenizers)
        _check_layout(engine, configs, stages)
        reader = _reader(recipe, configs, tokenizers)
        datasets = _read_data(recipe, stages, configs, tokenizers, reader)
        if "rl" in stages:
            sampling_of(recipe, tokenizers["policy"])
            for target in (recipe.rl.reward.function, recipe.rl.evaluation_function):
                if target is not None:
                    load_function(target)
            if is_server(recipe.rollout.engine):
                load_target(f"rollout server {recipe.rollout.engine}", recipe.rollout.engine)
        _check_memory(engine, recipe, stages, Known(models=configs, longest=datasets.longest()))
        engine.world.agree(
            "the recipe, its stages, models and data",
            lambda: f"{dump_recipe(recipe)}{stages} {resume} {output} {configs} {datasets.describe()}",
        )
        run = RunDirectory.create(
            output,
            recipe,
            engine=engine_name,
            environment=describe_environment(engine.environment()),
            resume=resume,
            stages=stages,
            world=engine.world,
        )
        if is_new and base is not None:
            run.world.first(lambda: _leave_base(base, run.model_path("base")), leaves=run.model_path("base"))
    run.world.first(lambda: _leave_generated_data(recipe, stages, run))
    if is_new:  # the scratch folder is gone; its contents live in the run
        models, origins = (
            {role: run.model_path("base") if path == base else path for role, path in paths.items()}
            for paths in (models, origins)
        )
    return StageContext(
        recipe=recipe,
        engine=engine,
        run=run,
        tokenizers=tokenizers,
        tokenizer_directories=origins,
        datasets=datasets,
        model_directories=models,
        reader=reader,
        resume=resume,
    )


def _base_model(recipe: Recipe, output: Path, scratch: Path) -> tuple[Path | None, bool]:
    """The directory of the model that everything starts from, and whether it is a new one (made in `scratch`). None
    where every stage names its own."""
    if recipe.model.path is not None:
        directory = Path(recipe.model.path)
        read_config(directory)
        return directory, False
    if recipe.model.new is None:
        return None, False
    existing = output / "models" / "base"
    if existing.is_dir():  # RunDirectory.create checks that it belongs to this recipe
        return existing, False
    base = scratch / "base"
    tokenizer_directory = scratch / "tokenizer"
    tokenizer_directory.mkdir()
    texts = tokenizer_texts(recipe.data, seed=recipe.seed)
    tokenizer = Tokenizer.train(texts, vocab_size=recipe.model.new.vocab_size, directory=tokenizer_directory)
    checkpoint = initial_checkpoint(new_config(recipe.model.new, tokenizer), seed=recipe.seed)
    write_checkpoint(base, checkpoint, tokenizer_directory=tokenizer_directory)
    return base, True


def _leave_base(base: Path, target: Path) -> None:
    if not target.exists():
        partial = target.with_name("base.partial")
        shutil.copytree(base, partial, dirs_exist_ok=True)
        partial.rename(target)


def new_config(new: NewModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of a new model."""
    return new_model_config(new) | {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def input_models(recipe: Recipe, stages: Sequence[Stage], output: Path, base: Path | None) -> dict[str, Path]:
    """The input directory of each role. What an earlier stage of this call will leave need not exist yet."""
    sft, reward = output / "models" / "sft", output / "models" / "reward"
    tuned = sft if "sft" in stages or sft.is_dir() else base

    def given(path: str | None, default: Path | None) -> Path:
        chosen = default if path is None else Path(path)
        assert chosen is not None, "the recipe was checked for a model"
        return chosen

    models: dict[str, Path] = {}
    if "sft" in stages:
        models["sft"] = given(None, base)
    if "reward" in stages:
        models["reward"] = given(recipe.reward.model_path, tuned)
    if "rl" in stages:
        models["policy"] = given(recipe.rl.policy_path, tuned)
        if recipe.rl.reward.function is None:
            models["reward_model"] = Path(recipe.rl.reward.model_path) if recipe.rl.reward.model_path else reward
            if models["reward_model"] == reward and "reward" not in stages and not reward.is_dir():
                raise UserError(
                    f"{reward}: no reward model yet: run --stage reward first, or set rl.reward.model_path or "
                    f"rl.reward.function"
                )
    return models


def _origins(models: Mapping[str, Path], stages: Sequence[Stage], output: Path) -> dict[str, Path]:
    """The directory that each role's tokenizer and config.json come from: its own, or, where an earlier stage of this
    call makes that, the one that the stage starts from."""
    origins: dict[str, Path] = {}
    for role, directory in models.items():
        maker = next((stage for stage in ("sft", "reward") if directory == output / "models" / stage), None)
        origins[role] = origins[maker] if maker is not None and maker in stages else directory
    return origins


def _check_models(
    recipe: Recipe, models: Mapping[str, Path], origins: Mapping[str, Path], tokenizers: Mapping[str, Tokenizer]
) -> dict[str, ModelConfig]:
    """Every input model that exists already fits its family and its tokenizer. Returns what each role computes."""
    configs: dict[str, ModelConfig] = {}
    for role, directory in origins.items():
        configs[role] = read_model(read_config(directory), where=str(directory / "config.json"))
        check_vocabulary(tokenizers[role], configs[role].vocab_size, where=str(directory))
        if directory == models[role]:
            check_checkpoint(directory)
    if "sft" in configs and "policy" in configs and not tokenizers["policy"].reads_like(tokenizers["sft"]):
        raise UserError(
            f"{models['policy']}: the policy has another tokenizer than {models['sft']}, which sft trains: the data of "
            "one run is written in one of them; run the stages apart"
        )
    with_experts = [role for role, model in configs.items() if isinstance(model, DecoderConfig) and model.experts]
    if recipe.model.balance_coef is not None and not with_experts:
        raise UserError(
            f"model.balance_coef: no model of this run is a mixture of experts ({', '.join(map(str, origins.values()))}"
            "): take it away"
        )
    return configs


def _check_layout(engine: Engine, configs: Mapping[str, ModelConfig], stages: Sequence[Stage]) -> None:
    """Every model divides over the meshes on which the stages will put it."""
    placed: Mapping[str, tuple[Role, ...]] = {"policy": ("policy", "reference"), "reward_model": ("reward", "critic")}
    for name, config in configs.items():
        for role in placed.get(name, ("policy",)):
            engine.check_model(config, role)
    if "rl" in stages and "reward_model" not in configs:  # the critic starts from the policy
        engine.check_model(configs["policy"], "critic")


def _check_memory(engine: Engine, recipe: Recipe, stages: Sequence[Stage], known: Known) -> None:
    """Print what each process will hold, and stop where that cannot fit. Engines that say nothing are left alone."""
    memory = engine.memory()
    if memory is None:
        return
    launch = plan_launch(recipe, stages, num_processes=engine.world.count, memory=memory, known=known)
    if engine.world.is_main:
        print(describe_launch(launch), file=sys.stderr)
    check_launch(launch)


def _reader(
    recipe: Recipe, configs: Mapping[str, ModelConfig], tokenizers: Mapping[str, Tokenizer]
) -> TextReading | None:
    """How the reward model reads rollouts where it has another tokenizer than the policy; None where it takes the
    policy's tokens."""
    foreign = "reward_model" in tokenizers and not tokenizers["reward_model"].reads_like(tokenizers["policy"])
    if not foreign:
        if recipe.rl.reward.too_long != "error" and "reward_model" in tokenizers:
            raise UserError(
                "rl.reward.too_long has no effect where the reward model has the policy's tokenizer: take it away"
            )
        return None
    positions = configs["reward_model"].max_position_embeddings
    return TextReading(recipe, tokenizers["policy"], tokenizers["reward_model"], max_positions=positions)


def _leave_generated_data(recipe: Recipe, stages: Sequence[Stage], run: RunDirectory) -> None:
    """Write the rows of `task:` sources to data/, for people to look at."""
    for stage in stages:
        kind = SOURCES[stage]
        source: Source = getattr(recipe.data, kind)
        path = run.data_path(f"{kind}.jsonl")
        if source.path is not None and source.path.startswith("task:") and source.limit and not path.exists():
            name = source.path.removeprefix("task:")
            write_jsonl(generate(name, kind, count=source.limit, seed=recipe.seed), path)


def _read_data(
    recipe: Recipe,
    stages: Sequence[Stage],
    configs: Mapping[str, ModelConfig],
    tokenizers: Mapping[str, Tokenizer],
    reader: TextReading | None,
) -> Datasets:
    """The data of every stage in the tokens of the model that it trains."""
    splits: dict[str, Any] = {}
    main = next(role for role in ("policy", "sft", "reward") if role in tokenizers)
    for stage in stages:
        role = "policy" if stage == "rl" else stage
        options: dict[str, Any] = {"seed": recipe.seed, "max_positions": configs[role].max_position_embeddings}
        if stage == "sft":
            split = load_demonstrations(recipe.data, tokenizers[role], **options)
        elif stage == "reward":
            foreign = not tokenizers[role].reads_like(tokenizers[main])
            split = load_preferences(recipe.data, tokenizers[role], foreign=foreign, **options)
        else:
            split = load_prompts(recipe.data, tokenizers[role], **options)
            split = split if reader is None else reader.fit(split, recipe.data.too_long)
            _check_positions(recipe, split.report["longest_prompt"], configs, reader)
        if not split.train:
            raise UserError(f"data.{SOURCES[stage]}: nothing left to train on ({split.report})")
        if not split.held_out:
            raise UserError(f"data.{SOURCES[stage]}: no held-out rows: raise eval_fraction or give eval_path")
        splits[SOURCES[stage]] = split
    return Datasets(**splits)


def _check_positions(
    recipe: Recipe, longest_prompt: int, configs: Mapping[str, ModelConfig], reader: TextReading | None
) -> None:
    """The longest prompt and a response of full length fit every model that reads the policy's tokens."""
    longest = longest_prompt + recipe.rollout.max_new_tokens
    for role in ("policy", "reward_model"):
        if role not in configs or (role == "reward_model" and reader is not None):
            continue
        positions = configs[role].max_position_embeddings
        if longest > positions:
            raise UserError(
                f"rollout.max_new_tokens: the longest prompt of {longest_prompt} tokens and "
                f"{recipe.rollout.max_new_tokens} new ones do not fit the {positions} positions of the "
                f"{role.replace('_', ' ')}: lower it, or data.max_prompt_tokens"
            )
