"""Record a Diptych trace of a PPO run of Tunix (google-tunix 0.1.7), offline, on random Qwen2 models of any size.

    python3.11 -m venv tunix
    tunix/bin/pip install torch==2.13.0 google-tunix==0.1.7 jax==0.10.2
    PYTHONPATH=shared tunix/bin/python scripts/parity/tunix_ppo.py --output tunix-trace

The adapter is `watch`, and `watched` around each optimizer: the same lines record your own run. Rewards, values and the
KL are taken where Tunix hands them to its advantage estimator (a registered function), gradients from a link of the
optimizer chain that only remembers them. Tunix's own code is not changed.

The reward is the share of a response's tokens in the upper half of the vocabulary, a fraction: Tunix 0.1.7 makes an
array of *integers* of its rewards (ppo_learner.py, `jnp.zeros_like(jax_completion_ids)`) and truncates it to 0. The
trace holds what the function returned (scores) and what advantages were made of (shaped). With --integer_reward it is
the number of those tokens, and nothing is lost.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
PAD, BOS, EOS = range(3)


def watched(optimizer: Any) -> Any:
    """The optimizer, behind a link that keeps the gradients it was given and hands them on."""
    import jax
    import jax.numpy as jnp
    import optax

    keep = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda updates, state, params=None: (updates, updates),
    )
    return optax.chain(keep, optimizer)


def watch(learner: Any, recording: Any, *, names: Any, learning_rate: float) -> None:
    """Record every global step of a PPOLearner: its rollout, what was made of it, and the first update of both models.

    names: (tree of parameters) -> {Hugging Face name: array}.
    """
    import jax
    import numpy as np
    from flax import nnx
    from tunix.rl import common, function_registry

    from diptych.parity.foreign import Update

    cluster = learner.rl_cluster
    trainers = {"policy": cluster.actor_trainer, "critic": cluster.critic_trainer}
    seen: dict[str, Any] = {}
    reference = names(nnx.state(cluster.inference_worker._models["reference"], nnx.Param))
    count = [0]

    def between(owner: Any, name: str, look: Any) -> None:
        """Call look(result, arguments) after every call of owner.name."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            look(result, args, options)
            return result

        setattr(owner, name, wrapped)

    estimator = function_registry.get_advantage_estimator(learner.algo_config.advantage_estimator)

    @function_registry.register_advantage_estimator("watched")
    def estimate(rewards: Any, **options: Any) -> Any:
        seen["shaped"] = np.asarray(rewards, np.float32)
        return estimator(rewards=rewards, **options)

    learner.algo_config.advantage_estimator = "watched"
    between(common, "compute_kl_divergence", lambda result, *_: seen.__setitem__("kl", np.asarray(result)))
    between(learner, "_compute_rewards", lambda result, *_: seen.__setitem__("scores", np.asarray(result)))
    between(learner, "_generate_and_compute_advantage", lambda result, *_: seen.__setitem__("example", result))

    def keep_metrics(_: Any, args: tuple, __: Any) -> None:
        numbers = {name: np.asarray(value) for name, (value, _) in args[0].items()}  # and texts
        logged = {name: float(value.mean()) for name, value in numbers.items() if value.dtype.kind in "fiu"}
        seen.setdefault("metrics", {}).update(logged)

    between(cluster, "buffer_metrics", keep_metrics)

    def updating(role: str, method: str) -> None:
        trainer, function = trainers[role], getattr(cluster, method)

        def keep_loss(_: Any, __: tuple, options: dict[str, Any]) -> None:
            norm, _ = options["additional_metrics"]["grad_norm"]
            seen[f"{role}/loss"], seen[f"{role}/norm"] = float(options["loss"]), float(norm)

        between(trainer, "_buffer_metrics", keep_loss)

        def weights() -> dict[str, Any]:
            return names(nnx.state(trainer.model, nnx.Param))

        def state_of() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
            """Gradients, first and second moments."""
            state = nnx.pure(trainer.optimizer.opt_state)
            state = getattr(state, "inner_opt_state", state)  # Tunix puts MultiSteps around what it is given
            gradients, (adam, *_) = jax.tree.map(np.asarray, state)
            return names(gradients), names(adam.mu), names(adam.nu)

        def update(*args: Any, **options: Any) -> None:
            first = role not in seen
            before, (_, mu, nu), updates = weights(), state_of(), trainer.train_steps
            function(*args, **options)
            if first:
                gradients, mu_after, nu_after = state_of()
                loss = seen[f"{role}/loss"]
                seen[role] = Update(
                    weights_before=before,
                    gradients=gradients,
                    weights_after=weights(),
                    first_before=mu,
                    second_before=nu,
                    first_after=mu_after,
                    second_after=nu_after,
                    loss=loss,
                    metrics={"loss/policy_avg" if role == "policy" else "loss/value_avg": loss},
                    grad_norm=seen[f"{role}/norm"],
                    learning_rate=learning_rate,
                    updates=updates,
                )

        setattr(cluster, method, update)

    updating("policy", "update_actor")
    updating("critic", "update_critic")

    def record(*_: Any) -> None:
        it = seen["example"]
        mask = np.asarray(it.completion_mask, bool)
        recording.ppo_step(
            prompts=it.prompt_ids,
            prompt_mask=it.prompt_mask,
            responses=it.completion_ids,
            response_mask=mask,
            logprobs=it.old_per_token_logps,
            ref_logprobs=it.ref_per_token_logps,
            values=it.old_values,
            scores=seen["scores"].astype(np.float32),
            kl=np.where(mask, seen["kl"], 0).sum(axis=1),
            shaped=seen["shaped"],
            returns=it.returns,
            advantages=it.advantages,
            policy=seen["policy"],
            critic=seen["critic"],
            reference_weights=None if count[0] else reference,
            metrics=seen["metrics"],
        )
        count[0] += 1
        print({name: round(value, 5) for name, value in seen["metrics"].items() if name.startswith("rewards/")})
        seen.clear()

    between(learner, "_run_global_step", record)


def qwen2_names(config: Any) -> Any:
    """Tunix's parameters of a Qwen2 by Hugging Face names, in the checkpoint's layout: its own table, backwards."""
    import numpy as np
    from flax import nnx
    from tunix.models.qwen2.params import _get_key_and_transform_mapping

    table = []
    for theirs, (own, change) in _get_key_and_transform_mapping(config).items():
        pattern = re.escape(own).replace(re.escape(r"\1"), r"(\d+)")
        table.append((re.compile(pattern), theirs.replace("([0-9]+)", "{}").replace("\\.", "."), change))

    def names(tree: Any) -> dict[str, np.ndarray]:
        found = {}
        for path, value in nnx.to_flat_state(tree):
            array, key = np.asarray(getattr(value, "value", value)), ".".join(str(part) for part in path)
            if key == "lm_head.kernel":  # a critic's head
                found["score.weight"] = array.T
                continue
            match, name, change = next((m, n, c) for p, n, c in table if (m := p.fullmatch(key)) for n, c in [(n, c)])
            if change is not None:
                if array.ndim == 3:
                    width = array.shape[-1] if "o_proj" in key else array.shape[0]
                    array = array.reshape((-1, width) if "o_proj" in key else (width, -1))
                array = array.T
            found[name.format(*match.groups())] = array
        return found

    return names


class IntegerTokenizer:
    """Text is token ids with spaces between."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in str(text).split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(one)) for one in ids)

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return PAD


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output", required=True, help="a new directory for the trace")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="prompts of an iteration (default: 16)")
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--ppo-epochs", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of every tensor (default: optax's 1e-4)")
    parser.add_argument("--integer_reward", action="store_true", help="count tokens instead of their share")
    parser.add_argument("--with-eos", action="store_true", help="EOS ends responses (and is cut off by Tunix)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.rl import rl_cluster, utils
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout import base_rollout

    from diptych.parity.foreign import Recording

    def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        rows = [[int(word) for word in text.split()] for text in completions]
        upper = [sum(token >= options.vocab // 2 for token in row) for row in rows]
        return [float(n) if options.integer_reward else n / max(len(r), 1) for n, r in zip(upper, rows, strict=True)]

    config = qwen2.ModelConfig(
        num_layers=options.layers, vocab_size=options.vocab, embed_dim=options.d_model,
        hidden_dim=4 * options.d_model, num_heads=options.heads, head_dim=options.d_model // options.heads,
        num_kv_heads=options.heads, rope_theta=1_000_000, norm_eps=1e-5, use_tied_embedding=False,
        dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip
    huggingface = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": options.vocab,
        "hidden_size": options.d_model, "intermediate_size": 4 * options.d_model,
        "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads, "max_position_embeddings": options.prompt_len + options.gen_len + 8,
        "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "use_sliding_window": False, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def heat(model: Any, seed: int) -> Any:
        """Gains and biases away from 1 and 0: initial-like weights hide most differences."""
        graph, state = nnx.split(model)
        draws = np.random.default_rng(seed)
        paths = [(path, np.asarray(value[...])) for path, value in nnx.to_flat_state(state)]
        new = []
        for path, value in paths:
            noise = draws.normal(0, 0.1 if value.ndim > 1 else 0.2, value.shape)
            array = noise + (0 if value.ndim > 1 or "bias" in str(path[-1]) else 1)
            if path[0] == "lm_head" and array.shape[-1] == options.vocab:
                array[:, PAD] = 0  # rarely drawn: Tunix takes every pad token for padding
                array[:, EOS] *= 3 if options.with_eos else 1  # often drawn
            new.append(jnp.asarray(array, jnp.float32))
        leaves, tree = jax.tree.flatten(state)
        assert len(leaves) == len(new)
        return nnx.merge(graph, jax.tree.unflatten(tree, new))

    with jax.set_mesh(mesh):
        actor = heat(qwen2.Qwen2(config, rngs=nnx.Rngs(options.seed)), options.seed)
        reference = heat(qwen2.Qwen2(config, rngs=nnx.Rngs(options.seed)), options.seed)
    with mesh:
        critic = heat(utils.create_critic_model(actor, seed=options.seed + 1), options.seed + 1)

    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.CRITIC, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    optimizers = [watched(optax.adamw(options.lr, weight_decay=options.weight_decay)) for _ in range(2)]
    cluster = rl_cluster.RLCluster(
        actor=actor, critic=critic, reference=reference, tokenizer=IntegerTokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla", offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizers[0], critic_optimizer=optimizers[1], eval_every_n_steps=10**9,
                max_steps=10**9, mini_batch_size=options.batch, train_micro_batch_size=options.batch,
                rollout_micro_batch_size=options.batch, compute_logps_micro_batch_size=options.batch,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=options.gen_len, max_prompt_length=options.prompt_len,
                kv_cache_size=options.prompt_len + options.gen_len, temperature=options.temperature, top_p=1.0,
                top_k=None, eos_tokens=None if options.with_eos else [options.vocab + 7],
            ),
        ),
    )  # fmt: skip
    ppo = ppo_learner.PPOConfig(num_iterations=options.ppo_epochs, beta=options.beta)
    learner = ppo_learner.PPOLearner(rl_cluster=cluster, reward_fns=reward, ppo_config=ppo)

    settings = {
        "learning_rate": options.lr, "critic_learning_rate": options.lr, "schedule": "constant", "optimizer": "adamw",
        "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": options.weight_decay, "weight_decay_mask": "all",
        "max_grad_norm": None, "batch_size": options.batch, "micro_batch_size": options.batch,
        "epochs": ppo.num_iterations, "mini_batches": 1, "kl_coef": ppo.beta,
        "kl_estimator": {"kl": "k1", "mse_kl": "k2", "low_var_kl": "k3"}[ppo.kl_method], "gamma": ppo.gamma,
        "lam": ppo.gae_lambda, "clip_range": ppo.epsilon, "value_clip_range": ppo.clip_range_value,
        "value_coef": 1.0, "whiten_rewards": False, "temperature": options.temperature, "top_k": 0, "top_p": 1.0,
        "max_new_tokens": options.gen_len, "masks_from": "ids", "score_slot": "stop", "whiten_ddof": 1,
    }  # fmt: skip
    their_names = {
        "kl_coef": "PPOConfig.beta", "kl_estimator": "PPOConfig.kl_method", "lam": "PPOConfig.gae_lambda",
        "clip_range": "PPOConfig.epsilon", "value_clip_range": "PPOConfig.clip_range_value",
        "epochs": "PPOConfig.num_iterations", "max_new_tokens": "RolloutConfig.max_tokens_to_generate",
    }  # fmt: skip

    def batches() -> Any:
        draws = np.random.default_rng(options.seed)
        for _ in range(options.iters):
            lengths = draws.integers(options.prompt_len // 2, options.prompt_len, options.batch)  # and BOS
            rows = [draws.integers(3, options.vocab, length) for length in lengths]
            yield {"prompts": np.array([" ".join(map(str, row)) for row in rows])}

    with Recording(
        options.output,
        producer="tunix",
        precision="float32",
        models={"policy": huggingface, "critic": huggingface},
        settings=settings,
        their_names=their_names,
        dialect="verl",
        tokenizers={"policy": {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_ids": [EOS]}},
        seed=options.seed,
        versions={"tunix": version("google-tunix"), "jax": jax.__version__, "optax": version("optax")},
    ) as recording:
        watch(learner, recording, names=qwen2_names(config), learning_rate=options.lr)
        learner.train(batches())


if __name__ == "__main__":
    main()
