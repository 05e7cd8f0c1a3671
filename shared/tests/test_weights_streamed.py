"""Models that lie on several processes are written by the first, tensor by tensor; each process is a thread here.

Canary: a first process that stops reading where it cannot write leaves the others waiting.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diptych.data.tokenizer import Tokenizer
from diptych.engine import AdapterSpec, Model, ModelSpec
from diptych.errors import UserError
from diptych.families.adapter import SCORE, adapter_shapes
from diptych.families.family import read_model, tensor_shapes
from diptych.recipe.load import load_recipe
from diptych.run.directory import RunDirectory
from diptych.stages.adapters import merged_weights
from diptych.stages.context import Datasets, StageContext
from diptych.weights import huggingface, tensors
from diptych.weights.adapters import read_adapter
from diptych.weights.files import write_tensors
from diptych.weights.huggingface import initial_checkpoint, with_scalar_head, write_checkpoint
from diptych.weights.tensors import StreamedTensors, in_groups, stream
from shared.tests.test_stages_checkpoints import QUICKSTART, NoEngine
from shared.tests.test_world import in_all

CONFIG = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SHARD = 5000  # bytes: several files


@pytest.fixture
def tokenizer_directory(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "tokenizer"


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(tensors, "GROUP", 2500)


def on(world, source, asked):
    """`source`'s tensors as a model on several processes gives them: all must ask for the same, at the same time."""

    def read(names):
        world.agree("the names", lambda: ",".join(names))
        asked[world.index].append(list(names))
        return {name: source[name] for name in names}

    shapes = {name: value.shape for name, value in source.items()}
    return StreamedTensors(shapes, {name: value.dtype for name, value in source.items()}, read)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_groups_are_as_large_as_they_may_be():
    asked = []

    def read(names):
        asked.append(list(names))
        return {name: np.full(sizes[name], len(asked), np.float32) for name in reversed(names)}

    sizes = {"a": 300, "b": 325, "c": 1, "d": 900, "e": 10, "f": 625}
    streamed = StreamedTensors(
        {name: (size,) for name, size in sizes.items()}, dict.fromkeys(sizes, np.dtype("f4")), read
    )
    order = ["b", "a", "c", "d", "e", "f"]
    found = list(stream(streamed, order))
    asked = [names for names in asked if names != ["a"]]  # the type checker of the tests looks at a first value
    assert asked == [["b", "a"], ["c"], ["d"], ["e"], ["f"]]  # 2500 bytes are 625 elements
    assert [name for name, _ in found] == order
    assert found[0][1][0] == found[1][1][0] < found[2][1][0]  # b and a were read at once
    assert streamed["d"].shape == (900,)
    plain = {"x": np.ones(3), "y": np.zeros(2)}
    assert [name for name, _ in stream(plain, ["y", "x"])] == ["y", "x"]


def test_all_read_the_same_and_the_first_writes_what_one_process_would(tmp_path, tokenizer_directory):
    checkpoint = initial_checkpoint(CONFIG, seed=3)
    alone = tmp_path / "alone" / "model"
    write_checkpoint(alone, checkpoint, tokenizer_directory=tokenizer_directory, max_shard_bytes=SHARD)
    source, asked = dict(checkpoint.weights), [[], [], []]
    writers = []

    def work(world):
        streamed = replace(checkpoint, weights=on(world, source, asked))
        target = tmp_path / "together" / "model"
        write_checkpoint(target, streamed, tokenizer_directory=tokenizer_directory, max_shard_bytes=SHARD, world=world)
        writers.append(world.index)

    assert in_all(work) == [None] * 3
    assert contents(tmp_path / "together" / "model") == contents(alone)
    assert [path.name for path in (tmp_path / "together").iterdir()] == ["model"]
    assert asked[0] == asked[1] == asked[2]
    first = next(iter(source))  # which the type checker of the tests looks at
    read = [name for names in asked[0] if names != [first] for name in names]
    assert sorted([first, *read]) == sorted(source)
    assert max(sum(source[name].nbytes for name in names) for names in asked[0] if len(names) > 1) <= tensors.GROUP
    assert len(list(alone.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("is_careful", [True, False])
def test_a_full_disk_stops_all_and_leaves_the_old_model(tmp_path, tokenizer_directory, monkeypatch, is_careful):
    """In the middle of the second file. Canary: without care the others wait for a process that reads no more."""
    checkpoint = initial_checkpoint(CONFIG, seed=3)
    target = tmp_path / "model"
    write_checkpoint(target, initial_checkpoint(CONFIG, seed=4), tokenizer_directory=tokenizer_directory)
    before = contents(target)

    def full(file, entries, fetch):
        def some(names):
            for count, pair in enumerate(fetch(names)):
                if count == 1 and "00002" in file.name:
                    raise OSError("disk full")
                yield pair

        write_tensors(file, entries, some)

    monkeypatch.setattr(huggingface, "write_tensors", full)
    if not is_careful:

        def careless(file, entries, weights, world):
            found = stream(weights, huggingface.file_order(entries))
            if world.is_main:
                full(file, entries, lambda _: found)
            else:
                list(found)

        monkeypatch.setattr(huggingface, "_write_file", careless)
        monkeypatch.setattr("shared.tests.test_world.WAIT", 1)
    source, asked = dict(checkpoint.weights), [[], [], []]

    def work(world):
        streamed = replace(checkpoint, weights=on(world, source, asked))
        write_checkpoint(target, streamed, tokenizer_directory=tokenizer_directory, max_shard_bytes=SHARD, world=world)

    first, *others = in_all(work)
    assert str(first) == "disk full"
    if is_careful:
        assert [str(other) for other in others] == ["process 0 failed: OSError: disk full"] * 2
        assert asked[0] == asked[1] == asked[2]
    else:
        assert "disk full" not in str(others)
    assert contents(target) == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_number_that_does_not_fit_is_the_users_error_in_all(tmp_path, tokenizer_directory):
    checkpoint = initial_checkpoint(CONFIG, seed=3)
    source = {name: value * np.float32(1e9 if "norm" in name else 1) for name, value in checkpoint.weights.items()}

    def work(world):
        streamed = replace(checkpoint, weights=on(world, source, [[], [], []]))
        write_checkpoint(
            tmp_path / "model", streamed, tokenizer_directory=tokenizer_directory, dtype="float16", world=world
        )

    for error in in_all(work):
        assert isinstance(error, UserError)
        assert "a value is too large for float16" in str(error)
    assert not (tmp_path / "model").exists()


class Trained(Model):
    """A model on several processes, with an adapter or without."""

    def __init__(self, world, spec, weights, average, adapter, adapter_average):
        self.spec = ModelSpec(
            config=CONFIG, weights=weights, head="lm", optimizer=None, micro_batch_size=1, adapter=spec
        )
        self._world, self._weights, self._average = world, weights, average
        self._adapter, self._adapter_average = adapter, adapter_average

    def weights(self, names=None):
        return self._given(self._weights, names)

    def ema_weights(self, names=None):
        return self._given(self._average if self.spec.adapter is None else self._adapter_average, names)

    def adapter_weights(self):
        return self._given(self._adapter, None)

    def _given(self, source, names):
        self._world.agree("the names", lambda: str(names))
        return {name: source[name].copy() for name in (source if names is None else names)}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_what_was_trained_is_written_whole(tmp_path, tokenizer_directory, head, adapted, ema):
    """models/NAME of three processes, byte for byte: of weights, averages, and what an adapter makes of its base."""
    like = initial_checkpoint(CONFIG, seed=3)
    like = with_scalar_head(like, seed=3) if head == "scalar" else like
    model, rng = read_model(CONFIG), np.random.default_rng(0)
    spec = AdapterSpec(rank=2, alpha=3.0, targets=("q_proj", "down_proj")) if adapted else None

    def drawn(shapes):
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    weights, average = (drawn(tensor_shapes(model, head)) for _ in range(2))
    shapes = {} if spec is None else adapter_shapes(model, spec)
    shapes |= {SCORE: (1, 16)} if spec is not None and head == "scalar" else {}
    adapter, adapter_average = (drawn(shapes) for _ in range(2))
    expected = average if ema and spec is None else weights
    if spec is not None:
        expected = merged_weights(like, spec, weights, adapter_average if ema else adapter)
        if head == "scalar":  # trained beside the adapter
            expected["score.weight"] = (adapter_average if ema else adapter)[SCORE]

    class Words(Tokenizer):
        eos_token_ids, pad_token_id, bos_token_id = (1,), 0, None

        def __init__(self):
            pass

    def work(world):
        recipe = load_recipe(QUICKSTART, [])
        run = RunDirectory.create(
            tmp_path / "run", recipe, engine="numpy", environment={}, resume=False, stages=("sft",), world=world
        )
        context = StageContext(
            recipe=recipe, engine=NoEngine(), run=run, tokenizers={"sft": Words()}, datasets=Datasets(),
            tokenizer_directories={"sft": tokenizer_directory}, model_directories={"sft": tmp_path},
        )  # fmt: skip
        trained = Trained(world, spec, weights, average, adapter, adapter_average)
        context.save_trained("sft", like, trained, role="sft", ema=ema)

    assert in_all(work) == [None] * 3
    config = {**like.config, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    whole = replace(like, config=config, weights=expected)
    write_checkpoint(tmp_path / "alone" / "sft", whole, tokenizer_directory=tokenizer_directory)
    ours, theirs = contents(tmp_path / "run" / "models" / "sft"), contents(tmp_path / "alone" / "sft")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != "README.md")  # it tells the run
    if spec is not None:
        found = read_adapter(tmp_path / "run" / "models" / "sft-adapter", model, head, precision="float32")
        kept = adapter_average if ema else adapter
        assert all(np.array_equal(found.weights[name], kept[name]) for name in kept)


def test_groups_hold_what_fits_and_at_least_one():
    sizes = {"a": 12, "b": 8, "c": 36, "d": 4}
    assert list(in_groups(sizes, 20)) == [["a", "b"], ["c"], ["d"]]
    assert list(in_groups(sizes, 60)) == [["a", "b", "c", "d"]]
    assert list(in_groups({"c": 36, "d": 4}, 20)) == [["c"], ["d"]]
    assert list(in_groups({}, 20)) == []
