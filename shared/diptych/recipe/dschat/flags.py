"""Every flag of DeepSpeed-Chat's three training programs: its default there, and what has become of it here.

Read from DeepSpeedExamples 45b4b71 (March 2026), applications/DeepSpeed-Chat/training/step{1,2,3}*/main.py. The table
in docs/deepspeed_chat.md is `markdown_table()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Step = Literal[1, 2, 3]
Kind = Literal["text", "texts", "integer", "number", "switch"]
# A setting: the same thing under another name. Differs: nearly, and the note says how. By hand: nothing is written for
# it. Obsolete: there is nothing to set.
Fate = Literal["setting", "differs", "by hand", "obsolete"]

STAGES: Mapping[int, str] = {1: "sft", 2: "reward", 3: "rl"}
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
DPO_FLAGS = ("--beta", "--label_smoothing")
"""The flags that only DeepSpeed-Chat's DPO program has (training/step2_dpo_finetuning)."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """defaults: step -> the value where the flag is not given, for the steps whose program has it (None: none, or
    required). keys: the recipe's keys that it sets, without the stage where they begin with a point."""

    name: str
    kind: Kind
    defaults: Mapping[int, Any]
    fate: Fate
    keys: tuple[str, ...] = ()
    note: str = ""
    choices: tuple[str, ...] = ()
    required: bool = False

    def keys_of(self, step: int) -> tuple[str, ...]:
        """The recipe's keys in full."""
        return tuple(STAGES[step] + key if key.startswith(".") else key for key in self.keys)


def _flag(name: str, kind: Kind, steps: str, default: Any, fate: Fate, *keys: str, note: str = "", **more: Any) -> Flag:
    """steps: digits. default: one value for all of them, or a mapping from step to value."""
    own = default if isinstance(default, Mapping) else dict.fromkeys(map(int, steps), default)
    return Flag(name=name, kind=kind, defaults=own, fate=fate, keys=keys, note=note, **more)


_DATA = "a JSONL file here, to be written and named; nothing is downloaded (docs/deepspeed_chat.md shows the rows)"
_NO_DROPOUT = "there is no dropout, whatever config.json says: its noise makes the first PPO ratio differ from 1"
_LORA_LR = "with an adapter it is the stage's learning rate"
_LORA = (
    "alpha is 1: DeepSpeed-Chat scales by 1 / dim. Without --only_optimize_lora it also trains embeddings, norms and "
    "biases; here only the adapter and a scalar head are"
)
_SCOPE = "a part of module names there, ends of names here; the scope of whole layers is all-linear"
_PER_GPU = "per GPU there, over all GPUs here"
_WARMUP = "the first step has rate 0 there and peak / warmup_steps here"
_EOT = (
    "a response ends in the tokenizer's own end-of-sequence token, in all stages, and it is trained; set that in the "
    "tokenizer's files"
)
_FLOAT32_LOSS = "log-softmax and losses are always taken in float32"
_STAGE_0 = "0 becomes 1: at stage 0 DeepSpeed sums gradients in bfloat16; on one GPU stage 1 holds the same"
_RUN = "the run directory has it: `diptych run --output DIR`"

FLAGS: tuple[Flag, ...] = (
    # Data
    _flag("--data_path", "texts", "123", ("Dahoas/rm-static",), "differs", "data.*.path", note=_DATA),
    _flag("--data_split", "text", "123", "2,4,4", "by hand", "data.*.path",
          note="a stage reads the whole of its file: put only its share of the rows there, and no row into two files"),
    _flag("--sft_only_data_path", "texts", "1", (), "by hand", "data.demonstrations.path",
          note="add its rows to the same file"),
    _flag("--data_output_path", "text", "123", None, "obsolete",
          note="there is no cache of splits and tensors: rows are read from the file, in an order drawn from the seed"),
    _flag("--unsupervised_dataset_name", "text", "3", None, "by hand",
          note="PPO has no language-modelling loss beside it; train on that text in the sft stage"),
    _flag("--unsupervised_dataset_config_name", "text", "3", None, "by hand", note="see --unsupervised_dataset_name"),
    _flag("--unsup_coef", "number", "3", 27.8, "by hand", note="see --unsupervised_dataset_name"),
    _flag("--preprocessing_num_workers", "integer", "3", None, "obsolete", note="it was for the unsupervised data set"),
    # Models
    _flag("--model_name_or_path", "text", "12", None, "setting", "model.path (sft)", "reward.model_path (reward)",
          required=True),
    _flag("--actor_model_name_or_path", "text", "3", None, "setting", "rl.policy_path", required=True),
    _flag("--critic_model_name_or_path", "text", "3", None, "setting", "rl.reward.model_path", required=True,
          note="reward model and critic, as there; one saved by DeepSpeed-Chat (v_head) cannot be read: train it here"),
    _flag("--num_padding_at_beginning", "integer", "23", 1, "obsolete",
          note="where a response ends is known from the data and the sampler, never searched by padding's id"),
    _flag("--dropout", "number", "12", None, "differs", note=_NO_DROPOUT),
    _flag("--actor_dropout", "number", "3", None, "differs", note=_NO_DROPOUT),
    _flag("--critic_dropout", "number", "3", None, "differs", note=_NO_DROPOUT),
    # Lengths and batches
    _flag("--max_seq_len", "integer", "12", 512, "differs", "data.max_prompt_tokens", "data.max_response_tokens",
          "data.too_long", note="one limit on both together there; half for each here, and cut as there"),
    _flag("--max_prompt_seq_len", "integer", "3", 256, "setting", "data.max_prompt_tokens", "data.too_long",
          note="longer prompts are left out, as there, and counted"),
    _flag("--max_answer_seq_len", "integer", "3", 256, "setting", "rollout.max_new_tokens"),
    _flag("--per_device_train_batch_size", "integer", "12", 16, "setting", ".batch_size", ".micro_batch_size",
          note=_PER_GPU),
    _flag("--per_device_eval_batch_size", "integer", "12", 16, "obsolete",
          note="evaluation takes micro_batch_size rows at once; no number depends on it"),
    _flag("--per_device_generation_batch_size", "integer", "3", 16, "setting", "rl.batch_size", note=_PER_GPU),
    _flag("--per_device_training_batch_size", "integer", "3", 16, "setting", "rl.micro_batch_size", "rl.mini_batches",
          note=_PER_GPU),
    _flag("--generation_batches", "integer", "3", 1, "setting", "rl.batch_size"),
    _flag("--ppo_epochs", "integer", "3", 1, "differs", "rl.epochs",
          note="each pass draws its own order of rows; there only the order of micro-batches changes"),
    _flag("--gradient_accumulation_steps", "integer", "123", 1, "setting", ".batch_size", ".mini_batches (rl)",
          note="gradients are means over the tokens of the whole optimizer step; there, means of micro-batches' means"),
    # Optimizer
    _flag("--learning_rate", "number", "12", {1: 1e-3, 2: 5e-5}, "setting", ".learning_rate"),
    _flag("--actor_learning_rate", "number", "3", 9.65e-6, "setting", "rl.learning_rate"),
    _flag("--critic_learning_rate", "number", "3", 5e-6, "setting", "rl.critic_learning_rate"),
    _flag("--weight_decay", "number", "12", 0.0, "setting", ".optimizer.weight_decay"),
    _flag("--actor_weight_decay", "number", "3", 0.0, "setting", "rl.optimizer.weight_decay",
          note="one for policy and critic"),
    _flag("--critic_weight_decay", "number", "3", 0.0, "setting", "rl.optimizer.weight_decay",
          note="one for policy and critic"),
    _flag("--num_train_epochs", "integer", "123", 1, "setting", ".epochs (sft, reward)", "rl.iterations",
          note="in rl: passes over the prompts, which --prompts turns into iterations"),
    _flag("--lr_scheduler_type", "text", "123", "cosine", "setting", ".optimizer.schedule", choices=SCHEDULES,
          note="cosine_with_restarts is cosine (it has one cycle there), polynomial is linear (its power is 1)"),
    _flag("--num_warmup_steps", "integer", "123", {1: 0, 2: 0, 3: 100}, "setting", ".optimizer.warmup_steps",
          note=_WARMUP),
    # Memory and precision
    _flag("--dtype", "text", "123", "fp16", "differs", "precision", choices=("fp16", "bf16"),
          note="bfloat16 over float32 masters; fp16 and its loss scale are not offered"),
    _flag("--zero_stage", "integer", "12", 0, "differs", "layout.zero.stage",
          note=_STAGE_0),
    _flag("--actor_zero_stage", "integer", "3", 0, "differs", "layout.zero.stage",
          note=_STAGE_0),
    _flag("--critic_zero_stage", "integer", "3", 0, "differs", "layout.zero_critic.stage", "layout.zero_reward.stage",
          note=_STAGE_0),
    _flag("--offload", "switch", "123", False, "setting", "layout.zero.offload_optimizer", "layout.zero.offload_param",
          note="optimizer state at stages 1 and 2, parameters too at stage 3"),
    _flag("--offload_reference_model", "switch", "3", False, "differs", "layout.offload",
          note="the whole model waits in the host's memory between its uses, at any stage; there, only at stage 3"),
    _flag("--offload_reward_model", "switch", "3", False, "differs", "layout.offload",
          note="the whole model waits in the host's memory between its uses, at any stage; there, only at stage 3"),
    _flag("--gradient_checkpointing", "switch", "12", False, "setting", "layout.remat"),
    _flag("--actor_gradient_checkpointing", "switch", "3", False, "setting", "layout.remat",
          note="one for policy and critic: full where either asks for it"),
    _flag("--critic_gradient_checkpointing", "switch", "3", False, "setting", "layout.remat",
          note="one for policy and critic: full where either asks for it"),
    _flag("--compute_fp32_loss", "switch", "123", False, "obsolete", note=_FLOAT32_LOSS),
    # Low-rank adapters
    _flag("--lora_dim", "integer", "12", 0, "differs", ".adapter.rank", ".adapter.alpha", note=_LORA),
    _flag("--actor_lora_dim", "integer", "3", 0, "differs", "rl.adapter.rank", "rl.adapter.alpha", note=_LORA),
    _flag("--critic_lora_dim", "integer", "3", 0, "differs", "rl.critic_adapter.rank", "rl.critic_adapter.alpha",
          note=_LORA),
    _flag("--lora_module_name", "text", "12", "decoder.layers.", "differs", ".adapter.targets", note=_SCOPE),
    _flag("--actor_lora_module_name", "text", "3", "decoder.layers.", "differs", "rl.adapter.targets", note=_SCOPE),
    _flag("--critic_lora_module_name", "text", "3", "decoder.layers.", "differs", "rl.critic_adapter.targets",
          note=_SCOPE),
    _flag("--only_optimize_lora", "switch", "123", False, "obsolete", note="it is what an adapter means here"),
    _flag("--lora_learning_rate", "number", "12", 5e-4, "setting", ".learning_rate", note=_LORA_LR),
    _flag("--actor_lora_learning_rate", "number", "3", 5e-4, "setting", "rl.learning_rate", note=_LORA_LR),
    _flag("--critic_lora_learning_rate", "number", "3", 5e-4, "setting", "rl.critic_learning_rate", note=_LORA_LR),
    _flag("--enable_mixed_precision_lora", "switch", "3", False, "by hand",
          note="quantised frozen weights (MixZ++) are not offered; an adapter at ZeRO stage 3 runs without"),
    # Generation
    _flag("--enable_hybrid_engine", "switch", "3", False, "differs", "rollout.engine",
          note="auto: a decode copy of the weights, for every architecture; `deepspeed` asks for DeepSpeed's own"),
    _flag("--inference_tp_size", "integer", "3", 1, "obsolete",
          note="the decode copy is laid out by the engine; above 1 it could not work there (attention masks were not "
          "gathered)"),
    _flag("--tp_gather_partition_size", "integer", "3", 8, "obsolete",
          note="layout.switch.chunk_mb bounds what is gathered at a time, in megabytes"),
    _flag("--release_inference_cache", "switch", "3", False, "obsolete", note="the cache lives as long as a rollout"),
    _flag("--unpin_actor_parameters", "switch", "3", False, "obsolete",
          note="parameters are gathered once per rollout, never layer by layer for each token"),
    # RL
    _flag("--enable_ema", "switch", "3", False, "differs", "rl.ema_decay",
          note="0.992 per micro-batch in 16 bits there, in which it hardly moves; per optimizer step in float32 here"),
    _flag("--align_overflow", "switch", "3", False, "obsolete",
          note="bfloat16 has no loss scale that could overflow; the flag never worked with a released DeepSpeed"),
    # Evaluation, tokens, logs
    _flag("--eval_interval", "integer", "2", 0, "setting", "reward.eval_every",
          note="0: before the first step and after each epoch there; the default of eval_every here"),
    _flag("--eval_iters", "integer", "2", 100, "setting", "data.preferences.eval_limit",
          note="batches of --per_device_eval_batch_size on every GPU there; rows here"),
    _flag("--add_eot_token", "switch", "123", False, "by hand", note=_EOT),
    _flag("--eot_token", "text", "1", "<|endoftext|>", "by hand", note=_EOT),
    _flag("--enable_tensorboard", "switch", "123", False, "obsolete", note=_RUN),
    _flag("--tensorboard_path", "text", "123", {1: "step1_tensorboard", 2: "step2_tensorboard", 3: "step3_tensorboard"},
          "obsolete", note=_RUN),
    _flag("--print_loss", "switch", "1", False, "obsolete", note="metrics.jsonl has every step"),
    _flag("--print_answers", "switch", "3", False, "obsolete", note="samples.jsonl has answers of every evaluation"),
    _flag("--print_answers_interval", "integer", "3", 1, "obsolete", note="rl.eval_every says how often"),
    _flag("--output_dir", "text", "123", None, "obsolete", note=_RUN),
    _flag("--seed", "integer", "123", {1: 1234, 2: 1234, 3: None}, "setting", "seed",
          note="0 where step 3 is given none: there it then splits the data anew in every run"),
    _flag("--enable_test_mode", "switch", "3", False, "setting", "rl.iterations"),
    _flag("--test_stop_step", "integer", "3", 0, "setting", "rl.iterations", note="with --enable_test_mode"),
    # Launching
    _flag("--local_rank", "integer", "123", -1, "obsolete", note="the launcher sets it"),
    _flag("--deepspeed", "switch", "123", False, "obsolete", note="the torch engine always trains with DeepSpeed"),
    _flag("--deepspeed_config", "text", "123", None, "by hand",
          note="further settings of DeepSpeed go into the recipe's `deepspeed` block"),
    _flag("--deepscale", "switch", "123", False, "obsolete", note="the old name of --deepspeed"),
    _flag("--deepscale_config", "text", "123", None, "by hand", note="the old name of --deepspeed_config"),
)  # fmt: skip

BY_NAME: Mapping[str, Flag] = {flag.name: flag for flag in FLAGS}

CONSTANTS: Mapping[str, Any] = {
    "rl.kl_coef": 0.1,
    "rl.kl_estimator": "k1",
    "rl.score_clip": 5.0,
    "rl.clip_range": 0.2,
    "rl.value_clip_range": 0.2,
    "rl.value_coef": 1.0,
    "rl.gamma": 1.0,
    "rl.lam": 0.95,
    "rl.missing_eos_penalty": 0.0,
    "rl.samples_per_prompt": 1,
}
"""What DeepSpeed-Chat's PPO trainer writes into its code, and has no flags for."""

OPTIMIZER: Mapping[str, Any] = {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "max_grad_norm": 1.0}
"""The same of its optimizer: FusedAdam (AdamW), whose epsilon is its default."""

EMA_DECAY = 0.992


def shown(name: str, value: Any) -> str:
    """A flag as it stands on a command line."""
    if isinstance(value, bool) or value is None:
        return name
    return f"{name} {' '.join(value) if isinstance(value, tuple) else value}"


def markdown_table() -> str:
    """All flags as a table for the documentation, in the order of `FLAGS`."""
    lines = ["| flag | steps | default | recipe | what to know |", "| --- | --- | --- | --- | --- |"]
    for flag in FLAGS:
        values = [_cell(value) for value in flag.defaults.values()]
        default = values[0] if len(set(values)) == 1 else " / ".join(values)
        keys = ", ".join(f"`{key}`" for key in map(_readable, flag.keys))
        becomes = (keys or "none") if flag.fate in ("setting", "differs") else f"*{flag.fate}*{': ' * bool(keys)}{keys}"
        steps = ", ".join(map(str, flag.defaults))
        note = flag.note.replace("|", "\\|")
        lines.append(f"| `{flag.name}` | {steps} | {default} | {becomes} | {note} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value is False or value == ():
        return ""
    return " ".join(value) if isinstance(value, tuple) else str(value).replace("|", "\\|")


def _readable(key: str) -> str:
    return f"STAGE{key}" if key.startswith(".") else key
