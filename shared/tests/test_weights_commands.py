"""`diptych export` and `diptych weights check`, against an engine that only holds tensors."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diptych.cli import main
from diptych.engine import Model
from diptych.errors import UserError
from diptych.weights.export import parse_size
from diptych.weights.huggingface import initial_checkpoint, with_scalar_head, write_checkpoint

CONFIG = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
NAME = "model.layers.0.self_attn.q_proj.weight"


class Engine(Model):
    """Holds what it is given, at its precision, and remembers what is asked for. Its own and only model."""

    asked: list
    bug = False

    def __init__(self, settings):
        self.settings = settings
        self.asked = []

    def model(self, spec):
        self.spec = spec
        return self

    def weights(self, names=None):
        self.asked.append(names)
        tensors = {name: np.array(self.spec.weights[name]) for name in names or self.spec.weights}
        if self.bug and NAME in tensors:
            tensors[NAME] = tensors[NAME].T.copy()
        return tensors


@pytest.fixture
def engine(monkeypatch):
    made = []

    def load(_name, settings):
        made.append(Engine(settings))
        return made[-1]

    monkeypatch.setattr("diptych.weights.export.load_engine", load)
    return made


@pytest.fixture
def model(tmp_path):
    """A bfloat16 model with one float32 tensor, in one file."""
    directory = tmp_path / "model"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    checkpoint = initial_checkpoint(CONFIG, seed=0)
    write_checkpoint(directory, checkpoint, tokenizer_directory=tokenizer, dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = np.linspace(0, 1, 16, dtype=np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tensors_of(directory: Path):
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


def report(capsys, directory, *options):
    code = main(["weights", "check", str(directory), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_export_is_byte_identical_and_goes_tensor_by_tensor(model, tmp_path, engine, capsys):
    out = tmp_path / "out"
    assert main(["export", str(model), str(out), "--engine", "jax", "--max-shard-size", "3KB"]) == 0
    assert same(tensors_of(out), tensors_of(model))
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert (out / "tokenizer.json").read_text() == "{}"
    (made,) = engine
    assert made.settings.precision == "float32"
    assert all(len(names) == 1 for names in made.asked)  # never a whole shard at once
    assert {names[0] for names in made.asked} == {name for shard in shards for name in load_file(shard)}
    capsys.readouterr()
    checksums = [report(capsys, directory)[1]["checksum"] for directory in (model, out)]
    assert checksums[0] == checksums[1] != ""
    single = tmp_path / "single"
    assert main(["export", str(model), str(single), "--engine", "torch"]) == 0
    assert (single / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_canary_an_engine_that_transposes_a_square_projection_is_seen(model, tmp_path, engine, capsys, monkeypatch):
    monkeypatch.setattr(Engine, "bug", True)
    assert main(["export", str(model), str(tmp_path / "out"), "--engine", "jax"]) == 0
    assert not same(tensors_of(tmp_path / "out"), tensors_of(model))
    capsys.readouterr()
    (_, before), (_, after) = (report(capsys, directory) for directory in (model, tmp_path / "out"))
    changed = [a["name"] for a, b in zip(before["tensors"], after["tensors"], strict=True)
               if a["checksum"] != b["checksum"]]  # fmt: skip
    assert changed == [NAME]
    assert before["checksum"] != after["checksum"]


def test_export_to_another_type_and_of_float64(model, tmp_path, engine):
    assert main(["export", str(model), str(tmp_path / "half"), "--engine", "jax", "--dtype", "float16"]) == 0
    assert {value.dtype.name for value in tensors_of(tmp_path / "half").values()} == {"float16"}
    tensors = tensors_of(model)
    tensors["model.norm.weight"] = np.random.default_rng(0).normal(size=16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(model), str(tmp_path / "wide"), "--engine", "jax"]) == 0
    assert engine[-1].settings.precision == "float64"
    assert same(tensors_of(tmp_path / "wide"), tensors)


def test_export_refuses_what_it_would_overwrite(model, tmp_path, engine, capsys):
    before = tensors_of(model)
    assert main(["export", str(model), str(model), "--engine", "jax"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert same(tensors_of(model), before)
    assert main(["export", str(model), str(tmp_path / "x"), "--engine", "jax", "--max-shard-size", "5 apples"]) == 2
    assert not engine


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("500mb", 5 * 10**8), ("1.5KB", 1500), ("77", 77)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
    with pytest.raises(UserError, match="write it as 5GB"):
        parse_size(text + "!")


def test_check_prints_the_map(model, capsys):
    code, found = report(capsys, model)
    assert code == 0
    assert found["problems"] == []
    assert (found["family"], found["head"]) == ("llama", "lm")
    assert found["parameters"] == sum(value.size for value in tensors_of(model).values())
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name[NAME]["slots"] == ["query[0]"]
    assert by_name[NAME]["how"] == "(n h) d -> d n h"
    assert by_name[NAME]["dtype"] == "bfloat16"
    assert by_name["model.norm.weight"]["how"] == ""
    assert main(["weights", "check", str(model)]) == 0
    text = capsys.readouterr().out
    assert "query[0]  ((n h) d -> d n h)" in text
    assert text.rstrip().endswith("model: loads")


def test_check_names_fused_and_expert_tensors(tmp_path, capsys):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64}
    configs = {
        "gpt2": {"model_type": "gpt2", **sizes},
        "qwen3_moe": CONFIG | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 8, "head_dim": 4},
    }  # fmt: skip
    expected = {
        "gpt2": ("transformer.h.0.attn.c_attn.weight", ["query[0]", "key[0]", "value[0]"], "split into rows 16 + 16"),
        "qwen3_moe": ("model.layers.1.mlp.experts.2.up_proj.weight", ["up[1, 2]"], "f d -> d f"),
    }
    for model_type, (name, slots, how) in expected.items():
        write_checkpoint(
            tmp_path / model_type, initial_checkpoint(configs[model_type], seed=0), tokenizer_directory=tmp_path
        )
        code, found = report(capsys, tmp_path / model_type)
        assert code == 0, found["problems"]
        tensor = next(tensor for tensor in found["tensors"] if tensor["name"] == name)
        assert tensor["slots"] == slots
        assert how in tensor["how"]


def test_the_checksum_changes_with_a_bit_a_name_and_a_type(model, tmp_path, capsys):
    _, first = report(capsys, model)
    tensors = tensors_of(model)
    changes = {
        "bit": tensors | {NAME: (tensors[NAME].view(np.uint16) ^ (np.arange(256).reshape(16, 16) == 3)).view(
            ml_dtypes.bfloat16)},
        "type": tensors | {NAME: tensors[NAME].astype(np.float32)},
        "names": tensors | {NAME: tensors[NAME.replace(".0.", ".1.")], NAME.replace(".0.", ".1."): tensors[NAME]},
    }  # fmt: skip
    for what, changed in changes.items():
        shutil.copytree(model, tmp_path / what)
        save_file(changed, tmp_path / what / "model.safetensors")
        _, other = report(capsys, tmp_path / what)
        assert other["problems"] == []
        assert other["checksum"] != first["checksum"], what


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(NAME), f"missing {NAME}"),
        (lambda t: t.update({"extra": np.ones(2, np.float32)}), "left over extra"),
        (lambda t: t.update({NAME: t[NAME][:-1].copy()}), f"{NAME} has shape [15, 16], config.json says [16, 16]"),
        (lambda t: t.update({NAME: np.ones((16, 16), np.int8)}), "stored as I8"),
        (lambda t: t.update({"norm.weight": t["model.norm.weight"]}), "are the same tensor"),
    ],
)
def test_check_says_what_would_not_load(model, capsys, change, problem):
    tensors = tensors_of(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    code, found = report(capsys, model)
    assert code == 2
    assert any(problem in text for text in found["problems"]), found["problems"]
    assert found["checksum"] == ""
    assert main(["weights", "check", str(model)]) == 2
    assert "does not load" in capsys.readouterr().out


def test_check_of_configs_and_places_that_are_not_understood(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"secret_sauce": 2}))
    code, found = report(capsys, model)
    assert code == 2
    assert "secret_sauce: not understood" in found["problems"][0]
    assert main(["weights", "check", str(tmp_path / "nowhere")]) == 2
    assert "no such model directory" in capsys.readouterr().err


def test_check_of_a_scalar_head(tmp_path, capsys):
    checkpoint = with_scalar_head(initial_checkpoint(CONFIG, seed=0), seed=0)
    write_checkpoint(tmp_path / "reward", checkpoint, tokenizer_directory=tmp_path)
    code, found = report(capsys, tmp_path / "reward")
    assert (code, found["head"]) == (0, "scalar")
    assert next(t for t in found["tensors"] if t["name"] == "score.weight")["slots"] == ["score"]
