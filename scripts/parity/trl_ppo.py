"""Record a Diptych trace of a PPO run of TRL (its last with PPO, 1.12.0), offline, on random models of any size.

    python3.11 -m venv trl
    trl/bin/pip install torch==2.13.0 transformers accelerate datasets trl==1.12.0
    PYTHONPATH=shared trl/bin/python scripts/parity/trl_ppo.py --output trl-trace

The adapter is `watch`: call it between making your own `PPOTrainer` and `trainer.train()`, and the same lines record
your run. `PPOTrainer.train` is one method that keeps all of an iteration in local variables and calls
`accelerator.backward` in the midst of them: that is where it looks. TRL's own code is not changed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
PAD, BOS, EOS, UNKNOWN = range(4)


def watch(trainer: Any, recording: Any) -> None:
    """Record every iteration of `trainer`: its rollout, what TRL made of it, and the first optimizer step."""
    import torch

    from diptych.parity.foreign import Update, gradients_of, weights_of

    models = {"policy": trainer.policy_model, "critic": trainer.value_model}
    backward, step, log = trainer.accelerator.backward, trainer.optimizer.step, trainer.log
    seen: dict[str, Any] = {}
    made: list[int] = [0]  # optimizer steps

    def moments(name: str, kind: str) -> dict[str, Any] | None:
        state = trainer.optimizer.state
        parameters = dict(models[name].named_parameters())
        found = {key: state[one][kind].clone() for key, one in parameters.items() if kind in state.get(one, {})}
        return found or None

    def look(loss: Any, **options: Any) -> None:
        """In place of `accelerator.backward`, once for each micro-batch."""
        local = sys._getframe(1).f_locals  # of PPOTrainer.train
        backward(loss, **options)
        if "updates" in seen:
            return  # this iteration's first optimizer step is made
        if "local" not in seen:
            names = (
                "queries", "responses", "padding_mask", "padding_mask_p1", "logprobs", "ref_logprobs", "values", "kl",
                "rewards", "returns", "advantages", "contain_eos_token", "scores",
            )  # fmt: skip
            seen["local"] = {name: local[name].clone() for name in names}
            seen["before"] = {role: weights_of(model) for role, model in models.items()}
            seen["moments"] = {role: (moments(role, "exp_avg"), moments(role, "exp_avg_sq")) for role in models}
        seen.setdefault("micro", []).append(
            {"rows": torch.as_tensor(local["micro_batch_inds"]), "outputs": local["new_logprobs"].detach().clone()}
            | {name: local[name].detach().clone() for name in ("pg_loss", "vf_loss")}
        )

    def step_and_look(*args: Any, **options: Any) -> Any:
        real = trainer.accelerator.sync_gradients  # else the optimizer waits for more micro-batches
        first = real and "local" in seen and "updates" not in seen
        gradients = {role: gradients_of(model) for role, model in models.items()} if first else {}
        result = step(*args, **options)
        made[0] += real
        if first:
            mean = {name: torch.stack([one[name] for one in seen["micro"]]).mean() for name in ("pg_loss", "vf_loss")}
            losses = {"policy": mean["pg_loss"], "critic": trainer.args.vf_coef * mean["vf_loss"]}
            named = {"policy": ("loss/policy_avg", "pg_loss"), "critic": ("loss/value_avg", "vf_loss")}
            outputs = torch.cat([one["outputs"] for one in seen["micro"]])
            seen["updates"] = {
                role: Update(
                    weights_before=seen["before"][role],
                    gradients=gradients[role],
                    weights_after=weights_of(models[role]),
                    first_before=seen["moments"][role][0],
                    second_before=seen["moments"][role][1],
                    first_after=moments(role, "exp_avg"),
                    second_after=moments(role, "exp_avg_sq"),
                    loss=losses[role],
                    metrics={named[role][0]: mean[named[role][1]]},
                    learning_rate=trainer.optimizer.param_groups[0]["lr"],
                    updates=made[0] - 1,
                    outputs=outputs if role == "policy" else None,
                )
                for role in models
            }
        return result

    def log_and_record(logs: dict[str, float], *args: Any, **options: Any) -> Any:
        """TRL logs at the end of an iteration: everything is there."""
        if "objective/kl" in logs:
            it, penalty = seen["local"], trainer.args.missing_eos_penalty or 0.0
            # What TRL keeps in `scores` are already less the penalty for a response without a stop token.
            scores = it["scores"] + penalty * (~it["contain_eos_token"]).float()
            stops = trainer.stop_token_id is not None
            recording.ppo_step(
                prompts=it["queries"],
                prompt_mask=it["queries"] != trainer.processing_class.pad_token_id,
                responses=it["responses"],
                response_mask=~it["padding_mask"],
                logprobs=it["logprobs"],  # the sampler's: TRL takes the old log-probabilities from generation
                sampler_logprobs=it["logprobs"],
                ref_logprobs=it["ref_logprobs"],
                values=it["values"],
                scores=scores,
                kl=it["kl"].sum(1),
                shaped=it["rewards"],
                returns=it["returns"],
                advantages=it["advantages"],
                value_mask=~it["padding_mask_p1"],
                ended=it["contain_eos_token"] & stops,
                trained_rows=torch.cat([one["rows"] for one in seen["micro"]]),
                reference_weights=weights_of(trainer.ref_model) if trainer.state.global_step == 1 else None,
                metrics={name: value for name, value in logs.items() if name != "eps"},
                **seen["updates"],
            )
            seen.clear()
        return log(logs, *args, **options)

    trainer.accelerator.backward = look
    trainer.optimizer.step = step_and_look
    trainer.log = log_and_record


def settings_of(args: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """TRL's settings by our names, and what TRL calls them. Where TRL has no name, its code decides."""
    found = {
        "learning_rate": (args.learning_rate, "learning_rate"),
        "critic_learning_rate": (args.learning_rate, "learning_rate: one optimizer for both models"),
        "schedule": (str(args.lr_scheduler_type.value), "lr_scheduler_type"),
        "warmup_steps": (int(args.warmup_steps), "warmup_steps"),
        "optimizer": ("adamw", f"optim={args.optim.value}"),
        "betas": ([args.adam_beta1, args.adam_beta2], "adam_beta1, adam_beta2"),
        "eps": (args.adam_epsilon, "adam_epsilon"),
        "weight_decay": (args.weight_decay, "weight_decay"),
        "max_grad_norm": (None, "max_grad_norm, which its loop never reads"),
        "batch_size": (args.batch_size, "per_device_train_batch_size * gradient_accumulation_steps"),
        "micro_batch_size": (args.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation": ("mean_of_means", "train(): each micro-batch divides by its own tokens"),
        "epochs": (args.num_ppo_epochs, "num_ppo_epochs"),
        "mini_batches": (1, "num_mini_batches, which adds no optimizer step: Accelerate's accumulation counts on"),
        "kl_coef": (args.kl_coef, "kl_coef"),
        "kl_estimator": (args.kl_estimator, "kl_estimator"),
        "gamma": (args.gamma, "gamma"),
        "lam": (args.lam, "lam"),
        "clip_range": (args.cliprange, "cliprange"),
        "value_clip_range": (args.cliprange_value, "cliprange_value"),
        "value_coef": (args.vf_coef, "vf_coef"),
        "whiten_rewards": (args.whiten_rewards, "whiten_rewards"),
        "missing_eos_penalty": (args.missing_eos_penalty or 0.0, "missing_eos_penalty"),
        "temperature": (args.temperature, "temperature (plus 1e-7)"),
        "top_k": (0, "train(): top_k=0.0"),
        "top_p": (1.0, "train(): top_p=1.0"),
        "max_new_tokens": (args.response_length, "response_length"),
        "score_slot": ("after", "train(): sequence_lengths_p1"),
        "whiten_ddof": (1, "masked_var(unbiased=True)"),
        "masks_from": ("ids", "forward(): query_responses != pad_token_id"),
        "position_ids": ("mask", "forward(): attention_mask.cumsum(1) - attention_mask"),
    }
    return {name: one for name, (one, _) in found.items()}, {name: their for name, (_, their) in found.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", required=True, help="a new directory for the trace")
    parser.add_argument("--arch", choices=["llama", "qwen2", "opt"], default="llama")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d_model", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="prompts of an iteration (default: 16)")
    parser.add_argument("--micro_batch", type=int, help="rows that go through the models at once (default: all)")
    parser.add_argument("--prompt_len", type=int, default=16)
    parser.add_argument("--gen_len", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="iterations (default: 3)")
    parser.add_argument("--ppo_epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--kl_coef", type=float, default=0.05)
    parser.add_argument("--kl_estimator", choices=["k1", "k3"], default="k1")
    parser.add_argument("--whiten_rewards", action="store_true")
    parser.add_argument("--missing_eos_penalty", type=float)
    parser.add_argument("--dropout", type=float, default=0.0, help="of an opt: TRL says that it switches it off")
    parser.add_argument("--never_stop", action="store_true", help="all responses have gen_len tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import numpy as np
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from diptych.parity.foreign import Recording

    transformers.logging.set_verbosity_error()
    np.random.seed(options.seed)  # noqa: NPY002 (TRL shuffles with the global generator, which it does not seed)

    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocabulary |= {f"t{index}": index for index in range(4, options.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip

    def build(kind: Any, seed: int) -> Any:
        """A random model with gains and biases away from 1 and 0: initial-like weights hide most differences."""
        shared: dict[str, Any] = {
            "vocab_size": options.vocab, "hidden_size": options.d_model, "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads, "max_position_embeddings": options.prompt_len + options.gen_len + 8,
            "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 1,
        }  # fmt: skip
        if options.arch == "opt":  # it calls functional dropout, which TRL's switch does not reach
            shared |= {"ffn_dim": 4 * options.d_model, "word_embed_proj_dim": options.d_model, "init_std": 0.1}
            shared |= {"dropout": options.dropout, "attention_dropout": options.dropout}
            config = transformers.OPTConfig(**shared)
        else:
            shared |= {"intermediate_size": 4 * options.d_model, "initializer_range": 0.1, "tie_word_embeddings": False}
            shared["num_key_value_heads"] = options.heads
            config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[options.arch](**shared)
        torch.manual_seed(seed)
        model = kind.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
            if kind is transformers.AutoModelForCausalLM and options.arch != "opt":
                model.lm_head.weight[PAD] = 0  # rarely drawn: TRL takes a pad token for the end of the response
                model.lm_head.weight[EOS] *= 3  # often drawn
        return model

    language_model, classifier = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    draws = random.Random(options.seed)
    lengths = [draws.randint(max(1, options.prompt_len // 2), options.prompt_len) for _ in range(4 * options.batch)]
    prompts = [[draws.randrange(4, options.vocab) for _ in range(length)] for length in lengths]
    data = Dataset.from_dict({"input_ids": prompts})
    micro = options.micro_batch or options.batch
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // micro, num_ppo_epochs=options.ppo_epochs, num_mini_batches=1,
        total_episodes=options.batch * options.steps, response_length=options.gen_len,
        local_rollout_forward_batch_size=options.batch, temperature=options.temperature, learning_rate=options.lr,
        kl_coef=options.kl_coef, kl_estimator=options.kl_estimator, whiten_rewards=options.whiten_rewards,
        stop_token=None if options.never_stop else "eos", missing_eos_penalty=options.missing_eos_penalty,
        gradient_checkpointing=False, num_sample_generations=0, report_to="none", save_strategy="no",
        eval_strategy="no", bf16=False, fp16=False, lr_scheduler_type="constant", use_cpu=True, seed=options.seed,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=build(language_model, options.seed),
        ref_model=build(language_model, options.seed), value_model=build(classifier, options.seed + 1),
        reward_model=build(classifier, options.seed + 2), train_dataset=data, eval_dataset=data,
    )  # fmt: skip

    settings, their_names = settings_of(config)
    with Recording(
        options.output,
        producer="trl",
        precision="float32",
        dialect="trl",
        models={"policy": trainer.policy_model.config, "critic": trainer.value_model.config},
        settings=settings,
        their_names=their_names,
        tokenizers={"policy": {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_ids": [EOS]}},
        seed=options.seed,
        versions={module.__name__: module.__version__ for module in (trl, transformers, torch)},
    ) as recording:
        watch(trainer, recording)
        trainer.train()


if __name__ == "__main__":
    main()
