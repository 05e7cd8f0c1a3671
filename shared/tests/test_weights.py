"""Model directories: round trips, laziness, checks against config.json, initial weights, rotary frequencies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diptych.errors import UserError
from diptych.families.family import read_model, tensor_shapes
from diptych.families.rope import frequencies
from diptych.weights import files
from diptych.weights.contents import read_contents
from diptych.weights.files import plan_shards, stored_tensors, write_tensors
from diptych.weights.huggingface import (
    initial_checkpoint,
    read_checkpoint,
    with_scalar_head,
    write_checkpoint,
)

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
    changed = wide.weights["model.norm.weight"] + 1e-12
    wide = replace(wide, weights=dict(wide.weights) | {"model.norm.weight": changed})
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
        ("model_type", "bert", "supported families: llama"),
        ("hidden_act", "mish", "hidden_act = 'mish' is not supported"),
        ("new_trick", 3, "new_trick: not understood"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "RoPE type 'spiral' is not supported"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, r"missing \['factor'\]"),
        ("num_key_value_heads", 3, "not a multiple of num_key_value_heads = 3"),
    ],
)
def test_configs_that_we_do_not_compute_are_errors(field, value, message):
    with pytest.raises(UserError, match=message):
        read_model(CONFIG | {field: value})


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
    lacking = {name: value for name, value in broken.weights.items() if name != "model.norm.weight"}
    with pytest.raises(UserError, match="missing model.norm.weight"):
        write_checkpoint(saved, replace(broken, weights=lacking), tokenizer_directory=saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_a_write_that_dies_halfway_leaves_the_old_model(saved, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    checkpoint = initial_checkpoint(CONFIG, seed=4)
    written = []

    def dying(path, entries, fetch):
        if written:
            raise OSError("no space left on device")
        written.append(path)
        write_tensors(path, entries, fetch)

    monkeypatch.setattr("diptych.weights.huggingface.write_tensors", dying)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(saved, checkpoint, tokenizer_directory=saved, max_shard_bytes=5000)
    assert written  # a shard was there already
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    write_checkpoint(saved, checkpoint, tokenizer_directory=saved, max_shard_bytes=5000)  # canary: it can be replaced
    assert not (saved / "model.safetensors").exists()


def test_nothing_is_read_before_it_is_looked_up(saved, monkeypatch):
    reads = []
    pieces = files.StoredTensor.pieces
    monkeypatch.setattr(files.StoredTensor, "pieces", lambda self: (reads.append(self.name), pieces(self))[1])
    checkpoint = read_checkpoint(saved, precision="float32")
    assert "model.norm.weight" in checkpoint.weights
    assert len(checkpoint.weights) == len(list(checkpoint.weights)) == 21
    scalar = with_scalar_head(checkpoint, seed=0)
    assert not [name for name in reads if "layers.1" in name]  # in tests, beartype looks at a mapping's first value
    del reads[:]
    scalar.weights["model.layers.1.mlp.up_proj.weight"]
    assert reads == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError):
        checkpoint.weights["nothing"]
    with pytest.raises(ValueError, match="read-only"):  # a change would be lost at the next look-up
        checkpoint.weights["model.norm.weight"] += 1


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    import ml_dtypes

    draws = np.random.default_rng(0)
    tensors = {
        "b": draws.normal(size=(3, 5)).astype(np.float32),
        "a": draws.normal(size=7).astype(ml_dtypes.bfloat16),
        "é": draws.normal(size=(2, 2)).astype(np.float16),
        "w": draws.normal(size=3),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    entries = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    write_tensors(tmp_path / "ours", entries, lambda names: ((name, tensors[name]) for name in names))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for stored in stored_tensors(tmp_path / "theirs"):
        assert stored.read().tobytes() == tensors[stored.name].tobytes()
    tensors["b"][0, 0] += 1  # canary
    write_tensors(tmp_path / "ours", entries, lambda names: ((name, tensors[name]) for name in names))
    assert (tmp_path / "ours").read_bytes() != (tmp_path / "theirs").read_bytes()


def test_tensors_longer_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 7)
    value = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    write_tensors(tmp_path / "x", {"x": (value.dtype, value.shape)}, lambda names: [("x", value)])
    (stored,) = stored_tensors(tmp_path / "x")
    assert len(list(stored.pieces())) == 7
    assert np.array_equal(stored.read(), value)


def test_values_that_do_not_fit_are_an_error(tmp_path):
    value = np.asarray([1.0, 7e4], np.float32)
    entries = {"x": (np.dtype(np.float16), (2,))}
    with pytest.raises(UserError, match="x: a value is too large for float16"):
        write_tensors(tmp_path / "x", entries, lambda names: [("x", value)])
    write_tensors(tmp_path / "x", entries, lambda names: [("x", np.asarray([1.0, np.inf], np.float32))])


def test_shards_are_those_of_transformers():
    sizes = {"a": 3, "b": 4, "c": 20, "d": 1, "e": 9, "f": 1}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert plan_shards(sizes, 38) == [list(sizes)]
    assert plan_shards(sizes, 1) == [[name] for name in sizes]


def test_sharded_directories_are_checked(saved, tmp_path):
    sharded = tmp_path / "sharded"
    checkpoint = read_checkpoint(saved, precision="float32")
    write_checkpoint(sharded, checkpoint, tokenizer_directory=saved, max_shard_bytes=5000)
    parts = sorted(sharded.glob("model-*.safetensors"))
    assert parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    assert len(parts) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in checkpoint.weights.values())
    again = read_checkpoint(sharded, precision="float32")
    assert all(np.array_equal(again.weights[name], value) for name, value in checkpoint.weights.items())
    index["weight_map"]["model.norm.weight"] = parts[-1].name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="the index and the files disagree about model.norm.weight"):
        read_checkpoint(sharded, precision="float32")
    parts[0].unlink()
    with pytest.raises(UserError, match="named in model.safetensors.index.json but not there"):
        read_checkpoint(sharded, precision="float32")


def test_quantised_tensors_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match="stored as I8, of which only F64, F32, BF16, F16 are read: model.norm.weight"):
        read_checkpoint(saved, precision="float32")
    assert read_contents(saved).problems


def test_what_goes_with_the_weights(saved, tmp_path):
    """Generation settings are kept, with config.json's ids and every further stop token; so are licence and base."""
    (saved / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": [1, 7], "pad_token_id": 5}))
    (saved / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n# hello\n")
    (saved / "LICENSE").write_text("MIT")
    checkpoint = read_checkpoint(saved, precision="float32")
    changed = replace(checkpoint, config=checkpoint.config | {"eos_token_id": 3})
    write_checkpoint(tmp_path / "out", changed, tokenizer_directory=saved, dtype="bfloat16")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"top_p": 0.9, "eos_token_id": [3, 1, 7], "pad_token_id": 0}
    assert (tmp_path / "out/LICENSE").read_text() == "MIT"
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card
    assert "base_model: someone/tiny" in card
    assert "AutoModelForCausalLM" in card
    assert "bfloat16" in card
    assert str(tmp_path) not in card
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_of_a_stage_names_its_run(tmp_path, tokenizer_directory):
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: postcards\nmodel: {path: /home/me/secret/tiny-base}\nseed: 3\n")
    (run / "summary.json").write_text('{"engine": "jax"}')
    checkpoint = with_scalar_head(initial_checkpoint(CONFIG, seed=0), seed=0)
    write_checkpoint(run / "models/reward", checkpoint, tokenizer_directory=tokenizer_directory)
    card = (run / "models/reward/README.md").read_text()
    assert "Stage `reward` of the run `postcards` on the jax engine" in card
    assert "base_model: tiny-base" in card
    assert "AutoModelForSequenceClassification" in card
    assert "seed: 3" in card
    assert "secret" not in card


def test_initial_weights_are_keyed_by_name():
    first, again = initial_checkpoint(CONFIG, seed=0), initial_checkpoint(CONFIG, seed=0)
    other = initial_checkpoint(CONFIG, seed=1)
    assert list(first.weights) == list(tensor_shapes(read_model(CONFIG), "lm"))
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


def frequencies_of(config):
    (row,) = frequencies(read_model(config).ropes[0])
    return row


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
    ours = frequencies_of(config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    wrong = frequencies_of(config | {"rope_parameters": rope | {"rope_theta": 20000.0}})
    assert not np.allclose(wrong, theirs, rtol=1e-3)  # canary: an ignored rope_theta is seen
    old_style = {k: v for k, v in config.items() if k != "rope_parameters"}
    scaling = {("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "rope_theta"}
    old_style |= {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if len(scaling) > 1 else {})
    assert np.array_equal(frequencies_of(old_style), ours)
