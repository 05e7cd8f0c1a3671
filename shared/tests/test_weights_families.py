"""Every family's checkpoint as transformers writes it: read, split into the model's slots, fused and written again, bit
for bit; and every linear layer computes what transformers' module does."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diptych.families.family import family, model_slots, supported_families, tensor_rules
from diptych.weights.contents import output_projection, read_contents
from diptych.weights.huggingface import Checkpoint, initial_checkpoint, read_checkpoint, write_checkpoint

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_experts": 3}
# The sizes of output projections are square where a family allows it, so that a transposed one has the right shape.
TINY = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA | {"query_pre_attn_scalar": 4},
    "gemma3_text": LLAMA | {"query_pre_attn_scalar": 4},
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 3},
    "qwen3_moe": LLAMA | EXPERTS,
    "opt": {
        "vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "do_layer_norm_before": False,
    },
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "head_dim")}
    | {"rotary_pct": 0.5},
    "bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4},
}  # fmt: skip
RNN = {
    "model_type": "rnn", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "nonlinearity": "tanh",
    "initializer_range": 0.1,
}  # fmt: skip


def theirs(model_type, head="lm", **changes):
    """A tiny transformers model with every weight drawn, biases and gains too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **TINY[model_type] | changes)
    if head == "scalar":
        config.num_labels = 1
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """DIRECTORY of a family's tiny model as `save_pretrained` leaves it, each made once."""
    made = {}

    def directory(model_type, head="lm", dtype=None, **options):
        key = (model_type, head, dtype, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type)
            if model_type == "rnn":
                size = 2000 if options else 10**9
                write_checkpoint(
                    made[key], initial_checkpoint(RNN, seed=1), tokenizer_directory=made[key], max_shard_bytes=size
                )
            else:
                model = theirs(model_type, head)
                (model if dtype is None else model.to(dtype)).save_pretrained(made[key], **options)
        return made[key]

    return directory


def tensors_of(directory):
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def through_the_slots(checkpoint):
    """HF -> slots -> HF, as an engine does it."""
    model, head = checkpoint.model, checkpoint.head
    table, out = model_slots(model, head), {}
    for rule in tensor_rules(model, head):
        for layer in rule.layers(model):
            for name in rule.names(model, layer):
                out[name] = rule.fuse(rule.split(checkpoint.weights[name], table), table)
    return Checkpoint(config=checkpoint.config, weights=out, head=head)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("model_type", supported_families())
def test_round_trip_is_byte_identical(saved, tmp_path, model_type, options):
    directory = saved(model_type, **options)
    assert (directory / "model.safetensors.index.json").exists() == bool(options)
    checkpoint = read_checkpoint(directory, precision="float32")
    size = 4000 if options else 10**9
    again = through_the_slots(checkpoint)
    write_checkpoint(tmp_path / "out", again, tokenizer_directory=directory, max_shard_bytes=size)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(directory))
    if options:
        ours, index = (
            json.loads((place / "model.safetensors.index.json").read_text()) for place in (tmp_path / "out", directory)
        )
        assert ours["metadata"]["total_size"] == index["metadata"]["total_size"]
        assert ours["weight_map"].keys() == index["weight_map"].keys()
        assert max(file.stat().st_size for file in (tmp_path / "out").glob("model-*")) < 2 * 4000 + 4000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen3_moe"])
def test_canary_a_wrong_way_back_is_seen(saved, model_type):
    checkpoint = read_checkpoint(saved(model_type), precision="float32")
    again = through_the_slots(checkpoint).weights
    name = next(name for name, value in again.items() if value.ndim == 2 and value.shape[0] == value.shape[1])
    with pytest.raises(AssertionError, match=name):
        assert_same(dict(again) | {name: again[name].T.copy()}, dict(checkpoint.weights))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in supported_families() if name != "rnn"])
def test_scalar_heads_and_transformers(saved, tmp_path, model_type):
    """A classifier of transformers is read; what is written loads there with nothing missing."""
    transformers = pytest.importorskip("transformers")
    directory = saved(model_type, head="scalar")
    checkpoint = read_checkpoint(directory, precision="float32")
    assert checkpoint.head == "scalar"
    write_checkpoint(tmp_path / "out", checkpoint, tokenizer_directory=directory)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(directory))
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == family(model_type).classifier
    assert np.array_equal(model.score.weight.detach().numpy(), checkpoint.weights["score.weight"])


def linear_mismatches(model_type, checkpoint, model):
    """Names of tensors whose module gives other numbers than the slots do. Sorted: fused ones come in another order."""
    torch = pytest.importorskip("torch")
    table = model_slots(checkpoint.model, "lm")
    modules = dict(model.named_modules())
    rules = {n: r for r in tensor_rules(checkpoint.model, "lm") for i in r.layers(checkpoint.model)
             for n in r.names(checkpoint.model, i)}  # fmt: skip
    draws, found, seen = np.random.default_rng(0), [], 0
    for name, rule in rules.items():
        module = modules.get(name.removesuffix(".weight"))
        if type(module).__name__ not in ("Linear", "Conv1D") or rule.slots[0] in ("head",):
            continue
        bias = 0 if module.bias is None else module.bias.detach().numpy()
        width = rule.split(checkpoint.weights[name], table)
        x = draws.normal(size=module.in_features if hasattr(module, "in_features") else module.weight.shape[0])
        x = x.astype(np.float32)
        wanted = module(torch.tensor(x)).detach().numpy() - bias
        values = []
        for slot, array in width.items():
            # In the decoder's layout inputs come first; only the output projection contracts two axes.
            inputs = x.reshape(array.shape[:2]) if slot == "output" else x
            values.append(np.tensordot(inputs, array, axes=inputs.ndim).ravel())
        got = np.concatenate(values)
        seen += 1
        if not np.allclose(np.sort(got), np.sort(wanted), atol=1e-4):
            found.append(name)
    assert seen >= 6
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "gpt2", "gpt_neox", "bloom"])
def test_linear_layers_compute_what_transformers_does(saved, model_type):
    checkpoint = read_checkpoint(saved(model_type), precision="float32")
    model = theirs(model_type)
    assert linear_mismatches(model_type, checkpoint, model) == []
    # Canary: a transposed square projection has the right shape and is seen.
    name = next(n for n, t in checkpoint.weights.shapes.items() if n.endswith(("o_proj.weight", "out_proj.weight",
                "c_proj.weight", "dense.weight")) and t[0] == t[1])  # fmt: skip
    wrong = dict(checkpoint.weights) | {name: checkpoint.weights[name].T}
    broken = Checkpoint(config=checkpoint.config, weights=wrong, head="lm")
    assert linear_mismatches(model_type, broken, model) == [name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "dropped"),
    [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model."), ("gpt_neox", "gpt_neox.")],
)
def test_names_without_the_trunks_prefix(saved, tmp_path, model_type, dropped):
    """As the Hub's files of gpt2, bloom and opt have them, with their old tables and tied copies."""
    directory = tmp_path / "hub"
    shutil.copytree(saved(model_type), directory)
    tensors = tensors_of(directory)
    entry = family(model_type)
    hub = {name.removeprefix(dropped): value for name, value in tensors.items()}
    tables = {"gpt2": "h.0.attn.bias", "gpt_neox": "layers.1.attention.rotary_emb.inv_freq"}
    if model_type in tables:
        hub[tables[model_type]] = np.ones((1, 1, 4, 4), np.uint8)
    tied = model_type != "gpt_neox"
    if tied:
        copied = next(name for name in hub if name.endswith(("wte.weight", "embeddings.weight", "embed_tokens.weight")))
        hub[output_projection(entry)] = hub[copied].copy()
    save_file(hub, directory / "model.safetensors")
    contents = read_contents(directory)
    assert not contents.problems
    assert contents.skipped == ((tables[model_type],) if model_type in tables else ())
    write_checkpoint(tmp_path / "out", read_checkpoint(directory, precision="float32"), tokenizer_directory=directory)
    assert_same(tensors_of(tmp_path / "out"), tensors)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_copy_that_differs_is_an_error(saved, tmp_path):
    directory = tmp_path / "hub"
    shutil.copytree(saved("gpt2"), directory)
    tensors = tensors_of(directory)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + np.float32(1e-6)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(Exception, match="lm_head.weight differs from the embeddings"):
        read_checkpoint(directory, precision="float32")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"][:-1]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(Exception, match="no copy of the embeddings"):
        read_checkpoint(directory, precision="float32")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_every_source_type_comes_out_as_it_went_in(saved, tmp_path, name):
    torch = pytest.importorskip("torch")
    directory = saved("llama", dtype=getattr(torch, name))
    precision = "float64" if name == "float64" else "float32"
    checkpoint = read_checkpoint(directory, precision=precision)
    assert {value.dtype.name for value in checkpoint.weights.values()} == {precision}
    write_checkpoint(tmp_path / "out", checkpoint, tokenizer_directory=directory)
    stored = tensors_of(directory)
    assert_same(tensors_of(tmp_path / "out"), stored)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == name
    # Rounding is a choice: arrays of float32 stay float32 unless asked.
    arrays = Checkpoint(config=checkpoint.config, weights=dict(checkpoint.weights), head="lm")
    write_checkpoint(tmp_path / "arrays", arrays, tokenizer_directory=directory)
    assert {value.dtype.name for value in tensors_of(tmp_path / "arrays").values()} == {precision}
    write_checkpoint(tmp_path / "rounded", arrays, tokenizer_directory=directory, dtype="bfloat16")
    rounded = tensors_of(tmp_path / "rounded")
    assert all(np.array_equal(rounded[n], stored[n].astype(ml_dtypes.bfloat16)) for n in stored)
