"""Adapters on disk: PEFT reads ours, we read PEFT's, and what is not computed is refused."""

import json

import numpy as np
import pytest

from diptych.engine import AdapterSpec
from diptych.errors import UserError
from diptych.families.adapter import adapter_shapes, initial_adapter, merge
from diptych.families.family import read_model, tensor_shapes
from diptych.weights.adapters import Adapter, read_adapter, write_adapter

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
SPEC = AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "mlp.down_proj"))


def _hot(config, spec, seed=0):
    draws = np.random.default_rng(seed)
    shapes = adapter_shapes(read_model(config), spec)
    return {name: draws.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_round_trip_is_exact(tmp_path):
    model = read_model(LLAMA)
    adapter = Adapter(spec=SPEC, weights=_hot(LLAMA, SPEC))
    write_adapter(tmp_path / "a", adapter, model, "lm", base="base", tokenizer_directory=tmp_path)
    again = read_adapter(tmp_path / "a", model, "lm", precision="float32")
    assert again.spec.scale == 2.0
    assert again.weights.keys() == adapter.weights.keys()
    for name, value in adapter.weights.items():
        assert np.array_equal(again.weights[name], value)


def test_a_new_adapter_changes_nothing_and_is_keyed_by_name():
    model = read_model(LLAMA)
    first = initial_adapter(model, SPEC, seed=1)
    draws = np.random.default_rng(0)
    weights = {name: draws.normal(0, 1, shape) for name, shape in tensor_shapes(model, "lm").items()}
    merged = merge(model, SPEC, weights, first)
    assert all(np.array_equal(merged[name], value) for name, value in weights.items())
    wider = initial_adapter(model, AdapterSpec(rank=3, alpha=1.0, targets=("all-linear",)), seed=1)
    for name, value in first.items():
        assert np.array_equal(wider[name], value)
    hot = merge(model, SPEC, weights, _hot(LLAMA, SPEC))
    changed = {name for name, value in weights.items() if not np.array_equal(hot[name], value)}
    assert changed == {
        f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize(("config", "targets"), [(LLAMA, ("q_proj", "down_proj")), (GPT2, ("c_attn", "mlp.c_proj"))])
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_ours_and_computes_the_merged_model(config, targets, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    model, spec = read_model(config), AdapterSpec(rank=3, alpha=6.0, targets=targets)
    weights = _hot(config, spec)
    write_adapter(
        tmp_path / "a", Adapter(spec=spec, weights=weights), model, "lm", base="", tokenizer_directory=tmp_path
    )
    settings = {name: value for name, value in config.items() if name != "model_type"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()
    held = {name: value.detach().numpy().copy() for name, value in base.named_parameters()}
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        theirs = adapted(tokens).logits
        merged = merge(model, spec, held, weights)
        twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).eval()
        twin.load_state_dict({name: torch.tensor(value) for name, value in merged.items()}, strict=False)
        twin.tie_weights()
        ours = twin(tokens).logits
    assert (theirs - ours).abs().max() < 2e-5
    assert (theirs - plain).abs().max() > 1e-3  # canary: a forgotten adapter is seen
    adapted.save_pretrained(tmp_path / "b")
    again = read_adapter(tmp_path / "b", model, "lm", precision="float32")
    assert all(np.array_equal(again.weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora = True is not supported"),
        ("use_rslora", True, "use_rslora = True is not supported"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
        ("target_modules", ".*q_proj", "a pattern; only a list"),
        ("target_modules", ["nothing"], "'nothing' names no linear layer of this model: mlp.down_proj"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("r", 4, r"lora_A.weight has shape \[3, 24\], the model needs \[4, 24\]"),
    ],
)
def test_what_is_not_computed_is_refused(field, value, message, tmp_path):
    model = read_model(LLAMA)
    adapter = Adapter(spec=SPEC, weights=_hot(LLAMA, SPEC))
    write_adapter(tmp_path / "a", adapter, model, "lm", base="base", tokenizer_directory=tmp_path)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a", model, "lm", precision="float32")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    model, weights = read_model(LLAMA), _hot(LLAMA, SPEC)
    missing = dict(list(weights.items())[1:])
    with pytest.raises(UserError, match=r"missing or left over base_model\.model\.model\.layers\.0"):
        write_adapter(
            tmp_path / "a", Adapter(spec=SPEC, weights=missing), model, "lm", base="", tokenizer_directory=tmp_path
        )
    with pytest.raises(UserError, match=r"score\.weight is missing"):
        write_adapter(
            tmp_path / "a", Adapter(spec=SPEC, weights=weights), model, "scalar", base="", tokenizer_directory=tmp_path
        )
    assert not (tmp_path / "a").exists()
