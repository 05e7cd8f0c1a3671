"""Model directories: round trips, checks against config.json, initial weights, rotary frequencies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diptych.errors import UserError
from diptych.weights.huggingface import (
    initial_checkpoint,
    read_checkpoint,
    with_scalar_head,
    write_checkpoint,
)
from diptych.weights.llama import inverse_frequencies, parse_config, tensor_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def tokenizer_directory(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text('{"version": "1.0", "exact bytes": true }')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def saved(tmp_path, tokenizer_directory):
    directory = tmp_path / "model"
    write_checkpoint(directory, initial_checkpoint(CONFIG, seed=3), tokenizer_directory=tokenizer_directory)
    return directory


def test_round_trip_is_exact_and_complete(saved, tokenizer_directory, tmp_path):
    first = read_checkpoint(saved, precision="float32")
    write_checkpoint(tmp_path / "again", first, tokenizer_directory=saved)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tokenizer_directory / "tokenizer.json").read_bytes()
    names = {path.name for path in saved.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"}
    assert json.loads((saved / "generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 0}
    assert not list(tmp_path.glob("*.partial"))


def test_float64_weights_keep_their_bits(saved, tmp_path):
    wide = read_checkpoint(saved, precision="float64")
    wide.weights["model.norm.weight"] += 1e-12
    write_checkpoint(tmp_path / "wide", wide, tokenizer_directory=saved)
    again = read_checkpoint(tmp_path / "wide", precision="float64")
    assert np.array_equal(again.weights["model.norm.weight"], wide.weights["model.norm.weight"])
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float64"


@pytest.mark.parametrize(
    ("head", "auto"), [("lm", "AutoModelForCausalLM"), ("scalar", "AutoModelForSequenceClassification")]
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_we_write(saved, tmp_path, head, auto):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = read_checkpoint(saved, precision="float32")
    if head == "scalar":
        checkpoint = with_scalar_head(checkpoint, seed=0)
    write_checkpoint(tmp_path / "out", checkpoint, tokenizer_directory=saved)
    model, info = getattr(transformers, auto).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in checkpoint.weights.items())
    if head == "scalar":
        assert model.config.num_labels == 1


def test_sharded_bfloat16_and_old_tables_are_read(saved, tmp_path):
    import ml_dtypes

    tensors = load_file(saved / "model.safetensors")
    names = sorted(tensors)
    sharded = tmp_path / "sharded"
    shutil.copytree(saved, sharded)
    (sharded / "model.safetensors").unlink()
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in halves.items():
        save_file({name: tensors[name].astype(ml_dtypes.bfloat16) for name in part}, sharded / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = read_checkpoint(sharded, precision="float32")
    for name, value in tensors.items():
        assert np.array_equal(read.weights[name], value.astype(ml_dtypes.bfloat16).astype(np.float32))


def edited(directory: Path, change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.extra": np.ones(2, np.float32)}), "left over model.extra"),
        (
            lambda t: t.update({"lm_head.weight": np.ones((41, 16), np.float32)}),
            r"lm_head.weight has shape \[41, 16\], config.json says \[40, 16\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_errors(saved, change, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(edited(saved, change), precision="float32")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "supported families: llama"),
        ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "RoPE type 'yarn' is not supported"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, r"missing \['factor'\]"),
        ("num_key_value_heads", 3, "not a multiple of num_key_value_heads = 3"),
    ],
)
def test_configs_that_we_do_not_compute_are_errors(field, value, message):
    with pytest.raises(UserError, match=message):
        parse_config(CONFIG | {field: value})


def test_broken_directories(tmp_path, saved):
    with pytest.raises(UserError, match="no such model directory"):
        read_checkpoint(tmp_path / "nowhere", precision="float32")
    (saved / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_checkpoint(saved, precision="float32")
    (saved / "config.json").write_text("{oops")
    with pytest.raises(UserError, match=r"config.json:1: not valid JSON"):
        read_checkpoint(saved, precision="float32")


def test_a_failed_write_leaves_the_old_model(saved):
    before = (saved / "model.safetensors").read_bytes()
    broken = initial_checkpoint(CONFIG, seed=4)
    broken.weights.pop("model.norm.weight")
    with pytest.raises(UserError, match="missing model.norm.weight"):
        write_checkpoint(saved, broken, tokenizer_directory=saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_initial_weights_are_keyed_by_name():
    first, again = initial_checkpoint(CONFIG, seed=0), initial_checkpoint(CONFIG, seed=0)
    other = initial_checkpoint(CONFIG, seed=1)
    assert list(first.weights) == list(tensor_shapes(parse_config(CONFIG), "lm"))
    for name, value in first.weights.items():
        assert np.array_equal(value, again.weights[name])
        if name.endswith("norm.weight"):
            assert (value == 1).all()
        else:
            assert not np.array_equal(value, other.weights[name])
            assert value.std() == pytest.approx(0.02, rel=0.2)
    deeper = initial_checkpoint(CONFIG | {"num_hidden_layers": 3}, seed=0)
    assert np.array_equal(
        deeper.weights["model.layers.1.mlp.up_proj.weight"], first.weights["model.layers.1.mlp.up_proj.weight"]
    )


def test_scalar_heads():
    checkpoint = initial_checkpoint(CONFIG, seed=0)
    zero = with_scalar_head(checkpoint, seed=0, zero=True)
    assert zero.head == "scalar"
    assert "lm_head.weight" not in zero.weights
    assert (zero.weights["score.weight"] == 0).all()
    head = with_scalar_head(checkpoint, seed=0).weights["score.weight"]
    assert head.std() == pytest.approx(17**-0.5, rel=0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_rotary_frequencies_are_those_of_transformers(rope):
    pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = CONFIG | {"rope_parameters": rope, "head_dim": 64, "max_position_embeddings": 131072}
    theirs = modeling.LlamaRotaryEmbedding(modeling.LlamaConfig(**config)).inv_freq.numpy()
    ours = inverse_frequencies(parse_config(config))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    wrong = inverse_frequencies(parse_config(config | {"rope_parameters": rope | {"rope_theta": 20000.0}}))
    assert not np.allclose(wrong, theirs, rtol=1e-3)  # canary: an ignored rope_theta is seen
    old_style = {k: v for k, v in config.items() if k != "rope_parameters"}
    scaling = {("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "rope_theta"}
    old_style |= {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if len(scaling) > 1 else {})
    assert np.array_equal(inverse_frequencies(parse_config(old_style)), ours)
