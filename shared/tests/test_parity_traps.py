"""Every trap of the table is found where it is set, and only there."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diptych.parity.doctor.setups import Fact, Setup, read_setup
from diptych.parity.doctor.traps import TRAPS, look_for_traps
from diptych.parity.doctor.vocabulary import ALIASES, MEANINGS, canonical

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "initializer_range": 0.02, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
}  # fmt: skip


def facts(values):
    return {
        key: Fact(value=value, where=f"file.json:{number}") for number, (key, value) in enumerate(values.items(), 1)
    }


def setup(
    config=None, *, engine="trl", variables=None, hardware=None, tokenizer=None, weights=None, depth=None, **settings
):
    """A foreign trainer's, from its settings."""
    groups = {
        "settings": facts(settings), "variables": facts(variables or {}), "hardware": facts(hardware or {}),
        "tokenizer": facts(tokenizer or {}), "weights": facts(weights or {}),
    }  # fmt: skip
    models = {} if config is None else {"policy": facts(config)}
    return Setup(source=Path("x"), kind="trace", engine=engine, facts=groups, models=models, depth=depth)


def verdict(number, *setups):
    return next(one for one in look_for_traps(*setups) if one.trap.number == number)


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


GPU, CPU = {"platform": "gpu"}, {"platform": "cpu"}
# (trap, a setup that is in it, one that is not)
SINGLE = [
    (1, setup(without(LLAMA, "hidden_act")), setup(LLAMA)),
    (1, setup(without(GPT2, "activation_function")), setup(GPT2)),
    (1, setup({**LLAMA, "model_type": "gemma2", "hidden_act": "gelu"}),
     setup({**LLAMA, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"})),
    (2, setup(without(LLAMA, "rms_norm_eps")), setup(LLAMA)),
    (2, setup(without(GPT2, "layer_norm_epsilon")), setup(GPT2)),
    (3, setup(fast_variance=True), setup(fast_variance=False)),
    (4, setup(logprob_precision="bfloat16"), setup(logprob_precision="float32")),
    (4, setup(norm_precision="bfloat16"), setup(norm_precision="float32")),
    (6, setup(samples_per_prompt=8, group_std_eps=1e-8), setup(samples_per_prompt=8, group_std_eps=1e-4)),
    (6, setup(samples_per_prompt=8, group_std_eps=1e-8),
     setup(samples_per_prompt=8, group_std_eps=1e-8, constant_group="zero")),
    (7, setup(engine="tunix", label_mask="ignore_index"), setup(engine="tunix", label_mask="mask")),
    (7, setup(engine="tunix", label_mask=-100), setup(engine="trl", label_mask="ignore_index")),
    (8, setup(LLAMA, tokenizer={"policy/vocab_size": 65}), setup(LLAMA, tokenizer={"policy/vocab_size": 64})),
    (8, setup({**LLAMA, "pad_token_id": 64}), setup(LLAMA)),
    (9, setup(attention_mask="-inf"), setup(attention_mask="where")),
    (10, setup(pad_side="left", position_ids="arange"), setup(pad_side="left", position_ids="mask")),
    (10, setup(pad_side="right"), setup(pad_side="left")),
    (10, setup(tokenizer={"policy/padding_side": "right"}), setup(tokenizer={"policy/padding_side": "left"})),
    (11, setup({**LLAMA, "rope_scaling.type": "linear", "rope_scaling.factor": 2.0}),
     setup({**LLAMA, "rope_parameters.rope_type": "default"})),
    (11, setup({**LLAMA, "rope_parameters.type": "linear"}), setup({**LLAMA, "rope_scaling": None})),
    (11, setup(LLAMA, rope_precision="bfloat16"), setup(LLAMA, rope_precision="float32")),
    (12, setup(hardware=GPU, matmul_precision="default"), setup(hardware=GPU, matmul_precision="highest")),
    (12, setup(hardware=GPU, variables={"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}),
     setup(hardware=CPU, variables={"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"})),
    (12, setup(variables={"NVIDIA_TF32_OVERRIDE": "1"}), setup(variables={"NVIDIA_TF32_OVERRIDE": "0"})),
    (12, setup(tf32=True), setup(tf32=False)),
    (13, setup(variables={"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}),
     setup(variables={"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"})),
    (13, setup(variables={"XLA_FLAGS": "--a=1 --xla_allow_excess_precision"}),
     setup(variables={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})),
    (13, setup(bf16_reduced_reduction=True, precision="bfloat16"),
     setup(bf16_reduced_reduction=True, precision="float32")),
    (15, setup(eps_placement="eps_hat"), setup(eps_placement="algorithm_1")),
    (18, setup(schedule="linear", schedule_offset=1), setup(schedule="linear", schedule_offset=0)),
    (19, setup(gradient_accumulation="mean_of_means", batch_size=8, micro_batch_size=2),
     setup(gradient_accumulation="token_mean", batch_size=8, micro_batch_size=2)),
    (20, setup(init="framework default"), setup(init="checkpoint")),
    (21, setup({**GPT2, "attn_pdrop": 0.1}), setup(GPT2)),
    (21, setup({**LLAMA, "attention_dropout": 0.1}), setup({**LLAMA, "attention_dropout": 0.0})),
    (21, setup({**GPT2, "resid_pdrop": 0.1}), setup({**GPT2, "resid_pdrop": 0.1}, disable_dropout=True)),
    (21, setup(dropout=0.1), setup(dropout=0.0)),
    (22, setup(temperature=0.7, logprob_temperature=1.0), setup(temperature=0.7, logprob_temperature=0.7)),
    (23, setup(top_k=50, precision="bfloat16"), setup(top_k=50, precision="float32")),
    (24, setup(clip_gradient="clamp"), setup(clip_gradient="where")),
    (25, setup(double_where=False), setup(double_where=True)),
    (26, setup(promotion="standard"), setup(promotion="strict")),
    (27, setup(precision="float64", variables={"JAX_ENABLE_X64": "0"}),
     setup(precision="float64", variables={"JAX_ENABLE_X64": "1"})),
    (27, setup(precision="float64", x64=False), setup(precision="float64", x64=True)),
    (28, setup(attention_mask="add"), setup(attention_mask="where")),
    (33, setup(value_loss_max="max(dim)"), setup(value_loss_max="maximum")),
    (34, setup(sum_precision="bfloat16"), setup(sum_precision="float32")),
    (35, setup(epochs=1, mini_batches=1), setup(epochs=2, mini_batches=1)),
    (35, setup(epochs=1, mini_batches=1, engine="jax", depth="metrics"),
     setup(epochs=1, mini_batches=1, engine="jax", depth="tensors")),
    (35, setup(epochs=1, mini_batches=1), setup(epochs=1, mini_batches=1, perturbation=0.3)),
    (36, setup(max_prompt_tokens=16, max_new_tokens=16), setup(max_prompt_tokens=32, max_new_tokens=32)),
    (38, setup(precision="bfloat16"), setup(precision="float32")),
    (40, setup({**LLAMA, "pad_token_id": 1}, masks_from="ids"),
     setup({**LLAMA, "pad_token_id": 1}, masks_from="lengths")),
    (40, setup({**LLAMA, "pad_token_id": 1}, masks_from="ids"), setup(LLAMA, masks_from="ids")),
    (40, setup(tokenizer={"policy/pad_token_id": 2, "policy/eos_token_ids": [1, 2]}, masks_from="ids"),
     setup(tokenizer={"policy/pad_token_id": 0, "policy/eos_token_ids": [1, 2]}, masks_from="ids")),
    (41, setup(score_clip=5.0), setup(score_clip=None)),
    (42, setup(trains_stop=False), setup(trains_stop=True)),
]  # fmt: skip
# (trap, what A has, what B has): set between the two, clear between A and itself
PAIRS = [
    (1, {"config": {**GPT2, "activation_function": "gelu"}}, {"config": {**GPT2, "activation_function": "gelu_new"}}),
    (1, {"config": {**GPT2, "activation_function": "gelu"}}, {"activation": "tanh"}),
    (2, {"config": {**LLAMA, "rms_norm_eps": 1e-6}}, {"config": LLAMA}),
    (2, {"config": {**GPT2, "layer_norm_epsilon": 1e-6}}, {"config": GPT2}),
    (5, {"whiten_ddof": 0}, {"whiten_ddof": 1}),
    (5, {"whiten_eps": 1e-8}, {"whiten_eps": 1e-5}),
    (14, {"weight_decay": 0.0}, {"weight_decay": 0.01}),
    (15, {"eps": 1e-8, "eps_placement": "algorithm 1"}, {"eps": 1e-5, "eps_placement": "algorithm 1"}),
    (15, {"betas": [0.9, 0.95], "eps_placement": "outside"}, {"betas": [0.9, 0.999], "eps_placement": "outside"}),
    (16, {"weight_decay": 0.1, "weight_decay_mask": "all"}, {"weight_decay": 0.1, "weight_decay_mask": "matrices"}),
    (17, {"clip_norm_eps": 1e-6}, {"clip_norm_eps": 0.0}),
    (17, {"max_grad_norm": 1.0}, {"max_grad_norm": None}),
    (18, {"schedule_offset": 0, "warmup_steps": 10}, {"schedule_offset": 0, "warmup_steps": 20}),
    (19, {"gradient_accumulation": "token_mean"}, {"gradient_accumulation": "sequence_mean"}),
    (20, {"weights": {"policy": "a" * 64}, "init": "x"}, {"weights": {"policy": "b" * 64}, "init": "x"}),
    (22, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_k": 40}),
    (22, {"temperature": 1.0}, {"temperature": 0.9}),
    (29, {"log_ratio_clamp": 20.0}, {"log_ratio_clamp": None}),
    (30, {"micro_batch_size": 8}, {"micro_batch_size": 4}),
    (31, {"weights": {"policy/tensors": 12}}, {"weights": {"policy/tensors": 14}}),
    (32, {"kl_estimator": "k1"}, {"kl_estimator": "k3"}),
    (32, {"kl_place": "reward"}, {"kl_place": "loss"}),
    (41, {"score_clip": None}, {"score_clip": 5.0}),
]  # fmt: skip


@pytest.mark.parametrize(("number", "trapped", "free"), SINGLE)
def test_a_trap_is_seen_where_it_is_set_and_not_elsewhere(number, trapped, free):
    found = verdict(number, trapped)
    assert found.state == "SET"
    assert all(one.where.startswith("file.json") and one.found and one.instead for one in found.findings)
    assert verdict(number, free).state in ("clear", "not applicable")


@pytest.mark.parametrize(("number", "a", "b"), PAIRS)
def test_a_difference_that_is_a_trap_is_seen_in_either_order(number, a, b):
    left, right = setup(**a), setup(**b)
    assert verdict(number, left, right).state == "SET"
    assert verdict(number, right, left).state == "SET"
    assert verdict(number, left, setup(**a)).state in ("clear", "not applicable")


def test_every_number_is_there_once_and_every_check_has_a_case():
    assert [trap.number for trap in TRAPS] == list(range(1, 43))
    assert all(trap.look for trap in TRAPS)
    covered = {number for number, *_ in (*SINGLE, *PAIRS)} | {37, 39}  # these two below, on files
    assert covered == {trap.number for trap in TRAPS}


def test_a_setup_that_says_nothing_is_clear_of_nothing():
    """The canary of the whole list: not known is never clear."""
    states = {one.state for one in look_for_traps(setup())}
    assert states == {"cannot be seen from here"}
    told = verdict(14, setup(weight_decay=0.0), setup())
    assert told.state == "cannot be seen from here"


def test_config_dropout_counts_for_other_trainers_only():
    config = {**GPT2, "attn_pdrop": 0.1}
    ours = setup(config, engine="jax")
    assert verdict(21, ours, setup(config, engine="torch")).state == "clear"
    assert verdict(21, ours, setup(config, engine="trl")).state == "SET"


def test_what_to_write_is_b_s_line_with_a_s_value():
    (finding,) = verdict(14, setup(weight_decay=0.0), setup(lr=1.0, weight_decay=0.01)).findings
    assert (finding.where, finding.instead) == ("file.json:2", "weight_decay: 0.0")
    assert finding.found == "weight_decay is 0.01, and 0.0 at file.json:1"


# On files.


def model_directory(path, config, tensors=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    return path


def llama_tensors(*, std=0.02, gain=1.0):
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,),
        "model.layers.0.input_layernorm.weight": (16,), "model.layers.0.post_attention_layernorm.weight": (16,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (32, 16), "model.layers.0.mlp.up_proj.weight": (32, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 32),
    }  # fmt: skip
    return {
        name: np.full(shape, gain, np.float32) if len(shape) == 1 else (rng.normal(size=shape) * std).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_weights_like_new_are_recognised(tmp_path):
    cases = {"new": {}, "hot": {"std": 0.15}, "trained": {"gain": 1.01}}
    states = {
        name: verdict(37, read_setup(model_directory(tmp_path / name, LLAMA, llama_tensors(**options)))).state
        for name, options in cases.items()
    }
    assert states == {"new": "SET", "hot": "clear", "trained": "clear"}


def test_tied_embeddings_stored_twice_are_compared(tmp_path):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert verdict(39, read_setup(model_directory(tmp_path / "same", LLAMA, tensors))).state == "clear"
    tensors["lm_head.weight"][3, 3] += 1
    found = verdict(39, read_setup(model_directory(tmp_path / "other", LLAMA, tensors)))
    assert found.state == "SET"
    line = 1 + [*LLAMA].index("tie_word_embeddings") + 1
    assert found.findings[0].where == f"{tmp_path}/other/config.json:{line}"


def test_findings_name_the_line_of_config_json(tmp_path):
    config = {**GPT2, "task_specific_params": {"x": {"attn_pdrop": 0.0}}, "attn_pdrop": 0.1}
    (finding,) = verdict(21, read_setup(model_directory(tmp_path / "m", config))).findings
    line = (tmp_path / "m/config.json").read_text().splitlines().index('  "attn_pdrop": 0.1,') + 1
    assert finding.where == f"{tmp_path}/m/config.json:{line}"
    assert finding.instead == '"attn_pdrop": 0.0'


RECIPE = """\
name: small
stages: [rl]
model: {path: somewhere}
data:
  prompts: {path: "task:postcards", limit: 64}
  max_prompt_tokens: 64
rl:
  reward: {function: "reward.py:score"}
"""


@pytest.mark.parametrize(
    ("number", "text", "line"),
    [
        (35, RECIPE + "  epochs: 1\n", "9"),
        (36, RECIPE.replace("64\nrl", "8\nrl") + "rollout: {max_new_tokens: 8}\n", "6"),
        (38, "precision: bfloat16\n" + RECIPE, "1"),
        (41, RECIPE + "  score_clip: 2.0\n", "9"),
        (41, RECIPE + "  dialect: dschat\n", "9"),
        (41, RECIPE.replace("data:\n", "data:\n  too_long: truncate\n"), "5"),
        (42, RECIPE + "  dialect: dschat\n", "9"),
    ],
)
def test_findings_name_the_line_of_the_recipe(tmp_path, number, text, line):
    clean, trapped = tmp_path / "clean.yaml", tmp_path / "trapped.yaml"
    clean.write_text(RECIPE)
    trapped.write_text(text)
    assert [one.trap.number for one in look_for_traps(read_setup(clean)) if one.state == "SET"] == []
    assert [one.where for one in verdict(number, read_setup(trapped)).findings] == [f"{trapped}:{line}"]


def test_a_new_model_that_goes_untrained_into_rl_is_like_new(tmp_path):
    new = RECIPE.replace(
        "{path: somewhere}",
        "{new: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 2, max_position_embeddings: 512}}",
    ).replace("data:\n", 'data:\n  demonstrations: {path: "task:postcards", limit: 64}\n')
    path = tmp_path / "new.yaml"
    path.write_text(new)
    assert verdict(37, read_setup(path)).state == "SET"
    path.write_text(new.replace("[rl]", "[sft, rl]"))
    assert verdict(37, read_setup(path)).state == "clear"


def test_settings_of_other_trainers_go_by_one_name():
    found = canonical({"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8, "own_thing": 3, "lr": 1.0})
    assert found == {
        "betas": ("adam_beta1", [0.9, 0.99]), "eps": ("adam_epsilon", 1e-8), "own_thing": ("own_thing", 3),
        "learning_rate": ("lr", 1.0),
    }  # fmt: skip
    assert canonical({"rl.optimizer.eps": 1.0, "rl.optimizer.name": "adamw"}) == {
        "eps": ("rl.optimizer.eps", 1.0), "optimizer": ("rl.optimizer.name", "adamw")
    }  # fmt: skip
    assert canonical({"dialect": "trl"})["whiten_ddof"] == ("dialect", 1)
    assert canonical({"lr": 1.0, "learning_rate": 2.0}) == {"lr": ("lr", 1.0), "learning_rate": ("learning_rate", 2.0)}
    assert set(ALIASES.values()) <= set(MEANINGS)
