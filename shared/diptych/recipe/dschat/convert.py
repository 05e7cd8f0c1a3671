"""From a DeepSpeed-Chat command line to the settings of a recipe, each with the flag that it came from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from diptych.errors import UserError
from diptych.recipe.dschat.command import Command
from diptych.recipe.dschat.flags import BY_NAME, CONSTANTS, EMA_DECAY, OPTIMIZER, STAGES, shown

CONSTANT, OWN = "constant", "own"  # sources that are no flags: DeepSpeed-Chat's code, and ours
PLACEHOLDER = "FILL_IN"
UNKNOWN_ITERATIONS = 1000
_SECTION = {1: "demonstrations", 2: "preferences", 3: "prompts"}
_ROWS = {
    1: '{"prompt": ..., "response": the chosen answer}',
    2: '{"prompt": ..., "chosen": ..., "rejected": ...}',
    3: '{"prompt": ...} (rows of step 2 do)',
}
_WHOLE_LAYERS = ("decoder.layers.", "model.layers.", "layers.", "transformer.h.", "h.", "gpt_neox.layers.")


@dataclass(kw_only=True)
class Conversion:
    """settings: dotted key of the recipe -> plain value. sources: dotted key -> the flag it came from, `CONSTANT` or
    `OWN`. by_hand: what is left for the reader to do. notes: flag -> what its value in particular became."""

    command: Command
    gpus: int
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    by_hand: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def put(self, key: str, value: Any, source: str) -> None:
        self.settings[key] = value
        self.sources[key] = source

    def note(self, flag: str, text: str) -> None:
        self.notes.setdefault(flag, []).append(text)

    def given(self, name: str) -> bool:
        return name in self.command.given


def convert(command: Command, *, gpus: int | None = None, prompts: int | None = None) -> Conversion:
    """The settings of the recipe's stage that does what the command line does.

    gpus: on which the command ran, where it does not say itself. prompts: rows of step 3's data, from which the number
    of iterations follows.

    Raises UserError where the number of GPUs is unknown (batch sizes are per GPU), and for values that no recipe has.
    """
    count = _number_of_gpus(command, gpus)
    if prompts is not None and (command.step != 3 or prompts < 1):
        raise UserError(f"--prompts {prompts}: the number of prompts of step 3, at least 1")
    made = Conversion(command=command, gpus=count)
    stage = STAGES[command.step]
    made.put("stages", [stage], OWN)
    _shared(made)
    (_reinforcement if command.step == 3 else _supervised)(made)
    if command.step == 3:
        _rollouts(made, prompts)
    for name in command.given:
        if BY_NAME[name].fate == "by hand" and name != "--data_split":  # which the data's line names
            made.by_hand.append(f"{shown(name, command.given[name])}: {BY_NAME[name].note}")
    return made


def _number_of_gpus(command: Command, wanted: int | None) -> int:
    if wanted is not None and wanted < 1:
        raise UserError(f"--gpus {wanted}: at least 1")
    if wanted is not None and command.gpus is not None and wanted != command.gpus:
        raise UserError(f"--gpus {wanted}: the command line itself says {command.gpus}; take one of them away")
    count = command.gpus if wanted is None else wanted
    if count is None:
        raise UserError(
            "on how many GPUs did this run? Batch sizes are per GPU there, and the command takes all that the machine "
            "has: give --gpus NUMBER (before the `--`)"
        )
    return count


def _shared(made: Conversion) -> None:
    command = made.command
    name = command.value("--actor_model_name_or_path" if command.step == 3 else "--model_name_or_path")
    short = re.sub(r"[^a-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    made.put("name", f"{short or 'dschat'}-{STAGES[command.step]}", OWN)
    seed = command.value("--seed")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed}: a recipe's seed is not negative")
    made.put("seed", 0 if seed is None else seed, "--seed")
    made.put("precision", "bfloat16", "--dtype")
    _data(made)
    kinds = ("--actor_gradient_checkpointing", "--critic_gradient_checkpointing", "--gradient_checkpointing")
    asked = [kind for kind in kinds if made.given(kind)]
    own = [kind for kind in kinds if command.step in BY_NAME[kind].defaults]
    made.put("layout.remat", "full" if asked else "none", asked[0] if asked else own[0])
    for kind in ("--dropout", "--actor_dropout", "--critic_dropout"):
        if made.given(kind) and command.value(kind) > 0:
            made.by_hand.append(f"{shown(kind, command.value(kind))}: {BY_NAME[kind].note}; nothing replaces it")


def _data(made: Conversion) -> None:
    command, section = made.command, _SECTION[made.command.step]
    paths = command.value("--data_path")
    path = f"{PLACEHOLDER}/{section}.jsonl"
    made.put(f"data.{section}.path", path, "--data_path")
    share = _share(command.value("--data_split"), command.step)
    made.by_hand.append(
        f"data.{section}.path is to be given: rows {_ROWS[command.step]} in JSONL, from {share} of {', '.join(paths)} "
        "(--data_split). Texts are taken as they stand, DeepSpeed-Chat's ' Human: ... Assistant:' included. "
        f"data.{section}.eval_path may name held-out rows; else a tenth of the prompts is held out"
    )
    # No chat template, as there; "local/jsonfile" puts a space before both texts.
    made.put("data.chat", "never", CONSTANT)
    if paths == ("local/jsonfile",):
        made.put("data.prompt_template", " {prompt}", "--data_path")
        if command.step != 3:
            made.put("data.response_template", " {response}", "--data_path")
    if command.step == 3:
        made.put("data.max_prompt_tokens", _at_least_one(command, "--max_prompt_seq_len"), "--max_prompt_seq_len")
        made.put("data.too_long", "drop", "--max_prompt_seq_len")
        return
    length = command.value("--max_seq_len")
    if length < 2:
        raise UserError(f"--max_seq_len {length}: at least 2, for a prompt and a response")
    made.put("data.max_prompt_tokens", length // 2, "--max_seq_len")
    made.put("data.max_response_tokens", length - length // 2, "--max_seq_len")
    made.put("data.too_long", "truncate", "--max_seq_len")


def _share(split: str, step: int) -> str:
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) < 0 or not sum(parts) > 0:
        raise UserError(f"--data_split {split!r}: expected three shares, one for each step, as in 2,4,4")
    return f"{parts[step - 1] / sum(parts):.0%} of the rows"


def _supervised(made: Conversion) -> None:
    command, stage = made.command, STAGES[made.command.step]
    model = command.value("--model_name_or_path")
    made.put("model.path" if command.step == 1 else "reward.model_path", model, "--model_name_or_path")
    _say_models(made, model)
    micro = _at_least_one(command, "--per_device_train_batch_size") * made.gpus
    steps = _at_least_one(command, "--gradient_accumulation_steps")
    made.put(f"{stage}.epochs", _at_least_one(command, "--num_train_epochs"), "--num_train_epochs")
    made.put(f"{stage}.batch_size", micro * steps, "--gradient_accumulation_steps")
    made.put(f"{stage}.micro_batch_size", micro, "--per_device_train_batch_size")
    if stage == "reward":
        made.put("reward.dialect", "dschat", CONSTANT)
        made.put("reward.center_coef", 0.0, CONSTANT)
        if command.value("--eval_interval") > 0:
            made.put("reward.eval_every", command.value("--eval_interval"), "--eval_interval")
        rows = (
            _at_least_one(command, "--eval_iters") * _at_least_one(command, "--per_device_eval_batch_size") * made.gpus
        )
        made.put("data.preferences.eval_limit", rows, "--eval_iters")
    _adapter(made, stage, "", "learning_rate")
    _optimizer(made, stage, "--weight_decay")
    _zero(made, "layout.zero", "--zero_stage")


def _reinforcement(made: Conversion) -> None:
    command = made.command
    policy, reward = command.value("--actor_model_name_or_path"), command.value("--critic_model_name_or_path")
    made.put("rl.policy_path", policy, "--actor_model_name_or_path")
    made.put("rl.reward.model_path", reward, "--critic_model_name_or_path")
    _say_models(made, policy, reward)
    # By its name there: a Llama's padding has an id of its own, every other model's is the end-of-sequence token.
    made.put("rl.dialect", "dschat-pad" if "llama" in policy else "dschat", "--actor_model_name_or_path")
    made.note(
        "--actor_model_name_or_path", "the dialect goes by the name, as there: dschat-pad where it has `llama` in it"
    )
    for key, value in CONSTANTS.items():
        made.put(key, value, CONSTANT)
    _adapter(made, "rl", "actor_", "learning_rate")
    _adapter(made, "rl", "critic_", "critic_learning_rate")
    actor, critic = command.value("--actor_weight_decay"), command.value("--critic_weight_decay")
    _optimizer(made, "rl", "--actor_weight_decay")
    if actor != critic:
        made.by_hand.append(
            f"--critic_weight_decay {critic:g}: policy and critic share rl.optimizer.weight_decay, which is now the "
            f"policy's {actor:g}; choose one for both"
        )
    made.put("rollout.temperature", 1.0, OWN)
    made.put("rollout.max_new_tokens", _at_least_one(command, "--max_answer_seq_len"), "--max_answer_seq_len")
    made.put("rollout.engine", "auto", "--enable_hybrid_engine")
    _zero(made, "layout.zero", "--actor_zero_stage")
    _frozen_and_critic(made)


def _frozen_and_critic(made: Conversion) -> None:
    """The critic's own ZeRO, and what waits in host memory."""
    command = made.command
    actor, critic = command.value("--actor_zero_stage"), command.value("--critic_zero_stage")
    has_reference = command.value("--actor_lora_dim") <= 0
    if max(1, actor) != max(1, critic):
        _zero(made, "layout.zero_critic", "--critic_zero_stage")
    else:
        made.note("--critic_zero_stage", "as layout.zero")
    if actor == 3 and command.value("--offload") and has_reference:  # parameters of frozen models stay, as there
        made.put("layout.zero_reference.stage", 3, "--actor_zero_stage")
    if (actor == 3) != (critic == 3) or (actor == 3 and command.value("--offload") and not has_reference):
        made.put("layout.zero_reward.stage", 3 if critic == 3 else 0, "--critic_zero_stage")
    waits = []
    for role in ("reference", "reward"):
        flag = f"--offload_{role}_model"
        if command.value(flag) and role == "reference" and not has_reference:
            made.note(flag, "nothing to do: with an adapter the reference is the policy below it, no model of its own")
        elif command.value(flag):
            waits.append(role)
            made.put("layout.offload", list(waits), flag)


def _rollouts(made: Conversion, prompts: int | None) -> None:
    """Rows of a rollout, optimizer steps, iterations.

    There, every GPU samples `--generation_batches` batches of G rows, cuts them into micro-batches of T and makes an
    optimizer step after every A of them. Where A of them are more than a rollout has, several rollouts come from the
    same policy; here they are one.
    """
    command, gpus = made.command, made.gpus
    generated = _at_least_one(command, "--per_device_generation_batch_size")
    micro = min(_at_least_one(command, "--per_device_training_batch_size"), generated)
    accumulated = _at_least_one(command, "--gradient_accumulation_steps")
    epochs = _at_least_one(command, "--ppo_epochs")
    if generated % micro:
        raise UserError(
            f"--per_device_generation_batch_size {generated} is not a multiple of --per_device_training_batch_size "
            f"{micro}: the last micro-batch would be smaller and count as much as the others; choose a multiple"
        )
    rows = generated * _at_least_one(command, "--generation_batches")
    together = math.lcm(rows, micro * accumulated) // rows
    made.put("rl.batch_size", rows * together * gpus, "--per_device_generation_batch_size")
    made.put("rl.micro_batch_size", micro * gpus, "--per_device_training_batch_size")
    made.put("rl.mini_batches", rows * together // (micro * accumulated), "--gradient_accumulation_steps")
    made.put("rl.epochs", epochs, "--ppo_epochs")
    if together > 1:
        small, large = rows * gpus, rows * together * gpus
        text = f"{together} rollouts of {small} rows come from one policy there; they are one of {large} here"
        differs = ", and each pass of --ppo_epochs goes over all of it" if epochs > 1 else ""
        made.note("--gradient_accumulation_steps", text + differs)
    if command.value("--enable_ema"):
        made.put("rl.ema_decay", round(EMA_DECAY**accumulated, 6), "--enable_ema")

    passes = _at_least_one(command, "--num_train_epochs")
    if command.value("--enable_test_mode"):
        stop = _at_least_one(command, "--test_stop_step") * generated * gpus
        made.put("rl.iterations", max(1, math.ceil(stop / made.settings["rl.batch_size"])), "--test_stop_step")
        steps = made.settings["rl.iterations"] * epochs * made.settings["rl.mini_batches"]
        warmup = made.settings["rl.optimizer.warmup_steps"]
        if warmup > steps:
            made.put("rl.optimizer.warmup_steps", steps, "--num_warmup_steps")
            made.note("--num_warmup_steps", f"cut to the {steps} steps of the test")
    elif prompts is not None:
        iterations = passes * prompts // made.settings["rl.batch_size"]
        if iterations < 1:
            raise UserError(f"--prompts {prompts}: fewer than the {made.settings['rl.batch_size']} rows of one rollout")
        made.put("rl.iterations", iterations, "--num_train_epochs")
    else:
        made.put("rl.iterations", UNKNOWN_ITERATIONS, "--num_train_epochs")
        made.by_hand.append(
            f"rl.iterations is {UNKNOWN_ITERATIONS} for want of the number of prompts: make it {passes} x prompts / "
            f"{made.settings['rl.batch_size']} (or give --prompts NUMBER); the learning rate's course depends on it"
        )


def _adapter(made: Conversion, stage: str, role: str, rate: str) -> None:
    """The learning rate, and the adapter where there is one. role: "", "actor_" or "critic_" as in the flags' names."""
    command = made.command
    rank, plain, own = f"--{role}lora_dim", f"--{role}learning_rate", f"--{role}lora_learning_rate"
    dim = command.value(rank)
    source = own if dim > 0 else plain
    if not command.value(source) > 0:
        raise UserError(f"{source} {command.value(source):g}: a learning rate is above 0")
    made.put(f"{stage}.{rate}", command.value(source), source)
    if dim <= 0:
        for name in (own, f"--{role}lora_module_name"):
            if made.given(name):
                made.note(name, f"nothing to do without {rank}")
        return
    if made.given(plain):
        made.note(plain, f"nothing to do: it was for what {rank} leaves without an adapter")
    key = f"{stage}.{'critic_adapter' if role == 'critic_' else 'adapter'}"
    made.put(f"{key}.rank", dim, rank)
    made.put(f"{key}.alpha", 1.0, rank)
    scope = command.value(f"--{role}lora_module_name")
    if scope not in _WHOLE_LAYERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", scope):
        raise UserError(
            f"--{role}lora_module_name {scope!r}: no recipe says this. {key}.targets lists ends of names of linear "
            "layers (q_proj, mlp.down_proj), in every layer: give one such name, or `layers.` for all of them"
        )
    made.put(f"{key}.targets", ["all-linear"] if scope in _WHOLE_LAYERS else [scope], f"--{role}lora_module_name")


def _optimizer(made: Conversion, stage: str, decay: str) -> None:
    command = made.command
    for key, value in OPTIMIZER.items():
        made.put(f"{stage}.optimizer.{key}", value, CONSTANT)
    made.put(f"{stage}.optimizer.weight_decay", command.value(decay), decay)
    kind, warmup = command.value("--lr_scheduler_type"), command.value("--num_warmup_steps")
    schedule = {"cosine_with_restarts": "cosine", "polynomial": "linear", "constant_with_warmup": "constant"}
    made.put(f"{stage}.optimizer.schedule", schedule.get(kind, kind), "--lr_scheduler_type")
    if kind == "constant" and warmup > 0:
        warmup = 0
        made.note("--num_warmup_steps", "constant has no warm-up there")
    made.put(f"{stage}.optimizer.warmup_steps", warmup, "--num_warmup_steps")


def _zero(made: Conversion, key: str, flag: str) -> None:
    stage, offload = made.command.value(flag), made.command.value("--offload")
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{flag} {stage}: ZeRO has stages 0, 1, 2 and 3")
    made.put(f"{key}.stage", max(1, stage), flag)
    if offload and stage == 0:
        made.note("--offload", f"nothing to do at {flag} 0, which partitions and offloads nothing")
    elif offload:
        made.put(f"{key}.offload_optimizer", "cpu", "--offload")
        if stage == 3:
            made.put(f"{key}.offload_param", "cpu", "--offload")


def _say_models(made: Conversion, *names: str) -> None:
    made.by_hand.append(
        f"{' and '.join(dict.fromkeys(names))}: must be a directory on this machine, with config.json, safetensors and "
        "tokenizer.json (`hf download NAME --local-dir NAME`; a pytorch_model.bin becomes safetensors by transformers' "
        "save_pretrained)"
    )


def _at_least_one(command: Command, name: str) -> int:
    value = command.value(name)
    if value < 1:
        raise UserError(f"{name} {value}: at least 1")
    return value
