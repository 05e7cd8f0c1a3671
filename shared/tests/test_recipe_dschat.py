"""DeepSpeed-Chat's command lines become recipes: every flag is known, every word is accounted for, the result loads."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.cli import main
from diptych.errors import UserError
from diptych.recipe.dschat import flags
from diptych.recipe.dschat.account import account, write
from diptych.recipe.dschat.command import read_command
from diptych.recipe.dschat.convert import convert
from diptych.recipe.load import flatten, load_recipe, recipe_from_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deepspeed_chat.md"

# The flags of the three programs (DeepSpeedExamples 45b4b71), read by running their argparse parsers.
BOTH = """
    data_path data_split data_output_path model_name_or_path per_device_train_batch_size per_device_eval_batch_size
    max_seq_len learning_rate weight_decay num_train_epochs gradient_accumulation_steps lr_scheduler_type
    num_warmup_steps output_dir seed local_rank gradient_checkpointing dropout offload dtype zero_stage lora_dim
    lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard tensorboard_path
    add_eot_token deepspeed deepspeed_config deepscale deepscale_config"""
PARSERS = {
    1: BOTH + " sft_only_data_path eot_token print_loss",
    2: BOTH + " num_padding_at_beginning eval_interval eval_iters",
    3: """data_path data_split data_output_path unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef
    actor_model_name_or_path critic_model_name_or_path num_padding_at_beginning per_device_generation_batch_size
    per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len max_answer_seq_len
    actor_learning_rate critic_learning_rate actor_weight_decay critic_weight_decay num_train_epochs
    lr_scheduler_type gradient_accumulation_steps num_warmup_steps output_dir seed preprocessing_num_workers
    local_rank enable_hybrid_engine unpin_actor_parameters release_inference_cache inference_tp_size
    tp_gather_partition_size offload dtype offload_reference_model offload_reward_model actor_zero_stage
    critic_zero_stage actor_gradient_checkpointing critic_gradient_checkpointing actor_dropout critic_dropout
    actor_lora_dim actor_lora_module_name critic_lora_dim critic_lora_module_name only_optimize_lora
    actor_lora_learning_rate critic_lora_learning_rate enable_ema enable_mixed_precision_lora compute_fp32_loss
    enable_tensorboard tensorboard_path add_eot_token align_overflow print_answers print_answers_interval
    enable_test_mode test_stop_step deepspeed deepspeed_config deepscale deepscale_config""",
}

# Command lines of its README's scripts, with the shell's variables replaced by the scripts' own defaults.
SETS = (
    "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
    "yitingxie/rlhf-reward-datasets --data_split 2,4,4"
)
PLAIN = "--lr_scheduler_type cosine --seed 1234 --deepspeed --output_dir ./output"
PPO = (
    "--data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 --generation_batches 1 "
    "--ppo_epochs 1 "
    "--max_answer_seq_len 256 --max_prompt_seq_len 256 --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 "
    "--num_train_epochs 1 --gradient_accumulation_steps 1 --actor_dropout 0.0 --num_warmup_steps 100 "
    f"--enable_hybrid_engine {PLAIN}"
)
SINGLE_GPU = {
    1: "deepspeed --num_gpus 1 main.py --model_name_or_path facebook/opt-1.3b --gradient_accumulation_steps 8 "
    "--lora_dim 128 --zero_stage 0 --enable_tensorboard --tensorboard_path out --deepspeed --output_dir out "
    "&> out/training.log",
    2: "deepspeed --num_gpus 1 main.py --model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 "
    "--weight_decay 0.1 --dropout 0.0 --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard "
    "--tensorboard_path out --deepspeed --output_dir out &> out/training.log",
    3: "deepspeed --num_gpus 1 main.py --actor_model_name_or_path out/actor --critic_model_name_or_path out/reward "
    "--actor_zero_stage 0 --critic_zero_stage 0 --num_padding_at_beginning 1 --gradient_accumulation_steps 2 "
    "--deepspeed --actor_lora_dim 128 --enable_hybrid_engine --actor_gradient_checkpointing --actor_dropout 0.0 "
    "--output_dir out",
}
SINGLE_NODE = {
    1: f"deepspeed main.py {SETS} --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 "
    "--per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 16 "
    f"--gradient_accumulation_steps 1 --num_warmup_steps 0 --zero_stage 2 {PLAIN}",
    2: f"deepspeed main.py {SETS} --model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_seq_len 512 --learning_rate 5e-5 "
    "--weight_decay 0.1 --num_train_epochs 1 --dropout 0.0 --gradient_accumulation_steps 1 --num_warmup_steps 0 "
    f"--zero_stage 0 {PLAIN}",
    3: "deepspeed --master_port 12346 main.py --actor_model_name_or_path AdamG012/chat-opt-1.3b-sft-deepspeed "
    "--critic_model_name_or_path AdamG012/chat-opt-350m-reward-deepspeed --per_device_generation_batch_size 4 "
    f"--per_device_training_batch_size 4 --actor_zero_stage 2 --critic_zero_stage 2 --enable_ema {PPO}",
}
LLAMA = {
    1: f"deepspeed main.py {SETS} --model_name_or_path meta-llama/Llama-2-7b-hf --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 4 --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 4 "
    f"--gradient_accumulation_steps 1 --num_warmup_steps 0 --gradient_checkpointing --zero_stage 3 {PLAIN}",
    2: "deepspeed main.py --data_path Dahoas/rm-static --data_split 2,4,4 "
    "--model_name_or_path meta-llama/Llama-2-7b-hf "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 "
    "--weight_decay 0.1 --num_padding_at_beginning 0 --num_train_epochs 1 --gradient_accumulation_steps 1 "
    f"--num_warmup_steps 0 --gradient_checkpointing --zero_stage 3 --offload {PLAIN}",
    3: "deepspeed --master_port 12346 main.py --actor_model_name_or_path output_step1_llama2_7b "
    "--critic_model_name_or_path output_step2_llama_7b --per_device_generation_batch_size 1 "
    "--per_device_training_batch_size 1 --actor_weight_decay 0.1 --critic_weight_decay 0.1 "
    f"--actor_gradient_checkpointing --critic_gradient_checkpointing --offload_reference_model "
    f"--actor_zero_stage 3 --critic_zero_stage 3 {PPO}",
}
RECIPES = {"opt-1.3b-1gpu": (SINGLE_GPU, None), "opt-1.3b-8gpu": (SINGLE_NODE, 8), "llama-2-7b-8gpu": (LLAMA, 8)}
SFT = "deepspeed --num_gpus 2 main.py --model_name_or_path m --print_loss"
RL = "deepspeed --num_gpus 2 main.py --actor_model_name_or_path a --critic_model_name_or_path c"


def made_of(line: str, *, step: int | None = None, gpus: int | None = None, prompts: int | None = None):
    return convert(read_command([line], step=step), gpus=gpus, prompts=prompts)


def recipe_of(line: str, **more):
    return recipe_from_text(write(made_of(line, **more))[0], name="test")


def strange_flags(table) -> set[str]:
    """Flags that are in the programs and not in the table, or the other way round, as STEP--NAME."""
    theirs = {f"{step}--{name}" for step, names in PARSERS.items() for name in names.split()}
    return theirs ^ {f"{step}{flag.name}" for flag in table for step in flag.defaults}


def test_every_flag_of_the_three_programs_is_in_the_table():
    assert strange_flags(flags.FLAGS) == set()
    assert len(flags.BY_NAME) == len(flags.FLAGS)


@pytest.mark.parametrize("name", ["--align_overflow", "--max_seq_len"])
def test_canary_a_missing_flag_is_seen(name):
    assert strange_flags([flag for flag in flags.FLAGS if flag.name != name]) != set()


@pytest.mark.parametrize("flag", flags.FLAGS, ids=lambda flag: flag.name)
def test_every_flag_says_what_became_of_it(flag):
    """A flag without a setting has a reason; one with a setting names keys that exist."""
    known = flatten(recipe_of(SFT)) | flatten(
        recipe_of(RL + " --actor_lora_dim 1 --critic_lora_dim 1 --actor_zero_stage 3")
    )
    if flag.fate in ("by hand", "obsolete"):
        assert len(flag.note) > 10
    for step in flag.defaults:
        for key in flag.keys_of(step):
            key = (
                re.sub(r" \(.*\)", "", key)
                .replace("sft.adapter.", "rl.adapter.")
                .replace("reward.adapter", "rl.adapter")
            )
            key = key.replace("zero_critic.stage", "zero_critic")
            assert key in known or "*" in key or key.endswith(("mini_batches", "epochs")), key


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_that_come_along_do_what_the_scripts_do(name):
    recipe = load_recipe(ROOT / "recipes" / "dschat" / f"{name}.yaml")
    assert differences(name, flatten(recipe)) == {}


def differences(name: str, ours: dict) -> dict:
    """Settings in which a recipe is not the scripts' three command lines joined: key -> (recipe, scripts)."""
    lines, gpus = RECIPES[name]
    text = None
    for step, line in lines.items():
        text, _ = write(made_of(line, step=step, gpus=gpus), into=text)
    theirs = flatten(recipe_from_text(text or "", name="joined"))
    decided = {"name", "layout.zero.offload_optimizer", "layout.zero.offload_param"}  # step 2 of Llama alone offloads
    keys = (ours.keys() | theirs.keys()) - decided
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def test_canary_a_recipe_that_differs_is_seen():
    recipe = load_recipe(ROOT / "recipes" / "dschat" / "opt-1.3b-8gpu.yaml", ["rl.kl_coef=0.05", "sft.batch_size=128"])
    assert differences("opt-1.3b-8gpu", flatten(recipe)) == {"rl.kl_coef": (0.05, 0.1), "sft.batch_size": (128, 64)}


# (command line, settings that it becomes)
CASES = {
    "sft, defaults": (SFT, {
        "stages": ["sft"], "sft.learning_rate": 1e-3, "sft.batch_size": 32, "sft.micro_batch_size": 32, "seed": 1234,
        "sft.optimizer.eps": 1e-8, "sft.optimizer.schedule": "cosine", "precision": "bfloat16", "layout.remat": "none",
        "data.max_prompt_tokens": 256, "data.max_response_tokens": 256, "data.too_long": "truncate",
        "sft.adapter": None, "model.path": "m", "data.chat": "never", "data.prompt_template": "{prompt}",
    }),
    "sft, one file": (SFT + " --data_path local/jsonfile", {
        "data.prompt_template": " {prompt}", "data.response_template": " {response}",
    }),
    "sft, odd length": (SFT + " --max_seq_len 9", {"data.max_prompt_tokens": 4, "data.max_response_tokens": 5}),
    "sft, adapter": (SFT + " --lora_dim 8 --only_optimize_lora --lora_learning_rate 2e-4 --lora_module_name q_proj", {
        "sft.adapter.rank": 8, "sft.adapter.alpha": 1.0, "sft.adapter.targets": ["q_proj"], "sft.learning_rate": 2e-4,
    }),
    "sft, schedule": (SFT + " --lr_scheduler_type=polynomial --num_warmup_steps=7", {
        "sft.optimizer.schedule": "linear", "sft.optimizer.warmup_steps": 7,
    }),
    "sft, no warm-up": (SFT + " --lr_scheduler_type constant --num_warmup_steps 7", {
        "sft.optimizer.schedule": "constant", "sft.optimizer.warmup_steps": 0,
    }),
    "sft, offload": (SFT + " --offload --zero_stage 2", {
        "layout.zero.stage": 2, "layout.zero.offload_optimizer": "cpu", "layout.zero.offload_param": "none",
    }),
    "sft, offload at stage 0": (SFT + " --offload", {
        "layout.zero.offload_optimizer": "none", "layout.zero.stage": 1,
    }),
    "rl, stages 0 and 1": (RL + " --critic_zero_stage 1", {"layout.zero.stage": 1, "layout.zero_critic": None}),
    "reward": (
        "deepspeed --num_gpus 4 main.py --model_name_or_path m --num_padding_at_beginning 0 --eval_interval 50 "
        "--eval_iters 10 --per_device_eval_batch_size 3 --gradient_accumulation_steps 2", {
            "stages": ["reward"], "reward.model_path": "m", "reward.dialect": "dschat", "reward.center_coef": 0.0,
            "reward.eval_every": 50, "data.preferences.eval_limit": 120, "reward.batch_size": 128,
            "reward.micro_batch_size": 64, "reward.learning_rate": 5e-5,
        }),
    "rl, defaults": (RL, {
        "stages": ["rl"], "rl.learning_rate": 9.65e-6, "rl.critic_learning_rate": 5e-6,
        "rl.optimizer.warmup_steps": 100, "rl.kl_coef": 0.1, "rl.score_clip": 5.0, "rl.clip_range": 0.2,
        "rl.value_clip_range": 0.2, "rl.gamma": 1.0,
        "rl.lam": 0.95, "rl.value_coef": 1.0, "rl.dialect": "dschat", "seed": 0, "rl.ema_decay": None,
        "rl.batch_size": 32, "rl.micro_batch_size": 32, "rl.mini_batches": 1, "data.too_long": "drop",
        "layout.zero_critic": None,
    }),
    "rl, batches": (
        RL + " --per_device_generation_batch_size 8 --per_device_training_batch_size 2 --generation_batches 3 "
        "--ppo_epochs 2 --gradient_accumulation_steps 4", {
            "rl.batch_size": 48, "rl.micro_batch_size": 4, "rl.mini_batches": 3, "rl.epochs": 2,
        }),
    "rl, several rollouts for a step": (
        RL + " --per_device_generation_batch_size 4 --per_device_training_batch_size 4 --gradient_accumulation_steps 6 "
        "--generation_batches 4 --enable_ema", {
            "rl.batch_size": 96, "rl.micro_batch_size": 8, "rl.mini_batches": 2, "rl.ema_decay": round(0.992**6, 6),
        }),
    "rl, larger training than generation batches": (
        RL + " --per_device_generation_batch_size 2 --per_device_training_batch_size 16", {
            "rl.batch_size": 4, "rl.micro_batch_size": 4, "rl.mini_batches": 1,
        }),
    "rl, stages": (RL + " --actor_zero_stage 3 --critic_zero_stage 2 --offload --offload_reward_model", {
        "layout.zero.stage": 3, "layout.zero.offload_param": "cpu", "layout.zero_critic.stage": 2,
        "layout.zero_critic.offload_optimizer": "cpu", "layout.zero_critic.offload_param": "none",
        "layout.zero_reference.stage": 3, "layout.zero_reference.offload_param": "none", "layout.zero_reward.stage": 0,
        "layout.offload": ["reward"],
    }),
    "rl, critic alone at 3": (RL + " --critic_zero_stage 3", {
        "layout.zero.stage": 1, "layout.zero_critic.stage": 3, "layout.zero_reward.stage": 3,
    }),
    "rl, adapters": (
        RL + " --actor_zero_stage 3 --critic_zero_stage 3 --offload --offload_reference_model --actor_lora_dim 4 "
        "--critic_lora_dim 2 --critic_lora_learning_rate 1e-4 --actor_lora_module_name layers.", {
            "rl.adapter.rank": 4, "rl.critic_adapter.rank": 2, "rl.critic_learning_rate": 1e-4,
            "rl.learning_rate": 5e-4,
            "layout.offload": [], "layout.zero_reference": None, "layout.zero_reward.stage": 3,
            "layout.zero_reward.offload_param": "none", "rl.adapter.targets": ["all-linear"],
        }),
    "rl, a test": (RL + " --enable_test_mode --test_stop_step 5", {"rl.iterations": 5, "rl.optimizer.warmup_steps": 5}),
    "rl, Llama": (RL.replace(" a ", " meta-llama/x "), {"rl.dialect": "dschat-pad"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_settings(name):
    line, expected = CASES[name]
    flat = flatten(recipe_of(line))
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize(("prompts", "epochs", "expected"), [(3200, 1, 100), (3231, 2, 201)])
def test_iterations_follow_from_the_prompts(prompts, epochs, expected):
    assert recipe_of(f"{RL} --num_train_epochs {epochs}", prompts=prompts).rl.iterations == expected


# (words before main.py, GPUs)
@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("deepspeed --num_gpus 8", 8),
        ("deepspeed --num_gpus=8 --num_nodes 2 --master_port 29500", 16),
        ("deepspeed --no_ssh --num_gpus 4", 4),
        ("deepspeed --include localhost:0,1,5", 3),
        ("deepspeed -i worker-0:0,1@worker-1:0", 3),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed", 2),
        ("torchrun --nproc_per_node 4 --nnodes 2", 8),
        ("python -m torch.distributed.run --nproc-per-node=4", 4),
        ("nohup python -u", 1),
        ("torchrun --standalone", 1),
        ("deepspeed", None),
        ("deepspeed --num_nodes 2", None),
        ("deepspeed --hostfile hosts", None),
        ("deepspeed --include worker-0", None),
        ("deepspeed --num_gpus 4 --exclude localhost:0", None),
        ("torchrun --nproc_per_node gpu", None),
        ("", None),
    ],
)
def test_the_number_of_gpus_is_read_from_the_launcher(launcher, gpus):
    assert read_command([f"{launcher} main.py --model_name_or_path m --print_loss"]).gpus == gpus


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (SFT, 1),
        (SFT.replace(" --print_loss", " --num_padding_at_beginning 1"), 2),
        (RL, 3),
        ("deepspeed training/step2_reward_model_finetuning/main.py --model_name_or_path m", 2),
        ("--model_name_or_path m --eot_token '<|eot|>'", 1),
    ],
)
def test_the_step_is_told_by_path_or_flags(line, step):
    assert read_command([line]).step == step


def test_words_lines_and_redirections_are_understood():
    line = SFT.replace(" --", " \\\n   --") + " > out.log 2>&1 | tee -a log"
    for words in ([line], shlex.split(line.replace("\\\n", ""))):
        command = read_command(words)
        assert command.given == {"--model_name_or_path": "m", "--print_loss": True}
        assert command.left_out == ["> out.log", "2>&1", "| tee -a log"]
    command = read_command(["nohup deepspeed --master_port 1 main.py --model_name_or_path m --print_loss &> x/log &"])
    assert command.left_out == ["--master_port 1", "&> x/log", "&"]


ERRORS = {
    "unknown": (
        SFT + " --max_seq_length 5",
        "--max_seq_length is not a flag of DeepSpeed-Chat; did you mean --max_seq_len?",
    ),
    "cut short": (SFT + " --num_warmup 5", "did you mean --num_warmup_steps?"),
    "far off": (SFT + " --xyzzy", "take it away"),
    "of another step": (SFT + " --enable_ema", "no step of DeepSpeed-Chat has all of these flags"),
    "of another step than the path": (
        "deepspeed --num_gpus 1 step2_reward/main.py --model_name_or_path m --print_loss",
        "--print_loss is a flag of step 1 of DeepSpeed-Chat, and this is step 2",
    ),
    "two steps": ("deepspeed --num_gpus 1 main.py --model_name_or_path m", "say which it is with --step"),
    "no model": ("deepspeed --num_gpus 1 main.py --print_loss", "--model_name_or_path is missing"),
    "half the models": (RL.replace("--critic_model_name_or_path c", ""), "--critic_model_name_or_path is missing"),
    "DPO": (SFT + " --beta 0.1", "DeepSpeed-Chat's DPO program"),
    "DPO's path": ("deepspeed step2_dpo_finetuning/main.py --model_name_or_path m", "DeepSpeed-Chat's DPO program"),
    "stray word": (SFT + " 7", "'7' is neither a flag nor the value of one"),
    "no value": (SFT + " --seed", "--seed needs a value"),
    "a value too many": (SFT + " --offload=yes", "--offload takes no value"),
    "type": (SFT + " --seed 1.5", "--seed: expected a whole number, got '1.5'"),
    "number": (SFT + " --learning_rate fast", "--learning_rate: expected a number"),
    "choice": (SFT + " --dtype fp8", "'fp8' is not one of fp16, bf16"),
    "variable": (SFT.replace(" m ", " $MODEL "), "a variable of the shell"),
    "quotes": (SFT + " --output_dir 'x", "cannot be split into words"),
    "two commands": ("mkdir -p out; " + SFT, "one command line at a time"),
    "no GPUs": (SFT.replace("--num_gpus 2", ""), "on how many GPUs did this run?"),
    "split": (SFT + " --data_split 6,4", "expected three shares"),
    "stage": (SFT + " --zero_stage 4", "--zero_stage 4: ZeRO has stages 0, 1, 2 and 3"),
    "batch": (SFT + " --per_device_train_batch_size 0", "--per_device_train_batch_size 0: at least 1"),
    "uneven": (RL + " --per_device_generation_batch_size 6 --per_device_training_batch_size 4", "choose a multiple"),
    "scope": (SFT + " --lora_dim 4 --lora_module_name decoder.layers.3.", "sft.adapter.targets lists ends of names"),
    "warm-up": (RL + " --num_warmup_steps 5000", "'rl.optimizer.warmup_steps': 5000 is more than the 1000"),
    "decay": (SFT + " --weight_decay -1", "'sft.optimizer.weight_decay': -1.0 is out of range"),
    "rate": (SFT + " --learning_rate 0", "a learning rate is above 0"),
    "test": (RL + " --enable_test_mode", "--test_stop_step 0: at least 1"),
    "empty": ("", "no command line"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    line, message = ERRORS[name]
    with pytest.raises(UserError) as error:
        recipe_of(line)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"gpus": 4}, "the command line itself says 2"),
        ({"gpus": 0}, "--gpus 0: at least 1"),
        ({"prompts": 10}, "fewer than the 32 rows"),
        ({"prompts": 0}, "--prompts 0"),
    ],
)
def test_errors_of_options(more, message):
    with pytest.raises(UserError, match=message):
        made_of(RL, **more)


def test_the_account_leaves_no_word_out():
    """Every flag that was given is in the account, with what became of it."""
    line = RL
    for flag in flags.FLAGS:
        if 3 in flag.defaults and not flag.required and flag.name not in ("--enable_test_mode", "--test_stop_step"):
            value = {"switch": "", "texts": "Dahoas/rm-static", "number": "0.5", "integer": "1"}.get(flag.kind)
            if value is None:
                value = flag.choices[0] if flag.choices else "1,1,2" if "split" in flag.name else "q_proj"
            line += f" {flag.name} {value}".rstrip()
    made = made_of(line)
    told = account(made)[2:]  # below the command line itself
    missing = [name for name in made.command.given if not any(re.search(rf"{name}\b", text) for text in told)]
    assert missing == []
    assert any("--dropout" not in text and "MixZ++" in text for text in told)
    hand = told[: told.index(next(text for text in told if text.startswith("What became")))]
    for name in (
        "--unsupervised_dataset_name",
        "--add_eot_token",
        "--deepspeed_config",
        "--actor_dropout 0.5",
        "rl.iterations",
    ):
        assert any(name in text for text in hand), name


def test_a_step_is_added_to_a_recipe():
    first = "# My run\n# of tonight\n" + write(made_of(SFT + " --zero_stage 1"))[0].split("\n", 1)[1]
    text, told = write(
        made_of(RL + " --actor_zero_stage 3 --critic_zero_stage 3 --seed 9"), into=first, name="mine.yaml"
    )
    recipe = recipe_from_text(text, name="joined")
    assert recipe.stages == ("sft", "rl")
    assert (recipe.seed, recipe.layout.zero.stage, recipe.rl.policy_path) == (1234, 3, None)
    assert recipe.rl.reward.model_path == "c"
    assert text.startswith("# My run\n# of tonight\n")
    assert any("seed is 1234: the recipe had 1234, this step alone would have 9" in line for line in told)
    assert any("rl.policy_path a is left out" in line for line in told)
    with pytest.raises(UserError, match=r"mine\.yaml: has a rl stage already"):
        write(made_of(RL), into=text, name="mine.yaml")
    with pytest.raises(UserError, match="unknown key 'sfd'"):
        write(made_of(RL), into=text.replace("\nsft:", "\nsfd:"), name="mine.yaml")


def test_groups_that_a_recipe_left_empty_are_filled():
    into = "name: x\nstages: [sft]\nmodel: {path: m}\ndata: {demonstrations: {path: a.jsonl}}\n"
    into += "rl: {adapter: null}\nlayout: {}\n"
    text, _ = write(made_of(RL + " --actor_lora_dim 4"), into=into)
    recipe = recipe_from_text(text, name="joined")
    assert recipe.rl.adapter is not None
    assert (recipe.rl.adapter.rank, recipe.layout.remat) == (4, "none")


def test_the_command(tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    assert main(["recipe", "from-dschat", "-o", str(file), "--", *shlex.split(SFT), "--max_seq_len", "64"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "--max_seq_len 64 -> data.max_prompt_tokens 32" in err
    assert main(["recipe", "show", str(file)]) == 0
    assert "max_prompt_tokens: 32" in capsys.readouterr().out
    joined = ["recipe", "from-dschat", "--into", str(file), "--prompts", "6400", "--", RL]
    assert main(joined) == 0
    assert load_recipe_text(capsys.readouterr().out).stages == ("sft", "rl")
    assert main(["recipe", "from-dschat", "--step", "2", "--", SFT]) == 2
    assert "--print_loss is a flag of step 1" in capsys.readouterr().err
    assert main(["recipe", "from-dschat", "--into", str(tmp_path / "none.yaml"), "--", RL]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    assert main(["recipe", "from-dschat", "-o", str(tmp_path / "no" / "x.yaml"), "--", RL]) == 2
    assert "x.yaml: cannot be written" in capsys.readouterr().err


def load_recipe_text(text: str):
    return recipe_from_text(text, name="stdout")


def test_the_page_has_the_table():
    assert flags.markdown_table() in PAGE.read_text(encoding="utf-8")


def test_canary_a_stale_table_is_seen(monkeypatch):
    changed = [replace(flag, note="x") if flag.name == "--seed" else flag for flag in flags.FLAGS]
    monkeypatch.setattr(flags, "FLAGS", tuple(changed))
    assert flags.markdown_table() not in PAGE.read_text(encoding="utf-8")


def page_commands() -> list[list[str]]:
    text = re.sub(r"\\\n\s*", " ", PAGE.read_text(encoding="utf-8"))
    return [shlex.split(line) for line in re.findall(r"^diptych (recipe from-dschat .*)$", text, re.MULTILINE)]


def test_the_commands_on_the_page_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = page_commands()
    assert len(commands) >= 3
    assert [main(command) for command in commands] == [0] * len(commands)
    assert load_recipe("chat.yaml").stages == ("sft", "reward", "rl")


def test_the_conversion_on_the_page_makes_rows_that_are_read(tmp_path, monkeypatch):
    from diptych.data import sources
    from diptych.recipe.schema import Source

    monkeypatch.chdir(tmp_path)
    rows = '[{"prompt": "Human: Hi. Assistant:", "chosen": "Hello.", "rejected": "No."}'
    rows += ', {"prompt": "Human: Bye. Assistant:", "chosen": "Bye.", "rejected": "What?"}' * 9 + "]"
    Path("train.json").write_text(rows)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(program, {})
    demonstrations, _ = sources.demonstrations(Source(path="demonstrations.jsonl"), seed=0)
    preferences, _ = sources.preferences(Source(path="preferences.jsonl"), seed=0)
    prompts, _ = sources.prompts(Source(path="prompts.jsonl"), seed=0)
    assert (len(demonstrations), len(preferences), len(prompts)) == (2, 4, 4)
    assert [row.turns[-1]["content"] for row in demonstrations] == ["Hello.", "Bye."]
